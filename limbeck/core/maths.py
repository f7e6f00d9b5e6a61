"""Divergences, kernels and distances, each once and stable: finite at logits of 1e4, fp32 inside for half precision.

Divergences are over the last dimension and per element: logits [..., C] -> [...]. Nothing here reduces over a batch
unless it compares sets, and nothing detaches: that is the method's business.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

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


def fusible(*constants: Tensor | float) -> bool:
    """Whether a Function with its own gradient, but none to `constants`, may do the work of a plain formula.

    Under torch.func it may not: a Function that torch.func understands costs more for its wrapping than for its work.
    """
    wanted = any(isinstance(x, Tensor) and x.requires_grad for x in constants)
    return not (wanted or torch._C._are_functorch_transforms_active())


# ---------------------------------------------------------------- divergences


def where_labelled(values: Tensor, labels: Tensor) -> Tensor:
    """Values [...] of a loss against labels [...]; 0 where there is no label, as -100 says."""
    return torch.where(labels >= 0, values, torch.zeros_like(values))


def label_logprobs(logits: Tensor, labels: Tensor, temperature: float | Tensor = 1.0) -> Tensor:
    """log softmax(logits / temperature)[label]: [..., V], [...] -> [...]; of class 0 where a label is negative."""
    chosen: Tensor = log_probs(logits, temperature).gather(-1, labels.clamp_min(0).unsqueeze(-1)).squeeze(-1)
    return chosen


def with_tail(logits: Tensor, ids: Tensor, log_p: Tensor, tail: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probabilities [..., K + 1] of the student and of the teacher, with one more class for all that is not kept.

    logits [..., V] of the student; ids and log_p [..., K] of what is kept of the teacher, `FLOOR` where an id only
    fills up; tail [...]: its probability outside. The student's tail is summed: 1 less the kept would lose a small one.
    """
    norm = logits.logsumexp(-1, keepdim=True)
    log_q = torch.where(log_p > FLOOR, logits.gather(-1, ids) - norm, FLOOR).clamp_min(FLOOR)
    rest = (logits.scatter(-1, ids, FLOOR).logsumexp(-1, keepdim=True) - norm).clamp_min(FLOOR / 2)
    # where every word is kept there is no tail, and what rounding leaves of it must not count
    others = torch.where(rest > FLOOR / 2, tail.clamp_min(0).log().clamp_min(FLOOR).unsqueeze(-1), FLOOR)
    return torch.cat([log_q, rest], -1), torch.cat([log_p, others], -1)


def log_probs(logits: Tensor, temperature: float | Tensor = 1.0) -> Tensor:
    """log softmax(logits / temperature) over the last dimension; entries at -inf become `FLOOR`."""
    return _log_softmax(logits, temperature).clamp_min(FLOOR)


def _log_softmax(logits: Tensor, temperature: float | Tensor) -> Tensor:
    return torch.log_softmax(upcast(logits) / temperature, -1)


def kl_logprobs(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p || q) = sum p (log p - log q) [...] of log-probabilities [..., C]; never negative, accurate near p = q.

    Mass of p where q has none costs p * 1e19: finite, hard to overlook.
    """
    log_p, log_q = pair(log_p, log_q)
    return _kl(log_p, log_q)[0]


def _kl(log_p: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor]:
    """KL(p || q) [...], and q - p [..., C], its gradient to the logits of q."""
    terms, difference, _ = _kl_terms(log_p, log_q)
    return terms.sum(-1).relu(), difference


def _kl_terms(log_p: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What KL(p || q) is the sum of, q - p, and q, all [..., C].

    Each term is q - p - p d >= 0 with d = log q - log p: adding q - p changes nothing in the sum, and no large terms of
    opposite sign are left to cancel. q - p = (p + q) tanh(d / 2) keeps its digits near p = q and is finite far from it.
    """
    p, q = log_p.exp(), log_q.exp()
    d = (log_q - log_p).nan_to_num(0.0, -FLOOR, FLOOR)  # where one is -inf, or both; a nan comes back with p and q
    difference = (p + q) * (d / 2).tanh()
    return torch.addcmul(difference, p, d, value=-1), difference, q


class _KL(torch.autograd.Function):
    """KL(teacher || student) at a temperature, keeping nothing but the gradient to the student."""

    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
        total, slope = _kl(_log_softmax(teacher, temperature), _log_softmax(student, temperature))
        ctx.temperature = temperature
        ctx.save_for_backward(student, teacher, slope)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        student, teacher, slope = ctx.saved_tensors
        if torch.is_grad_enabled():  # to be differentiated once more
            slope = _log_softmax(student, ctx.temperature).exp() - _log_softmax(teacher, ctx.temperature).exp()
        return slope * (grad / ctx.temperature).unsqueeze(-1), None, None


def kl(student_logits: Tensor, teacher_logits: Tensor, temperature: float | Tensor = 1.0) -> Tensor:
    """Forward divergence KL(teacher || student) at `temperature`: [..., C] x 2 -> [...]. No T**2."""
    if fusible(teacher_logits, temperature):
        value: Tensor = _KL.apply(student_logits, teacher_logits, temperature)  # type: ignore[no-untyped-call]
        return value
    return kl_logprobs(_log_softmax(teacher_logits, temperature), _log_softmax(student_logits, temperature))


def kl_by_label(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor,
    label_weight: float,
    others_weight: float,
    temperature: float = 1.0,
) -> Tensor:
    """label_weight KL(b_t || b_s) + others_weight KL(q_t || q_s): [..., C] x 2, [...] -> [...]. No T**2.

    b = [p_label, 1 - p_label], q = softmax over the other classes, both at `temperature`.
    """
    given = student_logits, teacher_logits, labels, label_weight, others_weight, temperature
    if fusible(teacher_logits):
        value: Tensor = _KLByLabel.apply(*given)  # type: ignore[no-untyped-call]
        return value
    return _kl_by_label(*given)[0]


def _kl_by_label(
    student: Tensor, teacher: Tensor, labels: Tensor, label_weight: float, others_weight: float, temperature: float
) -> tuple[Tensor, Tensor]:
    """`kl_by_label`, and its gradient to the softened logits of the student: one pass over the C + 2 terms of both."""
    logits, label = torch.stack(pair(student, teacher)) / temperature, labels.unsqueeze(-1)
    place, classes = label.expand(2, *label.shape), logits.shape[-1]
    others = logits.scatter(-1, place, -torch.inf)
    binary = torch.cat([logits.gather(-1, place), others.logsumexp(-1, keepdim=True)], -1)
    log_q, log_p = torch.cat([others.log_softmax(-1), binary.log_softmax(-1)], -1).unbind()
    terms, difference, q = _kl_terms(log_p, log_q)
    weights = q.new_full((classes + 2,), others_weight)
    weights[classes:] = label_weight
    with torch.no_grad():  # what all others together get is shared out by the softmax over them
        to_each, to_label, to_all = (weights * difference).split([classes, 1, 1], -1)
        slope = torch.addcmul(to_each, q[..., :classes], to_all).scatter_(-1, label, to_label)
    return (weights * terms).sum(-1).relu(), slope


class _KLByLabel(torch.autograd.Function):
    """`kl_by_label` as one node of the graph, keeping nothing but the gradient to the student."""

    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor, labels: Tensor, *knobs: float) -> Tensor:
        total, slope = _kl_by_label(student, teacher, labels, *knobs)
        ctx.knobs = knobs
        ctx.save_for_backward(student, teacher, labels, slope)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        student, teacher, labels, slope = ctx.saved_tensors
        if torch.is_grad_enabled():  # to be differentiated once more
            plain, _ = _kl_by_label(student, teacher, labels, *ctx.knobs)
            (to_student,) = torch.autograd.grad(plain, student, grad, create_graph=True)
        else:
            to_student = slope * (grad / ctx.knobs[-1]).unsqueeze(-1)
        return to_student, None, None, None, None, None


def reverse_kl(student_logits: Tensor, teacher_logits: Tensor, temperature: float | Tensor = 1.0) -> Tensor:
    """KL(student || teacher) at `temperature`: [..., C] x 2 -> [...]. No T**2."""
    return kl_logprobs(_log_softmax(student_logits, temperature), _log_softmax(teacher_logits, temperature))


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


def squares(x: Tensor, dims: int | tuple[int, ...]) -> Tensor:
    """sum x^2 over `dims`, storing nothing but x for the backward pass. Differentiable twice."""
    if not fusible():
        return x.square().sum(dims)
    total: Tensor = _Squares.apply(x, dims)  # type: ignore[no-untyped-call]
    return total


def mean_square(x: Tensor) -> Tensor:
    """Mean of x^2 over all but the batch: [B, ...] -> [B]."""
    return squares(x, tuple(range(1, x.ndim))) / max(1, x[0].numel())


class _Squares(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, dims: int | tuple[int, ...]) -> Tensor:
        ctx.dims = (dims,) if isinstance(dims, int) else dims
        ctx.save_for_backward(x)
        return x.square().sum(dims)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (x,) = ctx.saved_tensors
        for dim in sorted(d % x.ndim for d in ctx.dims):
            grad = grad.unsqueeze(dim)
        return x * (2 * grad), None


def channel_energy(features: Tensor, power: float = 2.0) -> Tensor:
    """sum_c |A_c|^power [B, ...] of features [B, C, ...], for other powers than 2 up to a factor an example: its
    largest value becomes 1 first, so that |A|^power neither overflows nor fades out in fp32.
    """
    if power == 2:
        return squares(features, 1)
    size = features.abs()
    largest = size.detach().flatten(1).amax(1).clamp_min(torch.finfo(size.dtype).tiny)
    return (size / largest.view(-1, *[1] * (size.ndim - 1))).pow(power).sum(1)


def arrows(points: Tensor) -> tuple[Tensor, Tensor]:
    """Distances [N, N] of the rows of `points` [N, D], and the unit vectors [N, N, D] from each to each.

    Both are 0, and send a gradient of 0, where two rows are equal.
    """
    between = points.unsqueeze(0) - points.unsqueeze(1)
    length = squares(between, -1)
    apart = length > 0  # a plain norm would send an infinite gradient through equal rows, one over inf sends 0
    length = torch.where(apart, torch.where(apart, length, 1.0).sqrt(), 0.0)
    return length, between / torch.where(apart, length, torch.inf).unsqueeze(-1)


def gram_squares(x: Tensor, y: Tensor) -> Tensor:
    """Sum of the squared differences [] of the inner products of the rows: `gram(x)` [..., N, N] from `gram(y)`."""
    return (gram(x) - gram(y)).square().sum()


def gram_huber(x: Tensor, y: Tensor) -> Tensor:
    """Mean Huber distance [], threshold 1, of the inner products of the rows: `gram(x)` [..., N, N] from `gram(y)`."""
    x, y = pair(x, y)
    with torch.autocast(x.device.type, enabled=False):
        if not fusible(y):
            return torch.nn.functional.smooth_l1_loss(gram(x), gram(y))
        value: Tensor = _GramHuber.apply(x, y)  # type: ignore[no-untyped-call]
    return value


class _GramHuber(torch.autograd.Function):
    """One product in the place of two in the backward pass: matrices of inner products are symmetric."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor) -> Tensor:
        difference = gram(x).sub_(gram(y))
        slope = difference.clamp(-1, 1)
        ctx.save_for_backward(x, y, slope)
        return (difference.sub_(slope, alpha=0.5).mul_(slope)).mean()  # slope (difference - slope / 2)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        x, y, slope = ctx.saved_tensors
        with torch.autocast(x.device.type, enabled=False):
            if torch.is_grad_enabled():  # to be differentiated once more
                slope = (gram(x) - gram(y)).clamp(-1, 1)
            return (slope @ x) * (2 * grad / slope.numel()), None


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


def whitened(rows: Tensor, mask: Tensor | None = None, *, epsilon: float = 1e-5) -> Tensor:
    """The nearest rows of mean 0 and covariance I over those that count (ZCA): [N, D], mask [N] -> [N, D].

    epsilon: added to the variance along every direction.
    """
    weight = torch.ones_like(rows[:, 0]) if mask is None else mask.to(rows)
    weight = (weight / weight.sum().clamp_min(1)).unsqueeze(1)
    centred = rows - (weight * rows).sum(0)
    values, vectors = torch.linalg.eigh((weight * centred).mT @ centred)
    root: Tensor = vectors * (values.clamp_min(0) + epsilon).rsqrt() @ vectors.mT
    return centred @ root


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
