"""shape: a smaller network made out of the teacher, then recovered by distillation. Two questions are answered: is
recovery worth it (against removal alone), and was the teacher worth starting from (the control trains the same
architecture from scratch with the same budget)."""

from pathlib import Path

import torch
from torch import nn

from limbeck.core import find, knobs
from limbeck.core.batches import epoch
from limbeck.core.errors import BadInput
from limbeck.core.match import parse
from limbeck.core.nets import Nets, reinitialised
from limbeck.recipe import Recipe
from limbeck.verbs.setting import (
    WEIGHTS,
    Outcome,
    Setting,
    batches_of,
    cost,
    default_measures,
    judge,
    load_weights,
    one,
    outcome_of,
    save_network,
    validator,
)


def arms(recipe: Recipe) -> list[str]:
    """student (shaped and recovered), control (from scratch), arms beside it, removal (shaped only), teacher."""
    return ["student", "control", *recipe.beside, "removal", "teacher"]


def control_recipe(recipe: Recipe) -> Recipe:
    """The same architecture from random weights, on labels; the shaping method stays, to give the architecture."""
    return recipe.with_changes({"match": ["ce"], "control": None, "beside": None, "expect": None, **recipe.control})


def arm_recipe(recipe: Recipe, arm: str) -> Recipe:
    """What is trained in an arm: the recipe itself, its control, or the recipe as `beside` changes it."""
    if arm == "control":
        return control_recipe(recipe)
    return (
        recipe.with_changes({"beside": None, "expect": None, **recipe.beside[arm]}) if arm in recipe.beside else recipe
    )


def methods(recipe: Recipe) -> list[str]:
    """The shaping method and the losses of the recovery."""
    return [knobs.split(recipe.method or "layer_choice")[0], *(parse(spec).name for spec in recipe.match)]


def label(recipe: Recipe, arm: str) -> str:
    """A plain description of an arm."""
    teacher = recipe.teacher.net if recipe.teacher else "teacher"
    shaped = f"{teacher} by {methods(recipe)[0]}"
    if arm in recipe.beside:
        return f"{shaped}, recovered with {' + '.join(methods(arm_recipe(recipe, arm))[1:])}"
    return {
        "student": f"{shaped}, recovered with {' + '.join(methods(recipe)[1:])}",
        "control": f"{shaped}, same architecture from scratch",
        "removal": f"{shaped}, not trained again",
        "teacher": teacher,
    }[arm]


def shaped(setting: Setting, *, blank: bool = False) -> nn.Module:
    """The teacher made smaller, before any training; blank: the same architecture with fresh random weights."""
    name, given = knobs.split(setting.recipe.method or "layer_choice")
    method = find.get(name)
    if find.family(name) != "shape":
        raise BadInput(f"{name!r} is a method of {find.folder(name)}, not of shape")
    if setting.teacher is None:
        raise BadInput("shaping starts from a teacher, and the recipe names none")
    given = knobs.check(name, method, given)
    train = setting.splits.train
    source, module = setting.teacher, nn.Module()
    if blank and "teacher" in setting.blank:
        source = setting.blank["teacher"]()
    if "batches" in (*find.needs(method), *find.wants(method)):
        module = method(source, list(epoch(train.select(range(min(256, len(train)))), 64)), **given)
    else:
        module = method(source, **given)
    if blank and "teacher" not in setting.blank:
        module = reinitialised(module)
    return module.requires_grad_(True)


def artefact(setting: Setting, folder: Path) -> nn.Module:
    """The student of a finished arm."""
    module = shaped(setting)
    load_weights(module, str(folder / WEIGHTS), ())
    return module.eval()


def run(setting: Setting, arm: str, seed: int, folder: Path) -> tuple[Outcome, nn.Module]:
    """Make, train and judge one arm under one seed."""
    recipe = arm_recipe(setting.recipe, arm)
    torch.manual_seed(seed)
    seconds = 0.0
    if arm == "teacher":
        if setting.teacher is None:
            raise BadInput("shaping starts from a teacher, and the recipe names none")
        module = setting.teacher
    else:
        module = shaped(setting, blank=arm == "control")
    if arm not in ("removal", "teacher"):
        method = knobs.make("distill", {"match": tuple(recipe.match)})
        nets = Nets(student=module, teacher=setting.teacher)  # type: ignore[arg-type]
        fitted = setting.fit(
            method,
            nets,
            recipe.train,
            batches_of(recipe, setting.splits.train, seed),
            seed=seed,
            folder=folder,
            validate=validator(setting.splits.validation, recipe.train, "student", recipe.metric),
        )
        seconds = fitted.seconds
        save_network(module, folder, None)
    figures = cost(module, one(setting.splits.test))
    metrics = judge(module, setting.splits.test, default_measures(recipe, setting.splits.test), setting.teacher)
    return outcome_of(label(setting.recipe, arm), metrics, figures, seconds), module
