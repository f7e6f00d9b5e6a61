"""Logits are made local: teacher and student are compared region by region, above all where part and whole disagree."""

from typing import Any

import torch
from torch import Tensor, nn

from limbeck.core import schedule
from limbeck.core.card import method, require
from limbeck.core.errors import BadInput
from limbeck.core.features import Shape, pick
from limbeck.core.match import parse
from limbeck.core.places import local_logits, reads_mean

GIVEN = ("student_logits", "teacher_logits", "labels")


@method(
    paper="Wei et al. 2024, Scale Decoupled Distillation",
    year=2024,
    arxiv="2403.13512",
    code="shicaiwei123/SDD-CVPR2024@e412036:mdistiller/distillers/KD.py",
    differs="mean over the regions as in the code, the paper's sum is R times that. The code pools 2 x 2 and 1 x 1 "
    "from the 4 x 4, which is the same where a map's size is a multiple of 4",
    row="sdd_scale_decoupled",
)
class SDD(nn.Module):
    """1/R sum_r w_r D(student region r, teacher region r).  lists of [B, D, H, W], [C, D], [B] -> [B]

    A region's logits are what a network's own linear head says of the mean over that region of its last feature. w_r is
    1 where the teacher is right, or wrong, about the region as about the whole, and `complementary` where only one of
    the two is right: a part that shows another class, or is clear where the whole is not.

    local: D, any loss an element on student_logits, teacher_logits and labels: kd, {dkd: {beta: 2}}, nkd ...
    scales: s cuts the picture into s x s regions; (1,) gives D alone. R = sum s^2.
    complementary: w where part and whole disagree, >= 0.
    layer: which of the feats the head reads, counted from shallow (0) or from deep (-1).

    *Needs*: of both, the map (or square tokens) whose mean over places the head reads, and head (bias if it has one):
        taps: {feats: [layer3], head: head.weight, head_bias: head.bias}; true labels.
    *Relates to*: ce + this at the weight that D has alone; with `dkd` and `nkd` raise it over the first 20 of 240
        epochs. Helps most where classes differ in parts. `srrl` asks the teacher's head about the student.
    """

    def __init__(
        self,
        student_feats: list[Shape],
        teacher_feats: list[Shape],
        student_head: Shape,
        teacher_head: Shape,
        *,
        local: Any = "kd",
        scales: tuple[int, ...] = (1, 2, 4),
        complementary: float = 2.0,
        layer: int = -1,
    ) -> None:
        super().__init__()
        require(len(scales) > 0 and min(scales) >= 1, "scales", scales, "one or more whole numbers >= 1")
        require(complementary >= 0, "complementary", complementary, ">= 0")
        self.local, self.scales, self.complementary, self.layer = local, tuple(scales), complementary, layer
        self.match = parse(local)
        if self.match.is_module or not set(self.match.needs) <= set(GIVEN):
            raise BadInput(f"`local` must be a loss function of {', '.join(GIVEN)}, got {self.match.name}")
        for side, feats, head in (("student", student_feats, student_head), ("teacher", teacher_feats, teacher_head)):
            reads_mean("sdd", feats[pick("sdd.layer", feats, layer, side)], head, side)

    def forward(
        self,
        student_feats: list[Tensor],
        teacher_feats: list[Tensor],
        student_head: Tensor,
        teacher_head: Tensor,
        labels: Tensor,
        student_head_bias: Tensor | None = None,
        teacher_head_bias: Tensor | None = None,
        progress: float | None = None,
    ) -> Tensor:
        """Per example."""
        layer, now = self.layer, progress or 0.0
        student = local_logits(student_feats[layer], student_head, student_head_bias, self.scales)
        with torch.no_grad():
            teacher = local_logits(teacher_feats[layer], teacher_head, teacher_head_bias, self.scales)
            whole = local_logits(teacher_feats[layer], teacher_head, teacher_head_bias, (1,))
            y = labels.unsqueeze(1).expand(teacher.shape[:2])
            agree = (teacher.argmax(-1) == y) == (whole.argmax(-1) == labels.unsqueeze(1))
            w = torch.where(agree, 1.0, self.complementary)
        have = dict(zip(GIVEN, (student, teacher, y), strict=True))
        knobs = {name: schedule.value(value, now) for name, value in self.match.knobs.items()}
        each: Tensor = self.match.loss(*[have[name] for name in self.match.needs], **knobs)
        if each.shape != y.shape:
            raise BadInput(f"`local` must give a value an element, but {self.match.name} gives {list(each.shape)}")
        weighted: Tensor = schedule.value(self.match.weight, now) * (w * each).mean(1)
        return weighted
