"""A recipe: what to distil, from what, into what, on which data, and how it is judged. YAML in, checked models out."""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from limbeck.core.errors import BadInput, nearest

Verb = Literal["teach", "shorten", "condense", "shape", "label", "train", "evaluate"]
Spec = str | dict[str, Any]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Net(BaseModel):
    """A network: `resnet20`, or {net: resnet20, width: 16, weights: file.safetensors}.

    Further keys are options of the network's builder.
    """

    model_config = ConfigDict(extra="allow", frozen=True)

    net: str = Field(description="zoo name, timm:NAME, hf:NAME_OR_PATH or file.py:Class")
    weights: str | None = Field(None, description="safetensors file, run folder, or zoo/NAME")
    taps: dict[str, str | list[str]] = Field(default_factory=dict, description="name -> layer paths to read")
    train: "Train | None" = Field(None, description="train it first, when it has no weights, on the recipe's data")
    data: dict[str, Any] = Field(default_factory=dict, description="changes to `data` for that training")

    @model_validator(mode="before")
    @classmethod
    def _short(cls, value: Any) -> Any:
        return {"net": value} if isinstance(value, str) else value

    @property
    def options(self) -> dict[str, Any]:
        """The builder's own options."""
        return dict(self.model_extra or {})


class Data(BaseModel):
    """A data set: a name, a path, or {name: fashion_mnist, per_class: 100, augment: [crop, flip]}.

    Further keys are options of the loader.
    """

    model_config = ConfigDict(extra="allow", frozen=True)

    name: str = Field(description="embedded set, folder in LIMBECK_DATA, path, or hub:NAME")
    augment: list[Any] = Field(default_factory=list, description="of training batches: crop, flip, ...")

    @model_validator(mode="before")
    @classmethod
    def _short(cls, value: Any) -> Any:
        return {"name": value} if isinstance(value, str) else value

    @property
    def options(self) -> dict[str, Any]:
        """The loader's own options."""
        return dict(self.model_extra or {})


class Train(_Strict):
    """How long and how to train. Give one of epochs and steps; minutes is a limit on top."""

    epochs: float | None = Field(None, gt=0)
    steps: int | None = Field(None, gt=0)
    minutes: float | None = Field(None, gt=0)
    batch_size: int = Field(128, gt=0)
    per_class: int | None = Field(None, gt=0, description="class-balanced batches with that many of each class")
    optimizer: Spec = Field(default_factory=lambda: {"adam": {"lr": 1e-3}})
    optimizers: dict[str, Spec] = Field(default_factory=dict, description="by player, before the method's defaults")
    schedule: Spec = "constant"
    accumulate: int = Field(1, gt=0)
    clip: float | None = Field(None, gt=0)
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    ema: float | None = Field(None, gt=0, lt=1)
    validate_every: int | None = Field(None, ge=0, description="in steps; default: once an epoch")
    save_every: int = Field(0, ge=0, description="in steps; 0: only when interrupted")
    log_every: int = Field(10, ge=0)
    select: str = Field("", description="validation metric by which the best weights are kept; '' keeps the last")
    track: str = Field("", description="also log to this tracker: tensorboard")


class Store(_Strict):
    """Teacher signals on disk. `teach` with a store reads it, and captures what is missing when a teacher is given."""

    folder: str = Field("", description="default: a folder beside the runs, named by teacher and data")
    topk: int = Field(0, ge=0, description="entries kept a place; 0 keeps all classes")
    views: int = Field(1, gt=0, description="augmented views of each example")
    augment: list[Any] = Field(default_factory=list, description="drawn once a view and stored with it")
    bits: Literal[8, 16, 32] = Field(16, description="of a stored log-probability")
    crops: int = Field(1, gt=0, description="views of an example in one batch")


class Judge(_Strict):
    """How a condensed set is judged: fresh networks are trained on it."""

    net: Net = Field(default_factory=lambda: Net(net="convnet"))
    nets: int = Field(1, gt=0, description="fresh networks a seed")
    train: Train = Field(default_factory=lambda: Train(epochs=300))
    augment: list[Any] = Field(default_factory=list)


class Expect(_Strict):
    """What the evidence should show."""

    metric: str
    beats: str = "control"
    seeds: int = Field(5, gt=0)
    published: float | None = Field(None, description="the paper's figure in this protocol")
    within: float | None = Field(None, gt=0, description="how near counts as reproduced")


class Recipe(_Strict):
    """One stage, or a list of stages that share artefacts."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")
    do: Verb = "teach"
    row: str = Field("", description="key of the catalogue row that this recipe stands for")
    seeds: list[int] = Field(default_factory=lambda: [0])
    teacher: Net | None = None
    student: Net | None = None
    nets: dict[str, Net | list[Net]] = Field(default_factory=dict, description="further networks by role")
    data: Data | None = None
    method: Spec | None = Field(None, description="training, shape or data method; default: the plain scheme")
    match: list[Spec] = Field(["ce", "kd"], description="losses of the plain scheme")
    train: Train = Field(default_factory=lambda: Train(epochs=10))
    steps: int = Field(1, gt=0, description="shorten: sampling steps of the student")
    teacher_steps: int = Field(18, gt=0, description="shorten: sampling steps of the teacher")
    ipc: int = Field(10, gt=0, description="condense: examples a class")
    judge: Judge = Field(default_factory=Judge)
    store: Store | None = Field(None, description="teacher signals: written by label, read by teach")
    measure: list[Spec] = Field(default_factory=list)
    metric: str = Field("", description="the one figure that decides; default by verb and data")
    control: dict[str, Any] = Field(default_factory=dict, description="what the control changes besides its teacher")
    expect: Expect | None = None
    stages: list["Recipe"] = Field(default_factory=list)

    @model_validator(mode="before")
    @classmethod
    def _seeds(cls, value: Any) -> Any:
        if isinstance(value, dict) and isinstance(value.get("seeds"), int):
            value = {**value, "seeds": list(range(value["seeds"]))}
        return value

    @property
    def digest(self) -> str:
        """Hash of all that decides the result; the name does not."""
        body = self.model_dump(mode="json", exclude={"name", "expect", "row"})
        return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()[:16]

    def with_changes(self, changes: Mapping[str, Any]) -> "Recipe":
        """A copy with nested changes, {"train": {"epochs": 3}}; checked again."""
        return check(merge(self.model_dump(exclude_unset=True), changes), "recipe")

    @staticmethod
    def load(path: str | Path, overrides: Sequence[str] = ()) -> "Recipe":
        """Read a YAML file; overrides such as "train.epochs=3" or "match.dkd.beta=4" are applied first."""
        return load(Path(path), overrides)


Recipe.model_rebuild()
Net.model_rebuild()


MODELS: dict[Any, type[BaseModel]] = {
    "train": Train,
    "judge": Judge,
    "store": Store,
    "expect": Expect,
    "stages": Recipe,
    "teacher": Net,
    "student": Net,
    "net": Net,
    "data": Data,
}


def merge(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """`base` with `changes` laid over it; mappings merge, everything else is replaced, None removes."""
    out = dict(base)
    for key, value in changes.items():
        if isinstance(value, Mapping) and isinstance(out.get(key), Mapping):
            # one-entry choices (optimizer, method) are replaced when the choice itself changes
            swap = key in ("optimizer", "method", "schedule") and set(value) != set(out[key])
            out[key] = dict(value) if swap else merge(out[key], value)
        elif value is None:
            out.pop(key, None)
        else:
            out[key] = value
    return out


# ---- YAML with line numbers ------------------------------------------------------------------------------------------
def _lines(node: yaml.Node, path: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], int]]:
    yield path, node.start_mark.line + 1
    if isinstance(node, yaml.MappingNode):
        seen: dict[Any, int] = {}
        for key, value in node.value:
            line = key.start_mark.line + 1
            if key.value in seen:
                where = f"{key.start_mark.name}:{line}"
                raise BadInput(f"{where}: the key {key.value!r} is already on line {seen[key.value]}")
            seen[key.value] = line
            yield from ((p, line if p == (*path, key.value) else n) for p, n in _lines(value, (*path, key.value)))
    elif isinstance(node, yaml.SequenceNode):
        for i, value in enumerate(node.value):
            yield from _lines(value, (*path, i))


def load(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read and check a recipe file. Raises BadInput as 'file:line: key: what is wrong; what to write'."""
    try:
        text = path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        near = nearest(path.name, [p.name for p in path.parent.glob("*.y*ml")]) if path.parent.is_dir() else ""
        raise BadInput(f"cannot read the recipe {path}: {getattr(error, 'strerror', error)}{near}") from error
    try:
        loader = yaml.SafeLoader(text)
        loader.name = str(path)
        node = loader.get_single_node()
        lines = dict(_lines(node)) if node is not None else {}
        tree = yaml.safe_load(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{path}:{mark.line + 1}" if mark else str(path)
        raise BadInput(f"{where}: not valid YAML: {getattr(error, 'problem', error)}") from error
    if not isinstance(tree, dict):
        raise BadInput(f"{path}: a recipe is a mapping of keys such as name, do, data; found {type(tree).__name__}")
    tree.setdefault("name", path.stem)
    for override in overrides:
        _apply(tree, override)
    return check(tree, str(path), lines)


def check(tree: Mapping[str, Any], source: str, lines: Mapping[tuple[Any, ...], int] | None = None) -> Recipe:
    """Check a tree of plain values against the model and the signatures of what it names."""
    try:
        recipe = Recipe.model_validate(tree)
    except ValidationError as error:
        first = error.errors()[0]
        loc = tuple(p for p in first["loc"] if not _is_type(p))
        raise BadInput(_sentence(source, loc, first, tree, lines or {})) from error
    return recipe


def _is_type(part: Any) -> bool:
    """Whether a part of an error's path is a member of a union rather than a key."""
    return isinstance(part, str) and (part[:1].isupper() or "[" in part or part in ("str", "list"))


def _sentence(
    source: str, loc: tuple[Any, ...], error: Mapping[str, Any], tree: Any, lines: Mapping[tuple[Any, ...], int]
) -> str:
    where = source
    for n in range(len(loc), 0, -1):
        if loc[:n] in lines:
            where = f"{source}:{lines[loc[:n]]}"
            break
    key = ".".join(map(str, loc))
    if error["type"] == "extra_forbidden":
        return f"{where}: unknown key `{key}`{nearest(str(loc[-1]), _known(loc[:-1]))}"
    if error["type"] == "missing":
        return f"{where}: the key `{key}` is missing"
    return f"{where}: `{key}`: {error['msg'][:1].lower()}{error['msg'][1:]}, got {error.get('input')!r}"


def _known(loc: tuple[Any, ...]) -> list[str]:
    model: type[BaseModel] = Recipe
    for part in loc:
        model = MODELS.get(part, model)
    return list(model.model_fields)


def _apply(tree: dict[str, Any], override: str) -> None:
    """Set one value by a path: "train.epochs=3"; a list element by number or by the name it starts with."""
    path, sign, text = override.partition("=")
    if not sign or not path:
        raise BadInput(f"an override is written key.key=value, got {override!r}")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise BadInput(f"the value of the override {override!r} is not valid YAML") from error
    at: Any = tree
    *parents, last = path.split(".")
    for i, part in enumerate(parents):
        following = parents[i + 1] if i + 1 < len(parents) else last
        at = _enter(at, part, following, override)
    if isinstance(at, list):
        at[_place(at, last, override)] = value
    elif isinstance(at, dict):
        at[last] = value
    else:
        raise BadInput(f"the override {override!r} goes below a plain value")


def _enter(at: Any, part: str, following: str, override: str) -> Any:
    if isinstance(at, list):
        i = _place(at, part, override)
        if isinstance(at[i], str):  # `ce` becomes {ce: {}} to hold a knob
            at[i] = {at[i]: {}}
        return at[i] if part.isdigit() else _child(at[i], part)
    if not isinstance(at, dict):
        raise BadInput(f"the override {override!r} goes below a plain value")
    return _child(at, part)


def _child(at: dict[str, Any], part: str) -> Any:
    if at.get(part) is None:
        at[part] = {}
    elif isinstance(at[part], str):  # short forms: `teacher: resnet20`, `data: digits`, `method: dm`
        short = {"teacher": "net", "student": "net", "data": "name"}.get(part)
        at[part] = {short: at[part]} if short else {at[part]: {}}
    return at[part]


def _place(items: list[Any], part: str, override: str) -> int:
    if part.isdigit() and int(part) < len(items):
        return int(part)
    names = [next(iter(i)) if isinstance(i, dict) and i else i for i in items]
    if part in names:
        return names.index(part)
    raise BadInput(f"the override {override!r}: {part!r} is not in the list{nearest(part, map(str, names))}")


def dump(recipe: Recipe) -> str:
    """The recipe as YAML, without what was left at its default."""
    body = {"name": recipe.name, "do": recipe.do, **recipe.model_dump(mode="json", exclude_defaults=True)}
    return yaml.safe_dump(body, sort_keys=False, width=120)
