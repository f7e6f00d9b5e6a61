"""Several teachers see every batch, and losses learn from what all of them say."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from limbeck.core.card import method
from limbeck.core.loop import Clock, Turn
from limbeck.core.nets import Batch, Nets
from limbeck.core.pair import Pair, parse_all
from limbeck.core.selection import all_say


@method(
    paper="Timiryasov and Tastet 2023 (Baby Llama), distillation loss",
    year=2023,
    arxiv="2308.02019",
    code="timinar/BabyLlama@3035185:distill-ensemble-pretraining-baby-llama.py",
    differs="both terms are means over the tokens, where the code sums the divergence over a text",
    row="baby_llama",
    exact_accumulation=True,
)
@dataclass(frozen=True)
class SeveralTeachers:
    """Weighted sum of losses between a student, labels and teachers_logits [M, ..., C], those of all teachers.

    match: losses as names, {name: {knob: value, weight: number}} or callables; the default is that of the paper.

    *Needs*: nets.teachers, a list of networks over the student's classes or words, each trained; nets.teacher alone
        counts as a list of one. *Relates to*: `distill` with one teacher; costs a forward pass a teacher.
    *Differs*: see the card.
    """

    match: tuple[Any, ...] = ({"ce": 0.5}, {"baby_llama": {"weight": 0.5, "temperature": 2.0}})

    @cached_property
    def pair(self) -> Pair:
        """The student and the losses on it."""
        return Pair("student", "teacher", parse_all(self.match))

    def setup(self, nets: Nets, probe: Batch) -> None:
        """Check that there are teachers, and build the losses that own weights."""
        self.pair.own(nets, self.heard(nets, probe))

    def heard(self, nets: Nets, batch: Batch) -> Batch:
        """The batch with what every teacher says of it."""
        return {**batch, "teachers_logits": all_say(nets, batch, "several_teachers")}

    def step(self, nets: Nets, batch: Batch, clock: Clock) -> Iterator[Turn]:
        """One turn of the student."""
        yield "student", self.pair.parts(nets, self.heard(nets, batch), clock.progress)
