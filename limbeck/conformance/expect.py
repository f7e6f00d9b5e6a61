"""How a check says what is wrong."""

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

Check = Callable[[str], None]
F = TypeVar("F", bound=Check)


class Broken(AssertionError):
    """A method does not keep a rule of the house; the message is one sentence that says which and how."""


def expect(ok: bool | Tensor, message: str) -> None:
    """Raise `Broken` unless `ok`; unlike `assert` it also works under `python -O`."""
    if not ok:
        raise Broken(message)


def concerns(which: Callable[[Any], bool]) -> Callable[[F], F]:
    """Apply a check only to the methods for which `which(method)` is true."""

    def mark(check: F) -> F:
        check.concerns = which  # type: ignore[attr-defined]
        return check

    return mark


def close(found: Tensor, wanted: Tensor, what: str, *, rtol: float, atol: float) -> None:
    """Raise `Broken` with the largest difference unless the two agree in shape and value."""
    expect(found.shape == wanted.shape, f"{what} has shape {list(found.shape)}, expected {list(wanted.shape)}")
    found, wanted = found.detach().double(), wanted.detach().double()
    if not torch.allclose(found, wanted, rtol=rtol, atol=atol):
        gap = (found - wanted).abs()
        worst = int(torch.where(gap.isnan(), torch.inf, gap).argmax()) if gap.numel() else 0
        raise Broken(
            f"{what} differs: found {found.flatten()[worst].item():.12g}, expected "
            f"{wanted.flatten()[worst].item():.12g} (element {worst} of {gap.numel()}, tolerance {rtol:g})"
        )


def same_state(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> str:
    """The first name at which two states differ in any bit, '' when there is none."""
    if found.keys() != wanted.keys():
        return sorted(found.keys() ^ wanted.keys())[0]
    return next((k for k, v in found.items() if not torch.equal(v, wanted[k])), "")
