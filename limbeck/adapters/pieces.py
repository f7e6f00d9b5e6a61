"""Which bytes each token of a tokenizer stands for, by its own vocabulary.

Character offsets would not do: where a character of several bytes is split over tokens, they give all of these tokens
the whole character.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from limbeck.adapters.words import PAD, Bytes, Chars, Hashed, Merges, Words
from limbeck.core.errors import BadInput
from limbeck.core.spans import Span

__all__ = ["Pieces", "pieces_of", "placed"]

SPACE = "\u2581"  # what sentencepiece writes for a space
REACH = 64  # bytes that a token without text, such as the unknown one, may stand for


@dataclass(frozen=True)
class Pieces:
    """A tokenizer, seen as a list of byte strings.

    words: the bytes of every id; b"" for ids that stand for no text of their own: padding, unknown and special tokens.
    specials: name -> id of special tokens. spare: ids of single bytes that the tokenizer falls back on; another id may
    be the same bytes. start: id that the tokenizer puts before every text, or None. end: id that ends a text, or None.
    pad: id that fills up. encode: text to ids, nothing added.
    """

    name: str
    words: list[bytes]
    encode: Callable[[str], list[int]] = field(repr=False)
    specials: dict[str, int] = field(default_factory=dict)
    spare: frozenset[int] = frozenset()
    start: int | None = None
    end: int | None = None
    pad: int = PAD

    def ids(self) -> dict[bytes, int]:
        """Byte string -> id, one each: the first id, and no spare one where there is another."""
        found: dict[bytes, int] = {}
        plain = (i for i in range(len(self.words)) if i not in self.spare)
        for i in (*plain, *sorted(self.spare)):
            if self.words[i]:
                found.setdefault(self.words[i], i)
        return found


_KNOWN: WeakKeyDictionary[Any, Pieces] = WeakKeyDictionary()  # large vocabularies take seconds


def pieces_of(tokenizer: Any) -> Pieces:
    """The pieces of one of our tokenizers, or of a transformers one, wrapped as `Pretrained` or bare."""
    if tokenizer not in _KNOWN:
        _KNOWN[tokenizer] = _found(tokenizer)
    return _KNOWN[tokenizer]


def lengths(tokenizer: Any, ids: Tensor) -> Tensor | None:
    """Bytes that each id stands for, 0 for special ones: [...] -> [...]; None where nobody knows them."""
    try:
        words = pieces_of(tokenizer).words
    except BadInput:
        return None
    return torch.tensor([len(word) for word in words])[ids.cpu().clamp(0, len(words) - 1)]


def _found(tokenizer: Any) -> Pieces:
    if isinstance(tokenizer, Chars):
        return Pieces("chars", [b"", b"", *(s.encode() for s in tokenizer.symbols[2:])], tokenizer.encode)
    if isinstance(tokenizer, (Bytes, Merges)):
        name = "bytes" if isinstance(tokenizer, Bytes) else "bpe"
        return Pieces(name, list(tokenizer.pieces), tokenizer.encode)
    if isinstance(tokenizer, (Words, Hashed)):
        raise BadInput(
            f"the tokenizer `{type(tokenizer).__name__.lower()}` keeps neither spaces nor capitals, so what it says "
            "cannot be found again in the text; two tokenizers need chars, bytes, bpe or a transformers tokenizer"
        )
    inner = getattr(tokenizer, "inner", tokenizer)
    if not hasattr(inner, "backend_tokenizer"):
        raise BadInput(
            f"nobody knows which bytes the tokens of {type(inner).__name__} are; two tokenizers need chars, bytes, bpe "
            "or a fast transformers tokenizer"
        )
    return _pretrained(inner)


# ---- transformers ----------------------------------------------------------------------------------------------------
def _pretrained(inner: Any) -> Pieces:
    name = str(getattr(inner, "name_or_path", "") or type(inner).__name__)
    backend = inner.backend_tokenizer
    parts = {kind for part in (backend.decoder, backend.pre_tokenizer) for kind in _types(part)}
    if "WordPiece" in parts:
        raise BadInput(f"the tokenizer {name!r} cuts words into pieces and forgets the spaces; it cannot be aligned")
    known: dict[str, int] = inner.get_vocab()
    added = inner.added_tokens_decoder
    fallback = "ByteFallback" in parts or bool(getattr(backend.model, "byte_fallback", False))
    letters = _letters() if "ByteLevel" in parts else {}
    pieces, spare = [b""] * (1 + max(known.values())), set()
    for text, i in known.items():
        if i in added:
            pieces[i] = b"" if added[i].special else text.encode()
        elif letters:
            pieces[i] = bytes(letters[c] for c in text) if all(c in letters for c in text) else text.encode()
        elif fallback and len(text) == 6 and text.startswith("<0x") and text.endswith(">"):
            pieces[i] = bytes([int(text[3:5], 16)])
            spare.add(i)
        else:
            pieces[i] = text.replace(SPACE, " ").encode()
    specials = {token.content: i for i, token in added.items() if token.special}
    for text in getattr(inner, "all_special_tokens", ()):
        specials[text] = known[text]
    for i in specials.values():
        pieces[i] = b""
    before = inner("a").input_ids
    start = inner.bos_token_id if before and before[0] == inner.bos_token_id else None
    pad = inner.pad_token_id if inner.pad_token_id is not None else PAD
    return Pieces(
        name,
        pieces,
        lambda text: list(inner.encode(text, add_special_tokens=False)),
        specials,
        frozenset(spare),
        start,
        inner.eos_token_id,
        int(pad),
    )


def _types(part: Any) -> Iterator[str]:
    """The names of a decoder or pre-tokenizer and of all that it is made of."""
    if hasattr(part, "__getstate__") and not isinstance(part, (dict, list, str, int, float, bool, type(None))):
        state = part.__getstate__()
        part = json.loads(state) if isinstance(state, (bytes, str)) else None
    if isinstance(part, dict):
        if "type" in part:
            yield str(part["type"])
        part = list(part.values())
    for below in part if isinstance(part, list) else ():
        yield from _types(below)


def _letters() -> dict[str, int]:
    """The letter by which byte-level vocabularies write each byte: itself where it can be seen, else from 256 up."""
    seen = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [b for b in range(256) if b not in seen]
    return {chr(b): b for b in seen} | {chr(256 + n): b for n, b in enumerate(rest)}


# ---- tokens in a text ------------------------------------------------------------------------------------------------
def placed(pieces: Sequence[bytes], text: bytes) -> list[Span]:
    """Where in the text each token is; one that is not found there begins where it ends.

    A space that the tokenizer put before the text is taken off. After a token that is not found the next one is looked
    for a little further on, so that an unknown character spoils itself alone.
    """
    found: list[Span] = []
    at, lost = 0, False
    for piece in pieces:
        size, start = len(piece), -1
        if piece and text.startswith(piece, at):
            start = at
        elif piece and lost:
            start = text.find(piece, at, at + REACH + size)
        elif at == 0 and piece[:1] == b" " and text.startswith(piece[1:]):
            size, start = size - 1, 0
        lost = start < 0
        if not lost:
            at = start + size
        found.append((at - size, at) if not lost else (at, at))
    return found
