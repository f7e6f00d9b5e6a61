"""The student learns from a few draws of what the teacher would say: cheap to keep, and right on average."""

import torch
from torch import Tensor

from limbeck.core.card import method
from limbeck.core.headloss import Term, divergences
from limbeck.core.maths import FLOOR, pair


@method(
    paper="Anshumann et al. 2025, section 4",
    year=2025,
    arxiv="2503.16870",
    code="",
    differs="weights of a tempered proposal stay unnormalised, so that they are unbiased too",
    row="rs_kd",
    variant_of="forward_kl",
    head=lambda: Term(divergences.cross_entropy),
)
def sampled_kl(student_logits: Tensor, teacher_ids: Tensor, teacher_weights: Tensor) -> Tensor:
    """- sum_k w_k log softmax(student)[id_k] at each place.  [..., V], [..., K], [..., K] -> [...]

    With E[w] = teacher its expectation is the cross-entropy to the teacher, KL(teacher || student) plus a constant,
    and its expected gradient is softmax(student) - teacher, that of the whole distribution. What is trained on is a
    draw, so the value does not reach 0 and a lower one on the same draws need not be a better student.

    *Needs*: draws with their weights, as a store of kind `sampled` keeps them; 0 pads. About 12 ids a token do.
    *Relates to*: use `forward_kl` when the teacher runs beside the student; `top_k_kd` when a server gives only its
        likeliest tokens: that target is biased towards them, this one is not.
    *Differs*: from the paper in that only the proposal at temperature 1 gives weights that sum to 1.
    """
    z, w = pair(student_logits, teacher_weights.detach())
    log_q = torch.log_softmax(z, -1).gather(-1, teacher_ids).clamp_min(FLOOR)
    return -(w * log_q).sum(-1)
