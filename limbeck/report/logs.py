"""The training logs of a run folder as curves: resumed runs, stages and torn last lines are put in order here."""

import json
import math
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from limbeck.report.runs import mapping, number, text

Curve = list[tuple[float, float]]


@dataclass
class Log:
    """One log.jsonl. losses: player -> part -> curve; validation: metric -> curve; stages: steps where one begins."""

    arm: str
    seed: str
    losses: dict[str, dict[str, Curve]] = field(default_factory=dict)
    validation: dict[str, Curve] = field(default_factory=dict)
    stages: list[float] = field(default_factory=list)
    unreadable: int = 0
    not_finite: int = 0
    logged: int = 0


def logs(folder: Path) -> list[Log]:
    """Every seed's log in order: seed-N/log.jsonl is the student's, seed-N/<arm>/log.jsonl that of another arm."""
    found: list[tuple[float, str, str, Path]] = []
    for path in [*folder.glob("seed-*/log.jsonl"), *folder.glob("seed-*/*/log.jsonl")]:
        parts = path.relative_to(folder).parts
        seed = parts[0].removeprefix("seed-")
        order = float(seed) if seed.isdecimal() else math.inf
        found.append((order, seed, "student" if len(parts) == 2 else parts[1], path))
    return [log(path, arm, seed) for _, seed, arm, path in sorted(found)]


def log(path: Path, arm: str, seed: str) -> Log:
    """One log. A step that goes back within a stage is a resumed run: what was logged after it is superseded."""
    made = Log(arm, seed)
    try:
        lines = path.read_text("utf-8", errors="replace").splitlines()
    except OSError:
        made.unreadable = 1
        return made
    events: list[tuple[float, str, str, str, float]] = []  # step over all stages, kind, player, name, value
    offsets: dict[float, float] = {}
    starts: dict[float, float] = {}
    last = 0.0
    for line in lines:
        if not line.strip():
            continue
        entry = parsed(line)
        t = number(entry.get("t")) if entry else None
        if entry is None or t is None or not math.isfinite(t):
            made.unreadable += 1
            continue
        stage = number(entry.get("stage")) or 0.0
        if stage not in offsets:
            # Steps count on over stages; a log whose stages each start at zero is laid end to end.
            offsets[stage] = last if t < last else 0.0
        step = offsets[stage] + t
        starts.setdefault(stage, step)
        if step < last:
            del events[bisect_left(events, step, key=lambda event: event[0]) :]
        last = step
        if "validation" in entry:
            values = {name: number(v) for name, v in mapping(entry["validation"]).items()}
            events += [(step, "validation", "", name, v) for name, v in values.items() if v is not None]
            continue
        player = text(entry.get("player")) or "student"
        values = {name: number(v) for name, v in mapping(entry.get("parts")).items()}
        if len(values) != 1:  # a single part is the loss itself
            values = {"loss": number(entry.get("loss"))} | values
        events += [(step, "loss", player, name, v) for name, v in values.items() if v is not None]
    for step, kind, player, name, v in events:
        made.logged += kind == "loss"
        if not math.isfinite(v):
            made.not_finite += kind == "loss"
        elif kind == "validation":
            made.validation.setdefault(name, []).append((step, v))
        else:
            made.losses.setdefault(player, {}).setdefault(name, []).append((step, v))
    made.stages = sorted(set(starts.values()))[1:]
    return made


def parsed(line: str) -> dict[str, object] | None:
    """The line's object, or None for a line that a killed run left unfinished."""
    try:
        thing: object = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return mapping(thing) if isinstance(thing, dict) else None


def average(curves: Sequence[Curve], *, bins: int = 120) -> Curve:
    """The mean curve over seeds, and over neighbouring steps where there are more than `bins` of them."""
    points = np.asarray([point for curve in curves for point in curve], dtype=np.float64).reshape(-1, 2)
    if not len(points):
        return []
    steps, values = points[:, 0], points[:, 1]
    places, group = np.unique(steps, return_inverse=True)
    if len(places) > bins:
        edges = np.linspace(steps.min(), steps.max(), bins + 1)
        group = np.clip(np.digitize(steps, edges) - 1, 0, bins - 1)
    count = np.bincount(group)
    kept = count > 0
    mean_step = np.bincount(group, weights=steps)[kept] / count[kept]
    mean_value = np.bincount(group, weights=values)[kept] / count[kept]
    return [(float(a), float(b)) for a, b in zip(mean_step, mean_value, strict=True)]
