"""Linear layers whose frozen weights are kept in 8 or 4 bits: the base that adapters are trained on (QLoRA)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from limbeck.core.errors import BadInput, nearest

__all__ = ["KINDS", "Quantized", "quantized", "widened"]

KINDS = ("int8", "nf4")
GROUP = 64  # weights that share a scale in nf4


def levels() -> Tensor:
    """The 16 numbers of NormalFloat (Dettmers et al. 2023, appendix E): quantiles of a normal distribution, of as many
    on either side of a 0 of its own as fit, in [-1, 1]."""
    edge = 1 - (1 / 32 + 1 / 30) / 2  # of both sides' outermost quantiles the mean
    above, below = (torch.special.ndtri(torch.linspace(edge, 0.5, n, dtype=torch.float64))[:-1] for n in (9, 8))
    both: Tensor = torch.cat([-below, torch.zeros(1, dtype=torch.float64), above.flip(0)]) / above[0]
    return both.float()


class Quantized(nn.Linear):
    """x @ W.T + b, where W is made anew for each product, forward and backward, and kept in `kind` alone.

    int8: round(W / s), s = max |W| / 127 of each output. nf4: the nearest of 16 `levels` times the largest of each 64
    weights. No gradient reaches W or b.
    """

    codes: Tensor
    scales: Tensor
    levels: Tensor

    def __init__(self, layer: nn.Linear, kind: str) -> None:
        nn.Module.__init__(self)  # no weight of full width
        self.in_features, self.out_features, self.kind = layer.in_features, layer.out_features, kind
        weight = layer.weight.detach()
        self.dtype = weight.dtype
        wide = weight.float()
        if kind == "int8":
            scales = wide.abs().amax(1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny) / 127
            codes, table = (wide / scales).round().to(torch.int8), torch.empty(0)
        else:
            table = levels()
            flat = F.pad(wide.flatten(), (0, -wide.numel() % GROUP)).view(-1, GROUP)
            scales = flat.abs().amax(1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
            between = (table[1:] + table[:-1]) / 2
            nearest_level = torch.bucketize(flat / scales, between.to(flat.device)).to(torch.uint8).flatten()
            codes = nearest_level[::2] * 16 + nearest_level[1::2]
        self.register_buffer("codes", codes)
        self.register_buffer("scales", scales)
        self.register_buffer("levels", table.to(weight.device))
        self.bias = None if layer.bias is None else nn.Parameter(layer.bias.detach().clone(), requires_grad=False)

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """W, made from what is kept: [out, in]."""
        if self.kind == "int8":
            return (self.codes.to(self.scales.dtype) * self.scales).to(self.dtype)
        pair = torch.stack([self.codes >> 4, self.codes & 15], -1).flatten().int()
        wide = (self.levels[pair].view(-1, GROUP) * self.scales).flatten()
        return wide[: self.out_features * self.in_features].view(self.out_features, -1).to(self.dtype)

    def forward(self, input: Tensor) -> Tensor:
        """[..., in] -> [..., out]."""
        product: Tensor = _Product.apply(input, self)  # type: ignore[no-untyped-call]
        return product

    def plain(self) -> nn.Linear:
        """The ordinary layer that does the same."""
        weight = self.weight
        made = nn.Linear(self.in_features, self.out_features, self.bias is not None, weight.device, weight.dtype)
        made.weight.data.copy_(weight)
        if self.bias is not None:
            made.bias.data.copy_(self.bias)
        return made


class _Product(torch.autograd.Function):
    """x @ W.T, which keeps no W of full width until the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: Quantized) -> Tensor:
        ctx.layer = layer
        bias = None if layer.bias is None else layer.bias.to(x.dtype)
        return F.linear(x, layer.weight.to(x.dtype), bias)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad @ ctx.layer.weight.to(grad.dtype), None


def quantized(module: nn.Module, kind: str) -> nn.Module:
    """The same network with its linear layers but the head in `kind`, frozen; the network itself is changed.

    kind: "int8", a quarter of fp32's bytes and hardly a change, or "nf4", a seventh.
    """
    if kind not in KINDS:
        raise BadInput(f"`quantize` has no {kind!r}{nearest(str(kind), KINDS) or '; it has ' + ', '.join(KINDS)}")
    model: Any = module
    head = model.get_output_embeddings() if hasattr(module, "get_output_embeddings") else None
    changed = _replaced(
        module, lambda layer: Quantized(layer, kind) if _is_plain(layer) and layer is not head else None
    )
    if not changed:
        raise BadInput(f"`quantize` finds no linear layer in {type(module).__name__} but the head")
    return module


def widened(module: nn.Module) -> nn.Module:
    """The same network with ordinary layers in the place of quantised ones; the network itself is changed."""
    _replaced(module, lambda layer: layer.plain() if isinstance(layer, Quantized) else None)
    return module


def _is_plain(layer: nn.Module) -> TypeGuard[nn.Linear]:
    return type(layer) is nn.Linear


def _replaced(module: nn.Module, new: Callable[[nn.Module], nn.Module | None]) -> int:
    """Put what `new` makes of a layer, unless None, in its place: how many."""
    places = [(parent, name, child) for parent in module.modules() for name, child in parent.named_children()]
    made = [(parent, name, found) for parent, name, child in places if (found := new(child)) is not None]
    for parent, name, found in made:
        setattr(parent, name, found)
    return len(made)
