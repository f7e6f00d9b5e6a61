"""Masked pictures: a transformer is shown some patches, and a small decoder tells the pixels of those it was not shown.

A picture's patches are numbered row by row; `shown` [B, K] holds the numbers of those that a network sees.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from limbeck.core.card import require
from limbeck.core.errors import BadInput
from limbeck.core.loop import Stage
from limbeck.core.maths import pair
from limbeck.core.nets import Batch, Nets, evaluating
from limbeck.core.taps import find_layer


def draw(pictures: int, patches: int, kept: int, device: torch.device) -> Tensor:
    """For each picture the numbers of `kept` of its patches, drawn without replacement, in random order: [B, kept]."""
    return torch.rand(pictures, patches, device=device).argsort(1)[:, :kept]


def covered(shown: Tensor, patches: int) -> Tensor:
    """True at the patches that are not shown: [B, K] -> [B, patches]."""
    everywhere = torch.ones(len(shown), patches, dtype=torch.bool, device=shown.device)
    return everywhere.scatter(1, shown, False)


def patchify(pictures: Tensor, side: int) -> Tensor:
    """Pictures [B, C, H, W] cut into side x side patches, row by row: [B, side * side, pixels of a patch]."""
    height, width = pictures.shape[2] // side, pictures.shape[3] // side
    return F.unfold(pictures, (height, width), stride=(height, width)).mT


def pick(tokens: Tensor, shown: Tensor, patches: int) -> Tensor:
    """Of tokens [B, extra + patches, D] the extra ones, such as a class token, and the shown: [B, extra + K, D]."""
    extra = tokens.shape[1] - patches
    chosen = tokens[:, extra:].gather(1, shown.unsqueeze(-1).expand(-1, -1, tokens.shape[2]))
    return torch.cat([tokens[:, :extra], chosen], 1)


@contextmanager
def only(module: nn.Module, entry: str, shown: Tensor, patches: int) -> Iterator[None]:
    """Inside, the layer at the path `entry`, the first to mix patches, gets the shown ones alone, and so do all after
    it: what is hidden enters nowhere. Its input is tokens that hold their places in themselves already."""

    def hook(_layer: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        return (pick(inputs[0], shown, patches), *inputs[1:])

    handle = find_layer(module, entry).register_forward_pre_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def sides(nets: Nets, player: str, entry: str, batch: Batch) -> int:
    """How many patches lie along the side of a square picture, as a network cuts it. Raises BadInput for others."""
    seen: list[tuple[int, ...]] = []
    layer = find_layer(nets.find(player), entry)
    handle = layer.register_forward_pre_hook(lambda _layer, inputs: seen.append(tuple(inputs[0].shape)))
    try:
        with torch.no_grad(), evaluating(nets.find(player)):
            nets.run(player, batch)
    finally:
        handle.remove()
    inputs = batch["inputs"]
    shape = seen[0] if seen else ()
    side = math.isqrt(shape[1]) if len(shape) == 3 else 0
    if side < 2 or inputs.ndim != 4 or inputs.shape[2] % side or inputs.shape[3] % side:
        raise BadInput(
            f"masking needs a network of square pictures whose layer {entry!r} gets their patches, [B, T, D]; the "
            f"{player}'s gets {list(shape)} of pictures {list(inputs.shape)}"
        )
    return side


def unseen(told: Tensor, targets: Tensor, shown: Tensor) -> Tensor:
    """Mean squared error of targets [B, patches, D] at patches that are not shown: [B]."""
    told, targets = pair(told, targets)
    error, dark = (told - targets).square().mean(2), covered(shown, told.shape[1])
    return (error * dark).sum(1) / dark.sum(1)


def masked_first(nets: Nets, share: float, steps: int) -> Iterator[Stage]:
    """A share of the steps on masked pictures, the others on whole ones; in the first nets.pretext trains along."""
    before = min(steps - 1, max(1, round(share * steps)))
    nets.companions["student"] = ["pretext"]
    yield Stage(before, "masked", until=share, validated=False)
    nets.companions["student"] = ["losses"]
    yield Stage(steps - before, "whole")


def check_decoder(decoder_width: int, decoder_depth: int, decoder_heads: int) -> None:
    """Raise ValueError for sizes that no `Decoder` can have."""
    for name, size in zip(("width", "depth", "heads"), (decoder_width, decoder_depth, decoder_heads), strict=True):
        require(size >= 1, f"decoder_{name}", size, ">= 1")
    require(decoder_width % decoder_heads == 0, "decoder_width", decoder_width, f"a multiple of {decoder_heads} heads")


class Decoder(nn.Module):
    """What a small transformer makes of an encoder's tokens: `out` numbers for each patch, shown or not.

    Tokens [B, extra + K, D] of the shown patches [B, K] -> [B, patches, out]. Hidden patches begin as one learned
    token; every patch has a learned place.
    """

    def __init__(self, width: int, patches: int, out: int, *, inner: int, depth: int, heads: int) -> None:
        super().__init__()
        self.enter = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, inner))
        self.blank = nn.Parameter(0.02 * torch.randn(inner))
        self.places = nn.Parameter(0.02 * torch.randn(patches, inner))
        block: Callable[[], nn.Module] = lambda: nn.TransformerEncoderLayer(
            inner, heads, 4 * inner, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )
        self.blocks = nn.Sequential(*(block() for _ in range(depth)))
        self.leave = nn.Sequential(nn.LayerNorm(inner), nn.Linear(inner, out))

    def forward(self, tokens: Tensor, shown: Tensor) -> Tensor:
        entered = self.enter(tokens)
        extra = entered.shape[1] - shown.shape[1]
        blank = self.blank.to(entered.dtype).expand(len(shown), len(self.places), -1)
        where = shown.unsqueeze(-1).expand(-1, -1, entered.shape[2])
        patches = blank.scatter(1, where, entered[:, extra:]) + self.places
        left: Tensor = self.leave(self.blocks(torch.cat([entered[:, :extra].to(patches.dtype), patches], 1)))
        return left[:, extra:]
