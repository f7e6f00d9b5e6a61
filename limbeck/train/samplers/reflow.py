"""Straightens a sampler's paths by training on its own pairs of noise and data, until one step is enough."""

import copy
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from limbeck.core.card import method, require
from limbeck.core.loop import Clock, Stage, Turn
from limbeck.core.nets import Batch, Nets
from limbeck.core.reduce import mean
from limbeck.core.sampler import SOLVERS, Denoiser, Flow, Pairs, generate


@method(
    paper="Liu et al. 2022, eq. 1 and algorithm 1; section 2.1 for distillation",
    year=2022,
    arxiv="2209.03003",
    code="gnobitab/RectifiedFlow@5a1fd4dd3ea7db764ce370a84ce35f9c8b15fde6:ImageGeneration/losses.py",
    differs="t runs from data to noise; pairs come from a fixed-step solver, not RK45; LPIPS, which needs a network of "
    "its own, is left out. A teacher on another noise schedule is read along straight lines at equal noise levels.",
)
@dataclass(frozen=True)
class Reflow:
    """|v(x_t, t) - (z - x)|**2 at x_t = (1 - t) x + t z, where x is what the sampler makes of its noise z.

    A stage a round: the pairs (z, x) of the first are the teacher's, those of each later one the student's. Marginals
    stay, paths get straighter. A last stage may distil: the same loss at the k times from which k steps start.

    rounds: of straightening, >= 0.
    steps: k of the distilling stage, >= 0; 0 leaves it out.
    pairs: kept a stage, >= 0; 0 makes new ones for every batch. The paper advises a million for CIFAR-10.
    simulate: solver steps that make a pair, >= 1. solver: which.
    guided: give labels to all networks; pairs get those of the first batch, in equal shares.

    *Needs*: nets.teacher, a Denoiser; no data but its shape (and labels). nets.student, a Denoiser, begins as a copy of
        the teacher when there is none; off a flow schedule it is put on one.
    *Relates to*: `consistency_distillation` needs no pairs; `dmd2` matches distributions, not pairs.
    *Differs*: see the card. The paper trains 32x32 pictures by Adam at 2e-4.
    """

    rounds: int = 1
    steps: int = 0
    pairs: int = 10_000
    simulate: int = 20
    solver: str = "heun"
    guided: bool = False

    def __post_init__(self) -> None:
        for name, least in (("rounds", 0), ("steps", 0), ("pairs", 0), ("simulate", 1)):
            require(getattr(self, name) >= least, name, getattr(self, name), f">= {least}")
        require(self.rounds + self.steps > 0, "rounds", self.rounds, "> 0, or `steps` must be")
        require(self.solver in SOLVERS, "solver", self.solver, f"one of {', '.join(SOLVERS)}")

    def setup(self, nets: Nets, probe: Batch) -> None:
        """Put the student on straight lines, and make room for pairs."""
        if "student" not in nets:
            nets.student = copy.deepcopy(nets.teacher).train().requires_grad_(True)
        if not isinstance(nets.student.schedule, Flow):
            nets.student = nets.student.on(straight(nets.student))
        nets.student.solver = "euler"
        nets.pairs = Pairs(probe["labels"] if self.guided else None)

    def stages(self, nets: Nets, steps: int) -> Iterator[Stage]:
        """A stage a round, and one for distilling."""
        count = self.rounds + (self.steps > 0)
        for r in range(count):
            if r:
                nets.source = copy.deepcopy(nets.student)
                nets.freeze("source")
                nets.pairs.clear()
            yield Stage(steps, f"round {r + 1}" if r < self.rounds else "distil", until=(r + 1) / count)

    def step(self, nets: Nets, batch: Batch, clock: Clock) -> Iterator[Turn]:
        """One turn of the student."""
        z, x, labels = self.pair(nets, batch, nets.source if clock.stage else nets.teacher, clock.stage)
        schedule = nets.student.schedule
        if clock.stage < self.rounds:
            t = schedule.draw(len(x), x.device)
        else:
            starts = schedule.grid(self.steps)[:-1].to(x)
            t = starts[torch.randint(self.steps, (len(x),), device=x.device)]
        velocity = nets.student.velocity(schedule.noised(x, t, z), t, labels)
        yield "student", {"flow": mean((velocity - (z - x)).square())}

    def pair(self, nets: Nets, batch: Batch, source: Denoiser, stage: int) -> tuple[Tensor, Tensor, Tensor | None]:
        """Noise, data and labels of as many examples as the batch has."""
        like, labels = batch["inputs"], batch["labels"] if self.guided else None
        if not self.pairs:
            z = torch.randn_like(like)
            return z, generate(source, z, self.simulate, solver=self.solver, labels=labels), labels
        if not len(nets.pairs):  # at the start of a stage, and after a resume: the same seed makes the same pairs
            seed = torch.initial_seed() + stage
            nets.pairs.fill(source, like, self.pairs, self.simulate, self.solver, seed)
        noise, data, drawn = nets.pairs.draw(len(like))
        return noise, data, drawn


def straight(denoiser: Denoiser) -> Flow:
    """Straight lines that span the noise levels of a denoiser's own schedule."""
    old = denoiser.schedule
    ends = [float(Flow().time(old.ratio(torch.tensor(t, dtype=torch.float64)))) for t in (old.t_min, old.t_max)]
    return Flow(ends[0], ends[1], old.sigma_data)
