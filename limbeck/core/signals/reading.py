"""What a teacher said, by document and place: the same for any order, batch size, packing, cut or rank."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from limbeck.core.errors import BadInput
from limbeck.core.maths import FLOOR
from limbeck.core.signals.coding import BLOCK, Entries, decode
from limbeck.core.signals.fidelity import Fidelity, report
from limbeck.core.signals.files import ENTRY, Index, Records, differs, stored_spec
from limbeck.core.signals.keys import Document, as_documents, digest, text_fingerprint
from limbeck.core.signals.kinds import Embedding, Hidden, Sampled, TopK, tensors
from limbeck.core.signals.sources import fingerprint_of
from limbeck.core.signals.writing import Coder, changed

__all__ = ["SignalStore", "SignalsInfo"]

Ids = NDArray[np.int64]
KEPT = 2**22  # entries that stay decoded in memory, a hundred megabytes: a small store is decoded once, not every epoch
LONG = 2**12  # places of a document that is never decoded as a whole


@dataclass(frozen=True)
class SignalsInfo:
    """What a store holds. kind: with its knobs. bytes: on disk, once-only tables and head apart in `fixed`.

    teacher, tokenizer, template, data: fingerprints, '' where not told.
    """

    folder: str
    kind: dict[str, dict[str, Any]]
    documents: int
    places: int
    vocab: int
    bytes: int
    fixed: int
    fidelity: Fidelity
    teacher: str
    tokenizer: str
    template: str
    data: str


class SignalStore:
    """Random access to teacher signals of documents. Open one with `SignalStore.open`."""

    def __init__(self, folder: Path, spec: dict[str, Any]) -> None:
        self.folder, self.spec, self.coder = folder, spec, Coder(folder, spec)
        self.kind, self.index = self.coder.kind, Index(folder)
        self.records = Records(self.index)
        self.decoded: dict[int, Entries] = {}
        self.room = KEPT

    @staticmethod
    def open(
        folder: str | Path,
        *,
        teacher: str | None = None,
        tokenizer: str | None = None,
        template: str | None = None,
        documents: Sequence[Document] | None = None,
    ) -> "SignalStore":
        """Open a whole store. Raises BadInput when it is unfinished, damaged, stale or foreign, with what differs.

        teacher, tokenizer: fingerprints. template: its text. documents: what is to be trained on.
        """
        folder = Path(folder)
        spec = stored_spec(folder)
        if not spec.get("complete"):
            have = len(Index(folder).entries)
            raise BadInput(f"the store {folder} is not finished ({have} documents so far); run its capture again")
        hashed = template and hashlib.sha256(template.encode()).hexdigest()
        told = {"teacher": teacher, "tokenizer": tokenizer, "template": hashed}
        if other := differs(spec, {key: value for key, value in told.items() if value is not None}):
            raise BadInput(f"the store {folder} is stale: {other}; capture it again")
        store = SignalStore(folder, spec)
        if len(store.index.entries) < spec["documents"]:
            raise BadInput(
                f"the store {folder} is damaged: {len(store.index.entries)} of {spec['documents']} documents are "
                "whole; run its capture again to mend it"
            )
        if documents is not None:
            store.check(documents)
        return store

    def check(self, documents: Sequence[Document]) -> None:
        """Raise BadInput, with what differs, unless all of these documents are here as the teacher read them."""
        documents = as_documents(documents)
        rows = self.index.find(np.array([d.id for d in documents]))
        if (rows < 0).any():
            lacking = documents[int(np.argmax(rows < 0))].id
            raise BadInput(
                f"the store {self.folder} lacks {int((rows < 0).sum())} of {len(documents)} documents, the first of "
                f"them {lacking}; run its capture again with these documents"
            )
        reasons = [(d.id, changed(self.index.entries[row], digest(d))) for d, row in zip(documents, rows, strict=True)]
        wrong = [(i, why) for i, why in reasons if why]
        if wrong:
            raise BadInput(
                f"the store {self.folder} is stale: {len(wrong)} of {len(documents)} documents differ, the first of "
                f"them number {wrong[0][0]} ({wrong[0][1]}); capture it again"
            )

    def info(self) -> SignalsInfo:
        """Sizes and fidelity."""
        sizes = {p.name: p.stat().st_size for p in self.folder.iterdir()}
        fixed = sum(size for name, size in sizes.items() if not name.startswith(("index-", "signals-")))
        entries, s = self.index.entries, self.spec
        return SignalsInfo(
            str(self.folder), s["kind"], len(entries), int(entries["asked"].sum()), s["vocab"], sum(sizes.values()),
            fixed, report(entries, ENTRY.itemsize), s["teacher"], s["tokenizer"], s["template"],
            text_fingerprint(entries["document"].tolist(), entries["tokens"].tolist()),
        )  # fmt: skip

    # ---- access ------------------------------------------------------------------------------------------------------
    def _rows(self, documents: Ids) -> Ids:
        rows = self.index.find(documents)
        if (rows < 0).any():
            lacking = int(documents[np.argmax(rows < 0)])
            raise BadInput(
                f"the store {self.folder} holds {len(self.index.entries)} documents, but not number {lacking}"
            )
        return rows

    def read(self, document: Tensor, place: Tensor) -> dict[str, Tensor]:
        """What the teacher said at each position of a batch.

        document: [B, T] the document that a position belongs to, -1 for padding. place: [B, T] its place in that
        document; place t is where token t + 1 is predicted, so that of inputs = tokens[:, :-1] it is 0, 1, 2 ...
        A row may hold several documents, parts of them, or pieces in any order.

        "mask" [B, T], True where there is a signal, and by kind: "teacher_ids", "teacher_weights" [B, T, K] (sampled);
        "teacher_ids", "teacher_logprobs" [B, T, K], "teacher_tail" [B, T] (topk); "teacher_logits" [B, T, V] (full);
        "teacher_hidden" [B, T, D] (hidden). K is the most entries of a place in this batch.
        """
        shape = document.shape
        documents, places = document.reshape(-1).cpu().numpy(), place.reshape(-1).cpu().numpy()
        at = np.flatnonzero(documents >= 0)
        unique, which = np.unique(documents[at], return_inverse=True)
        rows = self._rows(unique)
        entries = self.index.entries[rows]
        wrong = (places[at] < 0) | (places[at] >= entries["places"][which].astype(np.int64))
        if wrong.any():
            bad = int(np.argmax(wrong))
            raise BadInput(
                f"document {int(documents[at[bad]])} has the places 0 to {int(entries['places'][which[bad]]) - 1}, "
                f"asked for is {int(places[at[bad]])}"
            )
        contents, numbers = self._numbered(rows, which, places[at])
        at, which, numbers = at[numbers >= 0], which[numbers >= 0], numbers[numbers >= 0]
        if isinstance(self.kind, (Sampled, TopK)):
            found = tensors(self.kind, self._entries(rows, contents, entries["asked"].astype(np.int64), which, numbers))
        else:
            found = self._dense(contents, which, numbers)
        mask = torch.zeros(len(documents), dtype=torch.bool)
        mask[torch.from_numpy(at)] = True
        out = {"mask": mask.view(shape)}
        for name, values in found.items():
            full = values
            if len(at) < len(documents):
                filler = FLOOR if name == "teacher_logprobs" else 0
                full = values.new_full((len(documents), *values.shape[1:]), filler)
                full[torch.from_numpy(at)] = values
            out[name] = full.view(*shape, *values.shape[1:])
        return out

    def read_documents(self, document: Tensor) -> dict[str, Tensor]:
        """Whole documents [B], padded to the longest: like `read`; "teacher_emb" [B, D] of a store of embeddings."""
        rows = self._rows(document.cpu().numpy())
        if isinstance(self.kind, Embedding):
            dtype, width = self.kind.row(self.coder.width)
            vectors = np.stack([np.frombuffer(self.records[int(r)], dtype, width) for r in rows])
            return {"teacher_emb": self.kind.decode(vectors)}
        long = torch.from_numpy(self.index.entries["places"][rows].astype(np.int64))
        place = torch.arange(int(long.max())).expand(len(rows), -1)
        return self.read(torch.where(place < long[:, None], document.cpu()[:, None], -1), place)

    def head(self) -> dict[str, Any]:
        """The teacher's head that goes with hidden states: "teacher_head" [V, D], and where it has them
        "teacher_head_bias" [V], "teacher_head_scale" and "teacher_head_softcap" (numbers)."""
        path = self.folder / "head.safetensors"
        try:
            tensors_ = load_file(path)
        except (OSError, SafetensorError) as error:
            raise BadInput(f"{path} is missing or damaged ({error}); a store of hidden states needs it") from error
        if fingerprint_of(tensors_) != self.spec["head"]["fingerprint"]:
            raise BadInput(f"{path} is not the head that the hidden states were captured with; capture them again")
        out: dict[str, Any] = {"teacher_head": tensors_["weight"]}
        if "bias" in tensors_:
            out["teacher_head_bias"] = tensors_["bias"]
        told = {"teacher_head_scale": self.spec["head"]["scale"], "teacher_head_softcap": self.spec["head"]["softcap"]}
        return out | {key: float(value) for key, value in told.items() if value is not None}

    def _numbered(self, rows: Ids, which: Ids, places: Ids) -> tuple[list[NDArray[np.uint8]], Ids]:
        """The signals of some documents, and where among them each place's are; -1 where it was not asked for."""
        contents, numbers = [], places.copy()
        for i, row in enumerate(rows):
            content, entry = self.records[int(row)], self.index.entries[row]
            total = int(entry["places"])
            if int(entry["asked"]) < total:
                size = -(-total // 8)
                flags = np.unpackbits(content[:size], count=total)
                number = np.where(flags, np.cumsum(flags, dtype=np.int64) - 1, -1)
                mine = which == i
                numbers[mine] = number[places[mine]]
                content = content[size:]
            contents.append(content)
        return contents, numbers

    def _dense(self, contents: list[NDArray[np.uint8]], which: Ids, numbers: Ids) -> dict[str, Tensor]:
        if isinstance(self.kind, Embedding):
            raise BadInput(f"{self.folder} holds one vector a document and nothing a place: use `read_documents`")
        assert not isinstance(self.kind, (Sampled, TopK))
        dtype, width = self.kind.row(self.coder.width)
        rows = np.empty((len(which), width), dtype)
        for i, content in enumerate(contents):
            mine = which == i
            rows[mine] = np.frombuffer(content, dtype).reshape(-1, width)[numbers[mine]]
        return {"teacher_hidden" if isinstance(self.kind, Hidden) else "teacher_logits": self.kind.decode(rows)}

    def _entries(self, rows: Ids, contents: list[NDArray[np.uint8]], asked: Ids, which: Ids, numbers: Ids) -> Entries:
        """Entries of the places `numbers` of the documents `which`, in that order; from memory while there is room."""
        new = [i for i, row in enumerate(rows) if int(row) not in self.decoded]
        size = int(self.index.entries["kept"][rows[new]].sum())
        if not len(rows) or size > self.room or asked.max() > LONG:
            return self._decode(contents, asked, which, numbers)
        self.room -= size
        if new:
            some, count = asked[new], np.cumsum(asked[new])
            owner = np.repeat(np.arange(len(new)), some)
            within = np.arange(len(owner)) - (count - some)[owner]
            whole = self._decode([contents[i] for i in new], some, owner, within)
            for i, stop in zip(new, count.tolist(), strict=True):
                self.decoded[int(rows[i])] = whole.rows(stop - int(asked[i]), stop)
        parts = [self.decoded[int(row)] for row in rows]
        joined = Entries(*(np.concatenate([getattr(p, f) for p in parts]) for f in Entries.__dataclass_fields__))
        return _pick(joined, (np.cumsum(asked) - asked)[which] + numbers)

    def _decode(self, contents: list[NDArray[np.uint8]], asked: Ids, which: Ids, numbers: Ids) -> Entries:
        """The same from the bytes."""
        wanted, back = np.unique(which * 2**32 + numbers // BLOCK, return_inverse=True)
        owner, block = np.divmod(wanted, 2**32)
        counts = -(-asked // BLOCK)
        slices, places = [], np.minimum(BLOCK, asked[owner] - block * BLOCK)
        for i, b in zip(owner, block, strict=True):
            content = contents[i]
            ends = np.frombuffer(content[: 4 * counts[i]], "<u4")
            base = 4 * int(counts[i])
            slices.append(content[base + (int(ends[b - 1]) if b else 0) : base + int(ends[b])])
        sizes = np.array([len(s) for s in slices], np.int64)
        data = np.concatenate(slices) if slices else np.zeros(0, np.uint8)
        whole = decode(data, np.cumsum(sizes) - sizes, places, self.coder.layout, self.coder.book)
        first = np.cumsum(places) - places
        return _pick(whole, first[back] + numbers % BLOCK)


def _pick(entries: Entries, places: Ids) -> Entries:
    """Some places, in the order given."""
    if len(places) == len(entries.sizes) and (places == np.arange(len(places))).all():
        return entries
    sizes = entries.sizes[places]
    begins = (np.cumsum(entries.sizes) - entries.sizes)[places]
    flat = np.repeat(begins - (np.cumsum(sizes) - sizes), sizes) + np.arange(int(sizes.sum()))
    return Entries(sizes, entries.ids[flat], entries.counts[flat], entries.values[flat], entries.tails[places])
