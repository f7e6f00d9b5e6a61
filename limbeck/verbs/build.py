"""Binds a recipe to data and networks: loads, builds, and trains a teacher that comes without weights."""

import copy
import hashlib
import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from limbeck.adapters.files import load as load_data
from limbeck.adapters.pairing import CONSTANTS
from limbeck.core import knobs
from limbeck.core.batches import Splits, Table, split
from limbeck.core.ensemble import Ensemble
from limbeck.core.errors import BadInput
from limbeck.core.nets import Nets
from limbeck.recipe import Net, Recipe, load, merge
from limbeck.verbs import teach
from limbeck.verbs.canaries import planted
from limbeck.verbs.check import check_names, rehearse
from limbeck.verbs.robust import poisoned
from limbeck.verbs.setting import (
    KERNEL,
    Event,
    Setting,
    any_number,
    batches_of,
    load_weights,
    make_plan,
    save_network,
    scored,
)
from limbeck.verbs.together import first, leads
from limbeck.zoo import nets as zoo

WEIGHTS = Path(__file__).parent.parent / "zoo"
AFTER = ("augment", "poison", "canaries")  # keys of `data` that are for after the loader


def setting(
    recipe: Recipe,
    folder: Path,
    on_event: Event | None,
    resume: bool,
    *,
    splits: Splits | None = None,
    networks: Mapping[str, Any] | None = None,
) -> Setting:
    """Everything that an arm needs. What can be checked is checked here, before anything is written or trained.

    networks: role -> a network given as an object instead of by the recipe.
    """
    given = _given(networks)
    check_names(recipe, given)
    if splits is None:
        if recipe.data is None:
            raise BadInput(f"{recipe.at('do')}the recipe {recipe.name!r} names no data")
        with recipe.blamed("data"):
            splits = _two_tokenizers(recipe, on_event) or load_data(data_of(recipe), note=_noted(on_event))
    elif recipe.teacher is not None and recipe.teacher.tokenizer is not None and splits.train.teacher_tokenizer is None:
        raise BadInput(
            f"{recipe.at('teacher', 'tokenizer')}data that is given as an object must hold its text in the teacher's "
            "tokens already: see limbeck.adapters.pairing.retell_all"
        )
    if recipe.data is not None:
        with recipe.blamed("data", "poison"):
            splits = poisoned(splits, recipe.data.poison)
        with recipe.blamed("data", "canaries"):
            splits = planted(splits, recipe.data)
    if recipe.split == "validation":
        if not len(splits.validation):
            raise BadInput(f"{recipe.at('split')}{splits.train.name} has no validation part")
        splits = splits._replace(test=splits.validation)
    if recipe.store is not None and splits.train.cloze is not None:
        raise BadInput(
            f"{recipe.at('store')}what a teacher says of hidden words is not stored: every batch hides others"
        )
    on_event = on_event if leads() else None
    made = Setting(recipe, splits, {}, folder, on_event=on_event, resume=resume, objects=objects(networks, recipe))
    roles: dict[tuple[str, ...], Any] = {("teacher",): recipe.teacher, ("student",): recipe.student}
    roles |= {("nets", role): spec for role, spec in recipe.nets.items()}
    if recipe.do == "condense" and recipe.judge.net.net != KERNEL:
        roles["judge", "net"] = recipe.judge.net
    for role, thing in given.items():
        made.builders[role] = _builder(thing, role)
    for path, spec in roles.items():
        role = "judge" if path[0] == "judge" else path[-1]
        if role in given or spec is None or (isinstance(spec, Net) and spec.served):
            continue
        made.builders[role] = _from_spec(made, path, spec)
        if not isinstance(spec, list):
            made.blank[role] = _from_spec(made, path, spec.model_copy(update={"weights": None}))
            if role != "judge":
                made.taps[role] = spec.taps
    if "teacher" in made.builders:
        torch.manual_seed(0)  # of a teacher that is trained first
        made.teacher = made.build("teacher").eval().requires_grad_(False)
        if splits.train.kind == "images":  # faster to ask, on CPUs and GPUs alike; small ones train slower so
            made.teacher.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    if not resume:
        rehearse(made)
    if made.teacher is not None and "teacher" not in given:
        _trained(made, made.teacher)
    if recipe.student is not None and recipe.student.train is not None and "student" not in given:
        _started(made, recipe.student)
    return made


def _given(networks: Mapping[str, Any] | None) -> dict[str, Any]:
    """Those networks that are objects, not a recipe's spec."""
    return {role: net for role, net in (networks or {}).items() if not isinstance(net, (str, Mapping, type(None)))}


def objects(networks: Mapping[str, Any] | None, recipe: Recipe) -> tuple[str, ...]:
    """What the recipe cannot make again, since it was given as an object."""
    return (*_given(networks), *(["data"] if recipe.data is None else []))


def data_of(recipe: Recipe) -> dict[str, Any]:
    """The recipe's data as the loader reads it; texts for a transformers student are in its own tokens, if unsaid."""
    assert recipe.data is not None
    told = {"name": recipe.data.name, **recipe.data.options}
    reader = recipe.student or recipe.teacher
    if reader is not None and not reader.served and zoo.is_transformers(reader.net):
        told.setdefault("tokenizer", reader.net.removeprefix("hf:"))
    return told


def _noted(on_event: Event | None) -> Callable[[str], None] | None:
    return None if on_event is None else lambda said: on_event({"note": said})


def _two_tokenizers(recipe: Recipe, on_event: Event | None) -> Splits | None:
    """The data with its text in the teacher's tokens, too; None where the teacher has no tokenizer of its own."""
    if recipe.teacher is None or recipe.teacher.tokenizer is None or recipe.data is None:
        return None
    tokenizer: Any = recipe.teacher.tokenizer
    if recipe.teacher.train is not None and recipe.teacher.data:  # it is made of what the teacher reads
        own = _own_data(recipe, recipe.teacher)
        tokenizer = load_data({k: v for k, v in own.items() if k not in AFTER}).train.tokenizer
    asked = {name for name in teach.asked(recipe) if name in CONSTANTS}
    return load_data(
        data_of(recipe),
        teacher_tokenizer=tokenizer,
        constants=sorted({"same_words", *asked}),
        note=_noted(on_event),
    )


def _own_data(recipe: Recipe, spec: Net) -> dict[str, Any]:
    """What a network is trained on first: the recipe's data with the changes that it asks for, in its own tokens."""
    if recipe.data is None:
        return dict(spec.data)
    shared = {k: v for k, v in recipe.data.model_dump(exclude_unset=True).items() if k != "withheld"}
    data, usual = merge(shared, spec.data), data_of(recipe).get("tokenizer")
    tokenizer = spec.tokenizer or data.get("tokenizer") or usual
    return data if tokenizer is None else {**data, "tokenizer": tokenizer}


def as_splits(data: Any, recipe: Recipe) -> Splits | None:
    """Data given as objects: Splits, a Table, (inputs, labels) tensors or arrays, or a map-style dataset."""
    if isinstance(data, Splits):
        for table in (data.train, data.test):
            table.check()
        return data
    if data is None or isinstance(data, (str, Mapping, Path)):
        return None
    if isinstance(data, Table):
        return split(data.check())
    if isinstance(data, tuple) and len(data) == 2:
        inputs, labels = (_tensor(d) for d in data)
    elif hasattr(data, "__len__") and hasattr(data, "__getitem__") and not isinstance(data, torch.Tensor):
        inputs, labels = _columns(data)
    else:
        kinds = "a name, a path, Splits, a Table, (inputs, labels) or a dataset"
        raise BadInput(f"data must be {kinds}, got {type(data).__name__}")
    kind: Any = "images" if inputs.ndim == 4 else "vectors"
    if not inputs.is_floating_point() and inputs.ndim == 2:
        kind = "tokens"
    elif inputs.dtype == torch.uint8:
        inputs = inputs.float() / 255
    else:
        inputs = inputs.to(torch.get_default_dtype())
    if not labels.is_floating_point():
        labels = labels.long()
    return split(Table({"inputs": inputs, "labels": labels}, kind=kind).check())


def _tensor(values: Any) -> Tensor:
    try:
        return torch.as_tensor(values)
    except (TypeError, ValueError, RuntimeError) as error:
        raise BadInput(f"data of type {type(values).__name__} cannot become a tensor: {error}") from error


def _columns(data: Any) -> tuple[Tensor, Tensor]:
    """Inputs and labels of a data set of (inputs, label) pairs, or of rows with columns of these names."""
    rows = [data[i] for i in range(len(data))]
    if not rows:
        raise BadInput("the data set is empty: it has 0 examples")
    if isinstance(rows[0], Mapping):
        if not {"inputs", "labels"} <= set(rows[0]):
            raise BadInput(f"a row of the data set needs `inputs` and `labels`, found {', '.join(map(str, rows[0]))}")
        pairs = [(r["inputs"], r["labels"]) for r in rows]
    elif isinstance(rows[0], (tuple, list)) and len(rows[0]) == 2:
        pairs = [(r[0], r[1]) for r in rows]
    else:
        raise BadInput(f"a data set gives (inputs, label) pairs, got {type(rows[0]).__name__}")
    inputs, labels = [_tensor(x) for x, _ in pairs], [_tensor(y) for _, y in pairs]
    for name, column in (("inputs", inputs), ("labels", labels)):
        if len({c.shape for c in column}) > 1:
            raise BadInput(f"the {name} of the data set differ in shape: {[tuple(c.shape) for c in column[:3]]} ...")
    return torch.stack(inputs), torch.stack(labels)


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
        "masked": table.cloze is not None,
    }


def network(spec: Net, table: Table, folder: Path) -> nn.Module:
    """A network from its spec, with its weights if it names some."""
    if spec.members:
        return Ensemble(network(member, table, folder) for member in spec.members)
    body = {"net": spec.net, **spec.options}
    module: nn.Module = zoo.build(body, **describe(table))
    labels = table.columns.get("labels", torch.empty(0))
    if getattr(module, "causal", True) is False and table.cloze is None and labels.ndim == 2:
        raise BadInput(
            f"{spec.net} with `causal: false` sees the next tokens that it is asked for; hide some: "
            "`masked: true` in the data"
        )
    if spec.weights not in (None, "random"):
        load_weights(module, spec.weights, (folder, folder.parent, WEIGHTS, WEIGHTS.parent))
    return module


def _builder(thing: Any, role: str) -> Callable[[], nn.Module]:
    if isinstance(thing, nn.Module):
        return lambda: copy.deepcopy(thing)
    if not callable(thing):
        raise BadInput(f"a network is an nn.Module, a function that makes one, or a spec; got {type(thing).__name__}")

    def make() -> nn.Module:
        made = thing()
        if not isinstance(made, nn.Module):
            raise BadInput(f"the function for the {role} made a {type(made).__name__}, not an nn.Module")
        return made

    return make


def _from_spec(made: Setting, path: tuple[str, ...], spec: Net | list[Net]) -> Callable[[], nn.Module]:
    """Makes one network, or a list of them; what is wrong is put down to the recipe's key."""

    def make() -> nn.Module:
        with made.recipe.blamed(*path):
            if isinstance(spec, list):
                return nn.ModuleList([network(s, made.splits.train, made.folder) for s in spec])
            table = made.splits.train
            return network(spec, table.retold() if path == ("teacher",) else table, made.folder)

    return make


def _trained(made: Setting, module: nn.Module) -> None:
    """Train a teacher that has no weights, once, when the recipe says how; refuse one that knows nothing."""
    recipe, spec = made.recipe, made.recipe.teacher
    if spec is None or spec.weights is not None:
        return
    for i, member in enumerate(spec.members or ()):
        if member.weights is None and member.net in zoo.NETS:
            raise BadInput(
                f"{recipe.at('teacher', 'ensemble', i)}{member.net} would teach with random weights; give it `weights`"
            )
    if spec.train is not None:
        module.requires_grad_(True)
        _train_first(made, module, spec, "teacher")
        module.eval().requires_grad_(False)
    elif spec.net in zoo.NETS:
        raise BadInput(
            f"{recipe.at('teacher')}{spec.net} would teach with random weights; give it `weights`, or `train` to train "
            "it first, or say `weights: random`"
        )


def _started(made: Setting, spec: Net) -> None:
    """Train the student on labels, once, when the recipe says how: every arm and seed then starts from it."""
    torch.manual_seed(0)
    blank = made.builders["student"]
    place = _train_first(made, blank().train(), spec, "student")

    def start() -> nn.Module:
        module = blank()
        load_weights(module, str(place / "weights.safetensors"), ())
        return module

    made.builders["student"] = start


def place_of_first(recipe: Recipe, spec: Net, role: str, folder: Path) -> Path:
    """Where a network is kept that a recipe whose run is in `folder` trains first."""
    key = json.dumps([spec.model_dump(mode="json"), _own_data(recipe, spec)], sort_keys=True, default=str)
    return folder.parent / f".{role}s" / hashlib.sha256(key.encode()).hexdigest()[:16]


def trained_first(folder: Path) -> dict[str, Path]:
    """Role -> where the networks are kept that a run trained before all arms; '<stage>/<role>' in one of stages."""
    recipe = load(folder / "recipe.yaml")
    found: dict[str, Path] = {}
    for stage in recipe.stages:
        inside = folder / stage.name
        if (inside / "recipe.yaml").exists():
            found |= {f"{stage.name}/{role}": place for role, place in trained_first(inside).items()}
    for role, spec in (("teacher", recipe.teacher), ("student", recipe.student)):
        if spec is not None and spec.train is not None and spec.weights is None:
            found[role] = place_of_first(recipe, spec, role, folder)
    return found


def _train_first(made: Setting, module: nn.Module, spec: Net, role: str) -> Path:
    """Train a network on labels and keep it in a folder named by all that decides it; if it is there, read it."""
    assert spec.train is not None
    recipe = made.recipe
    data, place = _own_data(recipe, spec), place_of_first(recipe, spec, role, made.folder)
    if first((place / "weights.safetensors").exists):
        load_weights(module, str(place / "weights.safetensors"), ())
        return place
    splits, withheld = made.splits, recipe.data is not None and recipe.data.options.get("withheld")
    if spec.data or spec.tokenizer is not None or withheld:
        splits = load_data({k: v for k, v in data.items() if k not in AFTER})
    if made.on_event is not None:
        made.on_event({"arm": role, "seed": 0, "label": f"training the {role} {spec.net}"})
    with recipe.blamed(role, "data"):
        changed = recipe.with_changes({"data": data}).unplaced() if data else recipe
        if spec.data and changed.data is not None:
            splits = planted(poisoned(splits, changed.data.poison), changed.data)
    with recipe.blamed(role, "train"):
        batches = batches_of(changed, splits.train, 0, train=spec.train)
    name = "denoising" if hasattr(module, "schedule") else "distill"
    loss = "squared_error" if scored(splits.train) else "bce" if any_number(splits.train) else "ce"
    method = knobs.make(name, {"match": (loss,)} if name == "distill" else {})
    from limbeck.core.loop import fit

    nets, plan = Nets(student=module), make_plan(spec.train, batches.steps_per_epoch, 0)
    fit(method, nets, batches, plan, folder=place, resume=True, on_event=made.on_event)  # goes on after an interruption
    save_network(module, place, spec)
    if leads():
        shutil.rmtree(place / "checkpoints", ignore_errors=True)
    return place
