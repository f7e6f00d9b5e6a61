"""Networks that are born again: each generation starts anew and learns from the one before, of its own architecture."""

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import nn

from limbeck.core.card import method, require
from limbeck.core.ensemble import Ensemble
from limbeck.core.loop import Clock, Stage, Turn
from limbeck.core.match import Match
from limbeck.core.nets import Batch, Nets
from limbeck.core.pair import Pair, parse_all, without_teacher


@method(
    paper="Furlanello et al. 2018, section 3",
    year=2018,
    arxiv="1805.04770",
    differs="KL instead of cross-entropy between the predictions: they differ by the teacher's entropy, a constant",
    exact_accumulation=True,
)
@dataclass(frozen=True)
class BAN:
    """Generation k minimises CE(softmax(z_{k-1}), softmax(z_k)) from a new random start; z_{k-1} is frozen.

    Generation 0 is nets.teacher, or, when there is none, a first student trained on the labels. Past generations stay
    in nets.generations; `ensemble` averages them.

    match: losses between a generation and the one before. Add "ce" for the labels (the paper's BAN+L), or put `cwtm`
        or `dkpp` in the place of `kd` for its two ablations.
    generations: students that learn from their predecessor, >= 1.

    *Needs*: nets.student and how to start it anew: a factory, or layers that can reset themselves.
    *Relates to*: `takd` for a chain of different sizes, `dml` when generations are too slow. Training costs as many
        trainings as there are generations; so does the prediction of the ensemble.
    *Differs*: see the card.
    """

    match: tuple[Any, ...] = ({"kd": {"temperature": 1.0}},)
    generations: int = 3

    def __post_init__(self) -> None:
        require(self.generations >= 1, "generations", self.generations, ">= 1")

    @cached_property
    def matches(self) -> tuple[Match, ...]:
        """The losses, parsed."""
        return parse_all(self.match)

    def pair(self, nets: Nets, generation: int) -> Pair:
        """Who teaches the student that is number `generation` in this run."""
        if generation:
            return Pair("student", f"generations.{generation - 1}", self.matches)
        teacher = "teacher" if "teacher" in nets else ""
        return Pair("student", teacher, self.matches if teacher else without_teacher(self.matches))

    def setup(self, nets: Nets, probe: Batch) -> None:
        """Check the losses on one batch: of the student against the teacher, or against itself."""
        pair = self.pair(nets, 0)
        pair.build(nets, probe)
        Pair("student", pair.teacher or "student", self.matches).own(nets, probe)

    def stages(self, nets: Nets, steps: int) -> Iterator[Stage]:
        """One stage a generation."""
        count = self.generations + ("teacher" not in nets)
        losses = copy.deepcopy(nets.losses) if "losses" in nets else None
        nets.generations = nn.ModuleList()
        for g in range(count):
            if g:
                nets.retire("student", "generations")
                if losses is not None:
                    nets.losses = copy.deepcopy(losses)
            yield Stage(steps, f"generation {g + ('teacher' in nets)}", until=(g + 1) / count)

    def step(self, nets: Nets, batch: Batch, clock: Clock) -> Iterator[Turn]:
        """One turn of the newest generation."""
        yield "student", self.pair(nets, clock.stage).parts(nets, batch, clock.progress)

    def ensemble(self, nets: Nets) -> Ensemble:
        """The mean of the predictions of all generations trained here (BANE)."""
        return Ensemble([*nets.generations, nets.student])
