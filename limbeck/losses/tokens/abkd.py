"""A divergence of two exponents: how hard large mismatches pull, and how much the student's own belief counts."""

from functools import partial

import torch
from torch import Tensor

from limbeck.core.card import method, require
from limbeck.core.headloss import Term, divergences
from limbeck.core.maths import log_probs, pair


def _head(*, alpha: float = 0.2, beta: float = 0.7, temperature: float = 1.0) -> Term:
    return Term(partial(divergences.alpha_beta, alpha=alpha, beta=beta), temperature, temperature**2)


@method(
    paper="Wang et al. 2025, alpha-beta-divergence",
    year=2025,
    arxiv="2505.04560",
    code="ghwang-s/abkd@df81318:distillation_llm/distillm/losses.py",
    differs="alpha and beta above 0 only, where it is a divergence without conditions; taken relative to the larger of "
    "p and q, so that it keeps its digits near p = q",
    zero_at_match=True,
    head=_head,
)
def abkd(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    alpha: float = 0.2,
    beta: float = 0.7,
    temperature: float = 1.0,
) -> Tensor:
    """-T^2 / (a b) sum_k [p^a q^b - a / (a + b) p^(a+b) - b / (a + b) q^(a+b)], a = alpha, b = beta.

    p = softmax(teacher / T), q = softmax(student / T).  [..., V] x 2 -> [...]. (1, 0) and (0, 1) are the limits
    `forward_kl` and `reverse_kl`, (0.5, 0.5) four times the squared Hellinger distance, (1, 1) half the squared
    Euclidean one, b = 1 - a the alpha-divergence.

    alpha: > 0; the smaller, the less it stares at the words where p and q differ most. 0.2 for instructions, near 1
        for few classes.
    beta: > 0; the smaller, the less it leaves to what the student already believes. 0.7 for instructions, 0.1 to 0.5
        for few classes.
    temperature: T > 0; language models are matched at 1.

    *Needs*: logits of both over the same classes or words.
    *Relates to*: in place of `forward_kl` or `kd`, at the same weight; search alpha and beta on validation data.
    *Differs*: see the card.
    """
    require(alpha > 0 and beta > 0, "alpha, beta", (alpha, beta), "> 0; the limits are forward_kl and reverse_kl")
    require(temperature > 0, "temperature", temperature, "> 0")
    student, teacher = pair(student_logits, teacher_logits.detach())
    log_q, log_p = log_probs(student, temperature), log_probs(teacher, temperature)
    both, more = alpha + beta, log_q > log_p
    larger = torch.where(more, log_q, log_p).mul(both).exp()
    ratio = -(log_q - log_p).abs()  # log of the smaller over the larger
    power = torch.where(more, ratio.new_tensor(alpha), ratio.new_tensor(beta))  # of the smaller
    terms = larger * ((both * ratio).expm1() * power / both - (power * ratio).expm1())
    return temperature**2 / (alpha * beta) * terms.sum(-1).relu()
