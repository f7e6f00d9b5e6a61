"""Several methods in one shared setting: the same data, networks, budget, seeds and control for all of them.

Of a row's own recipe only what makes the method is taken: its losses with their weights, its training method, further
networks and store. Everything else is the setting's.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from limbeck import catalogue
from limbeck.core import find
from limbeck.core.errors import BadInput, Diverged, nearest
from limbeck.recipe import Recipe, load
from limbeck.report import numerals, statistics
from limbeck.report.files import plain
from limbeck.report.page import html
from limbeck.report.tables import aligned
from limbeck.run import methods_of, run
from limbeck.verbs.setting import Event

OWN = ("match", "method", "nets", "store")  # what a row brings along


@dataclass(frozen=True)
class Compared:
    """One method of a comparison.

    values: the deciding metric, a number a seed, empty when it could not run. gain: over the control. over: over the
    first method that ran; None for that one. why: what kept it from running, '' otherwise.
    """

    key: str
    values: tuple[float, ...] = ()
    gain: statistics.Gain | None = None
    over: statistics.Gain | None = None
    seconds: float = 0.0
    why: str = ""


@dataclass(frozen=True)
class Comparison:
    """What `compare` gives. metric: decides. first: the method that the others are also compared with."""

    metric: str
    first: str
    rows: tuple[Compared, ...]
    report: Path

    def as_dict(self) -> dict[str, Any]:
        """For --json and compare.json; None for what is not known, such as an interval from one seed."""
        body: dict[str, Any] = plain(asdict(self))
        return {**body, "report": str(self.report)}


def in_setting(key: str, setting: Recipe) -> Recipe:
    """The setting with the losses, method and further networks of a row's recipe, or of a method without one.

    A loss without a recipe stands beside cross-entropy at weight 1.
    """
    known = catalogue.recipes()
    rows = [row for row, methods in catalogue.implemented().items() if key in methods and row in known]
    rows = [row for row in rows if row == key or key in methods_of(load(known[row]))]
    if key in known or rows:
        own = load(known[key if key in known else rows[0]])
        if own.stages or own.do != setting.do:
            raise BadInput(f"the recipe of {key!r} is not one stage of `{setting.do}`, as this setting is")
        body = own.model_dump(exclude_unset=True)
        brought = {name: body.get(name) for name in OWN}
    elif key in find.names():
        family = find.family(key)
        if family not in ("losses", "train"):
            raise BadInput(f"{key!r} is a method of {find.folder(key)}; compare takes losses and training methods")
        brought = dict.fromkeys(OWN)
        brought |= {"match": ["ce", key]} if family == "losses" else {"method": key}
    else:
        raise BadInput(f"no row or method {key!r}{nearest(key, {*known, *find.names()})}")
    whole = dict.fromkeys(brought)  # replaced as wholes: losses of the setting must not stay beside them
    emptied = setting.with_changes(whole)
    return emptied.with_changes({**brought, "name": key, "row": None})


def compare(
    keys: Sequence[str],
    path: Path,
    *,
    seeds: int | None = None,
    folder: Path,
    on_event: Event | None = None,
) -> Comparison:
    """Run every method in the setting of the recipe at `path`, its teacher, data, student, budget and control.

    seeds: how many (default: the setting's). folder: of the runs, compare.json and report.html; what is done there
    already is not run again. A method that the setting cannot serve, such as one that needs attention maps of a
    convolutional network, is listed with the reason. Raises BadInput for a name that does not exist.
    """
    setting = load(path)
    if setting.stages:
        raise BadInput(f"{path}: a setting is a recipe of one stage")
    if len(set(keys)) < len(keys):
        raise BadInput("a method is named twice")
    if seeds:
        setting = setting.model_copy(update={"seeds": list(range(seeds))})
    chosen = {key: in_setting(key, setting) for key in keys}
    rows: list[Compared] = []
    metric, first, higher = "", "", True
    for key, recipe in chosen.items():
        place = folder / key
        try:
            run(recipe, folder=place, resume=place.exists(), on_event=on_event, shared=folder / ".shared")
        except (BadInput, Diverged) as error:
            rows.append(Compared(key, why=str(error)))
            continue
        body = json.loads((place / "result.json").read_text())
        metric, higher = body["metric"], body["higher_is_better"]
        values = {arm: tuple(m[metric] for m in body["arms"][arm]["per_seed"]) for arm in ("student", "control")}
        gain = statistics.gain(values["student"], values["control"], higher_is_better=higher)
        before = next((row.values for row in rows if row.key == first), None)
        over = statistics.gain(values["student"], before, higher_is_better=higher) if before else None
        first = first or key
        rows.append(Compared(key, values["student"], gain, over, sum(body["arms"]["student"]["seconds"])))
    done = [folder / row.key for row in rows if row.values]
    if not done:
        raise BadInput(f"none of the methods can run in this setting: {rows[0].why}")
    page = html(done, folder / "report.html", title=f"{len(done)} methods in the setting of {path.stem}")
    found = Comparison(metric, first, tuple(rows), page)
    (folder / "compare.json").write_text(json.dumps(found.as_dict(), indent=1))
    return found


def lines(found: Comparison) -> list[str]:
    """The table for the terminal: value, gain over the control, difference to the first method, seconds."""
    higher = not numerals.lower_is_better(found.metric)

    def told(gain: statistics.Gain | None) -> str:
        return numerals.with_interval(found.metric, gain.mean, gain.low, gain.high, higher) if gain else ""

    head = ("method", numerals.pretty(found.metric), "over the control", f"over {found.first}", "seconds")
    cells = [head]
    for row in found.rows:
        if row.values:
            mean = numerals.value(found.metric, sum(row.values) / len(row.values))
            cells.append((row.key, mean, told(row.gain), told(row.over), f"{row.seconds:,.0f}"))
    return aligned(cells) + [f"{row.key}: not run here: {row.why}" for row in found.rows if row.why]
