"""Cutting networks: clean copies, and layers that keep only some of their channels, as real smaller tensors."""

import copy
import math
from collections.abc import Iterable
from typing import TypeVar

import torch
from torch import Tensor, nn

from limbeck.core.taps import untap

M = TypeVar("M", bound=nn.Module)
Conv = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def copied(module: M) -> M:
    """A copy with storage of its own, trainable as a whole; taps stay with the original."""
    fresh = copy.deepcopy(module)
    untap(fresh)
    return fresh.requires_grad_(True)


def widths(layer: nn.Module) -> tuple[int, int]:
    """Channels that a layer with weights of its own takes and gives; (0, 0) when it mixes no channels."""
    if isinstance(layer, Conv):
        return (0, 0) if depthwise(layer) else (layer.in_channels, layer.out_channels)
    if isinstance(layer, nn.Linear):
        return layer.in_features, layer.out_features
    return (layer.num_embeddings, layer.embedding_dim) if isinstance(layer, nn.Embedding) else (0, 0)


def depthwise(layer: nn.Module) -> bool:
    """Whether this is a convolution of each channel by itself."""
    return isinstance(layer, Conv) and 1 < layer.groups == layer.in_channels == layer.out_channels


def magnitudes(layer: nn.Module) -> Tensor:
    """Sum of absolute weights between each channel given and each taken: [gives, takes], in fp32 on the CPU."""
    weight: Tensor = layer.weight.detach().abs().float().cpu()  # type: ignore[operator]
    return weight.T if isinstance(layer, nn.Embedding) else weight.flatten(2).sum(2) if weight.ndim > 2 else weight


def shared_parameters(module: nn.Module) -> list[list[str]]:
    """Groups of paths that lead to one and the same parameter."""
    names: dict[int, list[str]] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return [group for group in names.values() if len(group) > 1]


def strided(layers: Iterable[nn.Module]) -> bool:
    """Whether any of the layers is a convolution or pooling that shrinks a map."""
    return any(s != 1 for layer in layers for s in _tuple(getattr(layer, "stride", 1)))


def _tuple(value: object) -> tuple[object, ...]:
    return value if isinstance(value, tuple) else (value,)


def keep_outputs(layer: nn.Module, index: Tensor) -> None:
    """Leave a layer only the channels `index` of what it gives, in that order; norms and depthwise included."""
    n = len(index)
    if isinstance(layer, Conv):
        layer.groups = n if depthwise(layer) else layer.groups
        layer.in_channels = n if layer.groups > 1 else layer.in_channels
        layer.out_channels = n
        _take(layer, ("weight", "bias"), 0, index)
    elif isinstance(layer, nn.Linear):
        layer.out_features = n
        _take(layer, ("weight", "bias"), 0, index)
    elif isinstance(layer, nn.Embedding):
        layer.embedding_dim = n
        _take(layer, ("weight",), 1, index)
    elif isinstance(layer, (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)):
        layer.num_features = n
        _take(layer, ("weight", "bias", "running_mean", "running_var"), 0, index)
    elif isinstance(layer, nn.LayerNorm):
        layer.normalized_shape = (*layer.normalized_shape[:-1], n)
        _take(layer, ("weight", "bias"), -1, index)
    elif isinstance(layer, nn.GroupNorm):
        layer.num_groups = n if layer.num_groups == layer.num_channels else math.gcd(n, layer.num_groups)
        layer.num_channels = n
        _take(layer, ("weight", "bias"), 0, index)
    else:
        raise TypeError(f"{type(layer).__name__} has no channels that could be kept")


def keep_inputs(layer: nn.Module, index: Tensor) -> None:
    """Leave a convolution or linear layer only the channels `index` of what it takes."""
    if isinstance(layer, Conv):
        layer.in_channels = len(index)
    elif isinstance(layer, nn.Linear):
        layer.in_features = len(index)
    else:
        raise TypeError(f"{type(layer).__name__} takes no channels that could be kept")
    _take(layer, ("weight",), 1, index)


def _take(layer: nn.Module, names: tuple[str, ...], dim: int, index: Tensor) -> None:
    for name in names:
        old: Tensor | None = getattr(layer, name)
        if old is not None:
            new = old.detach().index_select(dim, index.to(old.device))
            setattr(layer, name, nn.Parameter(new) if isinstance(old, nn.Parameter) else new)


def share(scores: Tensor, ratio: float) -> Tensor:
    """Indices, in rising order, of the (1 - ratio) n largest of n scores, rounded down, at least one."""
    kept = max(1, int(len(scores) * (1 - ratio) + 1e-9))
    return torch.sort(scores.argsort(descending=True, stable=True)[:kept]).values
