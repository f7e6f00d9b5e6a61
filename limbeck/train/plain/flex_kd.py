"""The teacher's units that matter most for its answers, as many as the student has, are taught one to one."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from limbeck.core.bank import everyone
from limbeck.core.card import method, require
from limbeck.core.errors import BadInput
from limbeck.core.features import Shape, pick, pooled, same_places, tokens, width
from limbeck.core.layerwise import counted
from limbeck.core.loop import Clock, Stage, Turn
from limbeck.core.match import Match
from limbeck.core.maths import pair
from limbeck.core.nets import Batch, Nets
from limbeck.core.pair import Pair, parse_all
from limbeck.core.responses import column_correlation
from limbeck.core.teachers import at_hand


@method(
    paper="Saadi and Wang 2025, Task-Based Flexible Feature Distillation",
    year=2025,
    arxiv="2507.10155",
    differs="1 - correlation, mean over the units, where only a correlation is named; units are judged on a share of "
    "training, not in a pass over the set, and by the logit of the teacher's own first choice",
)
@dataclass(frozen=True)
class FlexKD:
    """Stage 1: I_j = sum |dz_c / dh_j|. Stage 2: other losses + weight mean_j (1 - corr(h_s,j ; h_t,chosen_j)).

    h are hidden states [B, T, D], maps or vectors; z_c is the logit of the teacher's first choice; magnitudes are
    averaged over places. `chosen` are the units of highest I, as many as the student has, in their order. The
    correlation is over all real places of the batch: scale and shift of a unit are free, and no weight is learned.

    match: other losses of the second stage.
    weight: of the units, >= 0.
    measuring: steps of the first stage, as a share of those of the second, in (0, 1]. The student has no part in it.
    layer: which of the features, counted from shallow (0) or from deep (-1); the last in the paper.

    *Needs*: nets.student and nets.teacher at hand, `feats` of both on the way to the logits; a teacher no narrower than
        the student. Batches of 16 and more examples, or of texts.
    *Relates to*: `fitnets` learns a projector instead; use this where that distorts more than it helps, as with wide
        language models and few examples.
    """

    match: tuple[Any, ...] = ("ce", "kd")
    weight: float = 1.0
    measuring: float = 0.1
    layer: int = -1

    def __post_init__(self) -> None:
        require(self.weight >= 0, "weight", self.weight, ">= 0")
        require(0 < self.measuring <= 1, "measuring", self.measuring, "in (0, 1]")

    @cached_property
    def pair(self) -> Pair:
        """The student and its teacher, with the units among their losses."""
        return Pair(
            "student", "teacher", (*parse_all(self.match), Match("units", Units, {"layer": self.layer}, self.weight))
        )

    def setup(self, nets: Nets, probe: Batch) -> None:
        """Check the losses on one batch, and make room for what the units are worth."""
        at_hand(nets, "flex_kd", "asks the teacher for gradients")
        self.pair.own(nets, probe)

    def stages(self, nets: Nets, steps: int) -> Iterator[Stage]:
        """Judging the teacher's units, then teaching."""
        before = max(1, round(self.measuring * steps))
        yield Stage(before, "units", until=before / (before + steps), validated=False)
        nets.losses["units"].choose()
        yield Stage(steps, "student")

    def step(self, nets: Nets, batch: Batch, clock: Clock) -> Iterator[Turn]:
        """In the second stage, one turn of the student."""
        if clock.stage == 0:
            nets.losses["units"].add(slopes(nets, batch, self.layer), batch)
        else:
            yield "student", self.pair.parts(nets, batch, clock.progress)


def slopes(nets: Nets, batch: Batch, layer: int) -> Tensor:
    """Magnitude of the slope of the teacher's highest logits by each entry of one of its features."""
    nets.teacher.requires_grad_(True)  # token ids carry no gradient, so that the graph has to begin at the weights
    try:
        told = nets.run("teacher", batch, through=True)
        (slope,) = torch.autograd.grad(told["logits"].max(-1).values.sum(), told["feats"][layer])
    finally:
        nets.teacher.requires_grad_(False)
    magnitude: Tensor = slope.abs()
    return magnitude


class Units(nn.Module):
    """What the teacher's units are worth [D], which of them are taught, and how far the student's are from those."""

    importance: Tensor
    chosen: Tensor

    def __init__(self, student_feats: list[Shape], teacher_feats: list[Shape], *, layer: int) -> None:
        super().__init__()
        self.layer = layer
        mine = width(student_feats[pick("layer", student_feats, layer, "student")])
        aims = width(teacher_feats[pick("layer", teacher_feats, layer, "teacher")])
        if mine > aims:
            raise BadInput(f"flex_kd picks units of the teacher for the student's, but there are {aims} for {mine}")
        self.register_buffer("importance", torch.zeros(aims))
        self.register_buffer("chosen", torch.arange(mine))

    @torch.no_grad()
    def add(self, slope: Tensor, batch: Batch) -> None:
        """Count in the slopes of one batch."""
        counts = counted(batch.get("mask"), slope)
        each = pooled(slope, batch.get("attention_mask") if slope.ndim == 3 else None)
        mine = torch.where(counts.unsqueeze(1), each, 0.0).sum(0, keepdim=True)
        self.importance += everyone(mine).sum(0)

    def choose(self) -> None:
        """Take the units of highest worth, in their order."""
        self.chosen.copy_(self.importance.topk(len(self.chosen)).indices.sort().values)

    def forward(
        self,
        student_feats: list[Tensor],
        teacher_feats: list[Tensor],
        attention_mask: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """Mean over units of 1 - correlation: []."""
        student, teacher = same_places(student_feats[self.layer], teacher_feats[self.layer].detach())
        counts = counted(mask, student).unsqueeze(1).expand(-1, tokens(student).shape[1])
        if attention_mask is not None and student.ndim == 3:
            counts = counts & attention_mask.bool()
        mine, aims = pair(tokens(student).flatten(0, 1), tokens(teacher).flatten(0, 1)[:, self.chosen])
        return (1 - column_correlation(mine, aims, counts.reshape(-1, 1))).mean()
