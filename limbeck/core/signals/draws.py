"""Draws from a teacher that are functions of (seed, document, place) alone: a capture that was killed draws the same.

Weights are unbiased by construction: w = count / N * p / q with q the proposal, and where a weight is rounded, it is
rounded up or down at random so that its expectation stays.
"""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from limbeck.core.partition import mixed

__all__ = ["LOWEST", "STEP", "draw", "rounded", "weight_of"]

STEP, LOWEST = 0.125, -20.0  # of the log of a rounded weight, which has 8 bits: e^-20 to e^11.875
Floats = NDArray[np.float64]


def _uniform(*parts: Any) -> Floats:
    """A number in (0, 1) for every combination of whole numbers or arrays of them."""
    return ((mixed(*parts) >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53


def draw(
    logprobs: Tensor, seed: int, document: int, places: NDArray[np.int64], *, rounds: int, tau: float, systematic: bool
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64], Floats]:
    """Draws of some places: sizes [P], and place by place ids [E], counts [E], and p / q [E] of each distinct id.

    logprobs: [P, V] of the teacher. rounds, tau, systematic: see `Sampled`.
    """
    p = logprobs.double().exp()
    q = p if tau == 1 else (tau * logprobs.double()).exp()
    cumulative = q.cumsum(-1)
    total = cumulative[:, -1:]
    numbers = np.arange(1 if systematic else rounds)
    u = _uniform(seed, document, places[:, None], numbers[None])
    if systematic:
        u = (np.arange(rounds)[None] + u) / rounds
    picked = torch.searchsorted(cumulative, torch.from_numpy(u).to(total) * total, right=True)
    # `right` passes over ids of probability 0; rounding may still lead past the last id that can be drawn
    last = q.shape[-1] - 1 - (q.flip(-1) > 0).byte().argmax(-1, keepdim=True)
    ids = torch.minimum(picked, last).cpu().numpy()
    ids.sort(-1)
    first = np.ones(ids.shape, bool)
    first[:, 1:] = ids[:, 1:] != ids[:, :-1]
    sizes = first.sum(1)
    begins = np.flatnonzero(first)
    counts = np.diff(np.append(begins, ids.size))
    kept = ids[first]
    if tau == 1:
        return sizes, kept, counts, np.ones(len(kept))
    row = torch.from_numpy(np.repeat(np.arange(len(sizes)), sizes)).to(p.device)
    column = torch.from_numpy(kept).to(p.device)
    ratio = (p[row, column] / q[row, column] * total[row, 0]).cpu().numpy()
    return sizes, kept, counts, ratio


def rounded(weights: Floats, seed: int, document: int, places: NDArray[np.int64]) -> NDArray[np.int64]:
    """Codes of 8 bits for weights [E] > 0, whose expectation over the rounding is the weight. places: [E], with the id
    as a second row: [2, E]."""
    at = (np.log(weights) - LOWEST) / STEP
    low = np.clip(np.floor(at), 0, 254)
    below, above = np.exp(LOWEST + STEP * low), np.exp(LOWEST + STEP * (low + 1))
    up = _uniform(seed, document, places[0], 2**32 + places[1]) < (weights - below) / (above - below)
    codes: NDArray[np.int64] = (low + up).astype(np.int64)
    return codes


def weight_of(codes: NDArray[np.int64]) -> Floats:
    """The weights behind codes."""
    return np.exp(LOWEST + STEP * codes.astype(np.float64))
