"""A narrower student that starts with a part of every weight of the teacher."""

from collections.abc import Iterable
from typing import Literal

import torch
from torch import Tensor, nn

from limbeck.core.card import method, require
from limbeck.core.errors import BadInput
from limbeck.core.nets import Batch, outputs
from limbeck.core.surgery import copied, depthwise, keep_inputs, keep_outputs, magnitudes, shared_parameters, widths

NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.LayerNorm, nn.GroupNorm)
FUSED = ("qkv", "in_proj", "c_attn")


@method(
    paper="Wu et al. 2023 (TinyCLIP), section 3.2; choose='uniform' as Xu et al. 2023, section 3",
    year=2023,
    arxiv="2309.12314",
    code="wkcn/TinyCLIP@ad981bf:src/open_clip/weight_inherit.py",
    differs="manual inheritance of widths only: depth is `layer_choice`, and no masks are learned. The student is the "
    "teacher made narrower, so that names match by themselves",
)
def weight_inheritance(
    teacher: nn.Module,
    batches: Iterable[Batch] | None = None,
    *,
    width: float = 0.5,
    choose: Literal["leading", "uniform", "largest"] = "leading",
) -> nn.Module:
    """A copy of the teacher whose hidden widths n become round(width n); every weight keeps the matching slice.

    All layers of one width keep the same channels, so that what is added up or handed on still fits. What the first
    layer reads and what the last layer gives keep their size.

    width: in (0, 1]; 1 is a plain copy.
    choose: which channels of a width stay: "leading" takes the first, "uniform" evenly spaced ones, "largest" those
        with the largest sum of absolute weights over all layers of that width.

    *Needs*: convolutions, linear layers, embeddings and norms, in the order in which data meets them; flattened maps
        are followed, concatenated ones are not. `batches` let it try the result. A layer that remembers its width
        elsewhere, such as nn.MultiheadAttention, is refused.
    *Relates to*: use `channel_pruning` to leave alone what blocks add up (gentler), `layer_choice` for depth. The copy
        computes little of use until it is trained; it is a start better than random weights.
    *Differs*: see the card.
    """
    require(0 < width <= 1, "width", width, "in (0, 1]")
    require(choose in ("leading", "uniform", "largest"), "choose", choose, "'leading', 'uniform' or 'largest'")
    student = copied(teacher)
    tied = shared_parameters(student)
    mixing = [name for name, layer in student.named_modules() if widths(layer) != (0, 0)]
    if len(mixing) < 2:
        raise BadInput(f"{type(teacher).__name__} has {len(mixing)} layers with weights; a width lies between two")
    layers = dict(student.named_modules())
    hidden = sorted({widths(layers[name])[1] for name in mixing[:-1]})
    kept = {n: _choice([layers[name] for name in mixing], n, max(1, round(width * n)), choose) for n in hidden}
    before = 0  # what the layer before gave, of old
    for name, layer in layers.items():
        takes, gives = widths(layer)
        if name in mixing:
            if name != mixing[0] and not isinstance(layer, nn.Embedding):
                keep_inputs(layer, _inputs(name, takes, before, kept))
            if name != mixing[-1]:
                keep_outputs(layer, _outputs(name, gives, kept))
            before = gives
        elif isinstance(layer, NORMS) or depthwise(layer):
            wide = next((len(p) for p in layer.state_dict().values() if p.ndim), 0)
            if wide in kept:
                keep_outputs(layer, kept[wide])
        else:
            _cut_own(name, layer, kept)
    for first, *others in tied:
        for path in others:
            owner, _, leaf = path.rpartition(".")
            setattr(student.get_submodule(owner), leaf, student.get_parameter(first))
    _try(student, batches)
    return student


def _choice(layers: list[nn.Module], n: int, k: int, choose: str) -> Tensor:
    """Which k of the n channels of one width stay, in rising order."""
    if choose == "leading":
        return torch.arange(k)
    if choose == "uniform":
        return torch.arange(k) * (n // k) if n % k == 0 else torch.linspace(0, n - 1, k).round().long()
    score = torch.zeros(n)
    for layer in layers:
        takes, gives = widths(layer)
        by_channel = magnitudes(layer)
        if takes == n and layer is not layers[0]:
            score += by_channel.sum(0)
        if gives == n and layer is not layers[-1]:
            score += by_channel.sum(1)
    return score.argsort(descending=True, stable=True)[:k].sort().values


def _inputs(name: str, takes: int, before: int, kept: dict[int, Tensor]) -> Tensor:
    if takes in kept:
        return kept[takes]
    if before in kept and takes % before == 0:  # a flattened map: the positions of a channel lie side by side
        places = takes // before
        return (kept[before].unsqueeze(1) * places + torch.arange(places)).flatten()
    raise BadInput(f"layer {name!r} takes {takes} channels, and no layer gives as many: its width cannot be followed")


def _outputs(name: str, gives: int, kept: dict[int, Tensor]) -> Tensor:
    fused = any(part in name for part in FUSED) and gives % 3 == 0 and gives // 3 in kept
    third = gives // 3  # queries, keys and values, each cut alike
    return torch.cat([kept[third] + i * third for i in range(3)]) if fused else kept[gives]


def _cut_own(name: str, layer: nn.Module, kept: dict[int, Tensor]) -> None:
    """Parameters of a custom module: position embeddings, class tokens, scales; the last dimension is the width."""
    for key, own in list(layer.named_parameters(recurse=False)):
        if type(layer).__module__.startswith("torch.nn."):
            raise BadInput(f"layer {name!r} is {type(layer).__name__}, whose width cannot be cut")
        if own.ndim and own.shape[-1] in kept:
            setattr(layer, key, nn.Parameter(own.detach()[..., kept[own.shape[-1]]]))


@torch.no_grad()
def _try(student: nn.Module, batches: Iterable[Batch] | None) -> None:
    batch = next(iter(batches or ()), None)
    if batch is None:
        return
    training = student.training
    try:
        outputs(student.eval(), batch)
    except Exception as error:
        raise BadInput(
            f"{type(student).__name__} does not run when made narrower ({error}); it remembers a width somewhere"
        ) from error
    finally:
        student.train(training)
