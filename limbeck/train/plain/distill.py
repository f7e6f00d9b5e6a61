"""The plain scheme: teacher and student see the same batch, and any losses compare what they return."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import nn

from limbeck.core.card import method
from limbeck.core.errors import BadInput
from limbeck.core.loop import Clock, Turn
from limbeck.core.match import Match, parse
from limbeck.core.nets import Batch, Nets


@method(paper="Hinton et al. 2015, section 2", year=2015, arxiv="1503.02531", row="kd", exact_accumulation=True)
@dataclass(frozen=True)
class Distill:
    """Weighted sum of losses between student, teacher and labels.

    A network returns a dict of vocabulary names without prefix (or a tensor of logits); this adds `student_` and
    `teacher_`. When the batch already holds `teacher_*` from a store, the teacher is not run: offline and online are
    one path. Losses that own weights are built from the shapes of one batch and train with the student.

    match: losses as names, {name: {knob: value, weight: number}} or callables; numbers may be schedules.

    *Needs*: nets.student; nets.teacher or stored teacher signals when a loss asks for them. *Relates to*: every loss.
    """

    match: tuple[Any, ...] = ("ce", "kd")

    @cached_property
    def matches(self) -> list[Match]:
        """The losses, parsed, each with a name of its own."""
        return [parse(m) for m in self.match]

    @cached_property
    def uses_teacher(self) -> bool:
        """Whether any loss asks for what only a teacher can say."""
        return any(name.startswith("teacher_") for m in self.matches for name in m.needs)

    def setup(self, nets: Nets, probe: Batch) -> None:
        """Check that every loss finds what it asks for, and build the losses that own weights."""
        have = _without_traces(nets, lambda: self.gather(nets, probe))
        shapes = {name: _shape(value) for name, value in have.items()}
        if "index" in probe:
            shapes["index"] = (int(probe.get("examples") or probe["index"].max() + 1),)
        for m in self.matches:
            asked = {n: shapes[n][-1] for n in m.needs if n.endswith("_logits") and n in shapes}
            if len(set(asked.values())) > 1 and "vocab" not in "".join(asked):
                raise BadInput(
                    f"`{m.name}` compares classes one by one, but "
                    + " and ".join(f"the {n.split('_')[0]} has {c} classes" for n, c in asked.items())
                )
        modules = {m.name: m.build(shapes) for m in self.matches if m.is_module}
        if modules:
            nets.losses = nn.ModuleDict(modules)
            nets.companions["student"] = ["losses"]
        with torch.no_grad():
            for m in self.matches:
                if not m.is_module:
                    m.part(have, 0.0)

    def gather(self, nets: Nets, batch: Batch) -> dict[str, Any]:
        """Everything that losses may ask for, by name."""
        have = {**batch, **{f"student_{k}": v for k, v in nets.run("student", batch).items()}}
        if self.uses_teacher and not any(k.startswith("teacher_") for k in batch):
            if "teacher" not in nets:
                raise BadInput("a loss asks for the teacher, but there is neither a teacher nor a store of its signals")
            have |= {f"teacher_{k}": v for k, v in nets.run("teacher", batch).items()}
        return have

    def step(self, nets: Nets, batch: Batch, clock: Clock) -> Iterator[Turn]:
        """One turn of the student."""
        have = self.gather(nets, batch)
        have["progress"] = clock.progress
        modules: Any = nets.losses if "losses" in nets else {}
        yield "student", {
            m.name: m.part(have, clock.progress, modules[m.name] if m.is_module else None) for m in self.matches
        }


def _shape(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return [tuple(v.shape) for v in value]
    return tuple(value.shape) if isinstance(value, torch.Tensor) else ()


def _without_traces(nets: Nets, probe: Any) -> dict[str, Any]:
    """Run a probe in eval mode without gradient, so that no statistics move."""
    modes = {name: module.training for name, module in nets.modules.items()}
    try:
        for module in nets.modules.values():
            module.eval()
        with torch.no_grad():
            out: dict[str, Any] = probe()
            return out
    finally:
        for name, mode in modes.items():
            nets.modules[name].train(mode)
