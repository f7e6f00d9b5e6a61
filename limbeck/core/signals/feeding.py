"""Training batches that bring what the teacher said of them."""

import torch

from limbeck.core.batches import Batches, Enriched
from limbeck.core.nets import Batch
from limbeck.core.signals.kinds import Embedding
from limbeck.core.signals.reading import SignalStore

__all__ = ["SignalBatches"]


class SignalBatches(Enriched):
    """Batches of a language table with what the teacher said at each of their positions.

    batches: of any order, size and rank. A batch that brings "document" and "place" [B, T] is read by these (packed
    rows); otherwise each row is the document that its "index" numbers, from place 0 on. The mask of the batch and that
    of the store both hold.
    """

    def __init__(self, batches: Batches, store: SignalStore) -> None:
        super().__init__(batches)
        self.store = store

    def __next__(self) -> Batch:
        batch = next(self.batches)
        if isinstance(self.store.kind, Embedding):
            return batch | self.store.read_documents(batch["index"])
        if "document" in batch:
            document, place = batch["document"], batch["place"]
        else:
            place = torch.arange(batch["inputs"].shape[1]).expand(batch["inputs"].shape[:2])
            document = batch["index"].cpu()[:, None].expand(place.shape)
        if "mask" in batch:
            document = torch.where(batch["mask"].bool().cpu(), document.cpu(), -1)
        return batch | self.store.read(document, place)
