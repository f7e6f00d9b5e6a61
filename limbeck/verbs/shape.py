"""shape: a smaller network made out of the teacher, then recovered by distillation. Two questions are answered: is
recovery worth it (against removal alone), and was the teacher worth starting from (the control trains the same
architecture from scratch with the same budget).

A method whose card says that its student cannot be trained, such as a tree, is fitted to all training examples at once,
and nothing is recovered; the control is fitted to the same examples and their labels alone."""

import time
from collections.abc import Iterable
from itertools import islice
from pathlib import Path

import torch
from torch import nn

from limbeck.core import find, knobs
from limbeck.core.batches import Batch, Batches, Table, epoch
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
    make_plan,
    one,
    outcome_of,
    save_network,
    validator,
)

FEW = 256  # training examples that a method sees which only looks at some
LABELS = {"soft": 0.0}  # the knob that leaves what the teacher says out of a fit


def fitted(recipe: Recipe) -> bool:
    """Whether the student is fitted to the examples and then done, instead of trained."""
    method = find.get(knobs.split(recipe.method or "layer_choice")[0])
    return "trainable" in method.card.exceptions


def arms(recipe: Recipe) -> list[str]:
    """student (shaped and recovered), control (from scratch), arms beside it, removal (shaped only), teacher.

    Of what is fitted there is no removal: the student itself is not trained again.
    """
    return ["student", "control", *recipe.beside, *([] if fitted(recipe) else ["removal"]), "teacher"]


def control_recipe(recipe: Recipe) -> Recipe:
    """The same architecture from random weights, on labels; the shaping method stays, to give the architecture.

    Of what is fitted: the same fit to labels alone, unless `control` says how.
    """
    changes: dict[str, object] = {"control": None, "beside": None, "expect": None}
    if not fitted(recipe):
        changes["match"] = ["ce"]
    elif "method" not in recipe.control:
        name, given = knobs.split(recipe.method or "")
        if not LABELS.keys() <= find.knobs(find.get(name)).keys():
            raise BadInput(f"{recipe.at('method')}`{name}` has no knob `soft`, so `control` must say how to fit labels")
        changes["method"] = {name: {**given, **LABELS}}
    return recipe.with_changes({**changes, **recipe.control})


def arm_recipe(recipe: Recipe, arm: str) -> Recipe:
    """What is trained in an arm: the recipe itself, its control, or the recipe as `beside` changes it."""
    if arm == "control":
        return control_recipe(recipe)
    return (
        recipe.with_changes({"beside": None, "expect": None, **recipe.beside[arm]}) if arm in recipe.beside else recipe
    )


def methods(recipe: Recipe) -> list[str]:
    """The shaping method and the losses of the recovery, if there is one."""
    name = knobs.split(recipe.method or "layer_choice")[0]
    return [name, *(parse(spec).name for spec in (() if fitted(recipe) else recipe.match))]


def label(recipe: Recipe, arm: str) -> str:
    """A plain description of an arm."""
    teacher = recipe.teacher.net if recipe.teacher else "teacher"
    shaped = f"{teacher} by {methods(recipe)[0]}"
    if fitted(recipe) and arm != "teacher":
        return {"student": shaped, "control": f"{methods(recipe)[0]}, no teacher"}.get(arm, f"{shaped}, {arm}")
    if arm in recipe.beside:
        return f"{shaped}, recovered with {' + '.join(methods(arm_recipe(recipe, arm))[1:])}"
    return {
        "student": f"{shaped}, recovered with {' + '.join(methods(recipe)[1:])}",
        "control": f"{shaped}, same architecture from scratch",
        "removal": f"{shaped}, not trained again",
        "teacher": teacher,
    }[arm]


def shaped(
    setting: Setting, *, blank: bool = False, recipe: Recipe | None = None, batches: Iterable[Batch] | None = None
) -> nn.Module:
    """The teacher made smaller, before any training.

    blank: the same architecture with fresh random weights. recipe: of an arm. batches: what a method looks at or is
    fitted to; default: a few training examples.
    """
    recipe = recipe or setting.recipe
    name, given = knobs.split(recipe.method or "layer_choice")
    method = find.get(name)
    if find.family(name) != "shape":
        raise BadInput(f"{name!r} is a method of {find.folder(name)}, not of shape")
    if setting.teacher is None:
        raise BadInput("shaping starts from a teacher, and the recipe names none")
    if fitted(recipe) and "match" in recipe.model_fields_set:
        raise BadInput(f"{recipe.at('match')}`{name}` is fitted and not trained, so nothing is matched; leave it out")
    if fitted(recipe) and recipe.train.steps is None and recipe.train.epochs is None:
        raise BadInput(f"{recipe.at('train')}how often a fit sees the examples is told by `epochs` or `steps`")
    given = knobs.check(name, method, given)
    train = setting.splits.train
    source, module = setting.teacher, nn.Module()
    if blank and "teacher" in setting.blank:
        source = setting.blank["teacher"]()
    if "batches" in (*find.needs(method), *find.wants(method)):
        few = epoch(train.select(range(min(FEW, len(train)))), 64)
        module = method(source, list(few) if batches is None else batches, **given)
    else:
        module = method(source, **given)
    if blank and "teacher" not in setting.blank:
        module = reinitialised(module)
    return module.requires_grad_(True)


def everything(recipe: Recipe, table: Table, seed: int) -> Iterable[Batch]:
    """All training examples: once, or augmented in as many passes as `train` says."""
    size = min(recipe.train.batch_size, len(table))
    augment = recipe.data.augment if recipe.data else ()
    if not augment:
        return epoch(table, size)
    batches = Batches(table, size, seed=seed, augment=augment, drop_last=False)
    return islice(batches, make_plan(recipe.train, batches.steps_per_epoch, seed).steps)


def artefact(setting: Setting, folder: Path) -> nn.Module:
    """The student of a finished arm."""
    module = shaped(setting)
    load_weights(module, str(folder / WEIGHTS), ())
    return module.eval()


def run(setting: Setting, arm: str, seed: int, folder: Path) -> tuple[Outcome, nn.Module]:
    """Make, train and judge one arm under one seed."""
    recipe = arm_recipe(setting.recipe, arm)
    torch.manual_seed(seed)
    seconds, fits = 0.0, arm != "teacher" and fitted(recipe)
    if arm == "teacher":
        if setting.teacher is None:
            raise BadInput("shaping starts from a teacher, and the recipe names none")
        module = setting.teacher
    elif fits:
        began = time.monotonic()
        module = shaped(setting, recipe=recipe, batches=everything(recipe, setting.splits.train, seed))
        seconds = time.monotonic() - began
        save_network(module, folder, None)
    else:
        module = shaped(setting, blank=arm == "control")
    if arm not in ("removal", "teacher") and not fits:
        method = knobs.make("distill", {"match": tuple(recipe.match)})
        nets = Nets(student=module, teacher=setting.teacher)  # type: ignore[arg-type]
        trained = setting.fit(
            method,
            nets,
            recipe.train,
            batches_of(recipe, setting.splits.train, seed),
            seed=seed,
            folder=folder,
            validate=validator(setting.splits.validation, recipe.train, "student", recipe.metric),
        )
        seconds = trained.seconds
        save_network(module, folder, None)
    figures = cost(module, one(setting.splits.test))
    metrics = judge(
        module, setting.splits.test, default_measures(recipe, setting.splits.test), setting.teacher, setting.eye()
    )
    outcome = outcome_of(label(setting.recipe, arm), metrics, figures, seconds)
    outcome.sizes |= module.sizes() if hasattr(module, "sizes") else {}  # type: ignore[operator]
    return outcome, module
