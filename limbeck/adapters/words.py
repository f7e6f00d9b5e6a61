"""Text to token ids without any download, and the one place where language batches are shifted."""

import re
import zlib
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from limbeck.adapters.merges import Merges
from limbeck.core.batches import Tokenizer
from limbeck.core.errors import BadInput, MissingExtra

__all__ = ["Bytes", "Chars", "Hashed", "Merges", "Pretrained", "Words", "blocks", "make", "next_tokens", "padded"]

PAD, UNKNOWN = 0, 1
_WORD = re.compile(r"\w+|[^\w\s]")
_LINE_WORD = re.compile(r"\w+|[^\w\s]|\n")


class Chars:
    """One id a character; id 0 pads, id 1 is any character that the training text lacks."""

    def __init__(self, texts: Iterable[str]) -> None:
        self.symbols = ["", "\ufffd", *sorted(set().union(*map(set, texts)) - {"\ufffd"})]
        self._ids = {symbol: i for i, symbol in enumerate(self.symbols) if i > UNKNOWN}
        self.size = len(self.symbols)

    def encode(self, text: str) -> list[int]:
        return [self._ids.get(symbol, UNKNOWN) for symbol in text]

    def decode(self, ids: Sequence[int]) -> str:
        return "".join(self.symbols[i] for i in ids)


class Words:
    """The most frequent lower-case words and punctuation marks of the training text; id 0 pads, id 1 is any other.

    lines: the end of a line is a word, too, id 2.
    """

    def __init__(self, texts: Iterable[str], size: int = 8192, *, lines: bool = False) -> None:
        self._word = _LINE_WORD if lines else _WORD
        counts = Counter(word for text in texts for word in _WORD.findall(text.lower()))
        ends = ["\n"] if lines else []
        frequent = sorted(counts, key=lambda word: (-counts[word], word))[: size - 2 - len(ends)]
        self.symbols = ["", "\ufffd" if lines else "[unknown]", *ends, *frequent]
        self._ids = {symbol: i for i, symbol in enumerate(self.symbols) if i > UNKNOWN}
        self.size = len(self.symbols)

    def encode(self, text: str) -> list[int]:
        return [self._ids.get(word, UNKNOWN) for word in self._word.findall(text.lower())]

    def decode(self, ids: Sequence[int]) -> str:
        return " ".join(self.symbols[i] for i in ids if i != PAD)


class Hashed:
    """Words thrown into `size` - 1 ids by checksum: needs to see no text beforehand, and cannot be decoded."""

    def __init__(self, size: int = 8192) -> None:
        self.size = size

    def encode(self, text: str) -> list[int]:
        return [1 + zlib.crc32(word.encode()) % (self.size - 1) for word in _WORD.findall(text.lower())]

    def decode(self, ids: Sequence[int]) -> str:
        return " ".join(f"#{i}" for i in ids if i != PAD)


class Bytes:
    """The 256 bytes of UTF-8, counted from 1; id 0 pads. Needs to see no text beforehand and loses nothing."""

    size = 257
    pieces = (b"", *(bytes([byte]) for byte in range(256)))

    def encode(self, text: str) -> list[int]:
        return [1 + byte for byte in text.encode()]

    def decode(self, ids: Sequence[int]) -> str:
        return bytes(i - 1 for i in ids if i != PAD).decode(errors="replace")


class Pretrained:
    """A tokenizer of the transformers library, from a local folder or a hub name; `pad` is its own padding id."""

    def __init__(self, name: str) -> None:
        try:
            from transformers import AutoTokenizer
        except ImportError:
            raise MissingExtra("transformers", "text") from None
        try:
            self.inner = AutoTokenizer.from_pretrained(name)
        except (OSError, ValueError) as error:
            raise BadInput(f"no tokenizer at {name!r}: {str(error).splitlines()[0]}") from None
        self.size = len(self.inner)
        self.pad = int(self.inner.pad_token_id or 0)

    def encode(self, text: str) -> list[int]:
        return list(self.inner.encode(text, add_special_tokens=False))

    def decode(self, ids: Sequence[int]) -> str:
        return str(self.inner.decode(list(ids), skip_special_tokens=True))


def make(name: str | None, texts: Iterable[str], *, size: int, language: bool) -> Tokenizer:
    """The tokenizer that a recipe names: chars, words, bytes, bpe, hash, or a transformers one by folder or hub name.

    texts: the training texts, from which chars, words and bpe take their symbols. size: most symbols of words and bpe,
    which may also be written with the name, bpe:512. language: default to chars instead of
    words, as small language models do.
    """
    name = name or ("chars" if language else "words")
    if name == "chars":
        return Chars(texts)
    if name == "words":
        return Words(texts, size, lines=language)
    if name == "hash":
        return Hashed(size)
    if name == "bytes":
        return Bytes()
    if name == "bpe" or name.startswith("bpe:"):
        return Merges(texts, _size(name) or size)
    if "/" in name or Path(name).exists():
        return Pretrained(name)
    raise BadInput(
        f"no tokenizer {name!r}; known: chars, words, bytes, bpe, hash, or a folder or hub name such as org/model"
    )


def _size(name: str) -> int:
    given = name.partition(":")[2]
    if given and not given.isdigit():
        raise BadInput(f"bpe takes a number of symbols, as in bpe:512, got {name!r}")
    return int(given or 0)


def padded(tokenizer: Tokenizer, texts: Iterable[str], length: int, *, fixed: bool = False) -> dict[str, Tensor]:
    """Texts for classification: inputs [N, T] cut or padded at the end, attention_mask [N, T] true at real tokens.

    T is the longest text's length and at most `length`; with `fixed`, it is `length`.
    """
    ids = [tokenizer.encode(text)[:length] or [UNKNOWN] for text in texts]
    width = length if fixed else max(map(len, ids), default=1)
    inputs = torch.full((len(ids), width), getattr(tokenizer, "pad", PAD), dtype=torch.long)
    attention = torch.zeros(len(ids), width, dtype=torch.bool)
    for row, tokens in enumerate(ids):
        inputs[row, : len(tokens)] = torch.tensor(tokens)
        attention[row, : len(tokens)] = True
    return {"inputs": inputs, "attention_mask": attention}


def next_tokens(line: Tensor) -> tuple[Tensor, Tensor]:
    """inputs, labels [..., T] of tokens [..., T + 1]: here, and nowhere else, a label is the token one place on."""
    return line[..., :-1], line[..., 1:]


def blocks(tokens: Sequence[int] | Tensor, length: int, pad: int = PAD) -> dict[str, Tensor]:
    """A text for next-token prediction, cut into stretches: inputs, labels and mask [N, length].

    Every token but the first is a label exactly once; the last stretch is padded and its padding masked.
    """
    line = torch.as_tensor(tokens, dtype=torch.long)
    count = max(0, -(-(len(line) - 1) // length))
    mask = torch.arange(count * length).view(count, length) < len(line) - 1
    line = torch.cat([line, torch.full((count * length + 1 - len(line),), pad)]) if count else line[:1]
    inputs, labels = next_tokens(line)
    return {"inputs": inputs.view(count, length), "labels": labels.view(count, length), "mask": mask}
