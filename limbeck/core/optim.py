"""Optimisers by name: {"sgd": {"lr": 0.05, "momentum": 0.9}} -> torch.optim.SGD over some parameters."""

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from limbeck.core.errors import BadInput, nearest

OPTIMIZERS: dict[str, type[torch.optim.Optimizer]] = {
    "sgd": torch.optim.SGD,
    "adam": torch.optim.Adam,
    "adamw": torch.optim.AdamW,
    "radam": torch.optim.RAdam,
    "rmsprop": torch.optim.RMSprop,
}


def check(spec: Mapping[str, Any] | str) -> tuple[str, dict[str, Any]]:
    """Split a spec into name and options. Raises BadInput naming the nearest optimiser or option."""
    name, options = (spec, {}) if isinstance(spec, str) else next(iter(spec.items()))
    if name not in OPTIMIZERS:
        raise BadInput(f"no optimizer {name!r}{nearest(name, OPTIMIZERS)}")
    options = dict(options or {})
    known = set(inspect.signature(OPTIMIZERS[name]).parameters) - {"params"}
    for key in options:
        if key not in known:
            raise BadInput(f"optimizer {name!r} has no option {key!r}{nearest(key, known)}")
    return name, options


def build(spec: Mapping[str, Any] | str, params: list[nn.Parameter]) -> torch.optim.Optimizer:
    """The optimiser over `params`; each group remembers its `initial_lr`, which schedules multiply."""
    name, options = check(spec)
    optimizer = OPTIMIZERS[name](params, **options)
    for group in optimizer.param_groups:
        group.setdefault("initial_lr", group["lr"])
    return optimizer
