"""The target moves from the student's own distribution to the teacher's, the faster the better it is followed."""

import torch
from torch import Tensor, nn

from limbeck.core.card import method, require
from limbeck.core.features import Shape
from limbeck.core.maths import kl_logprobs, log_probs, pair
from limbeck.core.reduce import mean


@method(
    paper="Shing et al. 2025, section 3",
    year=2025,
    arxiv="2501.16937",
    code="SakanaAI/TAID@a062892:src/distil_losses/taid.py",
    differs="the value is the divergence, less the entropy of the target; progress is measured on the cross-entropy, "
    "as in the code. The fixed ramp never goes back either",
    zero_at_match=True,
    exceptions={"gradcheck": "the target holds the student's logits still on purpose"},
)
class TAID(nn.Module):
    """KL(p_t || q), p_t = softmax((1 - t) [z_student] + t z_teacher), q = softmax(z_student).  [..., V] x 2 -> [...]

    [.] carries no gradient. With J the mean cross-entropy of a batch and d = (J_before - J) / J_before, the momentum is
    m <- b m + (1 - b) d and t <- min(t_end, max(t_start + (t_end - t_start) progress, t + a sigmoid(m) (1 - t))): never
    slower than a linear ramp, faster while the loss falls. The first batch only sets J. t moves in training mode only,
    after every call where anything counts.

    t_start: in [0, 1); 0.4 of the paper, 0.2 for pre-training.
    t_end: in (0, 1], above t_start.
    alpha: a in [0, 1], the largest step of t.
    beta: b in [0, 1), how long progress is remembered.
    adaptive: False follows the linear ramp alone.

    *Needs*: logits of both over one vocabulary, aligned. Without `progress` there is no ramp. Gradient accumulation
        moves t at every part of a step.
    *Relates to*: for teachers many times larger, where `forward_kl` asks too much at first. Alone, weight 1.
    *Differs*: see the card.
    """

    t: Tensor
    before: Tensor
    momentum: Tensor

    def __init__(
        self,
        student_logits: Shape,
        teacher_logits: Shape,
        *,
        t_start: float = 0.4,
        t_end: float = 1.0,
        alpha: float = 5e-4,
        beta: float = 0.99,
        adaptive: bool = True,
    ) -> None:
        super().__init__()
        require(0 <= t_start < 1, "t_start", t_start, "in [0, 1)")
        require(t_start < t_end <= 1, "t_end", t_end, f"in ({t_start:g}, 1]")
        require(0 <= alpha <= 1, "alpha", alpha, "in [0, 1]")
        require(0 <= beta < 1, "beta", beta, "in [0, 1)")
        self.t_start, self.t_end, self.alpha, self.beta, self.adaptive = t_start, t_end, alpha, beta, adaptive
        self.register_buffer("t", torch.tensor(t_start))
        self.register_buffer("before", torch.tensor(torch.inf))
        self.register_buffer("momentum", torch.tensor(0.0))

    def forward(
        self,
        student_logits: Tensor,
        teacher_logits: Tensor,
        progress: float | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """Per place."""
        student, teacher = pair(student_logits, teacher_logits.detach())
        log_q = log_probs(student)
        log_p = log_probs(torch.lerp(log_q.detach(), log_probs(teacher), self.t.to(log_q)))  # a word may be at -inf
        if self.training:
            cross_entropy = -(log_p.exp() * log_q.detach()).sum(-1)
            some = torch.ones_like(self.t, dtype=torch.bool) if mask is None else mask.any()
            self._advance(mean(cross_entropy, mask).value, 0.0 if progress is None else progress, some)
        return kl_logprobs(log_p, log_q)

    @torch.no_grad()
    def _advance(self, loss: Tensor, progress: float, some: Tensor) -> None:
        loss = loss.to(self.before)
        momentum = self.beta * self.momentum + (1 - self.beta) * (self.before - loss) / (self.before + 1e-15)
        stride = self.alpha * momentum.sigmoid() * (1 - self.t) if self.adaptive else 0.0
        t = (self.t + stride).clamp_min(self.t_start + (self.t_end - self.t_start) * progress).clamp_max(self.t_end)
        known = some & self.before.isfinite()
        self.t.copy_(torch.where(known, t, self.t))
        self.momentum.copy_(torch.where(known, momentum, self.momentum))
        self.before.copy_(torch.where(some, loss, self.before))
