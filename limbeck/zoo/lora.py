"""Low-rank adapters on a transformers model, through peft: trained alone, merged into the weights when it leaves."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from torch import nn

from limbeck.core.errors import BadInput, MissingExtra, nearest
from limbeck.zoo.quantized import Quantized, widened

__all__ = ["adapted", "merged"]

OPTIONS = ("r", "alpha", "dropout", "targets")


def adapted(module: nn.Module, options: Mapping[str, Any]) -> nn.Module:
    """The model with fresh adapters; all else is frozen.

    options: r, the rank (8); alpha, whose ratio to r scales the adapter (2 r); dropout before it, in [0, 1) (0);
    targets, names of the layers that get one (all linear ones but the head).
    """
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError:
        raise MissingExtra("peft", "text") from None
    for key in options:
        if key not in OPTIONS:
            raise BadInput(f"`lora` has no {key!r}{nearest(key, OPTIONS) or '; it has ' + ', '.join(OPTIONS)}")
    r = int(options.get("r", 8))
    config = LoraConfig(
        r=r,
        lora_alpha=options.get("alpha", 2 * r),
        lora_dropout=options.get("dropout", 0.0),
        target_modules=options.get("targets", "all-linear"),
    )
    try:
        made: nn.Module = get_peft_model(module, config)
    except (ValueError, TypeError) as error:
        raise BadInput(f"`lora` does not fit {type(module).__name__}: {str(error).splitlines()[0]}") from None
    return made


def merged(module: nn.Module) -> nn.Module:
    """The plain model that does what one does that is adapted, quantised or both; a copy. Any other network is given
    back as it is."""
    adapters = hasattr(module, "merge_and_unload")
    if not adapters and not any(isinstance(layer, Quantized) for layer in module.modules()):
        return module
    model: Any = widened(copy.deepcopy(module))
    plain: nn.Module = model.merge_and_unload() if adapters else model
    return plain
