"""What a network's norm layers remember of the data that it was trained on, and how far another batch is from that."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from limbeck.core.errors import BadInput
from limbeck.core.maths import upcast


@dataclass
class Seen:
    """What one norm layer was given in one forward pass: inputs [B, C, ...], with gradient."""

    layer: _BatchNorm
    inputs: Tensor

    @cached_property
    def mean(self) -> Tensor:
        """The mean of each channel [C] over batch and places."""
        return self._all().mean(1)

    @cached_property
    def variance(self) -> Tensor:
        """The biased variance of each channel [C]."""
        return self._all().var(1, unbiased=False)

    @property
    def means(self) -> Tensor:
        """The mean of each channel over the places of one example: [B, C]."""
        x = upcast(self.inputs)
        return x.flatten(2).mean(2) if x.ndim > 2 else x

    @property
    def remembered(self) -> tuple[Tensor, Tensor]:
        """Mean and variance [C] that the layer has of the data it was trained on."""
        mean, variance = self.layer.running_mean, self.layer.running_var
        assert mean is not None and variance is not None
        return mean.to(self.mean), variance.to(self.mean)

    def _all(self) -> Tensor:
        return upcast(self.inputs).transpose(0, 1).flatten(1)


def norms(net: nn.Module) -> list[_BatchNorm]:
    """The layers of a network that remember statistics of its training data. Raises BadInput when there is none."""
    found = [m for m in net.modules() if isinstance(m, _BatchNorm) and m.running_mean is not None]
    if not found:
        raise BadInput(
            f"{type(net).__name__} has no batch norm that keeps running statistics, so that it remembers nothing of "
            "its data; set the weight of that part of the loss to 0, or take a teacher with batch norm"
        )
    return found


@contextmanager
def watching(net: nn.Module) -> Iterator[list[Seen]]:
    """Inside, every forward pass of `net` adds to the list what its norm layers are given, in order of the calls."""
    seen: list[Seen] = []

    def note(layer: _BatchNorm, given: tuple[Any, ...]) -> None:
        seen.append(Seen(layer, given[0]))

    hooks = [layer.register_forward_pre_hook(note) for layer in norms(net)]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def distances(seen: Sequence[Seen]) -> list[Tensor]:
    """|mean - remembered mean| + |variance - remembered variance|, Euclidean over the channels: [] a layer."""
    length = partial(torch.linalg.vector_norm, ord=2)
    return [length(s.mean - s.remembered[0]) + length(s.variance - s.remembered[1]) for s in seen]


def divergences(seen: Sequence[Seen]) -> list[Tensor]:
    """Sum over the channels of KL(N(mean, variance) || N(remembered mean, remembered variance)): [] a layer.

    Both variances are taken with the layer's epsilon, as the layer itself takes them.
    """
    found = []
    for s in seen:
        mean, variance = s.remembered
        mine, theirs = s.variance + s.layer.eps, variance + s.layer.eps
        ratio = mine / theirs
        found.append((0.5 * (ratio - 1 - ratio.log() + (s.mean - mean).square() / theirs)).sum())
    return found


class Recent(nn.Module):
    """A moving average, as state, of the statistics of past batches, so that small ones do for the norm layers.

    net: whose norm layers. momentum: in [0, 1), the share of the past.
    """

    begun: Tensor

    def __init__(self, net: nn.Module, momentum: float) -> None:
        super().__init__()
        self.momentum = momentum
        self.register_buffer("begun", torch.zeros((), dtype=torch.bool))
        for i, layer in enumerate(norms(net)):
            self.register_buffer(f"mean{i}", torch.zeros_like(layer.running_mean))  # type: ignore[arg-type]
            self.register_buffer(f"variance{i}", torch.zeros_like(layer.running_var))  # type: ignore[arg-type]

    def distances(self, seen: Sequence[Seen]) -> list[Tensor]:
        """`distances` of the average that this batch would lead to: [] a layer; without a past, of the batch."""
        share = self.momentum * self.begun.to(seen[0].mean)
        found = []
        for i, s in enumerate(seen):
            mean = s.mean.lerp(self.get_buffer(f"mean{i}").to(s.mean), share)
            variance = s.variance.lerp(self.get_buffer(f"variance{i}").to(s.mean), share)
            wanted_mean, wanted_variance = s.remembered
            length = torch.linalg.vector_norm
            found.append(length(mean - wanted_mean) + length(variance - wanted_variance))
        return found

    @torch.no_grad()
    def update(self, seen: Sequence[Seen]) -> None:
        """Take this batch into the average; the first becomes it."""
        share = self.momentum * self.begun.to(seen[0].mean)
        for i, s in enumerate(seen):
            for name, now in (("mean", s.mean), ("variance", s.variance)):
                mine = self.get_buffer(f"{name}{i}")
                mine.copy_(now.to(mine).lerp(mine, share.to(mine)))
        self.begun.fill_(True)
