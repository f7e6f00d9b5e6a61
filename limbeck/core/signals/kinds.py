"""What a store keeps of a place: draws, the likeliest tokens, everything, a hidden state; or one vector a document.

Each kind turns what a teacher gives into entries or rows, and these into the tensors that losses ask for.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from limbeck.core.card import require
from limbeck.core.errors import BadInput, nearest
from limbeck.core.maths import FLOOR, log_probs
from limbeck.core.signals.coding import Entries
from limbeck.core.signals.draws import draw, rounded, weight_of

__all__ = ["KINDS", "Embedding", "Full", "Hidden", "Kind", "Sampled", "TopK", "kind_of"]

RANGE = 16.0  # nats that the codes of a log-probability reach down
TAIL = 2048  # codes a nat of a tail mass
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
Ids = NDArray[np.int64]


@dataclass(frozen=True)
class Sampled:
    """Draws from the teacher with replacement, as distinct ids with unbiased weights (random-sampling distillation).

    rounds: draws a place, >= 1; 50 leave about 12 distinct ids. tau: they are drawn from p^tau, > 0; below 1 rare
    tokens come more often, with smaller weights. systematic: evenly spaced draws from one random start instead of
    independent ones: unbiased, too, with less variance.
    """

    rounds: int = 50
    tau: float = 1.0
    systematic: bool = False
    name: ClassVar[str] = "sampled"
    wants: ClassVar[str] = "logits"

    def check(self) -> None:
        """Raise ValueError when a knob is out of its range."""
        require(self.rounds >= 1, "rounds", self.rounds, ">= 1")
        require(self.tau > 0, "tau", self.tau, "> 0")

    @property
    def exact(self) -> bool:
        """Whether weights are counts over `rounds`."""
        return self.tau == 1

    @property
    def bits(self) -> int:
        """Of a value."""
        return 0 if self.exact else 8

    def entries(self, logits: Tensor, seed: int, document: int, places: Ids) -> Entries:
        """Entries of places [P] from logits [P, V]."""
        sizes, ids, counts, ratio = draw(
            log_probs(logits.float()), seed, document, places,
            rounds=self.rounds, tau=self.tau, systematic=self.systematic,
        )  # fmt: skip
        nothing = np.zeros(len(places), np.int64)
        if self.exact:
            return Entries(sizes, ids, counts, np.zeros_like(ids), nothing)
        where = np.stack([np.repeat(places, sizes), ids])
        codes = rounded(counts / self.rounds * ratio, seed, document, where)
        return Entries(sizes, ids, np.ones_like(ids), codes, nothing)

    def values(self, entries: Entries) -> NDArray[np.float64]:
        """Weights [E]."""
        return entries.counts / self.rounds if self.exact else weight_of(entries.values)


@dataclass(frozen=True)
class TopK:
    """The k likeliest tokens with their log-probabilities over the whole vocabulary.

    k: >= 1. tail: keep also the probability outside them. bits: of a log-probability, 4 to 16 (16 nats in 2^bits
    steps) or 32 (exact).
    """

    k: int = 64
    tail: bool = True
    bits: int = 8
    name: ClassVar[str] = "topk"
    wants: ClassVar[str] = "logits"

    def check(self) -> None:
        """Raise ValueError when a knob is out of its range."""
        require(self.k >= 1, "k", self.k, ">= 1")
        require(4 <= self.bits <= 16 or self.bits == 32, "bits", self.bits, "4 to 16, or 32")

    def entries(self, logits: Tensor, seed: int, document: int, places: Ids) -> Entries:
        """Entries of places [P] from logits [P, V]."""
        kept, ids = log_probs(logits.float()).topk(min(self.k, logits.shape[-1]), -1)
        tail = 1 - kept.double().exp().sum(-1)
        sizes = np.full(len(places), ids.shape[-1], np.int64)
        return self.of(sizes, ids.flatten().cpu().numpy(), kept.flatten().cpu().numpy(), tail.cpu().numpy())

    def of(self, sizes: Ids, ids: Ids, logprobs: NDArray[Any], tail: NDArray[Any]) -> Entries:
        """Entries from log-probabilities [E] and tail masses [P]."""
        if self.bits == 32:
            codes = logprobs.astype(np.float32).view(np.uint32).astype(np.int64)
        else:
            step, top = RANGE / 2**self.bits, 2**self.bits - 1
            codes = np.clip(np.rint(-logprobs / step), 0, top).astype(np.int64)
        nats = -np.log(np.clip(tail, 1e-13, 1))
        tails = np.clip(np.rint(nats * TAIL), 0, 2**16 - 1).astype(np.int64) * self.tail
        return Entries(sizes, ids, np.ones_like(ids), codes, tails)

    def values(self, entries: Entries) -> NDArray[np.float64]:
        """Log-probabilities [E], rounded; with a tail they are moved together so that all of a place sums to 1."""
        if self.bits == 32:
            logprobs = entries.values.astype(np.uint32).view(np.float32).astype(np.float64)
        else:
            logprobs = entries.values * (-RANGE / 2**self.bits)
        if not self.tail:
            return logprobs
        place = np.repeat(np.arange(len(entries.sizes)), entries.sizes)
        mass = np.bincount(place, np.exp(logprobs), len(entries.sizes))
        head = np.log1p(-np.minimum(self.outside(entries), 1 - 1e-9))
        moved: NDArray[np.float64] = logprobs + (head - np.log(np.maximum(mass, 1e-30)))[place]
        return np.minimum(moved, 0.0)

    def outside(self, entries: Entries) -> NDArray[np.float64]:
        """Tail masses [P]; what is below the smallest code is 0."""
        return np.where(entries.tails == 2**16 - 1, 0.0, np.exp(-entries.tails / TAIL))


@dataclass(frozen=True)
class Full:
    """Log-probabilities of the whole vocabulary. bits: 8, 16 or 32 for each (1/16 nat, 1/2048 nat, exact)."""

    bits: int = 16
    name: ClassVar[str] = "full"
    wants: ClassVar[str] = "logits"

    def check(self) -> None:
        """Raise ValueError when a knob is out of its range."""
        require(self.bits in (8, 16, 32), "bits", self.bits, "8, 16 or 32")

    def row(self, width: int) -> tuple[np.dtype[Any], int]:
        """Type and number of what is kept a place, from what the teacher gives."""
        return np.dtype({8: "<u1", 16: "<u2", 32: "<f4"}[self.bits]), width

    def encode(self, given: Tensor) -> NDArray[Any]:
        """Rows [P, V] from logits [P, V]."""
        logprobs = log_probs(given.float()).cpu().numpy()
        if self.bits == 32:
            return logprobs
        steps, top = {8: 16, 16: 2048}[self.bits], 2**self.bits - 1
        coded: NDArray[Any] = np.clip(np.rint(-logprobs * steps), 0, top).astype(self.row(0)[0])
        return coded

    def decode(self, rows: NDArray[Any]) -> Tensor:
        """Log-probabilities [P, V]."""
        values = torch.from_numpy(rows.astype(np.float32))
        return values if self.bits == 32 else values / -{8: 16, 16: 2048}[self.bits]


@dataclass(frozen=True)
class Hidden:
    """The teacher's last hidden state, the input of its head. dtype: float32, bfloat16 or float16."""

    dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"
    name: ClassVar[str] = "hidden"
    wants: ClassVar[str] = "hidden"

    def check(self) -> None:
        """Raise ValueError when a knob is out of its range."""
        require(self.dtype in DTYPES, "dtype", self.dtype, " or ".join(DTYPES))

    def row(self, width: int) -> tuple[np.dtype[Any], int]:
        """Type and number of what is kept a place."""
        return np.dtype("<f4" if self.dtype == "float32" else "<u2"), width

    def encode(self, given: Tensor) -> NDArray[Any]:
        """Rows [P, D] from hidden states [P, D]."""
        kept = given.to(DTYPES[self.dtype]).cpu().contiguous()
        coded: NDArray[Any] = (kept if self.dtype == "float32" else kept.view(torch.uint16)).numpy()
        return coded

    def decode(self, rows: NDArray[Any]) -> Tensor:
        """Hidden states [P, D], in the kept dtype."""
        bits = torch.from_numpy(np.ascontiguousarray(rows))
        return bits if self.dtype == "float32" else bits.view(DTYPES[self.dtype])


@dataclass(frozen=True)
class Embedding(Hidden):
    """One vector a document. dtype: float32, bfloat16 or float16."""

    dtype: Literal["float32", "bfloat16", "float16"] = "float16"
    name: ClassVar[str] = "embedding"
    wants: ClassVar[str] = "emb"


Sparse = Sampled | TopK
Kind = Sampled | TopK | Full | Hidden | Embedding
KINDS: Mapping[str, type[Any]] = {k.name: k for k in (Sampled, TopK, Full, Hidden, Embedding)}


def kind_of(spec: str | Mapping[str, Any] | Kind) -> Kind:
    """A kind from its name, or from {name: {knob: value}} as recipes write it."""
    if isinstance(spec, (str, Mapping)):
        name, given = (spec, {}) if isinstance(spec, str) else next(iter(spec.items()))
        if name not in KINDS:
            raise BadInput(f"no kind of signal {name!r}{nearest(str(name), KINDS)}")
        known = [f.name for f in fields(KINDS[name])]
        for key in given or {}:
            if key not in known:
                raise BadInput(f"{name} has no option {key!r}{nearest(str(key), known)}")
        spec = KINDS[name](**(given or {}))
    spec.check()  # type: ignore[union-attr]
    return spec  # type: ignore[return-value]


def spec_of(kind: Kind) -> dict[str, dict[str, Any]]:
    """The inverse of `kind_of`."""
    return {kind.name: asdict(kind)}


def padded(values: NDArray[Any], sizes: Ids, width: int, filler: float | int, dtype: torch.dtype) -> Tensor:
    """Flat values [E] of places with so many each -> [P, width], filled up."""
    inside = np.arange(width) < sizes[:, None]
    out = torch.full((len(sizes), width), filler, dtype=dtype)
    out[torch.from_numpy(inside)] = torch.from_numpy(np.ascontiguousarray(values)).to(dtype)
    return out


def tensors(kind: Sparse, entries: Entries) -> dict[str, Tensor]:
    """What losses ask for, [P, K] with K the most entries of a place; shorter places repeat their first id."""
    wide = max(1, int(entries.sizes.max(initial=0)))
    first = np.concatenate([entries.ids, [0]])[np.minimum(np.cumsum(entries.sizes) - entries.sizes, len(entries.ids))]
    ids = padded(entries.ids, entries.sizes, wide, -1, torch.long)
    ids = torch.where(ids < 0, torch.from_numpy(first)[:, None], ids)
    values = kind.values(entries)
    if isinstance(kind, Sampled):
        return {"teacher_ids": ids, "teacher_weights": padded(values, entries.sizes, wide, 0.0, torch.float32)}
    out = {"teacher_ids": ids, "teacher_logprobs": padded(values, entries.sizes, wide, FLOOR, torch.float32)}
    if kind.tail:
        out["teacher_tail"] = torch.from_numpy(kind.outside(entries)).float()
    return out
