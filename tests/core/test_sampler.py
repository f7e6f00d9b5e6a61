"""core/sampler against Gaussians and mixtures, whose denoisers, scores and probability flows are known exactly."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from limbeck.core.errors import BadInput
from limbeck.core.sampler import (
    EDM,
    KINDS,
    SOLVERS,
    Cosine,
    Denoiser,
    Flow,
    GaussianDenoiser,
    MixtureDenoiser,
    Schedule,
    clean_grid,
    denoising,
    evaluations,
    generate,
    guided,
    rollout,
    sample,
    step,
    wide,
)

torch.set_num_threads(1)

SCHEDULES: dict[str, Schedule] = {"edm": EDM(), "cosine": Cosine(), "flow": Flow(t_max=0.99)}
schedules = pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
MEAN, STD = torch.tensor([1.0, -2.0]).double(), torch.tensor([0.5, 1.5]).double()


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def times(schedule: Schedule, count: int = 9) -> Tensor:
    return schedule.at(torch.linspace(0, 1, count, dtype=torch.float64))


class Known(nn.Module):
    """A network that predicts, in the way of `kind`, exactly what a Gaussian denoiser knows."""

    def __init__(self, exact: GaussianDenoiser, kind: str) -> None:
        super().__init__()
        self.exact, self.kind = exact, kind

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        exact, s, d = self.exact, self.exact.schedule, self.exact.schedule.sigma_data
        if self.kind == "edm":
            ratio = (4 * t).exp()
            t = s.time(ratio)
            x = x * wide((s.sigma(t) ** 2 + (s.alpha(t) * d) ** 2).sqrt(), x)
        w = wide(t, x)
        alpha, sigma = s.alpha(w), s.sigma(w)
        x0, eps = exact(x, t), exact.eps(x, t)
        y, r = x / alpha, sigma / alpha
        return {
            "x0": x0,
            "eps": eps,
            "v": alpha * eps - sigma * x0,
            "score": -eps / sigma,
            "flow": s.rates(w)[0] * x0 + s.rates(w)[1] * eps,
            "edm": (x0 - d * d / (r * r + d * d) * y) / (r * d / (r * r + d * d).sqrt()),
        }[self.kind]


# ---------------------------------------------------------------- schedules


@schedules
def test_schedule(schedule: Schedule) -> None:
    t = times(schedule).requires_grad_()
    torch.testing.assert_close(schedule.time(schedule.ratio(t)), t)
    for value, rate in zip((schedule.alpha(t), schedule.sigma(t)), schedule.rates(t), strict=True):
        by_autograd = torch.autograd.grad(value.sum(), t, allow_unused=True)[0] if value.requires_grad else None
        torch.testing.assert_close(rate, torch.zeros_like(t) if by_autograd is None else by_autograd)
    grid = schedule.grid(5)
    assert len(grid) == 6 and (grid.diff() < 0).all()
    assert float(grid[0]) == pytest.approx(schedule.t_max) and float(grid[-1]) == pytest.approx(schedule.t_min)
    torch.manual_seed(0)
    drawn = schedule.draw(2000)
    assert drawn.min() >= schedule.t_min - 1e-6 and drawn.max() <= schedule.t_max + 1e-6 and drawn.std() > 0.1
    assert (schedule.weight(drawn) > 0).all()
    with pytest.raises(ValueError, match="`steps` must be >= 1"):
        schedule.grid(0)


def test_edm_numbers() -> None:
    # sigma_i = (80^(1/7) + i/17 (0.002^(1/7) - 80^(1/7)))^7, i = 0 .. 17: the grid of 18 levels of Karras et al.
    ramp = np.linspace(0, 1, 18)
    want = (80 ** (1 / 7) + ramp * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7
    np.testing.assert_allclose(EDM().grid(17), want)
    torch.manual_seed(0)
    logs = EDM().draw(20000).log()
    assert float(logs.mean()) == pytest.approx(-1.2, abs=0.03) and float(logs.std()) == pytest.approx(1.2, abs=0.03)
    assert float(EDM().weight(torch.tensor(2.0))) == pytest.approx((4 + 0.25) / (2 * 0.5) ** 2)


def test_flow_reaches_pure_noise() -> None:
    assert float(Flow().time(torch.tensor(math.inf))) == 1 and float(Flow().time(torch.tensor(0.0))) == 0
    torch.testing.assert_close(clean_grid(Flow(t_min=0.0), 4), torch.tensor([1, 0.75, 0.5, 0.25, 0]).double())


def test_wide() -> None:
    x = torch.zeros(3, 2, 5, 5, dtype=torch.bfloat16)
    assert wide(0.5, x).shape == (3, 1, 1, 1) and wide(0.5, x).dtype is torch.float32
    assert wide(torch.ones(3), x).shape == (3, 1, 1, 1) and wide(torch.ones(3, 1, 1, 1), x).shape == (3, 1, 1, 1)


# ---------------------------------------------------------------- denoisers


@schedules
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_prediction_gives_the_same_denoiser(schedule: Schedule, kind: str) -> None:
    exact = GaussianDenoiser(MEAN, STD, schedule)
    d = Denoiser(Known(exact, kind), schedule, kind)
    x = 3 * randn(9, 2)
    t = times(schedule)
    for f in ("forward", "eps", "score", "velocity"):
        torch.testing.assert_close(getattr(d, f)(x, t), getattr(exact, f)(x, t), rtol=1e-7, atol=1e-7)
        torch.testing.assert_close(getattr(d, f)(x, 0.5), getattr(exact, f)(x, 0.5), rtol=1e-7, atol=1e-7)


@schedules
def test_conversions_agree_with_each_other(schedule: Schedule) -> None:
    d, x, t = GaussianDenoiser(MEAN, STD, schedule), randn(9, 2), times(schedule)
    w = wide(t, x)
    torch.testing.assert_close(schedule.alpha(w) * d(x, t) + schedule.sigma(w) * d.eps(x, t), x)
    torch.testing.assert_close(d.score(x, t), -d.eps(x, t) / schedule.sigma(w))
    # the score of a Gaussian, by hand
    variance = schedule.alpha(w) ** 2 * STD**2 + schedule.sigma(w) ** 2
    torch.testing.assert_close(d.score(x, t), (schedule.alpha(w) * MEAN - x) / variance)
    # the velocity is the derivative of the flow map in its target time
    g, a = t.clone().requires_grad_(), d.net.flow
    ends = a(x, t, g)
    for i in range(2):
        by_autograd = torch.autograd.grad(ends[:, i].sum(), g, retain_graph=True)[0]
        torch.testing.assert_close(d.velocity(x, t)[:, i], by_autograd)


def test_edm_preconditioning_is_that_of_the_paper() -> None:
    net = nn.Linear(2, 2).double()
    seen = {}

    class Net(nn.Module):
        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            seen["x"], seen["t"] = x, t
            return net(x)

    x, t, d = 5 * randn(4, 2), torch.tensor([0.01, 0.5, 3.0, 80.0]).double(), 0.5
    w = t[:, None]
    out = Denoiser(Net(), EDM(), "edm")(x, t)
    torch.testing.assert_close(seen["x"], x / (w**2 + d**2).sqrt())
    torch.testing.assert_close(seen["t"], t.log() / 4)
    f = net(seen["x"])
    torch.testing.assert_close(out, d**2 / (w**2 + d**2) * x + w * d / (w**2 + d**2).sqrt() * f)
    out = Denoiser(Net(), EDM(), "edm", boundary=True)(x, t)
    e = 0.002
    torch.testing.assert_close(out, d**2 / ((w - e) ** 2 + d**2) * x + d * (w - e) / (w**2 + d**2).sqrt() * f)


class Any2(nn.Module):
    """A network that has learned nothing."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.f = nn.Sequential(nn.Linear(3, 16), nn.SiLU(), nn.Linear(16, 2)).double()

    def forward(self, x: Tensor, t: Tensor, labels: Tensor | None = None) -> Tensor:
        out: Tensor = self.f(torch.cat([x, t[:, None].to(x)], 1))
        return out if labels is None else out + labels[:, None]


@schedules
@pytest.mark.parametrize("kind", KINDS)
def test_boundary_holds_for_any_weights(schedule: Schedule, kind: str) -> None:
    d, x = Denoiser(Any2(), schedule, kind, boundary=True), randn(5, 2)
    want = x / schedule.alpha(torch.tensor(schedule.t_min).double())
    torch.testing.assert_close(d(x, schedule.t_min), want, rtol=1e-9, atol=1e-9)
    assert (d(x, schedule.t_max) - x).abs().max() > 0.1
    free = Denoiser(d.net, schedule, kind)
    assert (free(x, schedule.t_min) - want).abs().max() > 1e-9
    # far from the boundary the two are the same but for the noise of t_min
    difference = (d(x, schedule.t_max) - free(x, schedule.t_max)).abs().max()
    assert difference < 0.02 * (1 + free(x, schedule.t_max).abs().max())


def test_pure_noise_of_a_flow_is_finite() -> None:
    schedule = Flow()
    for kind in ("x0", "v", "flow", "edm"):
        for boundary in (False, True):
            d = Denoiser(Any2(), schedule, kind, boundary=boundary)
            assert d(randn(3, 2), 1.0).isfinite().all() and d.velocity(randn(3, 2), 1.0).isfinite().all()


@schedules
def test_mixture_score_is_the_gradient_of_the_log_density(schedule: Schedule) -> None:
    means = torch.tensor([[2.0, 0.0], [-1.0, 1.0], [0.0, -3.0]]).double()
    d = MixtureDenoiser(means, torch.tensor([0.3, 0.5, 1.0]), schedule, torch.tensor([1.0, 2.0, 3.0]))
    x, t = (2 * randn(27, 2)).requires_grad_(), times(schedule).repeat(3)
    labels = torch.arange(27) % 3
    for chosen in (None, labels):
        by_autograd = torch.autograd.grad(d.net.log_density(x, t, chosen).sum(), x)[0]
        torch.testing.assert_close(d.score(x, t, chosen), by_autograd, rtol=1e-6, atol=1e-6)
    one = GaussianDenoiser(means[1], 0.5, schedule)
    torch.testing.assert_close(d(x, t, torch.ones(27).long()), one(x, t))


def test_mixture_density_integrates_to_one_and_draws_from_itself() -> None:
    d = MixtureDenoiser(
        torch.tensor([[-1.0], [2.0]]).double(), torch.tensor([0.5, 0.2]), weights=torch.tensor([3.0, 1.0])
    )
    d.requires_grad_(False)
    line = torch.linspace(-8, 8, 4001, dtype=torch.float64)[:, None]
    assert float(torch.trapezoid(d.net.log_density(line, 0.3).exp(), line[:, 0])) == pytest.approx(1, abs=1e-6)
    torch.manual_seed(0)
    x, kinds = d.net.draw(20000)
    assert float((kinds == 0).double().mean()) == pytest.approx(0.75, abs=0.01)
    assert float(x[kinds == 1].std()) == pytest.approx(0.2, abs=0.01) and float(x.mean()) == pytest.approx(
        -0.25, abs=0.03
    )


@pytest.mark.parametrize(
    "make",
    [
        lambda s: GaussianDenoiser(MEAN, STD, s),
        lambda s: Denoiser(Any2(), s, "edm"),
        lambda s: Denoiser(Known(GaussianDenoiser(MEAN, STD, s), "v"), s, "v"),
    ],
)
def test_a_denoiser_can_be_read_along_another_schedule(make) -> None:
    x = 2 * randn(9, 2)
    for a in SCHEDULES.values():
        for b in (*SCHEDULES.values(), Flow()):
            d = make(a)
            moved, t = d.on(b), times(b)
            assert {id(p) for p in moved.parameters()} == {id(p) for p in d.parameters()}
            if d.kind != "edm":
                torch.testing.assert_close(
                    moved(x, t), make(b)(x, t), rtol=1e-5, atol=1e-4
                )  # pure noise is read at a ratio of 1e5
            assert moved(x, t).isfinite().all()


def test_guidance() -> None:
    d, x, labels = Denoiser(Any2(), EDM(), "x0"), randn(4, 2), torch.arange(4)
    torch.testing.assert_close(guided(d, x, 1.0, labels, 3.0), d(x, 1.0) + 3 * (d(x, 1.0, labels) - d(x, 1.0)))
    assert torch.equal(guided(d, x, 1.0, labels), d(x, 1.0, labels)) and torch.equal(
        guided(d, x, 1.0, None, 3.0), d(x, 1.0)
    )


@schedules
def test_denoising_loss_is_least_at_the_exact_denoiser(schedule: Schedule) -> None:
    torch.manual_seed(0)
    d = GaussianDenoiser(MEAN, STD, schedule)
    x0 = MEAN + STD * torch.randn(40000, 2, dtype=torch.float64)
    t = schedule.draw(len(x0)).double()
    loss = denoising(d, x0, t)
    assert loss.shape == (40000,)
    w = wide(t, x0)
    error = (STD**2 * schedule.sigma(w) ** 2 / (schedule.alpha(w) ** 2 * STD**2 + schedule.sigma(w) ** 2)).mean(1)
    assert float(loss.detach().mean() / (schedule.weight(t) * error.detach()).mean()) == pytest.approx(1, abs=0.02)
    for grad in torch.autograd.grad(loss.mean(), [d.net.mean, d.net.log_std]):
        assert grad.abs().max() < 0.05


def test_spec_round_trip() -> None:
    d = Denoiser(Any2(), Flow(t_max=0.9), "flow", boundary=True, solver="renoise")
    again = Denoiser.from_spec(d.net, d.spec())
    assert again.spec() == d.spec() and again.schedule == Flow(t_max=0.9) and "native" not in d.spec()
    moved, x = Denoiser(Any2(), Cosine(), "eps").on(EDM()), randn(3, 2)
    assert torch.equal(Denoiser.from_spec(moved.net, moved.spec())(x, 2.0), moved(x, 2.0))
    assert moved.on(Cosine()).spec() == Denoiser(moved.net, Cosine(), "eps").spec()
    assert Denoiser.from_spec(d.net, {"schedule": "cosine", "kind": "v"}).schedule == Cosine()
    with pytest.raises(BadInput, match="no noise schedule 'cosin'; did you mean `cosine`"):
        Denoiser.from_spec(d.net, {"schedule": "cosin"})
    with pytest.raises(BadInput, match="'edm' has no option 'sigma_max'"):
        Denoiser.from_spec(d.net, {"schedule": {"edm": {"sigma_max": 80.0}}})
    with pytest.raises(BadInput, match="no solver 'huen'; did you mean `heun`"):
        Denoiser.from_spec(d.net, {"solver": "huen"})
    with pytest.raises(BadInput, match="cannot predict 'epsilon'; did you mean `eps`"):
        Denoiser(d.net, EDM(), "epsilon")


def test_half_precision_comes_out_in_fp32() -> None:
    d = Denoiser(Any2().bfloat16(), EDM(), "edm")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        d.net.float()
        assert d(torch.zeros(2, 2, dtype=torch.bfloat16), 1.0).dtype is torch.float32


# ---------------------------------------------------------------- solvers

ORDERS = {"euler": 1, "heun": 2, "ddim": 1, "dpm1": 1, "dpm2": 2}


@schedules
@pytest.mark.parametrize("solver", ORDERS)
def test_order_of_convergence(schedule: Schedule, solver: str) -> None:
    d, noise = GaussianDenoiser(MEAN, STD, schedule), randn(64, 2)
    start, end = 0.8, 0.1  # levels: a stretch without the stiff ends
    low, high = (float(schedule.at(torch.tensor(v).double())) for v in (end, start))
    x = noise * float(schedule.sigma(torch.tensor(high)))
    exact, errors = d.net.flow(x, high, low).detach(), []
    with torch.no_grad():
        for k in (16, 32, 64):
            at = schedule.at(torch.linspace(start, end, k + 1, dtype=torch.float64))
            y = x
            for t, s in pairwise(at):
                y = step(d, y, t, s, solver)
            errors.append(float((y - exact).norm()))
    slope = math.log2(errors[1] / errors[2])
    assert slope == pytest.approx(ORDERS[solver], abs=0.15)
    assert errors[2] < 0.1 * float(exact.norm())


@schedules
def test_ddim_is_exact_when_the_data_is_a_point(schedule: Schedule) -> None:
    d = GaussianDenoiser(MEAN, 1e-9, schedule)
    x = randn(4, 2)
    for solver in ("ddim", "dpm1", "dpm2"):
        torch.testing.assert_close(
            step(d, x, schedule.t_max, schedule.t_min, solver), d.net.flow(x, schedule.t_max, schedule.t_min)
        )


def test_one_euler_step_is_enough_where_the_flow_is_straight() -> None:
    # a flow whose data are points: velocity is constant along each path
    d, noise = GaussianDenoiser(MEAN, 1e-9, Flow(t_min=0.0)), randn(5, 2)
    for k in (1, 2, 8):
        torch.testing.assert_close(generate(d, noise, k, solver="euler"), MEAN.expand(5, 2))


def test_times_may_differ_by_example() -> None:
    d, x = GaussianDenoiser(MEAN, STD), 10 * randn(3, 2)
    t, s = torch.tensor([80.0, 5.0, 1.0]).double(), torch.tensor([10.0, 0.0, 0.002]).double()
    for solver in ORDERS:
        together = step(d, x, t, s, solver)
        apart = torch.cat([step(d, x[i : i + 1], t[i], s[i], solver) for i in range(3)])
        torch.testing.assert_close(together, apart)
        torch.testing.assert_close(together[1], d(x[1:2], 5.0)[0])
        assert together.isfinite().all()


@schedules
def test_last_step_to_clean_data_is_the_denoiser(schedule: Schedule) -> None:
    d, x = GaussianDenoiser(MEAN, STD, schedule), randn(3, 2)
    for solver in SOLVERS:
        torch.testing.assert_close(step(d, x, 0.7, 0.0, solver), d(x, 0.7))
    with pytest.raises(BadInput, match="no solver 'huen'; did you mean `heun`"):
        step(d, x, 1.0, 0.5, "huen")


@schedules
def test_generate(schedule: Schedule) -> None:
    d, noise = GaussianDenoiser(MEAN, STD, schedule), randn(2000, 2)
    d.train()
    made = generate(d, noise, 40)
    assert d.training and d.net.training and not made.requires_grad
    torch.testing.assert_close(made.mean(0), MEAN, atol=0.1, rtol=0)
    torch.testing.assert_close(made.std(0), STD, atol=0.1, rtol=0)
    torch.testing.assert_close(generate(d, noise, 40, batch_size=300), made)
    one = d(noise * schedule.sigma(torch.tensor(schedule.t_max).double()), schedule.t_max)
    torch.testing.assert_close(generate(d, noise, 1), one)
    torch.testing.assert_close(generate(d, noise, 1, solver="renoise"), one)
    assert (made - d.net.flow(noise * schedule.sigma(torch.tensor(schedule.t_max).double()), schedule.t_max, 0.0)).norm(
        dim=1
    ).mean() < 0.05


@pytest.mark.parametrize("solver", SOLVERS)
def test_evaluations_are_counted_right(solver: str) -> None:
    calls = 0

    class Counted(nn.Module):
        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            nonlocal calls
            calls += 1
            return 0 * x

    for k in (1, 2, 5):
        calls = 0
        generate(Denoiser(Counted(), EDM(), "edm"), randn(2, 2), k, solver=solver)
        assert calls == evaluations(k, solver)


def test_labels_reach_the_network() -> None:
    means = torch.tensor([[5.0, 0.0], [-5.0, 0.0]]).double()
    d, labels = MixtureDenoiser(means, 0.1), torch.arange(10) % 2
    made = generate(d, randn(10, 2), 10, labels=labels, batch_size=3)
    torch.testing.assert_close(made, means[labels], atol=1, rtol=0)


# ---------------------------------------------------------------- several steps with new noise


def test_renoising_with_a_perfect_one_step_student_keeps_the_distribution() -> None:
    """The student is the exact flow map to t_min, so its x has the data's variance plus that of t_min."""
    schedule = EDM(t_min=0.5, t_max=10.0)
    exact = GaussianDenoiser(MEAN, STD, schedule)

    class Map(nn.Module):
        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            return exact.net.flow(x, t, schedule.t_min)

    student = Denoiser(Map(), schedule, "x0")
    student.boundary = True  # what the map already has
    student.forward = lambda x, t, labels=None: student.net(x, wide(t, x).flatten())  # type: ignore[method-assign]
    torch.manual_seed(0)
    x0 = MEAN + STD * torch.randn(40000, 2, dtype=torch.float64)
    x = x0 + 4.0 * torch.randn_like(x0)
    y = step(student, x, 4.0, 2.0, "renoise")
    torch.testing.assert_close(y.var(0), STD**2 + 2.0**2, rtol=0.03, atol=0)


def test_rollout_is_what_sampling_would_show() -> None:
    d = Denoiser(Any2(), EDM(t_max=5.0), "edm", solver="renoise")
    grid, noise = clean_grid(d.schedule, 3), randn(4, 2)
    for k in range(3):
        torch.manual_seed(3)
        made = rollout(d, noise, grid, k)
        torch.manual_seed(3)
        x = 5 * noise
        for i in range(k):
            x = d(x, grid[i]) + grid[i + 1] * torch.randn_like(x)
        torch.testing.assert_close(made, d(x, grid[k]))
    torch.manual_seed(3)
    last = rollout(d, noise, grid, 2)
    torch.manual_seed(3)
    torch.testing.assert_close(generate(d, noise, 3), last.detach())


def test_rollout_gradient_begins_where_it_is_told() -> None:
    d = Denoiser(Any2(), EDM(t_max=5.0), "edm")
    grid, noise = clean_grid(d.schedule, 3), randn(4, 2)

    def gradient(**at: int) -> Tensor:
        torch.manual_seed(3)
        return torch.autograd.grad(rollout(d, noise, grid, 2, **at).sum(), d.net.f[0].weight)[0]

    torch.manual_seed(3)
    with torch.no_grad():
        x = step(d, step(d, 5 * noise, grid[0], grid[1], "renoise"), grid[1], grid[2], "renoise")
    only_last = torch.autograd.grad(d(x, grid[2]).sum(), d.net.f[0].weight)[0]
    torch.testing.assert_close(gradient(), only_last)
    torch.testing.assert_close(gradient(grad_at=2), only_last)
    assert not torch.allclose(gradient(grad_at=0), only_last) and not torch.allclose(
        gradient(grad_at=1), gradient(grad_at=0)
    )
    with pytest.raises(ValueError, match="`k` must be an index of the 4 times, got 4"):
        rollout(d, noise, grid, 4)


def test_sample_keeps_gradients() -> None:
    d, noise = GaussianDenoiser(MEAN, STD), randn(3, 2).requires_grad_()
    end = sample(d, noise, d.schedule.grid(4), "heun")
    grad = torch.autograd.grad(end.sum(), noise)[0]
    exact = torch.autograd.grad(d.net.flow(80 * noise, 80.0, 0.002).sum(), noise)[0]
    assert grad.isfinite().all() and (grad > 0).all() and (exact > 0).all()
