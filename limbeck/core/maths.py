"""Divergences, kernels and distances, each once and stable: finite at logits of 1e4, fp32 inside for half precision.

Divergences are over the last dimension and per element: logits [..., C] -> [...]. Nothing here reduces over a batch
unless it compares sets, and nothing detaches: that is the method's business.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

# What -inf is taken for among log-probabilities: its probability is exactly 0, sums of it stay finite in fp32.
FLOOR = -1e19


def upcast(x: Tensor) -> Tensor:
    """bf16 and fp16 -> fp32; anything else unchanged."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


def pair(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Both upcast, then to the wider dtype of the two."""
    x, y = upcast(x), upcast(y)
    dtype = torch.promote_types(x.dtype, y.dtype)
    return x.to(dtype), y.to(dtype)


# ---------------------------------------------------------------- divergences


def log_probs(logits: Tensor, temperature: float | Tensor = 1.0) -> Tensor:
    """log softmax(logits / temperature) over the last dimension; entries at -inf become `FLOOR`."""
    return torch.log_softmax(upcast(logits) / temperature, -1).clamp_min(FLOOR)


def kl_logprobs(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p || q) = sum p (log p - log q) [...] of log-probabilities [..., C]; never negative, accurate near p = q.

    Each term is p (e^d - 1 - d) >= 0 with d = log q - log p: adding q - p changes nothing in the sum, and no large
    terms of opposite sign are left to cancel. Mass of p where q has none costs p * 1e19: finite, hard to overlook.
    """
    log_p, log_q = pair(log_p.clamp_min(FLOOR), log_q.clamp_min(FLOOR))
    p, q, d = log_p.exp(), log_q.exp(), log_q - log_p
    near = d.abs() < 0.5
    small = torch.where(near, d, 0.0)  # the branch not taken must not overflow: it would turn the gradient into nan
    total = torch.where(near, p * (small.expm1() - small), q - p - p * d).sum(-1)
    return total + (-total).clamp_min(0).detach()  # lifts a rounding error below 0, leaves the gradient alone


def kl(student_logits: Tensor, teacher_logits: Tensor, temperature: float | Tensor = 1.0) -> Tensor:
    """Forward divergence KL(teacher || student) at `temperature`: [..., C] x 2 -> [...]. No T**2."""
    return kl_logprobs(log_probs(teacher_logits, temperature), log_probs(student_logits, temperature))


def reverse_kl(student_logits: Tensor, teacher_logits: Tensor, temperature: float | Tensor = 1.0) -> Tensor:
    """KL(student || teacher) at `temperature`: [..., C] x 2 -> [...]. No T**2."""
    return kl_logprobs(log_probs(student_logits, temperature), log_probs(teacher_logits, temperature))


def log_mix(log_p: Tensor, log_q: Tensor, weight: float) -> Tensor:
    """log(weight p + (1 - weight) q) of log-probabilities, 0 <= weight <= 1; exactly log p where p = q."""
    log_p, log_q = pair(log_p, log_q)
    if weight in (0.0, 1.0):
        return log_p if weight else log_q
    more = log_p > log_q
    high, gap = torch.where(more, log_p, log_q), torch.where(more, log_q - log_p, log_p - log_q)
    which = more.to(gap.dtype)
    of_high = weight * which + (1 - weight) * (1 - which)
    of_low = (1 - weight) * which + weight * (1 - which)
    near = gap > -0.5  # log1p keeps the digits here, and log does where of_high is tiny
    return high + torch.where(
        near, (of_low * torch.where(near, gap, 0.0).expm1()).log1p(), (of_high + of_low * gap.exp()).log()
    )


def js(student_logits: Tensor, teacher_logits: Tensor, beta: float = 0.5, temperature: float | Tensor = 1.0) -> Tensor:
    """Generalised Jensen-Shannon: beta KL(teacher || m) + (1 - beta) KL(student || m), m = beta teacher +
    (1 - beta) student; 0 < beta < 1. At most -beta log beta - (1 - beta) log(1 - beta). [..., C] x 2 -> [...]
    """
    if not 0 < beta < 1:
        raise ValueError(f"`beta` must be between 0 and 1 exclusive, got {beta!r}; the ends are `kl` and `reverse_kl`")
    log_t, log_s = pair(log_probs(teacher_logits, temperature), log_probs(student_logits, temperature))
    log_m = log_mix(log_t, log_s, beta)
    return beta * kl_logprobs(log_t, log_m) + (1 - beta) * kl_logprobs(log_s, log_m)


def skew_kl(
    student_logits: Tensor, teacher_logits: Tensor, alpha: float = 0.1, temperature: float | Tensor = 1.0
) -> Tensor:
    """KL(teacher || alpha teacher + (1 - alpha) student), 0 <= alpha <= 1: [..., C] x 2 -> [...].

    Bounded by -log alpha. Exchange the arguments for the skewed reverse divergence.
    """
    log_t, log_s = pair(log_probs(teacher_logits, temperature), log_probs(student_logits, temperature))
    return kl_logprobs(log_t, log_mix(log_t, log_s, alpha))


# ---------------------------------------------------------------- kernels and distances between the rows of matrices


def gram(x: Tensor) -> Tensor:
    """Inner products of the rows: [..., N, D] -> [..., N, N], in fp32 also under autocast."""
    x = upcast(x)
    with torch.autocast(x.device.type, enabled=False):
        return x @ x.mT


def pairwise_distances(x: Tensor, y: Tensor | None = None, *, squared: bool = False) -> Tensor:
    """Euclidean distances [..., N, M] of the rows of x [..., N, D] and y [..., M, D] (x itself when None).

    The distance of equal rows is exactly 0, and its gradient is 0. Differences of rows are taken before squaring:
    |x|^2 + |y|^2 - 2xy would lose close pairs in fp32. Differentiable twice.
    """
    x, y = pair(x, x if y is None else y)
    square: Tensor = _SquaredDistances.apply(x, y)  # type: ignore[no-untyped-call]
    if squared:
        return square
    apart = square > 0
    return torch.where(apart, torch.where(apart, square, 1.0).sqrt(), 0.0)


class _SquaredDistances(torch.autograd.Function):
    """Differences without storing [N, M, D]: forward row block by row block, backward by two matrix products."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, y: Tensor) -> Tensor:
        rows = max(1, 2**22 // max(1, y.numel()))
        blocks = torch.split(x, rows, -2)
        return torch.cat([(b.unsqueeze(-2) - y.unsqueeze(-3)).square().sum(-1) for b in blocks], -2)

    @staticmethod
    def setup_context(ctx: torch.autograd.function.FunctionCtx, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, *grads: Tensor) -> tuple[Tensor, Tensor]:
        x, y = ctx.saved_tensors  # type: ignore[attr-defined]
        (grad,) = grads
        with torch.autocast(x.device.type, enabled=False):
            # d/dx_i sum_j g_ij |x_i - y_j|^2 = 2 (x_i sum_j g_ij - sum_j g_ij y_j); about a centre, so that close
            # rows far from the origin keep their digits
            centre = y.mean(-2, keepdim=True)
            u, v = x - centre, y - centre
            to_x = 2 * (grad.sum(-1, keepdim=True) * u - grad @ v)
            to_y = 2 * (grad.sum(-2).unsqueeze(-1) * v - grad.mT @ u)
        return to_x, to_y


def rbf(x: Tensor, y: Tensor, bandwidths: Sequence[float]) -> Tensor:
    """Mean over the bandwidths s of exp(-|x - y|^2 / (2 s^2)): [N, D], [M, D] -> [N, M]."""
    square = pairwise_distances(x, y, squared=True)
    return torch.stack([torch.exp(square / (-2 * s * s)) for s in bandwidths]).mean(0)


def mmd(x: Tensor, y: Tensor, bandwidths: Sequence[float] | None = None, *, unbiased: bool = False) -> Tensor:
    """Squared maximum mean discrepancy of two samples [N, D], [M, D] -> [] under a mixture of Gaussian kernels.

    bandwidths: standard deviations of the kernels; None takes 1/4, 1/2, 1, 2, 4 times the median distance of the
    joined sample (no gradient through it). unbiased: leave out the diagonals (may be negative), else >= 0.
    """
    x, y = pair(x, y)
    if bandwidths is None:
        with torch.no_grad():
            both = torch.cat([x, y])
            i, j = torch.triu_indices(len(both), len(both), 1, device=x.device)
            median = float(pairwise_distances(both)[i, j].median())
        bandwidths = [f * (median or 1.0) for f in (0.25, 0.5, 1.0, 2.0, 4.0)]
    xx, yy, xy = rbf(x, x, bandwidths), rbf(y, y, bandwidths), rbf(x, y, bandwidths)
    if unbiased:
        n, m = len(x), len(y)
        return (xx.sum() - xx.trace()) / (n * (n - 1)) + (yy.sum() - yy.trace()) / (m * (m - 1)) - 2 * xy.mean()
    return xx.mean() + yy.mean() - 2 * xy.mean()


def energy_distance(x: Tensor, y: Tensor) -> Tensor:
    """2 E|x - y| - E|x - x'| - E|y - y'| of two samples [N, D], [M, D] -> []; >= 0, 0 for equal samples."""
    x, y = pair(x, y)
    return 2 * pairwise_distances(x, y).mean() - pairwise_distances(x).mean() - pairwise_distances(y).mean()


def cka(x: Tensor, y: Tensor, *, unbiased: bool = False) -> Tensor:
    """Linear centred kernel alignment of the same N examples in two spaces [N, D], [N, E] -> []; 1 when equal up to
    rotation and scale. unbiased: the estimator of HSIC without the diagonal (Song et al. 2012), needs N >= 4.
    """
    if len(x) != len(y):
        raise ValueError(f"cka compares the same examples in two spaces, got {len(x)} and {len(y)} rows")
    if unbiased and len(x) < 4:
        raise ValueError(f"unbiased cka needs at least 4 examples, got {len(x)}")
    x, y = pair(x.flatten(1), y.flatten(1))
    k, m = gram(x - x.mean(0)), gram(y - y.mean(0))
    hsic = _hsic_unbiased if unbiased else lambda a, b: (a * b).sum()
    scale = (hsic(k, k) * hsic(m, m)).clamp_min(torch.finfo(k.dtype).tiny).sqrt()
    return hsic(k, m) / scale


def _hsic_unbiased(k: Tensor, m: Tensor) -> Tensor:
    """Song et al. 2012, eq. 5, up to its common factor 1 / (N (N - 3))."""
    n = len(k)
    k, m = k - torch.diag(k.diagonal()), m - torch.diag(m.diagonal())
    across = k.sum() * m.sum() / ((n - 1) * (n - 2)) - 2 / (n - 2) * (k.sum(0) @ m.sum(0))
    return (k * m).sum() + across


# ---------------------------------------------------------------- transport and matching


def sinkhorn(
    cost: Tensor, a: Tensor | None = None, b: Tensor | None = None, *, epsilon: float = 0.05, iterations: int = 200
) -> Tensor:
    """Plan [..., N, M] of entropic transport for cost [..., N, M] between weights a [..., N] and b [..., M].

    Log domain, so epsilon (in units of the cost) may be small. a, b: uniform when None. The columns sum to b exactly;
    the rows to a as the iterations converge. Transport cost = (plan * cost).sum((-2, -1)), differentiable.
    """
    if epsilon <= 0 or iterations < 1:
        raise ValueError(f"`epsilon` must be > 0 and `iterations` >= 1, got {epsilon!r} and {iterations!r}")
    cost = upcast(cost)
    n, m = cost.shape[-2:]
    log_a = cost.new_full((n,), -math.log(n)) if a is None else a.to(cost).log().clamp_min(FLOOR)
    log_b = cost.new_full((m,), -math.log(m)) if b is None else b.to(cost).log().clamp_min(FLOOR)
    kernel = cost / -epsilon
    v = torch.zeros_like(cost[..., 0, :])
    for _ in range(iterations):
        u = log_a - torch.logsumexp(kernel + v.unsqueeze(-2), -1)
        v = log_b - torch.logsumexp(kernel + u.unsqueeze(-1), -2)
    return (kernel + u.unsqueeze(-1) + v.unsqueeze(-2)).exp()


def assign(cost: Tensor) -> tuple[Tensor, Tensor]:
    """Rows and columns [min(N, M)] of the cheapest one-to-one matching for cost [N, M] (Hungarian; no gradient)."""
    from scipy.optimize import linear_sum_assignment  # slow to import, rarely needed

    if not torch.isfinite(cost).all():
        raise ValueError("assign needs finite costs, got nan or inf")
    rows, columns = linear_sum_assignment(cost.detach().double().cpu().numpy())
    return torch.as_tensor(rows, device=cost.device), torch.as_tensor(columns, device=cost.device)


def frechet_gaussians(mean_x: Tensor, cov_x: Tensor, mean_y: Tensor, cov_y: Tensor) -> Tensor:
    """Squared Wasserstein-2 distance of two Gaussians: |m - n|^2 + tr(C + D - 2 (C D)^(1/2)); fp64, [].

    tr (C D)^(1/2) is taken from the symmetric C^(1/2) D C^(1/2): singular covariances do no harm.
    """
    mean_x, cov_x, mean_y, cov_y = (t.double() for t in (mean_x, cov_x, mean_y, cov_y))
    values, vectors = torch.linalg.eigh(cov_x)
    root = (vectors * values.clamp_min(0).sqrt()) @ vectors.mT
    cross = torch.linalg.eigvalsh(root @ cov_y @ root).clamp_min(0).sqrt().sum()
    distance: Tensor = (mean_x - mean_y).square().sum() + cov_x.trace() + cov_y.trace() - 2 * cross
    return distance.clamp_min(0)


def frechet(x: Tensor, y: Tensor) -> Tensor:
    """Frechet distance [] of two sets of features [N, D], [M, D]: `frechet_gaussians` of their moments, in fp64."""
    if len(x) < 2 or len(y) < 2:
        raise ValueError(f"the Frechet distance needs at least 2 rows a side, got {len(x)} and {len(y)}")
    x, y = x.flatten(1).double(), y.flatten(1).double()
    return frechet_gaussians(x.mean(0), x.T.cov().reshape(x.shape[1], -1), y.mean(0), y.T.cov().reshape(y.shape[1], -1))
