"""Several teachers see every batch, and losses learn from what all of them say."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from limbeck.core.card import method
from limbeck.core.errors import BadInput
from limbeck.core.loop import Clock, Turn
from limbeck.core.nets import Batch, Nets
from limbeck.core.pair import Pair, parse_all


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
        if not self.teachers(nets):
            raise BadInput("several_teachers needs nets.teachers, a list of at least one network, or nets.teacher")
        self.pair.own(nets, self.heard(nets, probe))

    def teachers(self, nets: Nets) -> list[str]:
        """Who teaches."""
        if "teachers" in nets:
            return [f"teachers.{i}" for i in range(len(nets.teachers))]
        return ["teacher"] if "teacher" in nets else []

    def heard(self, nets: Nets, batch: Batch) -> Batch:
        """The batch with what every teacher says of it."""
        with torch.no_grad():
            said = [nets.run(name, batch)["logits"] for name in self.teachers(nets)]
        apart = {tuple(logits.shape) for logits in said}
        if len(apart) > 1:
            raise BadInput(f"teachers must share their classes or words, got logits of shapes {sorted(apart)}")
        return {**batch, "teachers_logits": torch.stack(said)}

    def step(self, nets: Nets, batch: Batch, clock: Clock) -> Iterator[Turn]:
        """One turn of the student."""
        yield "student", self.pair.parts(nets, self.heard(nets, batch), clock.progress)
