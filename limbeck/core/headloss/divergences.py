"""The divergences that `head_loss` knows: each a function of a few rows, with its gradient in closed form.

The whole contract: `(rows, *, knobs) -> value [n], slope [n, C]`, where slope is d value / d log q, the student's
log-probabilities taken as free. Any multiple of q may be left out of it or put in: the softmax takes it off again
(gradient to the logits = slope - q * sum(slope)), so a gradient to the logits itself will do as well. Nothing here
multiplies by T**2. p is the teacher, q the student; C is the vocabulary, or the stored ids and a last class for all
others when the teacher is sparse.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from limbeck.core.card import require
from limbeck.core.maths import FLOOR


@dataclass
class Rows:
    """What a divergence sees of n places. log_q, log_p: log-probabilities [n, C] at its temperature, at least `FLOOR`;
    labels [n]: class indices among the C, where labels were given."""

    log_q: Tensor
    log_p: Tensor
    label: Tensor | None = None

    @cached_property
    def q(self) -> Tensor:
        """The student's probabilities [n, C]."""
        return self.log_q.exp()

    @cached_property
    def p(self) -> Tensor:
        """The teacher's probabilities [n, C]."""
        return self.log_p.exp()

    @cached_property
    def d(self) -> Tensor:
        """log q - log p [n, C]."""
        return self.log_q - self.log_p

    @property
    def labels(self) -> Tensor:
        """The labels [n], or one sentence when there are none."""
        if self.label is None:
            raise ValueError("this divergence asks for labels, and none were given: head_loss(..., labels=...)")
        return self.label


Pair = tuple[Tensor, Tensor]
Divergence = Callable[[Rows], Pair]

# Log-ratios beyond this stand for 0 and infinity: e^80 is finite in fp32, e^-80 far below its rounding.
FAR = 80.0


def _kl(p: Tensor, q: Tensor, d: Tensor) -> Tensor:
    """KL(p || q) [n] with d = log q - log p. q - p adds nothing to the sum but makes each term p (e^d - 1 - d) >= 0,
    and takes out what an error of either normaliser would add."""
    return (q - p).addcmul_(p, d, value=-1).sum(-1).clamp_min_(0)


def cross_entropy(rows: Rows) -> Pair:
    """-sum p log q: with labels as the target, their negative log-likelihood."""
    return -(rows.p * rows.log_q).sum(-1), -rows.p


def forward_kl(rows: Rows) -> Pair:
    """KL(p || q)."""
    return _kl(rows.p, rows.q, rows.d), -rows.p


def reverse_kl(rows: Rows) -> Pair:
    """KL(q || p)."""
    return _kl(rows.q, rows.p, -rows.d), rows.q * rows.d


def js(rows: Rows, *, beta: float = 0.5) -> Pair:
    """beta KL(p || m) + (1 - beta) KL(q || m), m = beta p + (1 - beta) q, 0 < beta < 1 (Agarwal et al. 2023)."""
    require(0 < beta < 1, "beta", beta, "in (0, 1); the ends are forward_kl and reverse_kl")
    d = rows.d.clamp(-FAR, FAR)
    over_m = d.neg().expm1_().mul_(beta).log1p_().neg_()  # log q - log m
    slope = (rows.q * over_m).mul_(1 - beta)
    return torch.addcmul(slope, rows.p, over_m.sub_(d), value=beta).sum(-1).clamp_min_(0), slope


def skew_kl(rows: Rows, *, alpha: float = 0.1) -> Pair:
    """KL(p || alpha p + (1 - alpha) q), 0 <= alpha <= 1 (Ko et al. 2024); at most -log alpha."""
    require(0 <= alpha <= 1, "alpha", alpha, "in [0, 1]")
    if alpha == 0:
        return forward_kl(rows)
    m = alpha * rows.p + (1 - alpha) * rows.q
    over_p = rows.d.clamp(max=FAR).expm1_().mul_(1 - alpha).log1p_()  # log m - log p
    value = _kl(rows.p, m, over_p)
    return value, over_p.neg_().exp_().mul_(rows.q).mul_(alpha - 1)


def skew_reverse_kl(rows: Rows, *, alpha: float = 0.1) -> Pair:
    """KL(q || alpha q + (1 - alpha) p), 0 <= alpha <= 1 (Ko et al. 2024); at most -log alpha."""
    require(0 <= alpha <= 1, "alpha", alpha, "in [0, 1]")
    if alpha == 0:
        return reverse_kl(rows)
    m = alpha * rows.q + (1 - alpha) * rows.p
    over_q = rows.d.clamp(min=-FAR).neg_().expm1_().mul_(1 - alpha).log1p_()  # log m - log q
    return _kl(rows.q, m, over_q), over_q.neg().exp_().mul_(-alpha).sub_(over_q).mul_(rows.q)


def alpha_beta(rows: Rows, *, alpha: float = 0.2, beta: float = 0.7) -> Pair:
    """-sum [p^a q^b - (a p^(a+b) + b q^(a+b)) / (a+b)] / (a b) with a = alpha > 0 and b = beta > 0 (Wang et al. 2025).

    Its limits at (1, 0) and (0, 1) are forward_kl and reverse_kl; (0.5, 0.5) is 4 times the squared Hellinger distance
    and (1, 1) half the squared Euclidean one.
    """
    require(alpha > 0 and beta > 0, "alpha, beta", (alpha, beta), "> 0; the limits are forward_kl and reverse_kl")
    both, more, gap = alpha + beta, rows.d > 0, rows.d.abs().neg_()
    larger = torch.where(more, rows.log_q, rows.log_p).mul_(both).exp_()  # all else is taken relative to it
    power = torch.where(more, gap.new_tensor(alpha), gap.new_tensor(beta))  # of the smaller
    terms = (both * gap).expm1_().mul_(power / both).sub_((power * gap).expm1_()).mul_(larger)
    slope = (alpha * gap).expm1_().mul_(larger).mul_(torch.where(more, -1.0, (beta * gap).exp_()))
    return terms.sum(-1).div_(alpha * beta).clamp_min_(0), slope.div_(alpha)


def alpha_divergence(rows: Rows, *, alpha: float = 0.5) -> Pair:
    """(1 - sum p^a q^(1-a)) / (a (1-a)), 0 < alpha < 1: towards 1 it becomes forward_kl, towards 0 reverse_kl."""
    require(0 < alpha < 1, "alpha", alpha, "in (0, 1); the limits are forward_kl and reverse_kl")
    return alpha_beta(rows, alpha=alpha, beta=1 - alpha)


def total_variation(rows: Rows) -> Pair:
    """sum |p - q| / 2: one less the chance that speculative decoding accepts the student's word."""
    gap = rows.q - rows.p
    slope = gap.sign().mul_(rows.q).mul_(0.5)
    return gap.abs_().sum(-1).mul_(0.5), slope


def acceptance(rows: Rows) -> Pair:
    """The student's mass on words that the teacher finds likelier: the mean reward of `tvd_pp`. No gradient."""
    gains = (rows.d < 0).to(rows.q.dtype).mul_(rows.q)
    return gains.sum(-1), torch.zeros_like(gains)


def tvd_pp(rows: Rows, *, mean: float | Tensor | None = None) -> Pair:
    """-sum q A log q with q and A = (r - mean) / std held still, r = [p > q] (Goel et al. 2024); may be negative.

    mean: of r under q over the whole batch, the mean of `acceptance`; None takes each place's own. std follows from it,
    since r is 0 or 1. Same direction as `total_variation` at every place, scaled by 1 / std.
    """
    reward = (rows.d < 0).to(rows.q.dtype)
    mean = (rows.q * reward).sum(-1, keepdim=True) if mean is None else reward.new_tensor(float(mean))
    slope = reward.sub_(mean).mul_(rows.q).div_(-(mean * (1 - mean)).clamp_min(1e-12).sqrt())
    return (slope * rows.log_q).sum(-1), slope


def akl(rows: Rows, *, head: float = 0.5) -> Pair:
    """Forward KL times the head's share of sum |p - q| + reverse KL times the tail's (Wu et al. 2024).

    head: the head is the likeliest words of the teacher with at most this mass together, and always the likeliest.
    The shares carry no gradient.
    """
    require(0 < head < 1, "head", head, "in (0, 1)")
    gap = (rows.p - rows.q).abs_()
    total, of_head = gap.sum(-1), _head_gap(rows.p, gap, head)
    share = (of_head / total.clamp_min(torch.finfo(total.dtype).tiny)).clamp_(0, 1)
    forward, left = forward_kl(rows)
    reverse, right = reverse_kl(rows)
    value = share * forward + (1 - share) * reverse
    return value, torch.addcmul(left * share[:, None], right, 1 - share[:, None])


def _head_gap(p: Tensor, gap: Tensor, mass: float) -> Tensor:
    """The sum of `gap` over the head of p [n]. A few of the largest are looked at before more: sorting is slow."""
    k = min(64, p.shape[-1])
    while True:
        top, ids = p.topk(k, -1)
        within = top.cumsum(-1) <= mass
        within[:, 0] = True
        if k == p.shape[-1] or not bool(within[:, -1].any()):
            return (gap.gather(-1, ids) * within).sum(-1)
        k = min(8 * k, p.shape[-1])


def taid(rows: Rows, *, t: float = 0.4) -> Pair:
    """KL(p_t || q), p_t = softmax((1 - t) z_student + t z_teacher) held still, 0 <= t <= 1 (Shing et al. 2025)."""
    require(0 <= t <= 1, "t", t, "in [0, 1]")
    between = torch.log_softmax(torch.lerp(rows.log_q, rows.log_p, t), -1).clamp_min_(FLOOR)
    target = between.exp()
    return _kl(target, rows.q, rows.log_q - between), target.neg_()


def dkd(rows: Rows, *, alpha: float = 1.0, beta: float = 8.0) -> Pair:
    """alpha KL of "the label or not?" + beta KL among the other classes (Zhao et al. 2022); alpha, beta >= 0."""
    require(alpha >= 0 and beta >= 0, "alpha, beta", (alpha, beta), ">= 0")
    y = rows.labels[:, None]
    (is_q, others_q), (is_p, others_p) = _split(rows.log_q, y), _split(rows.log_p, y)
    q, p, yes_q, yes_p = others_q.exp(), others_p.exp(), is_q.exp(), is_p.exp()
    told = (is_p[:, 1:] > FLOOR / 2).to(q.dtype)  # a teacher that is all on the label says nothing of the others
    value = alpha * _kl(yes_p, yes_q, is_q - is_p) + beta * told[:, 0] * _kl(p, q, others_q - others_p)
    # of q - p, for the label and for the rest, the one of smaller numbers has more digits
    more = alpha * torch.where(yes_p[:, :1] > 0.5, yes_p[:, 1:] - yes_q[:, 1:], yes_q[:, :1] - yes_p[:, :1])
    return value, (q * (beta * told - more)).sub_(p * told, alpha=beta).scatter_(-1, y, more)


def _split(log_p: Tensor, y: Tensor) -> Pair:
    """Log-probabilities [n, 2] of [the label, not the label], and [n, C] among the others, nothing at the label."""
    others = log_p.scatter(-1, y, -torch.inf)
    rest = others.logsumexp(-1, keepdim=True).clamp_min(FLOOR)
    none = others <= FLOOR  # also where the rest is no more
    return torch.cat([log_p.gather(-1, y), rest], -1), others.sub_(rest).clamp_min_(FLOOR).masked_fill_(none, FLOOR)
