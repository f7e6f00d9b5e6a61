"""Noise schedules, denoisers and solver steps: what every method that shortens a sampler is made of.

x_t = alpha(t) x_0 + sigma(t) eps with t falling from t_max (noise) to t_min, and then to 0 (data). A `Denoiser` says
what x_0 is to be expected from x_t, whatever its network predicts; the probability flow ODE then moves x_t along
dx/dt = alpha'(t) x_0 + sigma'(t) eps. Times are numbers or tensors [B]; labels are class indices [B], or None.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass, fields
from itertools import pairwise
from typing import Any, Self

import torch
from torch import Tensor, nn

from limbeck.core.errors import BadInput, nearest
from limbeck.core.maths import FLOOR, upcast
from limbeck.core.nets import evaluating

# ---------------------------------------------------------------- schedules


class Schedule(ABC):
    """How much data and how much noise there is at time t; final subclasses are frozen dataclasses.

    t_min, t_max: where sampling ends and begins. sigma_data: standard deviation of the data, for preconditioning.
    """

    t_min: float
    t_max: float
    sigma_data: float

    @abstractmethod
    def alpha(self, t: Tensor) -> Tensor:
        """Factor of the data."""

    @abstractmethod
    def sigma(self, t: Tensor) -> Tensor:
        """Factor of the noise."""

    @abstractmethod
    def rates(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Derivatives of alpha and sigma in t."""

    @abstractmethod
    def time(self, ratio: Tensor) -> Tensor:
        """The time at which sigma / alpha is `ratio`."""

    @abstractmethod
    def at(self, level: Tensor) -> Tensor:
        """The time at a level of noise in [0, 1]: t_min at 0, t_max at 1, and spaced in between as a solver wants."""

    @abstractmethod
    def draw(self, count: int, device: torch.device | str = "cpu") -> Tensor:
        """Random times [count] to train a denoiser at."""

    @abstractmethod
    def weight(self, t: Tensor) -> Tensor:
        """Weight of the squared error of x_0 in training a denoiser."""

    def ratio(self, t: Tensor) -> Tensor:
        """sigma / alpha: the noise level of x_t / alpha(t)."""
        return self.sigma(t) / self.alpha(t)

    @property
    def least(self) -> float:
        """sigma / alpha at t_min."""
        return self.ratio(torch.tensor(self.t_min, dtype=torch.float64)).item()

    def grid(self, steps: int) -> Tensor:
        """steps + 1 times from t_max down to t_min, fp64."""
        if steps < 1:
            raise ValueError(f"`steps` must be >= 1, got {steps!r}")
        return self.at(torch.linspace(1, 0, steps + 1, dtype=torch.float64))

    def noised(self, x0: Tensor, t: float | Tensor, noise: Tensor) -> Tensor:
        """x_t of data x0 and unit noise of its shape."""
        t = wide(t, x0)
        return self.alpha(t) * x0 + self.sigma(t) * noise


@dataclass(frozen=True)
class EDM(Schedule):
    """Variance exploding, Karras et al. 2022: alpha = 1, sigma = t; levels evenly spaced in t**(1 / rho).

    t_min, t_max: smallest and largest noise. rho: bends the grid to small noise, > 0. sigma_data: of the data.
    mean, std: of ln t in training.
    """

    t_min: float = 0.002
    t_max: float = 80.0
    rho: float = 7.0
    sigma_data: float = 0.5
    mean: float = -1.2
    std: float = 1.2

    def alpha(self, t: Tensor) -> Tensor:
        """1."""
        return torch.ones_like(t)

    def sigma(self, t: Tensor) -> Tensor:
        """t."""
        return t

    def rates(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """0 and 1."""
        return torch.zeros_like(t), torch.ones_like(t)

    def time(self, ratio: Tensor) -> Tensor:
        """The noise level itself."""
        return ratio

    def at(self, level: Tensor) -> Tensor:
        """Karras levels."""
        low: float = self.t_min ** (1 / self.rho)
        high: float = self.t_max ** (1 / self.rho)
        return (low + level * (high - low)).pow(self.rho)

    def draw(self, count: int, device: torch.device | str = "cpu") -> Tensor:
        """Log-normal, held within [t_min, t_max]."""
        return (self.mean + self.std * torch.randn(count, device=device)).exp().clamp(self.t_min, self.t_max)

    def weight(self, t: Tensor) -> Tensor:
        """t**-2 + sigma_data**-2: the network's output then has unit error at every t."""
        return t.pow(-2) + self.sigma_data**-2


@dataclass(frozen=True)
class Cosine(Schedule):
    """Variance preserving: alpha = cos(pi t / 2), sigma = sin(pi t / 2); levels evenly spaced in t.

    t_min, t_max: within (0, 1). sigma_data: of the data.
    """

    t_min: float = 0.001
    t_max: float = 0.992
    sigma_data: float = 0.5

    def alpha(self, t: Tensor) -> Tensor:
        """cos."""
        return torch.cos(math.pi / 2 * t)

    def sigma(self, t: Tensor) -> Tensor:
        """sin."""
        return torch.sin(math.pi / 2 * t)

    def rates(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """-pi/2 sin and pi/2 cos."""
        return -math.pi / 2 * self.sigma(t), math.pi / 2 * self.alpha(t)

    def time(self, ratio: Tensor) -> Tensor:
        """The angle with this tangent."""
        return torch.atan(ratio) * (2 / math.pi)

    def at(self, level: Tensor) -> Tensor:
        """Even."""
        return self.t_min + level * (self.t_max - self.t_min)

    def draw(self, count: int, device: torch.device | str = "cpu") -> Tensor:
        """Uniform."""
        return self.at(torch.rand(count, device=device))

    def weight(self, t: Tensor) -> Tensor:
        """sigma**-2: unit weight on the error of v."""
        return self.sigma(t).pow(-2)


@dataclass(frozen=True)
class Flow(Schedule):
    """Straight lines from data to noise (rectified flow): alpha = 1 - t, sigma = t; levels evenly spaced in t.

    t_min, t_max: within [0, 1]. sigma_data: of the data.
    """

    t_min: float = 0.001
    t_max: float = 1.0
    sigma_data: float = 0.5

    def alpha(self, t: Tensor) -> Tensor:
        """1 - t."""
        return 1 - t

    def sigma(self, t: Tensor) -> Tensor:
        """t."""
        return t

    def rates(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """-1 and 1."""
        return -torch.ones_like(t), torch.ones_like(t)

    def time(self, ratio: Tensor) -> Tensor:
        """ratio / (1 + ratio), also at infinity."""
        return 1 / (1 + 1 / ratio)

    def at(self, level: Tensor) -> Tensor:
        """Even."""
        return self.t_min + level * (self.t_max - self.t_min)

    def draw(self, count: int, device: torch.device | str = "cpu") -> Tensor:
        """Uniform."""
        return self.at(torch.rand(count, device=device))

    def weight(self, t: Tensor) -> Tensor:
        """t**-2: unit weight on the error of the velocity."""
        return t.pow(-2)


SCHEDULES: dict[str, type[Schedule]] = {"edm": EDM, "cosine": Cosine, "flow": Flow}


def wide(t: float | Tensor, x: Tensor) -> Tensor:
    """A time, or times [B], as [B, 1, ...] that multiplies x [B, ...], at least fp32."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    t = torch.as_tensor(t, dtype=dtype, device=x.device)
    # shape[0], not len: it stays symbolic when the network is traced
    return t.expand(x.shape[0]).view(-1, *[1] * (x.ndim - 1)) if t.ndim < 2 else t


# ---------------------------------------------------------------- denoisers

KINDS = ("x0", "eps", "v", "score", "flow", "edm")


class Denoiser(nn.Module):
    """`denoiser(x, t, labels) -> x0`: the data to expect behind x = x_t, whatever the network inside predicts.

    net: `net(x, t [B])` or, when labels are given, `net(x, t, labels)`; with `features=True` it returns its inner
        features [B, ...] instead (asked for by critics only).
    kind: what it predicts. "x0", "eps", "score" (of x_t), "v" = alpha eps - sigma x0, "flow" = dx/dt; "edm": the
        preconditioned network of Karras et al. 2022, which reads x_t / alpha at unit scale and a quarter of
        ln(sigma / alpha) in the place of t.
    boundary: make x_{t_min} a fixed point, denoiser(x, t_min) = x / alpha, whatever the weights (consistency models).
    solver: how `generate` moves when it is not told.
    native: the schedule that the network was made for, when x_t is now on another one: times are then matched by
        sigma / alpha. Of no use for "edm", which reads nothing else.
    """

    def __init__(
        self,
        net: nn.Module,
        schedule: Schedule,
        kind: str = "edm",
        *,
        boundary: bool = False,
        solver: str = "heun",
        native: Schedule | None = None,
    ) -> None:
        super().__init__()
        if kind not in KINDS:
            raise BadInput(f"a denoiser cannot predict {kind!r}{nearest(kind, KINDS)}")
        if solver not in SOLVERS:
            raise BadInput(f"no solver {solver!r}{nearest(solver, SOLVERS)}")
        self.net, self.schedule, self.kind = net, schedule, kind
        self.boundary, self.solver, self.native = boundary, solver, native or schedule

    def forward(self, x: Tensor, t: float | Tensor, labels: Tensor | None = None, *, features: bool = False) -> Tensor:
        """x [B, ...], t, labels [B] -> x0 [B, ...], or the network's inner features."""
        x = upcast(x)
        t = wide(t, x)
        if self.kind == "edm":
            raw = self.raw(x, t, labels, features=features)
            return raw if features else self._edm(x, raw, t)
        s = self.native
        seen, now = (x, t) if s == self.schedule else self._matched(x, t)
        raw = self.raw(seen, now, labels, features=features)
        if features:
            return raw
        alpha, sigma = s.alpha(now), s.sigma(now)
        if self.kind == "x0":
            x0 = raw
        elif self.kind == "eps":
            x0 = (seen - sigma * raw) / alpha
        elif self.kind == "v":
            x0 = (alpha * seen - sigma * raw) / (alpha**2 + sigma**2)
        elif self.kind == "score":
            x0 = (seen + sigma**2 * raw) / alpha
        else:  # flow: alpha' x0 + sigma' eps = raw, solved for x0
            d_alpha, d_sigma = s.rates(now)
            x0 = (sigma * raw - d_sigma * seen) / (sigma * d_alpha - alpha * d_sigma)
        if not self.boundary:
            return x0
        alpha, sigma, least = self.schedule.alpha(t), self.schedule.sigma(t), self.schedule.least
        return (1 - least * alpha / sigma) * x0 + least / sigma * x  # towards x0 up to the noise of t_min, no farther

    def _matched(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """x_t and t on the schedule that the network was made for."""
        ratio = self.schedule.ratio(t).clamp_max(1e5)  # infinite in pure noise
        now = self.native.time(ratio)
        by_noise, by_data = (
            self.native.sigma(now) / self.schedule.sigma(t),
            self.native.alpha(now) / self.schedule.alpha(t),
        )
        return torch.where(ratio > 1, by_noise, by_data) * x, now

    def raw(self, x: Tensor, t: Tensor, labels: Tensor | None = None, *, features: bool = False) -> Tensor:
        """What the network says of x_t on its own schedule; t [B, 1, ...]."""
        now = t.flatten()
        if self.kind == "edm":
            s, d = self.schedule, self.schedule.sigma_data
            x = x / (s.sigma(t) ** 2 + (s.alpha(t) * d) ** 2).sqrt()
            now = s.ratio(now).clamp(1e-5, 1e5).log() / 4
        arguments = (x, now) if labels is None else (x, now, labels)
        out: Tensor = self.net(*arguments, features=True) if features else self.net(*arguments)
        return upcast(out)

    def _edm(self, x: Tensor, raw: Tensor, t: Tensor) -> Tensor:
        """c_skip x / alpha + c_out F, in forms that are finite where alpha is 0."""
        s, d = self.schedule, self.schedule.sigma_data
        alpha, sigma = s.alpha(t), s.sigma(t)
        norm = sigma**2 + (alpha * d) ** 2
        if not self.boundary:
            return d * d * alpha / norm * x + sigma * d / norm.sqrt() * raw
        rest = sigma - alpha * s.least
        return d * d * alpha / (rest**2 + (alpha * d) ** 2) * x + rest * d / norm.sqrt() * raw

    def eps(self, x: Tensor, t: float | Tensor, labels: Tensor | None = None) -> Tensor:
        """The noise to expect in x_t."""
        t = wide(t, x)
        x0: Tensor = self(x, t, labels)
        return (x - self.schedule.alpha(t) * x0) / self.schedule.sigma(t)

    def score(self, x: Tensor, t: float | Tensor, labels: Tensor | None = None) -> Tensor:
        """Gradient of the log density of x_t."""
        t = wide(t, x)
        x0: Tensor = self(x, t, labels)
        return (self.schedule.alpha(t) * x0 - x) / self.schedule.sigma(t) ** 2

    def velocity(self, x: Tensor, t: float | Tensor, labels: Tensor | None = None) -> Tensor:
        """dx/dt of the probability flow."""
        t = wide(t, x)
        if self.kind == "flow" and not self.boundary and self.native == self.schedule:
            return self.raw(upcast(x), t, labels)
        return velocity_of(self.schedule, x, self(x, t, labels), t)

    def on(self, schedule: Schedule) -> Denoiser:
        """The same network, weights shared, for x_t on another schedule."""
        native = None if self.kind == "edm" else self.native
        return Denoiser(self.net, schedule, self.kind, boundary=self.boundary, solver=self.solver, native=native)

    def spec(self) -> dict[str, Any]:
        """All but the network, as plain values for a file; `from_spec` is the way back."""
        spec: dict[str, Any] = {"schedule": _spec_of(self.schedule), "kind": self.kind}
        spec |= {"boundary": self.boundary, "solver": self.solver}
        return spec | ({} if self.native == self.schedule else {"native": _spec_of(self.native)})

    @classmethod
    def from_spec(cls, net: nn.Module, spec: dict[str, Any]) -> Self:
        """A denoiser around `net` as `spec` describes it; a schedule is a name or {name: options}."""
        rest = dict(spec)
        schedule, native = (_schedule_of(rest.pop(k, None)) for k in ("schedule", "native"))
        return cls(net, schedule or EDM(), native=native, **rest)


def _spec_of(schedule: Schedule) -> dict[str, Any]:
    name = next(name for name, kind in SCHEDULES.items() if type(schedule) is kind)
    return {name: asdict(schedule)}  # type: ignore[call-overload]


def _schedule_of(spec: Any) -> Schedule | None:
    if spec is None:
        return None
    name, options = (spec, {}) if isinstance(spec, str) else next(iter(spec.items()))
    if name not in SCHEDULES:
        raise BadInput(f"no noise schedule {name!r}{nearest(name, SCHEDULES)}")
    known = {f.name for f in fields(SCHEDULES[name])}  # type: ignore[arg-type]
    for key in options or {}:
        if key not in known:
            raise BadInput(f"the noise schedule {name!r} has no option {key!r}{nearest(key, known)}")
    return SCHEDULES[name](**(options or {}))


def velocity_of(schedule: Schedule, x: Tensor, x0: Tensor, t: float | Tensor) -> Tensor:
    """dx/dt at x = x_t when the data behind it is x0."""
    t = wide(t, x)
    d_alpha, d_sigma = schedule.rates(t)
    return d_alpha * x0 + d_sigma * (x - schedule.alpha(t) * x0) / schedule.sigma(t)


def guided(denoiser: Denoiser, x: Tensor, t: float | Tensor, labels: Tensor | None, guidance: float = 1.0) -> Tensor:
    """x0 with classifier-free guidance: x0(no label) + guidance (x0(labels) - x0(no label)); 1 is none."""
    x0: Tensor = denoiser(x, t, labels)
    if guidance == 1.0 or labels is None:
        return x0
    free: Tensor = denoiser(x, t)
    return free + guidance * (x0 - free)


def denoising(denoiser: Denoiser, x0: Tensor, t: Tensor | None = None, labels: Tensor | None = None) -> Tensor:
    """The loss that trains a denoiser on data x0 [B, ...]: weighted squared error of x_0, averaged over it -> [B].

    t: times [B]; drawn by the schedule when None.
    """
    s = denoiser.schedule
    t = s.draw(len(x0), x0.device) if t is None else t
    error: Tensor = denoiser(s.noised(x0, t, torch.randn_like(x0)), t, labels) - x0
    return s.weight(t.to(error)) * error.square().flatten(1).mean(1)


# ---------------------------------------------------------------- solvers

Solver = Callable[[Denoiser, Tensor, Tensor, Tensor, "Tensor | None"], Tensor]


def _euler(d: Denoiser, x: Tensor, t: Tensor, s: Tensor, labels: Tensor | None) -> Tensor:
    x0 = d(x, t, labels)
    end = x + (s - t) * velocity_of(d.schedule, x, x0, t)
    return torch.where(d.schedule.sigma(s) == 0, x0, end)


def _heun(d: Denoiser, x: Tensor, t: Tensor, s: Tensor, labels: Tensor | None) -> Tensor:
    x0: Tensor = d(x, t, labels)
    clean = d.schedule.sigma(s) == 0  # no velocity there
    if clean.all():
        return x0
    v = velocity_of(d.schedule, x, x0, t)
    end = torch.where(clean, x, x + (s - t) * v)
    again = d.velocity(end, torch.where(clean, t, s), labels)
    return torch.where(clean, x0, x + (s - t) * (v + again) / 2)


def _ddim(d: Denoiser, x: Tensor, t: Tensor, s: Tensor, labels: Tensor | None) -> Tensor:
    return _along(d.schedule, x, d(x, t, labels), t, s)


def _along(schedule: Schedule, x: Tensor, x0: Tensor, t: Tensor, s: Tensor) -> Tensor:
    """From t to s while the data behind x is x0: the exact solution for a constant x0."""
    keep = schedule.sigma(s) / schedule.sigma(t)
    return keep * x + (schedule.alpha(s) - keep * schedule.alpha(t)) * x0


def _dpm2(d: Denoiser, x: Tensor, t: Tensor, s: Tensor, labels: Tensor | None) -> Tensor:
    schedule = d.schedule
    x0 = d(x, t, labels)
    first = _along(schedule, x, x0, t, s)
    one_ended = (schedule.sigma(s) == 0) | (schedule.alpha(t) == 0)  # no middle between here and infinity
    if one_ended.all():
        return first
    low, high = schedule.ratio(torch.where(one_ended, t, s)), schedule.ratio(t)
    middle = torch.where(one_ended, t, schedule.time((low * high).sqrt()))
    half = _along(schedule, x, x0, t, middle)
    noise = (half - schedule.alpha(middle) * d(half, middle, labels)) / schedule.sigma(middle)
    start = torch.where(one_ended, 1.0, schedule.alpha(t))  # not used there
    second = schedule.alpha(s) / start * (x - schedule.sigma(t) * noise) + schedule.sigma(s) * noise
    return torch.where(one_ended, first, second)


def _renoise(d: Denoiser, x: Tensor, t: Tensor, s: Tensor, labels: Tensor | None) -> Tensor:
    x0: Tensor = d(x, t, labels)
    schedule = d.schedule
    noise = schedule.sigma(s)
    if d.boundary:  # what it returns still has the noise of t_min
        noise = (noise**2 - (schedule.alpha(s) * schedule.least) ** 2).clamp_min(0).sqrt()
    return schedule.alpha(s) * x0 + noise * torch.randn_like(x0)


SOLVERS: dict[str, Solver] = {
    "euler": _euler,  # first order in t
    "heun": _heun,  # second order in t, two calls
    "ddim": _ddim,  # first order, exact for a constant x0
    "dpm1": _ddim,  # DPM-Solver-1 is DDIM
    "dpm2": _dpm2,  # DPM-Solver-2: second order in ln(alpha / sigma), two calls
    "renoise": _renoise,  # to x0 and back up with new noise: how consistency models and DMD2 take several steps
}


def step(
    denoiser: Denoiser,
    x: Tensor,
    t: float | Tensor,
    s: float | Tensor,
    solver: str = "heun",
    labels: Tensor | None = None,
) -> Tensor:
    """x_s from x_t by one step of a solver of `SOLVERS`; t, s: numbers or [B].

    A step to s = 0, clean data, gives denoiser(x, t) with every solver.
    """
    if solver not in SOLVERS:
        raise BadInput(f"no solver {solver!r}{nearest(solver, SOLVERS)}")
    x = upcast(x)
    return SOLVERS[solver](denoiser, x, wide(t, x), wide(s, x), labels)


def sample(
    denoiser: Denoiser, noise: Tensor, grid: Tensor, solver: str = "heun", labels: Tensor | None = None
) -> Tensor:
    """From unit noise [B, ...], scaled to the first time of `grid` [K + 1], to the last, in K steps."""
    x = denoiser.schedule.sigma(wide(grid[0], noise)) * noise
    for t, s in pairwise(grid):
        x = step(denoiser, x, t, s, solver, labels)
    return x


@torch.no_grad()
def generate(
    denoiser: Denoiser,
    noise: Tensor,
    steps: int,
    *,
    solver: str | None = None,
    labels: Tensor | None = None,
    batch_size: int | None = None,
) -> Tensor:
    """Data [N, ...] from unit noise [N, ...] in `steps` steps: teachers and students of every method alike.

    The times are those of the schedule's grid, the last being 0: one step is denoiser(sigma(t_max) noise, t_max).
    solver: the denoiser's own when None. Calls of the network: `evaluations(steps, solver)`. Eval mode, put back
    afterwards. batch_size: rows at a time, all when None.
    """
    grid = clean_grid(denoiser.schedule, steps)
    with evaluating(denoiser):
        rows = range(0, len(noise), batch_size or max(1, len(noise)))
        size = rows.step
        pieces = [
            sample(
                denoiser,
                noise[i : i + size],
                grid,
                solver or denoiser.solver,
                None if labels is None else labels[i : i + size],
            )
            for i in rows
        ]
    return torch.cat(pieces)


def clean_grid(schedule: Schedule, steps: int) -> Tensor:
    """The schedule's grid with 0, clean data, in the place of its last time."""
    grid = schedule.grid(steps)
    grid[-1] = 0
    return grid


def evaluations(steps: int, solver: str) -> int:
    """How often `generate` calls the network: twice a step with solvers of second order, but once to reach 0."""
    return 2 * steps - 1 if solver in ("heun", "dpm2") else steps


def rollout(
    generator: Denoiser,
    noise: Tensor,
    grid: Tensor,
    k: int,
    grad_at: int | None = None,
    labels: Tensor | None = None,
) -> Tensor:
    """What a few-step generator has made of unit noise after step k of its own sampling: x0 [B, ...].

    Backward simulation: each step before k goes to x0 and is noised anew to the next time of `grid`, so that training
    sees what sampling will see. Gradients begin at step `grad_at` (k when None).
    """
    if not 0 <= k < len(grid):
        raise ValueError(f"`k` must be an index of the {len(grid)} times, got {k!r}")
    first = k if grad_at is None else grad_at
    x = generator.schedule.sigma(wide(grid[0], noise)) * noise
    for i in range(k):
        with torch.no_grad() if i < first else nullcontext():
            x = step(generator, x, grid[i], grid[i + 1], "renoise", labels)
    x0: Tensor = generator(x, grid[k], labels)
    return x0


@torch.no_grad()
def straightness(denoiser: Denoiser, noise: Tensor, steps: int = 50, labels: Tensor | None = None) -> float:
    """Mean square of (velocity - mean velocity of its path) on Euler paths from unit noise; 0 where all are straight.

    One step of Euler is exact for a straight path. Liu et al. 2022, eq. 6, for the denoiser's own paths.
    """
    grid = denoiser.schedule.grid(steps)
    x = denoiser.schedule.sigma(wide(grid[0], noise)) * noise
    total, moments = torch.zeros((), dtype=torch.float64), torch.zeros_like(x)
    for t, s in pairwise(grid):
        v = denoiser.velocity(x, t, labels)
        share = float((t - s) / (grid[0] - grid[-1]))
        total += share * v.square().mean().double().cpu()
        moments += share * v
        x = x + float(s - t) * v
    return float((total - moments.square().mean().double().cpu()).clamp_min(0))


class Pairs(nn.Module):
    """What a sampler makes of noise, kept: rows of (unit noise, data, labels), the same for the same seed.

    Not saved with checkpoints: `fill` makes them again from the sampler that made them. choices: [K] labels that the
    rows get in equal shares, None for no labels.
    """

    noise: Tensor
    data: Tensor
    labels: Tensor
    choices: Tensor | None

    def __init__(self, choices: Tensor | None = None) -> None:
        super().__init__()
        self.register_buffer("choices", choices, persistent=False)
        for name in ("noise", "data", "labels"):
            self.register_buffer(name, torch.empty(0), persistent=False)

    def __len__(self) -> int:
        return len(self.noise)

    def clear(self) -> None:
        """Forget them."""
        self.noise = self.data = self.labels = self.noise[:0]

    def fill(self, denoiser: Denoiser, like: Tensor, count: int, steps: int, solver: str, seed: int = 0) -> None:
        """`count` rows by `steps` steps of a solver, shaped as the rows of `like` [B, ...]; torch's generators are left
        as they were."""
        with torch.random.fork_rng([like.device] if like.is_cuda else []):
            torch.manual_seed(seed)
            self.noise = torch.randn(count, *like.shape[1:], dtype=like.dtype, device=like.device)
            choices = self.choices
            chosen = None if choices is None else choices[torch.randint(len(choices), (count,), device=choices.device)]
            self.data = generate(denoiser, self.noise, steps, solver=solver, labels=chosen, batch_size=500)
        self.labels = self.noise[:0] if chosen is None else chosen

    def draw(self, count: int) -> tuple[Tensor, Tensor, Tensor | None]:
        """Noise, data and labels (None without) of `count` rows chosen at random."""
        rows = torch.randint(len(self), (count,), device=self.noise.device)
        return self.noise[rows], self.data[rows], self.labels[rows] if len(self.labels) else None


# ---------------------------------------------------------------- denoisers in closed form


class Gaussian(nn.Module):
    """The exact E[x0 | x_t] when the data is normal with independent coordinates; its moments can be trained."""

    def __init__(self, mean: Tensor, std: Tensor | float, schedule: Schedule) -> None:
        super().__init__()
        self.mean = nn.Parameter(mean.clone())
        self.log_std = nn.Parameter(torch.as_tensor(std, dtype=mean.dtype).expand_as(mean).log())
        self.schedule = schedule

    def forward(self, x: Tensor, t: Tensor, labels: Tensor | None = None, *, features: bool = False) -> Tensor:
        t = wide(t, x)
        alpha, sigma = self.schedule.alpha(t), self.schedule.sigma(t)
        if features:
            return (x - alpha * self.mean) / (alpha**2 * (2 * self.log_std).exp() + sigma**2).sqrt()
        variance = (2 * self.log_std).exp()
        return self.mean + alpha * variance / (alpha**2 * variance + sigma**2) * (x - alpha * self.mean)

    def flow(self, x: Tensor, t: float | Tensor, s: float | Tensor) -> Tensor:
        """x_s of the probability flow through x at t, exactly: standardised coordinates do not change."""
        t, s = wide(t, x), wide(s, x)
        spread = [
            (self.schedule.alpha(u) ** 2 * (2 * self.log_std).exp() + self.schedule.sigma(u) ** 2).sqrt()
            for u in (t, s)
        ]
        return self.schedule.alpha(s) * self.mean + spread[1] / spread[0] * (x - self.schedule.alpha(t) * self.mean)


class Mixture(nn.Module):
    """The exact E[x0 | x_t] when the data is a mixture of round Gaussians; labels, when given, name the component.

    means [K, ...], stds [K], weights [K] up to scale.
    """

    def __init__(self, means: Tensor, stds: Tensor | float, schedule: Schedule, weights: Tensor | None = None) -> None:
        super().__init__()
        count = len(means)
        weights = torch.ones(count) if weights is None else weights
        self.means = nn.Parameter(means.clone())
        self.log_stds = nn.Parameter(torch.as_tensor(stds, dtype=means.dtype).expand(count).log())
        self.log_weights = nn.Parameter((weights / weights.sum()).to(means.dtype).log().clamp_min(FLOOR))
        self.schedule = schedule

    def _joint(self, x: Tensor, t: Tensor, labels: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """log weight_k N(x; alpha mean_k, alpha**2 std_k**2 + sigma**2), x - alpha mean_k and the variances."""
        alpha, sigma = (f(wide(t, x)).flatten().unsqueeze(1) for f in (self.schedule.alpha, self.schedule.sigma))
        away = x.flatten(1).unsqueeze(1) - alpha.unsqueeze(-1) * self.means.flatten(1)
        variance = alpha**2 * (2 * self.log_stds).exp() + sigma**2
        log_normal = -0.5 * (away.square().sum(-1) / variance + away.shape[-1] * (2 * math.pi * variance).log())
        weights = torch.log_softmax(self.log_weights, 0).expand_as(log_normal)
        if labels is not None:
            chosen = nn.functional.one_hot(labels, len(self.means)).bool()
            weights = torch.where(chosen, 0.0, FLOOR).to(log_normal)
        return log_normal + weights, away, variance

    def log_density(self, x: Tensor, t: float | Tensor, labels: Tensor | None = None) -> Tensor:
        """log p_t(x) [B]."""
        return torch.logsumexp(self._joint(x, wide(t, x), labels)[0], 1)

    def forward(self, x: Tensor, t: Tensor, labels: Tensor | None = None, *, features: bool = False) -> Tensor:
        joint, away, variance = self._joint(x, wide(t, x), labels)
        if features:
            return torch.softmax(joint, 1)
        alpha = self.schedule.alpha(wide(t, x)).flatten().view(-1, 1, 1)
        gain = (2 * self.log_stds).exp() / variance
        each = self.means.flatten(1) + alpha * gain.unsqueeze(-1) * away
        return (torch.softmax(joint, 1).unsqueeze(-1) * each).sum(1).view_as(x)

    def draw(self, count: int) -> tuple[Tensor, Tensor]:
        """Data [count, ...] and the components [count] that it came from."""
        kinds = torch.multinomial(self.log_weights.exp(), count, replacement=True)
        shape = (count, *[1] * (self.means.ndim - 1))
        noise = torch.randn(count, *self.means.shape[1:], dtype=self.means.dtype, device=self.means.device)
        return self.means[kinds] + self.log_stds.exp()[kinds].view(shape) * noise, kinds


class GaussianDenoiser(Denoiser):
    """A denoiser with a known answer: data normal around `mean` [...], `std` a number or [...]."""

    net: Gaussian

    def __init__(self, mean: Tensor, std: Tensor | float = 1.0, schedule: Schedule | None = None) -> None:
        schedule = schedule or EDM()
        super().__init__(Gaussian(mean, std, schedule), schedule, "x0")


class MixtureDenoiser(Denoiser):
    """A denoiser with a known answer: a mixture of round Gaussians, means [K, ...], stds [K], weights [K]."""

    net: Mixture

    def __init__(
        self,
        means: Tensor,
        stds: Tensor | float = 0.1,
        schedule: Schedule | None = None,
        weights: Tensor | None = None,
    ) -> None:
        schedule = schedule or EDM()
        super().__init__(Mixture(means, stds, schedule, weights), schedule, "x0")
