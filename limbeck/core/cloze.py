"""Masked words: some tokens of a text are hidden, and a network that sees both sides says which they were."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Generator, Tensor, nn

from limbeck.core.card import require
from limbeck.core.errors import BadInput

MASKED, RANDOM = 0.8, 0.1  # of the hidden tokens: shown as the mask, and as any token; the others are shown as they are
FIRST = 2  # the lowest id that a random token may have: those below pad, or stand for unknown words
DRAWS = 3  # numbers that a place needs: whether it is hidden, what is shown instead, and which random token


@dataclass(frozen=True)
class Cloze:
    """How tokens are hidden (Devlin et al. 2019, section 3.1): in every text a share of its tokens, and at least one.

    mask: the id that stands for a hidden token. words: random tokens have ids below it. share: in (0, 1). odds: how
    likely tokens are to be hidden, in proportion, by id [words or more]; None treats all alike.
    """

    mask: int
    words: int
    share: float = 0.15
    odds: Tensor | None = field(default=None, repr=False, compare=False)

    def __post_init__(self) -> None:
        require(0 < self.share < 1, "share", self.share, "in (0, 1)")
        require(self.words > FIRST, "words", self.words, f"> {FIRST}")

    def draw(self, generator: Generator | None, texts: int, length: int) -> Tensor:
        """Numbers in [0, 1) that decide all: [texts, DRAWS, length], of a generator or of torch's global one."""
        return torch.rand(texts, DRAWS, length, generator=generator)

    def hide(self, tokens: Tensor, real: Tensor, draws: Tensor) -> tuple[Tensor, Tensor]:
        """What is shown of tokens [B, T], real [B, T] where they are no padding, and where they are hidden: bool."""
        draws = draws.to(tokens.device)
        key = draws[:, 0]
        if self.odds is not None:  # the smallest of exponentials with these rates: drawn without replacement
            key = key.clamp_min(1e-30).log().neg() / self.odds.to(key)[tokens]
        rank = key.masked_fill(~real, float("inf")).argsort(dim=1, stable=True).argsort(1)
        count = (self.share * real.sum(1, keepdim=True)).round().clamp_min(1)
        hidden = (rank < count) & real
        other = FIRST + (draws[:, 2] * (self.words - FIRST)).long()
        shown = tokens.masked_fill(hidden & (draws[:, 1] < MASKED), self.mask)
        return torch.where(hidden & (draws[:, 1] >= 1 - RANDOM), other, shown), hidden

    def apply(self, batch: Mapping[str, Any], draws: Tensor) -> dict[str, Any]:
        """The batch with tokens hidden: `labels` are the tokens that were its inputs, `mask` is True where hidden."""
        tokens = batch["inputs"]
        real = batch["attention_mask"].bool() if "attention_mask" in batch else torch.ones_like(tokens).bool()
        shown, hidden = self.hide(tokens, real, draws)
        return {**batch, "inputs": shown, "labels": tokens, "mask": hidden}


@contextmanager
def telling_words(*networks: Any) -> Iterator[None]:
    """Inside, networks with two heads say which word stands at each place, instead of the class of the text."""
    for network in networks:
        if not two_headed(network):
            raise BadInput(
                f"{type(network).__name__} cannot say which word is hidden; take one that can, such as "
                "{net: text_encoder, masked: true}"
            )
    for network in networks:
        network.tells_words = True
    try:
        yield
    finally:
        for network in networks:
            network.tells_words = False


def rarer(tokens: Tensor, words: int, power: float) -> Tensor:
    """Odds of ids [words] by how often they are among the tokens of a training text: count ** -power."""
    require(power >= 0, "smoothing", power, ">= 0")
    return torch.bincount(tokens.flatten(), minlength=words).clamp_min(1).double() ** -power


def two_headed(module: nn.Module) -> bool:
    """Whether a network can say words and classes."""
    return isinstance(getattr(module, "tells_words", None), bool)
