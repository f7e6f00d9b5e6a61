"""Many wide copies of the student's feature match the one of the teacher; all of it is folded away afterwards."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from limbeck.core.card import method, require
from limbeck.core.errors import BadInput
from limbeck.core.features import per_example, picture
from limbeck.core.graft import Grafted, anatomy, last_maps, put, watched
from limbeck.core.loop import Clock, Stage, Turn
from limbeck.core.maths import pair
from limbeck.core.nets import Batch, Nets
from limbeck.core.pair import Pair, parse_all
from limbeck.core.reduce import mean
from limbeck.core.teachers import at_hand


@method(
    paper="Liu et al. 2023, ICLR, eq. 2-4",
    year=2023,
    code="OSVAI/NORM@c6dfc39:helper/loops.py",
    differs="the transform is folded into the classifier at the end; the code keeps it. The code also normalises the "
    "logits of both networks before its other losses and changes the weight over the epochs: that is for the recipe",
)
@dataclass(frozen=True)
class NORM:
    """The losses of `match` plus weight sum over groups g of mean (U_g(F_s) - F_t)^2, of the last features.

    U = BN(1x1 convolution) widens the student's feature to `groups` times the teacher's channels; each group has to be
    the teacher's feature. D = BN(1x1 convolution) takes it back, and the student's classifier reads F_s + D(U(F_s)).
    There is no other layer between, so that after training D U and both norms are one matrix, which is multiplied into
    the classifier: what leaves is the plain student. The larger map is max-pooled to the smaller.

    match: losses beside; the paper's are cross-entropy and `kd`.
    weight: of the matching, >= 0.
    groups: how many copies, >= 1; 4 to 16 in the paper. 1 without `residual` is a linear projector that stays.
    residual: whether the classifier also reads F_s itself.

    *Needs*: both networks end in the mean over a map and a linear classifier, or just a linear classifier.
    *Relates to*: use it instead of `fitnets` or `srd` on the last feature when the teacher is much wider.
    """

    match: tuple[Any, ...] = ("ce", "kd")
    weight: float = 1.0
    groups: int = 8
    residual: bool = True

    def __post_init__(self) -> None:
        require(self.weight >= 0, "weight", self.weight, ">= 0")
        require(self.groups >= 1, "groups", self.groups, ">= 1")

    @cached_property
    def pair(self) -> Pair:
        """The student, its teacher, and the losses beside."""
        return Pair("student", "teacher", parse_all(self.match))

    def setup(self, nets: Nets, probe: Batch) -> None:
        """Put the transform between the student's last feature and its classifier."""
        at_hand(nets, "norm", "matches a feature of the teacher")
        teacher, student = watched(nets, "teacher", probe), anatomy(nets, "student", probe)
        if student.head.bias is None:
            raise BadInput("`norm` folds into the student's classifier, which has no bias to fold into")
        wide = self.groups * picture(teacher.feature).shape[1]
        neck = Transform(picture(student.feature).shape[1], wide, self.residual)
        nets.student = Grafted(nets.student, neck, student.head, cut=student.path, reads=student.reads)
        self.pair.own(nets, probe)

    def stages(self, nets: Nets, steps: int) -> Iterator[Stage]:
        """One; then the student is plain again."""
        yield Stage(steps)
        nets.student = folded(nets.student)

    def step(self, nets: Nets, batch: Batch, clock: Clock) -> Iterator[Turn]:
        """One turn of the student."""
        told = nets.run("teacher", batch)
        have = self.pair.gather(nets, batch | {f"teacher_{k}": v for k, v in told.items()})
        have["progress"] = clock.progress
        parts = {
            m.name: m.part(have, clock.progress, nets.losses[m.name] if m.is_module else None)
            for m in self.pair.matches
        }
        apart = matching(have["student_grafted"], last_maps(told), self.groups)
        parts["norm"] = self.weight * mean(apart, batch.get("mask"))
        yield "student", parts


def matching(wide: Tensor, aim: Tensor, groups: int) -> Tensor:
    """Sum over the groups of wide [B, groups C, H, W] of the mean squared difference to aim [B, C, H, W] -> [B]."""
    size = (min(wide.shape[2], aim.shape[2]), min(wide.shape[3], aim.shape[3]))
    wide, aim = pair(*(x if x.shape[2:] == size else F.adaptive_max_pool2d(x, size) for x in (wide, aim)))
    return groups * per_example((wide - aim.detach().repeat(1, groups, 1, 1)).square())


class Transform(nn.Module):
    """A neck without nonlinearity: x -> U(x), x + D(U(x)), or D(U(x)) alone."""

    def __init__(self, width: int, wide: int, residual: bool) -> None:
        super().__init__()
        self.residual = residual
        self.widen = nn.Sequential(nn.Conv2d(width, wide, 1, bias=False), nn.BatchNorm2d(wide))
        self.narrow = nn.Sequential(nn.Conv2d(wide, width, 1, bias=False), nn.BatchNorm2d(width))

    def forward(self, maps: Tensor) -> tuple[Tensor, Tensor]:
        """[B, width, H, W] -> [B, wide, H, W] and [B, width, H, W]"""
        wide = self.widen(maps)
        back: Tensor = self.narrow(wide)
        return wide, maps + back if self.residual else back


@torch.no_grad()
def folded(student: Grafted) -> nn.Module:
    """The body with a classifier that does, in eval mode, what transform and classifier do."""
    neck, head, body = student.neck.eval(), student.head, student.body
    zero = torch.zeros(1, head.in_features, 1, 1, dtype=head.weight.dtype, device=head.weight.device)
    basis = torch.eye(head.in_features, dtype=zero.dtype, device=zero.device)[:, :, None, None]
    shift = neck(zero)[1].flatten(1)
    matrix = neck(basis)[1].flatten(1) - shift  # row i: what becomes of the i-th channel
    made = nn.Linear(head.in_features, head.out_features, dtype=zero.dtype, device=zero.device)
    made.weight.copy_(head.weight @ matrix.mT)
    made.bias.copy_(F.linear(shift[0], head.weight, head.bias))
    put(body, student.cut, made)
    return body
