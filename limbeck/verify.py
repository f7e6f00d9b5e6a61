"""Evidence: a row's recipe over seeds with its control, and the conformance of its methods. Writes evidence/<key>.json.

Nothing else writes there. An interrupted verify goes on where it stopped, seed by seed and step by step.
"""

import json
import platform
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from limbeck import catalogue
from limbeck.core.errors import BadInput, nearest
from limbeck.recipe import Recipe, load
from limbeck.run import run


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


def verify(
    name: str,
    *,
    seeds: int | None = None,
    root: Path = Path("runs"),
    on_event: Callable[[dict[str, Any]], None] | None = None,
) -> dict[str, Any]:
    """Run one row's evidence and write it.

    seeds: how many (default: what the recipe expects, 5). root: where runs and shared controls are kept. Work of the
    same recipe that was interrupted is taken up again.
    """
    from limbeck import conformance

    key, recipe = recipe_of(name)
    count = seeds or (recipe.expect.seeds if recipe.expect else 5)
    bound = recipe.model_copy(update={"seeds": list(range(count))})
    folder = root / "verify" / f"{key}-{recipe.digest}"
    result = run(bound, folder=folder, resume=folder.exists(), on_event=on_event, shared=root / "verify" / "shared")
    body = json.loads((result.folder / "result.json").read_text())
    checks = {}
    for method in body["methods"]:
        outcomes = conformance.run(method)
        checks[method] = {
            "checks": len(outcomes),
            "failed": [o.check for o in outcomes if not o.passed],
            "vector": catalogue.vector_digest(method),
        }
    expect = recipe.expect
    mean = sum(m[body["metric"]] for m in body["arms"]["student"]["per_seed"]) / count
    published = None
    if expect is not None and expect.published is not None:
        near = abs(mean - expect.published) <= (expect.within or 0.0)
        published = {"value": expect.published, "within": expect.within, "here": mean, "reproduced": near}
    evidence = {
        "key": key,
        "recipe": catalogue.recipes()[key].name if key in catalogue.recipes() else name,
        "recipe_hash": recipe.digest,
        "metric": body["metric"],
        "higher_is_better": body["higher_is_better"],
        "seeds": body["seeds"],
        "arms": body["arms"],
        "gain": body["gain"],
        "verdict": body["verdict"],
        "published": published,
        "conformance": checks,
        "seconds": round(sum(sum(a["seconds"]) for a in body["arms"].values()), 1),
        "machine": {"cpu": platform.processor() or platform.machine(), "system": platform.system()},
        "versions": body["versions"],
        "commit": body["commit"],
    }
    target = catalogue.home() / "evidence" / f"{key}.json"
    target.parent.mkdir(exist_ok=True)
    draft = target.with_name(f".{key}.json")
    draft.write_text(json.dumps(evidence, indent=1) + "\n")
    draft.rename(target)
    for checkpoints in folder.rglob("checkpoints"):  # the work is done; the figures stay
        shutil.rmtree(checkpoints, ignore_errors=True)
    return evidence
