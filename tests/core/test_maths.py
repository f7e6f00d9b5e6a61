"""core/maths against closed forms, numpy, scipy and brute force."""

import itertools
import math

import numpy as np
import pytest
import scipy.linalg
import scipy.special
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

from limbeck.core import maths

torch.set_num_threads(1)


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64, scale: float = 1.0) -> Tensor:
    return (scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)).to(dtype)


def softmax(x: Tensor) -> np.ndarray:
    return scipy.special.softmax(x.double().numpy(), -1)


DIVERGENCES = {
    "kl": (maths.kl, lambda s, t: scipy.special.rel_entr(t, s).sum(-1)),
    "reverse_kl": (maths.reverse_kl, lambda s, t: scipy.special.rel_entr(s, t).sum(-1)),
    "js": (
        lambda s, t, temperature=1.0: maths.js(s, t, 0.3, temperature),
        lambda s, t: (
            0.3 * scipy.special.rel_entr(t, 0.3 * t + 0.7 * s).sum(-1)
            + 0.7 * scipy.special.rel_entr(s, 0.3 * t + 0.7 * s).sum(-1)
        ),
    ),
    "skew_kl": (
        lambda s, t, temperature=1.0: maths.skew_kl(s, t, 0.1, temperature),
        lambda s, t: scipy.special.rel_entr(t, 0.1 * t + 0.9 * s).sum(-1),
    ),
}
divergences = pytest.mark.parametrize("name", DIVERGENCES)


def test_upcast() -> None:
    for dtype, want in [
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
        (torch.int64, torch.int64),
    ]:
        assert maths.upcast(torch.zeros(2, dtype=dtype)).dtype is want
    x = torch.zeros(2)
    assert maths.upcast(x) is x


@divergences
@pytest.mark.parametrize("temperature", [1.0, 4.0, 0.5])
def test_divergence_value(name: str, temperature: float) -> None:
    f, want = DIVERGENCES[name]
    s, t = randn(3, 5, 7, seed=1), randn(3, 5, 7, seed=2, scale=3)
    value = f(s, t, temperature=temperature)
    assert value.shape == (3, 5)
    np.testing.assert_allclose(value.numpy(), want(softmax(s / temperature), softmax(t / temperature)), rtol=1e-12)


@divergences
def test_divergence_gradient(name: str) -> None:
    f, _ = DIVERGENCES[name]
    s, t = randn(2, 5, seed=1).requires_grad_(), randn(2, 5, seed=2).requires_grad_()
    assert gradcheck(f, (s, t))
    assert gradgradcheck(f, (s, t))


@pytest.mark.parametrize("gap", [False, True])
def test_kl_to_a_teacher_without_gradient_is_the_same(gap: bool) -> None:
    s, t = randn(3, 5, seed=1).requires_grad_(), randn(3, 5, seed=2)
    if gap:
        t[:, 1] = -math.inf

    def plain(x: Tensor) -> Tensor:
        return torch.special.xlogy(t.softmax(-1), t.softmax(-1)).sum(-1) - (t.softmax(-1) * x.log_softmax(-1)).sum(-1)

    def f(x: Tensor) -> Tensor:
        return maths.kl(x, t)

    torch.testing.assert_close(f(s), plain(s))
    torch.testing.assert_close(f(s), maths.kl_logprobs(t.log_softmax(-1), s.log_softmax(-1)))
    torch.testing.assert_close(torch.autograd.grad(f(s).sum(), s), torch.autograd.grad(plain(s).sum(), s))
    assert gradcheck(f, (s,)) and gradgradcheck(f, (s,))
    torch.testing.assert_close(
        torch.func.grad(lambda x: f(x).sum())(s.detach()), (s.softmax(-1) - t.softmax(-1)).detach()
    )
    torch.testing.assert_close(torch.func.vmap(maths.kl)(s.detach(), t), f(s).detach())
    lone = randn(5, seed=3).requires_grad_()  # one student row for three of the teacher's
    (grad,) = torch.autograd.grad(maths.kl(lone, t).sum(), lone)
    torch.testing.assert_close(grad, (lone.softmax(-1) - t.softmax(-1)).sum(0).detach())


@pytest.mark.parametrize("teacher_learns", [False, True])
def test_kl_by_label_is_kl_in_two(teacher_learns: bool) -> None:
    s, t, labels = randn(3, 4, 5, seed=1).requires_grad_(), randn(3, 4, 5, seed=2), torch.arange(12).view(3, 4) % 5
    t.requires_grad_(teacher_learns)

    def f(x: Tensor, label_weight: float = 0.7, others_weight: float = 3.0) -> Tensor:
        return maths.kl_by_label(x, t, labels, label_weight, others_weight, 2.0)

    known = (t.detach() / 2).softmax(-1).gather(-1, labels.unsqueeze(-1)).squeeze(-1)
    whole = f(s, 1.0, 0.0) + (1 - known) * f(s, 0.0, 1.0)
    torch.testing.assert_close(whole, maths.kl(s, t, 2.0))
    torch.testing.assert_close(f(s), 0.7 * f(s, 1.0, 0.0) + 3 * f(s, 0.0, 1.0))
    (both,) = torch.autograd.grad(whole.sum(), s)
    (one,) = torch.autograd.grad(maths.kl(s, t.detach(), 2.0).sum(), s)
    torch.testing.assert_close(both, one)
    assert gradcheck(f, (s,)) and gradgradcheck(f, (s,))
    torch.testing.assert_close(
        torch.func.grad(lambda x: f(x).sum())(s.detach()), torch.autograd.grad(f(s).sum(), s)[0].detach()
    )


def test_kl_of_nan_is_nan() -> None:
    s, t = randn(4, 3, seed=1), randn(4, 3, seed=2)
    s[0, 0] = t[1, 0] = math.nan
    assert maths.kl(s, t).isnan().tolist() == [True, True, False, False]


def test_kl_gradient_is_the_difference_of_probabilities() -> None:
    s, t = randn(4, 9, seed=1, dtype=torch.float32, scale=1e4).requires_grad_(), randn(4, 9, seed=2, scale=1e4).float()
    (grad,) = torch.autograd.grad(maths.kl(s, t).sum(), s)
    torch.testing.assert_close(grad, s.softmax(-1).detach() - t.softmax(-1), atol=1e-6, rtol=0)


@divergences
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e4])
def test_divergence_extremes(name: str, dtype: torch.dtype, scale: float) -> None:
    f, _ = DIVERGENCES[name]
    s, t = (randn(64, 33, seed=k, scale=scale).clamp(-5e4, 5e4).to(dtype).requires_grad_() for k in (1, 2))
    value = f(s, t)
    assert value.dtype is torch.float32 and value.isfinite().all() and (value >= 0).all()
    assert all(g.isfinite().all() for g in torch.autograd.grad(value.sum(), (s, t)))
    assert (f(s, s) == 0).all()


@divergences
def test_divergence_near_match_keeps_its_digits(name: str) -> None:
    f, _ = DIVERGENCES[name]
    t = randn(256, 100, seed=1, dtype=torch.float32)
    s = t + 1e-3 * randn(256, 100, seed=2, dtype=torch.float32)
    torch.testing.assert_close(f(s, t).double(), f(s.double(), t.double()), rtol=5e-3, atol=0)
    assert (f(s, t) > 0).all()  # about 5e-7: a sum of p (log p - log q) would be noise of either sign here


@divergences
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_divergence_half_precision_within_one_percent(name: str, dtype: torch.dtype) -> None:
    f, _ = DIVERGENCES[name]
    s, t = randn(32, 1000, seed=1).to(dtype).requires_grad_(), randn(32, 1000, seed=2).to(dtype)
    s64 = s.detach().double().requires_grad_()
    value, exact = f(s, t), f(s64, t.double())
    torch.testing.assert_close(value.double(), exact, rtol=1e-2, atol=0)
    (grad,), (grad64,) = torch.autograd.grad(value.sum(), s), torch.autograd.grad(exact.sum(), s64)
    assert (grad.double() - grad64).norm() < 1e-2 * grad64.norm()


@divergences
def test_divergence_ignores_entries_masked_on_both_sides(name: str) -> None:
    f, _ = DIVERGENCES[name]
    s, t = randn(3, 6, seed=1).requires_grad_(), randn(3, 6, seed=2)
    gap = torch.full((3, 2), -math.inf, dtype=torch.float64)
    wide = torch.cat([s, gap], -1)
    value = f(wide, torch.cat([t, gap], -1))
    torch.testing.assert_close(value, f(s, t))
    torch.testing.assert_close(torch.autograd.grad(value.sum(), s), torch.autograd.grad(f(s, t).sum(), s))


@divergences
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_divergence_is_finite_where_one_side_is_minus_infinity(name: str, dtype: torch.dtype) -> None:
    f, _ = DIVERGENCES[name]
    for student_masked, teacher_masked in [(True, False), (False, True)]:
        s, t = randn(3, 6, seed=1).to(dtype), randn(3, 6, seed=2).to(dtype)
        if student_masked:
            s[:, 2] = -math.inf
        if teacher_masked:
            t[:, 2] = -math.inf
        s.requires_grad_()
        value = f(s, t)
        assert value.isfinite().all() and (value > 0).all()
        assert torch.autograd.grad(value.sum(), s)[0].isfinite().all()


def test_teacher_minus_infinity_costs_nothing_and_student_minus_infinity_is_loud() -> None:
    s, t = randn(3, 6, seed=1), randn(3, 6, seed=2)
    t[:, 0] = -math.inf
    np.testing.assert_allclose(maths.kl(s, t), scipy.special.rel_entr(softmax(t), softmax(s)).sum(-1), rtol=1e-12)
    assert (maths.reverse_kl(s, t) > 1e15).all()


def test_bounds_and_limits() -> None:
    s, t = randn(50, 8, seed=1, scale=30), randn(50, 8, seed=2, scale=30)
    entropy = -0.3 * math.log(0.3) - 0.7 * math.log(0.7)
    assert (maths.js(s, t, 0.3) <= entropy + 1e-12).all() and maths.js(s, t, 0.3).max() > 0.9 * entropy
    assert (maths.skew_kl(s, t, 0.1) <= -math.log(0.1) + 1e-12).all()
    torch.testing.assert_close(maths.skew_kl(s, t, 0.0), maths.kl(s, t))
    assert (maths.skew_kl(s, t, 1.0) == 0).all()
    s, t = s / 30, t / 30
    torch.testing.assert_close(maths.js(s, t, 1e-9) / 1e-9, maths.kl(s, t), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(maths.js(s, t, 1 - 1e-9) / 1e-9, maths.reverse_kl(s, t), rtol=1e-5, atol=1e-6)
    for beta in (0.0, 1.0, -1.0):
        with pytest.raises(ValueError, match="beta"):
            maths.js(s, t, beta)


# ---------------------------------------------------------------- rows of matrices


def test_gram() -> None:
    x = randn(2, 4, 3)
    np.testing.assert_allclose(maths.gram(x), np.einsum("bnd,bmd->bnm", x, x))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert maths.gram(x.float()).dtype is torch.float32
        torch.testing.assert_close(maths.gram(x.float()).double(), maths.gram(x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dims", [1, -1, (1, 3), (0, 1, 2, 3)])
def test_squares(dims: int | tuple[int, ...]) -> None:
    x = randn(2, 3, 4, 2).requires_grad_()
    torch.testing.assert_close(maths.squares(x, dims), (x * x).sum(dims))
    assert gradcheck(lambda v: maths.squares(v, dims), (x,))
    assert gradgradcheck(lambda v: maths.squares(v, dims), (x,))
    torch.testing.assert_close(torch.func.grad(lambda v: maths.squares(v, dims).sum())(x.detach()), 2 * x.detach())


def test_mean_square() -> None:
    x = randn(3, 4, 5)
    np.testing.assert_allclose(maths.mean_square(x), np.square(x.numpy()).mean((1, 2)))


@pytest.mark.parametrize("power", [1.0, 1.5, 2.0, 3.0])
def test_channel_energy(power: float) -> None:
    x = randn(3, 4, 2, 2).requires_grad_()
    energy, want = maths.channel_energy(x, power), x.abs().pow(power).sum(1)
    largest = 1.0 if power == 2 else x.detach().abs().amax((1, 2, 3)).view(3, 1, 1) ** power
    torch.testing.assert_close(energy * largest, want)
    given = torch.autograd.grad((energy * largest).square().sum(), x)
    torch.testing.assert_close(given, torch.autograd.grad(want.square().sum(), x))
    assert maths.channel_energy(1e4 * x.detach().float(), max(power, 12.0)).isfinite().all() or power == 2


def test_arrows() -> None:
    x = randn(5, 3)
    length, unit = maths.arrows(x)
    torch.testing.assert_close(length, torch.cdist(x, x))
    torch.testing.assert_close(length.unsqueeze(-1) * unit, x.unsqueeze(0) - x.unsqueeze(1))
    x = torch.cat([x, x[:2]]).requires_grad_()
    length, unit = maths.arrows(x)
    assert length[0, 5] == 0 and not unit[0, 5].any() and not unit.diagonal().any()
    weights = randn(7, 7, 3, seed=1)
    for k in (0, 1):
        out = (maths.arrows(x)[k].reshape(7, 7, -1) * weights).sum()
        (grad,) = torch.autograd.grad(out, x, create_graph=True)
        assert grad.isfinite().all() and torch.autograd.grad(grad.square().sum(), x)[0].isfinite().all()
    x = randn(4, 2).requires_grad_()
    assert gradcheck(maths.arrows, (x,)) and gradgradcheck(maths.arrows, (x,))


@pytest.mark.parametrize("scale", [0.3, 2.0])
def test_gram_huber(scale: float) -> None:
    x, y = randn(2, 4, 3, seed=1, scale=scale).requires_grad_(), randn(2, 4, 5, seed=2, scale=scale)
    want = torch.nn.functional.smooth_l1_loss(x @ x.mT, y @ y.mT)
    torch.testing.assert_close(maths.gram_huber(x, y), want)
    torch.testing.assert_close(torch.autograd.grad(maths.gram_huber(x, y), x), torch.autograd.grad(want, x))
    assert gradcheck(maths.gram_huber, (x, y)) and gradgradcheck(maths.gram_huber, (x, y))
    y.requires_grad_()
    assert gradcheck(maths.gram_huber, (x, y))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = maths.gram_huber(x.float(), y.detach().bfloat16())
    assert value.dtype is torch.float32


@pytest.mark.parametrize("squared", [False, True])
def test_pairwise_distances(squared: bool) -> None:
    x, y = randn(2, 7, 4, seed=1).requires_grad_(), randn(2, 5, 4, seed=2).requires_grad_()
    want = torch.cdist(x, y) ** (2 if squared else 1)
    torch.testing.assert_close(maths.pairwise_distances(x, y, squared=squared), want)
    assert gradcheck(lambda a, b: maths.pairwise_distances(a, b, squared=squared), (x, y))
    assert gradgradcheck(lambda a, b: maths.pairwise_distances(a, b, squared=squared), (x, y))


def test_pairwise_distances_of_equal_rows() -> None:
    x = randn(6, 3, dtype=torch.float32)
    x = torch.cat([x, x[:2]]).requires_grad_()
    d = maths.pairwise_distances(x)
    assert (d.diagonal() == 0).all() and d[0, 6] == 0 and (d == d.T).all()
    (grad,) = torch.autograd.grad(d.sum(), x)
    assert grad.isfinite().all() and grad.abs().sum() > 0
    (zero,) = torch.autograd.grad(
        maths.pairwise_distances(torch.ones(3, 2).requires_grad_()).sum(), x, allow_unused=True
    )
    assert zero is None


def test_pairwise_distances_keep_close_pairs_far_from_the_origin() -> None:
    x = 1e3 + 1e-2 * torch.rand(20, 8, generator=torch.Generator().manual_seed(0))
    x32, x64 = x.requires_grad_(), x.detach().double().requires_grad_()
    d32, d64 = maths.pairwise_distances(x32), maths.pairwise_distances(x64)
    torch.testing.assert_close(d32.double(), d64, rtol=1e-5, atol=1e-9)
    (g32,), (g64,) = torch.autograd.grad(d32.sum(), x32), torch.autograd.grad(d64.sum(), x64)
    assert (g32.double() - g64).norm() < 1e-4 * g64.norm()


def test_pairwise_distances_in_blocks() -> None:
    x, y = randn(700, 64, seed=1), randn(600, 64, seed=2)  # more than one block of rows
    torch.testing.assert_close(maths.pairwise_distances(x, y), torch.cdist(x, y, compute_mode="use_mm_for_euclid_dist"))


def test_pairwise_distances_under_vmap() -> None:
    x = randn(3, 5, 2)
    torch.testing.assert_close(torch.func.vmap(maths.pairwise_distances)(x), maths.pairwise_distances(x))

    def f(v: Tensor) -> Tensor:
        return maths.pairwise_distances(v).sum()

    torch.testing.assert_close(torch.func.vmap(torch.func.grad(f))(x), torch.stack([torch.func.grad(f)(v) for v in x]))


def test_mmd() -> None:
    x, y = randn(6, 2, seed=1), randn(9, 2, seed=2) + 1

    def k(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return np.mean([np.exp(-((a[:, None] - b[None]) ** 2).sum(-1) / (2 * s * s)) for s in (0.7, 2.0)], 0)

    a, b = x.numpy(), y.numpy()
    want = k(a, a).mean() + k(b, b).mean() - 2 * k(a, b).mean()
    np.testing.assert_allclose(maths.mmd(x, y, (0.7, 2.0)), want, rtol=1e-12)

    def off(m: np.ndarray) -> float:
        return (m.sum() - np.trace(m)) / (len(m) * (len(m) - 1))

    want = off(k(a, a)) + off(k(b, b)) - 2 * k(a, b).mean()
    np.testing.assert_allclose(maths.mmd(x, y, (0.7, 2.0), unbiased=True), want, rtol=1e-12)
    x.requires_grad_()
    assert gradcheck(lambda v: maths.mmd(v, y, (0.7, 2.0)), (x,))
    assert maths.mmd(x, x).abs() < 1e-15 and maths.mmd(x, y) > 0
    torch.testing.assert_close(maths.mmd(10 * x, 10 * y), maths.mmd(x, y))  # the default widths follow the data
    assert maths.mmd(torch.ones(3, 2), torch.ones(4, 2)) == 0


def test_unbiased_mmd_is_centred() -> None:
    values = [
        maths.mmd(randn(20, 1, seed=2 * k), randn(20, 1, seed=2 * k + 1), (1.0,), unbiased=True) for k in range(400)
    ]
    v = torch.stack(values)
    assert v.mean().abs() < 4 * v.std() / 20
    assert (
        torch.stack([maths.mmd(randn(20, 1, seed=2 * k), randn(20, 1, seed=2 * k + 1), (1.0,)) for k in range(9)]).min()
        >= 0
    )


def test_energy_distance() -> None:
    # in one dimension: twice the integral of the squared difference of the distribution functions
    x, y = randn(30, 1, seed=1), randn(40, 1, seed=2) + 0.5
    z = torch.cat([x, y]).flatten().sort().values
    fx, fy = ((v.flatten()[:, None] <= z[None, :-1]).double().mean(0) for v in (x, y))
    torch.testing.assert_close(maths.energy_distance(x, y), 2 * ((fx - fy).square() * z.diff()).sum())
    assert maths.energy_distance(x, x) == 0
    x.requires_grad_()
    assert gradcheck(lambda v: maths.energy_distance(v, y), (x,))


def test_cka() -> None:
    x, y = randn(10, 3, seed=1), randn(10, 6, seed=2)
    a, b = (v.numpy() - v.numpy().mean(0) for v in (x, y))
    want = np.linalg.norm(a.T @ b) ** 2 / (np.linalg.norm(a.T @ a) * np.linalg.norm(b.T @ b))
    np.testing.assert_allclose(maths.cka(x, y), want, rtol=1e-12)
    rotation = torch.linalg.qr(randn(6, 6, seed=3)).Q
    for unbiased in (False, True):
        torch.testing.assert_close(maths.cka(y, 3 * y @ rotation + 5, unbiased=unbiased), torch.tensor(1.0).double())
        assert gradcheck(lambda u, v, e=unbiased: maths.cka(u, v, unbiased=e), (x.requires_grad_(), y.requires_grad_()))
    with pytest.raises(ValueError, match="10 and 9"):
        maths.cka(x, y[:9])


def test_unbiased_hsic_is_the_sum_over_distinct_quadruples() -> None:
    n = 6
    k, m = maths.gram(randn(n, 2, seed=1)), maths.gram(randn(n, 3, seed=2))
    total = sum(
        k[i, j] * (m[i, j] + m[q, r] - 2 * m[i, q]) for i, j, q, r in itertools.permutations(range(n), 4)
    ) / math.perm(n, 4)
    torch.testing.assert_close(maths._hsic_unbiased(k, m) / (n * (n - 3)), total)


# ---------------------------------------------------------------- transport and matching


def test_sinkhorn_marginals_and_limit() -> None:
    cost = randn(2, 5, 5, seed=1).square()
    plan = maths.sinkhorn(cost, epsilon=0.02, iterations=3000)
    torch.testing.assert_close(plan.sum(-1), torch.full((2, 5), 0.2).double(), atol=1e-3, rtol=0)
    torch.testing.assert_close(plan.sum(-2), torch.full((2, 5), 0.2).double())
    for c, p in zip(cost, plan, strict=True):  # epsilon -> 0 is the assignment
        rows, columns = maths.assign(c)
        assert -1e-3 <= (p * c).sum() - c[rows, columns].mean() < 0.02


def test_sinkhorn_closed_form() -> None:
    # two points each, symmetric: the plan is [[a, b], [b, a]] with a / b = exp(c / epsilon), a + b = 1 / 2
    plan = maths.sinkhorn(torch.tensor([[0.0, 1.0], [1.0, 0.0]]).double(), epsilon=0.5)
    a = 0.5 / (1 + math.exp(-2.0))
    torch.testing.assert_close(plan, torch.tensor([[a, 0.5 - a], [0.5 - a, a]]).double())


def test_sinkhorn_weights_gradient_extremes() -> None:
    cost, a, b = randn(4, 3, seed=1).square(), torch.tensor([0.5, 0.5, 0.0, 0.0]), torch.tensor([0.2, 0.3, 0.5])
    plan = maths.sinkhorn(cost, a, b, epsilon=0.1, iterations=500)
    torch.testing.assert_close(plan.sum(-1), a.double(), atol=1e-6, rtol=0)
    torch.testing.assert_close(plan.sum(0), b.double(), atol=1e-6, rtol=0)
    cost.requires_grad_()
    assert gradcheck(lambda c: (maths.sinkhorn(c, epsilon=0.5, iterations=50) * c).sum(), (cost,))
    big = maths.sinkhorn(1e4 * cost.float().detach(), epsilon=0.01)
    assert big.isfinite().all()
    with pytest.raises(ValueError, match="epsilon"):
        maths.sinkhorn(cost, epsilon=0.0)


def test_assign() -> None:
    cost = randn(4, 6)
    rows, columns = maths.assign(cost)
    best = min(sum(float(cost[i, p[i]]) for i in range(4)) for p in itertools.permutations(range(6), 4))
    assert rows.tolist() == [0, 1, 2, 3] and len(set(columns.tolist())) == 4
    assert float(cost[rows, columns].sum()) == pytest.approx(best)
    with pytest.raises(ValueError, match="finite"):
        maths.assign(torch.tensor([[math.nan]]))


def test_frechet() -> None:
    x, y = randn(50, 4, seed=1) @ randn(4, 4, seed=3), randn(60, 4, seed=2) + 1
    cx, cy = np.cov(x.numpy(), rowvar=False), np.cov(y.numpy(), rowvar=False)
    want = ((x.mean(0) - y.mean(0)) ** 2).sum() + np.trace(cx + cy - 2 * scipy.linalg.sqrtm(cx @ cy).real)
    np.testing.assert_allclose(maths.frechet(x, y), want, rtol=1e-9)
    assert maths.frechet(x, x) < 1e-9
    one = maths.frechet_gaussians(torch.zeros(1), torch.ones(1, 1) * 4, torch.ones(1) * 3, torch.ones(1, 1) * 9)
    assert float(one) == pytest.approx(9 + (2 - 3) ** 2)
    few = maths.frechet(randn(3, 20, seed=1), randn(4, 20, seed=2))  # singular covariances
    assert few.isfinite() and few > 0
    assert maths.frechet(randn(9, 1, seed=1), randn(9, 1, seed=2)).ndim == 0
    with pytest.raises(ValueError, match="2 rows"):
        maths.frechet(x[:1], y)
