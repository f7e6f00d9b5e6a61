"""Forward divergence for the words that the teacher finds likely, reverse for the rest, by where the student is off."""

from functools import partial

import torch
from torch import Tensor

from limbeck.core.card import method, require
from limbeck.core.headloss import Term, divergences
from limbeck.core.maths import kl_logprobs, log_probs, pair


def _head(*, head_mass: float = 0.5, temperature: float = 1.0) -> Term:
    return Term(partial(divergences.akl, head=head_mass), temperature, temperature**2)


@method(
    paper="Wu et al. 2024, adaptive KL",
    year=2024,
    arxiv="2404.02657",
    code="wutaiqiang/LLM_KD_AKL@ff278be:AKL.py",
    differs="0 where student and teacher agree, where the code divides 0 by 0",
    zero_at_match=True,
    exceptions={"gradcheck": "the shares of the two divergences are held still on purpose"},
    head=_head,
)
def akl(student_logits: Tensor, teacher_logits: Tensor, *, head_mass: float = 0.5, temperature: float = 1.0) -> Tensor:
    """T^2 (w KL(p || q) + (1 - w) KL(q || p)), w = g_head / (g_head + g_tail).  [..., V] x 2 -> [...]

    p = softmax(teacher / T), q = softmax(student / T). The head is the likeliest words of the teacher whose mass
    together is at most `head_mass`, and always the likeliest; the tail is all others. g is the sum of |p - q| over
    each. Early in training forward KL fits the head first and reverse KL the tail, so each gets the weight of what is
    amiss there. w has no gradient.

    head_mass: in (0, 1).
    temperature: T > 0; language models are matched at 1.

    *Needs*: logits of both over one vocabulary, aligned. It sorts the vocabulary at every place.
    *Relates to*: instead of `forward_kl` or `reverse_kl` when training is short; with enough steps all three meet.
    *Differs*: see the card.
    """
    require(0 < head_mass < 1, "head_mass", head_mass, "in (0, 1)")
    require(temperature > 0, "temperature", temperature, "> 0")
    student, teacher = pair(student_logits, teacher_logits.detach())
    log_p, log_q = log_probs(teacher, temperature), log_probs(student, temperature)
    with torch.no_grad():
        p, order = log_p.exp().sort(-1, descending=True)
        gap = (p - log_q.exp().gather(-1, order)).abs()
        head = p.cumsum(-1) <= head_mass
        head[..., 0] = True
        share = (gap * head).sum(-1) / gap.sum(-1).clamp_min(torch.finfo(gap.dtype).tiny)
    return temperature**2 * (share * kl_logprobs(log_p, log_q) + (1 - share) * kl_logprobs(log_q, log_p))
