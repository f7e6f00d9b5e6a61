"""Data by name or path -> train, validation and test tables: embedded sets, local files and folders, sets in the folder
that the environment variable LIMBECK_DATA names, and hub names through `datasets`."""

from __future__ import annotations

import io
import itertools
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field, TypeAdapter, ValidationError
from torch import Tensor

from limbeck.adapters import chats, clozes, embedded, pairing, tasks, words
from limbeck.adapters.readers import SPLITS, Raw, from_rows, join, read, rows_of, stream_files
from limbeck.core.batches import Splits, Stream, Table, Tokenizer, generator, split
from limbeck.core.errors import BadInput, MissingExtra, nearest

__all__ = ["Source", "load", "stream"]


Count = Annotated[int, Field(ge=1)]
PARTS = ("train", "validation", "test")
APART = ("name", "variant", "inputs", "labels", "split", "seed")  # what each domain of a set may have of its own


@dataclass(frozen=True)
class Source:
    """What a recipe says about its data.

    name: an embedded set (`fashion_mnist_small`), a file or folder, a folder in LIMBECK_DATA (`cifar10`, or
    `sentiment_small/sst2` for one of several sets in it), or `hub:NAME`, such as `hub:nyu-mll/glue`.
    variant: one of several sets in a folder, or the configuration of a hub set.
    domains: further sources that are part of the set, each by name or as a mapping of what differs: name, variant,
    inputs, labels, split, seed. The column `domain` says which one an example is from, 0 for the first. limit and
    test_limit are shared out evenly among domains of texts to be continued (language).
    inputs, labels: column names; found by their usual names when left out. Several inputs make vectors or joined texts.
    kind: images, text (classification), language (next token), chat (next token of what the assistant says), vectors,
    tokens or rows; told by the data when left out, but for chat.
    classes: how many classes there are, when the labels must be kept as they are, or their names in order; else labels
    are numbered 0, 1, ... in sorted order.
    split: parts for train, validation and test, used where the source does not say: a source with its own test set
    gives validation from its training set; one with train and validation only gives that validation as test.
    seed: of splits and subsets. limit, test_limit: at most so many training, validation and test examples.
    per_class: so many training examples of each class instead.
    known: classes of the task by name or number; training examples of others stay, unlabelled (label -100).
    labelled: so many training examples of each class (with scores: of all) keep their label, others are unlabelled.
    label_noise: this share of the training labels is wrong: another class, at random; from 0 to 1.
    withheld: the training examples are not to be seen, or are not there: blank ones without labels take their place, as
    many as there were, or `limit`, or 1024, for methods that make their own. A teacher that is trained first sees them.
    mosaic: so many pictures a side are put together in one, whose labels are 0 or 1 for every class.
    degrade: makes pairs of pictures: inputs are the pictures by `blur`, `downsample`, `noise`, `grey` or `edges`, or by
    one with its number, such as {blur: 1.5}; labels are the pictures themselves.
    perturb: makes pairs of texts, a reference and a candidate that is a copy, spoiled or noise, whose label is a score;
    true, or the numbers of `tasks.Perturb`: {copy: 0.1, random: 0.1, most: 0.6}.
    size: side of pictures in pixels (cropped to a square, resized). channels: 1 or 3; as the files have it if left out.
    normalise: bring every channel or feature to mean 0 and deviation 1 over the training set. mean, std: instead of
    the training set's, in the scale where white is 1; one number a channel.
    tokenizer: chars, words, bytes, bpe, hash, or a transformers tokenizer by folder or hub name.
    retold: further tokenizers in which texts to be continued are given once more, one for each of `nets.teachers`: a
    name as in `tokenizer`, made of this text, or {name: ..., tokenizer: ...}, the data on which a teacher was trained.
    vocab: most words kept, >= 3; ids of bpe, > 257, which may also be said with its name: bpe:512.
    length: tokens of a stretch (language), or most tokens of a text (classification, chat), >= 1.
    masked: hide some tokens of a stretch and ask for those instead of the next ones, as masked language models are
    trained: 15 % of them, anew in every batch (for validation and test once), of which 80 % are shown as a mask, 10 %
    as another token and 10 % as they are. Or {share: 0.15, smoothing: 0.7}: how many, and how much rare ones more.
    whole: leave conversations out that are longer than `length` tokens, instead of cutting them.
    pack: several short conversations share a row of `length` tokens, each read as if it were alone; limits count rows.
    """

    name: str
    variant: str | None = None
    domains: list[str | dict[str, Any]] = field(default_factory=list)
    inputs: str | list[str] | None = None
    labels: str | None = None
    kind: Literal["images", "text", "language", "chat", "vectors", "tokens", "rows"] | None = None
    classes: Count | list[str] | None = None
    split: tuple[float, float, float] = (0.8, 0.1, 0.1)
    seed: int = 0
    limit: Count | None = None
    test_limit: Count | None = None
    per_class: Count | None = None
    known: tuple[int | str, ...] = ()
    labelled: Count | None = None
    label_noise: Annotated[float, Field(ge=0, le=1)] = 0.0
    withheld: bool = False
    mosaic: Count = 1
    degrade: str | dict[str, float] | None = None
    perturb: bool | tasks.Perturb = False
    size: Count | None = None
    channels: Literal[1, 3] | None = None
    normalise: bool = True
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    tokenizer: str | None = None
    retold: list[str | dict[str, Any]] = field(default_factory=list)
    vocab: Annotated[int, Field(ge=3)] = 8192
    length: Count = 64
    masked: bool | dict[str, float] = False
    whole: bool = False
    pack: bool = False


def _source(spec: str | Path | Mapping[str, Any] | Source) -> Source:
    if isinstance(spec, Source):
        return spec
    if isinstance(spec, (str, Path)):
        return Source(str(spec))
    known = [f.name for f in fields(Source)]
    for key in spec:
        if key not in known:
            raise BadInput(f"data has no option {key!r}{nearest(str(key), known)}")
    if "name" not in spec:
        raise BadInput("data needs a `name`: an embedded set, a file or folder, or hub:NAME")
    given = {k: [v] if k in ("mean", "std") and isinstance(v, (int, float)) else v for k, v in spec.items()}
    try:
        return TypeAdapter(Source).validate_python(given)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"][:1])
        raise BadInput(f"data option `{key}`: {first['msg']}, got {given.get(key)!r}") from None


def load(
    spec: str | Path | Mapping[str, Any] | Source,
    *,
    teacher_tokenizer: str | Tokenizer | None = None,
    constants: Sequence[str] = ("same_words",),
    note: Callable[[str], None] | None = None,
) -> Splits:
    """Train, validation and test tables of a name, a path, or a mapping with the fields of `Source`.

    teacher_tokenizer: a second one, by name or as an object, in whose tokens texts are given once more, and constants:
    what else is wanted of the two (see `adapters.pairing`); note: told what of the texts could be aligned.
    """
    source = _source(spec)
    raws, source = _together(source) if source.domains else _checked(source)
    kind = next(iter(raws.values())).kind
    if source.withheld and kind not in ("images", "vectors"):
        raise BadInput(f"`withheld` is of pictures and vectors; {source.name} is {kind}")
    if source.masked and (kind != "language" or teacher_tokenizer is not None or source.domains):
        raise BadInput("`masked` is of texts of one source, `kind: language`, with one tokenizer for both networks")
    if source.retold and (kind != "language" or source.masked):
        raise BadInput(f"`retold` is of texts that are to be continued, `kind: language`; {source.name} is {kind}")
    if kind == "language":
        splits, teacher_tokenizer = _language(raws, source, teacher_tokenizer)
    elif kind == "chat":
        if teacher_tokenizer is not None:
            raise BadInput("conversations are read in one tokenizer; for a teacher with another give plain texts")
        splits = _chats(raws, source, note)
    else:
        splits = _examples(raws, source, kind)
    mean, std = _scale(splits.train["inputs"], source) if kind in ("images", "vectors") else ((), ())
    if source.known:
        splits = tasks.of_classes(splits, source.known)
    if source.mosaic > 1:
        splits = Splits(*(tasks.mosaics(table, source.mosaic, source.seed) for table in splits))
    splits = Splits(
        _subset(splits.train, source.limit, source.per_class, source.seed),
        _subset(splits.validation, source.test_limit, None, source.seed),
        _subset(splits.test, source.test_limit, None, source.seed),
    )
    if source.perturb:
        how = source.perturb if isinstance(source.perturb, tasks.Perturb) else tasks.Perturb()
        splits = Splits(*(tasks.perturbed(table, how, (source.seed, i)) for i, table in enumerate(splits)))
    if source.labelled is not None:
        splits = splits._replace(train=tasks.labelled(splits.train, source.labelled, source.seed))
    if source.label_noise:
        splits = splits._replace(train=tasks.mislabelled(splits.train, source.label_noise, source.seed))
    if source.degrade is not None:
        splits = Splits(*(tasks.degraded(table, source.degrade, (source.seed, i)) for i, table in enumerate(splits)))
    if kind in ("images", "vectors"):
        splits = Splits(*(_scaled(table, mean, std) for table in splits))
    if source.withheld:
        splits = splits._replace(train=tasks.withheld(splits.train, source.limit))
    splits.train.check()
    if source.retold:
        splits = pairing.retell_several(splits, [_retold(told, source) for told in source.retold], note)
    if teacher_tokenizer is not None:
        return pairing.retell_all(splits, teacher_tokenizer, note, constants)
    return splits


def _retold(told: str | Mapping[str, Any], source: Source) -> Tokenizer:
    """A tokenizer as it is made of a text: this one, or that of other data."""
    own: Mapping[str, Any] = {**asdict(source), "tokenizer": told} if isinstance(told, str) else told
    tokenizer = load({**own, "retold": []}).train.tokenizer
    if tokenizer is None:
        raise BadInput(f"`retold` names a tokenizer or data of texts, got {told!r}, which has no tokenizer")
    return tokenizer


# where the data is


def _find(source: Source) -> tuple[dict[str, Raw], Source]:
    """The raw splits behind a name, and the source with what is known of that set filled in."""
    name = source.name
    if name.startswith("hub:"):
        return _hub(source), source
    if name in embedded.NAMES:
        known = embedded.load(name)
        raws = {part: Raw(known.kind, *pair, classes=known.classes) for part, pair in known.parts.items()}
        if known.mean and not source.mean and source.normalise and source.size is None:
            source = replace(source, mean=known.mean, std=known.std)
        return raws, source
    path, variant = _path(source)
    return read(path, variant=variant, inputs=source.inputs, labels=source.labels), source


def _checked(source: Source) -> tuple[dict[str, Raw], Source]:
    """The same, of the kind that is asked for, without empty splits."""
    raws, source = _find(source)
    if source.kind:
        raws = {name: replace(raw, kind=source.kind) for name, raw in raws.items()}
    raws = {name: raw for name, raw in raws.items() if len(raw)}
    if not raws:
        raise BadInput(f"{source.name} is empty: it has 0 examples")
    if len({raw.kind for raw in raws.values()}) > 1:
        raise BadInput(f"the splits of {source.name} differ in kind: { {k: r.kind for k, r in raws.items()} }")
    return raws, source


def _together(source: Source) -> tuple[dict[str, Raw], Source]:
    """Train, validation and test of a source and its further domains, each cut by itself and told by its number."""
    options = {k: v for k, v in asdict(source).items() if k != "domains"}
    found: dict[str, list[Raw]] = {}
    for number, told in enumerate([{}, *source.domains]):
        changes: Mapping[str, Any] = {"name": told} if isinstance(told, str) else told
        for key in changes:
            if key not in APART:
                raise BadInput(f"a domain may differ in {', '.join(APART)}, got {key!r}{nearest(key, APART)}")
        raws, own = _checked(_source({**options, **changes}))
        for part, raw in _parts(raws, own).items():
            found.setdefault(part, []).append(replace(raw, extra={"domain": [number] * len(raw)}))
    return {part: join(several, f"{source.name} and its domains") for part, several in found.items()}, source


def _parts(raws: dict[str, Raw], source: Source) -> dict[str, Raw]:
    """Raw examples as train, validation and test."""
    plan, fractions = _cut(raws, source)
    if next(iter(raws.values())).kind == "language":
        return {part: Raw("language", [text]) for part, text in zip(PARTS, _texts(raws, source), strict=True)}
    if plan == "own":
        return raws
    whole = join(raws.values(), source.name) if plan == "all" else raws["train"]
    numbers = Table({"inputs": torch.arange(len(whole))}, name=source.name)
    cut = split(numbers, (fractions["train"], fractions["validation"], fractions["test"]), seed=source.seed)
    made = {part: whole.take(table["inputs"].tolist()) for part, table in zip(PARTS, cut, strict=True)}
    return made | {"test": raws.get("test", raws.get("validation", made["test"]))} if plan == "held out" else made


def _path(source: Source) -> tuple[Path, str | None]:
    name = source.name
    if Path(name).expanduser().exists():
        return Path(name).expanduser(), source.variant
    shelf = os.environ.get("LIMBECK_DATA")
    sets: list[str] = []
    if shelf:
        if not Path(shelf).is_dir():
            raise BadInput(f"LIMBECK_DATA names {shelf!r}, which is no folder")
        sets = sorted(p.name for p in Path(shelf).iterdir() if p.is_dir() and not p.name.startswith("."))
        base, _, rest = name.partition("/")
        if base in sets:
            return Path(shelf) / base, rest or source.variant
    if Path(name).suffix or name.startswith((".", "/", "~")):
        folder = Path(name).expanduser().parent
        near = nearest(Path(name).name, [p.name for p in folder.iterdir()]) if folder.is_dir() else ""
        raise BadInput(f"there is no file or folder {name!r}{near if 'did you mean' in near else ''}")
    where = "" if shelf else "; set LIMBECK_DATA to a folder of data sets, or write hub:NAME for the hub"
    near = nearest(name, [*embedded.NAMES, *sets])
    raise BadInput(f"no data called {name!r}, neither embedded nor a file or folder{near}{where}")


def _hub(source: Source) -> dict[str, Raw]:
    parts = _hub_parts(source, streaming=False)
    out: dict[str, list[Raw]] = {}
    for part, rows in parts.items():
        raw = from_rows(list(rows), f"{source.name} ({part})", source.inputs, source.labels)
        names = getattr(getattr(rows, "features", {}).get(source.labels or "label"), "names", None)
        if names and raw.labels is not None:
            raw = replace(raw, labels=[names[i] for i in raw.labels], classes=list(names))
        out.setdefault(SPLITS.get(part.lower(), "all"), []).append(raw)
    return {name: join(raws, source.name) for name, raws in out.items()}


def _hub_parts(source: Source, *, streaming: bool) -> dict[str, Any]:
    try:
        import datasets
    except ImportError:
        raise MissingExtra("datasets", "text") from None
    name = source.name.removeprefix("hub:")
    try:
        parts = datasets.load_dataset(name, source.variant, streaming=streaming)
    except Exception as error:  # the library raises its own, the hub's, and the network's errors
        raise BadInput(
            f"the hub gave no data set {name!r}: {(str(error).splitlines() or [type(error).__name__])[0]}"
        ) from None
    for part, rows in parts.items():
        for column, feature in (rows.features or {}).items():
            if isinstance(feature, datasets.Image):  # keep the bytes: pictures are decoded in one place
                parts[part] = rows = rows.cast_column(column, datasets.Image(decode=False))
    return dict(parts)


# examples -> tables


def _cut(raws: dict[str, Raw], source: Source) -> tuple[str, dict[str, float]]:
    """How a source's own splits become ours: a plan's name, and the parts to cut from the training examples."""
    train, validation, test = source.split
    if "train" not in raws:
        if source.withheld and "all" not in raws and validation + test:  # all there is is for judging
            train, validation, test = 0.0, validation / (validation + test), test / (validation + test)
        return "all", {"train": train, "validation": validation, "test": test}
    if "test" not in raws and "validation" not in raws:
        return "train", {"train": train, "validation": validation, "test": test}
    if "test" in raws and "validation" in raws:
        return "own", {"train": 1.0, "validation": 0.0, "test": 0.0}
    rest = train + validation
    return "held out", {"train": train / rest, "validation": validation / rest, "test": 0.0}


def _examples(raws: dict[str, Raw], source: Source, kind: str) -> Splits:
    numbers, classes = _number_labels(raws, source)
    tables: dict[str, Table] = {}
    lines: list[str] = []
    for part, raw in raws.items():
        columns = _columns(raw, kind, source, part)
        if kind == "text":  # place holders: the vocabulary comes from what turns out to be the training part
            columns = {"inputs": torch.arange(len(lines), len(lines) + len(raw)), **columns}
            lines.extend(map(str, raw.inputs))
        if part in numbers:
            columns["labels"] = numbers[part]
        rows = raw.rows or ([{"text": text} for text in raw.inputs] if kind == "text" else None)
        table_kind: Any = "tokens" if kind == "text" else kind
        tables[part] = Table(columns, table_kind, classes, source.name, rows=rows).check()
    splits = _arrange(tables, raws, source)
    return _tokenised(splits, lines, source) if kind == "text" else splits


def _columns(raw: Raw, kind: str, source: Source, part: str) -> dict[str, Tensor]:
    """The tensors of some examples, but for labels and token ids of texts."""
    columns: dict[str, Tensor] = {}
    if kind == "images":
        columns["inputs"] = _images(raw.inputs, source, part)
    elif kind == "tokens":
        columns["inputs"] = torch.as_tensor(np.asarray(raw.inputs)).long()
    elif kind == "vectors":
        columns["inputs"] = torch.as_tensor(np.asarray(raw.inputs)).flatten(1).float()
    return columns | {name: torch.as_tensor(values) for name, values in raw.extra.items()}


def _arrange(tables: dict[str, Table], raws: dict[str, Raw], source: Source) -> Splits:
    plan, parts = _cut(raws, source)
    if plan == "own":
        return Splits(tables["train"], tables["validation"], tables["test"])
    whole = _concat(list(tables.values())) if plan == "all" else tables["train"]
    cut = split(whole, (parts["train"], parts["validation"], parts["test"]), seed=source.seed)
    if plan == "held out":
        return Splits(cut.train, cut.validation, tables.get("test", tables.get("validation", cut.test)))
    return cut


def _concat(tables: list[Table]) -> Table:
    first = tables[0]
    columns = {name: torch.cat([t[name] for t in tables]) for name in first.columns}
    rows = None if first.rows is None else [row for t in tables for row in t.rows or ()]
    return replace(first, columns=columns, rows=rows)


def _number_labels(raws: dict[str, Raw], source: Source) -> tuple[dict[str, Tensor], list[str] | None]:
    """Labels of every split as class numbers (or as floats, when they are no classes), and the classes' names."""
    given = {part: np.asarray(raw.labels) for part, raw in raws.items() if raw.labels is not None}
    if not given:
        return {}, None
    flat = np.concatenate([np.ravel(labels) for labels in given.values()])
    if flat.dtype.kind in "US":
        try:
            flat = flat.astype(np.float64)
            given = {part: labels.astype(np.float64) for part, labels in given.items()}
        except ValueError:
            pass
    if any(labels.ndim > 1 for labels in given.values()):  # any number of classes, soft labels, or one for each token
        tokens = any(raw.kind == "tokens" for raw in raws.values())
        if tokens or flat.dtype.kind not in "iubf" or not np.isin(flat, (0, 1)).all():
            return {part: torch.as_tensor(labels) for part, labels in given.items()}, None
        hot = {part: torch.as_tensor(labels).float() for part, labels in given.items()}
        known = source.classes if isinstance(source.classes, list) else None
        return hot, known or [str(c) for c in range(next(iter(hot.values())).shape[-1])]
    if flat.dtype.kind == "f":
        if not np.isfinite(flat).all() or (flat % 1).any():
            return {part: torch.as_tensor(labels).float() for part, labels in given.items()}, None
        flat, given = flat.astype(np.int64), {part: labels.astype(np.int64) for part, labels in given.items()}
    names = next((raw.classes for raw in raws.values() if raw.classes), None)
    names = source.classes if isinstance(source.classes, list) else names
    if flat.dtype.kind in "iub":
        fixed = source.classes if isinstance(source.classes, int) else None
        count = fixed or (len(names) if names else int(flat.max()) + 1)
        if flat.min() < 0 or flat.max() >= count:
            raise BadInput(
                f"labels of {source.name} run from {flat.min()} to {flat.max()}, but there are {count} classes"
            )
        if fixed or names or len(np.unique(flat)) == count:
            numbered = {part: torch.as_tensor(labels.astype(np.int64)) for part, labels in given.items()}
            return numbered, names or [str(c) for c in range(count)]
    found = np.unique(flat)
    order = {value: i for i, value in enumerate(names or found.tolist())}
    unknown = [value for value in found.tolist() if value not in order]
    if unknown:
        raise BadInput(f"label {unknown[0]!r} of {source.name} is none of its classes{nearest(str(unknown[0]), order)}")
    numbered = {part: torch.tensor([order[value] for value in labels.tolist()]) for part, labels in given.items()}
    return numbered, [str(value) for value in order]


def _subset(table: Table, limit: int | None, per_class: int | None, seed: int) -> Table:
    if per_class is not None:
        labels, count = table["labels"], table.num_classes
        if labels.ndim > 1:
            raise BadInput(f"per_class needs one class label an example, and those of {table.name} have several")
        order = torch.randperm(len(table), generator=generator(seed, "per_class"))
        chosen = []
        for c in range(count):
            members = order[labels[order] == c]
            if len(members) < per_class:
                raise BadInput(f"per_class {per_class} is more than class {c} of {table.name} has: {len(members)}")
            chosen.append(members[:per_class])
        return table.select(torch.cat(chosen).sort().values)
    if limit is None or limit >= len(table):
        return table
    if table.kind == "tokens" and table.columns.get("labels", torch.empty(0)).ndim == 2:
        domain = table.columns.get("domain", torch.zeros(len(table), dtype=torch.long))
        first = [(domain == d).nonzero()[: limit // (int(domain.max()) + 1), 0] for d in domain.unique()]
        return table.select(torch.cat(first))  # stretches of one text: keep them connected
    part = limit / len(table)
    return split(table, (part, 1 - part, 0.0), seed=seed).train


# images and vectors


def _images(items: Any, source: Source, part: str) -> Tensor:
    """Pictures [N, C, H, W]: bytes as they are, until it is known which are wanted, else floats in their own scale."""
    if not isinstance(items, np.ndarray):
        items = _decode(items, source, part)
    x = torch.from_numpy(np.ascontiguousarray(items))
    if x.ndim == 3:
        x = x.unsqueeze(1)
    elif x.ndim == 4 and x.shape[-1] in (1, 3, 4) and x.shape[1] not in (1, 3):
        x = x.permute(0, 3, 1, 2)[:, :3]
    if x.ndim != 4 or x.shape[1] not in (1, 2, 3, 4):
        raise BadInput(
            f"pictures of {source.name} must be [N, H, W], [N, H, W, C] or [N, C, H, W], got {list(x.shape)}"
        )
    resized = source.size is not None and x.shape[-2:] != (source.size, source.size)
    if resized or source.channels not in (None, x.shape[1]):
        x = _floats(x)
    if source.channels == 1 and x.shape[1] == 3:
        x = (x * torch.tensor([0.299, 0.587, 0.114]).view(1, 3, 1, 1)).sum(1, keepdim=True)
    elif source.channels == 3 and x.shape[1] == 1:
        x = x.repeat(1, 3, 1, 1)
    elif source.channels not in (None, x.shape[1]):
        raise BadInput(
            f"pictures of {source.name} have {x.shape[1]} channels, not {source.channels}; channels is 1 or 3"
        )
    if resized:
        x = F.interpolate(x, 2 * [source.size or 0], mode="bilinear", antialias=True)
    return x.contiguous()


def _decode(items: Sequence[bytes | Path], source: Source, part: str) -> np.ndarray:
    try:
        from PIL import Image, ImageOps, UnidentifiedImageError
    except ImportError:
        raise MissingExtra("pillow", "vision") from None
    mode = {1: "L", 3: "RGB", None: None}.get(source.channels)
    out: np.ndarray | None = None
    for i, item in enumerate(items):
        where = str(item) if isinstance(item, Path) else f"picture {i} of {source.name} ({part})"
        try:
            image: Image.Image = Image.open(io.BytesIO(item) if isinstance(item, bytes) else item)
            mode = mode or ("L" if image.mode in ("1", "L", "I;16") else "RGB")
            if image.mode != mode:
                image = image.convert(mode)
            if source.size is not None and image.size != (source.size, source.size):
                image = ImageOps.fit(image, (source.size, source.size), Image.Resampling.BILINEAR)
            pixels = np.asarray(image)
        except (UnidentifiedImageError, OSError, SyntaxError) as error:
            raise BadInput(f"{where} cannot be read as a picture: {error}") from None
        if out is None:
            out = np.empty((len(items), *pixels.shape), dtype=np.uint8)
        if pixels.shape != out.shape[1:]:
            a, b = ("x".join(map(str, shape[:2])) for shape in (out.shape[1:], pixels.shape))
            raise BadInput(f"pictures of {source.name} differ in size: {a} and {b} ({where}); give a `size`")
        out[i] = pixels
    assert out is not None
    return out


def _floats(x: Tensor) -> Tensor:
    return x.float().div_(255) if x.dtype == torch.uint8 else x.float()


def _scale(x: Tensor, source: Source) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and deviation of every channel or feature: the user's, or those of `x`; () when nothing is to be scaled."""
    mean, std = source.mean, source.std
    if not source.normalise:
        return (), ()
    if not mean and not std:
        if not len(x):
            raise BadInput(
                f"{source.name} has no training part that tells how inputs are scaled: give `mean` and `std`, those of "
                "the teacher's own data, or `normalise: false`"
            )
        channels = x.transpose(0, 1).flatten(1)
        if x.dtype == torch.uint8:  # counting the 256 levels is exact and costs no copy as floats
            levels = torch.linspace(0, 1, 256, dtype=torch.float64)
            parts = torch.stack([channel.bincount(minlength=256) for channel in channels]).double()
            parts /= parts.sum(1, keepdim=True)
            means = parts @ levels
            deviations = (parts * (levels - means[:, None]).square()).sum(1).sqrt()
        else:
            means = channels.mean(1, dtype=torch.float64)
            deviations = torch.stack([channel.double().std(correction=0) for channel in channels])
        mean = tuple(round(value, 6) for value in means.tolist())
        std = tuple(round(value, 6) or 1.0 for value in deviations.tolist())  # a constant feature is only centred
    if len(mean) != len(std) or len(mean) not in (1, x.shape[1]) or min(std) <= 0:
        raise BadInput(f"mean {mean} and std {std} must have one number a channel ({x.shape[1]}), std > 0")
    return (mean * x.shape[1], std * x.shape[1]) if len(mean) == 1 else (mean, std)


def _scaled(table: Table, mean: tuple[float, ...], std: tuple[float, ...]) -> Table:
    """The table with float inputs, (x - mean) / std, and labels of that scale where they are pictures."""
    columns = dict(table.columns)
    for name in ("inputs", "labels") if table.paired else ("inputs",):
        x = _floats(columns[name])
        if mean:
            shape = (1, -1, *[1] * (x.ndim - 2))
            x = (x - torch.tensor(mean).view(shape)).div_(torch.tensor(std).view(shape))
        columns[name] = x
    return replace(table, columns=columns, mean=mean, std=std)


# text


def _tokenised(splits: Splits, lines: list[str], source: Source) -> Splits:
    texts = [[lines[i] for i in table["inputs"].tolist()] for table in splits]
    tokenizer = words.make(source.tokenizer, texts[0], size=source.vocab, language=False)

    def encoded(table: Table, mine: list[str]) -> Table:
        columns = {**table.columns, **words.padded(tokenizer, mine, source.length)}
        return replace(table, columns=columns, tokenizer=tokenizer)

    return Splits(*(encoded(table, mine) for table, mine in zip(splits, texts, strict=True)))


def _language(
    raws: dict[str, Raw], source: Source, other: str | Tokenizer | None = None
) -> tuple[Splits, Tokenizer | None]:
    """Texts cut into train, validation and test stretches by place, since neighbouring stretches are alike.

    other: a second tokenizer, which is made of the same texts where it must see some.
    """
    texts = [raws[part].inputs for part in PARTS] if source.domains else [[text] for text in _texts(raws, source)]
    tokenizer = words.make(source.tokenizer, texts[0], size=source.vocab, language=True)
    if isinstance(other, str):
        other = words.make(other, texts[0], size=source.vocab, language=True)
    pad = int(getattr(tokenizer, "pad", words.PAD))
    if source.masked:
        whole = [text for (text,) in texts]
        return clozes.splits(whole, tokenizer, source.length, pad, source.name, source.seed, source.masked), None

    def table(several: list[str]) -> Table:
        columns = [words.blocks(tokenizer.encode(text), source.length, pad) for text in several]
        if source.domains:
            columns = [c | {"domain": torch.full((len(c["inputs"]),), d)} for d, c in enumerate(columns)]
        joined = {name: torch.cat([c[name] for c in columns]) for name in columns[0]}
        return Table(joined, "tokens", name=source.name, tokenizer=tokenizer, constants=_words(tokenizer))

    return Splits(*map(table, texts)), other


def _texts(raws: dict[str, Raw], source: Source) -> list[str]:
    """The training, validation and test text."""
    joined = {part: "\n".join(map(str, raw.inputs)) for part, raw in raws.items()}
    plan, parts = _cut(raws, source)
    if plan == "own":
        return [joined[part] for part in PARTS]
    whole = "\n".join(joined.values()) if plan == "all" else joined["train"]
    first = round(parts["train"] * len(whole))
    second = len(whole) if not parts["test"] else first + round(parts["validation"] * len(whole))
    texts = [whole[:first], whole[first:second], whole[second:]]
    if plan == "held out":
        texts[2] = joined.get("test", joined.get("validation", ""))
    return texts


def _words(tokenizer: Tokenizer) -> dict[str, Tensor]:
    """How many ids are words, where the heads of networks may be padded to more."""
    return {"words": torch.tensor([tokenizer.size])}


def _chats(raws: dict[str, Raw], source: Source, note: Callable[[str], None] | None) -> Splits:
    """Conversations in tokens; those with no word of the assistant within `length` are left out and counted."""
    inputs = source.inputs[0] if isinstance(source.inputs, list) else source.inputs
    if any(raw.rows is None for raw in raws.values()):
        raise BadInput(f"{source.name} has no rows, so it holds no conversations")
    splits = _examples({part: Raw("rows", rows=raw.rows) for part, raw in raws.items()}, source, "rows")
    spoken = [chats.dialogues(t.rows, source.name, inputs, source.labels) if t.rows else [] for t in splits]
    texts = [str(message["content"]) for messages in spoken[0] for message in messages]
    tokenizer = words.make(source.tokenizer, texts, size=source.vocab, language=True)
    pad = int(getattr(tokenizer, "pad", words.PAD))
    tables, lost = [], 0
    for table, talks in zip(splits, spoken, strict=True):
        coded = [chats.encoded(tokenizer, messages) for messages in talks]
        if source.whole:
            fits = [i for i, (ids, _) in enumerate(coded) if len(ids) <= source.length + 1]
            talks, coded = [talks[i] for i in fits], [coded[i] for i in fits]
        columns, first, left_out = chats.columns(coded, source.length, pad, pack=source.pack)
        rows = [{"messages": talks[i]} for i in first]
        made = Table(columns, "tokens", name=table.name, tokenizer=tokenizer, rows=rows, constants=_words(tokenizer))
        tables.append(made)
        lost += left_out
    if lost and note is not None:
        note(f"{lost} of {sum(map(len, spoken))} conversations say nothing within {source.length} tokens: left out")
    return Splits(*tables)


# streams


def stream(
    spec: str | Path | Mapping[str, Any] | Source, batch_size: int, *, part: str = "train", seed: int = 0
) -> Stream:
    """Endless batches of a source that is read, not held: a hub set, or a jsonl, csv, tsv, parquet or text file.

    Nothing is known of the whole, so pictures need `mean` and `std` (or normalise: false), class names must be given in
    `classes` or be numbers, and the tokenizer is one that sees no text beforehand: hash for classification, bytes for
    language, or a pretrained one. Examples come in the order of the source.
    """
    source = _source(spec)
    if source.domains:
        raise BadInput("a stream reads one source; give no `domains`")
    if source.masked:
        raise BadInput("`masked` is of texts that are held, and a stream is not; give the name of a file to `load`")
    default = "bytes" if source.kind == "language" else "hash"
    tokenizer_name = source.tokenizer or default
    if tokenizer_name in ("chars", "words"):
        raise BadInput(
            f"tokenizer {tokenizer_name!r} must see the whole text first; a stream takes hash, bytes or a folder"
        )
    tokenizer = words.make(tokenizer_name, (), size=source.vocab, language=source.kind == "language")
    if source.name.startswith("hub:"):
        parts = _hub_parts(source, streaming=True)
        if part not in parts:
            raise BadInput(f"{source.name} has no split {part!r}{nearest(part, parts)}")
        features = getattr(parts[part], "features", None) or {}
        names = getattr(features.get(source.labels or "label"), "names", None)
        source = source if source.classes or not names else replace(source, classes=list(names))
        rows: Callable[[], Iterable[dict[str, Any]]] = lambda: iter(parts[part])
    else:
        path, variant = _path(source)
        chosen = stream_files(path, variant, part)
        rows = lambda: itertools.chain.from_iterable(map(rows_of, chosen))
    return Stream(lambda: _stream(rows(), source, part, tokenizer), batch_size, seed=seed, name=source.name)


def _stream(
    rows: Iterable[dict[str, Any]], source: Source, part: str, tokenizer: Tokenizer
) -> Iterator[dict[str, Tensor]]:
    rest: list[int] = []
    pad = int(getattr(tokenizer, "pad", words.PAD))
    rows = iter(rows)
    while chunk := list(itertools.islice(rows, 256)):
        raw = from_rows(chunk, source.name, source.inputs, source.labels)
        kind = source.kind or raw.kind
        if kind == "language":
            for text in raw.inputs:
                rest += tokenizer.encode(f"{text}\n")
            whole = (len(rest) - 1) // source.length * source.length
            columns = words.blocks(rest[: whole + 1], source.length, pad)
            rest = rest[whole:]
        elif kind == "rows":
            raise BadInput(f"{source.name} has no pictures, texts or numbers to stream; name the columns in `inputs`")
        else:
            columns = _columns(raw, kind, source, part)
            if kind == "text":
                columns |= words.padded(tokenizer, raw.inputs, source.length, fixed=True)
            if kind in ("images", "vectors"):
                if source.normalise and not source.mean:
                    raise BadInput("a stream cannot know its `mean` and `std`; give them, or say normalise: false")
                columns = _scaled(Table(columns), *_scale(columns["inputs"], source)).columns
            labels, _ = _number_labels({part: raw}, source)
            if part in labels:
                columns["labels"] = labels[part]
                if not source.classes and raw.labels is not None and not isinstance(raw.labels[0], (int, float)):
                    raise BadInput(f"labels of {source.name} are names; a stream must be told `classes`, in order")
        for i in range(len(next(iter(columns.values()), ()))):
            yield {name: column[i] for name, column in columns.items()}
