"""teach: a student learns from a teacher; the control is the same student, data, budget and seed without it."""

from pathlib import Path

import torch
from torch import nn

from limbeck.core import find, knobs
from limbeck.core.errors import BadInput
from limbeck.recipe import Recipe
from limbeck.verbs.setting import (
    Outcome,
    Setting,
    cost,
    default_measures,
    judge,
    learner_of,
    method_of,
    one,
    outcome_of,
    save_network,
    validator,
)


def arms(recipe: Recipe) -> list[str]:
    """student, control, and the teacher when there is one."""
    return ["student", "control", *(["teacher"] if recipe.teacher else [])]


def control_recipe(recipe: Recipe) -> Recipe:
    """The recipe without its teacher: labels only, by the plain scheme, unless `control` says otherwise."""
    changes: dict[str, object] = {"control": None, "store": None}
    if "method" not in recipe.control:
        changes |= {"method": None, "match": ["ce"]}
    return recipe.with_changes({**changes, **recipe.control})


def label(recipe: Recipe, arm: str) -> str:
    """A plain description of an arm."""
    student = recipe.student.net if recipe.student else "student"
    teacher = recipe.teacher.net if recipe.teacher else "nobody"
    if arm == "teacher":
        return teacher
    if recipe.method is not None:
        how = knobs.split(recipe.method)[0]
    else:
        how = " + ".join(m if isinstance(m, str) else next(iter(m)) for m in recipe.match)
    if arm == "control":
        return f"{student}, {how}, no teacher"
    return f"{student}, {how}" + (f", taught by {teacher}" if recipe.teacher else "")


def run(setting: Setting, arm: str, seed: int, folder: Path) -> tuple[Outcome, nn.Module]:
    """Train and judge one arm under one seed."""
    recipe = control_recipe(setting.recipe) if arm == "control" else setting.recipe
    measures = default_measures(recipe, setting.splits.test)
    if arm == "teacher":
        if setting.teacher is None:
            raise BadInput("the recipe names no teacher")
        module, seconds = setting.teacher, 0.0
    else:
        method = method_of(recipe)
        torch.manual_seed(seed)  # student and control start from the same weights
        nets = setting.nets(recipe, method)
        learner = learner_of(method)
        batches = setting.pools(recipe, method, seed)
        fitted = setting.fit(
            method,
            nets,
            recipe.train,
            batches,
            seed=seed,
            folder=folder,
            validate=validator(setting.splits.validation, recipe.train, learner, recipe.metric),
        )
        for taps in nets.taps.values():
            taps.remove()
        module, seconds = nets.find(learner), fitted.seconds
        save_network(module, folder, setting.spec("student"))
    metrics = judge(module, setting.splits.test, measures, setting.teacher)
    figures = cost(module, one(setting.splits.test))
    return outcome_of(label(recipe, arm), metrics, figures, seconds), module


def methods(recipe: Recipe) -> list[str]:
    """Every method that the recipe uses, for citations."""
    names = [knobs.split(recipe.method)[0]] if recipe.method is not None else []
    if recipe.method is None or "match" in knobs.annotations(find.get(names[0])):
        names += [m if isinstance(m, str) else next(iter(m)) for m in recipe.match]
    return names
