"""A language table as documents, and its training batches with what the teacher said of them."""

from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor

from limbeck.core.batches import Batches, Enriched, Table
from limbeck.core.card import require
from limbeck.core.errors import BadInput
from limbeck.core.nets import Batch, apart
from limbeck.core.signals.keys import Document, documents_of
from limbeck.core.signals.kinds import Embedding, Hidden, Kind
from limbeck.core.signals.reading import SignalStore

__all__ = ["SignalBatches", "documents_in"]


def documents_in(table: Table, kind: Kind) -> list[Document]:
    """The texts of a table as the teacher reads them: for kinds that speak of every place the tokens of a language
    table (its inputs and the last label), for embeddings the inputs without their padding.

    A row is the document of its number; of packed rows each of their `segments` is a document, see `_where`.
    """
    if table.kind != "tokens":
        raise BadInput(f"a store of kind `{kind.name}` is of texts, and {table.name} holds {table.kind}")
    inputs, labels = table["inputs"].cpu(), table.columns.get("labels")
    if isinstance(kind, Embedding) and "segments" in table.columns:
        raise BadInput(f"one vector a text cannot be kept of {table.name}, whose rows are packed with several")
    if isinstance(kind, Embedding):
        real = table.columns.get("attention_mask", table.columns.get("mask"))
        lengths = [inputs.shape[1]] * len(inputs) if real is None else [_length(row) for row in real.cpu()]
        return [Document(i, row[:length].long()) for i, (row, length) in enumerate(zip(inputs, lengths, strict=True))]
    if labels is None or labels.shape != inputs.shape:
        raise BadInput(
            f"a store of kind `{kind.name}` keeps what is said at every place, and the labels of {table.name} are no "
            "next tokens"
        )
    labels, mask = labels.cpu(), table.columns.get("mask")
    mask = None if mask is None else mask.cpu()
    if "segments" not in table.columns:
        return documents_of(inputs, labels, mask)
    numbers, _ = _where(torch.arange(len(inputs)), table["segments"].cpu())
    found: list[Document] = []
    for row, (texts, count) in enumerate(torch.unique_consecutive(n, return_counts=True) for n in numbers):
        ends = count.cumsum(0).tolist()
        for number, start, end in zip(texts.tolist(), [0, *ends[:-1]], ends, strict=True):
            if number >= 0:
                at = (slice(row, row + 1), slice(start, end))
                found += documents_of(inputs[at], labels[at], None if mask is None else mask[at], first=number)
    return found


def _where(index: Tensor, segments: Tensor) -> tuple[Tensor, Tensor]:
    """Documents and places [B, T] of packed rows: a text is called by the place where it begins, counted through all
    rows; -1 for padding."""
    place = apart(segments)["position_ids"]
    start = torch.arange(segments.shape[1]) - place
    return torch.where(segments >= 0, index[:, None] * segments.shape[1] + start, -1), place


def _length(real: Tensor) -> int:
    return max(1, int(real.nonzero().max()) + 1 if real.any() else 1)


class SignalBatches(Enriched):
    """Batches of a language table with what the teacher said at each of their positions.

    batches: of any order, size and rank. A batch that brings "document" and "place" [B, T] is read by these, one with
    "segments" by the texts that share its rows; otherwise each row is the document that its "index" numbers, from place
    0 on. The mask of the batch and that of the store both hold. ahead: batches that are read while the student still
    trains on another, >= 0. device: where the head that goes with hidden states is put, once.
    """

    def __init__(
        self, batches: Batches, store: SignalStore, *, ahead: int = 2, device: torch.device | str = "cpu"
    ) -> None:
        require(ahead >= 0, "ahead", ahead, ">= 0")
        super().__init__(batches)
        self.store, self.ahead = store, ahead
        dense = isinstance(store.kind, Hidden) and not isinstance(store.kind, Embedding)
        self.head = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in store.head().items()} if dense else {}
        self._served = batches.state_dict()
        self._pool: ThreadPoolExecutor | None = None
        self._coming: deque[tuple[dict[str, int], Future[Batch]]] = deque()

    @property
    def epoch(self) -> int:
        """The pass that the next batch belongs to."""
        return self._served["position"] // self.batches.steps_per_epoch

    def state_dict(self) -> dict[str, int]:
        """Where the stream stands, whatever has been read ahead."""
        return dict(self._served)

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on from there."""
        self._coming.clear()
        self.batches.load_state_dict(state)
        self._served = self.batches.state_dict()

    def __next__(self) -> Batch:
        if not self.ahead:
            batch = self._read(next(self.batches))
            self._served = self.batches.state_dict()
            return batch
        if self._pool is None:
            self._pool = ThreadPoolExecutor(1, "signals")
        while len(self._coming) <= self.ahead:
            plain = next(self.batches)
            self._coming.append((self.batches.state_dict(), self._pool.submit(self._read, plain)))
        self._served, reading = self._coming.popleft()
        return reading.result()

    def _read(self, batch: Batch) -> Batch:
        """The batch with its signals."""
        if isinstance(self.store.kind, Embedding):
            return batch | {k: v.float() for k, v in self.store.read_documents(batch["index"]).items()}
        if "segments" in batch:
            document, place = _where(batch["index"].cpu(), batch["segments"].cpu())
        elif "document" in batch:
            document, place = batch["document"], batch["place"]
        else:
            place = torch.arange(batch["inputs"].shape[1]).expand(batch["inputs"].shape[:2])
            document = batch["index"].cpu()[:, None].expand(place.shape)
        if "mask" in batch:
            document = torch.where(batch["mask"].bool().cpu(), document.cpu(), -1)
        return batch | self.store.read(document, place) | self.head
