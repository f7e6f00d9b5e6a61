"""A learned metric is made small: the student gives each pair of texts the score that its teacher gives it."""

from torch import Tensor

from limbeck.core.card import method
from limbeck.core.maths import upcast


@method(
    paper="Pu et al. 2021, section 3",
    year=2021,
    arxiv="2110.06341",
    differs="the authors' repository holds trained metrics, not the training of the small ones",
    zero_at_match=True,
)
def bleurt_distill(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """sum_c (s_c - t_c)^2 of scores s and t, one an output; a metric has one.  [..., C] x 2 -> [...]

    *Needs*: scores of both, of the same scale. They may cost nothing but texts: pairs without labels, of which many are
        made by spoiling texts (the data option `perturb`).
    *Relates to*: `squared_error` on the few human scores, alone for the control, or in the same list. `kd` is for
        classes, not for scores.
    *Differs*: see the card.
    """
    return (upcast(student_logits) - upcast(teacher_logits.detach())).square().sum(-1)
