"""Texts for masked language models: stretches whose tokens are hidden, batch by batch or once and for all."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from limbeck.core.batches import Splits, Table, Tokenizer, generator
from limbeck.core.cloze import Cloze, rarer
from limbeck.core.errors import BadInput, nearest

__all__ = ["Masking", "fixed", "masking", "splits", "stretches"]

OPTIONS = {"share": 0.15, "smoothing": 0.0}


class Masking:
    """A tokenizer with one more id, its last, which stands for a hidden token: `mask`."""

    def __init__(self, inner: Tokenizer) -> None:
        self.inner, self.mask, self.size = inner, inner.size, inner.size + 1

    def encode(self, text: str) -> list[int]:
        return self.inner.encode(text)

    def decode(self, ids: Sequence[int]) -> str:
        return self.inner.decode([i for i in ids if i != self.mask])


def masking(tokenizer: Any) -> Any:
    """The tokenizer with the id `mask`: that of its own, as BERT's has one, else one more."""
    inner = getattr(tokenizer, "inner", None)
    if inner is None:
        return Masking(tokenizer)
    if inner.mask_token_id is None:
        raise BadInput(
            "this tokenizer has no mask token, as those of causal models have none; `masked` takes chars, words, "
            "bytes, bpe, or the tokenizer of a masked model"
        )
    tokenizer.mask = int(inner.mask_token_id)
    return tokenizer


def splits(
    texts: Sequence[str], tokenizer: Any, length: int, pad: int, name: str, seed: int, masked: bool | Mapping[str, Any]
) -> Splits:
    """Train, validation and test of three texts; what is hidden in the last two depends on the seed alone."""
    code = masking(tokenizer)
    train, *held = (stretches(code.encode(text), code, length, pad, name, masked) for text in texts)
    validation, test = (fixed(table, seed, i) for i, table in enumerate(held))
    return Splits(train, validation, test)


def stretches(
    tokens: Sequence[int], tokenizer: Any, length: int, pad: int, name: str, masked: bool | Mapping[str, Any]
) -> Table:
    """A text cut into stretches [N, length], the last one padded, whose tokens are hidden anew in every batch.

    masked: true, or a mapping with share (of the tokens of a stretch that are hidden) and smoothing (p: ids that come c
    times are hidden with odds of c ** -p, rare ones more; 0.7 for DistilBERT).
    """
    options = {**OPTIONS, **(masked if isinstance(masked, Mapping) else {})}
    for key in options:
        if key not in OPTIONS:
            raise BadInput(f"`masked` takes no {key!r}{nearest(str(key), OPTIONS)}")
    line = torch.as_tensor(tokens, dtype=torch.long)
    count = -(-len(line) // length)
    real = torch.arange(count * length).view(count, length) < len(line)
    rows = torch.cat([line, torch.full((count * length - len(line),), pad)]).view(count, length)
    words = tokenizer.mask if isinstance(tokenizer, Masking) else tokenizer.size
    try:
        odds = rarer(line, tokenizer.size, options["smoothing"]) if options["smoothing"] else None
        cloze = Cloze(tokenizer.mask, words, options["share"], odds)
    except ValueError as error:
        raise BadInput(f"`masked`: {error}") from None
    columns = {"inputs": rows, "labels": rows, "mask": real, "attention_mask": real}
    return Table(columns, "tokens", name=name, tokenizer=tokenizer, cloze=cloze)


def fixed(table: Table, *key: int | str) -> Table:
    """The table with tokens hidden for good, all of them alike likely: what validation and test ask for."""
    assert table.cloze is not None
    cloze = replace(table.cloze, odds=None)
    texts, length = table["inputs"].shape
    return replace(
        table, columns=cloze.apply(table.columns, cloze.draw(generator("cloze", *key), texts, length)), cloze=None
    )
