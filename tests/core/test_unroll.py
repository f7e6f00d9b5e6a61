"""core/unroll: replayed gradients against back-propagation through the steps, kernels against closed forms."""

import math
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, dropout

from limbeck.core.unroll import Functional, cg, implicit, krr, label_solve, relu_kernels, unroll

torch.set_num_threads(1)


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class Tiny(nn.Module):
    def __init__(self, norm: bool = False) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 8), nn.Linear(8, 3)
        self.norm = nn.BatchNorm1d(8) if norm else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.tanh(self.norm(self.a(x))))


def functional(norm: bool = False) -> Functional:
    torch.manual_seed(0)
    return Functional(Tiny(norm).double())


def bptt(loss, w: Tensor, outer: tuple[Tensor, ...], steps: int, lr: Tensor) -> Tensor:
    for k in range(steps):
        (g,) = torch.autograd.grad(loss(k, w, *outer), w, create_graph=True)
        w = w - (lr[k] if lr.ndim else lr) * g
    return w


def relative(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


def seeded_loss(f: Functional):
    """Cross entropy on soft labels of a random half of the batch, with noise on the images: both seeded by the step."""

    def loss(k: int, w: Tensor, x: Tensor, y: Tensor) -> Tensor:
        g = torch.Generator().manual_seed(k)
        rows = torch.randperm(len(x), generator=g)[: len(x) // 2]
        noisy = x[rows] + 0.1 * torch.randn(len(rows), 4, generator=g, dtype=x.dtype)
        return cross_entropy(f(w, noisy), y[rows].softmax(-1))

    return loss


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("per_step", [False, True])
def test_replay_is_exact(norm: bool, per_step: bool) -> None:
    f, target = functional(norm), randn(10, 4, seed=3)
    rate = torch.full((20,) if per_step else (), 0.5, dtype=torch.float64)
    leaves = [t.requires_grad_() for t in (f.flat(), rate, randn(10, 4, seed=1), randn(10, 3, seed=2))]
    w0, lr, x, y = leaves
    ends = [unroll(seeded_loss(f), w0, (x, y), steps=20, lr=lr), bptt(seeded_loss(f), w0, (x, y), 20, lr)]
    assert torch.equal(*ends)
    ours, plain = (torch.autograd.grad(f(w, target).square().sum(), leaves) for w in ends)
    assert all(g.abs().max() > 1e-8 for g in plain)
    assert max(relative(a, b) for a, b in zip(ours, plain, strict=True)) < 1e-10


def test_replay_repeats_the_random_numbers_of_torch() -> None:
    f = functional()
    w0, x = f.flat().requires_grad_(), randn(16, 4, seed=1).requires_grad_()
    y = torch.arange(16) % 3

    def loss(k: int, w: Tensor, x: Tensor) -> Tensor:
        return cross_entropy(f(w, dropout(x, 0.5)), y)  # nothing seeds this

    grads, after = [], []
    for run in (unroll, None):
        torch.manual_seed(7)
        lr = torch.tensor(0.3, dtype=torch.float64)
        w = unroll(loss, w0, (x,), steps=5, lr=lr) if run else bptt(loss, w0, (x,), 5, lr)
        grads.append(torch.autograd.grad(w.square().sum(), (w0, x)))
        after.append(torch.rand(1))
    assert max(relative(a, b) for a, b in zip(*grads, strict=True)) < 1e-10
    assert torch.equal(*after)  # and backward leaves the generator where it was


def test_replay_only_gives_what_is_asked_for() -> None:
    f = functional()
    w0, x, y = f.flat(), randn(6, 4, seed=1).requires_grad_(), randn(6, 3, seed=2)
    w = unroll(lambda k, w, x, y: cross_entropy(f(w, x), y.softmax(-1)), w0, (x, y), steps=3, lr=0.1)
    w.sum().backward()
    assert x.grad is not None and y.grad is None and w0.grad is None
    still = unroll(lambda k, w, x, y: cross_entropy(f(w, x), y.softmax(-1)), w0, (x.detach(), y), steps=3, lr=0.1)
    assert not still.requires_grad


def test_replay_of_a_quadratic_is_the_closed_form() -> None:
    # loss = |w - c|^2 / 2: w_T = c + (1 - lr)^T (w0 - c)
    w0, c = randn(5, seed=1).requires_grad_(), randn(5, seed=2).requires_grad_()
    lr = torch.tensor(0.1, dtype=torch.float64, requires_grad=True)
    w = unroll(lambda k, w, c: (w - c).square().sum() / 2, w0, (c,), steps=7, lr=lr)
    torch.testing.assert_close(w, c + 0.9**7 * (w0 - c))
    to_w, to_c, to_lr = torch.autograd.grad(w.sum(), (w0, c, lr))
    torch.testing.assert_close(to_w, torch.full_like(w0, 0.9**7))
    torch.testing.assert_close(to_c, torch.full_like(w0, 1 - 0.9**7))
    torch.testing.assert_close(to_lr, (-7 * 0.9**6 * (w0 - c)).sum())


def test_replay_of_a_linear_loss_has_no_second_derivative() -> None:
    w0, c = randn(3, seed=1).requires_grad_(), randn(3, seed=2).requires_grad_()
    w = unroll(lambda k, w, c: (w * c).sum(), w0, (c,), steps=4, lr=0.5)
    to_w, to_c = torch.autograd.grad(w.sum(), (w0, c))
    assert torch.equal(to_w, torch.ones_like(w0)) and torch.equal(to_c, -2 * torch.ones_like(c))
    w = unroll(lambda k, w: w.sum(), w0, steps=4, lr=0.5)
    assert torch.equal(torch.autograd.grad(w.sum(), w0)[0], torch.ones_like(w0))


def test_replay_under_autocast_replays_under_autocast() -> None:
    f = functional()
    f.net.float()
    w0, x = f.flat().requires_grad_(), randn(8, 4, seed=1).float().requires_grad_()
    y, seen = torch.arange(8) % 3, []

    def loss(k: int, w: Tensor, x: Tensor) -> Tensor:
        logits = f(w, x)
        seen.append(logits.dtype)
        return cross_entropy(logits, y)

    with torch.autocast("cpu", dtype=torch.bfloat16):
        w = unroll(loss, w0, (x,), steps=3, lr=0.1)
    w.square().sum().backward()
    assert len(seen) == 6 and set(seen) == {torch.bfloat16}


def test_replay_refuses_a_captured_tensor() -> None:
    f = functional()
    x = randn(6, 4).requires_grad_()
    y = torch.arange(6) % 3
    with pytest.raises(ValueError, match=r"\(6, 4\) that requires grad but is not in `outer`"):
        unroll(lambda k, w: cross_entropy(f(w, 2 * x), y), f.flat(), steps=2, lr=0.1)


def test_unroll_says_what_is_wrong() -> None:
    with pytest.raises(ValueError, match="`steps` must be >= 1, got 0"):
        unroll(lambda k, w: w.sum(), torch.zeros(2), steps=0, lr=0.1)
    with pytest.raises(ValueError, match=r"`lr` must be .* 3 steps, got shape \(2,\)"):
        unroll(lambda k, w: w.sum(), torch.zeros(2), steps=3, lr=torch.zeros(2))
    with pytest.raises(ValueError, match=r"must be a scalar, got shape \(2,\)"):
        unroll(lambda k, w: w, torch.zeros(2), steps=1, lr=0.1)


def test_replay_keeps_vectors_and_not_graphs() -> None:
    """What is alive between forward and backward: one vector a step, lr and the outer tensors, whatever the batch."""
    f = functional()
    p = f.flat().numel()
    for batch in (6, 60):
        x, y = randn(batch, 4).requires_grad_(), torch.arange(batch) % 3
        w = unroll(lambda k, w, x, y=y: cross_entropy(f(w, x), y), f.flat(), (x,), steps=10, lr=0.1)
        assert sum(t.numel() for t in w.grad_fn.saved_tensors) == 10 * p + 1 + x.numel()


# ---------------------------------------------------------------- functional modules


def test_functional() -> None:
    f, x = functional(norm=True), randn(6, 4)
    before = {k: v.clone() for k, v in f.net.state_dict().items()}
    w = f.flat()
    assert torch.equal(f(w, x), functional(norm=True).net(x))
    assert all(torch.equal(v, before[k]) for k, v in f.net.state_dict().items())  # running statistics too
    assert not torch.equal(f(w + 0.1, x), f(w, x))
    f.load(w + 1)
    assert torch.equal(f.flat(), w + 1)
    with pytest.raises(ValueError, match=r"has \d+ parameters, got a vector of shape \(3,\)"):
        f(torch.zeros(3), x)


def test_functional_with_shared_weights() -> None:
    a = nn.Linear(4, 4, bias=False).double()
    f, x = Functional(nn.Sequential(a, nn.Tanh(), a)), randn(2, 4)
    w = torch.ones(16, dtype=torch.float64)
    assert f.flat().shape == (16,)
    torch.testing.assert_close(f(w, x), torch.tanh(x.sum(-1, keepdim=True)).expand(2, 4) * 4)


# ---------------------------------------------------------------- implicit gradients


def test_implicit_ridge_regression() -> None:
    # argmin |x w - y|^2 + c |w|^2 in closed form, with its derivative by autograd through the solve
    x, y = randn(20, 5, seed=1).requires_grad_(), randn(20, seed=2).requires_grad_()
    c = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    closed = torch.linalg.solve(x.T @ x + c * torch.eye(5, dtype=torch.float64), x.T @ y)
    w = implicit(
        lambda w, x, y, c: (x @ w - y).square().sum() + c * w.square().sum(), closed.detach(), (x, y, c), iterations=50
    )
    assert torch.equal(w, closed)
    v = randn(5, seed=3)
    for ours, exact in zip(
        torch.autograd.grad(w @ v, (x, y, c)), torch.autograd.grad(closed @ v, (x, y, c)), strict=True
    ):
        torch.testing.assert_close(ours, exact, rtol=1e-8, atol=1e-10)


def test_implicit_is_the_limit_of_the_unroll() -> None:
    x, y, v = randn(12, 4, seed=1).requires_grad_(), torch.arange(12) % 3, randn(12, seed=2)

    def loss(w: Tensor, x: Tensor) -> Tensor:
        return cross_entropy(x @ w.view(4, 3), y) + 0.05 * w.square().sum()

    w = unroll(lambda k, w, x: loss(w, x), torch.zeros(12).double(), (x,), steps=300, lr=1.0)
    slow = torch.autograd.grad(w @ v, x)[0]
    fast = torch.autograd.grad(implicit(loss, w, (x,)) @ v, x)[0]
    assert relative(fast, slow) < 1e-9
    assert relative(torch.autograd.grad(implicit(loss, w, (x,), damping=1.0) @ v, x)[0], slow) > 0.1


def test_cg() -> None:
    a = randn(6, 6)
    a = a @ a.T + torch.eye(6)
    b = randn(6, seed=1)
    torch.testing.assert_close(cg(lambda v: a @ v, b), torch.linalg.solve(a, b))
    assert torch.equal(cg(lambda v: a @ v, 0 * b), 0 * b)
    assert cg(lambda v: -v, b).isfinite().all()


# ---------------------------------------------------------------- kernel ridge


def test_krr_interpolates_and_shrinks() -> None:
    x, y = randn(8, 3, seed=1), randn(8, 2, seed=2)
    k = relu_kernels(x)[1]
    torch.testing.assert_close(krr(k, k, y, 0.0), y)
    ridge = 0.1 * k.diagonal().mean()
    values, vectors = torch.linalg.eigh(k)
    shrunk = vectors @ ((values / (values + ridge))[:, None] * (vectors.T @ y))
    torch.testing.assert_close(krr(k, k, y, 0.1), shrunk)
    torch.testing.assert_close(krr(5 * k, 5 * k, y, 0.1), shrunk)  # the ridge has no scale
    with pytest.raises(ValueError, match="raise `ridge`"):
        krr(-k, k, y, 0.0)
    with pytest.raises(ValueError, match="`ridge` must be >= 0"):
        krr(k, k, y, -1.0)


def test_krr_with_a_linear_kernel_is_ridge_regression() -> None:
    xs, xt, y = randn(10, 3, seed=1), randn(4, 3, seed=2), randn(10, 1, seed=3)
    ridge = 0.05 * (xs @ xs.T).diagonal().mean()
    w = torch.linalg.solve(xs.T @ xs + ridge * torch.eye(3), xs.T @ y)
    torch.testing.assert_close(krr(xs @ xs.T, xt @ xs.T, y, 0.05), xt @ w)


def test_kernels_stay_in_full_precision_under_autocast() -> None:
    x, y = randn(12, 5, seed=1).float(), randn(12, 2, seed=2).float()
    k = relu_kernels(x)[1]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(relu_kernels(x)[1], k)
        again = krr(k, k, y, 1e-3)
    assert torch.equal(again, krr(k, k, y, 1e-3)) and relu_kernels(x.bfloat16())[1].dtype is torch.float32


def test_krr_gradient() -> None:
    xs, xt, y = randn(4, 3, seed=1).requires_grad_(), randn(5, 3, seed=2), randn(4, 2, seed=3).requires_grad_()

    def loss(xs: Tensor, y: Tensor) -> Tensor:
        return krr(relu_kernels(xs, depth=2)[1], relu_kernels(xt, xs, depth=2)[1], y, 1e-3).square().sum()

    assert torch.autograd.gradcheck(loss, (xs, y))


def test_label_solve_is_the_best_fit() -> None:
    xs, xt, yt = randn(4, 3, seed=1), randn(30, 3, seed=2), randn(30, 2, seed=3)
    k_ss, k_ts = relu_kernels(xs)[1], relu_kernels(xt, xs)[1]
    y = label_solve(k_ss, k_ts, yt).requires_grad_()
    loss = (krr(k_ss, k_ts, y) - yt).square().sum()
    assert torch.autograd.grad(loss, y)[0].norm() < 1e-8 * loss  # stationary, and the problem is convex


# ---------------------------------------------------------------- kernels of infinite width


def test_nngp_of_one_layer_is_the_arc_cosine_kernel() -> None:
    x, y = randn(4, 6, seed=1), randn(5, 6, seed=2)
    k, theta = relu_kernels(x, y, depth=1, weight_std=1.0, bias_std=0.0)
    nx, ny = x.norm(dim=1)[:, None], y.norm(dim=1)[None]
    angle = torch.acos((x @ y.T / (nx * ny)).clamp(-1, 1))
    closed = nx * ny / 6 * (angle.sin() + (math.pi - angle) * angle.cos()) / (2 * math.pi)
    torch.testing.assert_close(k, closed)
    torch.testing.assert_close(theta, closed + (math.pi - angle) / (2 * math.pi) * (x @ y.T) / 6)


def test_kernel_known_values() -> None:
    # He initialisation without bias keeps the diagonal: k(x, x) = 2 |x|^2 / D at every depth, theta = (depth + 1) k
    x = randn(5, 4)
    for depth in range(4):
        k, theta = relu_kernels(x, depth=depth, bias_std=0.0)
        torch.testing.assert_close(k.diagonal(), 2 * x.square().mean(1))
        torch.testing.assert_close(theta.diagonal(), (depth + 1) * 2 * x.square().mean(1))
    # orthogonal inputs, one hidden layer: k = 2 |x||y| / (D pi), the derivative kernel 1/2 meets an inner product of 0
    k, theta = relu_kernels(torch.eye(2, dtype=torch.float64), depth=1, bias_std=0.0)
    assert float(k[0, 1]) == pytest.approx(1 / math.pi) and float(theta[0, 1]) == pytest.approx(1 / math.pi)
    # opposite inputs never fire together
    x = torch.tensor([[1.0, 2.0], [-1.0, -2.0]], dtype=torch.float64)
    assert relu_kernels(x, depth=1, bias_std=0.0)[1][0, 1] == 0


def test_kernels_agree_with_a_wide_network() -> None:
    depth, width, seeds, sw, sb = 2, 512, 60, 1.3, 0.4
    x = randn(4, 5, seed=1)
    k, theta = relu_kernels(x, depth=depth, weight_std=sw, bias_std=sb)

    def forward(params: list[tuple[Tensor, Tensor]], x: Tensor) -> Tensor:
        for i, (w, b) in enumerate(params):
            x = sw * x @ w.T / math.sqrt(x.shape[-1]) + sb * b
            x = x if i == depth else x.relu()
        return x.squeeze(-1)

    outputs, kernels = [], []
    for seed in range(seeds):
        torch.manual_seed(seed)
        sizes = [5, width, width, 1]
        params = [
            (torch.randn(n, m, dtype=torch.float64), torch.randn(n, dtype=torch.float64)) for m, n in pairwise(sizes)
        ]
        jacobian = torch.func.jacrev(forward)(params, x)
        flat = torch.cat([j.flatten(1) for layer in jacobian for j in layer], 1)
        kernels.append(flat @ flat.T)
        # the covariance of the output given the hidden layers: the readout weights are averaged out exactly
        hidden = x
        for w, b in params[:-1]:
            hidden = (sw * hidden @ w.T / math.sqrt(hidden.shape[-1]) + sb * b).relu()
        outputs.append(sw**2 * hidden @ hidden.T / width + sb**2)
    for ours, samples in ((theta, torch.stack(kernels)), (k, torch.stack(outputs))):
        noise = samples.std(0) / math.sqrt(seeds)
        assert (noise < 0.03 * ours.abs().max()).all()
        assert ((samples.mean(0) - ours).abs() < 4 * noise + 2e-3 * ours.abs()).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_kernel_gradient_is_finite_for_equal_inputs(dtype: torch.dtype) -> None:
    x = randn(3, 4).to(dtype)
    x = torch.cat([x, x]).requires_grad_()
    k, theta = relu_kernels(x, depth=3)
    torch.testing.assert_close(k, k.T)
    for m in (k, theta):
        (grad,) = torch.autograd.grad(m.sum(), x, retain_graph=True)
        assert grad.isfinite().all()
    # the diagonal depends on |x| only: its gradient points along x
    (grad,) = torch.autograd.grad(theta.diagonal().sum(), x)
    along = (grad * x).sum(1, keepdim=True) / x.square().sum(1, keepdim=True) * x
    torch.testing.assert_close(grad, along, rtol=1e-3, atol=1e-3 * float(grad.detach().abs().max()))
