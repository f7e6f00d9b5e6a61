"""The plain loss on hard labels, with optional smoothing: what every distillation is compared with."""

import torch.nn.functional as F
from torch import Tensor

from limbeck.core.card import method, require
from limbeck.core.errors import BadInput
from limbeck.core.headloss import Term
from limbeck.core.headloss import ce as ce_term
from limbeck.core.maths import upcast


def _head(*, label_smoothing: float = 0.0) -> Term | None:
    return None if label_smoothing else ce_term()


@method(
    paper="Szegedy et al. 2016, section 7",
    year=2015,
    arxiv="1512.00567",
    differs="without smoothing it is the label term of every recipe, older than this paper",
    head=_head,
)
def ce(student_logits: Tensor, labels: Tensor, *, label_smoothing: float = 0.0) -> Tensor:
    """-sum_c q_c log softmax(student)_c, q = (1 - e) onehot(label) + e / C.  [..., C], [...] -> [...]

    label_smoothing: e in [0, 1), the mass spread evenly over the C classes.

    *Needs*: labels; for language, the next token at each place.
    *Relates to*: use it alone for the control, next to `kd` or any other loss for the student. A teacher trained with
        smoothing tells less about the wrong classes.
    *Differs*: see the card.
    """
    require(0 <= label_smoothing < 1, "label_smoothing", label_smoothing, "in [0, 1)")
    if labels.is_floating_point():
        raise BadInput(f"ce needs the index of one class, got labels {tuple(labels.shape)} of 0 to 1; use bce")
    logits = upcast(student_logits).flatten(0, -2)
    return F.cross_entropy(logits, labels.flatten(), reduction="none", label_smoothing=label_smoothing).view_as(labels)
