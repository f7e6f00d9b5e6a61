"""Carries a recipe out: seeds x arms (student, control, teacher ...), the gain over the control, and the report."""

import hashlib
import json
import platform
import subprocess
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, replace
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import nn

from limbeck.core import find
from limbeck.core.batches import Splits, Table
from limbeck.core.checkpoint import fingerprint
from limbeck.core.errors import BadInput, nearest
from limbeck.core.store import data_fingerprint
from limbeck.recipe import Recipe, dump
from limbeck.report import numerals, statistics
from limbeck.verbs import build, label, teach
from limbeck.verbs.check import VERBS, check_names, untouched
from limbeck.verbs.result import Result
from limbeck.verbs.setting import Event, Outcome, Setting, record
from limbeck.verbs.together import first, leads, processes

REPORTED = ("torch", "numpy", "accelerate", "safetensors", "limbeck")
EVERYWHERE = ("core", "zoo", "verbs", "adapters", "measure")  # folders of code that decide every figure


def run(
    recipe: Recipe,
    *,
    folder: Path | None = None,
    root: Path = Path("runs"),
    resume: bool = False,
    on_event: Event | None = None,
    shared: Path | None = None,
) -> Result:
    """Run a recipe (every stage, every seed, every arm) in a new folder below `root`, or in `folder`.

    resume: go on in `folder` where it stopped. shared: a folder of finished controls that runs in one setting share.
    Raises BadInput before anything is written when the recipe cannot be carried out.
    """
    folder = folder or new_folder(root, recipe.name)
    if recipe.stages:
        return _stages(recipe, folder, resume, on_event, shared)
    setting = build.setting(recipe, folder, on_event, resume)
    return carry_out(setting, shared=shared)


def carry_out(setting: Setting, *, shared: Path | None = None) -> Result:
    """Run every arm under every seed of a setting that is already bound to data and networks."""
    with untouched(setting.folder):
        return _every_arm(setting, shared)


def _every_arm(setting: Setting, shared: Path | None) -> Result:
    recipe, folder = setting.recipe, setting.folder
    if recipe.do in ("label", "train", "evaluate"):
        alone: Result = label.run(setting)
        return alone
    verb = VERBS[recipe.do]
    began = time.monotonic()
    record(recipe, folder, setting.objects)
    arms: dict[str, list[Outcome]] = {arm: [] for arm in verb.arms(recipe)}
    artefact: Any = None
    for seed in recipe.seeds:
        for arm in arms:
            outcome, made = one_arm(setting, verb, arm, seed, shared)
            if arm == "student" and artefact is None:
                known = made is None and hasattr(verb, "artefact")
                artefact = verb.artefact(setting, place_of(folder, arm, seed)) if known else made
            arms[arm].append(outcome)
    spent = sum(outcome.spent for outcomes in arms.values() for outcome in outcomes)  # by earlier processes, too
    gain, result = summary(recipe, arms, max(spent, time.monotonic() - began))
    first(lambda: _report(setting, result))
    control = mean_metrics(arms.get("control", []))
    return Result(artefact, mean_metrics(arms["student"]), control, gain, result["verdict"], folder, arms)


def _report(setting: Setting, result: dict[str, Any]) -> None:
    """result.json, pictures and report.html."""
    from limbeck.report.page import html

    verb, folder = VERBS[setting.recipe.do], setting.folder
    pictures = {"pictures": verb.pictures(setting, folder)} if hasattr(verb, "pictures") else {}
    _write(folder / "result.json", {**result, **pictures})
    html([folder], folder / "report.html")


def place_of(folder: Path, arm: str, seed: int) -> Path:
    """Where an arm writes under a seed; the student's folder holds those of the others."""
    return folder / f"seed-{seed}" / ("" if arm == "student" else arm)


def one_arm(setting: Setting, verb: ModuleType, arm: str, seed: int, shared: Path | None) -> tuple[Outcome, Any]:
    """One arm under one seed: its outcome, which is also written down, and what it made.

    What is taken up has made nothing: an arm that is done when resuming, and a control that another run in the same
    setting has finished, from the folder `shared`.
    """
    where = place_of(setting.folder, arm, seed)
    place = shared / _shared_key(setting, verb, arm, seed) if shared and arm != "student" else None
    known = Outcome.load(where) if setting.resume else None
    if known is not None:
        return known, None
    known = Outcome.load(place) if place is not None else None
    if known is not None:
        known = replace(known, spent=0.0)
        known.save(where)
        return known, None
    began = time.monotonic()
    if setting.on_event is not None:
        setting.on_event({"arm": arm, "seed": seed, "label": verb.label(setting.recipe, arm)})
    outcome, made = verb.run(setting, arm, seed, where)
    outcome.spent = max(time.monotonic() - began, outcome.seconds)  # of an arm gone on with, training began before
    for folder in (where, place):
        if folder is not None:
            outcome.save(folder)
    return outcome, made


def _shared_key(setting: Setting, verb: ModuleType, arm: str, seed: int) -> str:
    """What decides a control: its recipe without what only the student reads, the seed, data, teacher and code."""
    recipe = setting.recipe
    told = verb.control_recipe(recipe) if arm == "control" else recipe
    told = verb.arm_recipe(recipe, arm) if arm in recipe.beside else told
    body, methods = told.model_dump(mode="json"), tuple(verb.methods(told))
    for key in ("name", "row", "seeds", "expect", "control", "beside"):
        body.pop(key)
    if arm not in ("control", "removal", *recipe.beside):  # the teacher, or the whole training set
        methods = ()
        for key in ("method", "match", "train"):
            body.pop(key)
    splits, teacher = setting.splits, setting.teacher
    prints = [_content(splits.train), _content(splits.test), fingerprint(teacher) if teacher else ""]
    text = json.dumps([told.do, arm, seed, body, prints, source_digest(methods)], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:20]


def _content(table: Table) -> str:
    if "inputs" in table.columns:
        return data_fingerprint(table)
    return hashlib.sha256(json.dumps(table.rows, sort_keys=True, default=str).encode()).hexdigest()


@cache
def source_digest(methods: tuple[str, ...] = ()) -> str:
    """Hash of the code that every run goes through, and of the files of these methods."""
    files = [file for part in EVERYWHERE for file in (find.ROOT / part).rglob("*.py")]
    files += [find.ROOT.parent / f"{find.names()[name].replace('.', '/')}.py" for name in ("distill", *methods)]
    digest = hashlib.sha256()
    for file in sorted(set(files)):
        digest.update(file.read_bytes())
    return digest.hexdigest()[:16]


def mean_metrics(outcomes: list[Outcome]) -> dict[str, float]:
    """Mean over seeds of every metric."""
    return mean_of([outcome.metrics for outcome in outcomes])


def mean_of(tables: Iterable[Mapping[str, float]]) -> dict[str, float]:
    """The mean of every number over the tables that have it; what is the same in all stays as it is."""
    values: dict[str, list[float]] = {}
    for table in tables:
        for name, value in table.items():
            values.setdefault(name, []).append(value)
    return {n: v[0] if len(set(v)) == 1 else sum(v) / len(v) for n, v in values.items()}


def deciding(recipe: Recipe, arms: Mapping[str, list[Outcome]]) -> str:
    """The metric that decides: the recipe's, what it expects, or the first measured."""
    measured = arms["student"][0].metrics
    usual = "nll" if "nll" in measured and not recipe.measure else next(iter(measured))
    wanted = recipe.metric or (recipe.expect.metric if recipe.expect else "") or usual
    if wanted not in measured:
        raise BadInput(f"the metric {wanted!r} was not measured{nearest(wanted, measured)}")
    return wanted


def summary(
    recipe: Recipe, arms: Mapping[str, list[Outcome]], seconds: float
) -> tuple[statistics.Gain, dict[str, Any]]:
    """The gain, and result.json: figures by arm and seed, the gain with its interval, versions, citations."""
    metric = deciding(recipe, arms)
    higher = not numerals.lower_is_better(metric)
    against = recipe.expect.beats if recipe.expect else "control"
    if against not in arms:
        raise BadInput(f"`expect.beats` names {against!r}, but the arms of {recipe.do!r} are {', '.join(arms)}")
    values = {arm: [o.metrics.get(metric, float("nan")) for o in outcomes] for arm, outcomes in arms.items()}
    gain = statistics.gain(values["student"], values[against], higher_is_better=higher, against=against)
    names = methods_of(recipe)
    return gain, {
        "name": recipe.name,
        "do": recipe.do,
        "metric": metric,
        "higher_is_better": higher,
        "seeds": recipe.seeds,
        "arms": {
            arm: {
                "label": outcomes[0].label,
                "per_seed": [o.metrics for o in outcomes],
                "parameters": outcomes[0].parameters,
                "bytes": outcomes[0].bytes,
                "latency_ms": outcomes[0].latency_ms,
                "seconds": [round(o.seconds, 3) for o in outcomes],
                **mean_of([o.sizes for o in outcomes]),
            }
            for arm, outcomes in arms.items()
        },
        "gain": asdict(gain),
        "beside": {
            arm: asdict(statistics.gain(values["student"], values[arm], higher_is_better=higher, against=arm))
            for arm in recipe.beside
        },
        "verdict": statistics.verdict(gain, metric, higher_is_better=higher, do=recipe.do),
        "versions": versions(),
        "commit": commit(),
        "recipe_hash": recipe.digest,
        "seconds": round(seconds, 2),
        "device": processes().device.type,
        "methods": names,
        "citations": [{"paper": c.paper, "arxiv": c.arxiv} for c in (find.get(n).card for n in names)],
    }


def methods_of(recipe: Recipe) -> list[str]:
    """Names of all methods that a recipe and its stages use, each once."""
    if recipe.stages:
        found = [name for stage in recipe.stages for name in methods_of(stage)]
    elif recipe.do == "train":
        found = teach.methods(label.alone(recipe))
    else:
        found = VERBS[recipe.do].methods(recipe) if recipe.do in VERBS else []
    return list(dict.fromkeys(found))


def versions() -> dict[str, str]:
    """Versions of what computed the result."""
    out = {"python": platform.python_version()}
    for name in REPORTED:
        try:
            out[name] = version(name)
        except PackageNotFoundError:
            continue
    return out


def commit() -> str:
    """The commit of the checkout that the code was run from, '' outside one; '+' marks local changes."""
    root = Path(__file__).parent.parent
    if not (root / ".git").exists():
        return ""
    try:
        head, dirty = (
            subprocess.run(["git", *words], cwd=root, capture_output=True, text=True, timeout=10).stdout.strip()
            for words in (("rev-parse", "--short=12", "HEAD"), ("status", "--porcelain", "limbeck"))
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return head + ("+" if dirty else "")


def new_folder(root: Path, name: str) -> Path:
    """runs/<name>-<time>, not yet there; the same for all processes."""

    def free() -> Path:
        stamp = time.strftime("%Y%m%d-%H%M%S")
        names = (f"{name}-{stamp}", *(f"{name}-{stamp}-{n}" for n in range(2, 100)))
        return next(root / name for name in names if not (root / name).exists())

    return first(free)


def _write(path: Path, body: Mapping[str, Any]) -> None:
    draft = path.with_name(f".{path.name}")
    draft.write_text(json.dumps(body, indent=1))
    draft.rename(path)


def _stages(recipe: Recipe, folder: Path, resume: bool, on_event: Event | None, shared: Path | None) -> Result:
    """Stages one after the other; later ones name what earlier ones made as `stage:NAME`."""
    with untouched(folder):
        return _each_stage(recipe, folder, resume, on_event, shared)


def _each_stage(recipe: Recipe, folder: Path, resume: bool, on_event: Event | None, shared: Path | None) -> Result:
    check_names(recipe)  # of all stages, before the first long one
    record(recipe, folder)
    last, place = before_last(recipe, folder, resume, on_event, shared), folder / recipe.stages[-1].name
    result = run(last, folder=place, resume=resume and first(place.exists), on_event=on_event, shared=shared)
    for name in ("result.json", "report.html"):
        if leads() and (result.folder / name).exists():
            (folder / name).write_bytes((result.folder / name).read_bytes())
    return result


def before_last(recipe: Recipe, folder: Path, resume: bool, on_event: Event | None, shared: Path | None) -> Recipe:
    """The last stage, bound to what the others made, which are run first, each in a folder of its name."""
    for stage in recipe.stages[:-1]:
        place = folder / stage.name
        begun = resume and first(place.exists)
        run(_with_stages(stage, folder), folder=place, resume=begun, on_event=on_event, shared=shared)
    return _with_stages(recipe.stages[-1], folder)


def _with_stages(stage: Recipe, folder: Path) -> Recipe:
    def follow(value: Any) -> Any:
        if isinstance(value, str) and value.startswith("stage:"):
            return str(folder / value.removeprefix("stage:"))
        if isinstance(value, Mapping):
            return {k: follow(v) for k, v in value.items()}
        return [follow(v) for v in value] if isinstance(value, list) else value

    return stage.with_changes(follow(stage.model_dump(exclude_unset=True)))


# ---- without YAML ----------------------------------------------------------------------------------------------------
Network = nn.Module | Callable[[], nn.Module] | str | Mapping[str, Any]


def in_python(
    do: str,
    *,
    networks: Mapping[str, Network | None],
    data: Any,
    folder: str | Path | None,
    resume: bool,
    on_event: Event | None,
    seeds: int | Iterable[int],
    settings: Mapping[str, Any],
) -> Result:
    """The common part of teach, condense, shorten and shape: a recipe for the record, and networks given as objects."""
    given = {k: v for k, v in settings.items() if v is not None}
    for loss in given.get("match", ()):
        if callable(loss):
            name = getattr(loss, "__name__", type(loss).__name__)
            cure = f"`limbeck new {name.lower()} --in losses/logits` makes the file that a loss of your own goes into"
            raise BadInput(f"limbeck.{do}: a loss is given by its name, got the object {name!r}; {cure}")
    names = {role: build.spec_of(net) for role, net in networks.items() if net is not None}
    body = {
        "name": given.pop("name", None) or do,
        "do": do,
        "seeds": seeds if isinstance(seeds, int) else list(seeds),
        **{role: spec for role, spec in names.items() if role in ("teacher", "student")},
        **({"data": str(data) if isinstance(data, Path) else data} if isinstance(data, (str, dict, Path)) else {}),
        **given,
    }
    from limbeck.recipe import check

    recipe = check(body, f"limbeck.{do}")
    where = Path(folder) if folder is not None else new_folder(Path("runs"), recipe.name)
    first(lambda: _free(where, dump(recipe, build.objects(networks, recipe)), resume))
    splits: Splits | None = build.as_splits(data, recipe)
    setting = build.setting(recipe, where, on_event, resume, splits=splits, networks=networks)
    return carry_out(setting)


def _free(folder: Path, recipe: str, resume: bool) -> None:
    """Refuse a folder that holds a run already, or, when resuming, none or another."""
    record = folder / "recipe.yaml"
    if not record.exists():
        if resume:
            raise BadInput(f"there is no run to go on with in {folder}: it holds no recipe.yaml")
    elif not resume:
        raise BadInput(f"{folder} holds a run already; go on with resume=True, or choose another folder")
    elif record.read_text() != recipe:
        raise BadInput(f"{folder} holds another run than the one asked for: see {record}; choose another folder")
