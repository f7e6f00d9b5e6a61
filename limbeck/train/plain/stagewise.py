"""First the student's inner layers are brought into place by losses of their own, then other losses train all of it."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import nn

from limbeck.core.card import method, require
from limbeck.core.loop import Clock, Stage, Turn
from limbeck.core.nets import Batch, Nets
from limbeck.core.pair import Pair, parse_all


@method(
    paper="Romero et al. 2014, section 2.3",
    year=2014,
    arxiv="1412.6550",
    differs="both stages together take the steps that a control has for one; papers add the first on top",
    row=("fitnets", "fsp", "ab"),
    exact_accumulation=True,
)
@dataclass(frozen=True)
class Stagewise:
    """Stage 1 minimises `first` from the student's random start, stage 2 minimises `match` from where that ends.

    Losses of the first stage are dropped with their projectors after it; each stage has its own optimiser and its own
    run of the learning rate's schedule.

    first: losses of the first stage: {fitnets: ...} for hint-based training, {fsp: ...}, {ab: {weight: 0.003}}.
    match: losses of the second stage.
    share: of all steps that the first stage takes, in (0, 1).

    *Needs*: nets.student, nets.teacher, and what the losses ask for.
    *Relates to*: use `distill` to have all losses at once, which is simpler and mostly as good; in stages the first
        loss cannot stand in the way of the labels, and needs no weight against them.
    """

    first: tuple[Any, ...] = ("fitnets",)
    match: tuple[Any, ...] = ("ce", "kd")
    share: float = 0.3

    def __post_init__(self) -> None:
        require(0 < self.share < 1, "share", self.share, "in (0, 1)")

    @cached_property
    def pairs(self) -> tuple[Pair, Pair]:
        """Who learns what from whom in either stage."""
        first, second = (
            Pair("student", "teacher", parse_all(specs), f"losses.stage{k}")
            for k, specs in enumerate((self.first, self.match))
        )
        return first, second

    def setup(self, nets: Nets, probe: Batch) -> None:
        """Check both stages on one batch, and build the losses that own weights."""
        owned = {f"stage{k}": pair.build(nets, probe) for k, pair in enumerate(self.pairs)}
        if any(owned.values()):
            nets.losses = nn.ModuleDict(owned)

    def stages(self, nets: Nets, steps: int) -> Iterator[Stage]:
        """Two stages; only the second has anything to say about the student's predictions."""
        before = min(steps - 1, max(1, round(self.share * steps)))
        for k, (length, end) in enumerate(((before, self.share), (steps - before, 1.0))):
            if "losses" in nets:
                nets.companions["student"] = [self.pairs[k].losses]
            yield Stage(length, ("inside", "all")[k], until=end, validated=k == 1)

    def step(self, nets: Nets, batch: Batch, clock: Clock) -> Iterator[Turn]:
        """One turn of the student."""
        yield "student", self.pairs[clock.stage].parts(nets, batch, clock.progress)
