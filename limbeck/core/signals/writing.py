"""Capture: ask the teacher about every document that the store lacks, and append what it says.

The teacher is always asked about the same groups of documents, and draws depend on (seed, document, place) alone, so a
capture that was killed and called again leaves the bytes that an undisturbed one leaves.
"""

import hashlib
import shutil
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from limbeck.core.card import require
from limbeck.core.errors import BadInput
from limbeck.core.headloss import Head
from limbeck.core.maths import log_probs
from limbeck.core.signals.coding import Codebook, Entries, Layout, encode, symbols
from limbeck.core.signals.fidelity import of_dense, of_sparse
from limbeck.core.signals.files import FORMAT, Index, Log, differs, stored_spec
from limbeck.core.signals.keys import Document, as_documents, digest, text_fingerprint
from limbeck.core.signals.kinds import Embedding, Full, Hidden, Kind, Sampled, TopK, kind_of, spec_of
from limbeck.core.signals.sources import Given, Local, Source
from limbeck.core.store import write_spec

__all__ = ["Coder", "capture", "changed"]

SLAB = 128  # places whose distributions are worked on at a time
COUNTED = 2**24  # tokens that the order of ids is taken from, at most
Event = Callable[[dict[str, Any]], None]


def capture(
    teacher: nn.Module | Source,
    documents: Sequence[Document] | Sequence[Sequence[int]],
    folder: str | Path,
    *,
    kind: str | dict[str, Any] | Kind = "sampled",
    tokenizer: str = "",
    template: str = "",
    seed: int = 0,
    batch_size: int = 8,
    rank: int = 0,
    world: int = 1,
    on_event: Event | None = None,
) -> Path:
    """Keep what the teacher says of every place of the documents, in `folder`. Returns the folder.

    Called again with the same arguments after a kill, it does what is missing and leaves the same bytes. Called with
    more documents, it adds these. A store of another teacher, tokenizer, template, kind or seed is refused, and so is
    a document that has changed.

    teacher: a network, or any `Source`. documents: `Document`s, or lists of token ids, numbered in their order.
    kind: see `kinds`; a name, {name: {knob: value}}, or an object. tokenizer: its fingerprint, and template: its text,
    to refuse others by. batch_size: documents asked about at once. rank, world: which process this is, of how many;
    each writes files of its own. on_event: told {"done", "documents"} after each group.
    """
    require(batch_size >= 1, "batch_size", batch_size, ">= 1")
    require(0 <= rank < world, "rank", rank, f"below `world`, which is {world}")
    folder, kind, documents = Path(folder), kind_of(kind), as_documents(documents)
    source: Source = Local(teacher) if isinstance(teacher, nn.Module) else teacher
    if not len(documents):
        raise BadInput("there is nothing to capture: there are no documents")
    asked = {
        "signals": FORMAT, "kind": spec_of(kind), "seed": seed, "teacher": source.fingerprint, "tokenizer": tokenizer,
        "template": hashlib.sha256(template.encode()).hexdigest() if template else "",
    }  # fmt: skip
    ready: dict[int, Given] = {}
    if not (folder / "store.json").exists():
        ready = _create(folder, asked, kind, source, documents, batch_size, rank)
    spec = stored_spec(folder)
    if other := differs(spec, asked):
        raise BadInput(f"{folder} holds another capture: {other}; delete the folder or choose another")
    coder = Coder(folder, spec)
    done, digests = 0, []
    seen: set[int] = set()
    with Log(folder, rank) as log:
        index = Index(folder)
        for number, start in enumerate(range(0, len(documents), batch_size)):
            group = [documents[i] for i in range(start, min(start + batch_size, len(documents)))]
            keys = [digest(d) for d in group]
            digests += [(d.id, key[0]) for d, key in zip(group, keys, strict=True)]
            seen |= {d.id for d in group}
            if len(seen) < len(digests):
                raise BadInput(f"two documents have the same id, one of {sorted(d.id for d in group)}")
            missing = _missing(folder, index, group, keys)
            if missing and number % world == rank:
                wanted = [group[i] for i in missing] if source.alone else group
                given = ready or dict(zip((d.id for d in wanted), source.ask(wanted, kind), strict=True))
                records = [coder.record(group[i], keys[i], given[group[i].id], seed) for i in missing]
                log.append(records)
            ready = {}
            done += len(group)
            if on_event is not None:
                on_event({"done": done, "documents": len(documents)})
    there = Index(folder)
    if (there.find(np.array([i for i, _ in digests])) >= 0).all():
        figures = {"documents": len(digests), "data": text_fingerprint(*zip(*digests, strict=True))}
        write_spec(folder, {**spec, **figures, "complete": True})
    return folder


def _missing(folder: Path, index: Index, group: Sequence[Document], keys: Sequence[tuple[int, int]]) -> list[int]:
    """Which of a group are still to be captured. Refuses documents that have changed."""
    rows = index.find(np.array([d.id for d in group]))
    for row, document, key in zip(rows, group, keys, strict=True):
        if row >= 0 and (why := changed(index.entries[row], key)):
            raise BadInput(
                f"{folder} was captured from other data: document {document.id} has changed ({why}); "
                "delete the folder or choose another"
            )
    return [i for i, row in enumerate(rows) if row < 0]


def changed(entry: NDArray[Any], key: tuple[int, int]) -> str:
    """What differs between a record and a document: '' when nothing."""
    if int(entry["tokens"]) == key[0]:
        return ""
    if 0 in (int(entry["text"]), key[1]):
        return "its tokens or mask are not those that the teacher read"
    same = int(entry["text"]) == key[1]
    return (
        "the same text gives other tokens or another mask: tokenizer or template changed"
        if same
        else "its text is another"
    )


# ---- a new store -----------------------------------------------------------------------------------------------------
def _create(
    folder: Path,
    asked: dict[str, Any],
    kind: Kind,
    source: Source,
    documents: Sequence[Document],
    batch_size: int,
    rank: int,
) -> dict[int, Given]:
    """Write down what the store is of and how it is written, from its first group, under its name only when whole.

    Returns what the teacher said of that group, so that it need not be asked again.
    """
    if folder.exists() and any(folder.iterdir()) and not (folder / "store.json").exists():
        raise BadInput(f"{folder} holds other files; a store needs a folder of its own")
    group = [documents[i] for i in range(min(batch_size, len(documents)))]
    given = list(source.ask(group, kind))
    wide = [g.shape[-1] for g in given if isinstance(g, Tensor)]
    vocab = source.vocab or (wide[0] if kind.wants == "logits" and wide else 0)
    spec = {**asked, "vocab": vocab, "width": wide[0] if wide else 0, "complete": False}
    draft = folder.with_name(f".{folder.name}.draft-{rank}")
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(parents=True)
    if isinstance(kind, (Sampled, TopK)):
        order = _order(documents, vocab)
        np.save(draft / "order.npy", order.astype(np.int32))
        layout = Layout(_count_classes(kind), kind.bits, isinstance(kind, TopK) and kind.tail, order)
        counts = np.zeros((layout.contexts, layout.symbols), np.int64)
        for document, g in zip(group, given, strict=True):
            for entries, _ in _slabs(kind, document, g, asked["seed"]):
                counts += symbols(entries, layout, np.argsort(order))
        np.save(draft / "lengths.npy", Codebook.of(counts).lengths)
    elif isinstance(kind, Hidden) and not isinstance(kind, Embedding):
        if not isinstance(source, Local):
            raise BadInput("hidden states are kept of a network that is here, not of a server")
        tensors, spec["head"] = source.head(max(group, key=lambda d: d.places))
        save_file(tensors, draft / "head.safetensors")
    write_spec(draft, spec)
    try:
        if folder.exists():
            folder.rmdir()
        draft.rename(folder)
    except OSError:  # another process was faster, and made the same
        shutil.rmtree(draft, ignore_errors=True)
    return {d.id: g for d, g in zip(group, given, strict=True)}


def _count_classes(kind: Sampled | TopK) -> int:
    return kind.rounds.bit_length() if isinstance(kind, Sampled) and kind.exact else 1


def _order(documents: Sequence[Document], vocab: int) -> NDArray[np.int64]:
    """Token ids from frequent to rare in the documents; those that do not occur last, in their own order."""
    counts, seen = np.zeros(vocab, np.int64), 0
    for i in range(len(documents)):
        tokens = documents[i].tokens.numpy()
        if len(tokens) and not 0 <= tokens.min() <= tokens.max() < vocab:
            raise BadInput(
                f"document {documents[i].id} has token id {tokens.max()}, but the teacher knows ids 0 to {vocab - 1}"
            )
        counts += np.bincount(tokens, minlength=vocab)
        seen += len(tokens)
        if seen >= COUNTED:
            break
    return np.argsort(-counts, kind="stable")


def _slabs(
    kind: Sampled | TopK, document: Document, given: Given, seed: int
) -> Iterator[tuple[Entries, Tensor | None]]:
    """Entries of a document, a stretch of places at a time, and the logits that they are of."""
    if isinstance(given, Entries):
        yield given, None
        return
    places = document.asked
    for start in range(0, len(places), SLAB):
        part = given[start : start + SLAB]
        yield kind.entries(part, seed, document.id, places[start : start + SLAB]), part


# ---- records ---------------------------------------------------------------------------------------------------------
class Coder:
    """Turns what a teacher gives into records, by the settings of a store."""

    def __init__(self, folder: Path, spec: dict[str, Any]) -> None:
        self.kind = kind_of(spec["kind"])
        self.width = int(spec["width"])
        if isinstance(self.kind, (Sampled, TopK)):
            order = np.load(folder / "order.npy", allow_pickle=False).astype(np.int64)
            tail = isinstance(self.kind, TopK) and self.kind.tail
            self.layout = Layout(_count_classes(self.kind), self.kind.bits, tail, order)
            self.ranks = np.argsort(order)
            self.book = Codebook(np.load(folder / "lengths.npy", allow_pickle=False))
        self.folder, self.head_told = folder, spec.get("head")

    @cached_property
    def head(self) -> Callable[[Tensor], Tensor] | None:
        """Logits of hidden states, by the head that goes with them."""
        if self.head_told is None:
            return None
        tensors = {key: value.float() for key, value in load_file(self.folder / "head.safetensors").items()}
        weight, bias = tensors["weight"], tensors.get("bias")
        scale, softcap = self.head_told["scale"] or 1.0, self.head_told["softcap"]
        return lambda hidden: Head(hidden, weight, bias, scale, softcap).logits()

    def record(self, document: Document, key: tuple[int, int], given: Given, seed: int) -> tuple[bytes, dict[str, Any]]:
        """The bytes of a document's signals, and its index entry."""
        asked = document.asked
        fields: dict[str, Any] = {
            "document": document.id, "tokens": key[0], "text": key[1], "places": document.places, "asked": len(asked)
        }  # fmt: skip
        which = b""
        if len(asked) < document.places and self.kind.name != "embedding":
            flags = np.zeros(document.places, bool)
            flags[asked] = True
            which = np.packbits(flags).tobytes()
        if isinstance(self.kind, (Sampled, TopK)):
            content, told = self._sparse(document, given, seed)
        else:
            content, told = self._dense(given)
        return which + content, {**fields, **told}

    def _sparse(self, document: Document, given: Given, seed: int) -> tuple[bytes, dict[str, Any]]:
        assert isinstance(self.kind, (Sampled, TopK))
        sums: dict[str, float] = {}
        parts: list[Entries] = []
        for entries, logits in _slabs(self.kind, document, given, seed):
            nothing = dict.fromkeys(("mass", "kl", "bias", "bias2", "spread"), float("nan"))
            told = nothing if logits is None else of_sparse(self.kind, entries, logits)
            sums = {key: sums.get(key, 0.0) + value for key, value in told.items()}
            parts.append(entries)
        if not parts:
            return b"", {}
        whole = Entries(*(np.concatenate([getattr(p, f) for p in parts]) for f in Entries.__dataclass_fields__))
        if len(whole.sizes) != len(document.asked):
            raise BadInput(
                f"the source gave {len(whole.sizes)} places of document {document.id}, which asks for "
                f"{len(document.asked)}"
            )
        blocks, spent = encode(whole, self.layout, self.ranks, self.book)
        ends = np.cumsum([len(b) for b in blocks]).astype("<u4").tobytes()
        return ends + b"".join(blocks), {**sums, **spent, "kept": len(whole.ids)}

    def _dense(self, given: Given) -> tuple[bytes, dict[str, Any]]:
        assert isinstance(given, Tensor) and not isinstance(self.kind, (Sampled, TopK))
        rows = self.kind.encode(given)
        told: dict[str, Any] = {"values": 8 * rows.nbytes}
        if isinstance(self.kind, Full):
            told |= {**of_dense(given, self.kind.decode(rows)), "kept": rows.size}
        elif self.head is not None:
            told |= self._through_head(given.cpu().float(), self.kind.decode(rows).float())
        return rows.tobytes(), told

    def _through_head(self, given: Tensor, again: Tensor) -> dict[str, float]:
        """Fidelity of hidden states [P, D]: of the distributions that the head makes of them, a stretch at a time."""
        assert self.head is not None
        sums: dict[str, float] = {}
        for start in range(0, len(given), SLAB):
            part = slice(start, start + SLAB)
            told = of_dense(self.head(given[part]), log_probs(self.head(again[part])))
            sums = {key: sums.get(key, 0.0) + value for key, value in told.items()}
        return sums
