"""What adapts weights and temperatures while the student learns: against it, or by what helps it on other data."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class _Reversed(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, factor: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def setup_context(ctx: torch.autograd.function.FunctionCtx, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(inputs[1])

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, *grads: Tensor) -> tuple[Tensor, None]:
        (factor,) = ctx.saved_tensors  # type: ignore[attr-defined]
        return grads[0] * -factor, None


def reverse_gradient(x: Tensor, factor: float | Tensor = 1.0) -> Tensor:
    """x, but its gradient comes back multiplied by -factor: what is behind it learns to raise the loss (CTKD, DANN)."""
    reversed_: Tensor = _Reversed.apply(x, torch.as_tensor(factor, dtype=x.dtype, device=x.device))  # type: ignore[no-untyped-call]
    return reversed_


def step_ahead(module: nn.Module, loss: Tensor, rate: float) -> dict[str, Tensor]:
    """Parameters by name after one step of gradient descent at `rate`, differentiable in whatever `loss` depends on.

    The module itself is not changed. Give the result to `torch.func.functional_call(module, result, inputs)` on other
    data, and the gradient of that second loss with respect to, say, a weight per example in the first is the bilevel
    (one-step) hypergradient.
    """
    named = {name: p for name, p in module.named_parameters() if p.requires_grad}
    grads = torch.autograd.grad(loss, list(named.values()), create_graph=True, allow_unused=True)
    return {name: p if g is None else p - rate * g for (name, p), g in zip(named.items(), grads, strict=True)}


def gradient(loss: Tensor, parameters: Sequence[Tensor]) -> list[Tensor]:
    """Of the loss with respect to every parameter, 0 where there is none; the graph stays."""
    if not loss.requires_grad:
        return [torch.zeros_like(p) for p in parameters]
    found = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
    return [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, found, strict=True)]
