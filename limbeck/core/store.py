"""The teacher-signal store: what a teacher says of every example, and of which crop of it, kept in mapped arrays.

Entries are addressed by (example, view), so that a reader depends neither on shuffling nor on batch size or ranks.
A folder holds store.json and plain .npy arrays; nothing in it is executed when it is read. A killed capture goes on
where it stopped; a store of another teacher or of other data is refused.
"""

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from limbeck.core.augment import Augment, build
from limbeck.core.batches import Batches, Enriched, Table, epoch, generator
from limbeck.core.card import require
from limbeck.core.checkpoint import fingerprint
from limbeck.core.errors import BadInput, LimbeckError, nearest
from limbeck.core.maths import kl_logprobs, log_probs
from limbeck.core.nets import Batch, evaluating, outputs
from limbeck.core.partition import mixed

__all__ = [
    "Recovery",
    "Store",
    "StoreInfo",
    "StoredBatches",
    "brief",
    "capture",
    "data_fingerprint",
    "fingerprint",
    "read_spec",
    "recover",
    "write_spec",
]

FORMAT = 1
STEPS = {8: 16, 16: 2048}  # codes a nat: log-probabilities down to -16 or -32 nats, off by at most half a step
Recovery = Literal["smooth", "renormalise"]
Event = Callable[[dict[str, Any]], None]
Ask = Callable[[Batch], Tensor]
Array = NDArray[Any]
Arrays = dict[str, "np.memmap[Any, Any]"]


@dataclass(frozen=True)
class StoreInfo:
    """What a store holds, and how well.

    captured: examples that the call wrote. bytes: on disk. mass: probability within the kept entries, in [0, 1].
    kl: KL(teacher || label recovered by smoothing) in nats; both are means over examples, views and places.
    teacher, data: fingerprints.
    """

    folder: str
    examples: int
    views: int
    topk: int
    classes: int
    bits: int
    captured: int
    bytes: int
    mass: float
    kl: float
    teacher: str
    data: str

    @property
    def bytes_per_example(self) -> float:
        """Disk space an example, all its views together."""
        return self.bytes / self.examples


def recover(ids: Tensor, logprobs: Tensor, classes: int, how: Recovery = "smooth") -> Tensor:
    """Probabilities [..., C] from the kept entries [..., K], which are among the first `classes` classes.

    how: "smooth" spreads the mass that is missing evenly over the other classes, "renormalise" leaves them at 0. With
    K = C both give what was stored.
    """
    p = logprobs.exp()
    mass = p.sum(-1, keepdim=True)
    others = classes - ids.shape[-1]
    if others == 0:
        return torch.zeros(*ids.shape[:-1], classes, dtype=p.dtype, device=p.device).scatter(-1, ids, p)
    if how == "renormalise":
        p, rest = p / mass, torch.zeros_like(mass)
    else:
        p = p / mass.clamp_min(1)  # rounding may lift the sum a little above 1
        rest = (1 - mass).clamp_min(0) / others
    return rest.expand(*ids.shape[:-1], classes).scatter(-1, ids, p)


# ---- fingerprints of data --------------------------------------------------------------------------------------------
def _digests(inputs: Tensor) -> Array:
    """Eight bytes for the content of every row of `inputs` [B, ...]."""
    rows = inputs.detach().cpu().contiguous()
    raw = rows.view(torch.uint8).reshape(len(rows), -1).numpy() if rows.ndim > 1 else rows.numpy().reshape(-1, 1)
    kind = f"{rows.dtype}{tuple(rows.shape[1:])}".encode()
    return np.array([_short(kind + row.tobytes()) for row in raw], np.uint64)


def _short(content: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little")


def data_fingerprint(data: Table | Iterable[Batch], examples: int | None = None) -> str:
    """Hash of the inputs of all examples, whatever the order and size of the batches that bring them."""
    return _fingerprint(_all_digests(data, _count(data, examples)))


def _all_digests(data: Table | Iterable[Batch], count: int) -> Array:
    digests = np.zeros(count, np.uint64)
    for batch in _batches(data, 1024):
        digests[batch["index"].numpy()] = _digests(batch["inputs"])
    return digests


def _fingerprint(digests: Array) -> str:
    return hashlib.sha256(np.ascontiguousarray(digests).tobytes()).hexdigest()


def _count(data: Table | Iterable[Batch], examples: int | None) -> int:
    if isinstance(data, Table):
        return len(data.check())
    if examples is None:
        raise BadInput("batches do not tell how many examples there are in all: give `examples`")
    return examples


def _batches(data: Table | Iterable[Batch], size: int) -> Iterator[Batch]:
    return epoch(data, min(size, len(data))) if isinstance(data, Table) else iter(data)


# ---- writing ---------------------------------------------------------------------------------------------------------
def capture(
    teacher: nn.Module,
    data: Table | Iterable[Batch],
    folder: str | Path,
    *,
    topk: int = 0,
    views: int = 1,
    augment: Sequence[Any] = (),
    bits: int = 16,
    batch_size: int = 256,
    seed: int = 0,
    examples: int | None = None,
    on_event: Event | None = None,
) -> StoreInfo:
    """Ask the teacher once about every view of every example, and keep its likeliest answers in `folder`.

    Called again after a kill with the same arguments, it does only what is missing; the teacher is not asked again.

    data: a table, or one pass of batches with "inputs" and "index" (then `examples` says how many there are).
    topk: entries kept a place, 0 for all classes. views: crops an example. augment: a recipe's list such as
    ["resized_crop", "flip"], drawn once a view and stored; () for the example as it is. bits: 8, 16 or 32 for a
    log-probability (step 1/16 nat, 1/2048 nat, exact). batch_size: examples asked about at a time, when `data` is a
    table. on_event: told {"done", "examples"} after each batch.
    """
    require(bits in (*STEPS, 32), "bits", bits, "8, 16 or 32")
    require(views >= 1, "views", views, ">= 1")
    require(topk >= 0, "topk", topk, ">= 0")
    if views > 1 and not augment:
        raise BadInput(f"`views` is {views}, but without `augment` all views of an example are the same")
    folder, count = Path(folder), _count(data, examples)
    asked: dict[str, Any] = {
        "format": FORMAT, "examples": count, "views": views, "topk": topk, "bits": bits, "seed": seed,
        "augment": _plain(augment), "fill": list(data.black) if isinstance(data, Table) else [0.0],
        "teacher": fingerprint(teacher),
    }  # fmt: skip
    files: _Files | None = None
    captured = 0
    device = next((p.device for p in teacher.parameters()), torch.device("cpu"))

    def ask(batch: Batch) -> Tensor:
        """Log-probabilities [B, ..., C] on the CPU."""
        with torch.no_grad(), evaluating(teacher):
            logits: Tensor = outputs(teacher, {k: v.to(device) for k, v in batch.items()})["logits"]
        return log_probs(logits).float().cpu()

    for batch in _batches(data, batch_size):
        rows, inputs = batch["index"].cpu().numpy(), batch["inputs"]
        digests = _digests(inputs)
        columns = {k: v for k, v in batch.items() if isinstance(v, Tensor) and len(v) == len(rows)}
        if files is None:
            files = _open_files(folder, asked, {k: v[:1] for k, v in columns.items()}, ask)
        new = files.missing(rows, digests)
        if len(new):
            chosen = torch.from_numpy(new)
            files.write(rows[new], digests[new], {k: v[chosen] for k, v in columns.items()}, ask)
            captured += len(new)
        if on_event is not None:
            on_event({"done": int(files.done.sum()), "examples": count})
    if files is None:
        raise BadInput("there is nothing to capture: the data gave no batch")
    if not files.done.all():
        raise BadInput(f"the data gave {int(files.done.sum())} different examples, but there should be {count}")
    files.finish()
    return Store.open(folder).info(captured)


def _plain(augment: Sequence[Any]) -> list[Any]:
    try:
        plain: list[Any] = json.loads(json.dumps(list(augment)))
    except TypeError as error:
        raise BadInput(f"a store keeps its augmentation by name, as in a recipe, not as an object ({error})") from error
    return plain


def _augment(spec: Mapping[str, Any]) -> Augment | None:
    return build(spec["augment"], spec["size"], tuple(spec["fill"])) if spec["augment"] else None


class _Files:
    """The arrays of a store while it is written. Rows are flagged as done only once they are there."""

    def __init__(self, folder: Path, spec: Mapping[str, Any]) -> None:
        self.folder, self.spec = folder, spec
        self.arrays = _arrays(folder, spec, "r+")
        self.done = self.arrays["done"]
        self.augment = _augment(spec)

    def missing(self, rows: Array, digests: Array) -> Array:
        """Places in a batch whose rows are still to be captured. Refuses rows that were captured with other content."""
        done = self.done[rows].astype(bool)
        other = done & (self.arrays["digests"][rows] != digests)
        if other.any():
            raise BadInput(
                f"{self.folder} was captured from other data: example {int(rows[other][0])} has changed; "
                "delete the folder or choose another"
            )
        return np.flatnonzero(~done)

    def write(self, rows: Array, digests: Array, batch: Batch, ask: Ask) -> None:
        """Capture all views of some rows."""
        lost: list[tuple[Tensor, Tensor]] = []
        for view in range(self.spec["views"]):
            inputs = batch["inputs"]
            if self.augment is not None:
                inputs = self.augment.apply(inputs, torch.from_numpy(np.array(self.arrays["draws"][rows, view])))
            full = ask({**batch, "inputs": inputs})
            kept, ids = full.topk(self.spec["kept"], -1)
            codes = _encode(kept.numpy(), self.spec["bits"])
            self.arrays["ids"][rows, view], self.arrays["codes"][rows, view] = ids.numpy(), codes
            again = recover(ids, torch.from_numpy(_decode(codes, self.spec["bits"])), full.shape[-1]).clamp_min(1e-12)
            lost.append((kept.exp().sum(-1), kl_logprobs(full, again.log())))
        mask = batch.get("mask")
        for column, values in enumerate(zip(*lost, strict=True)):
            of = torch.stack(values, 1)  # [B, views, ...]
            self.arrays["fidelity"][rows, column] = _row_mean(of, mask).numpy()
        self.arrays["digests"][rows] = digests
        for array in self.arrays.values():
            array.flush()
        self.done[rows] = 1
        self.done.flush()

    def finish(self) -> None:
        """Write down that the store is whole."""
        fidelity = np.asarray(self.arrays["fidelity"], np.float64).mean(0)
        figures = {"data": _fingerprint(self.arrays["digests"]), "mass": float(fidelity[0]), "kl": float(fidelity[1])}
        write_spec(self.folder, {**self.spec, **figures, "complete": True})


def _row_mean(values: Tensor, mask: Tensor | None) -> Tensor:
    """Mean over views and places, [B, views, ...] -> [B]; places where the mask [B, ...] is False do not count."""
    if mask is None or mask.ndim != values.ndim - 1:
        return values.flatten(1).mean(1)
    weight = mask.unsqueeze(1).expand_as(values).to(values).flatten(1)
    return (values.flatten(1) * weight).sum(1) / weight.sum(1).clamp_min(1)


def _encode(logprobs: Array, bits: int) -> Array:
    if bits == 32:
        return logprobs
    top = 2**bits - 1
    codes: Array = np.clip(np.rint(-logprobs * STEPS[bits]), 0, top).astype(np.uint8 if bits == 8 else np.uint16)
    return codes


def _decode(codes: Array, bits: int) -> Array:
    values: Array = codes.astype(np.float32) if bits == 32 else codes.astype(np.float32) / -STEPS[bits]
    return values


def _open_files(folder: Path, asked: dict[str, Any], first: Batch, ask: Ask) -> _Files:
    """The arrays of a new store, sized by one example, or those of one begun with the same arguments."""
    if (folder / "store.json").exists():
        spec = _of_examples(folder)
        for key, value in asked.items():
            if spec.get(key) != value:
                raise BadInput(
                    f"{folder} holds another capture: `{key}` was {brief(spec.get(key))} there and is {brief(value)} "
                    "now; delete the folder or choose another"
                )
        return _Files(folder, spec)
    if folder.exists() and any(folder.iterdir()):
        raise BadInput(f"{folder} holds other files; a store needs a folder of its own")
    shape, inputs = ask(first).shape, first["inputs"]
    classes, places = shape[-1], list(shape[1:-1])
    if asked["topk"] > classes:
        raise BadInput(f"`topk` must be at most {classes}, the number of classes, got {asked['topk']}")
    size = inputs.shape[-1] if inputs.ndim == 4 else 0
    if asked["augment"] and not size:
        raise BadInput(f"`augment` is for images [B, C, H, W], got inputs of shape {tuple(inputs.shape)}")
    spec = {**asked, "classes": classes, "kept": asked["topk"] or classes, "places": places, "size": size}
    augment = _augment(spec)
    spec["width"] = augment.width if augment is not None else 0
    draft = folder.with_name(f".{folder.name}.draft")
    shutil.rmtree(draft, ignore_errors=True)
    try:
        draft.mkdir(parents=True)
        for name, (dtype, dims) in _layout(spec).items():
            np.lib.format.open_memmap(draft / f"{name}.npy", mode="w+", dtype=dtype, shape=dims).flush()
            _reserve(draft / f"{name}.npy")
        if augment is not None:
            draws = _arrays(draft, spec, "r+")["draws"]
            for view in range(spec["views"]):  # an example's crops depend on its number, not on its batch
                draws[:, view] = augment.draw(generator(spec["seed"], "view", view), spec["examples"]).numpy()
            draws.flush()
        write_spec(draft, {**spec, "complete": False})
        if folder.exists():
            folder.rmdir()
        draft.rename(folder)
    except OSError as error:
        shutil.rmtree(draft, ignore_errors=True)
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        raise LimbeckError(f"could not create the store {folder}: {'the disk is full' if full else error}") from error
    return _Files(folder, spec)


def brief(value: Any) -> str:
    """A value short enough for a sentence."""
    return f"{value[:12]}..." if isinstance(value, str) and len(value) > 24 else repr(value)


def _layout(spec: Mapping[str, Any]) -> dict[str, tuple[Any, tuple[int, ...]]]:
    """Arrays of a store: name -> type and shape."""
    n, v = spec["examples"], spec["views"]
    dims = (n, v, *spec["places"], spec["kept"])
    ids = np.uint8 if spec["classes"] <= 2**8 else np.uint16 if spec["classes"] <= 2**16 else np.int32
    codes = {8: np.uint8, 16: np.uint16, 32: np.float32}[spec["bits"]]
    out: dict[str, tuple[Any, tuple[int, ...]]] = {
        "ids": (ids, dims),
        "codes": (codes, dims),
        "digests": (np.uint64, (n,)),
        "fidelity": (np.float32, (n, 2)),
        "done": (np.uint8, (n,)),
    }
    if spec["width"]:
        out["draws"] = (np.float32, (n, v, spec["width"]))
    return out


def _arrays(folder: Path, spec: Mapping[str, Any], mode: Literal["r", "r+"]) -> Arrays:
    out: Arrays = {}
    for name, (dtype, dims) in _layout(spec).items():
        path = folder / f"{name}.npy"
        try:
            out[name] = np.load(path, mmap_mode=mode, allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            raise BadInput(f"{path} is missing, truncated or corrupt ({error}); capture the store again") from error
        if out[name].shape != dims or out[name].dtype != dtype:
            raise BadInput(f"{path} is {out[name].dtype}{out[name].shape}, but store.json says {np.dtype(dtype)}{dims}")
    return out


def _reserve(path: Path) -> None:
    """Claim the disk space of a sparse file now: writing to a mapped file on a full disk would kill the process."""
    if hasattr(os, "posix_fallocate"):
        with path.open("r+b") as file:
            os.posix_fallocate(file.fileno(), 0, path.stat().st_size)


def write_spec(folder: Path, spec: Mapping[str, Any]) -> None:
    """Write store.json, whole or not at all."""
    draft = folder / f".store-{os.getpid()}.json"
    with draft.open("w") as file:
        file.write(json.dumps(spec, indent=1))
        file.flush()
        os.fsync(file.fileno())
    draft.replace(folder / "store.json")


def read_spec(folder: Path) -> dict[str, Any]:
    """Read store.json, of whatever format; one clear sentence when this is no store."""
    path = folder / "store.json"
    try:
        spec: dict[str, Any] = json.loads(path.read_text())
    except OSError as error:
        beside = [p.parent.name for p in folder.parent.glob("*/store.json")] if folder.parent.is_dir() else []
        hint = nearest(folder.name, beside)
        raise BadInput(f"{folder} is no store of teacher signals: it has no store.json{hint}") from error
    except ValueError as error:
        raise BadInput(f"{path} is not valid JSON ({error}); capture the store again") from error
    return spec


def _of_examples(folder: Path) -> dict[str, Any]:
    spec = read_spec(folder)
    if spec.get("format") != FORMAT:
        found = f"{folder / 'store.json'} has format {spec.get('format')!r}"
        raise BadInput(f"{found}, not {FORMAT}; capture the store again")
    return spec


# ---- reading ---------------------------------------------------------------------------------------------------------
class Store:
    """Random access to what a teacher said, by example and view. Open one with `Store.open`."""

    def __init__(self, folder: Path, spec: dict[str, Any]) -> None:
        self.folder, self.spec = folder, spec
        self.arrays = _arrays(folder, spec, "r")
        self.augment = _augment(spec)
        self.examples, self.views, self.classes = int(spec["examples"]), int(spec["views"]), int(spec["classes"])
        self.topk = int(spec["kept"])

    @staticmethod
    def open(
        folder: str | Path, *, teacher_fingerprint: str | None = None, data_fingerprint: str | None = None
    ) -> "Store":
        """Open a whole store. Raises BadInput when it is unfinished, damaged, or of another teacher or other data.

        teacher_fingerprint: what `fingerprint(teacher)` gives. data_fingerprint: what `data_fingerprint(table)` gives.
        """
        folder = Path(folder)
        spec = _of_examples(folder)
        if not spec.get("complete"):
            done = int(_arrays(folder, spec, "r")["done"].sum())
            raise BadInput(
                f"the store {folder} holds {done} of {spec['examples']} examples; run the capture again to finish it"
            )
        told = (("teacher", "by another teacher", teacher_fingerprint), ("data", "from other data", data_fingerprint))
        for what, how, wanted in told:
            if wanted is not None and spec[what] != wanted:
                raise BadInput(
                    f"the store {folder} is stale: it was made {how} ({brief(spec[what])}, now {brief(wanted)}); "
                    "capture it again"
                )
        return Store(folder, spec)

    def check(self, table: Table, settings: Mapping[str, Any]) -> None:
        """Raise BadInput, with what differs, unless it was captured from this table with these settings.

        settings: of `topk`, `views`, `augment` and `bits` those that are asked for.
        """
        for key, value in settings.items():
            if self.spec[key] != value:
                raise BadInput(
                    f"the store {self.folder} was captured with `{key}` {self.spec[key]!r}, asked for is {value!r}; "
                    f"capture another, or leave `{key}` out"
                )
        if len(table) != self.examples:
            differs = f"it holds {self.examples} examples, and {table.name} has {len(table)}"
        elif (other := np.flatnonzero(_all_digests(table, self.examples) != self.arrays["digests"])).size:
            scaled = table.kind == "images" and list(table.black) != self.spec["fill"]
            why = ", whose pictures are normalised otherwise" if scaled else f", the first of them number {other[0]}"
            differs = (
                f"it was made from other data: {other.size} of {self.examples} examples of {table.name} differ{why}"
            )
        else:
            return
        raise BadInput(f"the store {self.folder} is stale: {differs}; capture it again")

    @property
    def full(self) -> bool:
        """Whether every class was kept, so that the teacher's logits are known up to a constant."""
        return self.topk == self.classes

    def info(self, captured: int = 0) -> StoreInfo:
        """Sizes and fidelity."""
        s = self.spec
        taken = sum(p.stat().st_size for p in self.folder.iterdir())
        return StoreInfo(
            str(self.folder), self.examples, self.views, self.topk, self.classes, s["bits"], captured, taken,
            s["mass"], s["kl"], s["teacher"], s["data"],
        )  # fmt: skip

    def read(self, index: Tensor, view: Tensor | None = None) -> dict[str, Tensor]:
        """What the teacher said of examples `index` [B] seen in `view` [B] (the first when None).

        "teacher_ids" and "teacher_logprobs" [B, ..., K]; "draw" [B, P], the augmentation's parameters; and when all
        classes were kept "teacher_logits" [B, ..., C].
        """
        rows = index.cpu().numpy()
        if wrong := [i for i in rows.tolist() if not 0 <= i < self.examples]:
            raise BadInput(f"the store {self.folder} holds examples 0 to {self.examples - 1}, not {wrong[0]}")
        views = np.zeros_like(rows) if view is None else view.cpu().numpy()
        out = {
            "teacher_ids": torch.from_numpy(self.arrays["ids"][rows, views].astype(np.int64)),
            "teacher_logprobs": torch.from_numpy(_decode(self.arrays["codes"][rows, views], self.spec["bits"])),
        }
        if self.augment is not None:
            out["draw"] = torch.from_numpy(np.array(self.arrays["draws"][rows, views]))
        if self.full:
            logprobs = out["teacher_logprobs"]
            out["teacher_logits"] = torch.empty_like(logprobs).scatter_(-1, out["teacher_ids"], logprobs)
        return out


class StoredBatches(Enriched):
    """The batches of a table, each example in a stored view and with what the teacher said of that very view.

    batches: plain ones: an augmentation of their own would show the student something else than the teacher saw.
    crops: views an example in one batch, which makes the batch `crops` times as large. seed: of the order of views.

    Each example goes through its views in a random order of its own, all of them before any comes again; the choice
    is a function of (seed, epoch, example) alone. The views of one example lie next to each other.
    """

    def __init__(self, batches: Batches, store: Store, *, crops: int = 1, seed: int = 0) -> None:
        if batches.augment is not None:
            raise BadInput("a store replays the augmentation that the teacher saw; take `augment` off the data")
        if (have := len(batches.table)) != store.examples:
            raise BadInput(f"the store {store.folder} holds {store.examples} examples, {batches.table.name} has {have}")
        require(1 <= crops <= store.views, "crops", crops, f"between 1 and the {store.views} stored views")
        super().__init__(batches)
        self.store, self.crops, self.seed = store, crops, seed

    def views(self, index: Tensor, epoch: int) -> Tensor:
        """Which views of the examples [B] are shown in an epoch: [B, crops]."""
        total, columns = self.store.views, []
        for number in range(epoch * self.crops, (epoch + 1) * self.crops):
            round_, place = divmod(number, total)
            order = mixed(self.seed, round_, index.numpy()[:, None], np.arange(total)[None]).argsort(1, kind="stable")
            columns.append(torch.from_numpy(order[:, place]))
        return torch.stack(columns, 1)

    def __next__(self) -> Batch:
        epoch = self.batches.epoch
        batch = next(self.batches)
        index = batch["index"]
        views = self.views(index, epoch).flatten()
        batch = {name: column.repeat_interleave(self.crops, 0) for name, column in batch.items()}
        batch |= self.store.read(batch["index"], views)
        if self.store.augment is not None:
            batch["inputs"] = self.store.augment.apply(batch["inputs"], batch["draw"])
        return batch
