"""What every verb works with: the recipe, its data, how to build its networks, and where to write."""

import hashlib
import json
import math
import statistics
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from limbeck.adapters.pieces import lengths
from limbeck.adapters.remote import Cost
from limbeck.core import find, knobs
from limbeck.core.batches import Batches, Splits, Table
from limbeck.core.checkpoint import fingerprint
from limbeck.core.errors import BadInput, LimbeckError, MissingExtra, nearest
from limbeck.core.evaluate import logits as predict
from limbeck.core.graft import Grafted
from limbeck.core.loop import Fitted, Method, Plan, fit
from limbeck.core.nets import Nets, device_of, outputs
from limbeck.core.sampler import Denoiser
from limbeck.core.signals.reading import SignalsInfo
from limbeck.core.store import Store, StoredBatches, StoreInfo, capture, data_fingerprint
from limbeck.core.taps import Taps, unwrap
from limbeck.recipe import Net, Recipe, Spec, Train, dump
from limbeck.recipe import Store as StoreSpec
from limbeck.report.numerals import lower_is_better
from limbeck.verbs import signals
from limbeck.verbs.answers import answers
from limbeck.verbs.canaries import secrets
from limbeck.verbs.drafts import drafts
from limbeck.verbs.figures import COSTS, DRAFTED, SECRET, WRITTEN, measure_of
from limbeck.verbs.robust import shown, triggered
from limbeck.verbs.saliency import maps
from limbeck.verbs.together import first, leads, processes
from limbeck.zoo.lora import merged

TRACKERS = ("tensorboard",)
KERNEL = "kernel"  # a judge of condensed sets that is no network: kernel ridge regression
WEIGHTS = "weights.safetensors"
HELD = 2**27  # logits that judging holds in memory at once, half a gigabyte
CURVE_WRITTEN = 64  # the same where the network must write for it
CURVE = 512  # validation examples for the curve in the report, when nothing is selected by it

Event = Callable[[dict[str, Any]], None]


@dataclass
class Outcome:
    """What one arm gave under one seed.

    latency_ms: median of one forward pass on one example. seconds: of training. spent: in this run on all of it, 0 for
    what another run has done. sizes: further figures, such as the number of images, or what a training method tells by
    `figures`.
    """

    label: str
    metrics: dict[str, float]
    parameters: int = 0
    bytes: int = 0
    latency_ms: float = 0.0
    seconds: float = 0.0
    spent: float = 0.0
    sizes: dict[str, float] = field(default_factory=dict)

    def save(self, folder: Path) -> None:
        """Write outcome.json, whole or not at all."""
        if not leads():
            return
        folder.mkdir(parents=True, exist_ok=True)
        draft = folder / ".outcome.json"
        draft.write_text(json.dumps(asdict(self), indent=1))
        draft.rename(folder / "outcome.json")

    @staticmethod
    def load(folder: Path) -> "Outcome | None":
        """The outcome written there, or None; all processes must ask."""
        path = folder / "outcome.json"
        return first(lambda: Outcome(**json.loads(path.read_text())) if path.exists() else None)


def outcome_of(
    label: str,
    metrics: dict[str, float],
    figures: Mapping[str, float],
    seconds: float,
    sizes: Mapping[str, float] | None = None,
) -> Outcome:
    """An outcome from what `judge` and `cost` say, with further figures in `sizes`."""
    return Outcome(
        label,
        metrics,
        parameters=int(figures["parameters"]),
        bytes=int(figures["bytes"]),
        latency_ms=figures["latency_ms"],
        seconds=seconds,
        sizes=dict(sizes or {}),
    )


@dataclass
class Setting:
    """A recipe bound to data and networks.

    builders: role -> how to make that network with the weights that its spec names, or fresh ones. blank: the same
    without the weights. teacher: shared by all arms, frozen. folder: of the run. resume: whether unfinished arms go on
    from their checkpoints. objects: what was given as an object, and not by the recipe. stores: of texts, by what was
    asked for, so that every arm and seed need not look through all documents again.
    """

    recipe: Recipe
    splits: Splits
    builders: dict[str, Callable[[], nn.Module]]
    folder: Path
    blank: dict[str, Callable[[], nn.Module]] = field(default_factory=dict)
    teacher: nn.Module | None = None
    taps: dict[str, Mapping[str, Any]] = field(default_factory=dict)
    on_event: Event | None = None
    resume: bool = False
    objects: tuple[str, ...] = ()
    stores: dict[str, Any] = field(default_factory=dict)

    def build(self, role: str) -> nn.Module:
        """A network for a role. Raises BadInput when the recipe does not say how to make it."""
        if role not in self.builders:
            raise BadInput(f"the recipe {self.recipe.name!r} names no {role}{nearest(role, self.builders)}")
        return self.builders[role]()

    def eye(self) -> nn.Module | None:
        """By whose embeddings pictures are compared as two sets: the network `judge`, if the recipe names one."""
        return self.build("judge").eval() if "judge" in self.recipe.nets else None

    def spec(self, role: str) -> Net | None:
        """How the recipe builds a role's network; None for one that was given as an object."""
        known: dict[str, Any] = {"teacher": self.recipe.teacher, "student": self.recipe.student}
        return known.get(role) if role in self.blank else None

    def nets(self, recipe: Recipe, method: Method, *, teacher: bool = True) -> Nets:
        """The networks that a method trains or asks, under their roles."""
        nets = Nets()
        learner = learner_of(method)
        if "student" in self.builders:
            nets.factories["student"] = self.builders["student"]
            if learner == "student":
                nets.student = self.build("student")
        if teacher and self.teacher is not None:
            nets.teacher = self.teacher
        for role in recipe.nets:
            nets.factories[role] = self.builders[role]
            if role not in ("assistant", "peer", "client", "judge"):  # built by who wants them, and when
                setattr(nets, role, self.build(role))
        for role, paths in self.taps.items():
            if role in nets and paths:
                with recipe.blamed(*(() if role in ("teacher", "student") else ("nets",)), role, "taps"):
                    nets.taps[role] = Taps(nets.find(role), paths)
        return nets

    def pools(self, recipe: Recipe, method: Method, seed: int) -> Any:
        """Training batches, or one stream a data pool for methods that read several (tasks, clients)."""
        table = self.splits.train
        if recipe.store is not None:
            plain = batches_of(recipe, table, seed, augment=False)
            if signals.of_texts(recipe):
                return signals.fed(plain, self.heard(recipe)[0], processes().device)
            info = captured(self)
            return StoredBatches(plain, Store.open(info.folder), crops=recipe.store.crops, seed=seed)
        if not hasattr(method, "pools"):
            return batches_of(recipe, table, seed)
        return {
            name: batches_of(recipe, table.select(rows), seed) for name, rows in method.pools(table["labels"]).items()
        }

    def heard(self, recipe: Recipe) -> tuple[SignalsInfo, Cost | None]:
        """The recipe's store of what the teacher says of texts, captured as far as it was missing, and its cost."""
        key = repr(recipe.store)
        if key not in self.stores:
            table, teacher, place = self.splits.train, self.teacher, self.folder.parent
            self.stores[key] = first(lambda: signals.captured(recipe, table, teacher, place, self.on_event))
        info, cost = self.stores[key]
        return info, cost

    def fit(
        self,
        method: Method,
        nets: Nets,
        train: Train,
        batches: Iterable[Any] | Mapping[str, Iterable[Any]],
        *,
        seed: int,
        folder: Path,
        validate: Callable[[Nets], dict[str, float]] | None = None,
    ) -> Fitted:
        """Run the loop in `folder`, going on from its checkpoint when resuming."""
        pool = next(iter(batches.values())) if isinstance(batches, Mapping) else batches
        per_epoch = getattr(pool, "steps_per_epoch", None)
        plan = make_plan(train, per_epoch, seed)
        if "optimizer" in train.model_fields_set and hasattr(method, "optimizers"):  # what is asked for wins
            asked = dict.fromkeys(method.optimizers(), train.optimizer)
            plan = replace(plan, optimizers={**asked, **train.optimizers})
        resume = self.resume and any((folder / "checkpoints").glob("step-*"))
        with tracking(train.track, folder) as accelerator:
            return fit(
                method,
                nets,
                batches,
                plan,
                validate=validate,
                folder=folder,
                resume=resume,
                on_event=self.on_event,
                accelerator=accelerator,
            )


@contextmanager
def tracking(track: str, folder: Path) -> Iterator[Any]:
    """An accelerator that also logs to a tracker, into a folder of its name inside `folder`; '' is none."""
    from accelerate import Accelerator

    if track and track not in TRACKERS:
        raise BadInput(f"no tracker {track!r}{nearest(track, TRACKERS)}")
    if track and find_spec(track) is None:
        raise MissingExtra(track, "track")
    accelerator = Accelerator(log_with=track or None, project_dir=folder)
    if track:
        accelerator.init_trackers(track)
    try:
        yield accelerator
    finally:
        for tracker in accelerator.trackers:  # not `end_training`: it would end the processes' group, too
            tracker.finish()


def record(recipe: Recipe, folder: Path, objects: Sequence[str] = ()) -> None:
    """Write the recipe down in the folder of its run, made now."""
    if leads():
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "recipe.yaml").write_text(dump(recipe, objects))


def figures_of(method: Any, nets: Nets) -> dict[str, float]:
    """What a training method itself has to tell of a run: what it spent or counted."""
    told: dict[str, float] = method.figures(nets) if hasattr(method, "figures") else {}
    return told


def learner_of(method: Any) -> str:
    """The player whose network is the result."""
    return str(getattr(method, "learner", "student"))


def make_plan(train: Train, per_epoch: int | None, seed: int) -> Plan:
    """The loop's plan from a recipe's `train` block."""
    if train.steps is None and train.epochs is None and train.minutes is None:
        raise BadInput("`train` needs epochs, steps or minutes")
    if train.steps is not None:
        steps = train.steps
    elif train.epochs is not None:
        if per_epoch is None:
            raise BadInput("the data stream has no known length: give train.steps instead of train.epochs")
        steps = max(1, round(train.epochs * per_epoch / train.accumulate))
    else:
        steps = 10**9
    every = train.validate_every
    if every is None:
        every = max(1, per_epoch or steps // 10) if train.select else max(1, steps // 10)
    return Plan(
        steps=steps,
        optimizer=train.optimizer,
        optimizers=train.optimizers,
        schedule=train.schedule,
        accumulate=train.accumulate,
        clip=train.clip,
        precision=train.precision,
        ema=train.ema,
        max_minutes=train.minutes,
        validate_every=every,
        save_every=train.save_every,
        log_every=train.log_every,
        select=train.select,
        maximise=not lower_is_better(train.select),
        seed=seed,
    )


def method_of(recipe: Recipe) -> Method:
    """The training method that the recipe names; by default the plain scheme with its losses."""
    if recipe.method is None:
        return knobs.make("distill", {"match": tuple(recipe.match)})  # type: ignore[no-any-return]
    name, given = knobs.split(recipe.method)
    if name == "distill" or ("match" in knobs.annotations(find.get(name)) and "match" not in given):
        given = {"match": tuple(recipe.match), **given}
    return knobs.make(name, given)  # type: ignore[no-any-return]


def batches_of(recipe: Recipe, table: Table, seed: int, *, train: Train | None = None, augment: bool = True) -> Batches:
    """Training batches of a table by the recipe's `train` and `data` blocks."""
    train, state = train or recipe.train, processes()
    return Batches(
        table,
        None if train.per_class else train.batch_size,
        seed=seed,
        augment=recipe.data.augment if augment and recipe.data else (),
        per_class=train.per_class,
        labelled=train.labelled,
        rank=state.process_index,
        world=state.num_processes,
    )


def captured(setting: Setting) -> StoreInfo:
    """The recipe's store of teacher signals, with what was missing in it captured now."""
    recipe, table = setting.recipe, setting.splits.train
    spec = recipe.store or StoreSpec()
    if setting.teacher is None:
        if not spec.folder:
            raise BadInput("teacher signals need a teacher to capture them, or the folder of a store")
        store, told = Store.open(spec.folder), spec.model_dump(include={"topk", "views", "augment", "bits"})
        store.check(table, {key: value for key, value in told.items() if key in spec.model_fields_set})
        return store.info()
    options = {"topk": spec.topk, "views": spec.views, "augment": spec.augment, "bits": spec.bits}
    how = hashlib.sha256(json.dumps(options, sort_keys=True).encode()).hexdigest()[:12]
    key = f"{fingerprint(setting.teacher)[:12]}-{data_fingerprint(table)[:12]}-{how}"
    folder = Path(spec.folder) if spec.folder else setting.folder.parent / ".stores" / key
    if setting.on_event is not None:
        setting.on_event({"note": f"capturing teacher signals in {folder}"})
    teacher = setting.teacher
    return first(lambda: capture(teacher, table, folder, **options))  # type: ignore[arg-type]


# ---- judging ---------------------------------------------------------------------------------------------------------
def default_measures(recipe: Recipe, table: Table) -> list[Spec]:
    """What to measure when the recipe does not say."""
    return triggered(recipe.measure, recipe) if recipe.measure else [usual(table)]


def any_number(table: Table) -> bool:
    """Whether any number of classes may be present in an example: labels are floats of 0 and 1 for each, [N, C]."""
    labels = table.columns.get("labels")
    if labels is None or labels.ndim != 2 or not labels.is_floating_point() or not table.num_classes:
        return False
    return bool(((labels == 0) | (labels == 1)).all())


def scored(table: Table) -> bool:
    """Whether the label of an example is a score."""
    return table.classes == ["score"]


def usual(table: Table) -> str:
    """The measure of what a network says of such labels."""
    if scored(table):
        return "score_correlation"
    if table.paired:
        return "psnr"
    if any_number(table):
        return "multilabel"
    return "accuracy" if table.num_classes else "calibration"


def judge(
    module: nn.Module,
    table: Table,
    measures: Sequence[Spec],
    teacher: nn.Module | None = None,
    eye: nn.Module | None = None,
) -> dict[str, float]:
    """All measures of a network on a table, by name; what asks for a teacher is left out when there is none.

    eye: by whose embeddings pictures are compared as two sets, where that is asked for.

    Labels of many places [N, T] count where the table's `mask` holds (everywhere without one). A table whose logits
    would not fit in HELD numbers is measured stretch by stretch, and the means over places are those of the whole; of
    what is no mean over places, such as a calibration error, it is the mean over stretches.
    """
    module.eval()
    writing = [spec for spec in measures if writes(spec)]
    if writing:  # of the whole set at once: what is counted there is no mean over examples
        rest = [spec for spec in measures if not writes(spec)]
        written = _written(module, table, writing, teacher)
        told = judge(module, table, rest, teacher, eye) if rest else {}
        return {**written, **told} if writes(next(iter(measures))) else {**told, **written}
    if table.teacher_tokenizer is not None:  # their places are not the same
        teacher = None
    labels = table.columns.get("labels", torch.empty(0))
    places = labels.shape[1] if labels.ndim == 2 and not labels.is_floating_point() else 1
    width = labels[0].numel() if table.paired else table.num_classes or table.vocab
    rows = max(1, HELD // max(1, places * width))
    found: list[tuple[int, dict[str, float]]] = []
    for start in range(0, len(table), rows):
        part = table if rows >= len(table) else table.select(range(start, min(start + rows, len(table))))
        valid = _valid(part)
        if count := len(part) if valid is None else int(valid.sum()):
            found.append((count, _measured(module, part, measures, teacher, valid, eye)))
    if len(found) == 1:
        return found[0][1]
    total = sum(count for count, _ in found)
    return {name: sum(count * one[name] for count, one in found) / total for name in (found[0][1] if found else ())}


def reads_answers(spec: Spec) -> bool:
    """Whether a measure is of what a network answers to prompts."""
    return writes(spec, WRITTEN)


def reads_secrets(spec: Spec) -> bool:
    """Whether a measure is of secrets that may be in a training text."""
    return writes(spec, SECRET)


def writes(spec: Spec, what: Collection[str] = WRITTEN | DRAFTED | SECRET) -> bool:
    """Whether a measure is of what a network writes, or of secrets: not of what it says of the given texts."""
    name = knobs.split(spec, "measure")[0]
    return name not in COSTS and not set(what).isdisjoint(find.needs(find.get(name)))


def _written(module: nn.Module, table: Table, measures: Iterable[Spec], teacher: nn.Module | None) -> dict[str, float]:
    """Measures of what a network answers to the table's prompts, of what a teacher writes from its drafts, and of what
    it says of secrets."""
    have: dict[str, Tensor] = {}
    out: dict[str, float] = {}
    for spec in measures:
        name, given = knobs.split(spec, "measure")
        measure = find.get(name)
        given = knobs.check(name, measure, given)
        seen = have
        if writes(spec, DRAFTED):
            if teacher is None or table.teacher_tokenizer is not None:  # nobody to draft for, or in other tokens
                continue
            seen = drafts(module, teacher, table, **find.knobs(measure) | given)
        elif reads_secrets(spec):
            seen = secrets(module, table, **find.knobs(measure) | given)
        elif not have:
            have = seen = answers(module, table)
        values = measure(*[seen[n] for n in find.needs(measure)], **given)
        out |= dict(values) if isinstance(values, Mapping) else {name: float(values)}
    return out


def bits_a_nat(table: Table) -> float:
    """What makes a mean negative log-likelihood a token, in nats, one a byte of the text, in bits; 0 where nobody knows
    which bytes the tokens are."""
    valid = _valid(table)
    size = lengths(table.tokenizer, table["labels"]) if valid is not None and table.tokenizer is not None else None
    if valid is None or size is None:
        return 0.0
    return int(valid.sum()) / math.log(2) / max(1, int(size.flatten()[valid].sum()))


def _valid(table: Table) -> Tensor | None:
    """Which of the flattened places [N * T] of a language table count; None for one label an example."""
    labels = table.columns.get("labels")
    if labels is None or labels.ndim != 2 or labels.is_floating_point():
        return None
    mask = table.columns.get("mask", torch.ones_like(labels)).bool() & (labels >= 0)
    return mask.flatten().cpu()


def _measured(
    module: nn.Module,
    table: Table,
    measures: Iterable[Spec],
    teacher: nn.Module | None,
    valid: Tensor | None,
    eye: nn.Module | None,
) -> dict[str, float]:
    def flat(values: Tensor) -> Tensor:
        """Logits [..., N, T, C] at the places that count, [..., M, C]."""
        return values if valid is None else values.flatten(-3, -2)[..., valid, :]

    have: dict[str, Tensor] = {"student_logits": flat(predict(module, table))}
    if table.paired:
        have |= _pictures(have.pop("student_logits"), table, eye)
    elif "labels" in table.columns:
        have["labels"] = table["labels"] if valid is None else table["labels"].flatten().cpu()[valid]
    out: dict[str, float] = {}
    for spec in measures:
        name, given = knobs.split(spec, "measure")
        if name in COSTS:
            continue
        measure = find.get(name)
        if find.family(name) != "measure":
            raise BadInput(f"{name!r} is a method of {find.folder(name)}, not a measure")
        asks = find.needs(measure)
        if any(n.startswith("teacher_") for n in asks):
            if teacher is None:
                continue
            if "teacher_logits" in asks and "teacher_logits" not in have:
                have["teacher_logits"] = flat(predict(teacher, table))
            if "teacher_map" in asks and "teacher_map" not in have:
                have |= {"student_map": maps(module, table), "teacher_map": maps(teacher, table)}
        seen = have
        given = knobs.check(name, measure, given)
        if find.folder(name) == "measure/robust":
            seen = {**have, "student_logits": flat(shown(module, table, measure, given))}
        values = measure(*[seen[n] for n in asks], **given)
        out |= dict(values) if isinstance(values, Mapping) else {name: float(values)}
    return out


def _pictures(made: Tensor, table: Table, eye: nn.Module | None) -> dict[str, Tensor]:
    """Pictures that a network made, those that it should have made, and what an eye sees in both."""
    real = table["labels"].cpu()
    have = {"student_picture": table.raw(made), "real_picture": table.raw(real)}
    if eye is not None:
        for name, x in (("student_samples", made), ("real_samples", real)):
            with torch.no_grad():
                have[name] = torch.cat([outputs(eye, {"inputs": p})["emb"].flatten(1) for p in x.split(500)])
    return have


def validator(
    table: Table, train: Train, learner: str, metric: str, eye: nn.Module | None = None
) -> Callable[[Nets], dict[str, float]] | None:
    """The loop's validation: the deciding metric on the validation split (a part of it when nothing is selected)."""
    if not len(table):
        return None
    figure = train.select or metric
    measure = measure_of(figure) if figure else usual(table)
    few = CURVE_WRITTEN if writes(measure) else CURVE
    part = table if train.select else table.select(torch.arange(min(few, len(table))))
    return lambda nets: judge(nets.find(learner), part, [measure], nets.modules.get("teacher"), eye)


@torch.no_grad()
def cost(module: nn.Module, example: Mapping[str, Any], repeats: int = 15) -> dict[str, float]:
    """Parameters, bytes, and the median milliseconds of one forward pass on the one example given."""
    module = unwrap(module).eval()
    device = device_of(module)
    example = {name: value.to(device) for name, value in example.items()}
    state = module.state_dict()
    times = []
    for i in range(repeats + 3):
        began = time.perf_counter()
        outputs(module, example)
        if i >= 3:  # the first passes warm up
            times.append(time.perf_counter() - began)
    return {
        "parameters": sum(p.numel() for p in module.parameters()),
        "bytes": sum(v.numel() * v.element_size() for v in state.values()),
        "latency_ms": 1000 * statistics.median(times),
    }


def one(table: Table) -> dict[str, Any]:
    """The first example of a table as a batch of one."""
    return {name: column[:1] for name, column in table.columns.items()}


# ---- networks on disk ------------------------------------------------------------------------------------------------
def save_network(module: nn.Module, folder: Path, spec: Net | None) -> None:
    """weights.safetensors, and how to build the network: net.json by a recipe's spec, config.json by transformers."""
    if not leads():
        return
    folder.mkdir(parents=True, exist_ok=True)
    module = merged(unwrap(module))
    state: dict[str, Tensor] = {}
    for key, value in module.state_dict().items():
        state[key] = value.detach().cpu().contiguous().clone()
    save_tensors(state, folder / WEIGHTS)
    if spec is not None:
        body = {"net": spec.net, **{k: v for k, v in spec.options.items() if k not in ("lora", "quantize")}}
        if isinstance(module, Denoiser):  # methods may change how it is read: schedule, boundary, solver
            body["denoiser"] = module.spec()
        if isinstance(module, Grafted):  # what a method has put into the student for good
            body["graft"] = module.spec()
        (folder / "net.json").write_text(json.dumps(body))
    inner: Any = module
    if hasattr(inner, "save_pretrained") and hasattr(getattr(inner, "config", None), "to_dict"):
        body = {**inner.config.to_dict(), "architectures": [type(inner).__name__]}
        (folder / "config.json").write_text(json.dumps(body, indent=1, default=str))


def save_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    """Write a safetensors file, whole or not at all."""
    if not leads():
        return
    draft = path.with_name(f".{path.name}")
    try:
        save_file(tensors, draft)
        draft.replace(path)
    except (OSError, SafetensorError) as error:  # safetensors has an error of its own for a full disk
        draft.unlink(missing_ok=True)
        reason = "the disk is full" if "space left" in str(error) else str(error)
        raise LimbeckError(f"could not save {path}: {reason}") from error


def load_weights(module: nn.Module, source: str, roots: Iterable[Path]) -> None:
    """Load safetensors weights from a file, a run folder, an arm's folder or a name below one of `roots`."""
    tried = []
    for root in (Path(), *roots):
        folder = root / source
        seeds = sorted(folder.glob(f"seed-*/{WEIGHTS}"))
        for path in (folder, root / f"{source}.safetensors", folder / WEIGHTS, folder / "seed-0" / WEIGHTS, *seeds):
            tried.append(path)
            if path.is_file():
                try:
                    state = load_file(path)
                except SafetensorError as error:
                    raise BadInput(f"{path} is not a whole safetensors file: {error}") from error
                try:
                    module.load_state_dict(state)
                except RuntimeError as error:
                    line = str(error).splitlines()[1].strip() if "\n" in str(error) else str(error)
                    raise BadInput(f"the weights in {path} do not fit {type(module).__name__}: {line}") from error
                return
    below = ", ".join(map(str, roots))
    raise BadInput(f"there are no weights {source!r}; looked for {tried[0]}, {tried[1]} and below {below}")
