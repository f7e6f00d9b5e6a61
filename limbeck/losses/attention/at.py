"""The student looks where the teacher looks: maps of where activations are large, channels summed away."""

import torch
import torch.nn.functional as F
from torch import Tensor

from limbeck.core.card import method, require
from limbeck.core.errors import BadInput
from limbeck.core.features import same_places, tokens
from limbeck.core.layerwise import paired
from limbeck.core.maths import channel_energy, upcast


@method(
    paper="Zagoruyko and Komodakis 2016, eq. 2",
    year=2016,
    arxiv="1612.03928",
    code="szagoruyko/attention-transfer@893df54:utils.py",
    differs="eq. 2 prints the norm of the difference; the authors' code and every published figure use its square over "
    "the number of positions (the text puts that number into beta): eq. 2 is sqrt(H W x this) a layer and example. "
    "|A|^p as in the paper; the code takes A^p, the same for even p",
    zero_at_match=True,
)
def at(student_feats: list[Tensor], teacher_feats: list[Tensor], *, power: float = 2.0) -> Tensor:
    """Sum over layers of the mean over positions of (Q_s / |Q_s| - Q_t / |Q_t|)^2.  [B, ...] lists -> [B]

    Q = vec(sum_c |A_c|^p) is the attention map of a feature A, |.| its Euclidean length over the positions. Channels
    may differ in number, order and sign; a map that is larger is average-pooled to the smaller. No weights.

    power: p >= 1; larger values look at the strongest places only.

    *Needs*: feature maps or tokens, usually one layer a stage. Tokens of unlike numbers are read as square pictures.
    *Relates to*: use weight 1000 beside `ce`; add `kd`. Helps within a family of convolutional networks; across
        families use `rkd` or `kd`. For the attention of transformers match attention maps themselves.
    """
    require(power >= 1, "power", power, ">= 1")
    layers = [_layer(s, t.detach(), power) for s, t in paired(student_feats, teacher_feats)]
    return torch.stack(layers).sum(0)


def _layer(student: Tensor, teacher: Tensor, power: float) -> Tensor:
    if 2 in (student.ndim, teacher.ndim):
        raise BadInput(f"at compares places, and a vector has none: {tuple(student.shape)} and {tuple(teacher.shape)}")
    student, teacher = same_places(upcast(student), upcast(teacher))
    return (_where(student, power) - _where(teacher, power)).square().mean(1)


def _where(feature: Tensor, power: float) -> Tensor:
    """The attention map [B, places] of unit length."""
    seen = channel_energy(tokens(feature).mT, power)
    largest = seen.detach().amax(1, keepdim=True)  # becomes 1: the length of the smallest maps is found, too
    return F.normalize(seen / largest.clamp_min(torch.finfo(seen.dtype).tiny))
