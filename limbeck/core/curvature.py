"""How sharp a minimum is: the largest eigenvalue of a Hessian, which is never built."""

from collections.abc import Sequence

import torch
from torch import Tensor


def top_eigenvalue(
    loss: Tensor, parameters: Sequence[Tensor], *, iterations: int = 50, tolerance: float = 1e-6
) -> float:
    """The largest eigenvalue, in size, of the Hessian of a scalar `loss` for `parameters`, by power iteration.

    Begins with a random direction by torch's global generator; ends after `iterations`, or when the value changes by
    less than `tolerance` of itself. 0 for a loss that is linear in them.
    """
    grads = torch.autograd.grad(loss, list(parameters), create_graph=True)
    direction = [torch.randn_like(p) for p in parameters]
    value = 0.0
    for _ in range(iterations):
        size = torch.stack([d.norm() for d in direction]).norm()
        if not float(size):
            return 0.0
        direction = [d / size for d in direction]
        slope = torch.stack([(g * d).sum() for g, d in zip(grads, direction, strict=True)]).sum()
        if not slope.requires_grad:
            return 0.0
        found = torch.autograd.grad(slope, list(parameters), retain_graph=True, allow_unused=True)
        turned = [torch.zeros_like(p) if f is None else f for p, f in zip(parameters, found, strict=True)]
        before, value = value, float(torch.stack([(t * d).sum() for t, d in zip(turned, direction, strict=True)]).sum())
        if abs(value - before) < tolerance * abs(value):
            break
        direction = turned
    return value
