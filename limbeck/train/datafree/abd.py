"""A guard around distillation on made pictures: what only a backdoor of the teacher would explain is not learned."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import Tensor

from limbeck.core import knobs
from limbeck.core.card import method, require
from limbeck.core.loop import Clock, Stage, Turn
from limbeck.core.memory import Memory
from limbeck.core.nets import Batch, Nets
from limbeck.core.vaccine import Shuffled, lookback, shown_to

MAKERS = ("generator", "images")


@method(
    paper="Hong et al. 2023, section 4",
    year=2023,
    arxiv="2306.02368",
    code="illidanlab/ABD@19c89bf:zskt/utils/syn_vaccine.py",
    differs="KL is summed over the classes: the code's weight is C times this one. What only looks at the student "
    "leaves its batch-norm statistics alone. d begins as faint noise, where the code has 0 and lives on rounding "
    "errors. Pictures that are found, not made, are not dropped",
)
@dataclass(frozen=True)
class ABD:
    """The host's turns, with a vaccine for those who make pictures and, late, retrospection for the student.

    Vaccine: - vaccine E[KL(p_t || p_sh) where p_t and p_sh name the same class]: p_sh is the mean of `copies` of the
    teacher that read the channels of their last `layers` convolutions in another order. Such a copy forgets pictures
    sooner than triggers, so that its agreement is suspicious.
    Retrospection: + retrospection KL(p_s(x) || p_s(x + d on a few)), d the change that moves the student most, with
    the gradient that goes through d as well.

    host: the method that is guarded, with its knobs, such as {"zskt": {"latent": 64}} or {"cmi": {}}.
    vaccine: weight >= 0. layers, copies: >= 0 and >= 1; 0 layers is no vaccine.
    trial: steps >= 0 without vaccine, the first in which the student learns; what it is shown first in each of them
        then tests the vaccine: `tail` of their divergences must be above 0.02, else the orders are drawn again, up to 8
        times, and then it is given up. 0 is no test; the paper takes 50.
    retrospection: weight >= 0. start: progress in [0, 1] from which the student looks back.
    search: steps of Adam, >= 1, that find d. search_rate: its rate, > 0. share: of the pictures that get d, in (0, 1].

    *Needs*: what the host needs, a teacher with convolutions, a turn called "generator" or "images".
    *Relates to*: costs three teachers where pictures are made, and some forty passes a turn of the student that looks
        back. `measure` attack success with and without it. *Differs*: see the card.
    """

    host: Any = "zskt"
    vaccine: float = 1.0
    layers: int = 5
    copies: int = 3
    trial: int = 0
    retrospection: float = 1.0
    start: float = 0.99
    search: int = 10
    search_rate: float = 0.1
    share: float = 0.02

    def __post_init__(self) -> None:
        for name in ("vaccine", "layers", "trial", "retrospection"):
            require(getattr(self, name) >= 0, name, getattr(self, name), ">= 0")
        for name in ("copies", "search"):
            require(getattr(self, name) >= 1, name, getattr(self, name), ">= 1")
        require(0 <= self.start <= 1, "start", self.start, "in [0, 1]")
        require(self.search_rate > 0, "search_rate", self.search_rate, "> 0")
        require(0 < self.share <= 1, "share", self.share, "in (0, 1]")
        require("fast_datafree" not in self.host, "host", self.host, "a method whose generator learns by its own turns")
        _ = self.made

    @cached_property
    def made(self) -> Any:
        """The host, ready."""
        return knobs.make(*knobs.split(self.host, "host"))

    @property
    def dataless(self) -> bool:
        """As the host is."""
        return bool(getattr(self.made, "dataless", False))

    @property
    def latent(self) -> int:
        """Numbers in a code of the host's generator."""
        return int(getattr(self.made, "latent", 1))

    def optimizers(self) -> dict[str, dict[str, Any]]:
        """The host's."""
        return dict(self.made.optimizers()) if hasattr(self.made, "optimizers") else {}

    def setup(self, nets: Nets, probe: Batch) -> None:
        """The host's, then the copies and room for pictures that test them."""
        if hasattr(self.made, "setup"):
            self.made.setup(nets, probe)
        if self.vaccine and self.layers:
            nets.vaccine = Shuffled(nets.teacher, self.layers, self.copies)
            nets.vaccine.active.fill_(not self.trial)
            if self.trial:
                nets.suspects = Memory(self.trial * len(probe["index"]), {"inputs": probe["inputs"]})

    def stages(self, nets: Nets, steps: int) -> Iterator[int | Stage]:
        """The host's."""
        yield from self.made.stages(nets, steps) if hasattr(self.made, "stages") else (Stage(steps),)

    def after(self, nets: Nets, player: str, clock: Clock) -> None:
        """The host's."""
        if hasattr(self.made, "after"):
            self.made.after(nets, player, clock)

    def step(self, nets: Nets, batch: Batch, clock: Clock) -> Iterator[Turn]:
        """The host's turns, each with what guards it."""
        guarded, tried = "vaccine" in nets, "suspects" in nets and not bool(nets.vaccine.tested)
        if tried and int(nets.suspects.added) >= nets.suspects.size:
            nets.vaccine.select(nets, "teacher", nets.suspects.all()["inputs"])
            tried = False
        turns = self.made.step(nets, batch, clock)
        while True:
            with shown_to(nets.teacher, nets.student) as shown:
                turn = next(turns, None)
            if turn is None:
                return
            player, loss = turn
            parts = dict(loss) if isinstance(loss, Mapping) else {"loss": loss}
            if player in MAKERS and "maker" in shown and guarded and bool(nets.vaccine.active):
                pictures, out = shown["maker"]
                logits = out if isinstance(out, Tensor) else out["logits"]
                parts["vaccine"] = -self.vaccine * nets.vaccine.suspicion(nets, "teacher", pictures, logits)
            if player == "student":
                pictures = shown["learner"][0]
                if tried:  # once a step: a host may show the same pictures several times
                    nets.suspects.add(inputs=pictures)
                    tried = False
                if self.retrospection and clock.progress >= self.start:
                    looked = lookback(nets, "student", pictures, self.search_rate, self.search, self.share)
                    parts["retrospection"] = self.retrospection * looked
            yield player, parts
