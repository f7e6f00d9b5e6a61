"""The student looks where the teacher looks: maps of where activations are large, channels summed away."""

import torch
import torch.nn.functional as F
from torch import Tensor

from limbeck.core.card import method, require
from limbeck.core.errors import BadInput
from limbeck.core.maths import upcast


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
    """Sum over layers of the mean over positions of (Q_s / |Q_s| - Q_t / |Q_t|)^2.  [B, C, H, W] lists -> [B]

    Q = vec(sum_c |A_c|^p) is the attention map of a feature A, |.| its Euclidean length over the positions. Channels
    may differ in number, order and sign; a map that is larger is average-pooled to the smaller. No weights.

    power: p >= 1; larger values look at the strongest places only.

    *Needs*: feature maps, as many layers a side, usually one a stage.
    *Relates to*: use weight 1000 beside `ce`; add `kd`. Helps within a family of convolutional networks; across
        families use `rkd` or `kd`. For the attention of transformers match attention maps themselves.
    *Differs*: see the card.
    """
    require(power >= 1, "power", power, ">= 1")
    if len(student_feats) != len(teacher_feats):
        raise BadInput(f"at pairs layers one by one, got {len(student_feats)} and {len(teacher_feats)} of them")
    layers = [_layer(s, t.detach(), power) for s, t in zip(student_feats, teacher_feats, strict=True)]
    return torch.stack(layers).sum(0)


def _layer(student: Tensor, teacher: Tensor, power: float) -> Tensor:
    if student.ndim != 4 or teacher.ndim != 4:
        raise BadInput(f"at needs maps [B, C, H, W], got {tuple(student.shape)} and {tuple(teacher.shape)}")
    size = (min(student.shape[2], teacher.shape[2]), min(student.shape[3], teacher.shape[3]))
    return (_where(student, size, power) - _where(teacher, size, power)).square().mean(1)


def _where(features: Tensor, size: tuple[int, int], power: float) -> Tensor:
    """The attention map [B, H W] of unit length."""
    features = upcast(features)
    if features.shape[2:] != size:
        features = F.adaptive_avg_pool2d(features, size)
    # The largest value becomes 1 first: the result is the same, but |A|^p neither overflows nor fades out in fp32.
    flat = features.detach().flatten(1)
    largest = torch.maximum(flat.amax(1), -flat.amin(1)).clamp_min(torch.finfo(features.dtype).tiny)
    energy: Tensor = _Energy.apply(features, largest.view(-1, 1, 1, 1), power)  # type: ignore[no-untyped-call]
    return F.normalize(energy.flatten(1))


class _Energy(torch.autograd.Function):
    """sum_c |A_c / largest|^power, [B, C, H, W] -> [B, H, W], keeping nothing but A for the backward pass."""

    generate_vmap_rule = True

    @staticmethod
    def forward(features: Tensor, largest: Tensor, power: float) -> Tensor:
        scaled = features / largest
        return (scaled.square_() if power == 2 else scaled.abs_().pow(power)).sum(1)

    @staticmethod
    def setup_context(
        ctx: torch.autograd.function.FunctionCtx, inputs: tuple[Tensor, Tensor, float], output: Tensor
    ) -> None:
        features, largest, ctx.power = inputs  # type: ignore[attr-defined]
        ctx.save_for_backward(features, largest)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> tuple[Tensor, None, None]:
        features, largest = ctx.saved_tensors  # type: ignore[attr-defined]
        power: float = ctx.power  # type: ignore[attr-defined]
        scaled, weight = features / largest, (power * grad.unsqueeze(1)) / largest
        slope = scaled if power == 2 else scaled.sign() * scaled.abs().pow(power - 1)
        return slope * weight, None, None
