"""Bad input is found before anything is written or trained: first what a recipe names, then a rehearsal on one batch.

Complaints about a recipe that was read from a file begin with 'file:line: `key`: '.
"""

import shutil
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn

from limbeck.adapters.files import Source
from limbeck.core import augment, find, knobs, optim, schedule
from limbeck.core.batches import Batches, Table
from limbeck.core.errors import BadInput, nearest
from limbeck.core.match import parse
from limbeck.core.nets import Batch, Nets, evaluating, outputs, retold
from limbeck.core.sampler import Denoiser
from limbeck.core.signals.feeding import documents_in
from limbeck.core.signals.kinds import Kind
from limbeck.core.synset import SynSet
from limbeck.recipe import ENSEMBLE, Net, Recipe, Spec, Train
from limbeck.verbs import condense, label, rows, shape, shorten, signals, teach
from limbeck.verbs.answers import asked
from limbeck.verbs.canaries import sentences
from limbeck.verbs.figures import figures, measure_of
from limbeck.verbs.saliency import maps
from limbeck.verbs.setting import (
    KERNEL,
    Setting,
    any_number,
    batches_of,
    captured,
    default_measures,
    learner_of,
    make_plan,
    method_of,
    reads_answers,
    reads_secrets,
)
from limbeck.verbs.together import leads
from limbeck.zoo import nets as zoo

VERBS: dict[str, ModuleType] = {"teach": teach, "condense": condense, "shorten": shorten, "shape": shape}
NEEDS = {"shape": "teacher", "shorten": "teacher"}  # what a verb cannot do without


@contextmanager
def untouched(folder: Path) -> Iterator[None]:
    """A new folder that bad input left without any result is taken away again."""
    fresh = not folder.exists()
    try:
        yield
    except ValueError:
        left = {"recipe.yaml", "log.jsonl", "turns.json"}
        if fresh and leads() and {p.name for p in folder.rglob("*") if p.is_file()} <= left:
            shutil.rmtree(folder, ignore_errors=True)
        raise


# ---- names, knobs and what belongs together: needs neither data nor networks -----------------------------------------
def check_names(recipe: Recipe, given: Collection[str] = (), *, arm: bool = False) -> None:
    """Raise BadInput for a method, loss, measure, network, optimiser, schedule, option or knob that does not exist.

    given: roles whose networks come as objects, so that what the recipe says of them is only a note. arm: whether it is
    one arm of a recipe, which has been looked at as a whole.
    """
    for stage in recipe.stages:
        check_names(stage)
    if recipe.stages:
        return
    _networks(recipe, given)
    signals.check_names(recipe)
    _method(recipe)
    for i, spec in enumerate(recipe.match):
        with recipe.blamed("match", i):
            parse(spec)
    for i, spec in enumerate(recipe.measure):
        with recipe.blamed("measure", i):
            figures(spec, 10)
    _training(recipe, recipe.train, "train")
    _training(recipe, recipe.judge.train, "judge", "train")
    _data(recipe)
    _control(recipe)
    _beside(recipe)
    if not arm:
        _withheld(recipe)
    if recipe.expect is not None and recipe.do in VERBS:
        arms = VERBS[recipe.do].arms(recipe)
        if recipe.expect.beats not in arms:
            near = nearest(recipe.expect.beats, arms)
            raise BadInput(f"{recipe.at('expect', 'beats')}{recipe.do} has no arm {recipe.expect.beats!r}{near}")


def _networks(recipe: Recipe, given: Collection[str]) -> None:
    roles: dict[str, Any] = {"teacher": recipe.teacher, "student": recipe.student}
    for role, spec in roles.items():
        if spec is not None and role not in given:
            _net(recipe, spec, role)
    for role, several in recipe.nets.items():
        for i, spec in enumerate(several if isinstance(several, list) else [several]):
            _net(recipe, spec, "nets", role, *([i] if isinstance(several, list) else []))
    if "judge" not in given and recipe.judge.net.net != KERNEL:
        _net(recipe, recipe.judge.net, "judge", "net")
    wanted = NEEDS.get(recipe.do, "")
    if wanted and roles[wanted] is None and wanted not in given:
        raise BadInput(f"{recipe.at('do')}{recipe.do} needs a `{wanted}`, and the recipe names none")


def _net(recipe: Recipe, spec: Net, *path: Any) -> None:
    for key in ("train", "data"):
        tested = key == "data" and path == ("judge", "net") and rows.asked(recipe)  # where a judge of rows is tested
        first = path == ("teacher",) or (path == ("student",) and recipe.do == "teach")
        if not first and key in spec.model_fields_set and not tested:
            raise BadInput(
                f"{recipe.at(*path, key)}only a teacher, and the student of `do: teach`, are trained first; train this "
                "network by `do: train` in a recipe or a stage of its own, and name its run folder in `weights`"
            )
    if spec.tokenizer is not None and (path != ("teacher",) or recipe.do != "teach" or recipe.store is not None):
        raise BadInput(
            f"{recipe.at(*path, 'tokenizer')}only a teacher that is asked while a student learns may have a tokenizer "
            "of its own: `do: teach`, without `store`; that of all others is `data.tokenizer`"
        )
    if spec.net == ENSEMBLE:
        if path != ("teacher",):
            raise BadInput(f"{recipe.at(*path)}only a teacher may be an ensemble; of others write a list of networks")
        if not spec.members:
            raise BadInput(f"{recipe.at(*path)}an ensemble is written {{ensemble: [NET, NET]}}")
        for key in (*spec.options, *(k for k in ("weights", "taps", "train", "data") if getattr(spec, k))):
            raise BadInput(f"{recipe.at(*path, key)}an ensemble has no `{key}` of its own; write it into its members")
        for i, member in enumerate(spec.members):
            _net(recipe, member, *path, ENSEMBLE, i)
    elif spec.members:
        raise BadInput(f"{recipe.at(*path, 'members')}only an ensemble has members: {{ensemble: [NET, NET]}}")
    elif spec.served:
        if path != ("teacher",):
            raise BadInput(f"{recipe.at(*path)}only a teacher may be behind a server, and only as a source of a store")
    elif spec.net in zoo.NETS:
        builder = zoo.NETS[spec.net]
        function = builder.func if isinstance(builder, partial) else builder
        fixed = {*(builder.keywords if isinstance(builder, partial) else ()), "denoiser", "graft"}
        for key, value in spec.options.items():
            with recipe.blamed(*path, key):
                knobs.check(spec.net, function, {key: value} if key not in fixed else {})
    elif ":" not in spec.net and not zoo.is_transformers(spec.net):
        with recipe.blamed(*path, "net"):
            zoo.build(spec.net)  # says which there are
    if spec.train is not None:
        _training(recipe, spec.train, *path, "train")
        with recipe.blamed(*path, "train"):
            make_plan(spec.train, 1, 0)


def _method(recipe: Recipe) -> None:
    if recipe.method is None:
        return
    with recipe.blamed("method"):
        name, given = knobs.split(recipe.method)
        method = find.get(name)
        if recipe.do == "condense" and find.family(name) == "data":
            condense.selection(name, given)
        elif recipe.do == "shape":
            if find.family(name) != "shape":
                raise BadInput(f"{name!r} is a method of {find.folder(name)}, not of shape")
            knobs.check(name, method, given)
        elif recipe.do in ("label", "evaluate"):
            raise BadInput(f"{recipe.do} uses no method")
        else:
            knobs.make(name, given)


def _training(recipe: Recipe, train: Train, *path: Any) -> None:
    choices: dict[tuple[Any, ...], Spec] = {("optimizer",): train.optimizer}
    choices |= {("optimizers", player): choice for player, choice in train.optimizers.items()}
    for key, choice in choices.items():
        with recipe.blamed(*path, *key):
            name, options = knobs.split(choice, "choice of optimizer")
            optim.check({name: options})
            try:
                optim.build({name: options}, [nn.Parameter(torch.zeros(1))])
            except (TypeError, ValueError) as error:
                raise BadInput(f"optimizer {name!r} refuses {options}: {error}") from error
    with recipe.blamed(*path, "schedule"):
        name, options = knobs.split(train.schedule, "choice of schedule")
        try:
            schedule.rate({name: options}, 0.5)
        except BadInput:
            raise
        except (TypeError, ValueError) as error:
            raise BadInput(f"schedule {name!r} refuses {options}: {error}") from error


def _data(recipe: Recipe) -> None:
    if recipe.data is None:
        return
    known = [f.name for f in fields(Source)]
    for key in recipe.data.options:
        if key not in known:
            raise BadInput(f"{recipe.at('data', key)}data has no option {key!r}{nearest(key, [*known, 'augment'])}")
    with recipe.blamed("data", "augment"):
        augment.build(recipe.data.augment)
    with recipe.blamed("judge", "augment"):
        augment.build(recipe.judge.augment)


SHARED = {"student": ("taps",), "teacher": ("taps",), "data": ("augment",)}  # by all arms, but for these of their keys


def _shared(recipe: Recipe, *path: Any, changes: Mapping[str, Any]) -> None:
    """Raise BadInput where an arm would change what is built once for all of them."""
    for key, own in SHARED.items():
        told = changes.get(key, {})
        given = told if isinstance(told, Mapping) else {"": told}
        for inner in (k for k in given if k not in own):
            at = recipe.at(*path, key, *([inner] if inner else []))
            raise BadInput(f"{at}all arms share the {key}; an arm may change its {own[0]} alone")
    for role, spec in (changes.get("nets") or {}).items():
        if spec is not None and spec != (recipe.model_dump(exclude_unset=True).get("nets") or {}).get(role):
            raise BadInput(f"{recipe.at(*path, 'nets', role)}all arms share the networks; write {role} into `nets`")


def _control(recipe: Recipe) -> None:
    """What the control changes is checked like the rest, but what is wrong with it is put down to `control`."""
    if not recipe.control:
        return
    if recipe.do in ("teach", "shape"):
        _shared(recipe, "control", changes=recipe.control)
        try:
            check_names(VERBS[recipe.do].control_recipe(recipe.unplaced()), arm=True)
        except BadInput as error:
            raise BadInput(f"{recipe.at('control')}{str(error).removeprefix('recipe: ')}") from error
        return
    known = ["whole"] if recipe.do == "condense" else []
    for key in recipe.control:
        if key not in known:
            more = nearest(key, known) or "; it takes none"
            raise BadInput(f"{recipe.at('control', key)}the control of {recipe.do} has no option {key!r}{more}")


def _beside(recipe: Recipe) -> None:
    """Further arms are checked like the control, and what is wrong is put down to them."""
    if recipe.beside and recipe.do not in ("teach", "shape"):
        raise BadInput(f"{recipe.at('beside')}only teach and shape take arms beside the control, this is {recipe.do}")
    for arm in recipe.beside:
        if arm in ("student", "control", "removal", "teacher"):
            raise BadInput(f"{recipe.at('beside', arm)}there is an arm {arm!r} already")
        _shared(recipe, "beside", arm, changes=recipe.beside[arm])
        try:
            check_names(VERBS[recipe.do].arm_recipe(recipe.unplaced(), arm), arm=True)
        except BadInput as error:
            raise BadInput(f"{recipe.at('beside', arm)}{str(error).removeprefix('recipe: ')}") from error


def _withheld(recipe: Recipe) -> None:
    """Where training data is withheld, no arm may learn from the blanks that take its place."""
    if recipe.data is None or not recipe.data.options.get("withheld"):
        return
    if recipe.do != "teach":
        raise BadInput(f"{recipe.at('data', 'withheld')}only teach does without training data, this is {recipe.do}")
    if recipe.student is not None and recipe.student.train is not None:
        raise BadInput(
            f"{recipe.at('student', 'train')}training data is withheld: the student cannot learn from it first"
        )
    for arm in (a for a in teach.arms(recipe) if a != "teacher"):
        told = teach.arm_recipe(recipe, arm)
        if not getattr(method_of(told), "dataless", False):
            how = knobs.split(told.method)[0] if told.method else "losses on training data"
            raise BadInput(
                f"{recipe.at('data', 'withheld')}the {arm} learns by {how}, and training data is withheld: it takes a "
                "method that makes its own, such as dafl"
            )


# ---- the rehearsal: networks and losses meet one batch ---------------------------------------------------------------
def rehearse(made: Setting) -> None:
    """Raise BadInput when the networks cannot read the data, a loss lacks what it asks for, a batch is larger than the
    data, or the deciding metric is not measured. Nothing is trained or written, and no random number is used up."""
    recipe = made.recipe
    with torch.random.fork_rng():
        _metrics(made)
        if recipe.do in ("teach", "train"):
            _plan(recipe)
            _rehearse_training(made)
        elif recipe.do == "shape":
            _plan(recipe)
            with recipe.blamed("method"):
                small = shape.shaped(made)
            _meet(recipe, Nets(student=small, teacher=_present(made)), _first(recipe, made.splits.train))
        elif recipe.do == "condense":
            _rehearse_condensing(made)
        elif recipe.do == "shorten":
            _plan(recipe)
            if not isinstance(made.teacher, Denoiser):
                kind = type(made.teacher).__name__
                raise BadInput(f"{recipe.at('teacher')}shortening starts from a Denoiser, and the teacher is a {kind}")
            _first(recipe, made.splits.train)
        elif recipe.do == "label" and signals.of_texts(recipe):
            _rehearse_signals(made)
        elif made.teacher is None and (recipe.do == "label" or "student" not in made.builders):
            raise BadInput(f"{recipe.at('do')}{recipe.do} needs a `teacher`, and the recipe names none")


def _present(made: Setting) -> nn.Module:
    assert made.teacher is not None
    return made.teacher


def _plan(recipe: Recipe) -> None:
    with recipe.blamed("train"):
        make_plan(recipe.train, 1, 0)


def _first(recipe: Recipe, table: Table) -> Batch:
    """The first training batch, as the loop shows it to `setup`."""
    if recipe.train.per_class is None and recipe.train.batch_size > len(table):
        raise BadInput(
            f"{recipe.at('train', 'batch_size')}batch_size {recipe.train.batch_size} is larger than the training part "
            f"of {table.name}, which has {len(table)} examples"
        )
    with recipe.blamed("train"):
        batches = batches_of(recipe, table, 0)
    return _peek(batches)


def _peek(batches: Batches) -> Batch:
    batch: Batch = {**next(batches), "examples": len(batches.table)}
    return batch


def _rehearse_training(made: Setting) -> None:
    recipe, table = label.alone(made.recipe) if made.recipe.do == "train" else made.recipe, made.splits.train
    with recipe.blamed("method"):
        method = method_of(recipe)
    if learner_of(method) == "student" and "student" not in made.builders:
        raise BadInput(f"{recipe.at('do')}{recipe.do} needs a `student`, and the recipe names none")
    probe = _first(recipe, table)
    if hasattr(method, "pools"):  # tasks or clients: each must be large enough
        pools = method.pools(table["labels"])
        probe, *_ = [_first(recipe, table.select(rows)) for rows in pools.values()]
    nets = made.nets(recipe, method)
    try:
        for role in ("teacher", "student"):
            if role in nets:
                with recipe.blamed(role):
                    reads(nets.find(role), probe, table, role, judged=role == learner_of(method))
                _saliency(recipe, nets.find(role), table)
        if recipe.store is None:
            _meet(recipe, nets, probe, method)
        elif signals.of_texts(recipe):
            _stored_signals(made, nets, method)
        else:
            _stored(made)
    finally:
        for taps in nets.taps.values():
            taps.remove()


def _saliency(recipe: Recipe, module: nn.Module, table: Table) -> None:
    """Where a measure asks for saliency maps, the network must have some."""
    for i, spec in enumerate(recipe.measure):
        name = knobs.split(spec, "measure")[0]
        if name in find.names() and "student_map" in find.needs(find.get(name)):
            with recipe.blamed("measure", i):
                maps(module, table.select(range(2)))


def _stored(made: Setting) -> None:
    """The store is that of the data, and holds what the losses of the plain scheme ask for."""
    recipe, table = made.recipe, made.splits.train
    assert recipe.store is not None
    kept, classes = recipe.store.topk, table.num_classes or table.vocab
    if made.teacher is None:
        with recipe.blamed("store"):
            info = captured(made)  # only opens it
        kept, classes = info.topk, info.classes
    if recipe.method is not None and knobs.split(recipe.method)[0] != "distill":
        return
    held = {"teacher_ids", "teacher_logprobs", *(["teacher_logits"] if kept in (0, classes) else [])}
    readers = [n for n in find.names() if find.family(n) == "losses" and "teacher_ids" in find.needs(find.get(n))]
    for i, loss in enumerate(map(parse, recipe.match)):
        for name in (n for n in loss.needs if n.startswith("teacher_") and n not in held):
            told = f"{recipe.at('match', i)}`{loss.name}` asks for {name}, and"
            if name == "teacher_logits":
                by = " or ".join(f"`{n}`" for n in readers)
                more = f", or match by {by}" if by else ""
                raise BadInput(
                    f"{told} the store keeps the {kept} likeliest of {classes} entries only; capture it with "
                    f"`store.topk: 0`, or read the entries by `method: fkd`{more}"
                )
            raise BadInput(f"{told} a store keeps logits only; leave `store` out and give the teacher itself")


def _rehearse_signals(made: Setting) -> tuple[Kind, int]:
    """The teacher can give what the store of texts keeps, or the store that is read is the right one. Its kind, and
    the number of words that the teacher knows (0 where that is not told)."""
    recipe, table = made.recipe, made.splits.train
    served = recipe.teacher is not None and recipe.teacher.served
    with recipe.blamed("store"):
        if recipe.do == "label" and made.teacher is None and not served:
            raise BadInput("label needs a `teacher`, and the recipe names none")
        kind = signals.asked(recipe)
        if made.teacher is not None:
            signals.check_folder(recipe, kind, made.teacher, table)
            return kind, signals.try_out(kind, made.teacher, table)
        documents_in(table, kind)
        return kind, table.vocab if served else made.heard(recipe)[0].vocab  # without a teacher it is only opened


def _stored_signals(made: Setting, nets: Nets, method: Any) -> None:
    """The store of texts is that of the data, and holds what the losses of the plain scheme ask for."""
    recipe, table = made.recipe, made.splits.train
    kind, words = _rehearse_signals(made)
    if recipe.method is not None and knobs.split(recipe.method)[0] != "distill":
        return
    signals.check_losses(recipe, kind, [parse(spec) for spec in recipe.match], words or table.vocab)
    if "teacher_ids" in signals.held(kind):
        with torch.no_grad(), evaluating(nets.student):
            said = outputs(nets.student, {k: v[:1] for k, v in table.columns.items()}).get("logits")
        if isinstance(said, torch.Tensor) and said.shape[-1] < words:
            raise BadInput(
                f"{recipe.at('store')}the store names {words} words, and the student knows {said.shape[-1]}: both must "
                "have the same tokenizer"
            )
    if made.teacher is None and not (recipe.teacher is not None and recipe.teacher.served):
        with recipe.blamed("train"):
            stream = signals.fed(batches_of(recipe, table, 0), made.heard(recipe)[0], torch.device("cpu"))
        _meet(recipe, nets, {**next(stream), "examples": len(table)}, method)


def _meet(recipe: Recipe, nets: Nets, probe: Batch, method: Any = None) -> None:
    """Every loss alone, so that it is known which one complains, then the method as it is."""
    if recipe.method is None or recipe.do == "shape" or knobs.split(recipe.method)[0] == "distill":
        for i, spec in enumerate(recipe.match):
            with recipe.blamed("match", i):
                knobs.make("distill", {"match": (spec,)}).setup(nets, probe)
    elif hasattr(method, "setup"):
        with recipe.blamed("method"):
            method.setup(nets, probe)


def reads(module: nn.Module, batch: Mapping[str, Any], table: Table, role: str, *, judged: bool = False) -> None:
    """Raise BadInput unless the network reads the data; judged: and tells at least as many classes as they have."""
    if isinstance(module, Denoiser):
        return
    batch = retold(batch) if role == "teacher" else batch
    few = {k: v[:2] if isinstance(v, torch.Tensor) else v for k, v in batch.items()}
    shown = f"{tuple(few['inputs'].shape[1:])} {str(few['inputs'].dtype).removeprefix('torch.')}"
    try:
        with torch.no_grad(), evaluating(module):
            out = outputs(module, few)
    except BadInput:
        raise
    except Exception as error:  # whatever a network raises: it cannot read this
        said = (str(error).splitlines() or [""])[0]
        raise BadInput(
            f"the {role} ({type(module).__name__}) cannot read {table.name}, inputs of {shown}: "
            f"{type(error).__name__}: {said}"
        ) from error
    logits = out.get("logits")
    if not judged or not isinstance(logits, torch.Tensor) or logits.ndim == 4:  # methods see to pictures themselves
        return
    if table.num_classes > logits.shape[-1]:
        raise BadInput(f"the {role} tells {logits.shape[-1]} classes apart, but {table.name} has {table.num_classes}")


def _rehearse_condensing(made: Setting) -> None:
    recipe, train = made.recipe, made.splits.train
    if rows.asked(recipe):
        return rows.rehearse(made)
    if not train.num_classes or any_number(train):
        raise BadInput(f"{recipe.at('data')}condensing needs class labels, and {train.name} has none")
    with recipe.blamed("ipc"):
        SynSet.real(train["inputs"], train["labels"], recipe.ipc)
    if find.family(condense.methods(recipe)[0]) != "data":
        _plan(recipe)
        _first(recipe, train)
    if recipe.judge.net.net != KERNEL:
        with recipe.blamed("judge", "net"):
            reads(made.build("judge"), {"inputs": train["inputs"][:2]}, train, "judge", judged=True)


def _metrics(made: Setting) -> None:
    """The figure that decides must be among those that will be measured."""
    recipe, table = made.recipe, made.splits.test
    if not len(table):
        raise BadInput(f"{recipe.at('data')}the test part of {table.name} is empty")
    names = [rows.measured(made)] if rows.asked(recipe) else ["accuracy"]
    if recipe.do == "shorten":
        names = ["frechet", "energy_distance"]
    elif recipe.do != "condense":
        names = []
        written = bool(recipe.measure)
        for i, spec in enumerate(default_measures(recipe, table)):
            with recipe.blamed(*(("measure", i) if written else ("data",))):
                teacher = made.teacher is not None
                names += figures(spec, table.num_classes or table.vocab or 2, teacher=teacher, paired=table.paired)
                if reads_answers(spec):
                    asked(table)
                if reads_secrets(spec):
                    name, given = knobs.split(spec, "measure")
                    sentences(table, **find.knobs(find.get(name)) | given)
                if table.paired and "judge" not in recipe.nets and "frechet" in names:
                    raise BadInput("pictures are compared by what a classifier sees; name one as `nets.judge`")
        if not names and recipe.do in VERBS:
            raise BadInput(f"{recipe.at('measure')}`measure` names nothing that can be measured here but costs")
    wanted: dict[tuple[str, ...], str] = {("metric",): recipe.metric}
    if recipe.expect is not None:
        wanted[("expect", "metric")] = recipe.expect.metric
    for path, name in wanted.items():
        if name and name not in names:
            raise BadInput(f"{recipe.at(*path)}the metric {name!r} is not measured{nearest(name, names)}")
    if recipe.train.select and recipe.do in ("teach", "train", "shape"):
        with recipe.blamed("train", "select"):
            measure_of(recipe.train.select)
            if not len(made.splits.validation):
                raise BadInput(f"the best weights are chosen on validation data, and {table.name} has none")
