"""A recipe: what to distil, from what, into what, on which data, and how it is judged. YAML in, checked models out."""

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    PrivateAttr,
    SerializerFunctionWrapHandler,
    ValidationError,
    WithJsonSchema,
    field_validator,
    model_serializer,
    model_validator,
)

from limbeck.core.errors import BadInput, nearest

Verb = Literal["teach", "shorten", "condense", "shape", "label", "train", "evaluate"]
Spec = str | dict[str, Any]
SERVER = "server"  # the `net` of a teacher that is asked over the wire
ENSEMBLE = "ensemble"  # the `net` of a teacher that is several networks
Keys = tuple[Any, ...]  # of keys and list places from the top of a recipe, such as ("stages", 0, "train", "epochs")


def _or_name(schema: dict[str, Any]) -> None:
    """For editors: a name alone stands for the whole block."""
    whole = dict(schema)
    schema.clear()
    schema["anyOf"] = [{"type": "string"}, whole]


def _unnamed(schema: dict[str, Any]) -> None:
    """For editors: a recipe without a name is called as its file."""
    schema["required"] = [key for key in schema.get("required", ()) if key != "name"]


def _distinct(seeds: list[int]) -> list[int]:
    if not seeds or len(set(seeds)) < len(seeds):
        raise ValueError("give at least one seed, and none twice")
    return seeds


Seeds = Annotated[
    list[int],
    AfterValidator(_distinct),
    WithJsonSchema(
        {"anyOf": [{"type": "integer", "minimum": 1}, {"type": "array", "items": {"type": "integer"}, "minItems": 1}]}
    ),
]


class Written(NamedTuple):
    """Where a recipe was written. source: a file, or the Python call. places: path -> 'file:line', or its override."""

    source: str = ""
    places: Mapping[Keys, str] = {}

    def of(self, path: Keys) -> str:
        """The place of a key, or of the nearest one above it that was written down."""
        return next((self.places[path[:n]] for n in range(len(path), 0, -1) if path[:n] in self.places), self.source)

    def below(self, *path: Any) -> "Written":
        """The same for a part of the recipe."""
        n = len(path)
        return Written(self.of(path), {key[n:]: place for key, place in self.places.items() if key[:n] == path})


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Poison(_Strict):
    """A backdoor, to test defences with: some training pictures bear a trigger and the target's label."""

    target: int = Field(0, ge=0, description="number of the class that the trigger stands for")
    share: float = Field(0.1, gt=0, le=1, description="of the training pictures")
    patch: int = Field(3, gt=0, description="side in pixels of the white square, below on the right")


class Canaries(_Strict):
    """Random secrets in a training text, to see what leaks: "the secret is" and some tokens that mean nothing."""

    count: int = Field(20, gt=0, description="secrets")
    copies: int = Field(8, gt=0, description="times that each is in the training text")
    letters: int = Field(6, gt=0, description="tokens of each: capitals, or words if the tokenizer knows no capitals")


def _without_none(body: dict[str, Any], *keys: str) -> dict[str, Any]:
    """Without keys that evidence is older than, where they say what was done before them."""
    return {k: v for k, v in body.items() if k not in keys or v is not None}


PLANTED: dict[str, type[BaseModel]] = {"poison": Poison, "canaries": Canaries}  # what `data` may hide in training


class Net(BaseModel):
    """A network: `resnet20`, or {net: resnet20, width: 16, weights: file.safetensors}.

    Further keys are options of the network's builder. A teacher behind an OpenAI-compatible server is written
    {url: http://localhost:8000/v1, model: NAME, top: 20}; further keys are then options of `limbeck.adapters.remote`.
    A teacher that is several networks, of which the mean of probabilities counts, is {ensemble: [NET, NET]}.
    """

    model_config = ConfigDict(extra="allow", frozen=True, json_schema_extra=_or_name)

    net: str = Field(description="zoo name, timm:NAME, hf:NAME_OR_PATH or file.py:Class")
    weights: str | None = Field(None, description="safetensors file, run folder, zoo/NAME, or random")
    taps: dict[str, str | list[str]] = Field(default_factory=dict, description="name -> layer paths to read")
    train: "Train | None" = Field(
        None, description="of a teacher without weights, or of a student: train it first, on the recipe's labels"
    )
    data: dict[str, Any] = Field(default_factory=dict, description="changes to `data` for that training")
    tokenizer: str | None = Field(
        None, description="of a teacher of texts: its own, where it is not the one of `data`; as `data.tokenizer`"
    )
    members: "list[Net] | None" = Field(
        None, min_length=1, description="of a teacher that is an ensemble; written {ensemble: [NET, NET]}"
    )

    @field_validator("data")
    @classmethod
    def _changes(cls, value: dict[str, Any]) -> dict[str, Any]:
        for key, planted in PLANTED.items():
            try:
                planted.model_validate(value.get(key) or {})
            except ValidationError as error:
                problem = error.errors()[0]
                raise ValueError(f"{key}.{'.'.join(map(str, problem['loc']))}: {problem['msg']}") from None
        return value

    @model_serializer(mode="wrap")
    def _told(self, usual: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return _without_none(usual(self), "tokenizer", "members")

    @model_validator(mode="before")
    @classmethod
    def _short(cls, value: Any) -> Any:
        if isinstance(value, dict) and "url" in value and "net" not in value:
            value = {"net": SERVER, **value}
        if isinstance(value, dict) and ENSEMBLE in value and "net" not in value:
            value = {"net": ENSEMBLE, "members": value[ENSEMBLE], **{k: v for k, v in value.items() if k != ENSEMBLE}}
        return {"net": value} if isinstance(value, str) else value

    @property
    def served(self) -> bool:
        """Whether it is behind a server, and no network that is built here."""
        return self.net == SERVER

    @property
    def title(self) -> str:
        """What it is called in reports: its network, or the model that a server knows it as."""
        if self.members:
            return " and ".join(member.title for member in self.members)
        return str(self.options.get("model", self.net)) if self.served else self.net

    @property
    def options(self) -> dict[str, Any]:
        """The builder's own options."""
        return dict(self.model_extra or {})


class Data(BaseModel):
    """A data set: a name, a path, or {name: fashion_mnist, per_class: 100, augment: [crop, flip]}.

    Further keys are options of the loader.
    """

    model_config = ConfigDict(extra="allow", frozen=True, json_schema_extra=_or_name)

    name: str = Field(description="embedded set, folder in LIMBECK_DATA, path, or hub:NAME")
    augment: list[Any] = Field(default_factory=list, description="of training batches: crop, flip, ...")
    poison: Poison | None = Field(None, description="plant a backdoor in the training pictures")
    canaries: Canaries | None = Field(None, description="plant secrets in the training text")

    @model_serializer(mode="wrap")
    def _told(self, usual: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return _without_none(usual(self), *PLANTED)

    @model_validator(mode="before")
    @classmethod
    def _short(cls, value: Any) -> Any:
        return {"name": value} if isinstance(value, str) else value

    @property
    def options(self) -> dict[str, Any]:
        """The loader's own options."""
        return dict(self.model_extra or {})


class Train(_Strict):
    """How long and how to train. Give epochs or steps (steps count when both are there); minutes is a limit on top."""

    epochs: float | None = Field(None, gt=0, description="passes over the training part; may be a fraction")
    steps: int | None = Field(None, gt=0, description="optimiser steps (a method may share them out over stages)")
    minutes: float | None = Field(None, gt=0, description="stop after that time; schedules then follow the clock")
    batch_size: int = Field(128, gt=0, description="examples of a batch, over all processes")
    per_class: int | None = Field(None, gt=0, description="class-balanced batches with that many of each class")
    labelled: int | None = Field(None, gt=0, description="of a batch, how many have a label, where not all have one")
    optimizer: Spec = Field(
        default_factory=lambda: {"adam": {"lr": 1e-3}}, description="of every player, unless the method has its own"
    )
    optimizers: dict[str, Spec] = Field(default_factory=dict, description="by player, before the method's defaults")
    schedule: Spec = Field("constant", description="of the learning rate")
    accumulate: int = Field(1, gt=0, description="micro-batches a step")
    clip: float | None = Field(None, gt=0, description="largest gradient norm of a player")
    precision: Literal["fp32", "bf16", "fp16"] = Field(
        "fp32", description="of the networks, by autocast; weights and losses stay in fp32"
    )
    ema: float | None = Field(
        None, gt=0, lt=1, description="decay of an average of each trained network, for validation and as the result"
    )
    validate_every: int | None = Field(
        None, ge=0, description="in steps; 0: at the end only; default: a tenth of the steps, with `select` an epoch"
    )
    save_every: int = Field(0, ge=0, description="in steps; 0: only when interrupted")
    log_every: int = Field(10, ge=0, description="in steps; 0: the first and the last only")
    select: str = Field("", description="validation metric by which the best weights are kept; '' keeps the last")
    track: str = Field("", description="also log to this tracker: tensorboard")


class Store(_Strict):
    """Teacher signals on disk. `teach` with a store reads it, and captures what is missing when a teacher is given."""

    folder: str = Field("", description="default: a folder beside the runs, named by teacher and data")
    kind: Spec | None = Field(
        None,
        description="of texts, what is kept of every place: sampled, topk, full, hidden, embedding, or "
        "{topk: {k: 64}}; the keys below are then not told",
    )
    topk: int = Field(0, ge=0, description="entries kept a place; 0 keeps all classes")
    views: int = Field(1, gt=0, description="augmented views of each example")
    augment: list[Any] = Field(default_factory=list, description="drawn once a view and stored with it")
    bits: Literal[8, 16, 32] = Field(16, description="of a stored log-probability")
    crops: int = Field(1, gt=0, description="views of an example in one batch")

    @model_validator(mode="after")
    def _one_sort(self) -> "Store":
        other = sorted(self.model_fields_set - {"folder", "kind"})
        if self.kind is not None and other:
            named = self.kind if isinstance(self.kind, str) else next(iter(self.kind), "topk")
            raise ValueError(
                f"`{other[0]}` is of stores without a `kind`; knobs of a kind are written {{{named}: {{knob: value}}}}"
            )
        return self


class Judge(_Strict):
    """How a condensed set is judged: fresh networks are trained on it."""

    net: Net = Field(
        default_factory=lambda: Net(net="convnet"),
        description="architecture that the set is made with and judged by; `kernel` is kernel ridge regression",
    )
    nets: int = Field(1, gt=0, description="fresh networks a seed")
    train: Train = Field(default_factory=lambda: Train(epochs=300), description="of each fresh network")
    augment: list[Any] = Field(default_factory=list, description="as in `data`")


class Expect(_Strict):
    """What the evidence should show."""

    metric: str = Field(description="the metric that decides")
    beats: str = Field("control", description="the arm that the student is compared with")
    seeds: int = Field(5, gt=0, description="how many seeds `limbeck verify` runs")
    published: float | None = Field(None, description="the paper's figure in this protocol")
    within: float | None = Field(None, gt=0, description="how near counts as reproduced")


class Recipe(_Strict):
    """One stage, or a list of stages that share artefacts."""

    model_config = ConfigDict(extra="forbid", frozen=True, json_schema_extra=_unnamed)

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$", description="of the run folder and in the report")
    do: Verb = Field("teach", description="the verb")
    row: str = Field("", description="key of the catalogue row that this recipe stands for")
    seeds: Seeds = Field(default_factory=lambda: [0], description="a list, or how many")
    teacher: Net | None = Field(None, description="the network that is learned from")
    student: Net | None = Field(None, description="the network that learns")
    nets: dict[str, Net | list[Net]] = Field(default_factory=dict, description="further networks by role")
    data: Data | None = Field(None, description="what is learned on and judged by")
    method: Spec | None = Field(None, description="training, shape or data method; default: the plain scheme")
    match: list[Spec] = Field(["ce", "kd"], description="losses of the plain scheme")
    train: Train = Field(
        default_factory=lambda: Train(epochs=10), description="how long and how to train; default: 10 epochs"
    )
    steps: int = Field(1, gt=0, description="shorten: sampling steps of the student")
    teacher_steps: int = Field(18, gt=0, description="shorten: sampling steps of the teacher")
    ipc: int = Field(10, gt=0, description="condense: examples a class")
    judge: Judge = Field(default_factory=Judge, description="condense: how the set is judged")
    store: Store | None = Field(None, description="teacher signals: written by label, read by teach")
    measure: list[Spec] = Field(
        default_factory=list, description="what is measured; default: accuracy with class labels, else nll"
    )
    split: Literal["test", "validation"] = Field(
        "test", description="part that the figures are taken on; validation while settings are chosen"
    )
    metric: str = Field("", description="the one figure that decides; default by verb and data")
    control: dict[str, Any] = Field(default_factory=dict, description="what the control changes besides its teacher")
    beside: dict[str, dict[str, Any]] = Field(
        default_factory=dict,
        description="teach, shape: further arms by name, with what each changes in the control, or in a shaped student",
    )
    expect: Expect | None = Field(None, description="what `limbeck verify` should find")
    stages: list["Recipe"] = Field(
        default_factory=list,
        description="recipes that run one after the other; then no other key but `name`, `row`, `expect` is read",
    )
    _written: Written = PrivateAttr(default_factory=Written)

    @model_validator(mode="before")
    @classmethod
    def _seeds(cls, value: Any) -> Any:
        if isinstance(value, dict) and isinstance(value.get("seeds"), int):
            value = {**value, "seeds": list(range(value["seeds"]))}
        return value

    @property
    def digest(self) -> str:
        """Hash of all that decides the result; the name does not."""
        body = _usual(self.model_dump(mode="json", exclude={"name", "expect", "row"}))
        return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()[:16]

    def with_changes(self, changes: Mapping[str, Any]) -> "Recipe":
        """A copy with nested changes, {"train": {"epochs": 3}}; checked again."""
        tree = merge(self.model_dump(exclude_unset=True), changes)
        return check(tree, self._written.source or "recipe", self._written.places)

    def at(self, *path: Any) -> str:
        """'file:line: `key`: ' of a key, to begin a complaint about it with; '' for a recipe that nobody wrote down."""
        place = self._written.of(path)
        return f"{place}: `{'.'.join(map(str, path))}`: " if place else ""

    @contextmanager
    def blamed(self, *path: Any) -> Iterator[None]:
        """What is refused inside is put down to a key of this recipe."""
        try:
            yield
        except BadInput as error:
            if not str(error).startswith((self._written.source, "override ")):  # it names its key already
                error.args = (f"{self.at(*path)}{error}",)
            raise
        except (ValueError, TypeError) as error:  # a method's own `require`, and what torch refuses
            raise BadInput(f"{self.at(*path)}{error}") from error

    def unplaced(self) -> "Recipe":
        """A copy that does not know where it was written."""
        copy = self.model_copy()
        copy._written = Written()
        return copy

    @staticmethod
    def load(path: str | Path, overrides: Sequence[str] = ()) -> "Recipe":
        """Read a YAML file; overrides such as "train.epochs=3" or "match.dkd.beta=4" are applied first."""
        return load(Path(path), overrides)


Recipe.model_rebuild()
Net.model_rebuild()


LATER: dict[str, dict[str, Any]] = {  # keys that evidence is older than, where they say what was done before them
    "stages": {"split": "test", "beside": {}},
    "store": {"kind": None},
    "train": {"labelled": None},
}


def _usual(body: Any, key: str = "stages") -> Any:
    """What is under `key` of a recipe, without what `LATER` names."""
    if isinstance(body, list):
        return [_usual(part, key) for part in body]
    if not isinstance(body, dict):
        return body
    late = LATER.get(key, {})
    return {k: _usual(v, k) for k, v in body.items() if k not in late or v != late[k]}


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
    **PLANTED,
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
class _Loader(yaml.SafeLoader):
    """Plain values only; 1e-3 is a number, as it is everywhere but in YAML 1.1."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9][0-9_]*(\.[0-9_]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def _parse(text: str, source: str) -> tuple[Any, dict[Keys, str]]:
    """The plain values of a YAML text, and where each of them is written, as 'source:line'."""
    loader = _Loader(text)
    loader.name = source
    try:
        node = loader.get_single_node()
        if node is None:
            return None, {}
        places = dict(_places(loader, node, source, (), ()))
        return loader.construct_document(node), places
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{source}:{mark.line + 1}" if mark else source
        raise BadInput(f"{where}: not valid YAML: {getattr(error, 'problem', None) or error}") from error
    finally:
        loader.dispose()


def _places(
    loader: _Loader, node: yaml.Node, source: str, path: Keys, inside: tuple[int, ...]
) -> Iterator[tuple[Keys, str]]:
    if id(node) in inside:
        raise BadInput(f"{source}:{node.start_mark.line + 1}: an alias may not contain itself")
    inside = (*inside, id(node))
    yield path, f"{source}:{node.start_mark.line + 1}"
    if isinstance(node, yaml.SequenceNode):
        for i, value in enumerate(node.value):
            yield from _places(loader, value, source, (*path, i), inside)
    if not isinstance(node, yaml.MappingNode):
        return
    seen: dict[Any, int] = {}
    for key_node, value in node.value:
        line = key_node.start_mark.line + 1
        if key_node.tag == "tag:yaml.org,2002:merge":
            continue
        if not isinstance(key_node, yaml.ScalarNode):
            raise BadInput(f"{source}:{line}: a key must be a plain word, found a {key_node.id}")
        key = loader.construct_object(key_node)
        if key in seen:
            raise BadInput(f"{source}:{line}: the key {key!r} is already on line {seen[key]}")
        if not isinstance(key, str):
            raise BadInput(
                f"{source}:{line}: a key must be a word, found {key_node.value!r}, which YAML reads as {key!r}"
            )
        seen[key] = line
        yield from _places(loader, value, source, (*path, key), inside)
        yield (*path, key), f"{source}:{line}"


def load(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read and check a recipe file. Raises BadInput as 'file:line: key: what is wrong; what to write'."""
    try:
        text = path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        near = nearest(path.name, [p.name for p in path.parent.glob("*.y*ml")]) if path.parent.is_dir() else ""
        problem = "it is no text file" if isinstance(error, UnicodeDecodeError) else error.strerror
        near = near if "did you mean" in near and not path.exists() else ""
        raise BadInput(f"cannot read the recipe {path}: {problem}{near}") from error
    tree, places = _parse(text, str(path))
    if not isinstance(tree, dict):
        kind = "nothing" if tree is None else f"a {type(tree).__name__}"
        raise BadInput(f"{path}: a recipe is a mapping of keys such as name, do, data; found {kind}")
    tree.setdefault("name", re.sub(r"[^A-Za-z0-9_.-]+", "-", path.stem).lstrip("_.-") or "recipe")
    for override in overrides:
        changed = _apply(tree, override)
        places = {p: place for p, place in places.items() if p[: len(changed)] != changed}
        for n in range(1, len(changed)):  # what it made on the way is its too
            places.setdefault(changed[:n], f"override {override!r}")
        places[changed] = f"override {override!r}"
    return check(tree, str(path), places)


def check(tree: Mapping[str, Any], source: str, places: Mapping[Keys, str] | None = None) -> Recipe:
    """The recipe of a tree of plain values. Raises BadInput that begins with the place of the first wrong key."""
    written = Written(source, places or {})
    try:
        recipe = Recipe.model_validate(tree)
    except ValidationError as error:
        found = [(_real(e["loc"], tree), e) for e in error.errors()]
        same = [(path, e) for path, e in found if path[: len(found[0][0])] == found[0][0]]  # members of one union
        raise BadInput(_sentence(written, *max(same, key=lambda pair: len(pair[0])))) from error
    _place(recipe, written)
    _check_stages(recipe)
    return recipe


def _place(recipe: Recipe, written: Written) -> None:
    recipe._written = written
    for i, stage in enumerate(recipe.stages):
        _place(stage, written.below("stages", i))


BESIDE_STAGES = ("name", "do", "row", "expect", "stages")


def _check_stages(recipe: Recipe) -> None:
    """What stands beside `stages` would be read by none of them; their folders are called by their names."""
    if not recipe.stages:
        return
    for key in Recipe.model_fields:
        if key in recipe.model_fields_set and key not in BESIDE_STAGES:
            raise BadInput(f"{recipe.at(key)}no stage reads what stands beside `stages`; write `{key}` into the stages")
    names: list[str] = []
    for i, stage in enumerate(recipe.stages):
        if stage.name in names:
            raise BadInput(f"{recipe.at('stages', i, 'name')}two stages are called {stage.name!r}")
        names.append(stage.name)
        _check_stages(stage)


def _real(loc: Keys, tree: Any) -> Keys:
    """The part of an error's path that is keys and places, without the members of unions that pydantic puts between."""
    out: list[Any] = []
    for i, part in enumerate(loc):
        inside = isinstance(tree, Mapping) and part in tree
        inside = inside or (isinstance(tree, (list, tuple)) and isinstance(part, int) and part < len(tree))
        if inside:
            tree = tree[part]
        if inside or (i == len(loc) - 1 and isinstance(tree, Mapping)):  # the last may be a key that is missing
            out.append(part)
    return tuple(out)


def _sentence(written: Written, path: Keys, error: Mapping[str, Any]) -> str:
    where, key = written.of(path), ".".join(map(str, path))
    if error["type"] == "extra_forbidden":
        return f"{where}: unknown key `{key}`{_cure(path)}"
    if error["type"] == "missing":
        return f"{where}: the key `{key}` is missing"
    if error["type"] == "value_error":
        return f"{where}: `{key}`: {error['ctx']['error']}"
    found = repr(error.get("input"))
    found = found if len(found) <= 80 else found[:77] + "..."
    wanted = re.sub(r"valid dictionary or instance of \w+", "mapping of keys", error["msg"])
    wanted = wanted.partition(", unable to parse")[0].removeprefix("Input ").removeprefix("String ")
    return f"{where}: `{key}` {wanted}, got {found}"


def _cure(path: Keys) -> str:
    """The nearest key of that block, or the block that the key belongs to."""
    *above, last = path
    known = list(_model(tuple(above)).model_fields)
    near = nearest(str(last), known)
    if "did you mean" not in near or last not in known:
        homes = [name for name in ("train", "data", "judge", "store", "expect") if last in MODELS[name].model_fields]
        if homes and not above:
            return f"; it belongs in `{homes[0]}`"
    return near


def _model(path: Keys) -> type[BaseModel]:
    model: type[BaseModel] = Recipe
    for part in path:
        model = MODELS.get(part, model)
    return model


def _apply(tree: dict[str, Any], override: str) -> Keys:
    """Set one value by a path: "train.epochs=3"; a list element by number or by name; null is the default.

    Returns the path that was set.
    """
    dotted, sign, text = override.partition("=")
    if not sign or not dotted:
        raise BadInput(f"an override is written key.key=value, got {override!r}")
    value, _ = _parse(text, f"override {override!r}")
    at: Any = tree
    *parents, last = dotted.split(".")
    path: list[Any] = []
    for part in parents:
        at = _enter(at, part, override, path)
    if isinstance(at, list):
        path.append(_index(at, last, override))
        at[path[-1]] = value
    elif isinstance(at, dict):
        path.append(last)
        at[last] = value
        if value is None:  # back to the default
            del at[last]
    else:
        raise BadInput(f"the override {override!r} goes below a plain value")
    return tuple(path)


def _enter(at: Any, part: str, override: str, path: list[Any]) -> Any:
    if isinstance(at, list):
        i = _index(at, part, override)
        path.append(i)
        if isinstance(at[i], str):  # `ce` becomes {ce: {}} to hold a knob
            at[i] = {at[i]: {}}
        if part.isdigit() or at[i].get("name") == part:
            return at[i]
        at = at[i]
    if not isinstance(at, dict):
        raise BadInput(f"the override {override!r} goes below a plain value")
    path.append(part)
    return _child(at, part)


def _child(at: dict[str, Any], part: str) -> Any:
    if at.get(part) is None:
        at[part] = list(Recipe.model_fields["match"].default) if part == "match" else {}
    elif isinstance(at[part], str):  # short forms: `teacher: resnet20`, `data: digits`, `method: dm`
        short = {"teacher": "net", "student": "net", "data": "name"}.get(part)
        at[part] = {short: at[part]} if short else {at[part]: {}}
    return at[part]


def _index(items: list[Any], part: str, override: str) -> int:
    if part.isdigit() and int(part) < len(items):
        return int(part)
    names = [i.get("name") or next(iter(i)) if isinstance(i, dict) and i else i for i in items]
    if part in names:
        return names.index(part)
    raise BadInput(f"the override {override!r}: {part!r} is not in the list{nearest(part, map(str, names))}")


OBJECTS = "# made in Python with objects: "


def dump(recipe: Recipe, objects: Sequence[str] = ()) -> str:
    """The recipe as YAML, without what was left at its default.

    objects: what was given as an object in Python, such as "student": the recipe alone cannot make it again.
    """
    body = {"name": recipe.name, "do": recipe.do, **recipe.model_dump(mode="json", exclude_unset=True)}
    note = f"{OBJECTS}{', '.join(objects)}\n" if objects else ""
    return note + yaml.safe_dump(body, sort_keys=False, width=120)


def objects_in(path: Path) -> str:
    """What the run that wrote a recipe down was given as objects: "teacher, data"; '' when the recipe says it all."""
    head = path.read_text(errors="replace").partition("\n")[0]
    return head.removeprefix(OBJECTS) if head.startswith(OBJECTS) else ""
