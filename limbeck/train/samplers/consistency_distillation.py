"""A student that jumps from any point of the teacher's sampling path to its start: neighbours must agree."""

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from limbeck.core.card import method, require
from limbeck.core.errors import BadInput
from limbeck.core.loop import Clock, Turn
from limbeck.core.maths import upcast
from limbeck.core.nets import Batch, Nets
from limbeck.core.reduce import mean
from limbeck.core.sampler import SOLVERS, step
from limbeck.core.state import ema_update


@method(
    paper="Song et al. 2023, algorithm 2",
    year=2023,
    arxiv="2303.01469",
    code="openai/consistency_models@e32b69ee436d518377db86fb2127a3972d0d8716:cm/karras_diffusion.py",
    differs="LPIPS, which needs a network of its own, is left out of the distances",
)
@dataclass(frozen=True)
class ConsistencyDistillation:
    """d(f(x_t, t), f'(x_s, s)) for neighbouring times s < t of a grid; x_s is one teacher step from x_t.

    x_t = alpha x_0 + sigma eps of real data x_0; f is the student, f' its average (or itself) held constant; both see
    the same dropout. f is bound to f(x, t_min) = x, so agreement of neighbours is agreement with the data.

    levels: N, times of the grid, >= 2; the paper's is 18 for 32x32 pictures and 40 for 64x64.
    decay: of the average f', in [0, 1); 0 takes the student itself. The paper's is 0 rising to 0.95, or 0.95.
    distance: "l2" (squared) or "l1", averaged over the elements.
    solver: of the teacher's step.
    guided: give the labels of the batch to teacher and student.

    *Needs*: nets.teacher, a Denoiser; real data. nets.student, a Denoiser with the same schedule, begins as a copy of
        the teacher when there is none. Several steps sample by going to x_0 and adding new noise.
    *Relates to*: `dmd2` gives sharper single steps and needs two more networks; `reflow` needs no data.
    *Differs*: see the card. The paper trains 64x64 pictures by RAdam at 8e-6, in batches of 2048.
    """

    levels: int = 18
    decay: float = 0.0
    distance: Literal["l1", "l2"] = "l2"
    solver: str = "heun"
    guided: bool = False

    def __post_init__(self) -> None:
        require(self.levels >= 2, "levels", self.levels, ">= 2")
        require(0 <= self.decay < 1, "decay", self.decay, "in [0, 1)")
        require(self.distance in ("l1", "l2"), "distance", self.distance, "'l1' or 'l2'")
        require(self.solver in SOLVERS, "solver", self.solver, f"one of {', '.join(SOLVERS)}")

    def setup(self, nets: Nets, probe: Batch) -> None:
        """Bind the student at t_min, and begin its average."""
        if "student" not in nets:
            nets.student = copy.deepcopy(nets.teacher).train().requires_grad_(True)
        if nets.student.schedule != nets.teacher.schedule:
            raise BadInput(
                f"teacher and student must share a noise schedule, got {nets.teacher.schedule} and "
                f"{nets.student.schedule}"
            )
        nets.student.boundary, nets.student.solver = True, "renoise"
        if self.decay:
            nets.target = copy.deepcopy(nets.student).requires_grad_(False)

    def step(self, nets: Nets, batch: Batch, clock: Clock) -> Iterator[Turn]:
        """One turn of the student."""
        x0, labels = batch["inputs"], batch["labels"] if self.guided else None
        schedule = nets.teacher.schedule
        n = torch.randint(self.levels - 1, (len(x0),), device=x0.device)
        t, s = (schedule.at(1 - i.to(upcast(x0).dtype) / (self.levels - 1)) for i in (n, n + 1))
        xt = schedule.noised(x0, t, torch.randn_like(x0))
        with torch.random.fork_rng([x0.device] if x0.is_cuda else []):  # so that the next call draws the same dropout
            jump = nets.student(xt, t, labels)
        with torch.no_grad():
            xs = step(nets.teacher, xt, t, s, self.solver, labels)
            target = (nets.target if self.decay else nets.student)(xs, s, labels)
        yield "student", {"consistency": mean(self.apart(jump, target))}

    def apart(self, a: Tensor, b: Tensor) -> Tensor:
        """The distance, element by element."""
        return (a - b).square() if self.distance == "l2" else (a - b).abs()

    def after(self, nets: Nets, player: str, clock: Clock) -> None:
        """Move the average."""
        if self.decay:
            ema_update(nets.target, nets.student, self.decay)
