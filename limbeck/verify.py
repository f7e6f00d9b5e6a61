"""Evidence: a row's recipe over seeds with its control, and the conformance of its methods. Writes evidence/<key>.json.

Nothing else writes there. An interrupted verify goes on where it stopped, seed by seed and step by step.
"""

import json
import platform
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from limbeck import catalogue
from limbeck.core.errors import BadInput, nearest
from limbeck.recipe import Recipe, load
from limbeck.report.files import plain
from limbeck.run import methods_of, run, source_digest
from limbeck.verbs.check import VERBS, check_names
from limbeck.verbs.result import Result
from limbeck.verbs.together import first, processes


def recipe_of(name: str) -> tuple[str, Recipe]:
    """The row key and recipe for a row key, a method name or a recipe file."""
    known = catalogue.recipes()
    if name in known:
        return name, load(known[name])
    for key, methods in catalogue.implemented().items():
        if name in methods and key in known:
            return key, load(known[key])
    if name.endswith((".yaml", ".yml")) and Path(name).exists():
        recipe = load(Path(name))
        return recipe.row or Path(name).stem, recipe
    raise BadInput(f"there is no recipe for {name!r}{nearest(name, known)}")


def with_seeds(recipe: Recipe, count: int) -> Recipe:
    """The recipe over that many seeds; of several stages, the last one, whose result is the evidence.

    What earlier stages make is then the same for every seed: it is where all of them start, as a teacher is.
    """
    seeds = list(range(count))
    if not recipe.stages:
        return recipe.model_copy(update={"seeds": seeds})
    *before, last = recipe.stages
    judged = last.model_copy(update={"seeds": seeds, "expect": recipe.expect or last.expect})
    return recipe.model_copy(update={"stages": [*before, judged]})


def code_digest(recipe: Recipe) -> str:
    """Hash of all code that decides the figures: evidence of other code than today's is not taken up again."""
    return source_digest(tuple(sorted(used(recipe))))[:8]


def used(recipe: Recipe) -> set[str]:
    """Names of the methods that decide the figures: of all stages, of controls, of teachers that are trained first."""
    if recipe.stages:
        return set().union(*map(used, recipe.stages))
    out = set(methods_of(recipe))
    if recipe.do in VERBS:
        out |= set(methods_of(VERBS[recipe.do].control_recipe(recipe)))
        out |= {name for arm in recipe.beside for name in methods_of(VERBS[recipe.do].arm_recipe(recipe, arm))}
    return out | ({"ce", "denoising"} if recipe.teacher and recipe.teacher.train else set())


def verify(
    name: str,
    *,
    seeds: int | None = None,
    root: Path = Path("runs"),
    on_event: Callable[[dict[str, Any]], None] | None = None,
) -> dict[str, Any]:
    """Run one row's evidence and write it.

    seeds: how many (default: what the recipe expects, 5). root: where runs and shared controls are kept. Work of the
    same recipe and the same code that was interrupted, or ran over fewer seeds, is taken up again.
    """
    key, recipe = recipe_of(name)
    last = recipe.stages[-1] if recipe.stages else recipe
    expect = recipe.expect or last.expect
    count = seeds or (expect.seeds if expect else 5)
    check_names(recipe)
    if last.do not in VERBS:
        raise BadInput(f"{recipe.name}: `{last.do}` has no control, so there is no evidence to gather")
    folder = root / "verify" / f"{key}-{recipe.digest}-{code_digest(recipe)}"
    shared = root / "verify" / "shared"
    bound, begun = with_seeds(recipe, count), first(folder.exists)
    result = run(bound, folder=folder, resume=begun, on_event=on_event, shared=shared)
    return first(lambda: _gathered(key, recipe, name, folder, result))


def _gathered(key: str, recipe: Recipe, name: str, folder: Path, result: Result) -> dict[str, Any]:
    """The evidence, written; what is left of the work but the figures is taken away."""
    from limbeck import conformance

    expect = recipe.expect or (recipe.stages[-1] if recipe.stages else recipe).expect
    body = json.loads((result.folder / "result.json").read_text())
    checks = {}
    for method in methods_of(recipe):
        outcomes = conformance.run(method)
        checks[method] = {
            "checks": len(outcomes),
            "failed": [o.check for o in outcomes if not o.passed],
            "vector": catalogue.vector_digest(method),
        }
    figures = [m[body["metric"]] for m in body["arms"]["student"]["per_seed"]]
    mean = sum(figures) / len(figures)
    published = None
    if expect is not None and expect.published is not None:
        near = abs(mean - expect.published) <= (expect.within or 0.0)
        published = {"value": expect.published, "within": expect.within, "here": mean, "reproduced": near}
    evidence: dict[str, Any] = plain(
        {
            "key": key,
            "recipe": catalogue.recipes()[key].name if key in catalogue.recipes() else name,
            "recipe_hash": recipe.digest,
            "metric": body["metric"],
            "higher_is_better": body["higher_is_better"],
            "seeds": body["seeds"],
            "arms": body["arms"],
            "gain": body["gain"],
            "beside": body["beside"],
            "verdict": body["verdict"],
            "published": published,
            "conformance": checks,
            "seconds": round(sum(sum(a["seconds"]) for a in body["arms"].values()), 1),
            "machine": _machine(),
            "versions": body["versions"],
            "commit": body["commit"],
        }
    )
    target = catalogue.home() / "evidence" / f"{key}.json"
    target.parent.mkdir(exist_ok=True)
    draft = target.with_name(f".{key}.json")
    draft.write_text(json.dumps(evidence, indent=1, allow_nan=False) + "\n")
    draft.rename(target)
    for checkpoints in folder.rglob("checkpoints"):  # the work is done; the figures stay
        shutil.rmtree(checkpoints, ignore_errors=True)
    return evidence


def _machine() -> dict[str, str]:
    """What the figures were made on."""
    found = {"cpu": platform.processor() or platform.machine(), "system": platform.system()}
    device = processes().device
    return found | ({"gpu": torch.cuda.get_device_name(device)} if device.type == "cuda" else {})
