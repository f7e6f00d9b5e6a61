"""The three shortening methods against their authors' code (shortening.json) and against teachers known exactly."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from limbeck.core.errors import BadInput
from limbeck.core.loop import Clock, Stage
from limbeck.core.nets import Nets
from limbeck.core.reduce import Part
from limbeck.core.sampler import EDM, Denoiser, Flow, GaussianDenoiser, Pairs, generate, straightness, wide
from limbeck.train.samplers.consistency_distillation import ConsistencyDistillation
from limbeck.train.samplers.dmd2 import DMD2
from limbeck.train.samplers.reflow import Reflow

torch.set_num_threads(1)

REFERENCE = json.loads((Path(__file__).parent / "shortening.json").read_text())
MEAN, STD = torch.tensor([1.0, -2.0]).double(), torch.tensor([0.5, 1.5]).double()


def double(numbers: Sequence) -> Tensor:
    return torch.tensor(numbers, dtype=torch.float64)


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def feed(monkeypatch: pytest.MonkeyPatch, **values: list[Tensor]) -> None:
    """Put given numbers in the place of those that torch would draw, in order."""
    for name, queue in values.items():
        monkeypatch.setattr(torch, name, lambda *a, _queue=queue, **k: _queue.pop(0))


def play(method, nets: Nets, batch: dict, t: int = 0, stage: int = 0) -> Iterator[tuple[str, dict[str, Part]]]:
    return method.step(nets, batch, Clock(t, 10, stage))


def total(parts: dict[str, Part]) -> Tensor:
    return sum(part.value for part in parts.values())


def agree(found: Tensor, wanted: Sequence | float) -> None:
    torch.testing.assert_close(found.detach(), double(wanted), rtol=1e-9, atol=1e-9)


class Net(nn.Module):
    """p0 x + p1 tanh(x + p2 t)."""

    def __init__(self, p: Sequence[float]) -> None:
        super().__init__()
        self.p = nn.Parameter(double(p))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.p[0] * x + self.p[1] * torch.tanh(x + self.p[2] * wide(t, x))


# ---------------------------------------------------------------- consistency distillation


@pytest.mark.parametrize("distance", ["l1", "l2"])
def test_consistency_agrees_with_the_authors_code(distance: str, monkeypatch: pytest.MonkeyPatch) -> None:
    given, wanted = REFERENCE["consistency"], REFERENCE[f"consistency_{distance}"]
    nets = Nets(**{name: Denoiser(Net(given[name]), EDM()) for name in ("teacher", "student")})
    method, batch = ConsistencyDistillation(distance=distance, decay=0.9), {"inputs": double(given["inputs"])}
    method.setup(nets, batch)
    nets.target.net.p.data = double(given["target"])
    feed(monkeypatch, randint=[torch.tensor(given["interval"])], randn_like=[double(given["noise"])])
    [(player, parts)] = play(method, nets, batch)
    assert player == "student"
    agree(total(parts), wanted["value"])
    agree(torch.autograd.grad(total(parts), nets.student.net.p)[0], wanted["grad"])
    for other in (nets.teacher, nets.target):
        assert all(not p.requires_grad for p in other.parameters())


def test_consistency_of_the_exact_flow_map_is_the_error_of_the_solver() -> None:
    """Heun's error is of third order in the step, and the loss is its square: 2**6 less for every doubling."""
    teacher = GaussianDenoiser(MEAN, STD, EDM(t_min=0.1, t_max=5.0))

    class Map(nn.Module):
        """What makes the bounded student the flow map to t_min."""

        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            share = 0.1 / wide(t, x)
            inside = (teacher.net.flow(x, t, 0.1) - share * x) / (1 - share)
            return torch.where(share == 1, 0.0, inside)

    losses = []
    for levels in (17, 33):
        nets = Nets(teacher=teacher, student=Denoiser(Map(), teacher.schedule, "x0"))
        method, batch = ConsistencyDistillation(levels=levels), {"inputs": MEAN + STD * randn(20000, 2)}
        method.setup(nets, batch)
        torch.manual_seed(0)
        [(_, parts)] = play(method, nets, batch)
        losses.append(float(total(parts)))
    assert losses[0] < 1e-4 and 40 < losses[0] / losses[1] < 80
    nets.student.net.forward = lambda x, t: 0 * x
    [(_, parts)] = play(method, nets, batch)
    assert float(total(parts)) > 1e3 * losses[1]


def test_consistency_average_moves_after_the_step_and_sees_the_same_dropout() -> None:
    class Noisy(Net):
        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            self.seen = nn.functional.dropout(torch.ones_like(x), 0.5, self.training)
            return super().forward(self.seen * x, t)

    nets = Nets(teacher=Denoiser(Net([0.1, 0.2, 0.3]), EDM()), student=Denoiser(Noisy([0.3, -0.5, 0.2]), EDM()))
    method, batch = ConsistencyDistillation(decay=0.75), {"inputs": randn(64, 2)}
    method.setup(nets, batch)
    nets.train()
    list(play(method, nets, batch))
    assert torch.equal(nets.target.net.seen, nets.student.net.seen) and 0 < (nets.student.net.seen == 0).sum() < 128
    start = nets.target.net.p.clone()
    nets.student.net.p.data += 1.0
    assert torch.equal(nets.target.net.p, start)
    method.after(nets, "student", Clock(0, 10))
    torch.testing.assert_close(nets.target.net.p, start + 0.25)


def test_consistency_prepares_the_student() -> None:
    nets = Nets(teacher=Denoiser(Net([0.1, 0.2, 0.3]), EDM()))
    ConsistencyDistillation().setup(nets, {})
    assert nets.student.boundary and nets.student.solver == "renoise" and not nets.teacher.boundary
    assert nets.student.net.p.requires_grad and nets.student.net.p.data_ptr() != nets.teacher.net.p.data_ptr()
    assert "target" not in nets
    nets = Nets(teacher=nets.teacher, student=Denoiser(Net([0.1, 0.2, 0.3]), Flow(), "flow"))
    with pytest.raises(BadInput, match="must share a noise schedule"):
        ConsistencyDistillation().setup(nets, {})
    for bad in ({"levels": 1}, {"decay": 1.0}, {"distance": "lpips"}, {"solver": "rk45"}):
        with pytest.raises(ValueError, match=f"`{next(iter(bad))}` must be"):
            ConsistencyDistillation(**bad)


# ---------------------------------------------------------------- dmd2


class Score(nn.Module):
    """a x / (1 + s^2) + b tanh(c x); features tanh(x w)."""

    def __init__(self, p: Sequence[float], w: Sequence) -> None:
        super().__init__()
        self.p, self.w = nn.Parameter(double(p)), nn.Parameter(double(w))

    def forward(self, x: Tensor, t: Tensor, *, features: bool = False) -> Tensor:
        if features:
            return torch.tanh(x.flatten(1) @ self.w)
        return self.p[0] * x / (1 + wide(t, x) ** 2) + self.p[1] * torch.tanh(self.p[2] * x)


class Affine(nn.Module):
    """p0 x + p1."""

    def __init__(self, p: Sequence[float]) -> None:
        super().__init__()
        self.p = nn.Parameter(double(p))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.p[0] * x + self.p[1]


def dmd2_scene(**knobs) -> tuple[DMD2, Nets, dict[str, Tensor]]:
    given = REFERENCE["dmd2"]
    nets = Nets(
        teacher=Denoiser(Score(given["real_net"], given["w"]), EDM(), "x0"),
        student=Denoiser(Affine(given["generator"]), EDM(), "x0"),
        discriminator=nn.Linear(3, 1).double(),
    )
    nets.discriminator.weight.data, nets.discriminator.bias.data = double([given["head"]]), double(given["bias"])
    method, batch = DMD2(**knobs), {"inputs": double(given["real"])}
    method.setup(nets, batch)
    nets.fake.net.p.data = double(given["fake_net"])
    return method, nets, batch


def test_dmd2_agrees_with_the_authors_code(monkeypatch: pytest.MonkeyPatch) -> None:
    given = REFERENCE["dmd2"]
    method, nets, batch = dmd2_scene()
    noises = [double(n) for n in [given["z"], *given["noises"]]]
    feed(monkeypatch, randint=[torch.tensor(0), *map(torch.tensor, given["levels"])], randn_like=noises)
    turns = play(method, nets, batch)

    player, parts = next(turns)
    wanted = REFERENCE["dmd2_student"]
    assert player == "student" and list(parts) == ["matching", "gan"]
    agree(parts["matching"].value, wanted["matching"])
    agree(parts["gan"].value, wanted["gan"])
    agree(torch.autograd.grad(total(parts), nets.student.net.p)[0], wanted["grad"])

    player, parts = next(turns)
    wanted = REFERENCE["dmd2_fake"]
    assert player == "fake" and list(parts) == ["denoising", "gan"]
    agree(parts["denoising"].value, wanted["denoising"])
    agree(parts["gan"].value, wanted["gan"])
    of = {
        "p": nets.fake.net.p,
        "w": nets.fake.net.w,
        "head": nets.discriminator.weight,
        "bias": nets.discriminator.bias,
    }
    grads = torch.autograd.grad(total(parts), [*of.values(), nets.student.net.p], allow_unused=True)
    for name, grad in zip(of, grads, strict=False):
        agree(grad.flatten() if name == "head" else grad, wanted["grad"][name])
    assert grads[-1] is None  # nothing reaches the student
    assert next(turns, None) is None
    feed(monkeypatch, randint=[torch.tensor(given["levels"][0])], randn_like=[double(given["noises"][0])])
    x = (given["generator"][0] * 80 * double(given["z"]) + given["generator"][1]).requires_grad_()
    (grad,) = torch.autograd.grad(method.matching(nets, x, None).mean(), x)
    agree(grad, REFERENCE["dmd2_student"]["matching_grad_x"])
    assert set(nets.params("fake")) == set(of.values())  # the critic's head trains with the fake score


def test_dmd2_gradient_is_the_normalised_difference_of_exact_denoisers() -> None:
    """p_real - p_fake over the mean |p_real| of each example, over the number of elements; 0 when the two agree."""
    nets = Nets(teacher=GaussianDenoiser(MEAN, STD))
    method = DMD2(gan=0.0)
    method.setup(nets, {"inputs": randn(2, 2)})
    x = randn(8, 2).requires_grad_()
    torch.manual_seed(0)
    (grad,) = torch.autograd.grad(method.matching(nets, x, None).mean(), x)
    assert (grad == 0).all()
    nets.fake.net.mean.data += 0.3
    nets.fake.net.log_std.data -= 0.2
    torch.manual_seed(0)
    loss = method.matching(nets, x, None)
    (grad,) = torch.autograd.grad(loss.mean(), x)
    torch.manual_seed(0)
    t = EDM().at(torch.randint(20, 981, (8,)).double() / 999)
    xt = x.detach() + t[:, None] * torch.randn(8, 2, dtype=torch.float64)
    posterior = lambda mean, std: mean + std**2 / (std**2 + t[:, None] ** 2) * (xt - mean)
    real, fake = posterior(MEAN, STD), posterior(MEAN + 0.3, STD * torch.exp(torch.tensor(-0.2).double()))
    p_real, p_fake = x.detach() - real, x.detach() - fake
    torch.testing.assert_close(
        grad, (p_real - p_fake) / p_real.abs().mean(1, keepdim=True) / x.numel(), rtol=1e-6, atol=1e-12
    )
    for other in (nets.teacher, nets.fake):
        assert all(
            g is None
            for g in torch.autograd.grad(
                loss.sum(), [p.requires_grad_() for p in other.parameters()], allow_unused=True
            )
        )


def test_dmd2_two_time_scales_and_switches() -> None:
    turns = []
    method, nets, batch = dmd2_scene(ratio=3)
    for t in range(7):
        turns += [player for player, _ in play(method, nets, batch, t)]
    assert turns == ["student", "fake", "fake", "fake", "student", "fake", "fake", "fake", "student", "fake"]

    method, nets, batch = dmd2_scene(gan=0.0)
    assert "fake" not in nets.companions
    assert [list(parts) for _, parts in play(method, nets, batch)] == [["matching"], ["denoising"]]
    method, nets, batch = dmd2_scene(gan_fake=0.5)
    torch.manual_seed(0)
    half = [float(parts["gan"]) for _, parts in play(method, nets, batch)]
    method, nets, batch = dmd2_scene(gan_fake=1.0, gan=6e-3)
    torch.manual_seed(0)
    assert [float(parts["gan"]) for _, parts in play(method, nets, batch)] == pytest.approx([2 * v for v in half])


def test_dmd2_simulates_backwards(monkeypatch: pytest.MonkeyPatch) -> None:
    """With k steps, x is what the student's own sampling shows after a step that is drawn; only that step learns."""
    method, nets, batch = dmd2_scene(steps=2, gan=0.0)
    grid, seen = EDM().grid(2), []
    monkeypatch.setattr(DMD2, "matching", lambda self, nets, x, labels: seen.append(x) or x)
    p = nets.student.net.p
    for k in (0, 1):
        z, again = randn(5, 1, 2, 2, seed=1), randn(5, 1, 2, 2, seed=2)
        feed(monkeypatch, randint=[torch.tensor(k), torch.zeros(5).long()], randn_like=[z, again, again])
        next(play(method, nets, batch))
        x = p[0] * 80 * z + p[1]
        if k:
            x = p[0] * (x.detach() + grid[1] * again) + p[1]
        torch.testing.assert_close(seen[k], x)
        torch.testing.assert_close(torch.autograd.grad(seen[k].sum(), p)[0], torch.autograd.grad(x.sum(), p)[0])


def test_dmd2_guidance_is_of_the_teacher_alone() -> None:
    class Told(Net):
        def forward(self, x: Tensor, t: Tensor, labels: Tensor | None = None) -> Tensor:
            return super().forward(x, t) + (0 if labels is None else labels.double()[:, None])

    nets = Nets(teacher=Denoiser(Told([0.1, 0.2, 0.3]), EDM()))
    labels, x = torch.arange(4), randn(4, 2)
    grads = []
    for guidance in (1.0, 3.0):
        method = DMD2(guidance=guidance, guided=True, gan=0.0)
        method.setup(nets, {})
        torch.manual_seed(0)
        v = x.clone().requires_grad_()
        grads.append(torch.autograd.grad(method.matching(nets, v, labels).sum(), v)[0])
    assert (grads[0] == 0).all()  # the fake score is the teacher still
    assert (grads[1][0] == 0).all() and (grads[1][1:] != 0).all()  # label 0 adds nothing, so nothing is to guide
    with pytest.raises(ValueError, match="`guidance` must be 1 unless"):
        DMD2(guidance=2.0)


@pytest.mark.parametrize("shape", [(6,), (12, 8, 8), (5, 3, 4), (16, 1, 1)])
def test_dmd2_builds_a_head_for_any_features(shape: tuple[int, ...]) -> None:
    class Featured(nn.Module):
        def forward(self, x: Tensor, t: Tensor, *, features: bool = False) -> Tensor:
            return x.mean() + torch.ones(len(x), *shape) if features else x

    nets, batch = Nets(teacher=Denoiser(Featured(), EDM(), "x0")), {"inputs": torch.randn(5, 2)}
    method = DMD2()
    method.setup(nets, batch)
    assert method.critic(nets, batch["inputs"], None).shape == (5, 1)


def test_dmd2_says_what_the_critic_needs() -> None:
    nets = Nets(teacher=Denoiser(Net([0.1, 0.2, 0.3]), EDM()))
    with pytest.raises(BadInput, match="Net.forward does not take `features=True`; add it, or set `gan`"):
        DMD2().setup(nets, {"inputs": randn(4, 2)})
    for bad in ({"ratio": 0}, {"steps": 0}, {"gan": -1.0}, {"low": 0.9, "high": 0.1}, {"levels": 1}):
        with pytest.raises(ValueError, match=f"`{next(iter(bad))}` must be"):
            DMD2(**bad)


# ---------------------------------------------------------------- reflow


class Velocity(nn.Module):
    """Minus the velocity of the reference, whose time runs from noise to data."""

    def __init__(self, p: Sequence[float]) -> None:
        super().__init__()
        self.p = nn.Parameter(double(p))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return -(self.p[0] * x + self.p[1] * torch.tanh(x) + self.p[2] * (1 - wide(t, x)))


@pytest.mark.parametrize(
    ("name", "knobs"), [("uniform", {}), ("one", {"rounds": 0, "steps": 1}), ("four", {"rounds": 0, "steps": 4})]
)
def test_reflow_agrees_with_the_authors_code(name: str, knobs: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    given, wanted = REFERENCE["reflow"], REFERENCE[f"reflow_{name}"]
    flow = Flow(t_min=0.0, t_max=1 - 1e-3)  # the reference leaves out the last thousandth, at the noise
    nets = Nets(
        teacher=Denoiser(Velocity(given["net"]), flow, "flow"), student=Denoiser(Velocity(given["net"]), flow, "flow")
    )
    method, z, x = Reflow(pairs=0, **knobs), double(given["z"]), double(given["data"])
    method.setup(nets, {"inputs": x})
    monkeypatch.setattr(Reflow, "pair", lambda self, *a: (z, x, None))
    k = torch.tensor(given["k"]) if name == "four" else torch.zeros(5).long()
    feed(monkeypatch, rand=[1 - double(given["u"])], randint=[k])
    [(player, parts)] = play(method, nets, {"inputs": x})
    assert player == "student"
    agree(total(parts), wanted["value"])
    agree(torch.autograd.grad(total(parts), nets.student.net.p)[0], wanted["grad"])


def test_reflow_of_straight_pairs_is_zero() -> None:
    """Data that are points have straight paths, and their exact denoiser has nothing left to learn."""
    teacher = GaussianDenoiser(MEAN, 1e-6, Flow())
    nets, batch = Nets(teacher=teacher), {"inputs": randn(64, 2)}
    method = Reflow(pairs=200, simulate=3, solver="euler")
    method.setup(nets, batch)
    [(_, parts)] = play(method, nets, batch)
    assert float(total(parts).detach()) < 1e-9
    assert straightness(teacher, randn(50, 2)) < 1e-9 < straightness(GaussianDenoiser(MEAN, STD, Flow()), randn(50, 2))


def test_straightness_is_the_variance_of_the_velocity_along_the_path() -> None:
    """For data N(0, s^2) the velocity on the path of z is z f'(t), f(t)^2 = (1 - t)^2 s^2 + t^2."""
    s, z = 0.25, randn(4000, 1)
    exact = GaussianDenoiser(torch.zeros(1).double(), s, Flow(t_min=0.0))
    t = torch.linspace(0, 1, 20001, dtype=torch.float64)
    f = ((1 - t) ** 2 * s**2 + t**2).sqrt()
    rate = (t - (1 - t) * s**2) / f
    want = (torch.trapezoid(rate**2, t) - (f[-1] - f[0]) ** 2) * z.square().mean()
    assert straightness(exact, z, 2000) == pytest.approx(float(want), rel=5e-3)


def test_pairs_are_the_samplers_own_and_the_same_for_the_same_seed() -> None:
    d = GaussianDenoiser(MEAN, STD, Flow())
    pairs, again = Pairs(torch.arange(3)), Pairs(torch.arange(3))
    d.forward = lambda x, t, labels=None: GaussianDenoiser.forward(d, x, t)
    state = torch.get_rng_state()
    pairs.fill(d, randn(2, 2), 1000, 5, "heun", seed=3)
    assert torch.equal(torch.get_rng_state(), state)
    again.fill(d, randn(7, 2), 1000, 5, "heun", seed=3)
    assert torch.equal(pairs.data, again.data) and torch.equal(pairs.labels, again.labels) and len(pairs) == 1000
    again.fill(d, randn(2, 2), 1000, 5, "heun", seed=4)
    assert not torch.equal(pairs.data, again.data)
    torch.testing.assert_close(pairs.data, generate(d, pairs.noise, 5, solver="heun"))
    assert pairs.labels.unique().tolist() == [0, 1, 2] and not pairs.state_dict()
    noise, data, labels = pairs.draw(20)
    row = (pairs.noise == noise[7]).all(1).nonzero().item()
    assert torch.equal(pairs.data[row], data[7]) and pairs.labels[row] == labels[7]
    pairs.clear()
    assert len(pairs) == 0


def test_reflow_goes_through_its_stages() -> None:
    nets, batch = Nets(teacher=GaussianDenoiser(MEAN, STD, Flow())), {"inputs": randn(8, 2)}
    method, found = Reflow(rounds=2, steps=1, pairs=50, simulate=2), []
    method.setup(nets, batch)
    for i, stage in enumerate(method.stages(nets, 7)):
        assert isinstance(stage, Stage) and stage.steps == 7 and len(nets.pairs) == 0
        list(play(method, nets, batch, stage=i))
        source = nets.source if i else nets.teacher
        torch.testing.assert_close(nets.pairs.data, generate(source, nets.pairs.noise, 2, solver="heun"))
        assert not i or nets.source.net.mean.data_ptr() != nets.student.net.mean.data_ptr()
        nets.student.net.mean.data += 1.0
        found.append(stage.name)
    assert found == ["round 1", "round 2", "distil"] and "source" in nets.frozen


def test_reflow_puts_any_student_on_straight_lines() -> None:
    nets, batch = Nets(teacher=GaussianDenoiser(MEAN, STD)), {"inputs": randn(512, 2)}
    method = Reflow(pairs=0, simulate=30)
    method.setup(nets, batch)
    student, noise = nets.student, randn(4000, 2)
    assert (
        isinstance(student.schedule, Flow)
        and student.schedule.t_max == pytest.approx(80 / 81)
        and student.solver == "euler"
    )
    made = generate(student, noise, 50)  # before training: the teacher's distribution, along other paths
    torch.testing.assert_close(made.mean(0), MEAN, atol=0.1, rtol=0)
    torch.testing.assert_close(made.std(0), STD, atol=0.1, rtol=0)
    assert student.net.mean.requires_grad and student.spec()["native"] == {"edm": asdict(EDM())}
    list(play(method, nets, batch))
    for bad in ({"rounds": -1}, {"simulate": 0}, {"solver": "rk45"}, {"rounds": 0}):
        with pytest.raises(ValueError, match=f"`{next(iter(bad))}` must be"):
            Reflow(**bad)
