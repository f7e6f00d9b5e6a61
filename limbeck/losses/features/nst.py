"""The student's channels, each a picture of where it fires, should be distributed like the teacher's channels."""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from limbeck.core.card import method, require
from limbeck.core.features import tokens
from limbeck.core.layerwise import matched, summed
from limbeck.core.maths import pairwise_distances


@method(
    paper="Huang and Wang 2017, section 4",
    year=2017,
    arxiv="1707.01219",
    code="HobbitLong/RepDistiller@b84f547:distiller_zoo/NST.py",
    differs="the code has the polynomial kernel alone",
    zero_at_match=True,
)
def nst(
    student_feats: list[Tensor],
    teacher_feats: list[Tensor],
    *,
    kernel: Literal["polynomial", "linear", "gaussian"] = "polynomial",
    layers: tuple[int, ...] = (),
) -> Tensor:
    """Sum over layers of mean k(f_t, f_t) + mean k(f_s, f_s) - 2 mean k(f_s, f_t).  [B, ...] lists -> [B]

    f is a channel's pattern over the places, of unit length; means are over all pairs of channels: the squared maximum
    mean discrepancy of two sets, whatever their numbers and order. Larger maps are average-pooled to the smaller.

    kernel: polynomial: k(x, y) = (x . y)^2; linear: x . y, near to `at`; gaussian: exp(-|x - y|^2 / (2 s^2)) with s^2
        the mean of |x - y|^2 over the pairs of the two sets, taken as a constant.
    layers: which of the paired features, counted from shallow (0) or from deep (-1); () takes all.

    *Needs*: maps, or tokens; the paper takes the last layer, the code every stage but the stem.
    *Relates to*: weight 50 beside `ce`; add `kd`. Cheaper: `at` sums channels away, `ickd` has which fire together.
    """
    require(kernel in ("polynomial", "linear", "gaussian"), "kernel", kernel, "polynomial, linear or gaussian")
    return summed([_discrepancy(s, t, kernel) for s, t in matched(student_feats, teacher_feats, layers)])


def _discrepancy(student: Tensor, teacher: Tensor, kernel: str) -> Tensor:
    student, teacher = (F.normalize(tokens(x).mT, dim=2) for x in (student, teacher))
    pairs = (student, student), (teacher, teacher), (student, teacher)
    with torch.autocast(student.device.type, enabled=False):
        if kernel == "gaussian":
            between = [pairwise_distances(*xy, squared=True) for xy in pairs]
            spread = between[2].detach().mean((1, 2), keepdim=True).clamp_min(torch.finfo(student.dtype).tiny)
            alike = [(square / (-2 * spread)).exp() for square in between]
        else:
            alike = [(x @ y.mT) ** (2 if kernel == "polynomial" else 1) for x, y in pairs]
        of_student, of_teacher, across = (k.mean((1, 2)) for k in alike)
        apart = of_student + of_teacher - 2 * across
    return apart + (-apart).clamp_min(0).detach()  # lifts a rounding error below 0, leaves the gradient alone
