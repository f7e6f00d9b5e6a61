"""A small and a large network with layers in common are trained in one run, first each for itself, then together."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

from limbeck.core.card import method, require
from limbeck.core.loop import Clock, Turn
from limbeck.core.mutual import facing
from limbeck.core.nested import Around, common
from limbeck.core.nets import Batch, Nets, outputs
from limbeck.core.pair import Pair, parse_all, without_teacher
from limbeck.core.pairs import Pairs, own
from limbeck.core.reduce import Part


@method(
    paper="Li et al. 2023 (TSJT), section 3",
    year=2023,
    arxiv="2305.14066",
    differs="there is no official code; which layers are shared, when the stages change and how the divergences weigh "
    "are not known, and are for the user to set",
    exact_accumulation=True,
)
@dataclass(frozen=True)
class TSJTMulticap:
    """L = sum over the small and the large network of CE(labels, z) + D(sg z', z), z' of the other one.

    Layers of the same path and shape exist once: the small network is a way through the large one. For the first part
    of training, `alone`, there is no D: the shared layers warm up. Then each teaches the other, in one step on the sum.

    match: losses of the student, as names, {name: {knob: value, weight: number}} or callables. back: losses of the
        other network.
    alone: share of all steps, in [0, 1), that take those of the losses that ask for no teacher.
    first: who learns in these steps: "both", or "small", the student alone.
    shared: paths of layers that exist once, or of what they lie in, such as embed and blocks.0; () for all that could.

    *Needs*: nets.student and a factory "peer", of the same family and width but another depth; no teacher. The student
        is the result: exchange the two for the large one. Batch norm that is shared sees every example twice.
    *Relates to*: `ctcd` is the same without layers in common; `byot` and `uskd` have exits that are dropped.
    *Differs*: see the card.
    """

    match: tuple[Any, ...] = ({"ce": {"label_smoothing": 0.1}}, {"kd": {"temperature": 1.0}})
    back: tuple[Any, ...] = ({"ce": {"label_smoothing": 0.1}}, {"kd": {"temperature": 1.0}})
    alone: float = 0.5
    first: Literal["both", "small"] = "both"
    shared: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        require(0 <= self.alone < 1, "alone", self.alone, "in [0, 1)")
        require(self.first in ("both", "small"), "first", self.first, '"both" or "small"')

    @cached_property
    def pairs(self) -> Pairs:
        """Who learns from whom, and by which losses."""
        return {
            "small": Pair("student", "around", parse_all(self.match), "losses.small"),
            "large": Pair("around", "student", parse_all(self.back), "losses.large"),
        }

    @cached_property
    def warming(self) -> Pairs:
        """The same without anything that one says of the other."""
        alone = {name: Pair(p.learner, "", without_teacher(p.matches), p.losses) for name, p in self.pairs.items()}
        return alone if self.first == "both" else {"small": alone["small"]}

    def setup(self, nets: Nets, probe: Batch) -> None:
        """Build the other network around the student's layers, and the losses that own weights."""
        other = nets.fresh("peer")
        nets.around = Around(other, nets.student, common(nets.student, other, self.shared))
        own(nets, self.pairs, dict.fromkeys(self.pairs, probe))
        nets.companions.pop("around", None)  # one step moves both
        nets.companions["student"] = ["around", *(["losses"] if "losses" in nets else [])]

    def step(self, nets: Nets, batch: Batch, clock: Clock) -> Iterator[Turn]:
        """One turn of both."""
        pairs = self.warming if clock.progress < self.alone else self.pairs
        said = {"student": nets.run("student", batch)}
        if "large" in pairs:
            said["around"] = outputs(nets.around.network, batch)
        told: dict[str, Part] = {}
        for name, pair in pairs.items():
            have = facing(batch, said[pair.learner], said.get(pair.teacher, {}))
            found = pair.weighed(nets, have, clock.progress)
            told |= {f"{part}_{name}": value for part, value in found.items()}
        yield "student", told
