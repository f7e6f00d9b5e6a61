"""Two processes train as one does: the same steps, the same result, checkpoints that either can go on from.

Every scenario is a function that runs in fresh processes over gloo (or in one, for comparison) and returns plain values
and tensors. The processes are forks of one server that has imported torch, so that each starts in a moment.
"""

import json
import multiprocessing
import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from limbeck.conformance import toys
from limbeck.core import checkpoint, loop, shard
from limbeck.core.batches import Batches, Table
from limbeck.core.consensus import Errors
from limbeck.core.errors import BadInput, Interrupted
from limbeck.core.loop import Clock, Fitted, Plan, Turn, fit
from limbeck.core.nets import Batch, Nets, outputs
from limbeck.core.similarity import Probe
from limbeck.core.taps import Taps
from limbeck.train.augmented.config_diffusion_augment import ConfigDiffusionAugment
from limbeck.train.augmented.hard_kd import HardKD
from limbeck.train.many.takd import TAKD
from limbeck.train.online.dml import DML
from limbeck.train.plain.distill import Distill
from limbeck.train.self.ban import BAN
from tests import tiny

WORDS, LONG, TEXTS = 7, 6, 24
SGD = {"sgd": {"lr": 0.5, "momentum": 0.9}}
ADAM = {"adam": {"lr": 0.02}}

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch cannot run several processes")


# ---- several processes -----------------------------------------------------------------------------------------------
def _child(
    scenario: Callable[..., Any], rank: int, world: int, port: int, folder: Path, given: tuple[Any, ...]
) -> None:
    os.environ |= {"ACCELERATE_USE_CPU": "true", "RANK": str(rank), "LOCAL_RANK": str(rank)}
    os.environ |= {"WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    try:
        torch.save(scenario(*given), folder / f"{rank}.pt")
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
    except BaseException:
        (folder / f"{rank}.txt").write_text(traceback.format_exc())
        os._exit(1)  # without waiting for the others, who may be waiting for this one


def processes(world: int, folder: Path, scenario: Callable[..., Any], *given: Any, limit: float = 60) -> list[Any]:
    """What `scenario(*given)` returns on each of `world` processes."""
    folder.mkdir(parents=True, exist_ok=True)
    kinds = multiprocessing.get_all_start_methods()
    context: Any = multiprocessing.get_context("forkserver" if "forkserver" in kinds else "spawn")
    if "forkserver" in kinds:
        context.set_forkserver_preload(
            ["torch", "torch._dynamo", "accelerate", "limbeck.core.loop", "limbeck.run", "limbeck.report.page"]
        )
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    started = [
        context.Process(target=_child, args=(scenario, rank, world, port, folder, given)) for rank in range(world)
    ]
    for process in started:
        process.start()
    try:
        end = time.monotonic() + limit
        for process in started:
            process.join(max(0.0, end - time.monotonic()))
        said = "\n".join(f"process {p.stem}:\n{p.read_text()}" for p in sorted(folder.glob("*.txt")))
        codes = [process.exitcode for process in started]
        assert codes == [0] * world, said or f"after {limit} s at most the exit codes are {codes}"
    finally:
        for process in started:
            process.kill()
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(world)]


def both(folder: Path, scenario: Callable[..., Any], *given: Any) -> tuple[Any, Any]:
    """What one process returns and what the first of two does; the two have to be of one mind, to the last bit."""
    left, right = processes(2, folder / "two", scenario, *given)
    same(right, left)
    return processes(1, folder / "one", scenario, *given)[0], left


def same(found: Any, wanted: Any, *, rtol: float = 0.0, atol: float = 0.0, where: str = "") -> None:
    """Two trees of numbers and tensors agree."""
    if isinstance(wanted, dict):
        assert found.keys() == wanted.keys(), where
        for key in wanted:
            same(found[key], wanted[key], rtol=rtol, atol=atol, where=f"{where}/{key}")
    elif isinstance(wanted, (list, tuple)):
        assert len(found) == len(wanted), where
        for i, (a, b) in enumerate(zip(found, wanted, strict=True)):
            same(a, b, rtol=rtol, atol=atol, where=f"{where}/{i}")
    elif isinstance(wanted, Tensor):
        assert type(found) is type(wanted) and found.dtype == wanted.dtype, where
        torch.testing.assert_close(found, wanted, rtol=rtol, atol=atol, msg=lambda text: f"{where}: {text}")
    elif isinstance(wanted, float):
        assert found == pytest.approx(wanted, rel=rtol, abs=atol), where
    else:
        assert found == wanted, where


# ---- a small world: a language of seven words ------------------------------------------------------------------------
class Reader(nn.Module):
    """Token ids [B, T] to logits [B, T, V], feats after each layer."""

    def __init__(self, width: int = 5) -> None:
        super().__init__()
        self.words = nn.Embedding(WORDS, width)
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(width, width), nn.Tanh()) for _ in range(2))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, WORDS)

    def forward(self, inputs: Tensor) -> dict[str, Any]:
        x, feats = self.words(inputs), []
        for layer in self.layers:
            x = x + layer(x)
            feats.append(x)
        return {"logits": self.head(self.norm(x)), "feats": feats}


def texts(batch_size: int, *, labels_missing: bool = False) -> Batches:
    """Batches [B, T] of which a different share counts in every text: the two processes never hold as many places."""
    g = torch.Generator().manual_seed(3)
    ids = torch.randint(WORDS, (TEXTS, LONG + 1), generator=g)
    mask = torch.arange(LONG) < torch.arange(TEXTS)[:, None] % (LONG + 1)
    labels = ids[:, 1:].clone()
    if labels_missing:
        labels[torch.rand(labels.shape, generator=g) < 0.3] = -100
    table = Table({"inputs": ids[:, :-1], "labels": labels, "mask": mask}, kind="tokens")
    rank, world = (int(os.environ[k]) for k in ("RANK", "WORLD_SIZE"))
    return Batches(table, batch_size, shuffle=False, rank=rank, world=world)


def readers(**widths: int) -> Nets:
    """Networks of these widths in double precision, equal on every process."""
    torch.manual_seed(0)
    return Nets(**{name: Reader(width).double() for name, width in widths.items()})


def weights(nets: Nets) -> dict[str, Tensor]:
    """Every parameter and buffer, by its full name."""
    return {f"{n}.{k}": v.detach().clone() for n, m in nets.modules.items() for k, v in m.state_dict().items()}


def result(fitted: Fitted) -> dict[str, Any]:
    """What is compared of a run."""
    turns = [[stage, t, player, parts] for stage, t, player, parts in fitted.turns]
    looks = [[stage, t, metrics] for stage, t, metrics in fitted.validations]
    return {"weights": weights(fitted.nets), "turns": turns, "steps": fitted.steps, "looks": looks}


# ---- one process and two ---------------------------------------------------------------------------------------------
def plain(accumulate: int, optimizer: Any) -> dict[str, Any]:
    plan = Plan(5, optimizer=optimizer, schedule="cosine", clip=0.5, accumulate=accumulate, log_every=1)
    nets = readers(teacher=6, student=3)
    return result(fit(Distill(match=("ce", {"kd": {"weight": 0.7}})), nets, texts(8 // accumulate), plan))


@pytest.mark.parametrize(("accumulate", "optimizer"), [(1, SGD), (2, ADAM)])
def test_plain_distillation(tmp_path: Path, accumulate: int, optimizer: Any):
    one, two = both(tmp_path, plain, accumulate, optimizer)
    same(two, one, rtol=1e-9, atol=1e-11)
    assert len(one["turns"]) == 5 and not torch.equal(one["weights"]["student.head.bias"], torch.zeros(WORDS))


def mutual() -> dict[str, Any]:
    nets = readers(a=3, b=4)
    nets.peers = nn.ModuleList([nets.modules.pop("a"), nets.modules.pop("b")])
    plan = Plan(4, optimizer=SGD, accumulate=2, ema=0.5, log_every=1)
    return result(fit(DML(weight=0.8), nets, texts(4, labels_missing=True), plan))


def test_mutual_learning_with_parts_that_count_different_things(tmp_path: Path):
    one, two = both(tmp_path, mutual)
    same(two, one, rtol=1e-9, atol=1e-11)
    assert {player for _, _, player, _ in one["turns"]} == {"peers.0", "peers.1"}


def chain(kind: str) -> dict[str, Any]:
    nets = readers(teacher=6, student=3)
    nets.factories |= {"student": lambda: Reader(3).double(), "assistant": lambda: Reader(4).double()}
    method: Any = BAN(generations=3) if kind == "ban" else TAKD(assistants=2)
    torch.manual_seed(int(os.environ["RANK"]))  # each process would make networks of its own
    return result(fit(method, nets, texts(8), Plan(2, optimizer=SGD, log_every=1)))


@pytest.mark.parametrize("kind", ["ban", "takd"])
def test_networks_that_stages_make(tmp_path: Path, kind: str):
    one, two = both(tmp_path, chain, kind)
    same(two, one, rtol=1e-9, atol=1e-11)
    assert len(one["turns"]) == 6


class Statistics:
    """A network whose batch norm sees what its process sees, and a look that differs between processes."""

    def step(self, nets: Nets, batch: Batch, clock: Clock) -> Iterator[Turn]:
        yield "student", nets.student(batch["inputs"].double()).square().mean()


def unequal() -> dict[str, Any]:
    torch.manual_seed(0)
    nets = Nets(student=nn.Sequential(nn.Linear(LONG, 3), nn.BatchNorm1d(3)).double())
    scores = [0.2, 0.9, 0.1, 0.3] if os.environ["RANK"] == "0" else [0.9, 0.1, 0.2, 0.3]
    looks = iter(scores)
    plan = Plan(4, optimizer=SGD, validate_every=1, select="score", log_every=1)
    return result(fit(Statistics(), nets, texts(8), plan, validate=lambda nets: {"score": next(looks)}))


def test_processes_that_see_different_things_decide_alike(tmp_path: Path):
    left, right = processes(2, tmp_path, unequal)
    same(right, left)  # batch-norm statistics and the chosen weights, too
    assert [metrics["score"] for _, _, metrics in left["looks"]] == [0.2, 0.9, 0.1, 0.3]


def hurried() -> dict[str, Any]:
    pace, now = 1.0 + 2.0 * int(os.environ["RANK"]), [0.0]

    def watch() -> float:
        now[0] += pace
        return now[0]

    loop.time.monotonic = watch  # type: ignore[assignment]
    plan = Plan(10**6, optimizer=SGD, schedule="linear", max_minutes=1.0)
    return result(fit(Distill(), readers(teacher=6, student=3), texts(8), plan))


def test_a_time_limit_is_that_of_the_first_process(tmp_path: Path):
    left, right = processes(2, tmp_path, hurried)
    assert left["steps"] == right["steps"] > 5
    same(right["weights"], left["weights"])  # the learning rate follows the same watch


def changed(low: float, steps: int) -> list[str]:
    """Who had each turn of `hard_kd`."""
    rank, world = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE"))
    nets = Nets(teacher=toys.seeing_teacher(True), student=toys.Eye(4, seed=1))
    data = Batches(toys.pictures(3), 24, seed=1, rank=rank, world=world)
    plan = Plan(steps, optimizer={"adam": {"lr": 0.01}}, log_every=1)
    return [player for *_, player, _ in fit(HardKD(low=low, patience=50), nets, data, plan).turns]


def test_processes_change_pictures_and_learn_from_them_in_the_same_steps(tmp_path: Path):
    left, right = processes(2, tmp_path, changed, 0.3, 24, limit=120)
    assert left == right and set(left) == {"student", "augmentor"}


def painted() -> str:
    nets = Nets(teacher=toys.seeing_teacher(True), student=toys.Eye(4, seed=1))
    try:
        fit(ConfigDiffusionAugment(), nets, Batches(toys.pictures(3), 24), Plan(2))
    except BadInput as error:
        return str(error)
    return ""


def test_pictures_are_painted_by_one_process(tmp_path: Path):
    assert all("in one process" in said for said in processes(2, tmp_path, painted))


def wrapped() -> str:
    from accelerate import Accelerator

    accelerator = Accelerator()
    nets = readers(teacher=6, student=3)
    nets.student = nn.parallel.DistributedDataParallel(nets.student)
    try:
        fit(Distill(), nets, texts(8), Plan(1), accelerator=accelerator)
    except BadInput as error:
        return str(error)
    return ""


def test_a_second_owner_of_the_gradients_is_refused(tmp_path: Path):
    left, right = processes(2, tmp_path, wrapped)
    assert (
        left
        == right
        == ("'student' is wrapped in DistributedDataParallel; give the module inside: the loop sums gradients")
    )


# ---- what is remembered of some places -------------------------------------------------------------------------------
def remembered() -> dict[str, Any]:
    """Errors and features of eight examples, of which the first process would hold three that count, the second one."""
    torch.distributed.init_process_group("gloo")
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    part = slice(rank * 8 // world, (rank + 1) * 8 // world)
    g = torch.Generator().manual_seed(0)
    said, rows = torch.randn(2, 8, 3, generator=g, dtype=torch.float64), torch.randn(8, 5, generator=g)
    labels, counts = torch.arange(8) % 3, torch.tensor([1, 1, 1, 0, 0, 1, 0, 0]).bool()
    errors, probe = Errors(2), Probe([5], 6)
    errors.add(said[:, part], labels[part], counts[part], 0)
    probe.add([rows[part]], labels[part], counts[part])
    return {"errors": dict(errors.state_dict()), "probe": dict(probe.state_dict())}


def test_processes_may_hold_different_numbers_of_the_places_that_are_remembered(tmp_path: Path):
    one, two = both(tmp_path, remembered)
    assert int(one["errors"]["count"]) == int(one["probe"]["count"]) == 4
    same(two, one, rtol=1e-12)


# ---- interruption ----------------------------------------------------------------------------------------------------
def stopped(folder: Path, resume: bool) -> dict[str, Any]:
    """A run that the second process is asked to stop after its third step."""
    step = Distill.step

    def noisy(self: Distill, nets: Nets, batch: Batch, clock: Clock) -> Iterator[Turn]:
        if clock.t == 2 and not resume and os.environ["RANK"] == "1":
            signal.raise_signal(signal.SIGTERM)
        for player, parts in step(self, nets, batch, clock):
            yield player, {**parts, "noise": torch.rand(()) * nets.student.head.bias.sum()}  # of each process its own

    Distill.step = noisy  # type: ignore[method-assign]
    plan = Plan(6, optimizer=ADAM, ema=0.5, log_every=1)
    try:
        return result(fit(Distill(), readers(teacher=6, student=3), texts(8), plan, folder=folder, resume=resume))
    except Interrupted as stop:
        return {"code": stop.code}


def test_a_signal_to_one_process_stops_and_saves_all(tmp_path: Path):
    cut = processes(2, tmp_path / "a", stopped, tmp_path / "cut", False)
    assert cut == [{"code": 130}] * 2
    assert [p.name for p in (tmp_path / "cut" / "checkpoints").iterdir()] == ["step-00000003"]
    left, right = processes(2, tmp_path / "b", stopped, tmp_path / "cut", True)
    same(right, left)
    whole = processes(2, tmp_path / "c", stopped, tmp_path / "whole", True)[0]  # no checkpoint there: from the start
    same(left, whole)
    steps = [json.loads(line)["t"] for line in (tmp_path / "cut" / "log.jsonl").read_text().splitlines()]
    assert steps == list(range(6))  # one process writes, and every step once


# ---- FSDP2 -----------------------------------------------------------------------------------------------------------
def sharding() -> Any:
    """An accelerator as `accelerate launch` with FSDP2 makes it; without a graphics card it has to be told so."""
    from accelerate import Accelerator, PartialState
    from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin

    accelerator = Accelerator()
    accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin(fsdp_version=2, reshard_after_forward=True)
    for state in (accelerator.state, PartialState()):
        state.distributed_type = DistributedType.FSDP
    return accelerator


@dataclass(frozen=True)
class Watched:
    """Distillation that notes whether the student is sharded while it learns, and may be stopped by a signal."""

    inner: Distill
    seen: list[bool]
    stops: list[int]

    def setup(self, nets: Nets, probe: Batch) -> None:
        self.inner.setup(nets, probe)

    def step(self, nets: Nets, batch: Batch, clock: Clock) -> Iterator[Turn]:
        self.seen.append(all(isinstance(m, shard.FSDPModule) for m in (nets.student, nets.losses["fitnets"])))
        if clock.t in self.stops:
            self.stops.clear()  # a second signal would not wait for the end of the step
            signal.raise_signal(signal.SIGTERM)
        yield from self.inner.step(nets, batch, clock)


def size(student_logits: Tensor) -> Tensor:
    """A loss that counts batches, beside those that count tokens."""
    return student_logits.square().mean()


def sharded(folder: Path, stop: int, resume: bool, accumulate: int, ema: float | None) -> dict[str, Any]:
    several = os.environ["WORLD_SIZE"] != "1"
    nets = readers(teacher=6, student=3)
    nets.taps["student"] = Taps(nets.student, {"feats": ["layers.0", "layers.1"]})
    nets.taps["teacher"] = Taps(nets.teacher, {"feats": ["layers.0", "layers.1"]})
    match = ("ce", {"kd": {"weight": 0.7}}, {"fitnets": {"weight": 0.3}}, size)
    method = Watched(Distill(match=match), [], [stop])
    how = {"optimizer": SGD} if accumulate > 1 else {"optimizer": ADAM, "clip": 0.5}
    plan = Plan(6, ema=ema, accumulate=accumulate, validate_every=1, select="score", log_every=1, **how)

    def validate(nets: Nets) -> dict[str, float]:
        logits = nets.run("student", {"inputs": torch.arange(WORDS)[None]})["logits"]
        return {"score": float(logits.sin().sum())}

    torch.set_default_dtype(torch.float64)  # the projector, too
    try:
        fitted = fit(
            method,
            nets,
            texts(8 // accumulate),
            plan,
            validate=validate,
            folder=folder,
            resume=resume,
            accelerator=sharding() if several else None,
        )
    except Interrupted:
        return {"sharded": all(method.seen) if several else not any(method.seen)}
    kinds = sorted({type(m).__name__ for m in nets.student.modules()})
    with torch.no_grad():
        out = nets.run("student", {"inputs": torch.arange(WORDS)[None]})
    return {**result(fitted), "sharded": all(method.seen) if several else not any(method.seen), "kinds": kinds, **out}


@pytest.mark.parametrize(("accumulate", "ema"), [(1, 0.5), (2, None)])
def test_fsdp_trains_as_one_process_and_its_checkpoints_are_whole(tmp_path: Path, accumulate: int, ema: float | None):
    (one,) = processes(1, tmp_path / "one", sharded, tmp_path / "whole", -1, False, accumulate, ema)
    cut = processes(2, tmp_path / "two", sharded, tmp_path / "cut", 3, False, accumulate, ema)
    assert cut == [{"sharded": True}] * 2
    found = checkpoint.latest(tmp_path / "cut" / "checkpoints")
    assert found is not None
    saved, shapes = found[0]["nets"]["student"], Reader(3).state_dict()
    assert {k: v.shape for k, v in saved.items()} == {k: v.shape for k, v in shapes.items()}
    left, right = processes(2, tmp_path / "again", sharded, tmp_path / "cut", -1, True, accumulate, ema)
    same(right, left)
    same(left, one, rtol=1e-9, atol=1e-11)  # the best weights, the log, and a student that is a plain Reader
    assert left["sharded"] and "Reader" in left["kinds"] and not any("FSDP" in kind for kind in left["kinds"])


def test_a_checkpoint_of_two_processes_serves_one(tmp_path: Path):
    (one,) = processes(1, tmp_path / "one", sharded, tmp_path / "whole", -1, False, 1, 0.5)
    processes(2, tmp_path / "two", sharded, tmp_path / "cut", 2, False, 1, 0.5)
    (again,) = processes(1, tmp_path / "again", sharded, tmp_path / "cut", -1, True, 1, 0.5)
    same(again, one, rtol=1e-9, atol=1e-11)


# ---- a whole recipe --------------------------------------------------------------------------------------------------
def carried_out(folder: Path, resume: bool) -> dict[str, Any]:
    """A recipe whose teacher is trained first, whose signals are stored and whose later stage reads an earlier one; and
    the files that this process has written."""
    from limbeck.recipe import check
    from limbeck.run import new_folder, run

    written: list[str] = []

    def audit(event: str, told: tuple[Any, ...]) -> None:
        if event == "open" and str(told[0]).startswith(str(folder)) and set(str(told[1])) & set("wax+"):
            written.append(Path(told[0]).name)

    sys.addaudithook(audit)
    train = {"steps": 4, "batch_size": 16, "save_every": 2}
    student = {"net": "mlp", "width": 4, "depth": 1}
    first = {"name": "a", "do": "train", "student": student, "data": str(folder / "tiny.npz"), "train": train}
    second = {"name": "b", "student": {**student, "weights": "stage:a"}, "data": first["data"], "train": train}
    second |= {"teacher": {"net": "mlp", "width": 8, "train": train}, "store": {}, "seeds": 2}
    recipe = check({"name": "two", "stages": [first, second]}, "test")
    result = run(recipe, folder=folder / "there", resume=resume, shared=folder / "shared")
    return {
        "weights": dict(result.artefact.state_dict()),
        "accuracy": result.metrics["accuracy"],
        "differences": list(result.gain.differences),
        "new": str(new_folder(folder, "name")),
        "written": sorted(set(written)),
    }


def test_a_recipe_is_carried_out_by_all_and_written_by_the_first(tmp_path: Path):
    tiny.data(tmp_path)
    (tmp_path / "alone").mkdir()
    tiny.data(tmp_path / "alone")
    left, right = processes(2, tmp_path / "a", carried_out, tmp_path, False)
    wrote, other = left.pop("written"), right.pop("written")
    assert other == [] and {"recipe.yaml", ".outcome.json", ".result.json", "metrics.json", "codes.npy"} <= set(wrote)
    same(right, left)
    (one,) = processes(1, tmp_path / "one", carried_out, tmp_path / "alone", False)
    same(left["weights"], one["weights"], rtol=1e-3, atol=1e-5)
    for name in ("result.json", "b/report.html", "a/weights.safetensors", "b/seed-1/control/outcome.json"):
        assert (tmp_path / "there" / name).exists(), name
    assert len(list((tmp_path / "shared").iterdir())) == 4
    (tmp_path / "there/b/seed-1/outcome.json").unlink()
    again, _ = processes(2, tmp_path / "b", carried_out, tmp_path, True)
    assert "metrics.json" not in again["written"] and again.pop("new") and left.pop("new")
    same({k: v for k, v in again.items() if k != "written"}, left)


def refused(folder: Path) -> str:
    """What the first process alone finds wrong, as every process hears of it."""
    from limbeck.verbs.together import first, leads

    def look() -> None:
        assert leads()
        raise BadInput("the place is taken")

    try:
        first(look)
    except BadInput as error:
        return str(error)
    return ""


def test_what_the_first_process_refuses_all_refuse(tmp_path: Path):
    assert processes(2, tmp_path, refused, tmp_path) == ["the place is taken"] * 2


# ---- taps ------------------------------------------------------------------------------------------------------------
def tapped(how: str) -> dict[str, Any]:
    """Activations and the gradient of a loss on them."""
    nets = readers(student=4)
    inner = nets.student
    if how == "accelerate":
        accelerator = sharding()
    elif how == "ddp":
        torch.distributed.init_process_group("gloo")
        nets.student = nn.parallel.DistributedDataParallel(inner)
    elif how in ("eager", "aot_eager"):
        nets.student = torch.compile(inner, backend=how)  # type: ignore[assignment]
    nets.taps["student"] = Taps(nets.student, {"feats": ["layers.0.0", "layers.1"], "hidden": "norm"})
    if how == "accelerate":
        shard.prepare(nets, accelerator, {})
    seen = {}
    for look in range(2):
        ids = (torch.arange(2 * LONG).view(2, LONG) + look) % WORDS
        out = nets.run("student", {"inputs": ids})
        seen[str(look)] = {k: out[k] for k in ("feats", "hidden", "logits")}
        (out["feats"][0].square().mean() + out["hidden"].sin().sum() + out["logits"].square().mean()).backward()
    grads = {k.removeprefix("module.").removeprefix("_orig_mod."): p.grad for k, p in nets.student.named_parameters()}
    grads = {k: shard.whole(g) for k, g in grads.items() if g is not None}
    with torch.no_grad():  # and without a graph, as a validation does
        seen["still"] = nets.run("student", {"inputs": ids})["feats"]
    return shard.whole({"seen": seen, "grads": grads})


@pytest.mark.parametrize("how", ["ddp", "accelerate", "eager", "aot_eager"])
def test_taps_read_the_same_whatever_is_around_the_network(tmp_path: Path, how: str):
    (wanted,) = processes(1, tmp_path / "plain", tapped, "")
    world = 2 if how in ("ddp", "accelerate") else 1
    for found in processes(world, tmp_path / how, tapped, how):
        same(found, wanted, rtol=1e-12, atol=1e-14)


def test_outputs_are_named_through_wrappers():
    class Graph(nn.Module):
        reads = ("inputs", "edges")

        def forward(self, inputs: Tensor, edges: Tensor) -> Tensor:
            return inputs + edges

    for net in (Graph(), torch.compile(Graph(), backend="eager"), nn.DataParallel(Graph(), device_ids=[])):
        out = outputs(net, {"inputs": torch.ones(2), "edges": torch.ones(2)})
        assert torch.equal(out["logits"], torch.full((2,), 2.0))
