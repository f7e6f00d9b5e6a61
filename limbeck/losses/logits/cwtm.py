"""Labels alone, but each example counts by how sure the teacher is of it: distillation without its dark knowledge."""

import torch
import torch.nn.functional as F
from torch import Tensor

from limbeck.core.card import method
from limbeck.core.maths import upcast


@method(
    paper="Furlanello et al. 2018, section 3.2",
    year=2018,
    arxiv="1805.04770",
    row="ban",
)
def cwtm(student_logits: Tensor, teacher_logits: Tensor, labels: Tensor, mask: Tensor | None = None) -> Tensor:
    """sum_s w_s / (sum_u w_u) CE(label_s, student_s), w_s = max_c softmax(teacher_s)_c.  [..., C] x 2, [...] -> []

    *Needs*: logits of both over the same classes, and labels; where there is a mask, only its places are weighed.
    *Relates to*: an ablation of `ban`: what it gains over `ce` is the weighing of examples, what `kd` gains over it
        is what the teacher says of the wrong classes. A teacher that is equally sure of everything gives `ce`.
    """
    weight, logits = upcast(teacher_logits.detach()).softmax(-1).amax(-1), upcast(student_logits)
    if mask is not None:  # what is said where nothing counts may be no number
        counts = mask.bool()
        weight, logits = torch.where(counts, weight, 0.0), torch.where(counts.unsqueeze(-1), logits, 0.0)
    loss = F.cross_entropy(logits.flatten(0, -2), labels.flatten(), reduction="none").view_as(labels)
    return (weight * loss).sum() / weight.sum().clamp_min(1e-12)
