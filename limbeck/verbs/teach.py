"""teach: a student learns from a teacher; the control is the same student, data, budget and seed without it."""

from pathlib import Path

import torch
from torch import nn

from limbeck.core import find, knobs
from limbeck.core.errors import BadInput
from limbeck.core.match import parse
from limbeck.recipe import Recipe
from limbeck.verbs.setting import (
    WEIGHTS,
    Outcome,
    Setting,
    bits_a_nat,
    cost,
    default_measures,
    figures_of,
    judge,
    learner_of,
    load_weights,
    method_of,
    one,
    outcome_of,
    save_network,
    validator,
)
from limbeck.zoo.lora import merged


def arms(recipe: Recipe) -> list[str]:
    """student, control, what the recipe sets beside them, and the teacher when there is one."""
    return [
        "student",
        "control",
        *recipe.beside,
        *(["teacher"] if recipe.teacher and not recipe.teacher.served else []),
    ]


def control_recipe(recipe: Recipe) -> Recipe:
    """The recipe without its teacher: labels only, by the plain scheme, unless `control` says otherwise."""
    changes: dict[str, object] = {"control": None, "beside": None, "expect": None, "store": None}
    if "method" not in recipe.control:
        changes |= {"method": None, "match": ["ce"], "nets": None, **_untapped(recipe)}
    return recipe.with_changes({**changes, **recipe.control})


def arm_recipe(recipe: Recipe, arm: str) -> Recipe:
    """What is trained in an arm: the recipe itself, its control, or the control as `beside` changes it.

    An arm with a method of its own has the recipe's further networks, as a control with one has.
    """
    if arm == "control":
        return control_recipe(recipe)
    if arm not in recipe.beside:
        return recipe
    plain = control_recipe(recipe.with_changes({"control": None, "method": None}))
    nets = recipe.model_dump(exclude_unset=True).get("nets") if "method" in recipe.beside[arm] else None
    return plain.with_changes({"nets": nets} | recipe.beside[arm])


def _untapped(recipe: Recipe) -> dict[str, object]:
    """Changes that take the taps off: controls of one setting are the same whatever a method reads in it."""
    nets = {"student": recipe.student, "teacher": recipe.teacher}
    return {role: {"taps": None} for role, net in nets.items() if net is not None and net.taps}


def label(recipe: Recipe, arm: str) -> str:
    """A plain description of an arm."""
    student = recipe.student.net if recipe.student else "student"
    teacher = recipe.teacher.title if recipe.teacher else "nobody"
    if arm == "teacher":
        return teacher
    told = arm_recipe(recipe, arm)
    if told.method is not None:
        how = knobs.split(told.method)[0]
    else:
        how = " + ".join(parse(spec).name for spec in told.match)
    if arm == "control":  # another method may ask its teacher all the same
        return f"{student}, {how}" + (
            ", no teacher" if told.method is None and not reads_teacher(told) else ", control"
        )
    return f"{student}, {how}" + (f", taught by {teacher}" if recipe.teacher else "")


def reads_teacher(recipe: Recipe) -> bool:
    """Whether a loss of the plain scheme asks for what only a teacher says."""
    return any(name.startswith("teacher_") for spec in recipe.match for name in parse(spec).needs)


def run(setting: Setting, arm: str, seed: int, folder: Path) -> tuple[Outcome, nn.Module]:
    """Train and judge one arm under one seed."""
    recipe = arm_recipe(setting.recipe, arm)
    measures = default_measures(recipe, setting.splits.test)
    eye = setting.eye()
    if arm == "teacher":
        if setting.teacher is None:
            raise BadInput("the recipe names no teacher")
        module, seconds, told = setting.teacher, 0.0, {}
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
            validate=validator(setting.splits.validation, recipe.train, learner, recipe.metric, eye),
        )
        for taps in nets.taps.values():
            taps.remove()
        module, seconds, told = merged(nets.find(learner)), fitted.seconds, figures_of(method, nets)
        save_network(module, folder, setting.spec("student"))
    table = setting.splits.test
    mine = table.retold() if arm == "teacher" else table
    metrics = judge(module, mine, measures, setting.teacher, eye)
    if "nll" in metrics and (size := bits_a_nat(mine)):  # tokens of two sizes compare by the byte only
        metrics["bits_per_byte"] = metrics["nll"] * size
    figures = cost(module, one(mine))
    return outcome_of(label(setting.recipe, arm), metrics, figures, seconds, told), module


def artefact(setting: Setting, folder: Path) -> nn.Module:
    """The student of a finished arm."""
    module = merged(setting.build("student"))  # what was saved has no adapters
    load_weights(module, str(folder / WEIGHTS), ())
    return module.eval()


def asked(recipe: Recipe) -> set[str]:
    """The names of all that the losses of any arm ask for, or take where it is there."""
    losses = {name for arm in ("student", "control", *recipe.beside) for name in methods(arm_recipe(recipe, arm))}
    return {n for name in losses for n in find.needs(find.get(name)) + find.wants(find.get(name))}


LISTS = ("match", "back", "first", "weak", "strong")  # knobs of training methods that hold losses


def methods(recipe: Recipe) -> list[str]:
    """Every method that the recipe uses, for citations."""
    if recipe.method is None:
        return [parse(spec).name for spec in recipe.match]
    name, given = knobs.split(recipe.method)
    known = find.knobs(find.get(name))
    lists = [given.get(key, recipe.match if key == "match" else known[key]) for key in LISTS if key in known]
    return [name, *(parse(spec).name for losses in lists if isinstance(losses, (list, tuple)) for spec in losses)]
