"""Records on disk: appended whole or not at all, found by document id, checked when they are read.

A store is a folder with store.json (what it is of), order.npy and lengths.npy (how ids are written), head.safetensors
(for hidden states), and for each writing process a pair signals-NNN.bin, index-NNN.bin. A record is on disk before its
index entry is begun, and entries have a fixed size and a checksum: whatever moment a process is killed at, the entries
that are whole tell which records are, and what follows them is cut off.
"""

import os
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from limbeck.core.errors import BadInput, LimbeckError
from limbeck.core.signals.fidelity import PARTS, SUMS
from limbeck.core.store import brief, read_spec

try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None  # type: ignore[assignment]

__all__ = ["ENTRY", "FORMAT", "Index", "Log", "differs", "stored_spec"]

FORMAT = 1
ENTRY = np.dtype(
    [
        ("document", "<u8"), ("tokens", "<u8"), ("text", "<u8"), ("offset", "<u8"), ("size", "<u8"),
        ("places", "<u4"), ("asked", "<u4"), ("kept", "<u4"), ("sum", "<u4"),
        *[(part, "<u8") for part in PARTS], *[(key, "<f4") for key in SUMS], ("check", "<u4"),
    ]
)  # fmt: skip
Bytes = NDArray[np.uint8]


# ---- store.json ------------------------------------------------------------------------------------------------------
def stored_spec(folder: Path) -> dict[str, Any]:
    """The store.json of a store of documents; one clear sentence when it is of another kind or version."""
    spec = read_spec(folder)
    if spec.get("signals") != FORMAT:
        found = f"{folder / 'store.json'} is of format {spec.get('signals')!r}"
        raise BadInput(f"{found}, not {FORMAT}: no store of documents of this version")
    return spec


def differs(have: Mapping[str, Any], asked: Mapping[str, Any]) -> str:
    """What of `asked` is otherwise in `have`: '`teacher` was a..., is b...', all of it; '' when nothing."""
    other = [key for key, value in asked.items() if have.get(key) != value]
    return " and ".join(f"`{key}` was {brief(have.get(key))} there and is {brief(asked[key])} now" for key in other)


# ---- the index -------------------------------------------------------------------------------------------------------
def _check_of(entries: NDArray[Any]) -> NDArray[np.uint32]:
    """Checksum of every entry, over all but its own last field."""
    raw = np.ascontiguousarray(entries).view(np.uint8).reshape(len(entries), ENTRY.itemsize)[:, :-4]
    return np.array([zlib.crc32(row.tobytes()) for row in raw], np.uint32)


def _whole(index: Path, signals: Path) -> NDArray[Any]:
    """The entries of one part that are whole, and whose records are."""
    try:
        raw = index.read_bytes()
        there = signals.stat().st_size
    except OSError:
        return np.zeros(0, ENTRY)
    entries = np.frombuffer(raw[: len(raw) // ENTRY.itemsize * ENTRY.itemsize], ENTRY)
    good = (_check_of(entries) == entries["check"]) & (entries["offset"] + entries["size"] <= there)
    return entries[: int(np.argmin(good))] if not good.all() else entries


class Index:
    """All records of a store: where each document's signals lie."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.parts = sorted(int(p.stem.split("-")[1]) for p in folder.glob("index-*.bin"))
        found = [_whole(*_paths(folder, part)) for part in self.parts]
        entries = np.concatenate(found) if found else np.zeros(0, ENTRY)
        part = np.repeat(self.parts, [len(f) for f in found]) if found else np.zeros(0, np.int64)
        order = np.argsort(entries["document"], kind="stable")
        self.entries, self.part = entries[order], part[order]
        first = np.ones(len(order), bool)  # two processes may have written one document: either will do
        first[1:] = self.entries["document"][1:] != self.entries["document"][:-1]
        self.entries, self.part = self.entries[first], self.part[first]

    def find(self, documents: NDArray[np.int64]) -> NDArray[np.int64]:
        """Rows of documents, -1 for those that are not here."""
        known = self.entries["document"].astype(np.int64)
        if not len(known):
            return np.full(len(documents), -1)
        at = np.minimum(np.searchsorted(known, documents), len(known) - 1)
        return np.where(known[at] == documents, at, -1)


def _paths(folder: Path, part: int) -> tuple[Path, Path]:
    return folder / f"index-{part:03d}.bin", folder / f"signals-{part:03d}.bin"


# ---- appending -------------------------------------------------------------------------------------------------------
class Log:
    """One process's pair of files, open for appending; what a killed process left unfinished is cut off.

    Use it as a context. Two processes cannot write the same part at once.
    """

    def __init__(self, folder: Path, part: int) -> None:
        index, signals = _paths(folder, part)
        self.index, self.signals = open(index, "ab"), open(signals, "ab")  # noqa: SIM115
        if fcntl is not None:
            try:
                fcntl.flock(self.index, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                raise BadInput(f"another process is writing part {part} of {folder}; wait for it, or end it") from error
        entries = _whole(index, signals)
        self.end = int((entries["offset"] + entries["size"]).max(initial=0))
        self.index.truncate(len(entries) * ENTRY.itemsize)
        self.signals.truncate(self.end)

    def __enter__(self) -> "Log":
        return self

    def __exit__(self, *error: object) -> None:
        self.index.close()
        self.signals.close()

    def append(self, records: Sequence[tuple[bytes, Mapping[str, Any]]]) -> None:
        """Write some records, then their entries."""
        entries = np.zeros(len(records), ENTRY)
        try:
            for row, (content, fields) in enumerate(records):
                self.signals.write(content)
                for key, value in {**fields, "offset": self.end, "size": len(content)}.items():
                    entries[row][key] = value
                entries[row]["sum"] = zlib.crc32(content)
                self.end += len(content)
            _settle(self.signals)
            entries["check"] = _check_of(entries)
            self.index.write(entries.tobytes())
            _settle(self.index)
        except OSError as error:
            raise LimbeckError(
                f"could not write to the store {Path(self.index.name).parent}: {error}; what it holds is intact"
            ) from error


def _settle(file: Any) -> None:
    file.flush()
    os.fsync(file.fileno())


# ---- reading ---------------------------------------------------------------------------------------------------------
class Records:
    """The bytes of records, mapped; each is compared with its checksum when it is first touched."""

    def __init__(self, index: Index) -> None:
        self.index = index
        self.checked = np.zeros(len(index.entries), bool)
        self.maps: dict[int, Bytes] = {}
        for part in index.parts:
            path = _paths(index.folder, part)[1]
            some = path.exists() and path.stat().st_size
            self.maps[part] = np.memmap(path, np.uint8, "r") if some else np.zeros(0, np.uint8)

    def __getitem__(self, row: int) -> Bytes:
        entry = self.index.entries[row]
        start = int(entry["offset"])
        content = self.maps[int(self.index.part[row])][start : start + int(entry["size"])]
        if not self.checked[row]:
            if zlib.crc32(content.data) != int(entry["sum"]):
                raise BadInput(
                    f"the signals of document {int(entry['document'])} in {self.index.folder} are damaged (checksum "
                    "differs); delete the folder and capture them again"
                )
            self.checked[row] = True
        return content
