"""The student's layers learn one after the other, each from one of the teacher's; then all of it learns the task."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import nn

from limbeck.core.blocks import depths, one_layer, train_only
from limbeck.core.card import method, require
from limbeck.core.loop import Clock, Stage, Turn
from limbeck.core.nets import Batch, Nets, evaluating
from limbeck.core.pair import Pair, parse_all, shape
from limbeck.core.pairs import Losses


@method(
    paper="Sun et al. 2020, section 3.5",
    year=2020,
    arxiv="2004.02984",
    differs="layers below are frozen, which the paper softens by a small learning rate; what comes before the first "
    "layer trains with it, where the paper copies it from a teacher of the same embedding; all stages share the steps",
    row="mobilebert",
    exact_accumulation=True,
)
@dataclass(frozen=True)
class ProgressiveTransfer:
    """Stage l of L minimises `first` on layer l alone, and only layer l moves; stage L + 1 minimises `match` with all.

    A layer learns by what the networks return in lists, of that layer and of the teacher's of equal relative depth.
    Each stage has an optimiser and a run of the learning rate's schedule of its own.

    first: losses of a layer, which own other weights for each.
    match: losses of the last stage; the paper's are labels and teacher in equal parts, at temperature 1.
    share: of all steps that the layers take, each as many, in (0, 1).

    *Needs*: nets.teacher at hand, of at least as many layers; `feats` of both, and what the losses ask for.
    *Relates to*: `stagewise` takes all layers at once before the task (the paper's joint transfer), `distill` with all
        losses at all times is its auxiliary one. `stablekd` lets each block read what the teacher's reads.
    *Differs*: see the card.
    """

    first: Losses = ("mobilebert",)
    match: Losses = ({"ce": 0.5}, {"kd": {"temperature": 1.0, "weight": 0.5}})
    share: float = 0.5

    def __post_init__(self) -> None:
        require(0 < self.share < 1, "share", self.share, "in (0, 1)")

    @cached_property
    def pairs(self) -> tuple[Pair, Pair]:
        """What is matched at one layer, and in the end."""
        one, all_ = (Pair("student", "teacher", parse_all(m), "losses.all") for m in (self.first, self.match))
        return one, all_

    def setup(self, nets: Nets, probe: Batch) -> None:
        """Find on one batch which weights are whose, and build the losses of every layer."""
        one, all_ = self.pairs
        nets.depths = depths(nets, "student", probe)
        with torch.no_grad(), evaluating(*nets.modules.values()):
            have = one.gather(nets, probe)
        layers = len(nets.depths.names) - 1
        owned = nn.ModuleDict()
        for k in range(layers):
            now = one_layer(have, k, layers)
            shapes = {name: shape(value) for name, value in now.items()}
            built = {m.name: m.build(shapes) for m in one.matches if m.is_module}
            owned[f"layer{k}"] = nn.ModuleDict(built)
            with torch.no_grad():
                self._parts(now, owned[f"layer{k}"], 0.0)
        owned["all"] = all_.build(nets, probe)
        nets.losses = owned

    def stages(self, nets: Nets, steps: int) -> Iterator[Stage]:
        """A stage a layer, then one for all of them, which alone says anything about the task."""
        names = nets.depths.names
        layers = len(names) - 1
        before = min(steps - 1, max(layers, round(self.share * steps)))
        for k in range(layers):
            train_only(nets.student, names[k])
            nets.companions["student"] = [f"losses.layer{k}"]
            length = (k + 1) * before // layers - k * before // layers
            yield Stage(length, f"layer{k}", until=(k + 1) / layers * self.share, validated=False)
        nets.student.requires_grad_(True)
        nets.companions["student"] = ["losses.all"]
        yield Stage(steps - before, "all")

    def step(self, nets: Nets, batch: Batch, clock: Clock) -> Iterator[Turn]:
        """One turn of the student."""
        one, all_ = self.pairs
        layers = len(nets.depths.names) - 1
        if clock.stage == layers:
            yield "student", all_.parts(nets, batch, clock.progress)
            return
        have = one_layer(one.gather(nets, batch), clock.stage, layers)
        yield "student", self._parts(have, nets.losses[f"layer{clock.stage}"], clock.progress)

    def _parts(self, have: dict[str, Any], owned: Any, progress: float) -> dict[str, Any]:
        """The losses of one layer."""
        now = {**have, "progress": progress}
        return {m.name: m.part(now, progress, owned[m.name] if m.is_module else None) for m in self.pairs[0].matches}
