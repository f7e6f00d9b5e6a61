"""condense: a small training set stands for a large one; the control is as many random examples, judged alike.

Methods that keep rows of text are carried out by `rows`.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from limbeck.core import find, knobs
from limbeck.core.batches import Table
from limbeck.core.errors import BadInput
from limbeck.core.evaluate import Budget, hits, kernel_logits
from limbeck.core.evaluate import judge as judge_set
from limbeck.core.nets import Nets
from limbeck.core.synset import SynSet, pick
from limbeck.recipe import Recipe
from limbeck.report.grid import grid
from limbeck.verbs import rows
from limbeck.verbs.setting import KERNEL, Outcome, Setting, batches_of, figures_of, save_tensors

CONTROL = "random_subset"


def arms(recipe: Recipe) -> list[str]:
    """The condensed set, as many random examples, and the whole training set when `control` asks for it."""
    return ["student", "control", *(["whole"] if recipe.control.get("whole") else [])]


def control_recipe(recipe: Recipe) -> Recipe:
    """Random examples, class by class; of text as many tokens as the method keeps."""
    if rows.asked(recipe):  # how many are drawn depends on what the method keeps
        return recipe.with_changes({"control": None, "train": None, "match": None})
    return recipe.with_changes({"method": CONTROL, "control": None, "train": None, "match": None})


def methods(recipe: Recipe) -> list[str]:
    """The method that makes the set."""
    return [knobs.split(recipe.method or "dm")[0]]


def label(recipe: Recipe, arm: str) -> str:
    """A plain description of an arm."""
    if rows.asked(recipe):
        return rows.label(recipe, arm)
    if arm == "whole":
        return "the whole training set"
    how = "random" if arm == "control" else methods(recipe)[0]
    return f"{recipe.ipc} a class, {how}"


def run(setting: Setting, arm: str, seed: int, folder: Path) -> tuple[Outcome, Table]:
    """Make the set of one arm under one seed, and judge it by training fresh networks on it."""
    recipe, train = setting.recipe, setting.splits.train
    if rows.asked(recipe):
        return rows.run(setting, arm, seed, folder)
    if not train.num_classes:
        raise BadInput(f"condensing needs class labels, and {train.name} has none")
    torch.manual_seed(seed)
    seconds, told = 0.0, dict[str, float]()
    if arm == "whole":
        inputs, labels = train["inputs"], train["labels"]
    elif arm == "control":
        chosen = pick(train["labels"], recipe.ipc, seed=seed)  # those that a synthetic set starts from
        inputs, labels = train["inputs"][chosen], train["labels"][chosen]
    else:
        inputs, labels, seconds, told = _made(setting, seed, folder)
    if arm != "whole":
        folder.mkdir(parents=True, exist_ok=True)
        save_tensors({"inputs": inputs.contiguous(), "labels": labels.contiguous()}, folder / "set.safetensors")
    scores = _judge(setting, inputs, labels, seed)
    size = inputs.numel() * inputs.element_size() + labels.numel() * (labels.element_size() if labels.ndim > 1 else 1)
    outcome = Outcome(label(recipe, arm), scores, bytes=size, seconds=seconds, sizes={**told, "images": len(inputs)})
    return outcome, replace(train, columns={"inputs": inputs, "labels": labels}, rows=None)


def artefact(setting: Setting, folder: Path) -> Table:
    """The condensed set of a finished arm."""
    if rows.asked(setting.recipe):
        return rows.artefact(setting, folder)
    stored = load_file(folder / "set.safetensors")
    return replace(setting.splits.train, columns={"inputs": stored["inputs"], "labels": stored["labels"]}, rows=None)


def _made(setting: Setting, seed: int, folder: Path) -> tuple[Tensor, Tensor, float, dict[str, float]]:
    recipe = setting.recipe
    name, given = knobs.split(recipe.method or "dm")
    if find.family(name) == "data":
        return *_chosen(setting, name, given, seed), 0.0, {}
    method = knobs.make(name, given)
    train = setting.splits.train
    nets = Nets(images=SynSet.real(train["inputs"], train["labels"], recipe.ipc, seed=seed))
    if recipe.judge.net.net != KERNEL:
        nets.factories["net"] = setting.builders["judge"]
        nets.net = nets.fresh("net")
    fitted = setting.fit(method, nets, recipe.train, batches_of(recipe, train, seed), seed=seed, folder=folder)
    inputs, labels = nets.images.export()
    return inputs, labels, fitted.seconds, figures_of(method, nets)


def selection(name: str, given: dict[str, Any]) -> dict[str, Any]:
    """The checked knobs of a method of data/select. Raises BadInput for one that condensing cannot serve."""
    method = find.get(name)
    given, asks = knobs.check(name, method, given), find.needs(method)
    if asks not in (["features"], ["rows"]):
        raise BadInput(f"`{name}` asks for {', '.join(asks)}; condensing can give it features or rows of text only")
    if asks == ["features"] and "budget" in given:
        raise BadInput(f"how many `{name}` picks is told by the recipe's `ipc`, examples a class; leave out its budget")
    return given


def _chosen(setting: Setting, name: str, given: dict[str, Any], seed: int) -> tuple[Tensor, Tensor]:
    """Real examples picked by a selection method, class by class, in the pixels or a proxy's embedding."""
    method, train, given = find.get(name), setting.splits.train, selection(name, given)
    if "seed" in find.knobs(method):
        given = {"seed": seed, **given}
    picked = []
    for c in range(train.num_classes):
        members = (train["labels"] == c).nonzero()[:, 0]
        features = train["inputs"][members].flatten(1).double()
        picked.append(members[method(features, budget=setting.recipe.ipc, **given)])
    chosen = torch.cat(picked)
    return train["inputs"][chosen], train["labels"][chosen]


def _judge(setting: Setting, inputs: Tensor, labels: Tensor, seed: int) -> dict[str, float]:
    recipe, test = setting.recipe, setting.splits.test
    judge = recipe.judge
    if judge.net.net == KERNEL:
        return {"accuracy": hits(kernel_logits(inputs, labels, test, **judge.net.options), test)}
    if labels.ndim > 1 and (labels.sum(1) - 1).abs().max() > 1e-3:
        labels = labels.argmax(1)  # regression targets: a classifier is trained on the class they favour
    train = judge.train
    budget = Budget(
        epochs=round(train.epochs or 300),
        batch_size=train.batch_size,
        optimizer=train.optimizer if "optimizer" in train.model_fields_set else Budget().optimizer,
        schedule=train.schedule if "schedule" in train.model_fields_set else Budget().schedule,
        augment=tuple(judge.augment),
        precision=train.precision,
    )
    seeds = [1000 * seed + i for i in range(judge.nets)]
    scores = judge_set(setting.builders["judge"], inputs, labels, test, budget, seeds=seeds)["net"]
    return {"accuracy": sum(scores) / len(scores)}


def pictures(setting: Setting, folder: Path) -> list[dict[str, str]]:
    """The condensed examples beside random ones, where they are pictures."""
    if setting.splits.train.kind != "images":
        return []
    shown = {}
    per = min(setting.recipe.ipc, 10)
    for title, arm in (("random", "control"), ("condensed", "")):
        path = folder / f"seed-{setting.recipe.seeds[0]}" / arm / "set.safetensors"
        if path.exists():
            images = load_file(path)["inputs"]
            rows = torch.arange(len(images)).view(-1, setting.recipe.ipc)[:, :per].flatten()
            shown[title] = images[rows]
    if not shown:
        return []
    grid(shown, folder / "pictures" / "sets.png", columns=per, labels=setting.splits.train.classes or ())
    caption = f"{per} of {setting.recipe.ipc} examples a class, a class a row"
    return [{"title": "The sets", "file": "pictures/sets.png", "caption": caption}]
