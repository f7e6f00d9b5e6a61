"""The student computes as if weights and activations had few bits, and learns with that in view."""

import copy
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from limbeck.core.card import method, require
from limbeck.core.errors import BadInput
from limbeck.core.maths import upcast
from limbeck.core.nets import Batch, outputs
from limbeck.core.surgery import copied


@method(
    paper="Polino et al. 2018, section 3 (quantized distillation); scales as in Jacob et al. 2018, section 3",
    year=2018,
    arxiv="1802.05668",
    code="antspy/quantized_distillation@bb500b7:quantization/quant_functions.py",
    differs="one symmetric scale a channel of every weight, not a range for 256 weights each; activations are rounded "
    "too (Jacob et al.); nearest rounding only. Of the row this is method A: quantisation points are not learned",
    row="quantized_distillation",
    exceptions={"smaller": "the weights keep their number and get fewer bits; `plain` gives the rounded network"},
)
def fake_quant(
    teacher: nn.Module,
    batches: Iterable[Batch] | None = None,
    *,
    bits: int = 8,
    activation_bits: int = 8,
    skip: tuple[str, ...] = (),
) -> nn.Module:
    """A copy of the teacher that rounds in its forward pass; train it by any distillation (quantisation-aware).

    A weight w becomes s round(w / s) with s = max |w| / (2^(bits - 1) - 1) over each output channel: 2^bits - 1 levels
    around 0. The input x of each layer becomes s (round(x / s + z) - z) within the range met in training (an average
    that forgets 1 % a step), with 0 exactly on a level. Backwards rounding counts as the identity (straight through),
    and what lies outside the range gets no gradient. Float weights keep their names; ranges are buffers, 0 until the
    first `batches` or training step: so long activations pass unrounded.

    bits: of weights, 2..32; 32 leaves them as they are.
    activation_bits: of what enters each layer, 2..32; 32 leaves it as it is.
    skip: paths of layers to leave alone, such as the first and the last.

    *Needs*: nn.Linear and nn.Conv2d layers; others stay in float. *Relates to*: use it after `layer_choice` or
        `channel_pruning`, last. `plain(student)` is the network to export: ordinary layers, rounded weights.
    *Differs*: see the card.
    """
    require(2 <= bits <= 32, "bits", bits, "in 2..32")
    require(2 <= activation_bits <= 32, "activation_bits", activation_bits, "in 2..32")
    student = copied(teacher)
    layers = {name: layer for name, layer in student.named_modules() if type(layer) in (nn.Linear, nn.Conv2d)}
    unknown = sorted(set(skip) - set(layers))
    require(not unknown, "skip", unknown, f"paths of linear or convolution layers: {', '.join(layers)}")
    if not set(layers) - set(skip):
        raise BadInput(f"{type(teacher).__name__} has no linear or convolution layer to quantise")
    for name, layer in layers.items():
        if name not in skip:
            _swap(layer, bits, activation_bits)
    training = student.training
    for batch in batches or ():
        for layer in student.eval().modules():
            layer.training = isinstance(layer, (QuantLinear, QuantConv2d))  # only ranges move, no other statistics
        outputs(student, batch)
    return student.train(training)


def plain(student: nn.Module) -> nn.Module:
    """A copy with ordinary layers that hold the rounded weights; activations are no longer rounded."""
    student = copy.deepcopy(student)
    for layer in student.modules():
        if isinstance(layer, (QuantLinear, QuantConv2d)):
            layer.weight = nn.Parameter(_rounded_weight(layer.weight.detach(), layer.bits))
            del layer.low, layer.high
            layer.__class__ = nn.Linear if isinstance(layer, QuantLinear) else nn.Conv2d  # type: ignore[assignment]
    return student


class QuantLinear(nn.Linear):
    """A linear layer that rounds its weight and its input."""

    low: Tensor
    high: Tensor
    bits: int
    activation_bits: int

    def forward(self, input: Tensor) -> Tensor:
        """As nn.Linear, on the levels."""
        return nn.functional.linear(_rounded_input(self, input), _rounded_weight(self.weight, self.bits), self.bias)


class QuantConv2d(nn.Conv2d):
    """A convolution that rounds its weight and its input."""

    low: Tensor
    high: Tensor
    bits: int
    activation_bits: int

    def forward(self, input: Tensor) -> Tensor:
        """As nn.Conv2d, on the levels."""
        weight = _rounded_weight(self.weight, self.bits)
        out: Tensor = self._conv_forward(_rounded_input(self, input), weight, self.bias)
        return out


def _swap(layer: Any, bits: int, activation_bits: int) -> None:
    layer.__class__ = QuantLinear if isinstance(layer, nn.Linear) else QuantConv2d
    layer.bits, layer.activation_bits = bits, activation_bits
    for name in ("low", "high"):  # of the range of the input; both 0: nothing met yet
        layer.register_buffer(name, torch.zeros((), device=layer.weight.device))


def _rounded_weight(weight: Tensor, bits: int) -> Tensor:
    if bits == 32:
        return weight
    top = 2 ** (bits - 1) - 1
    largest = weight.detach().abs().flatten(1).amax(1).view(-1, *[1] * (weight.ndim - 1))
    scale = (largest / top).clamp_min(torch.finfo(weight.dtype).tiny)
    return _straight_through(weight, (weight / scale).round() * scale)


def _rounded_input(layer: QuantLinear | QuantConv2d, x: Tensor) -> Tensor:
    if layer.activation_bits == 32:
        return x
    x = upcast(x)
    if layer.training and torch.is_grad_enabled():
        with torch.no_grad():
            known = layer.low < layer.high
            for bound, met in ((layer.low, x.min().clamp_max(0)), (layer.high, x.max().clamp_min(0))):
                bound.copy_(torch.where(known, 0.99 * bound + 0.01 * met, met.to(bound)))
    top = 2**layer.activation_bits - 1
    known = layer.low < layer.high
    scale = torch.where(known, (layer.high - layer.low) / top, 1.0).to(x.dtype)
    zero = (-layer.low / scale).round()
    inside = torch.where(known, x.clamp(-zero * scale, (top - zero) * scale), x)
    return _straight_through(inside, torch.where(known, (inside / scale).round() * scale, x))


def _straight_through(x: Tensor, rounded: Tensor) -> Tensor:
    """The value of `rounded`, to the last bit, with the gradient of x."""
    return rounded.detach() + (x - x.detach())
