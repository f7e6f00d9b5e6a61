"""Only the teacher is softened: the student, at temperature 1, matches its power-transformed probabilities."""

from torch import Tensor

from limbeck.core.card import method, require
from limbeck.core.maths import kl_logprobs, log_probs


@method(
    paper="Zheng and Yang 2024, transformed teacher matching",
    year=2024,
    arxiv="2402.11148",
    code="zkxufo/TTM@fe457b3:distiller_zoo/ttm.py",
    row="ttm_wttm",
    variant_of="kd",
)
def ttm(student_logits: Tensor, teacher_logits: Tensor, *, exponent: float = 0.1) -> Tensor:
    """KL(q || softmax(student)), q_i = p_i^g / sum_j p_j^g = softmax(g teacher)_i.  [..., C] x 2 -> [...]

    p: probabilities of the teacher; the exponent g is 1 / T for a temperature on the teacher alone. Beside `kd` it
    holds, unwritten, a term that keeps the student's Renyi entropy of order g high. There is no factor T^2.

    exponent: g in (0, 1]; 1 is the plain divergence.

    *Needs*: logits of both over the same classes; no labels.
    *Relates to*: add `ce` at weight 1; with g = 0.1 its own weight is large (45 on CIFAR-100). `wttm` weighs
        the examples.
    """
    require(0 < exponent <= 1, "exponent", exponent, "in (0, 1]")
    return kl_logprobs(log_probs(teacher_logits.detach(), 1 / exponent), log_probs(student_logits))
