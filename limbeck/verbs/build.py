"""Binds a recipe to data and networks: loads, builds, and trains a teacher that comes without weights."""

import copy
import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from limbeck.adapters.files import load as load_data
from limbeck.core import find, knobs
from limbeck.core.batches import Splits, Table, split
from limbeck.core.errors import BadInput
from limbeck.core.nets import Nets
from limbeck.recipe import Net, Recipe, merge
from limbeck.verbs.setting import Event, Setting, batches_of, load_weights, make_plan, save_network
from limbeck.zoo import nets as zoo

WEIGHTS = Path(__file__).parent.parent / "zoo"


def setting(
    recipe: Recipe,
    folder: Path,
    on_event: Event | None,
    resume: bool,
    *,
    splits: Splits | None = None,
    networks: Mapping[str, Any] | None = None,
) -> Setting:
    """Everything that an arm needs. Names and knobs are checked here, before anything is written."""
    check_names(recipe)
    if splits is None:
        if recipe.data is None:
            raise BadInput(f"the recipe {recipe.name!r} names no data")
        splits = load_splits(recipe.data.name, recipe.data.options)
    made = Setting(recipe, splits, {}, folder, on_event=on_event, resume=resume)
    given = dict(networks or {})
    roles: dict[str, Any] = {"teacher": recipe.teacher, "student": recipe.student, **recipe.nets}
    for role, spec in roles.items():
        thing = given.get(role)
        if thing is not None and not isinstance(thing, (str, Mapping)):
            made.builders[role] = _builder(thing)
        elif isinstance(spec, list):
            made.builders[role] = _many(spec, splits.train, folder)
        elif spec is not None:
            made.builders[role] = _from_spec(spec, splits.train, folder)
            made.blank[role] = _from_spec(spec.model_copy(update={"weights": None}), splits.train, folder)
            made.taps[role] = spec.taps
    if recipe.do == "condense":
        judge = given.get("judge")
        plain = judge is None or isinstance(judge, (str, Mapping))
        made.builders["judge"] = _from_spec(recipe.judge.net, splits.train, folder) if plain else _builder(judge)
    if "teacher" in made.builders:
        made.teacher = _teacher(made, recipe)
    return made


def check_names(recipe: Recipe) -> None:
    """Raise BadInput for a method, loss, measure, knob, optimiser or schedule that does not exist."""
    from limbeck.core import optim, schedule
    from limbeck.core.match import parse

    for m in recipe.match:
        parse(m)
    if recipe.method is not None:
        name, given = knobs.split(recipe.method)
        knobs.check(name, find.get(name), given)
    for spec in recipe.measure:
        name, given = knobs.split(spec, "measure")
        if name not in ("latency", "size", "parameters"):
            knobs.check(name, find.get(name), given)
    for choice in (recipe.train.optimizer, *recipe.train.optimizers.values()):
        optim.check(choice)
    schedule.rate(recipe.train.schedule, 0.0)


def load_splits(name: str, options: Mapping[str, Any]) -> Splits:
    """The data by name or path, or the condensed set in a run folder."""
    return load_data({"name": name, **options})


def as_splits(data: Any, recipe: Recipe) -> Splits | None:
    """Data given as objects: Splits, a Table, (inputs, labels) tensors or arrays, or a map-style dataset."""
    if isinstance(data, Splits):
        return data
    if data is None or isinstance(data, (str, Mapping, Path)):
        return None
    if isinstance(data, Table):
        return split(data)
    if isinstance(data, tuple) and len(data) == 2:
        inputs, labels = (torch.as_tensor(d) for d in data)
    elif hasattr(data, "__len__") and hasattr(data, "__getitem__"):
        rows = [data[i] for i in range(len(data))]
        inputs = torch.stack([torch.as_tensor(r[0]) for r in rows])
        labels = torch.as_tensor([int(r[1]) for r in rows])
    else:
        kinds = "a name, a path, Splits, a Table, (inputs, labels) or a dataset"
        raise BadInput(f"data must be {kinds}, got {type(data).__name__}")
    kind: Any = {4: "images", 2: "vectors"}.get(inputs.ndim, "vectors")
    if not inputs.is_floating_point() and inputs.ndim == 2:
        kind = "tokens"
    return split(Table({"inputs": inputs, "labels": labels}, kind=kind))


def spec_of(thing: Any) -> Any:
    """What the recipe of record says of a network that was given as an object."""
    if isinstance(thing, (str, Mapping)):
        return thing
    return {"net": type(thing).__name__ if isinstance(thing, nn.Module) else getattr(thing, "__name__", "function")}


def describe(table: Table) -> dict[str, Any]:
    """What a network's builder needs to know of the data."""
    inputs = table["inputs"]
    image = table.kind == "images"
    return {
        "classes": table.num_classes or None,
        "channels": inputs.shape[1] if image else None,
        "size": inputs.shape[-1] if image or table.kind == "vectors" else None,
        "vocab": table.vocab or None,
    }


def network(spec: Net, table: Table, folder: Path) -> nn.Module:
    """A network from its spec, with its weights if it names some."""
    body = {"net": spec.net, **spec.options}
    module: nn.Module = zoo.build(body, **describe(table))
    if spec.weights is not None:
        load_weights(module, spec.weights, (folder, folder.parent, WEIGHTS, WEIGHTS.parent))
    # faster for convolutions on CPUs and GPUs alike; what is saved is contiguous again
    return module.to(memory_format=torch.channels_last) if table.kind == "images" else module  # type: ignore[call-overload]


def _builder(thing: Any) -> Callable[[], nn.Module]:
    if isinstance(thing, nn.Module):
        return lambda: copy.deepcopy(thing)
    if not callable(thing):
        raise BadInput(f"a network is an nn.Module, a function that makes one, or a spec; got {type(thing).__name__}")
    made: Callable[[], nn.Module] = thing
    return made


def _from_spec(spec: Net, table: Table, folder: Path) -> Callable[[], nn.Module]:
    return lambda: network(spec, table, folder)


def _many(specs: list[Net], table: Table, folder: Path) -> Callable[[], nn.Module]:
    return lambda: nn.ModuleList([network(s, table, folder) for s in specs])


def _teacher(made: Setting, recipe: Recipe) -> nn.Module:
    """The teacher, frozen; trained first (once, and kept beside the runs) when the recipe says how."""
    torch.manual_seed(0)  # of a teacher that is trained first
    module = made.build("teacher")
    spec = recipe.teacher
    if spec is not None and spec.weights is None and spec.train is not None:
        _train_first(made, module, spec)
    return module.eval().requires_grad_(False)


def _train_first(made: Setting, module: nn.Module, spec: Net) -> None:
    assert spec.train is not None
    recipe = made.recipe
    data = recipe.data.model_dump(exclude_unset=True) if recipe.data else {}
    data = merge(data, spec.data)
    key = json.dumps([spec.model_dump(mode="json"), data], sort_keys=True, default=str)
    place = made.folder.parent / ".teachers" / hashlib.sha256(key.encode()).hexdigest()[:16]
    if (place / "weights.safetensors").exists():
        load_weights(module, str(place / "weights.safetensors"), ())
        return
    splits = made.splits
    if spec.data:
        splits = load_splits(data["name"], {k: v for k, v in data.items() if k not in ("name", "augment")})
    if made.on_event is not None:
        made.on_event({"arm": "teacher", "seed": 0, "label": f"training the teacher {spec.net}"})
    changed = recipe.with_changes({"data": data}) if data else recipe
    batches = batches_of(changed, splits.train, 0, train=spec.train)
    name = "denoising" if hasattr(module, "schedule") else "distill"
    method = knobs.make(name, {"match": ("ce",)} if name == "distill" else {})
    from limbeck.core.loop import fit

    nets = Nets(student=module)
    fit(method, nets, batches, make_plan(spec.train, batches.steps_per_epoch, 0), on_event=made.on_event)
    save_network(module, place, spec)
