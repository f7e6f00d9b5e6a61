"""Builds and calls losses as the loop does: tensors by argument name, modules from the shapes of what they ask for."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from limbeck.conformance.tensors import Inputs, N
from limbeck.core import find
from limbeck.core.match import Match
from limbeck.core.reduce import mean


def shape(name: str, value: Any, examples: int = N) -> Any:
    """What a module is built from: the shape of a tensor, or a list of them; for `index` the size of the whole set."""
    if name == "index":
        return (examples,)
    if isinstance(value, list):
        return [tuple(v.shape) for v in value]
    return tuple(value.shape) if isinstance(value, Tensor) else ()


def build(
    method: Any, inputs: Inputs, knobs: Mapping[str, Any] | None = None, *, seed: int = 0, examples: int = N
) -> nn.Module:
    """The module of a loss, with weights from `seed`, in single precision and in training mode."""
    torch.manual_seed(seed)
    shapes = {name: shape(name, value, examples) for name, value in inputs.items()}
    return Match(method.__name__, method, dict(knobs or {})).build(shapes)


def values(
    method: Any,
    inputs: Inputs,
    knobs: Mapping[str, Any] | None = None,
    *,
    module: nn.Module | None = None,
    seed: int = 0,
) -> Tensor:
    """What the loss gives, before any reduction; a module is built afresh, in the inputs' precision, unless given."""
    if module is None and hasattr(method, "forward"):
        module = build(method, inputs, knobs, seed=seed).to(precision(inputs))
    torch.manual_seed(seed + 1)
    positional = [inputs[n] for n in find.needs(method)]
    optional = {n: inputs[n] for n in find.wants(method) if n in inputs}
    out: Any = (
        module(*positional, **optional) if module is not None else method(*positional, **optional, **(knobs or {}))
    )
    return out  # type: ignore[no-any-return]


def loss(
    method: Any,
    inputs: Inputs,
    knobs: Mapping[str, Any] | None = None,
    *,
    module: nn.Module | None = None,
    seed: int = 0,
) -> Tensor:
    """The scalar that training would minimise: the mean over what is not masked."""
    return mean(values(method, inputs, knobs, module=module, seed=seed), inputs.get("mask")).value


def precision(inputs: Inputs) -> torch.dtype:
    """The precision that a module needs for these inputs: theirs, but never less than single."""
    for value in inputs.values():
        for v in value if isinstance(value, list) else [value]:
            if isinstance(v, Tensor) and v.is_floating_point():
                return torch.promote_types(v.dtype, torch.float32)
    return torch.float32
