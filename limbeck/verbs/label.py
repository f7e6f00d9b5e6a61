"""The verbs without a control. label: teacher signals to a store; train: one network on labels; evaluate: measures."""

import json
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from limbeck.core.store import StoreInfo
from limbeck.recipe import Recipe
from limbeck.report.statistics import Gain
from limbeck.verbs import signals
from limbeck.verbs.result import Result
from limbeck.verbs.setting import (
    WEIGHTS,
    Setting,
    batches_of,
    captured,
    cost,
    default_measures,
    figures_of,
    judge,
    learner_of,
    load_weights,
    method_of,
    one,
    record,
    save_network,
    validator,
)
from limbeck.verbs.together import first

FIGURES = ("parameters", "bytes", "latency_ms", "figures")  # in metrics.json beside what was measured


def run(setting: Setting) -> Result:
    """Carry out one of the verbs without control."""
    recipe, folder = setting.recipe, setting.folder
    began = time.monotonic()
    record(recipe, folder, setting.objects)
    nothing = Gain(float("nan"), float("nan"), float("nan"), 0)
    if recipe.do == "label" and signals.of_texts(recipe):
        found, spent = setting.heard(recipe)
        _write(folder / "store.json", signals.facts(found, spent))
        return Result(found, {}, {}, nothing, signals.said(found, spent), folder)
    if recipe.do == "label":
        info = _label(setting)
        kept = f"{info.topk} of {info.classes} entries, {info.views} view{'s' if info.views > 1 else ''} an example"
        size = f"{info.bytes:,} bytes, {info.bytes_per_example:.0f} an example"
        loss = f"mass kept {info.mass:.4f}, KL lost {info.kl:.2g} nats"
        said = f"{info.examples} examples in {info.folder}: {kept}; {size}; {loss}"
        return Result(info, {}, {}, nothing, said, folder)
    role = "student" if recipe.do == "train" or "student" in setting.builders else "teacher"
    seed = recipe.seeds[0]
    torch.manual_seed(seed)
    told: dict[str, float] = {}
    if recipe.do == "train" and setting.resume and first((folder / "metrics.json").exists):  # a stage that is done
        module = setting.build(role)
        load_weights(module, str(folder / WEIGHTS), ())
        metrics = {k: v for k, v in json.loads((folder / "metrics.json").read_text()).items() if k not in FIGURES}
        return Result(module, metrics, {}, nothing, f"trained {role}, as it was found in {folder}", folder)
    if recipe.do == "train":
        changed = alone(recipe)
        method = method_of(changed)
        nets = setting.nets(changed, method)
        learner = learner_of(method)
        several = hasattr(method, "pools")
        batches = setting.pools(changed, method, seed) if several else batches_of(recipe, setting.splits.train, seed)
        validate = validator(setting.splits.validation, recipe.train, learner, recipe.metric)
        if hasattr(nets.find(learner), "schedule"):
            validate = None
        setting.fit(method, nets, recipe.train, batches, seed=seed, folder=folder, validate=validate)
        module = nets.find(learner)
        told = figures_of(method, nets)
        save_network(module, folder, setting.spec("student"))
    else:
        module = setting.build(role)
    if hasattr(module, "schedule"):  # a denoiser is judged by what it samples: `do: shorten`
        _write(folder / "metrics.json", {})
        return Result(module, {}, {}, nothing, f"trained {role} in {time.monotonic() - began:.0f} s", folder)
    metrics = judge(
        module, setting.splits.test, default_measures(recipe, setting.splits.test), setting.teacher, setting.eye()
    )
    figures = cost(module, one(setting.splits.test))
    _write(folder / "metrics.json", {**metrics, **figures, **({"figures": told} if told else {})})
    text = ", ".join(f"{k} {v:.4g}" for k, v in metrics.items())
    return Result(module, metrics, {}, nothing, f"{text} on {len(setting.splits.test)} test examples", folder)


def alone(recipe: Recipe) -> Recipe:
    """What `train` carries out: a recipe that names no method and no losses is trained on labels."""
    told = recipe.method or "match" in recipe.model_fields_set
    return recipe if told else recipe.with_changes({"match": ["ce"]})


def _label(setting: Setting) -> StoreInfo:
    info = captured(setting)
    _write(setting.folder / "store.json", asdict(info))
    return info


def _write(path: Path, body: dict[str, Any]) -> None:
    """By the first process; the others wait, for a later stage may read what is written."""
    first(lambda: path.write_text(json.dumps(body, indent=1)))
