"""Transformed teacher matching that listens most to the examples on which the teacher is least sure."""

from torch import Tensor

from limbeck.core.card import method, require
from limbeck.core.maths import kl_logprobs, log_probs


@method(
    paper="Zheng and Yang 2024, weighted transformed teacher matching",
    year=2024,
    arxiv="2402.11148",
    code="zkxufo/TTM@fe457b3:distiller_zoo/wttm.py",
    row="ttm_wttm",
    variant_of="ttm",
)
def wttm(student_logits: Tensor, teacher_logits: Tensor, *, exponent: float = 0.2) -> Tensor:
    """U KL(q || softmax(student)), q_i = p_i^g / U, U = sum_j p_j^g.  [..., C] x 2 -> [...]

    p: probabilities of the teacher. U lies between 1, where it is certain, and C^(1 - g), where it knows nothing; its
    mean is not divided out, so the loss grows with the number of classes.

    exponent: g in (0, 1]; at 1, U = 1 and this is the plain divergence.

    *Needs*: logits of both over the same classes; no labels.
    *Relates to*: add `ce` at weight 1, this at 1 to 10. Use `ttm` when all examples should count alike.
    """
    require(0 < exponent <= 1, "exponent", exponent, "in (0, 1]")
    log_power = exponent * log_probs(teacher_logits.detach())
    power_sum = log_power.logsumexp(-1)
    return power_sum.exp() * kl_logprobs(log_power - power_sum.unsqueeze(-1), log_probs(student_logits))
