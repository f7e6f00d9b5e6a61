"""Tokens that are most like the rest are dropped on the way through a transformer, and from other networks alike."""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from limbeck.core.errors import BadInput
from limbeck.core.heads import log_attention, looks_apart, relations_apart, same_heads
from limbeck.core.masked import pick
from limbeck.core.maths import upcast
from limbeck.core.taps import find_layer


def block_at(depth: float, count: int) -> int:
    """The last of `count` blocks that begins before a share of the depth in (0, 1]; it begins after a drop there."""
    return math.ceil(round(depth * count, 6)) - 1


def redundancy(tokens: Tensor) -> Tensor:
    """Mean cosine similarity of each token to all others of its picture: [B, T, D] -> [B, T]; 0 for one alone."""
    unit = F.normalize(upcast(tokens.detach()), dim=-1)
    alike = (unit * unit.sum(1, keepdim=True)).sum(-1) - unit.square().sum(-1)
    return alike / max(1, tokens.shape[1] - 1)


def distinct(tokens: Tensor, kept: int) -> Tensor:
    """The `kept` tokens of each picture that are least like the rest, in their order: [B, T, D] -> [B, kept]."""
    return redundancy(tokens).topk(kept, largest=False).indices.sort().values


@contextmanager
def losing(
    module: nn.Module, path: str, drops: Sequence[float], keep: float, patches: int, chosen: list[Tensor]
) -> Iterator[None]:
    """Inside, tokens [B, extra + patches, D] are dropped before the blocks at `path` that begin at those shares of the
    depth, in [0, 1): each time a share `keep` of the patches is left.

    chosen: numbers of those left, among those there, one entry a drop. The network that comes with an empty list
    decides by its own tokens and fills it; those that get it filled lose the same.
    """
    blocks = list(find_layer(module, path).children())

    def hook(number: int) -> Any:
        def drop(_block: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
            there = chosen[number - 1].shape[1] if number else patches
            if number == len(chosen):
                chosen.append(distinct(inputs[0][:, -there:], max(1, round(keep * there))))
            return (pick(inputs[0], chosen[number], there), *inputs[1:])

        return drop

    with ExitStack() as stack:
        for number, depth in enumerate(sorted(drops)):
            block = blocks[math.floor(round(depth * len(blocks), 6))]
            stack.callback(block.register_forward_pre_hook(hook(number)).remove)
        yield


def relations_at(student: Mapping[str, Any], teacher: Mapping[str, Any], depths: Sequence[float]) -> Tensor:
    """KL(A_t || A_s) + KL(R_t || R_s), means over heads, tokens and shares of the depth: [B].

    A is the attention and R = softmax(V V^T / sqrt(d)) of each head, of what networks say by name: `attn` and `values`.
    """
    terms = []
    for depth in depths:
        (looks, mine), (aims, its) = (
            [told[name][block_at(depth, len(told[name]))] for name in ("attn", "values")] for told in (student, teacher)
        )
        same_heads("a relation of tokens", [looks.shape, aims.shape])
        if looks.shape[2] != aims.shape[2]:
            raise BadInput(
                f"at {depth} of the depth the student has {looks.shape[2]} tokens and the teacher {aims.shape[2]}: "
                "compare layers farther below a drop, of networks that both have a class token or none"
            )
        look = looks_apart(log_attention(looks), log_attention(aims.detach()))
        terms.append(look + relations_apart(mine, its, looks.shape[1]))
    return torch.stack(terms).mean(0)
