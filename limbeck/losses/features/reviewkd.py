"""Each stage of the teacher reviews the student's stages down to its own level, fused from deep to shallow."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from limbeck.core.card import method, require
from limbeck.core.features import Shape, as_map
from limbeck.core.features import width as channels
from limbeck.core.layerwise import paired
from limbeck.core.maths import mean_square, pair

SIZES = (4, 2, 1)  # of the pooled maps that are compared besides the whole one, with weights 1/2, 1/4, 1/8


@method(
    paper="Chen et al. 2021, section 3",
    year=2021,
    arxiv="2104.09044",
    code="dvlab-research/ReviewKD@cede6ea:CIFAR-100/model/reviewkd.py",
    differs="map sizes are taken from the networks instead of a table, and need not be square",
    exceptions={"mask": "batch norm takes its statistics over the whole batch, masked examples too"},
)
class ReviewKD(nn.Module):
    """Sum over levels of the hierarchical distance of a fused student map and the teacher's.  [B, ...] lists -> [B]

    From the deepest level up: x = 1x1 convolution of the student's map; y = what the level below passed on, enlarged;
    a, b = sigmoid of a 1x1 convolution of [x, y], one map each; x <- a x + b y in the teacher's size is passed on, and
    a 3x3 convolution of it is compared: the mean squared error of the maps and of their averages over 4 x 4, 2 x 2 and
    1 x 1 cells (those smaller than the map), weighted 1, 1/2, 1/4, 1/8, over the sum of the weights.

    width: of the fused maps at most, >= 1; as wide as the student's deepest level where that is narrower.
    pooled: the mean of the deepest feature over its places is one more level, the deepest; false when the pooling is
        among the taps already, as it should be where the others are read before the ReLU.

    *Needs*: one map (tokens: a square number) a stage of each. The paper takes the teacher's before the ReLU: taps
        "blocks.2.relu2:in".
    *Relates to*: use weight 0.6 to 8 beside `ce`, with a warm-up: {warmup: [5, 0.1]}. `fitnets` compares one level with
        one; the fusing blocks cost memory and are dropped after training.
    """

    def __init__(
        self, student_feats: list[Shape], teacher_feats: list[Shape], *, width: int = 512, pooled: bool = True
    ) -> None:
        super().__init__()
        require(width >= 1, "width", width, ">= 1")
        self.width, self.pooled = width, pooled
        widths = [(channels(s), channels(t)) for s, t in paired(student_feats, teacher_feats)]
        widths += widths[-1:] if pooled else []
        middle = min(width, widths[-1][0])
        self.blocks = nn.ModuleList(Fusion(s, middle, t, fuse=i + 1 < len(widths)) for i, (s, t) in enumerate(widths))

    def forward(self, student_feats: list[Tensor], teacher_feats: list[Tensor]) -> Tensor:
        """Per example."""
        pairs = paired(student_feats, teacher_feats)
        students, teachers = [as_map(s) for s, _ in pairs], [as_map(t) for _, t in pairs]
        if self.pooled:
            for feats in (students, teachers):
                feats.append(feats[-1].mean((2, 3), keepdim=True))
        dtype = next(self.parameters()).dtype
        below: Tensor | None = None
        losses = []
        for block, student, teacher in zip(reversed(self.blocks), reversed(students), reversed(teachers), strict=True):
            out, below = block(student.to(dtype), below, teacher.shape[2:])
            losses.append(hierarchical(*pair(out, teacher.detach())))
        return torch.stack(losses).sum(0)


class Fusion(nn.Module):
    """Fuses a level with what comes from below: the map to compare, and the one to pass on."""

    def __init__(self, student: int, middle: int, teacher: int, *, fuse: bool) -> None:
        super().__init__()
        enter = nn.Conv2d(student, middle, 1, bias=False)
        leave = nn.Conv2d(middle, teacher, 3, padding=1, bias=False)
        for layer in (enter, leave):
            nn.init.kaiming_uniform_(layer.weight, a=1)
        self.enter = nn.Sequential(enter, nn.BatchNorm2d(middle))
        self.leave = nn.Sequential(leave, nn.BatchNorm2d(teacher))
        self.gates = nn.Conv2d(2 * middle, 2, 1) if fuse else None

    def forward(self, student: Tensor, below: Tensor | None, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
        x = self.enter(student)
        if self.gates is not None and below is not None:
            # A 1x1 convolution of [x, y] is one of x and one of y, which costs less before y is enlarged.
            of_x, of_below = self.gates.weight.chunk(2, 1)
            says = F.interpolate(F.conv2d(below, of_below), x.shape[2:])
            a, b = (F.conv2d(x, of_x, self.gates.bias) + says).sigmoid().chunk(2, 1)
            x = torch.addcmul(a * x, b, F.interpolate(below, x.shape[2:]))
        x = x if x.shape[2:] == size else F.interpolate(x, size)
        return self.leave(x), x


def hierarchical(student: Tensor, teacher: Tensor) -> Tensor:
    """Weighted mean over scales of the mean squared error of two maps of equal shape: [B, C, H, W] x 2 -> [B]."""
    difference = student - teacher
    loss, weight, total = mean_square(difference), 1.0, 1.0
    for size in SIZES:
        if size < student.shape[2]:
            weight, pooled = weight / 2, F.adaptive_avg_pool2d(difference, size)
            loss, total = loss + weight * mean_square(pooled), total + weight
    return loss / total
