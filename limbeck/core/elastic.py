"""Narrower networks inside a wide one: the same weights, of whose inner units only the first in rank take part."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from limbeck.core.errors import BadInput
from limbeck.core.surgery import copied, keep_inputs, keep_outputs, magnitudes
from limbeck.core.taps import find_layer, unwrap

# Inner layers of transformers, as the zoo, torch, timm and transformers name them: who gives units, who reads them.
INNER = (("up", "down"), ("linear1", "linear2"), ("fc1", "fc2"), ("intermediate.dense", "output.dense"))
Masks = dict[str, Tensor]  # path of who reads the units -> True [units] where they take part


def inner(module: nn.Module) -> dict[str, str]:
    """Path of every linear layer that alone reads a block's inner units -> path of the one that gives them."""
    layers: dict[str, nn.Module] = dict(unwrap(module).named_modules())
    found = {}
    for path, layer in layers.items():
        for gives, reads in INNER:
            stem = path.removesuffix(reads)
            source = layers.get(stem + gives)
            linear = stem != path and isinstance(layer, nn.Linear) and isinstance(source, nn.Linear)
            if linear and source.out_features == layer.in_features:  # type: ignore[union-attr]
                found[path] = stem + gives
    if not found:
        raise BadInput(
            f"{type(unwrap(module)).__name__} has no inner units that could be left out: it needs blocks of a "
            f"transformer with linear layers {' or '.join(f'{a} and {b}' for a, b in INNER)}"
        )
    return found


def ranked(module: nn.Module, scale: float) -> Masks:
    """A share of each block's inner units, at least one, those of the largest weights: smaller shares lie in larger."""
    masks = {}
    for path in inner(module):
        weight = magnitudes(find_layer(module, path)).sum(0)
        rank = weight.argsort(descending=True, stable=True).argsort()
        masks[path] = rank < max(1, round(scale * len(weight)))
    return masks


@contextmanager
def narrowed(module: nn.Module, masks: Mapping[str, Tensor]) -> Iterator[None]:
    """Inside, units that take no part are 0."""

    def hook(mask: Tensor) -> Any:
        return lambda _layer, inputs: (inputs[0] * mask.to(inputs[0]), *inputs[1:])

    handles = [find_layer(module, path).register_forward_pre_hook(hook(mask)) for path, mask in masks.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def cut(module: nn.Module, masks: Mapping[str, Tensor]) -> nn.Module:
    """The narrow network by itself, without the weights of other units."""
    alone, sources = copied(unwrap(module)), inner(module)
    for path, mask in masks.items():
        kept = mask.nonzero()[:, 0].cpu()
        keep_inputs(find_layer(alone, path), kept)
        keep_outputs(find_layer(alone, sources[path]), kept)
    return alone


class Candidates(nn.Module):
    """Narrow networks inside one, how large each is, how often each was right, and which is chosen.

    sizes [C + 1]: parameters of each, the whole last. right [C + 1], seen: counts on examples held out. chosen: index.
    """

    sizes: Tensor
    right: Tensor
    seen: Tensor
    chosen: Tensor

    def __init__(self, module: nn.Module, scales: Sequence[float]) -> None:
        super().__init__()
        self.paths = list(inner(module))
        each = [ranked(module, scale) for scale in scales]
        for c, masks in enumerate(each):
            for i, path in enumerate(self.paths):
                self.register_buffer(f"mask{c}_{i}", masks[path])
        whole = [cut(module, masks) for masks in each] + [module]
        sizes = torch.tensor([sum(p.numel() for p in net.parameters()) for net in whole])
        self.register_buffer("sizes", sizes)
        self.register_buffer("right", torch.zeros(len(sizes), dtype=torch.long))
        self.register_buffer("seen", torch.zeros((), dtype=torch.long))
        self.register_buffer("chosen", torch.zeros((), dtype=torch.long))

    def __len__(self) -> int:
        return len(self.sizes) - 1

    def masks(self, candidate: int) -> Masks:
        """Which units take part in a candidate."""
        return {path: self.get_buffer(f"mask{candidate}_{i}") for i, path in enumerate(self.paths)}


def slopes(scores: Tensor, sizes: Tensor) -> Tensor:
    """What each candidate loses in score for a unit of size it saves, negated: [C + 1] x 2, the whole last -> [C].

    -(P_T - P_A) / (S_T - S_A), the negative performance-scale derivative of Han et al. 2024, with sizes as shares of
    the whole.
    """
    share = sizes.double() / sizes[-1]
    return -(scores[-1] - scores[:-1]).double() / (share[-1] - share[:-1]).clamp_min(1e-9)
