"""The plain loss on scores, such as human ratings of a translation."""

import torch
from torch import Tensor

from limbeck.core.bernoulli import multi_hot
from limbeck.core.card import method
from limbeck.core.maths import upcast
from limbeck.core.reduce import UNLABELLED


@method(
    paper="Pu et al. 2021, section 2",
    year=2021,
    arxiv="2110.06341",
    code="google-research/bleurt@cebe7e6:bleurt/model.py",
    differs="examples without a score count as 0; class indices are 1 for their class, which is the Brier score",
    row="bleurt_distill",
)
def squared_error(student_logits: Tensor, labels: Tensor) -> Tensor:
    """sum_c (s_c - y_c)^2; 0 where y is -100, for want of a label.  [..., C], [..., C] or [...] -> [...]

    *Needs*: labels as a score for each output, or class indices.
    *Relates to*: use it alone for the control, next to `bleurt_distill` for the student; `ce` for classes.
    *Differs*: see the card.
    """
    known = labels != UNLABELLED
    y = multi_hot(torch.where(known, labels, torch.zeros_like(labels)), student_logits)
    if labels.ndim < student_logits.ndim:
        known = known.unsqueeze(-1)
    return torch.where(known, upcast(student_logits) - y, 0.0).square().sum(-1)
