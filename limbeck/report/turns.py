"""Who was trained when, by what and for how long: the turns.json files of a run folder as one table."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

from limbeck.core.errors import BadInput
from limbeck.core.turns import FILE
from limbeck.report import numerals
from limbeck.report.runs import entries, mapping, number, recipe, text, texts
from limbeck.report.tables import aligned

HEAD = ("part", "arm", "seed", "stage", "player", "steps", "turns", "loss", "optimizer", "seconds")


@dataclass(frozen=True)
class Line:
    """What one player did in one stage of a method.

    part: the stage of the recipe, '' when it has one only. arm, seed: of the run; a network that was trained before all
    arms has no seed. stage: of the method. players: how many of one name, such as peers.0 and peers.1, are put
    together. first, last: steps of the stage with a turn. lr: before the schedule. began: seconds of that arm's
    training before the stage. seconds: of these turns.
    """

    part: str
    arm: str
    seed: str
    stage: str
    player: str
    players: int
    first: int
    last: int
    turns: int
    loss: tuple[str, ...]
    optimizer: str
    lr: float
    began: float
    seconds: float


def read(folder: Path, before: Mapping[str, Path] | None = None) -> list[Line]:
    """The lines of a run, in the order of training.

    before: role -> folder of a network that was trained before all arms; with a recipe of stages '<stage>/<role>'.
    Raises BadInput where nothing was recorded.
    """
    told = recipe(folder)
    if not told:
        raise BadInput(f"{folder} is no run folder: it holds no recipe.yaml")
    body = mapping(yaml.safe_load(told))
    stages = [text(stage.get("name")) for stage in entries(body.get("stages"))]
    found: list[Line] = []
    for part in stages or [""]:
        for role in ("teacher", "student"):
            place = (before or {}).get(f"{part}/{role}" if part else role)
            found += _lines(place, part, f"{role}, before", "", role) if place is not None else []
        for arm, seed, place in _places(folder / part):
            found += _lines(place, part, arm, seed)
    if not found:
        raise BadInput(f"{folder} records no turns: nothing was trained in it yet, or it is older than this record")
    return found


def _places(folder: Path) -> Iterator[tuple[str, str, Path]]:
    """Arms by seed: the student first, then the others as they were trained."""
    if (folder / FILE).exists():  # `do: train`
        yield "", "", folder
    seeds = sorted((p.name.removeprefix("seed-") for p in folder.glob("seed-*")), key=lambda s: (len(s), s))
    for seed in seeds:
        top = folder / f"seed-{seed}"
        for place in sorted((p.parent for p in top.rglob(FILE)), key=lambda p: (p != top, (p / FILE).stat().st_mtime)):
            yield "student" if place == top else place.relative_to(top).as_posix(), seed, place


def _lines(place: Path, part: str, arm: str, seed: str, player: str = "") -> list[Line]:
    try:
        stages = entries(json.loads((place / FILE).read_text()))
    except (OSError, ValueError):
        return []
    found = []
    for i, stage in enumerate(stages):
        name = text(stage.get("name")) or (str(i + 1) if len(stages) > 1 else "")
        players = {who: mapping(one) for who, one in mapping(stage.get("players")).items()}
        for root in dict.fromkeys(who.partition(".")[0] for who in players):
            same = [(w, one) for w, one in players.items() if w.partition(".")[0] == root]
            found.append(_line((part, arm, seed, name), player, same, number(stage.get("began")) or 0.0))
    return found


def _line(
    where: tuple[str, str, str, str], player: str, same: Sequence[tuple[str, dict[str, object]]], began: float
) -> Line:
    """One player, or the several of one name, such as peers.0 and peers.1."""

    def numbers(key: str) -> list[float]:
        return [number(one.get(key)) or 0.0 for _, one in same]

    who = same[0][0] if len(same) == 1 else same[0][0].partition(".")[0]
    return Line(
        *where,
        player or who,
        len(same),
        int(min(numbers("first"))),
        int(max(numbers("last"))),
        int(sum(numbers("turns"))),
        tuple(dict.fromkeys(name for _, one in same for name in texts(one.get("parts")))),
        " or ".join(dict.fromkeys(text(one.get("optimizer")) for _, one in same)),
        numbers("lr")[0],
        began,
        sum(numbers("seconds")),
    )


def table(lines: Sequence[Line]) -> list[str]:
    """The lines as text in columns; what repeats is left out, and so are columns that say nothing."""
    rows: list[tuple[str, ...]] = [HEAD]
    last = ("",) * 4
    for line in lines:
        place = (line.part, line.arm, line.seed, line.stage)
        new = next((i for i in range(4) if place[i] != last[i]), 4)
        rows.append(
            (
                *(shown if i >= new else "" for i, shown in enumerate(place)),
                line.player if line.players == 1 else f"{line.player} ({line.players})",
                f"{line.first}-{line.last}",
                f"{line.turns:,}",
                " + ".join(line.loss),
                f"{line.optimizer} {line.lr:g}",
                numerals.plain(round(line.seconds, 2)),
            )
        )
        last = place
    kept = [i for i in range(len(HEAD)) if any(row[i] for row in rows[1:])]
    return aligned([[row[i] for i in kept] for row in rows])
