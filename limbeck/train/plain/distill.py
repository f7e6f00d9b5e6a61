"""The plain scheme: teacher and student see the same batch, and any losses compare what they return."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from limbeck.core.card import method
from limbeck.core.loop import Clock, Turn
from limbeck.core.nets import Batch, Nets
from limbeck.core.pair import Pair, parse_all


@method(paper="Hinton et al. 2015, section 2", year=2015, arxiv="1503.02531", row="kd", exact_accumulation=True)
@dataclass(frozen=True)
class Distill:
    """Weighted sum of losses between student, teacher and labels.

    A network returns a dict of vocabulary names without prefix (or a tensor of logits); this adds `student_` and
    `teacher_`. When the batch already holds `teacher_*` from a store, the teacher is not run: offline and online are
    one path. Losses that own weights are built from the shapes of one batch and train with the student.

    match: losses as names, {name: {knob: value, weight: number}} or callables; numbers may be schedules.

    *Needs*: nets.student; nets.teacher or stored teacher signals when a loss asks for them.
    *Relates to*: every loss; use `takd` when the teacher is many times larger, `dml` when there is none.
    """

    match: tuple[Any, ...] = ("ce", "kd")

    @cached_property
    def pair(self) -> Pair:
        """The student, its teacher, and the losses between them."""
        return Pair("student", "teacher", parse_all(self.match))

    def setup(self, nets: Nets, probe: Batch) -> None:
        """Check that every loss finds what it asks for, and build the losses that own weights."""
        self.pair.own(nets, probe)

    def step(self, nets: Nets, batch: Batch, clock: Clock) -> Iterator[Turn]:
        """One turn of the student."""
        yield "student", self.pair.parts(nets, batch, clock.progress)
