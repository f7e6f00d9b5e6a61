"""A teacher that is the average of its student's past weights, and how fast it forgets."""

from __future__ import annotations

import math

import torch
from torch import nn


def ramped(decay: float, updates: int) -> float:
    """min(1 - 1 / (updates + 1), decay): a plain mean of all weights so far, until `decay` forgets faster.

    updates: how many there were, this one included, >= 1; the start counts as one of those averaged.
    """
    return min(1 - 1 / (updates + 1), decay)


@torch.no_grad()
def follow(average: nn.Module, source: nn.Module, decay: float) -> None:
    """average <- decay * average + (1 - decay) * source, parameters alone: batch-norm statistics are its own.

    Call it from a method's `after`. `core.state.ema_update` also takes over the buffers, for an average that does
    not look at data itself.
    """
    for mine, theirs in zip(average.parameters(), source.parameters(), strict=True):
        mine.lerp_(theirs.to(mine.dtype), 1 - decay)


def sigmoid_rampup(progress: float, over: float) -> float:
    """exp(-5 (1 - progress / over)^2) until `over`, then 1 (Laine and Aila 2016); 1 from the start where over is 0."""
    left = max(0.0, 1 - progress / over) if over > 0 else 0.0
    return math.exp(-5 * left * left)
