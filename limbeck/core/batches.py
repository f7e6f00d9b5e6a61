"""Tables of examples and the endless, resumable streams of batches that training reads.

A batch is a dict of tensors with "inputs", usually "labels", always "index" (the row in the table). What comes at a
position is a pure function of (seed, position): a resumed run sees the batches, and the augmentations, that it would
have seen.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple, Protocol

import torch
from torch import Generator, Tensor

from limbeck.core.augment import Augment, build
from limbeck.core.cloze import Cloze
from limbeck.core.errors import BadInput

__all__ = ["Batch", "Batches", "Enriched", "Splits", "Stream", "Table", "Tokenizer", "epoch", "generator", "split"]

Batch = dict[str, Any]  # tensors, and `retell` where there are two tokenizers
Kind = Literal["images", "tokens", "vectors", "rows"]


class Tokenizer(Protocol):
    """Text to token ids and back; `size` ids, of which 0 pads."""

    @property
    def size(self) -> int: ...

    def encode(self, text: str) -> list[int]: ...

    def decode(self, ids: Sequence[int]) -> str: ...


def generator(*parts: int | str) -> Generator:
    """A CPU generator whose stream depends on all `parts` (seed, epoch, purpose ...) and on nothing else."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return Generator().manual_seed(int.from_bytes(digest, "little") >> 1)


@dataclass(frozen=True)
class Table:
    """Examples in columns that share their first dimension [N, ...].

    columns: "inputs" (images float [N, C, H, W], token ids long [N, T], vectors float [N, D]), usually "labels", and
    whatever else belongs to an example (mask, weights, teacher_logits ...). classes: names of the labels.
    mean, std: what was subtracted from and divided out of each channel, in the scale where white is 1.
    tokenizer: made the token ids. rows: the raw text rows, kept with their provenance. constants: tensors that belong
    to no example and come with every batch, such as `same_words`. teacher_tokenizer: made the ids in the teacher_*
    columns, which hold the same text once more; retell makes such columns of texts that are new. cloze: which of the
    tokens are hidden is drawn anew in every batch.
    """

    columns: dict[str, Tensor]
    kind: Kind = "vectors"
    classes: list[str] | None = None
    name: str = "data"
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    tokenizer: Tokenizer | None = field(default=None, repr=False)
    rows: list[dict[str, Any]] | None = field(default=None, repr=False)
    constants: dict[str, Tensor] = field(default_factory=dict, repr=False)
    teacher_tokenizer: Tokenizer | None = field(default=None, repr=False)
    retell: Callable[[Tensor, Tensor, Tensor], dict[str, Tensor]] | None = field(default=None, repr=False)
    cloze: Cloze | None = None

    def __post_init__(self) -> None:
        sizes = {name: len(column) for name, column in self.columns.items()}
        if self.rows is not None:
            sizes["rows"] = len(self.rows)
        if not sizes:
            raise BadInput(f"{self.name} has no columns; it needs at least `inputs`")
        if len(set(sizes.values())) > 1:
            raise BadInput(f"the columns of {self.name} differ in length: {sizes}")
        if "index" in self.columns:
            raise BadInput(f"the column `index` of {self.name} is reserved for the row number; give it another name")
        if twice := {"index", *self.columns} & set(self.constants):
            raise BadInput(f"{self.name} has a column and a constant called `{min(twice)}`; give one another name")

    def __len__(self) -> int:
        return len(self.rows) if self.rows is not None else len(next(iter(self.columns.values())))

    def __getitem__(self, column: str) -> Tensor:
        if column not in self.columns:
            raise BadInput(f"{self.name} has no column {column!r}; it has {', '.join(self.columns)}")
        return self.columns[column]

    @property
    def num_classes(self) -> int:
        """How many classes the labels name; 0 without class labels."""
        if self.classes is not None:
            return len(self.classes)
        labels = self.columns.get("labels")
        if labels is None or labels.ndim != 1 or labels.is_floating_point() or not len(labels):
            return 0
        return int(labels.max()) + 1

    @property
    def paired(self) -> bool:
        """Whether the labels are pictures, what networks should make of the inputs."""
        labels = self.columns.get("labels")
        return labels is not None and labels.ndim == 4 and labels.is_floating_point()

    @property
    def vocab(self) -> int:
        """Number of token ids; 0 when the inputs are no tokens."""
        if self.kind != "tokens":
            return 0
        return self.tokenizer.size if self.tokenizer else int(self["inputs"].max()) + 1

    @property
    def black(self) -> tuple[float, ...]:
        """The value of a black pixel after normalisation, one a channel."""
        return tuple(-m / s for m, s in zip(self.mean, self.std, strict=True)) or (0.0,)

    def raw(self, pictures: Tensor) -> Tensor:
        """Pictures [B, C, H, W] in the scale where white is 1."""
        if not self.mean:
            return pictures
        mean, std = (torch.tensor(v, dtype=pictures.dtype).view(1, -1, 1, 1) for v in (self.mean, self.std))
        return pictures * std + mean

    def select(self, indices: Tensor | Sequence[int]) -> Table:
        """The rows at `indices`, in that order, as a new table."""
        indices = torch.as_tensor(indices, dtype=torch.long)
        columns = {name: column[indices.to(column.device)] for name, column in self.columns.items()}
        rows = None if self.rows is None else [self.rows[i] for i in indices.tolist()]
        return replace(self, columns=columns, rows=rows)

    def to(self, device: torch.device | str) -> Table:
        """The same table with its columns and constants on `device`."""
        moved = [{name: t.to(device) for name, t in kind.items()} for kind in (self.columns, self.constants)]
        return replace(self, columns=moved[0], constants=moved[1])

    def retold(self) -> Table:
        """The table in the teacher's own tokens, as the teacher reads it; itself where both have one tokenizer."""
        if self.teacher_tokenizer is None:
            return self
        said = ("inputs", "labels", "mask", "attention_mask")
        told = {name: self.columns[f"teacher_{name}"] for name in said if f"teacher_{name}" in self.columns}
        return replace(
            self, columns=told, constants={}, tokenizer=self.teacher_tokenizer, teacher_tokenizer=None, retell=None
        )

    def check(self) -> Table:
        """Itself, or BadInput when it is empty or holds nan or inf."""
        if not len(self):
            raise BadInput(f"{self.name} is empty: it has 0 examples")
        for name, column in self.columns.items():
            if not column.is_floating_point():
                continue
            for start in range(0, len(column), 4096):  # in pieces: the answer must not cost as much memory as the data
                piece = column[start : start + 4096]
                bad = ~piece.isfinite().reshape(len(piece), -1).all(1)
                if bad.any():
                    first = int(bad.nonzero()[0])
                    values = piece[first].flatten()
                    value = values[~values.isfinite()][0].item()
                    raise BadInput(
                        f"column `{name}` of {self.name} is not finite: {value} first at index {start + first}"
                    )
        return self


class Splits(NamedTuple):
    """The three parts of a data set; choices are made on `validation`, `test` is for the report alone."""

    train: Table
    validation: Table
    test: Table


def split(
    table: Table,
    fractions: tuple[float, float, float] = (0.8, 0.1, 0.1),
    *,
    seed: int = 0,
    stratified: bool = True,
    shuffle: bool = True,
) -> Splits:
    """Cut `table` in train, validation and test; the cut depends on the seed and the table alone.

    fractions: parts of the whole, >= 0, sum 1. stratified: each class is cut alike (to within one example), where
    labels are class labels. shuffle: False cuts into consecutive stretches (text).
    """
    if min(fractions) < 0 or abs(sum(fractions) - 1) > 1e-6:
        raise BadInput(f"split fractions must be >= 0 and sum to 1, got {fractions}")
    n = len(table)
    labels = table.columns.get("labels")
    rank = torch.arange(n, dtype=torch.float64)
    if shuffle:
        order = torch.randperm(n, generator=generator(seed, "split"))
        rank[order] = torch.arange(n, dtype=torch.float64)
    if shuffle and stratified and labels is not None and labels.ndim == 1 and not labels.is_floating_point():
        for value in sorted(set(labels.tolist())):
            rows = (labels.cpu() == value).nonzero()[:, 0]
            within = rank[rows].argsort().argsort().double()
            offset = torch.rand((), generator=generator(seed, "offset", value), dtype=torch.float64)
            rank[rows] = (within + offset) / len(rows)  # systematic sampling: equal steps along each class
    first = round(fractions[0] * n)
    second = n if fractions[2] == 0 else min(n, first + round(fractions[1] * n))
    order = rank.argsort(stable=True)
    train, validation, test = (order[a:b].sort().values for a, b in ((0, first), (first, second), (second, n)))
    return Splits(table.select(train), table.select(validation), table.select(test))


class Batches:
    """Endless batches of a table, epoch after epoch.

    batch_size: examples of a *global* batch. shuffle: a new order each epoch, a pure function of (seed, epoch).
    drop_last: leave out the short batch at an epoch's end. augment: a recipe's list (see core/augment), for images;
    its parameters come with the batch as "draw" [B, P]. per_class: instead of `batch_size`, that many examples of each
    class, in class order, each class walking through its own shuffled passes. labelled: that many of each batch have a
    label, and come first; the others have none (-100). rank, world: this process takes its own slice of every global
    batch; the slices together are the batch of one process, augmentations included.
    """

    def __init__(
        self,
        table: Table,
        batch_size: int | None = None,
        *,
        seed: int = 0,
        shuffle: bool = True,
        drop_last: bool = True,
        augment: Sequence[object] = (),
        per_class: int | None = None,
        labelled: int | None = None,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        self.table = table.check()
        self.seed, self.shuffle, self.drop_last = seed, shuffle, drop_last
        self.rank, self.world = rank, world
        self.position = 0
        self.augment = self._augment(augment)
        self._orders: dict[tuple[int | str, ...], tuple[int | str, Tensor]] = {}  # of the passes under way
        if not 0 <= rank < world:
            raise BadInput(f"rank must be in [0, {world}), got {rank}")
        self._groups: list[tuple[Tensor, int]] = []  # rows that a batch takes some of, and how many
        if per_class is not None:
            if labelled is not None:
                raise BadInput("per_class and labelled both say what a batch is made of; give one of them")
            self._groups = self._classes(per_class)
            wanted = per_class * len(self._groups)
            if batch_size not in (None, wanted):
                raise BadInput(f"per_class {per_class} makes batches of {wanted}, but batch_size is {batch_size}")
            batch_size = wanted
        if batch_size is None or batch_size < 1:
            raise BadInput(f"batch_size must be >= 1, got {batch_size}")
        if labelled is not None:
            self._groups = self._labelled(labelled, batch_size)
        if batch_size > len(table) and per_class is None:
            raise BadInput(f"batch_size {batch_size} is larger than {table.name}, which has {len(table)} examples")
        last = 0 if drop_last or self._groups else len(table) % batch_size
        for share in [count for _, count in self._groups] or [batch_size]:
            if share % world or (last and last < world):
                raise BadInput(
                    f"{world} processes cannot share batches of {last or share}; choose a multiple of {world}"
                )
        self.batch_size = batch_size

    def _augment(self, spec: Sequence[object]) -> Augment | None:
        if spec and self.table.kind != "images":
            raise BadInput(f"augment is for images, but {self.table.name} holds {self.table.kind}")
        return build(spec, self.table["inputs"].shape[-1], self.table.black) if spec else None

    def _classes(self, per_class: int) -> list[tuple[Tensor, int]]:
        count = self.table.num_classes
        if not count or self.table["labels"].ndim != 1:
            raise BadInput(f"per_class needs class labels, and {self.table.name} has none")
        members = [(self.table["labels"].cpu() == c).nonzero()[:, 0] for c in range(count)]
        smallest = min(range(count), key=lambda c: len(members[c]))
        if not 1 <= per_class <= len(members[smallest]):
            has = len(members[smallest])
            raise BadInput(f"per_class must be in [1, {has}], the size of class {smallest}, got {per_class}")
        return [(rows, per_class) for rows in members]

    def _labelled(self, labelled: int, batch_size: int) -> list[tuple[Tensor, int]]:
        if not self.table.num_classes or self.table["labels"].ndim != 1:
            raise BadInput(f"labelled needs class labels, and {self.table.name} has none")
        known = self.table["labels"].cpu() >= 0
        groups = [(known.nonzero()[:, 0], labelled), ((~known).nonzero()[:, 0], batch_size - labelled)]
        for name, (rows, count) in zip(("labelled", "unlabelled"), groups, strict=True):
            if not 1 <= count <= len(rows):
                raise BadInput(
                    f"labelled {labelled} makes batches of {batch_size} with {count} {name} examples; it must be at "
                    f"least one, and {self.table.name} has {len(rows)}"
                )
        return groups

    @property
    def steps_per_epoch(self) -> int:
        """Batches in one pass; when made of groups, in the time that as many examples as the table holds go by."""
        if self._groups:
            return max(1, len(self.table) // self.batch_size)
        return len(self.table) // self.batch_size if self.drop_last else math.ceil(len(self.table) / self.batch_size)

    @property
    def steps_per_pass(self) -> int:
        """Batches in which all examples come, but those that fill no batch; of groups, the one that takes longest."""
        return max((len(rows) // count for rows, count in self._groups), default=self.steps_per_epoch)

    @property
    def epoch(self) -> int:
        """The pass that the next batch belongs to."""
        return self.position // self.steps_per_epoch

    def _order(self, n: int, *key: int | str) -> Tensor:
        """An order of n rows, a pure function of the seed and the key, which ends in the number of the pass."""
        if not self.shuffle:
            return torch.arange(n)
        *what, number = key
        if tuple(what) not in self._orders or self._orders[tuple(what)][0] != number:
            self._orders[tuple(what)] = number, torch.randperm(n, generator=generator(self.seed, *key))
        return self._orders[tuple(what)][1]

    def indices(self, position: int) -> Tensor:
        """Rows of the global batch at `position`, whatever has been served before."""
        if self._groups:
            return torch.cat([self._of_group(g, position) for g in range(len(self._groups))])
        number, step = divmod(position, self.steps_per_epoch)
        return self._order(len(self.table), "epoch", number)[step * self.batch_size : (step + 1) * self.batch_size]

    def _of_group(self, g: int, position: int) -> Tensor:
        rows, n = self._groups[g]
        passes, step = divmod(position, len(rows) // n)
        order = self._order(len(rows), "class", g, passes)
        return rows[order[step * n : (step + 1) * n]]

    def _slice(self, size: int) -> Tensor:
        """Places of this rank in a global batch of `size`: its share of every group."""
        counts = [count for _, count in self._groups] or [size]
        return torch.cat([part.tensor_split(self.world)[self.rank] for part in torch.arange(size).split(counts)])

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        rows, position = self.indices(self.position), self.position
        mine = self._slice(len(rows))
        batch: Batch = {name: column[rows[mine].to(column.device)] for name, column in self.table.columns.items()}
        batch |= {"index": rows[mine], **self.table.constants}
        if self.table.retell is not None:
            batch["retell"] = self.table.retell
        if self.augment is not None:
            params = self.augment.draw(generator(self.seed, "augment", position), len(rows))[mine]
            batch["inputs"], batch["draw"] = self.augment.apply(batch["inputs"], params), params
            if self.table.paired:
                batch["labels"] = self.augment.apply(batch["labels"], params)
        if (cloze := self.table.cloze) is not None:
            places = generator(self.seed, "cloze", position)
            batch = cloze.apply(batch, cloze.draw(places, len(rows), batch["inputs"].shape[1])[mine])
        self.position += 1
        return batch

    def state_dict(self) -> dict[str, int]:
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.position = int(state["position"])


class Enriched:
    """The batches of a table, each with more than the table holds; a subclass says with what, in `__next__`."""

    def __init__(self, batches: Batches) -> None:
        self.batches = batches

    @property
    def table(self) -> Table:
        """Where the examples are from."""
        return self.batches.table

    @property
    def steps_per_epoch(self) -> int:
        """Batches in one pass over the examples."""
        return self.batches.steps_per_epoch

    @property
    def epoch(self) -> int:
        """The pass that the next batch belongs to."""
        return self.batches.epoch

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        raise NotImplementedError

    def state_dict(self) -> dict[str, int]:
        """Where the stream stands."""
        return self.batches.state_dict()

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on from there."""
        self.batches.load_state_dict(state)


def epoch(table: Table, batch_size: int) -> Iterator[Batch]:
    """One pass in table order, nothing dropped, for evaluation; the last batch may be short."""
    for start in range(0, len(table.check()), batch_size):
        batch = {name: column[start : start + batch_size] for name, column in table.columns.items()}
        if table.cloze is not None:  # the same tokens each time that anybody looks
            size = batch["inputs"].shape
            batch = table.cloze.apply(batch, table.cloze.draw(generator("epoch", start), size[0], size[1]))
        yield batch | {"index": torch.arange(start, min(start + batch_size, len(table))), **table.constants}


class Stream:
    """Endless batches of any iterable that can be started again: a list, a DataLoader, a streaming data set.

    source: yields batches, or single examples when `batch_size` is given; dicts of tensors, (inputs, labels) pairs or
    inputs alone; a function is called for each pass. A source with `set_epoch`, or with a `generator` (DataLoader and
    its sampler), is told the epoch or seeded with (seed, epoch), so that a pass can be repeated. collate: makes a batch
    out of a list of examples (default: stacks). A resumed stream skips what had been consumed, without touching the
    global random state.
    """

    def __init__(
        self,
        source: Iterable[Any] | Callable[[], Iterable[Any]],
        batch_size: int | None = None,
        *,
        seed: int = 0,
        collate: Callable[[list[Any]], Any] | None = None,
        name: str = "stream",
    ) -> None:
        if isinstance(source, Iterator) or not (isinstance(source, Iterable) or callable(source)):
            raise BadInput(
                f"{name} can be read only once; give a list, a DataLoader or a function that starts it again"
            )
        self.source, self.batch_size, self.seed, self.name = source, batch_size, seed, name
        self.collate = collate or torch.utils.data.default_collate
        self.position, self._pass, self._served = 0, 0, 0
        self._running: Iterator[Any] | None = None

    @property
    def steps_per_epoch(self) -> int | None:
        """Batches in one pass; None when the source cannot tell."""
        try:
            size = len(self.source)  # type: ignore[arg-type]
        except TypeError:
            return None
        return size // self.batch_size if self.batch_size else size

    @property
    def epoch(self) -> int:
        """The pass that the next batch belongs to; that of the last one where the source cannot tell its length."""
        return self._pass + (self._served >= (self.steps_per_epoch or math.inf))

    def _begin(self) -> Iterator[Any]:
        source: Any = self.source
        parts: list[Any] = [source, getattr(source, "sampler", None), getattr(source, "dataset", None)]
        for part in parts:
            if hasattr(part, "set_epoch"):
                part.set_epoch(self._pass)
            if hasattr(part, "generator"):
                part.generator = generator(self.seed, "stream", self._pass)
        items = iter(self.source() if callable(self.source) else self.source)
        if self.batch_size is None:
            return items
        return self._grouped(items, self.batch_size)

    def _grouped(self, items: Iterator[Any], size: int) -> Iterator[Any]:
        group: list[Any] = []
        for item in items:
            group.append(item)
            if len(group) == size:
                yield self.collate(group)
                group = []

    def _advance(self) -> Any:
        for _ in range(2):
            if self._running is None:
                self._running = self._begin()
            item = next(self._running, None)
            if item is not None:
                self.position, self._served = self.position + 1, self._served + 1
                return item
            if not self._served:
                break
            self._running, self._served, self._pass = None, 0, self._pass + 1
        more = f" of {self.batch_size}" if self.batch_size else ""
        raise BadInput(f"{self.name} is empty: it gave no batch{more}")

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        item = self._advance()
        batch: dict[str, Any]
        if isinstance(item, Tensor):
            batch = {"inputs": item}
        elif isinstance(item, (tuple, list)) and 1 <= len(item) <= 2:
            batch = dict(zip(("inputs", "labels"), item, strict=False))
        elif hasattr(item, "items"):
            batch = dict(item.items())
        else:
            raise BadInput(f"{self.name} must give dicts, (inputs, labels) pairs or tensors, got {type(item).__name__}")
        for name, column in batch.items():
            if isinstance(column, Tensor) and column.is_floating_point() and not column.isfinite().all():
                raise BadInput(f"column `{name}` of {self.name} is not finite in batch {self.position - 1}")
        return batch

    def state_dict(self) -> dict[str, int]:
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.position, self._pass, self._served, self._running = 0, 0, 0, None
        with torch.random.fork_rng():  # the source may draw from the global state while it is skipped
            while self.position < int(state["position"]):
                self._advance()
