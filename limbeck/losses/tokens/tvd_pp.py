"""Total variation as a policy gradient whose reward is brought to mean 0 and deviation 1: a draft model's loss."""

from typing import Literal

import torch
from torch import Tensor

from limbeck.core.card import method, require
from limbeck.core.headloss import Term, divergences
from limbeck.core.maths import FLOOR, pair
from limbeck.core.reduce import mean


def _head(*, across: str = "batch") -> Term | None:
    # the deviation over a batch is known only when all its places have been seen
    return Term(divergences.tvd_pp) if across == "place" else None


@method(
    paper="Goel et al. 2024, TVD++",
    year=2024,
    arxiv="2403.00858",
    differs="the paper does not say whether a batch means a micro-batch: here what the loss is given at once. The "
    "expectation over the student's words is summed, not sampled",
    exceptions={"gradcheck": "probabilities and advantages are held still on purpose: it is a policy gradient"},
    head=_head,
)
def tvd_pp(
    student_logits: Tensor,
    teacher_logits: Tensor,
    mask: Tensor | None = None,
    *,
    across: Literal["batch", "place"] = "batch",
) -> Tensor:
    """-sum_v [q A] log q, A = (r - mean r) / std r, r = 1 where p > q else 0, [.] held still.  [..., V] x 2 -> [...]

    p = softmax(teacher), q = softmax(student). Mean and deviation are taken under q, over all places and words. Since
    sum_v q grad log q = 0 the mean moves nothing: the gradient is that of `total_variation` / std r, larger the more
    often, or the more seldom, the student's words are refused. The value says nothing and may be negative: watch
    `total_variation`.

    across: what mean and deviation are taken over: "batch" as in the paper, or each "place" by itself, where the
        gradients of sure and unsure places are brought to one size.

    *Needs*: logits of both over one vocabulary, aligned, best on texts that the teacher wrote.
    *Relates to*: fine-tunes a draft model after `forward_kl`; weight 1, with a smaller learning rate than that.
    *Differs*: see the card.
    """
    require(across in ("batch", "place"), "across", across, "'batch' or 'place'")
    student, teacher = pair(student_logits, teacher_logits.detach())
    log_q = student.log_softmax(-1).clamp_min(FLOOR)
    with torch.no_grad():
        q = log_q.exp()
        reward = (teacher.log_softmax(-1) > log_q).to(q)
        accepted = (q * reward).sum(-1)  # r under q, at each place
        expected = mean(accepted, mask).value if across == "batch" else accepted.unsqueeze(-1)
        # r is 0 or 1, so its variance follows from its mean
        deviation = (expected * (1 - expected)).clamp_min(1e-12).sqrt()
        advantage = (reward - expected) / deviation
    return -(q * advantage * log_q).sum(-1)
