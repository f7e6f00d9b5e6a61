"""The teacher's likeliest tokens one by one, and all others as a single one more."""

from torch import Tensor

from limbeck.core.card import method
from limbeck.core.headloss import Term, divergences
from limbeck.core.maths import FLOOR, kl_logprobs, pair, with_tail


@method(
    paper="practice since about 2022, without a paper: one ghost token for the tail (Megatron-LM, TRL, DistillKit)",
    year=2022,
    code="arcee-ai/DistillKit@bf94207:distillkit/lossfuncs/kl.py",
    differs="the mass of the student's tail is summed over the tail, not taken as 1 minus the head, which would "
    "lose it in rounding",
    variant_of="forward_kl",
    head=lambda: Term(divergences.forward_kl),
)
def top_k_kd(
    student_logits: Tensor, teacher_ids: Tensor, teacher_logprobs: Tensor, teacher_tail: Tensor | None = None
) -> Tensor:
    """KL over K + 1 classes: the kept tokens, and the tail.  [..., V], [..., K] x 2, [...] -> [...]

    sum_K p (log p - log q) + p_tail (log p_tail - log q_tail), where q is the student's softmax over the whole
    vocabulary. A lower bound of the full divergence, equal where q / p is constant over the tail; 0 exactly when the
    student gives every kept token the teacher's probability. Without the tail term it could be negative, and with both
    renormalised over K the student could put any mass outside.

    teacher_logprobs are over the whole vocabulary, at the temperature of the store. teacher_tail: probability outside
    the kept tokens; 1 less theirs when it is not given. Places with fewer than K tokens repeat an id, at -inf.

    *Needs*: a store of kind `topk`, or a server's top log-probabilities; K of 20 (a server's usual cap) to 128.
    *Relates to*: use `sampled_kl` when whole distributions can be drawn from: it needs fewer ids and has no bias;
        `forward_kl` when the teacher runs beside the student.
    """
    z, log_p = pair(student_logits, teacher_logprobs.detach())
    log_p = log_p.clamp(FLOOR, 0)
    tail = (1 - log_p.exp().sum(-1)) if teacher_tail is None else teacher_tail.detach().to(z)
    log_q, log_p = with_tail(z, teacher_ids, log_p, tail)
    return kl_logprobs(log_p, log_q)
