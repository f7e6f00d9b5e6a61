"""First the student's inner layers are brought into place by losses of their own, then other losses train all of it."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

from limbeck.core.card import method, require
from limbeck.core.loop import Clock, Stage, Turn
from limbeck.core.nets import Batch, Nets
from limbeck.core.pairs import Losses, Pairs, in_turn, own, students


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

    Each stage has an optimiser and a run of the learning rate's schedule of its own; losses of the first go after it.

    first: losses of the first stage: {fitnets: ...} for hint-based training, {fsp: ...}, {ab: {weight: 0.003}}.
    match: losses of the second stage.
    share: of all steps that the first stage takes, in (0, 1).

    *Needs*: nets.student, nets.teacher, and what the losses ask for.
    *Relates to*: use `distill` to have all losses at once, which is simpler and mostly as good; in stages the first
        loss cannot stand in the way of the labels, and needs no weight against them.
    """

    first: Losses = ("fitnets",)
    match: Losses = ("ce", "kd")
    share: float = 0.3

    def __post_init__(self) -> None:
        require(0 < self.share < 1, "share", self.share, "in (0, 1)")

    @cached_property
    def pairs(self) -> Pairs:
        """Who learns what from whom in either stage."""
        return students(stage0=self.first, stage1=self.match)

    def setup(self, nets: Nets, probe: Batch) -> None:
        """Check both stages on one batch, and build the losses that own weights."""
        own(nets, self.pairs, dict.fromkeys(self.pairs, probe))

    def stages(self, nets: Nets, steps: int) -> Iterator[Stage]:
        """Two stages; only the second has anything to say about the student's predictions."""
        inside = Stage(min(steps - 1, max(1, round(self.share * steps))), "inside", until=self.share, validated=False)
        return in_turn(nets, self.pairs, inside, Stage(steps - inside.steps, "all"))

    def step(self, nets: Nets, batch: Batch, clock: Clock) -> Iterator[Turn]:
        """One turn of the student."""
        yield "student", self.pairs[f"stage{clock.stage}"].parts(nets, batch, clock.progress)
