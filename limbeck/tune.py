"""Choose settings: a recipe under every combination of some overrides, judged on the validation split alone.

The seeds of a search start at 100, so that the evidence, whose seeds start at 0, is not what decided the settings.
"""

import itertools
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from limbeck.core.errors import BadInput, Diverged
from limbeck.recipe import Recipe, load
from limbeck.report import numerals
from limbeck.report.statistics import gain as gain_of
from limbeck.report.tables import aligned
from limbeck.run import before_last, deciding, one_arm
from limbeck.verbs import build
from limbeck.verbs.check import VERBS, check_names
from limbeck.verbs.setting import Event, Outcome
from limbeck.verbs.together import first
from limbeck.verify import code_digest

FIRST_SEED = 100
UNKNOWN = (math.nan,)


@dataclass(frozen=True)
class Trial:
    """One combination, written as on the command line, and the validation metric of student and control by seed.

    One nan each where a run diverged.
    """

    overrides: tuple[str, ...]
    student: tuple[float, ...]
    control: tuple[float, ...]

    @property
    def mean(self) -> float:
        """The student's mean over seeds."""
        return statistics.fmean(self.student)


@dataclass(frozen=True)
class Search:
    """What a search gave. metric: the one that decides. trials: in the order of the grid."""

    metric: str
    trials: tuple[Trial, ...]

    @property
    def best(self) -> Trial:
        """The trial whose students are best on the mean."""
        pick = min if numerals.lower_is_better(self.metric) else max
        return pick([t for t in self.trials if math.isfinite(t.mean)] or self.trials, key=lambda trial: trial.mean)

    def table(self) -> list[str]:
        """A line a trial below a head: the settings, the student's mean, and its gain with the 95 % interval."""
        higher = not numerals.lower_is_better(self.metric)
        keys = [override.partition("=")[0] for override in self.trials[0].overrides]
        rows = [[*keys, numerals.pretty(self.metric), "gain over the control", ""]]
        for trial in self.trials:
            gain = gain_of(trial.student, trial.control, higher_is_better=higher)
            told = numerals.with_interval(self.metric, gain.mean, gain.low, gain.high, higher)
            values = [override.partition("=")[2] for override in trial.overrides]
            mark = "best" if trial is self.best else ""
            figures = [numerals.value(self.metric, trial.mean), told] if math.isfinite(trial.mean) else ["diverged", ""]
            rows.append([*values, *figures, mark])
        return aligned(rows)


def combinations(grid: Sequence[str]) -> list[tuple[str, ...]]:
    """["a=1,2", "b=3"] -> [("a=1", "b=3"), ("a=2", "b=3")]; commas inside brackets do not separate."""
    axes = []
    for text in grid:
        key, sign, values = text.partition("=")
        if not sign or not key or not values:
            raise BadInput(f"what is tried is written key.key=value,value, got {text!r}")
        axes.append([f"{key}={value}" for value in _parts(values)])
    return list(itertools.product(*axes))


def _parts(values: str) -> list[str]:
    parts, depth = [""], 0
    for letter in values:
        depth += (letter in "[{") - (letter in "]}")
        if letter == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += letter
    return parts


def tune(
    path: Path, grid: Sequence[str], *, seeds: int = 3, root: Path = Path("runs"), on_event: Event | None = None
) -> Search:
    """Try every combination of a grid such as ["match.kd.weight=0.5,0.9", "match.kd.temperature=2,4"].

    seeds: how many for each combination and its control. What the same code has done already is not run again. Of
    several stages the last is tuned, on what those before it make once for all combinations that leave them alike.
    Raises BadInput for any combination that is no recipe, before the first is run, and Diverged when all of them do.
    """
    chosen = [(overrides, _prepared(load(path, overrides), seeds)) for overrides in combinations(grid)]
    for _, recipe in chosen:
        check_names(recipe)
    bound = [_last(recipe, root / "tune", on_event) for _, recipe in chosen]
    for recipe, place in bound:
        if not first(place.exists):
            build.setting(recipe, place, on_event, False)  # rehearses it
    found: list[dict[str, list[Outcome]]] = []
    why: Diverged | None = None
    for recipe, place in bound:
        try:
            found.append(_arms(recipe, place, root / "tune" / "shared", on_event))
        except Diverged as error:
            found.append({})
            why = error
    if why is not None and not any(found):
        raise why
    metric = next(deciding(recipe, arms) for (recipe, _), arms in zip(bound, found, strict=True) if arms)
    trials = []
    for (overrides, _), arms in zip(chosen, found, strict=True):
        values = {arm: tuple(o.metrics[metric] for o in outcomes) for arm, outcomes in arms.items()}
        trials.append(Trial(overrides, values.get("student", UNKNOWN), values.get("control", UNKNOWN)))
    return Search(metric, tuple(trials))


def _prepared(recipe: Recipe, seeds: int) -> Recipe:
    *before, last = recipe.stages or [recipe]
    if last.do not in VERBS:
        raise BadInput(f"{last.name}: `{last.do}` has no control, so it cannot be tuned")
    changes = {"split": "validation", "seeds": list(range(FIRST_SEED, FIRST_SEED + seeds))}
    judged = last.model_copy(update={**changes, "expect": recipe.expect or last.expect})
    return recipe.model_copy(update={"stages": [*before, judged]}) if before else judged


def _last(recipe: Recipe, home: Path, on_event: Event | None) -> tuple[Recipe, Path]:
    """The stage that is tuned, bound to what those before it made, and its folder, whatever the number of seeds."""
    if recipe.stages:
        before = recipe.model_copy(update={"stages": recipe.stages[:-1]})
        home = home / f"{recipe.name}-before-{before.digest}-{code_digest(before)}"
        recipe = before_last(recipe, home, True, on_event, None)
    key = recipe.model_copy(update={"seeds": [0]}).digest
    return recipe, home / f"{recipe.name}-{key}-{code_digest(recipe)}"


def _arms(recipe: Recipe, folder: Path, shared: Path, on_event: Event | None) -> dict[str, list[Outcome]]:
    verb, setting = VERBS[recipe.do], build.setting(recipe, folder, on_event, resume=True)
    out: dict[str, list[Outcome]] = {"student": [], "control": []}
    for seed in recipe.seeds:
        for arm, outcomes in out.items():
            outcomes.append(one_arm(setting, verb, arm, seed, shared)[0])
    return out
