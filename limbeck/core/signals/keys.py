"""Documents, and the hashes that tell apart of what, by whom and how a signal was taken."""

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from limbeck.core.errors import BadInput

__all__ = ["Document", "digest", "documents_of", "text_fingerprint", "tokenizer_fingerprint"]

PROBE = "The 3 quick brown foxes\n\tjumped - naïvely - over 1,234 lazy dogs; «ça va?» 你好 🙂 def f(x): return x**2"


@dataclass(frozen=True)
class Document:
    """A text as the teacher reads it, whole.

    id: whole number >= 0 by which its signals are found, whatever the order. tokens: [L] ids, template applied. mask:
    [L - 1] True where the token that follows is to be learned (an answer, not its prompt); None for everywhere.
    text: what the tokens were made from, if known: it lets a store say whether text or tokenizer changed.
    """

    id: int
    tokens: Tensor
    mask: Tensor | None = None
    text: str | None = None

    @property
    def places(self) -> int:
        """Places that predict a token: one less than there are tokens."""
        return max(0, len(self.tokens) - 1)

    @property
    def asked(self) -> NDArray[np.int64]:
        """The places whose signals count."""
        if self.mask is None:
            return np.arange(self.places)
        return np.flatnonzero(self.mask.numpy()[: self.places])


def _short(content: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little")


def digest(document: Document) -> tuple[int, int]:
    """Hashes of a document's tokens and places, and of its text (0 when not told)."""
    tokens = document.tokens.numpy().astype("<i8").tobytes()
    places = b"" if document.mask is None else document.asked.astype("<i8").tobytes()
    return _short(tokens + b"|" + places), 0 if document.text is None else _short(document.text.encode())


def text_fingerprint(ids: Iterable[int], digests: Iterable[int]) -> str:
    """Hash of a set of documents, whatever their order."""
    pairs = np.array(sorted(zip(ids, digests, strict=True)), "<u8")
    return hashlib.sha256(pairs.tobytes()).hexdigest()


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """Hash of what a tokenizer does: its symbols or its whole definition, and the ids that it gives a probing text."""
    inner = getattr(tokenizer, "inner", tokenizer)
    backend = getattr(inner, "backend_tokenizer", None)
    if backend is not None:
        told = str(backend.to_str())
    elif hasattr(inner, "get_vocab"):
        told = json.dumps(sorted(inner.get_vocab().items()))
    else:
        told = json.dumps(list(getattr(inner, "symbols", [])))
    size = getattr(tokenizer, "size", None) or len(inner)
    told += json.dumps([type(inner).__name__, size, list(map(int, tokenizer.encode(PROBE)))])
    return hashlib.sha256(told.encode()).hexdigest()


def documents_of(inputs: Tensor, labels: Tensor, mask: Tensor | None = None, *, first: int = 0) -> list[Document]:
    """One document a row of shifted stretches inputs, labels, mask [N, T]; its id is the row's number from `first` on.

    Masked places at the end are padding and left out; other masked places are read by the teacher and not asked for.
    """
    if inputs.shape != labels.shape or (mask is not None and mask.shape != labels.shape):
        raise BadInput(f"inputs {tuple(inputs.shape)} and labels {tuple(labels.shape)} must have one shape [N, T]")
    out: list[Document] = []
    for row in range(len(inputs)):
        valid = torch.ones_like(labels[row], dtype=torch.bool) if mask is None else mask[row].bool()
        length = int(valid.nonzero().max()) + 1 if valid.any() else 0
        if length and not torch.equal(inputs[row, 1:length], labels[row, : length - 1]):
            raise BadInput(f"row {row} is not shifted by one: labels must be the inputs one place further on")
        tokens = torch.cat([inputs[row, :length], labels[row, length - 1 : length]]) if length else inputs[row, :1]
        whole = bool(valid[:length].all())
        out.append(Document(first + row, tokens.long().cpu(), None if whole else valid[:length].cpu()))
    return out


def as_documents(documents: Sequence[Document] | Sequence[Sequence[int]]) -> Sequence[Document]:
    """Documents as they are; plain lists of token ids are numbered in their order."""
    if not len(documents) or isinstance(documents[0], Document):
        return documents  # type: ignore[return-value]
    return [Document(i, torch.as_tensor(d, dtype=torch.long)) for i, d in enumerate(documents)]
