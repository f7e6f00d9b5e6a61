"""A run folder, read tolerantly: only a missing or torn result.json stops a report; what else is absent is left out."""

import json
import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from limbeck.core.errors import BadInput
from limbeck.report import numerals, statistics
from limbeck.report.statistics import Gain

# Arms that show what was started from, in order of preference: costs are compared with the first that is there.
REFERENCES = ("teacher", "full", "whole", "original")
KNOWN = frozenset("label per_seed parameters bytes latency_ms latency_p95_ms seconds".split())
IMAGES = {b"\x89PNG\r\n\x1a\n": "image/png", b"\xff\xd8\xff": "image/jpeg"}


@dataclass(frozen=True)
class Arm:
    """One thing that was measured: the student, its control, the teacher.

    per_seed: metric -> value of each seed (nan where a seed lacks it). sizes: its further numbers (images, steps).
    """

    key: str
    label: str
    per_seed: dict[str, tuple[float, ...]]
    parameters: float | None
    bytes: float | None
    latency_ms: float | None
    latency_p95_ms: float | None
    seconds: tuple[float, ...]
    sizes: dict[str, float]

    def values(self, metric: str) -> tuple[float, ...]:
        """The metric of each seed, () when it was not measured."""
        return self.per_seed.get(metric, ())


@dataclass(frozen=True)
class Picture:
    """A picture beside the result; `data` is None when the file is missing or is no picture."""

    title: str
    caption: str
    kind: str
    data: bytes | None


@dataclass(frozen=True)
class ExtraTable:
    """A table that the run brought along; cells are text already."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    numeric: tuple[bool, ...]


@dataclass(frozen=True)
class Citation:
    """A paper that the run's methods come from."""

    paper: str
    arxiv: str


@dataclass(frozen=True)
class Run:
    """Everything a report says of one run."""

    folder: Path
    name: str
    do: str
    metric: str
    higher_is_better: bool
    seeds: tuple[str, ...]
    arms: dict[str, Arm]
    gain: Gain | None
    verdict: str
    pictures: tuple[Picture, ...]
    tables: tuple[ExtraTable, ...]
    versions: dict[str, str]
    commit: str
    recipe_hash: str
    seconds: float | None
    device: str
    methods: tuple[str, ...]
    citations: tuple[Citation, ...]
    recipe: str
    notes: tuple[str, ...]

    @property
    def student(self) -> Arm | None:
        return self.arms.get("student")

    @property
    def against(self) -> Arm | None:
        return self.arms.get(self.gain.against) if self.gain else None

    @property
    def reference(self) -> Arm | None:
        return next((self.arms[key] for key in REFERENCES if key in self.arms), None)

    @property
    def state(self) -> str:
        """'helped', 'did not help', 'cannot tell', or '' for a run without a comparison."""
        return statistics.state(self.gain) if self.gain else ""

    def seed(self, index: int) -> str:
        """The name of the index-th seed."""
        return self.seeds[index] if index < len(self.seeds) else str(index)


def read(folder: Path) -> Run:
    """The run in `folder` (or whose result.json `folder` is); BadInput when its result.json is absent or torn."""
    folder = folder.parent if folder.name == "result.json" else folder
    result = load(folder)
    notes: list[str] = []
    arms = {key: arm(key, entry) for key, entry in mapping(result.get("arms")).items() if isinstance(entry, dict)}
    metric = text(result.get("metric"))
    if not metric:
        metric = next((name for a in arms.values() for name in a.per_seed), "")
    higher = result.get("higher_is_better")
    higher_is_better = higher if isinstance(higher, bool) else not numerals.lower_is_better(metric)
    found = find_gain(result, arms, metric, higher_is_better, notes)
    do = " → ".join(texts(result.get("do")))
    sentence = text(result.get("verdict"))
    if not sentence and found:
        sentence = statistics.verdict(found, metric, higher_is_better=higher_is_better, do=do)
    if not sentence:
        sentence = "This run compares nothing: it has no control to be judged against."
    return Run(
        folder=folder,
        name=text(result.get("name")) or folder.resolve().name,
        do=do,
        metric=metric,
        higher_is_better=higher_is_better,
        seeds=texts(result.get("seeds")),
        arms=arms,
        gain=found,
        verdict=sentence,
        pictures=tuple(picture(folder, entry, notes) for entry in entries(result.get("pictures"))),
        tables=tuple(extra_table(entry) for entry in entries(result.get("tables"))),
        versions={key: text(version) for key, version in mapping(result.get("versions")).items()},
        commit=text(result.get("commit")),
        recipe_hash=text(result.get("recipe_hash")),
        seconds=number(result.get("seconds")),
        device=text(result.get("device")),
        methods=texts(result.get("methods")),
        citations=tuple(
            Citation(text(entry.get("paper")), text(entry.get("arxiv"))) for entry in entries(result.get("citations"))
        ),
        recipe=recipe(folder),
        notes=tuple(notes),
    )


def read_all(folders: Sequence[Path]) -> list[Run]:
    """The runs in their order; BadInput when there is none."""
    if not folders:
        raise BadInput("a report needs at least one run folder, found none; give the folders that `limbeck run` made")
    return [read(Path(folder)) for folder in folders]


def load(folder: Path) -> dict[str, object]:
    """The parsed result.json, or the sentence that says what is wrong with it and what to do."""
    path = folder / "result.json"
    try:
        result: object = json.loads(path.read_text("utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        inside = sorted(p.parent.name for p in folder.glob("*/result.json"))[:5] if folder.is_dir() else []
        if inside:
            cure = f"; it holds the run folders {', '.join(inside)}: give one of these"
        elif folder.is_dir():
            cure = "; the run has not ended: run it again, or resume it, until result.json is there"
        else:
            cure = "; there is no such folder"
        raise BadInput(f"{folder} is not a finished run: it has no result.json{cure}") from None
    except json.JSONDecodeError as error:
        raise BadInput(
            f"{path}: line {error.lineno}, column {error.colno}: torn or not JSON ({error.msg}); run the recipe again"
        ) from None
    except (UnicodeDecodeError, RecursionError, ValueError) as error:
        raise BadInput(f"{path}: not readable as JSON ({type(error).__name__}); run the recipe again") from None
    except OSError as error:
        raise BadInput(f"{path}: cannot be read: {error.strerror or error}") from None
    if not isinstance(result, dict):
        raise BadInput(f"{path}: found a JSON {type(result).__name__}, expected an object; run the recipe again")
    return cast(dict[str, object], result)


def find_gain(
    result: dict[str, object], arms: dict[str, Arm], metric: str, higher_is_better: bool, notes: list[str]
) -> Gain | None:
    """The gain computed from the seeds where they are there, else as stated; where the two disagree, a note says so."""
    stated = mapping(result.get("gain"))
    against = text(stated.get("against")) or "control"
    mean = number(stated.get("mean"))
    given: Gain | None = None
    if mean is not None and math.isfinite(mean):
        low, high = number(stated.get("low")), number(stated.get("high"))
        seeds = number(stated.get("n"))
        nan = float("nan")
        given = Gain(
            mean,
            nan if low is None else low,
            nan if high is None else high,
            int(seeds) if seeds is not None and math.isfinite(seeds) else 1,
            against,
        )
    if "student" not in arms or against not in arms:
        return given
    student, control = arms["student"].values(metric), arms[against].values(metric)
    computed = statistics.gain(student, control, higher_is_better=higher_is_better, against=against)
    if not computed.n:
        return given
    if len(student) != len(control) or computed.n < max(len(student), len(control)):
        notes.append(f"{computed.n} of {max(len(student), len(control))} seeds have both sides of the comparison.")
    if given and not math.isclose(given.mean, computed.mean, rel_tol=1e-6, abs_tol=1e-9):
        notes.append(
            f"result.json states a gain of {numerals.gained(metric, given.mean, higher_is_better)}; "
            "the value shown here is computed from its seeds."
        )
    return computed


def arm(key: str, entry: dict[str, object]) -> Arm:
    """One arm, with the metrics of its seeds turned into columns."""
    seeds = [flat(mapping(one)) for one in sequence(entry.get("per_seed"))]
    names = list(dict.fromkeys(name for one in seeds for name in one))
    latency = entry.get("latency_ms")
    inner = mapping(latency)
    p95 = entry.get("latency_p95_ms", inner.get("p95"))
    seconds = entry.get("seconds")
    return Arm(
        key=key,
        label=text(entry.get("label")),
        per_seed={name: tuple(one.get(name, float("nan")) for one in seeds) for name in names},
        parameters=positive(entry.get("parameters")),
        bytes=positive(entry.get("bytes")),
        latency_ms=positive(inner.get("p50", inner.get("median", inner.get("mean"))) if inner else latency),
        latency_p95_ms=positive(p95),
        seconds=tuple(x for x in map(number, sequence(seconds) or [seconds]) if x is not None),
        sizes={
            name: amount
            for name, amount in ((n, number(v)) for n, v in entry.items() if n not in KNOWN)
            if amount is not None
        },
    )


def flat(entry: dict[str, object], prefix: str = "") -> dict[str, float]:
    """{'calibration': {'ece': 0.02}} -> {'calibration ece': 0.02}; what is no number is left out."""
    out: dict[str, float] = {}
    for name, thing in entry.items():
        if isinstance(thing, dict):
            out |= flat(thing, f"{prefix}{name} ")
        elif (amount := number(thing)) is not None:
            out[prefix + name] = amount
    return out


def picture(folder: Path, entry: dict[str, object], notes: list[str]) -> Picture:
    """The picture's bytes, only from inside the run folder and only when they are a PNG or JPEG."""
    file = text(entry.get("file"))
    title = text(entry.get("title")) or file
    data: bytes | None = None
    kind = ""
    path = Path(os.path.realpath(folder / file))
    if not file or not path.is_relative_to(os.path.realpath(folder)):
        notes.append(f"The picture {file!r} is not inside the run folder and was left out.")
    else:
        try:
            data = path.read_bytes()
        except (OSError, ValueError):
            notes.append(f"The picture {file} is missing.")
        else:
            kind = next((kind for magic, kind in IMAGES.items() if data.startswith(magic)), "")
            if not kind:
                data = None
                notes.append(f"The picture {file} is neither PNG nor JPEG and was left out.")
    return Picture(title, text(entry.get("caption")), kind, data)


def extra_table(entry: dict[str, object]) -> ExtraTable:
    """A table with its cells as text, rows padded to the columns."""
    rows = [sequence(row) for row in sequence(entry.get("rows"))]
    columns = texts(entry.get("columns"))
    width = max([len(columns), *map(len, rows)])
    columns += ("",) * (width - len(columns))
    cells = [[cell(thing) for thing in row] + [""] * (width - len(row)) for row in rows]
    numeric = tuple(
        any(number(row[i]) is not None for row in rows if i < len(row))
        and not any(isinstance(row[i], str) for row in rows if i < len(row))
        for i in range(width)
    )
    return ExtraTable(text(entry.get("title")), columns, tuple(map(tuple, cells)), numeric)


def cell(thing: object) -> str:
    """A table's cell as text."""
    amount = number(thing)
    return numerals.plain(amount) if amount is not None else text(thing)


def recipe(folder: Path) -> str:
    """The resolved recipe as it was written, '' when it is gone."""
    try:
        return (folder / "recipe.yaml").read_text("utf-8", errors="replace").strip()
    except OSError:
        return ""


def number(thing: object) -> float | None:
    """A float, or None for what is no number (booleans are none)."""
    if isinstance(thing, bool) or not isinstance(thing, (int, float)):
        return None
    try:
        return float(thing)
    except OverflowError:
        return math.inf if thing > 0 else -math.inf


def positive(thing: object) -> float | None:
    """A number for what cannot be nil when it was measured (parameters, bytes, latency): 0 stands for not measured."""
    amount = number(thing)
    return None if amount is not None and amount <= 0 else amount


def text(thing: object) -> str:
    """A scalar as text; '' for nothing and for containers. Control characters, which no page can show, are dropped."""
    if thing is None or isinstance(thing, (dict, list)):
        return ""
    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f\ud800-\udfff]", "", str(thing)).strip()


def texts(thing: object) -> tuple[str, ...]:
    """A list's scalars as text; a lone scalar is a list of one."""
    return tuple(t for t in map(text, thing if isinstance(thing, list) else [thing]) if t)


def mapping(thing: object) -> dict[str, object]:
    """The thing when it is an object, else an empty one."""
    return cast(dict[str, object], thing) if isinstance(thing, dict) else {}


def sequence(thing: object) -> list[object]:
    """The thing when it is a list, else an empty one."""
    return cast(list[object], thing) if isinstance(thing, list) else []


def entries(thing: object) -> list[dict[str, object]]:
    """The objects in a list."""
    return [mapping(entry) for entry in sequence(thing) if isinstance(entry, dict)]
