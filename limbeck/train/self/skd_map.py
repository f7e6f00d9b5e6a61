"""After every pass over the data the teacher is what the student has become, trusted as far as it ranks well."""

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from limbeck.core.card import method, require
from limbeck.core.loop import Clock, Turn
from limbeck.core.match import Match
from limbeck.core.nets import Batch, Nets
from limbeck.core.pair import Pair, parse_all, without_teacher
from limbeck.core.taps import Taps, untap


class Generation(nn.Module):
    """How often the student has become the teacher, and in which pass over the data it last did."""

    number: Tensor
    epoch: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("number", torch.tensor(0))
        self.register_buffer("epoch", torch.tensor(0))


@method(
    paper="Casimiro Carrino et al. 2023, section 3.2",
    year=2023,
    arxiv="2309.17134",
    code="ccasimiro88/self-distillation-gxlt-qa@c6b7f10:src/run_squad_w_distillation.py",
    differs="questions and contexts of several languages are the data's business: the method sees one batch",
    exact_accumulation=False,
)
@dataclass(frozen=True)
class SKDMap:
    """CE(label, z) + a T^2 KL(z' || z), where z' is what the student said before this pass over the data.

    During the first pass the teacher is nets.teacher; where there is none, only the losses without a teacher count.
    After each pass nets.past becomes a frozen copy of the student, which trains on with its own optimiser.

    match: losses between student and teacher. `map_kd` trusts the teacher as far as it ranks the right answers high;
        `kd` in its place is the constant coefficient.
    every: steps after which the student becomes the teacher, >= 0; 0: after each pass over the data.

    *Needs*: labels; data of known length, or `every`. *Relates to*: `ban` starts each generation anew, `mean_teacher`
        follows in every step, `ps_kd` remembers answers instead of weights. `every` 0 with one pass is plain teaching.
    *Differs*: see the card.
    """

    match: tuple[Any, ...] = ("ce", "map_kd")
    every: int = 0

    def __post_init__(self) -> None:
        require(self.every >= 0, "every", self.every, ">= 0")

    @cached_property
    def matches(self) -> tuple[Match, ...]:
        """The losses, parsed."""
        return parse_all(self.match)

    def pair(self, nets: Nets) -> Pair:
        """Who teaches the student now."""
        teacher = "past" if int(nets.generation.number) else "teacher" if "teacher" in nets else ""
        return Pair("student", teacher, self.matches if teacher else without_teacher(self.matches))

    def setup(self, nets: Nets, probe: Batch) -> None:
        """The past starts as a copy of the student; check the losses against it, and against the teacher."""
        nets.generation, nets.past = Generation(), copy.deepcopy(nets.student)
        untap(nets.past)
        nets.freeze("past")
        if "student" in nets.taps:
            taps = nets.taps["student"]
            nets.taps["past"] = Taps(nets.past, {n: p[0] if n in taps.single else p for n, p in taps.paths.items()})
        self.pair(nets).build(nets, probe)
        Pair("student", "past", self.matches).own(nets, probe)

    def step(self, nets: Nets, batch: Batch, clock: Clock) -> Iterator[Turn]:
        """One turn of the student."""
        yield "student", self.pair(nets).parts(nets, batch, clock.progress)

    def after(self, nets: Nets, player: str, clock: Clock) -> None:
        """The student becomes the teacher when a pass over the data has ended; the clock says what comes next."""
        ended = (clock.t + 1) % self.every == 0 if self.every else clock.epoch > int(nets.generation.epoch)
        if ended:
            nets.past.load_state_dict(nets.student.state_dict())
            nets.generation.number += 1
            nets.generation.epoch.fill_(clock.epoch)
