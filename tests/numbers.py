"""What the tests of invariants share: random numbers in fp64, gradients of losses, and modules from what they get."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from limbeck.core.find import get
from limbeck.core.reduce import Part, mean

VECTORS = Path(__file__).parent / "vectors"
FP64 = torch.float64


def vector(name: str, part: str) -> dict[str, Any]:
    """One part of a file of reference numbers."""
    body: dict[str, Any] = json.loads((VECTORS / f"{name}.json").read_text())[part]
    return body


def reference(name: str) -> dict[str, Any]:
    """The numbers of the authors' code in a file of reference numbers."""
    return vector(name, "reference")


def rand(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    """Normal numbers of a seed."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=FP64) * scale


def rotation(n: int, seed: int = 0) -> Tensor:
    """A random orthogonal matrix [n, n]."""
    return torch.linalg.qr(rand(n, n, seed=seed)).Q


def grad(loss: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """The gradient of a loss's mean."""
    x = x.detach().requires_grad_()
    return torch.autograd.grad(mean(loss(x)).value, x)[0]


def close(a: Any, b: Any, tol: float = 1e-11) -> None:
    """Fail unless the numbers agree."""
    torch.testing.assert_close(torch.as_tensor(a, dtype=FP64), torch.as_tensor(b, dtype=FP64), rtol=tol, atol=tol)


def near(found: Tensor | float, wanted: Any, tolerance: float = 1e-9) -> None:
    """Fail unless a number, detached, is what it should be."""
    torch.testing.assert_close(torch.as_tensor(found).detach(), torch.tensor(wanted), rtol=tolerance, atol=tolerance)


def number(part: Tensor | Part) -> Tensor:
    """The value of a loss or of a part of one."""
    return part.value if isinstance(part, Part) else part


def made(name: str, *args: Any, **knobs: Any) -> nn.Module:
    """The module of a loss from the tensors that it will get, in fp64 and training mode."""
    torch.manual_seed(0)
    shapes = [[tuple(x.shape) for x in a] if isinstance(a, list) else tuple(a.shape) for a in args]
    return get(name)(*shapes, **knobs).double()
