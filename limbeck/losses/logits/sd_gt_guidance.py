"""The target of a generation is part label, part what the generation before said: labels keep it from fading."""

import torch
from torch import Tensor

from limbeck.core.card import method, require
from limbeck.core.maths import pair, upcast, where_labelled


@method(
    paper="Borup and Andersen 2021, section 4",
    year=2021,
    arxiv="2102.13088",
    code="Kennethborup/self_distillation@cb20d6c:self_distiller.py",
    differs="the code adds 1e-4 times the sum of the lengths of all weights; here weight decay is the optimiser's. In "
    "the code the first generation, too, learns by the squared error, with the labels alone; under `ban` it learns by "
    "the losses that ask for no teacher, ce where there are none",
)
def sd_gt_guidance(student_logits: Tensor, teacher_logits: Tensor, labels: Tensor, *, guidance: float = 0.6) -> Tensor:
    """a mean_c (s - onehot(label))^2 + (1 - a) mean_c (s - t)^2 of probabilities s, t.  [..., C] x 2, [...] -> [...]

    Its gradient is that of the squared distance to a onehot + (1 - a) t. In kernel ridge regression a > 0 bounds what
    repetition does: it ends at a ridge 1 / a times as strong, and at a = 0 at nothing (`core.guidance`).

    guidance: a, the share of the labels, in [0, 1].

    *Needs*: labels, and logits of the generation before over the same classes.
    *Relates to*: alone, as what `ban` matches. `core.guidance.best_guidance` finds a from two students, one of a = 1
        and one of a = 0, by their predictions on validation data. Usually ce + kd do better for classification.
    *Differs*: see the card.
    """
    require(0 <= guidance <= 1, "guidance", guidance, "in [0, 1]")
    mine, its = pair(upcast(student_logits), teacher_logits.detach())
    s, t = mine.softmax(-1), its.softmax(-1)
    label = torch.zeros_like(s).scatter_(-1, labels.clamp_min(0).unsqueeze(-1), 1.0)
    value = guidance * (s - label).square().mean(-1) + (1 - guidance) * (s - t).square().mean(-1)
    return where_labelled(value, labels)
