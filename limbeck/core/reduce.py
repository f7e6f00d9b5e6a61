"""The one reduction of the house. A part knows its count, so that the loop can take the mean over a whole step."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

UNLABELLED = -100  # the label of what has none


def labelled(batch: Mapping[str, Any]) -> Tensor:
    """Which places count and have a label: bool, of the shape of the labels."""
    labels: Tensor = batch["labels"]
    mask = batch.get("mask")
    return labels != UNLABELLED if mask is None else mask.bool() & (labels != UNLABELLED)


@dataclass(frozen=True, eq=False)
class Same:
    """A key that is equal only to one of the very same thing, which it keeps alive: a dead thing's id is used again."""

    thing: object

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Same) and other.thing is self.thing

    def __hash__(self) -> int:
        return id(self.thing)


@dataclass(frozen=True)
class Part:
    """A weighted mean that has not been divided yet: weight * total / count.

    total: scalar sum over the valid elements, with gradient. count: how many there are; a Python int when nothing is
    masked, else a scalar tensor without gradient. weight: factor on the mean; not part of the count. key: parts of
    one step with the same key are known to share their count.
    """

    total: Tensor
    count: Tensor | int
    weight: float | Tensor = 1.0
    key: Hashable = None

    @property
    def value(self) -> Tensor:
        """The scalar loss; 0 with a zero gradient when no element is valid."""
        count = self.count.clamp_min(1) if isinstance(self.count, Tensor) else max(self.count, 1)
        return self.weight * self.total / count

    def __mul__(self, factor: float | Tensor) -> Part:
        return replace(self, weight=self.weight * factor)

    __rmul__ = __mul__

    def __float__(self) -> float:
        return float(self.value.detach())


def mean(values: Tensor, mask: Tensor | None = None) -> Part:
    """Mean of `values` [...] over the places where `mask` [...] (or its leading dimensions) is True.

    A scalar counts as one element. Values at masked places have no influence, not even when they are nan or inf.
    """
    if values.ndim == 0:
        return Part(values, 1, key=1)
    if mask is None:
        return Part(values.sum(), values.numel(), key=values.numel())
    if mask.shape != values.shape[: mask.ndim] and values.shape != mask.shape[: values.ndim]:
        raise ValueError(f"mask {tuple(mask.shape)} does not fit values {tuple(values.shape)}")
    key = (Same(mask), values.shape)
    if mask.ndim > values.ndim:  # per-example values under a per-token mask: an example counts if any token does
        mask = mask.flatten(values.ndim).any(-1)
    while mask.ndim < values.ndim:
        mask = mask.unsqueeze(-1)
    mask = mask.bool().expand_as(values)
    return Part(torch.where(mask, values, torch.zeros_like(values)).sum(), mask.sum(), key=key)
