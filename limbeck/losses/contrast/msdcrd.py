"""Contrast at several scales in one batch: each region of a picture, and each channel, finds its own in the teacher."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from limbeck.core.card import method, require
from limbeck.core.features import Shape, as_map, grid, pick, regions, width
from limbeck.core.maths import pair
from limbeck.core.project import projector


@method(
    paper="Wang and Wang 2025, section 3",
    year=2025,
    arxiv="2502.05835",
    differs="the versions of the paper differ, and there is no code: both contrasts count alike, a scale is an even "
    "grid of regions, and those that the teacher's classifier gets wrong are left out of the first contrast",
)
class MSDCRD(nn.Module):
    """Mean over scales of InfoNCE of regions + channel_weight InfoNCE of channels.  lists -> []

    At scale k both maps are averaged over a k x k grid of regions. A student's region, sent through a linear map to the
    teacher's width, has to find the teacher's of the same picture and place among all those of the batch: -log
    softmax(cos / temperature). And channel i of the student, seen as a vector over all regions, has to find channel i
    of the teacher among the channels. There is no memory bank.

    With labels and a teacher_head that reads this layer's width, regions are judged by the teacher's classifier: those
    it gets wrong count wrong_weight in the first contrast, except at scale 1; as something to differ from they stay.

    layer: which of the features, counted from shallow (0) or from deep (-1).
    scales: each k >= 1; larger than the smaller map's side count as that side. Time grows with the batch x k^2 squared.
    temperature: > 0.
    channel_weight: of the second contrast, >= 0.
    wrong_weight: in [0, 1].

    *Needs*: one feature of each: maps, tokens that make a square picture, or vectors, which have scale 1 only.
    *Relates to*: weight 0.1 to 1 beside `ce` and `kd`. Serves unlike architectures; use `crd` when batches are small,
        for its bank brings other examples.
    """

    def __init__(
        self,
        student_feats: list[Shape],
        teacher_feats: list[Shape],
        *,
        layer: int = -1,
        scales: tuple[int, ...] = (1, 2, 4),
        temperature: float = 0.1,
        channel_weight: float = 1.0,
        wrong_weight: float = 0.0,
    ) -> None:
        super().__init__()
        require(bool(scales) and min(scales) >= 1, "scales", scales, "numbers >= 1")
        require(temperature > 0, "temperature", temperature, "> 0")
        require(channel_weight >= 0, "channel_weight", channel_weight, ">= 0")
        require(0 <= wrong_weight <= 1, "wrong_weight", wrong_weight, "in [0, 1]")
        self.layer, self.scales, self.temperature = layer, scales, temperature
        self.channel_weight, self.wrong_weight = channel_weight, wrong_weight
        student = student_feats[pick("msdcrd.layer", student_feats, layer, "student")]
        teacher = teacher_feats[pick("msdcrd.layer", teacher_feats, layer, "teacher")]
        self.projector = projector("linear", width(student), width(teacher), bias=False)
        self.sides = sorted({min(k, _side(student), _side(teacher)) for k in scales})

    def forward(
        self,
        student_feats: list[Tensor],
        teacher_feats: list[Tensor],
        labels: Tensor | None = None,
        teacher_head: Tensor | None = None,
        teacher_head_bias: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """One value a batch; 0 when all of it is masked."""
        dtype = next(self.parameters()).dtype
        student = self.projector(as_map(student_feats[self.layer].to(dtype)))
        student, teacher = pair(student, as_map(teacher_feats[self.layer].detach()))
        counts = torch.ones_like(student[:, 0, 0, 0]) if mask is None else mask.to(student)
        readable = teacher_head is not None and teacher_head.shape[1] == teacher.shape[1]
        losses = []
        for k in self.sides:
            mine, theirs = regions(student, k).flatten(0, 1), regions(teacher, k).flatten(0, 1)
            real = counts.repeat_interleave(k * k)
            weights = real
            if k > 1 and readable and labels is not None:
                bias = None if teacher_head_bias is None else teacher_head_bias.to(theirs)
                said = F.linear(theirs, teacher_head.to(theirs), bias).argmax(1)  # type: ignore[union-attr]
                right = said == labels.repeat_interleave(k * k)
                weights = real * torch.where(right, 1.0, self.wrong_weight)
            losses += [self._find(mine, theirs, weights, real)]
            channels = [torch.where(real.unsqueeze(1) > 0, x, 0.0).mT for x in (mine, theirs)]
            every = real.any().to(real).expand(len(channels[0]))
            losses += [self.channel_weight * self._find(channels[0], channels[1], every, every)]
        return torch.stack(losses).sum() / len(self.sides)

    def _find(self, rows: Tensor, among: Tensor, weights: Tensor, real: Tensor) -> Tensor:
        """How hard it is for row i to find row i among the real ones, on weighted average."""
        alike = F.normalize(rows) @ F.normalize(among).mT / self.temperature
        hidden = torch.where((real > 0) | ~real.any(), 0.0, -torch.inf)
        hard = torch.logsumexp(alike + hidden, 1) - alike.diagonal()
        return (torch.where(weights > 0, hard, 0.0) * weights).sum() / weights.sum().clamp_min(1e-9)


def _side(shape: Shape) -> int:
    if len(shape) == 4:
        return min(shape[2:])
    return grid(shape[1])[0] if len(shape) == 3 else 1
