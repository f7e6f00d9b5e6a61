"""What losses on the inside of attention share: heads, relations between tokens, and comparing who looks where."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from limbeck.core.errors import BadInput
from limbeck.core.maths import FLOOR, gram, kl_logprobs, log_probs, pair, upcast

# What an attention of 0 is taken for, so that its logarithm and the slope of that stay finite.
LEAST = 1e-20


def split(x: Tensor, heads: int) -> Tensor:
    """Heads side by side into heads on top of each other: [B, T, heads * D] -> [B, heads, T, D]."""
    each: Tensor = x.unflatten(-1, (heads, -1)).transpose(1, 2)
    return each


def log_attention(attn: Tensor, real: Tensor | None = None) -> Tensor:
    """Log-probabilities of attention maps [B, h, T, T] after their softmax; real [B, T]: nothing elsewhere."""
    return log_probs(_only(upcast(attn).clamp_min(LEAST).log(), real))


def log_relation(x: Tensor, heads: int, real: Tensor | None = None) -> Tensor:
    """log softmax(x_a x_a^T / sqrt(D)) of each of the heads x_a [B, T, D] of x: [B, T, heads * D] -> [B, heads, T, T].

    real [B, T]: nobody looks at the others.
    """
    each = split(upcast(x), heads)
    return log_probs(_only(gram(each) / each.shape[-1] ** 0.5, real))


def looks_apart(student: Tensor, teacher: Tensor, real: Tensor | None = None) -> Tensor:
    """Mean over heads and tokens of KL(teacher || student) of log-probabilities [B, h, T, T] -> [B].

    real [B, T]: only those tokens are asked where they look.
    """
    return real_mean(kl_logprobs(*pair(teacher, student)).mean(1), real)


def relations_apart(student: Tensor, teacher: Tensor, heads: int, real: Tensor | None = None) -> Tensor:
    """`looks_apart` of the `log_relation` of either, cut into that many heads: [B, T, heads * D] x 2 -> [B]."""
    mine, its = (log_relation(x, heads, real) for x in (student, teacher.detach()))
    return looks_apart(mine, its, real)


def maps_apart(student: Tensor, teacher: Tensor, real: Tensor | None = None) -> Tensor:
    """Mean over heads and pairs of real tokens of the squared difference of maps [B, h, T, T] x 2 -> [B]."""
    pairs = None if real is None else real[:, None, :] & real[:, :, None]
    return real_mean((student - teacher).square().mean(1), pairs)


def same_heads(method: str, maps: Iterable[tuple[int, ...]]) -> None:
    """Raise BadInput unless attention maps, by shape [B, h, T, T], have as many heads."""
    heads = {shape[1] for shape in maps}
    if len(heads) > 1:
        raise BadInput(f"{method} compares head with head, but layers have {sorted(heads)}; use minilm_v2")


def real_mean(values: Tensor, real: Tensor | None = None) -> Tensor:
    """Mean over all but the batch; real, of that shape: only over those places, 0 without any. [B, ...] -> [B]"""
    if real is None:
        return values.flatten(1).mean(1)
    real = real.bool().expand_as(values).flatten(1)
    return torch.where(real, values.flatten(1), 0.0).sum(1) / real.sum(1).clamp_min(1)


def _only(scores: Tensor, real: Tensor | None) -> Tensor:
    """Scores [B, h, T, T] with nothing left for keys that are not real."""
    return scores if real is None else torch.where(real.bool()[:, None, None], scores, FLOOR)
