"""The dozen functions of Triton that `core/headloss/kernels.py` uses, on CPU tensors, for machines without Triton.

All programs of a launch run side by side: what a program has once is [programs, 1], a block of it [programs, BLOCK].
Reading or writing outside a tensor's storage fails, and so does an unmasked store of a block.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

PROGRAMS = [0]


@dataclass
class Pointer:
    """Places in the storage of a tensor."""

    storage: Tensor
    at: Tensor

    def __add__(self, more: Tensor) -> Pointer:
        return Pointer(self.storage, self.at + more)


class Jit:
    """A function that runs as it stands."""

    def __init__(self, fn: Callable[..., Any]) -> None:
        self.fn = fn

    def __call__(self, *args: Any) -> Any:
        return self.fn(*args)

    def __getitem__(self, grid: tuple[int]) -> Callable[..., None]:
        def launch(*args: Any, num_warps: int, **constants: Any) -> None:
            assert num_warps & (num_warps - 1) == 0
            PROGRAMS[0] = grid[0]
            self.fn(*(pointer(a) if isinstance(a, Tensor) else a for a in args), **constants)

        return launch


def pointer(x: Tensor) -> Pointer:
    whole = torch.empty(0, dtype=x.dtype).set_(x.untyped_storage())  # type: ignore[call-overload]
    return Pointer(whole, torch.tensor([[x.storage_offset()]]))


def load(p: Pointer, mask: Tensor | None = None, other: float = 0.0) -> Tensor:
    return p.storage[p.at] if mask is None else torch.where(mask, p.storage[p.at.where(mask, 0)], other)


def store(p: Pointer, value: Tensor, mask: Tensor | None = None) -> None:
    assert mask is not None or p.at.shape[-1] == 1
    mask = torch.ones_like(p.at, dtype=torch.bool) if mask is None else mask.expand_as(p.at)
    p.storage[p.at[mask]] = value.expand_as(p.at)[mask]


def static_assert(true: bool) -> None:
    assert true


def kernels(path: Path) -> ModuleType:
    """The file of kernels, with these functions for Triton's."""
    import sys

    language: Any = ModuleType("triton.language")
    triton: Any = ModuleType("triton")
    triton.jit, triton.language = Jit, language
    language.constexpr, language.float32, language.int64 = (lambda x: x), torch.float32, torch.int64
    language.program_id = lambda axis: torch.arange(PROGRAMS[0])[:, None]
    language.arange, language.exp, language.log, language.abs = torch.arange, torch.exp, torch.log, torch.abs
    language.full = lambda shape, value, dtype: torch.full([PROGRAMS[0], *shape], value, dtype=dtype)
    language.where, language.load, language.store, language.static_assert = torch.where, load, store, static_assert
    language.maximum = lambda a, b: torch.fmax(a, torch.as_tensor(b, dtype=a.dtype))  # nan is left out, as there
    language.minimum = lambda a, b: torch.fmin(a, torch.as_tensor(b, dtype=a.dtype))
    language.max = lambda x, axis: x.nan_to_num(-torch.inf, torch.inf, -torch.inf).amax(-1, keepdim=True)
    language.sum = lambda x, axis: x.sum(-1, keepdim=True)
    before = {name: sys.modules.get(name) for name in ("triton", "triton.language")}
    spec = importlib.util.spec_from_file_location("kernels_without_triton", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    try:
        sys.modules |= {"triton": triton, "triton.language": language}
        spec.loader.exec_module(module)
    finally:
        for name, old in before.items():
            if old is None:
                del sys.modules[name]
            else:
                sys.modules[name] = old
    return module
