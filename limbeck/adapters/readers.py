"""Reads files into plain examples: which file holds which split, which column holds what. Knows no tensors of ours."""

from __future__ import annotations

import csv
import gzip
import io
import json
import lzma
import math
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file

from limbeck.core.errors import BadInput, MissingExtra, nearest

__all__ = ["SPLITS", "Raw", "from_rows", "join", "read", "rows_of", "stream_files"]

SPLITS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "val", "dev"), "validation"),
    **dict.fromkeys(("test", "testing", "eval"), "test"),
}
IMAGES = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".gif", ".ppm", ".pgm", ".tif", ".tiff")
TABLES = (".jsonl", ".json", ".csv", ".tsv", ".parquet")
FORMATS = (*TABLES, ".npz", ".safetensors", ".txt", ".text")
PACKED = (".zst", ".gz")
INPUTS = ("inputs", "input", "x", "data", "features", "images", "image", "img", "jpeg", "jpg", "png")
TEXTS = ("text", "content", "document", "sentence", "review", "question", "utterance", "query", "tweet", "inputs")
LABELS = ("labels", "label", "y", "target", "targets", "class", "category", "intent", "sentiment", "coarse_label")


@dataclass
class Raw:
    """Examples of one split. kind: images, text, language, vectors, tokens or rows; decides what `inputs` is:
    an array, a list of encoded pictures or picture files, a list of texts, or None for rows."""

    kind: str
    inputs: Any = None
    labels: list[Any] | np.ndarray | None = None
    classes: list[str] | None = None
    extra: dict[str, list[Any]] = field(default_factory=dict)
    rows: list[dict[str, Any]] | None = None

    def __len__(self) -> int:
        return len(self.rows or ()) if self.inputs is None else len(self.inputs)

    def take(self, keep: Sequence[int]) -> Raw:
        """The examples at `keep`, in that order."""

        def pick(values: Any) -> Any:
            return (
                values
                if values is None
                else values[keep]
                if isinstance(values, np.ndarray)
                else [values[i] for i in keep]
            )

        extra = {name: pick(values) for name, values in self.extra.items()}
        return Raw(self.kind, pick(self.inputs), pick(self.labels), self.classes, extra, pick(self.rows))


def suffix(path: Path) -> str:
    """The format that a file's name tells: train.jsonl.zst -> .jsonl."""
    name = path.name.lower()
    for packed in PACKED:
        name = name.removesuffix(packed)
    return Path(name).suffix


def _words(path: Path) -> tuple[str | None, str]:
    """(split, variant) that a file's name tells: sst2_dev.jsonl.zst -> (validation, sst2)."""
    stem = path.name.split(".")[0]
    parts = stem.replace("-", "_").split("_")
    for part in parts:
        if part.lower() in SPLITS:
            return SPLITS[part.lower()], "_".join(p for p in parts if p != part)
    return None, stem


@contextmanager
def _open(path: Path) -> Iterator[TextIO]:
    """A text file, unpacked on the way."""
    if path.suffix == ".zst":
        try:
            import zstandard
        except ImportError:
            raise MissingExtra("zstandard", "text") from None
        try:
            with path.open("rb") as packed, zstandard.ZstdDecompressor().stream_reader(packed) as raw:
                yield io.TextIOWrapper(raw, encoding="utf-8", newline="")
        except zstandard.ZstdError as error:
            raise BadInput(f"{path} is torn or no zstandard file: {error}") from None
    elif path.suffix == ".gz":
        try:
            with gzip.open(path, "rt", encoding="utf-8", newline="") as file:
                yield file
        except (EOFError, gzip.BadGzipFile) as error:
            raise BadInput(f"{path} is torn or no gzip file: {error}") from None
    else:
        with path.open(encoding="utf-8", newline="") as file:
            yield file


def rows_of(path: Path) -> Iterator[dict[str, Any]]:
    """Rows of a jsonl, json, csv, tsv or parquet file, one after the other."""
    kind = suffix(path)
    if kind == ".parquet":
        try:
            import pyarrow.parquet
        except ImportError:
            raise MissingExtra("pyarrow", "text") from None
        try:
            for piece in pyarrow.parquet.ParquetFile(path).iter_batches(1024):
                yield from piece.to_pylist()
        except pyarrow.ArrowInvalid as error:
            raise BadInput(f"{path} is no readable parquet file: {str(error).splitlines()[0]}") from None
        return
    try:
        with _open(path) as file:
            if kind in (".csv", ".tsv"):
                reader = csv.DictReader(file, delimiter="\t" if kind == ".tsv" else ",", restkey="", restval="")
                for number, row in enumerate(reader, 2):
                    if row.pop("", None):
                        raise BadInput(f"{path}:{number} has more cells than the header line has names")
                    yield row
            elif kind in (".txt", ".text"):
                yield from ({"text": line.rstrip("\r\n")} for line in file)
            elif kind == ".json":
                whole = json.load(file)
                yield from whole if isinstance(whole, list) else whole["data"]
            else:
                yield from _lines(path, file)
    except UnicodeDecodeError as error:
        raise BadInput(f"{path} is not UTF-8 text: byte {error.start} cannot be read") from None
    except (json.JSONDecodeError, KeyError, csv.Error) as error:
        raise BadInput(f"{path} cannot be read as {kind[1:]}: {error}") from None


def _lines(path: Path, file: TextIO) -> Iterator[dict[str, Any]]:
    for number, line in enumerate(file, 1):
        if line.strip():
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise BadInput(f"{path}:{number} is not JSON: {error.msg} at column {error.colno}") from None
            if not isinstance(row, dict):
                raise BadInput(
                    f'{path}:{number} must be an object like {{"text": ..., "label": ...}}, got {line[:40]!r}'
                )
            yield row


def _column(wanted: str | None, known: Sequence[str], has: Sequence[str], role: str, where: str) -> str | None:
    if wanted is not None and wanted not in has:
        raise BadInput(f"{where} has no column {wanted!r} for {role}{nearest(wanted, has)}")
    return wanted or next((name for name in known if name in has), None)


def _picture(value: Any) -> bool:
    return isinstance(value, bytes) or (isinstance(value, dict) and isinstance(value.get("bytes"), bytes))


def _number(value: Any) -> float:
    return math.nan if value in ("", None) else float(value)


def from_rows(
    rows: list[dict[str, Any]], where: str, inputs: str | list[str] | None = None, labels: str | None = None
) -> Raw:
    """Find pictures, texts or numbers in rows by column name, or by the names given for inputs and labels."""
    if not rows:
        return Raw("rows", rows=[])
    has = list(rows[0])
    several = [inputs] if isinstance(inputs, str) else list(inputs or ())
    for name in several:
        _column(name, (), has, "inputs", where)
    target = _column(labels, [n for n in LABELS if n not in several], has, "labels", where)
    given = None if target is None else [row.get(target) for row in rows]
    if given is not None and (None in given or "" in given):
        row = next(i for i, value in enumerate(given) if value in (None, ""))
        raise BadInput(f"row {row} of {where} has no {target!r}; every example needs a label")
    extra = {"domain": [row["domain"] for row in rows]} if isinstance(rows[0].get("domain"), int) else {}
    pictures = several or [n for n in (*INPUTS, *has) if n in has and _picture(rows[0][n])][:1]
    if len(pictures) == 1 and _picture(rows[0][pictures[0]]):
        values = [row[pictures[0]] for row in rows]
        return Raw("images", [v if isinstance(v, bytes) else v["bytes"] for v in values], given, None, extra)
    usual = TEXTS if target else TEXTS[:3]  # without a label only what cannot be one half of a pair is a text to model
    texts = several or [n for n in usual if n in has and n != target][:1]
    if texts and all(isinstance(rows[0][n], str) and not _numeric(rows, n) for n in texts):
        joined = [" | ".join(str(row[n]) for n in texts) for row in rows]
        return Raw("language" if given is None else "text", joined, given, None, extra, rows)
    if several and isinstance(rows[0][several[0]], list):
        return _arrays(rows, several[0], given, where)
    if several or (given is not None and any(_numeric(rows, n) for n in has if n != target)):
        return Raw("vectors", _features(rows, several or [n for n in has if n != target], where), given, None, extra)
    return Raw("rows", rows=rows)


def _arrays(rows: list[dict[str, Any]], name: str, given: list[Any] | None, where: str) -> Raw:
    sizes = {len(row[name]) for row in rows}
    if len(sizes) > 1:
        raise BadInput(f"the lists in column {name!r} of {where} differ in length: {sorted(sizes)[:5]}")
    return Raw("vectors", np.array([row[name] for row in rows]), given)


def _numeric(rows: list[dict[str, Any]], name: str) -> bool:
    try:
        return not math.isnan(_number(rows[0][name])) and not isinstance(rows[0][name], bool)
    except (TypeError, ValueError):
        return False


def _features(rows: list[dict[str, Any]], names: list[str], where: str) -> np.ndarray:
    out = np.empty((len(rows), len(names)), dtype=np.float32)
    for column, name in enumerate(names):
        for row, values in enumerate(rows):
            try:
                out[row, column] = _number(values[name])
            except (TypeError, ValueError):
                raise BadInput(
                    f"column {name!r} of {where} holds {values[name]!r} in row {row}, which is no number; "
                    "name the numeric columns in `inputs`"
                ) from None
        bad = ~np.isfinite(out[:, column])
        if bad.any():
            raise BadInput(f"column {name!r} of {where} is empty or not finite first in row {int(bad.argmax())}")
    return out


def _stored(path: Path, inputs: str | None, labels: str | None) -> dict[str, Raw]:
    """Arrays of an npz or safetensors file: x, y or train_x, test_y ... with the two words in any order."""
    try:
        if suffix(path) == ".safetensors":
            arrays = load_file(path)
        else:
            with np.load(path, allow_pickle=False) as file:
                arrays = {key: file[key] for key in file.files}
    except (ValueError, OSError, EOFError, zipfile.BadZipFile, lzma.LZMAError, zlib.error, SafetensorError) as error:
        raise BadInput(f"{path} is no whole {suffix(path)[1:]} file without pickled objects: {error}") from None
    found: dict[str, dict[str, np.ndarray]] = {}
    for key, array in arrays.items():
        parts = key.lower().split("_")
        name = next((SPLITS[p] for p in parts if p in SPLITS), "all")
        role = "_".join(p for p in parts if p not in SPLITS)
        if role in INPUTS or key == inputs:
            found.setdefault(name, {})["inputs"] = array
        elif role in LABELS or key == labels:
            found.setdefault(name, {})["labels"] = array
    out: dict[str, Raw] = {}
    for name, pair in found.items():
        if "inputs" not in pair:
            continue
        x, y = pair["inputs"], pair.get("labels")
        if y is not None and len(x) != len(y):
            raise BadInput(f"{path} has {len(x)} inputs but {len(y)} labels ({name})")
        y = y.reshape(len(y)) if y is not None and y.ndim == 2 and y.shape[1] == 1 else y
        out[name] = Raw("images" if x.ndim in (3, 4) else "vectors", x, y)
    if not out:
        raise BadInput(
            f"{path} has no inputs; expected keys like x, y or train_x, train_y, test_x, got {', '.join(arrays)}"
        )
    return out


def _pictures(folder: Path) -> list[Path]:
    return sorted(p for p in folder.iterdir() if p.suffix.lower() in IMAGES and not p.name.startswith("."))


def _class_folders(folder: Path) -> Raw | None:
    """A folder of class folders, or of pictures without labels; None when there are no pictures."""
    names = [p.name for p in sorted(folder.iterdir()) if p.is_dir() and not p.name.startswith(".") and _pictures(p)]
    if not names:
        flat = _pictures(folder)
        return Raw("images", flat) if flat else None
    files = [(path, label) for label, name in enumerate(names) for path in _pictures(folder / name)]
    return Raw("images", [path for path, _ in files], [names[label] for _, label in files], names)


def read(
    path: Path, *, variant: str | None = None, inputs: str | list[str] | None = None, labels: str | None = None
) -> dict[str, Raw]:
    """Everything at `path`: split name (train, validation, test, or all when nothing is said) -> examples.

    variant: which of several sets in one folder, the part of the file names that is not the split ("sst2").
    """
    if path.is_dir():
        split_folders = {SPLITS[p.name.lower()]: p for p in path.iterdir() if p.is_dir() and p.name.lower() in SPLITS}
        found = {name: _class_folders(folder) for name, folder in split_folders.items()} or {
            "all": _class_folders(path)
        }
        pictures = {name: raw for name, raw in found.items() if raw is not None}
        if pictures:
            return pictures
        files = _files(path, variant)
    else:
        if suffix(path) not in FORMATS:
            raise BadInput(f"{path} has no known format; expected {', '.join(FORMATS)} or a folder of class folders")
        files = [(None, path)]
    out: dict[str, list[Raw]] = {}
    for name, file in files:
        for inner, raw in _file(file, inputs, labels).items():
            out.setdefault(name if inner == "all" and name else inner, []).append(raw)
    return {name: join(raws, str(path)) for name, raws in out.items()}


def _files(folder: Path, variant: str | None) -> list[tuple[str | None, Path]]:
    files = [p for p in sorted(folder.iterdir()) if p.is_file() and suffix(p) in FORMATS and not p.name.startswith(".")]
    files = [p for p in files if p.stem.lower() not in ("readme", "license", "licence", "attribution")]
    groups: dict[str, list[tuple[str | None, Path]]] = {}
    for file in files:
        split, rest = _words(file)
        groups.setdefault(rest, []).append((split, file))
    if not groups:
        raise BadInput(f"{folder} holds no class folders with pictures and no {', '.join(FORMATS)} files")
    if variant is None and len(groups) > 1 and "" not in groups:
        raise BadInput(f"{folder} holds several sets: {', '.join(sorted(groups))}; choose one with `variant`")
    chosen = variant if variant is not None else "" if "" in groups else next(iter(groups))
    if chosen not in groups:
        raise BadInput(f"{folder} has no variant {chosen!r}{nearest(chosen, groups)}")
    return groups[chosen]


def stream_files(path: Path, variant: str | None, part: str) -> list[Path]:
    """The row files of one split, to be read one after the other."""
    files = _files(path, variant) if path.is_dir() else [(None, path)]
    chosen = [file for split, file in files if split == part] or [file for split, file in files if split is None]
    for file in chosen:
        if suffix(file) not in (*TABLES, ".txt", ".text"):
            raise BadInput(f"{file} cannot be streamed; expected {', '.join((*TABLES, '.txt'))}")
    if not chosen:
        raise BadInput(f"{path} has no {part} files; it has {', '.join(sorted({str(split) for split, _ in files}))}")
    return chosen


def _file(path: Path, inputs: str | list[str] | None, labels: str | None) -> dict[str, Raw]:
    kind = suffix(path)
    if kind in (".npz", ".safetensors"):
        return _stored(path, inputs if isinstance(inputs, str) else None, labels)
    if kind in (".txt", ".text"):
        try:
            with _open(path) as file:
                return {"all": Raw("language", [file.read()])}
        except UnicodeDecodeError as error:
            raise BadInput(f"{path} is not UTF-8 text: byte {error.start} cannot be read") from None
    rows = list(rows_of(path))
    raw = from_rows(rows, str(path), inputs, labels)
    told = [SPLITS.get(str(row.get("split", "")).lower()) for row in rows]
    if not rows or None in told:
        return {"all": raw}
    return {
        name: raw.take([i for i, t in enumerate(told) if t == name]) for name in dict.fromkeys(t for t in told if t)
    }


def join(raws: Iterable[Raw], where: str) -> Raw:
    """Several files of one split as one."""
    first, *others = raws
    for other in others:
        if other.kind != first.kind or (other.labels is None) != (first.labels is None):
            raise BadInput(f"the files of {where} hold different things: {first.kind} and {other.kind}")
        first = Raw(
            first.kind,
            _cat(first.inputs, other.inputs),
            _cat(first.labels, other.labels),
            first.classes,
            {name: [*first.extra[name], *other.extra[name]] for name in first.extra.keys() & other.extra.keys()},
            _cat(first.rows, other.rows),
        )
    return first


def _cat(a: Any, b: Any) -> Any:
    if a is None or b is None:
        return None
    return np.concatenate([a, b]) if isinstance(a, np.ndarray) else [*a, *b]
