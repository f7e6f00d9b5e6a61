"""The loop: means over whole steps, schedules, averages, selection, time, precision, signals, disks, trackers."""

import copy
import errno
import json
import os
import platform
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, log_softmax

from limbeck.core import checkpoint, loop
from limbeck.core.batches import Batches, Table
from limbeck.core.errors import BadCheckpoint, BadInput, Interrupted, LimbeckError, MissingExtra
from limbeck.core.loop import Clock, Fitted, Plan, Turn, fit
from limbeck.core.nets import Batch, Nets
from limbeck.core.reduce import Part, mean
from limbeck.core.state import ema_update
from limbeck.train.plain.distill import Distill
from limbeck.verbs import setting

SGD = {"sgd": {"lr": 0.1}}
ROOT = Path(__file__).parent.parent.parent


# ---- a small world: least squares over short sequences ---------------------------------------------------------------
TEXTS, LONG, WIDE = 24, 5, 3


def sequences(batch_size: int = 8) -> Batches:
    """Inputs [B, T, D] and targets [B, T] of which a different share counts in every example."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(TEXTS, LONG, WIDE, generator=g, dtype=torch.float64)
    mask = torch.arange(LONG) < torch.arange(TEXTS)[:, None] % (LONG + 1)
    columns = {"inputs": x, "targets": x.sum(-1).sin(), "mask": mask, "chosen": torch.rand(TEXTS, generator=g) < 0.3}
    return Batches(Table(columns), batch_size, seed=1)


def student() -> Nets:
    torch.manual_seed(0)
    return Nets(student=nn.Linear(WIDE, 1).double())


@dataclass(frozen=True)
class Squares:
    """Five parts, of which each counts something else; `share` of examples that are picked by indexing."""

    indexed: bool = False

    def step(self, nets: Nets, batch: Batch, clock: Clock) -> Iterator[Turn]:
        error = (nets.student(batch["inputs"])[..., 0] - batch["targets"]).square()
        longest = error.amax(1)
        parts: dict[str, Tensor | Part] = {
            "tokens": mean(error, batch["mask"]),
            "half of the tokens": 0.5 * mean(error.sqrt(), batch["mask"]),
            "all": torch.tensor(0.3, dtype=torch.float64) * mean(error),
            "examples": mean(longest, batch["chosen"]),
            "any token": mean(longest, batch["mask"]),
            "a scalar": nets.student.weight.square().sum(),
            "a constant": mean(torch.full((3,), 7.0)),
        }
        yield "student", parts


class Noise:
    """Weights that follow what the three random generators say."""

    def step(self, nets: Nets, batch: Batch, clock: Clock) -> Iterator[Turn]:
        factor = torch.rand(()) + random.random() + float(np.random.rand())
        yield "student", factor * nets.student(batch["inputs"]).square().mean()


@dataclass
class Scripted:
    """Validation that says a given score each time and notes the first weight that it sees."""

    scores: list[float]
    name: str = "score"
    seen: list[float] = field(default_factory=list)

    def __call__(self, nets: Nets) -> dict[str, float]:
        self.seen.append(weight(nets))
        return {self.name: self.scores[len(self.seen) - 1]}


def weight(nets: Nets) -> float:
    """The first weight of the student."""
    return float(next(nets.student.parameters()).detach().flatten()[0])


def state(nets: Nets, player: str = "student") -> Tensor:
    return torch.cat([p.detach().double().flatten() for p in nets.find(player).parameters()])


def path(plan: Plan, method: Any = None, **options: Any) -> tuple[Fitted, list[Tensor]]:
    """A run, and the student after every step."""
    nets, seen = student(), []

    class Followed:
        def step(self, nets: Nets, batch: Batch, clock: Clock) -> Iterator[Turn]:
            yield from (method or Squares()).step(nets, batch, clock)

        def after(self, nets: Nets, player: str, clock: Clock) -> None:
            seen.append(state(nets))

    return fit(Followed(), nets, sequences(8 // plan.accumulate), plan, **options), seen


# ---- the mean over the whole step ------------------------------------------------------------------------------------
@pytest.mark.parametrize("accumulate", [2, 4, 8])
@pytest.mark.parametrize("clip", [None, 0.2])
def test_pieces_of_a_step_add_up_whatever_the_parts_count(accumulate: int, clip: float | None):
    momentum = {"sgd": {"lr": 0.1, "momentum": 0.9}}
    whole, wanted = path(Plan(6, optimizer=momentum, clip=clip, log_every=1))
    pieces, found = path(Plan(6, optimizer=momentum, clip=clip, log_every=1, accumulate=accumulate))
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)
    for (*where, a), (*there, b) in zip(pieces.turns, whole.turns, strict=True):
        assert where == there and a == pytest.approx(b, rel=1e-12)
    assert not torch.equal(wanted[0], state(student()))


def test_a_step_in_which_nothing_counts_moves_nobody():
    @dataclass(frozen=True)
    class Nothing:
        def step(self, nets: Nets, batch: Batch, clock: Clock) -> Iterator[Turn]:
            error = nets.student(batch["inputs"])[..., 0].exp()
            yield "student", {"x": mean(error, torch.zeros_like(batch["mask"]))}

    for accumulate in (1, 2):
        nets = student()
        before = state(nets)
        fitted = fit(Nothing(), nets, sequences(), Plan(2, optimizer=SGD, accumulate=accumulate))
        assert torch.equal(state(nets), before) and fitted.turns[0][3] == {"x": 0}


def test_what_cannot_be_added_up_is_refused():
    class Indexed:
        """Two parts that count as many elements in the first piece of a step, and not in the second."""

        def step(self, nets: Nets, batch: Batch, clock: Clock) -> Iterator[Turn]:
            error = nets.student(batch["inputs"])[:, 0, 0].square()
            first = bool((batch["index"] == sequences(4).indices(0)).all())
            yield "student", {"all": mean(error), "some": mean(error if first else error[1:])}

    with pytest.raises(
        LimbeckError, match="parts all, some count alike in one micro-batch .* by a mask, not by indexing"
    ):
        fit(Indexed(), student(), sequences(4), Plan(1, accumulate=2))

    class Missing:
        def step(self, nets: Nets, batch: Batch, clock: Clock) -> Iterator[Turn]:
            error = nets.student(batch["inputs"]).square()
            first = bool((batch["index"] == sequences(4).indices(0)).all())
            yield "student", {"a": mean(error)} | ({} if first else {"b": mean(error)})

    with pytest.raises(LimbeckError, match=r"micro-batches of one step have different parts: \['b'\]"):
        fit(Missing(), student(), sequences(4), Plan(1, accumulate=2))


# ---- clipping, schedules ---------------------------------------------------------------------------------------------
class Two:
    """A player with a companion and a steep loss, and one whose loss is gentle."""

    def setup(self, nets: Nets, probe: Batch) -> None:
        torch.manual_seed(1)
        nets.head, nets.other = nn.Linear(1, 1).double(), nn.Linear(WIDE, 1).double()
        nets.companions["student"] = ["head"]

    def optimizers(self) -> dict[str, Any]:
        return {"student": {"sgd": {"lr": 0.5}}}

    def step(self, nets: Nets, batch: Batch, clock: Clock) -> Iterator[Turn]:
        yield "student", 1e3 * nets.head(nets.student(batch["inputs"])).square().mean()
        yield "other", 1e-3 * nets.other(batch["inputs"]).square().mean()


def test_a_player_is_clipped_with_its_companions_and_without_the_others():
    moved: dict[str, float] = {}
    for clip in (None, 0.1):
        nets, method = student(), Two()
        method.setup(nets, {})
        before = {n: state(nets, n) for n in nets}
        fit(method, nets, sequences(), Plan(1, optimizer={"sgd": {"lr": 1.0}}, clip=clip))
        moved |= {f"{n} {clip}": float((state(nets, n) - before[n]).norm()) for n in nets}
    assert moved["other 0.1"] == moved["other None"] > 0  # far below the limit, whatever the other player's gradient
    together = (moved["student 0.1"] ** 2 + moved["head 0.1"] ** 2) ** 0.5
    assert together == pytest.approx(0.5 * 0.1, rel=1e-4) and moved["head None"] > 1  # lr times the limit


@pytest.mark.parametrize(
    ("schedule", "wanted"),
    [
        ("constant", [1, 1, 1, 1, 1]),
        ("linear", [1, 0.75, 0.5, 0.25, 0]),
        ({"linear": {"warmup": 0.5, "final": 0.2}}, [0, 0.5, 1, 0.6, 0.2]),
        ({"step": {"at": [0.5, 1.0], "factor": 0.1}}, [1, 1, 0.1, 0.1, 0.01]),
    ],
)
def test_every_player_has_its_rate_on_the_one_schedule_in_every_stage(schedule: Any, wanted: list[float]):
    class Staged(Two):
        def stages(self, nets: Nets, steps: int) -> Iterator[int]:
            yield from (steps, steps)

    rates: dict[tuple[int, str], list[float]] = {}

    def note(event: dict[str, Any]) -> None:
        rates.setdefault((event["stage"], event["player"]), []).append(event["lr"])

    plan = Plan(5, optimizer={"adam": {"lr": 0.01}}, schedule=schedule, clip=1.0, log_every=1)
    fit(Staged(), student(), sequences(), plan, on_event=note)
    for stage in (0, 1):
        assert rates[stage, "student"] == pytest.approx([0.5 * w for w in wanted], abs=1e-12)
        assert rates[stage, "other"] == pytest.approx([0.01 * w for w in wanted], abs=1e-12)
    by_name = Plan(5, optimizers={"student": {"sgd": {"lr": 0.2}}}, schedule=schedule, clip=1.0, log_every=1)
    rates.clear()
    fit(Two(), student(), sequences(), by_name, on_event=note)  # a recipe's goes before the method's
    assert rates[0, "student"] == pytest.approx([0.2 * w for w in wanted], abs=1e-12)


def labelled(size: int = 8) -> Batches:
    g = torch.Generator().manual_seed(0)
    columns = {
        "inputs": torch.randn(32, WIDE, generator=g, dtype=torch.float64),
        "labels": torch.randint(4, (32,), generator=g),
    }
    return Batches(Table(columns), size, seed=1)


def classes() -> Nets:
    torch.manual_seed(0)
    return Nets(teacher=nn.Linear(WIDE, 4).double(), student=nn.Linear(WIDE, 4).double())


def test_weights_and_temperatures_follow_their_schedules():
    match = (
        {"ce": {"weight": {"steps": [[0, 1.0], [0.5, 0.25]]}}},
        {"kd": {"weight": {"linear": [0.0, 2.0]}, "temperature": {"cosine": [8.0, 2.0]}}},
    )
    found = classes()
    fit(Distill(match=match), found, labelled(), Plan(5, optimizer=SGD))
    by_hand, data = classes(), labelled()
    ce_weights, kd_weights = [1, 1, 0.25, 0.25, 0.25], [0, 0.5, 1, 1.5, 2]
    temperatures = [5 + 3 * float(np.cos(np.pi * p)) for p in (0, 0.25, 0.5, 0.75, 1)]
    for a, b, t in zip(ce_weights, kd_weights, temperatures, strict=True):
        batch = next(data)
        s, z = by_hand.student(batch["inputs"]), by_hand.teacher(batch["inputs"])
        kl = (log_softmax(z / t, -1).exp() * (log_softmax(z / t, -1) - log_softmax(s / t, -1))).sum(-1).mean()
        loss = a * cross_entropy(s, batch["labels"]) + b * t**2 * kl
        for p, grad in zip(
            by_hand.student.parameters(), torch.autograd.grad(loss, [*by_hand.student.parameters()]), strict=True
        ):
            p.data -= 0.1 * grad
    torch.testing.assert_close(state(found), state(by_hand), rtol=1e-10, atol=1e-12)


# ---- averages, selection, looking ------------------------------------------------------------------------------------
def test_validation_sees_the_average_and_training_goes_on_without_it():
    plan = Plan(4, optimizer=SGD, ema=0.6, validate_every=1)
    look = Scripted([0.0] * 4)
    averaged, steps = path(plan, validate=look)
    _, alone = path(Plan(4, optimizer=SGD))
    assert all(torch.equal(a, b) for a, b in zip(steps, alone, strict=True))
    average, wanted = steps[0], []
    for now in steps:
        average = 0.6 * average + 0.4 * now
        wanted.append(float(average[0]))
    assert look.seen == pytest.approx(wanted, rel=1e-12)
    torch.testing.assert_close(state(averaged.nets), average, rtol=1e-12, atol=0)


def test_the_best_of_averages_is_an_average_with_its_statistics():
    class Normed:
        def step(self, nets: Nets, batch: Batch, clock: Clock) -> Iterator[Turn]:
            yield "student", (nets.student(batch["inputs"].flatten(0, 1)) - 1).square().mean()

    kept: list[dict[str, Tensor]] = []
    scores = [0.1, 0.9, float("nan"), 0.9, 0.3]

    def validate(nets: Nets) -> dict[str, float]:
        kept.append({k: v.clone() for k, v in nets.student.state_dict().items()})
        return {"score": scores[len(kept) - 1]}

    torch.manual_seed(0)
    nets = Nets(student=nn.Sequential(nn.Linear(WIDE, 2), nn.BatchNorm1d(2)).double())
    plan = Plan(5, optimizer=SGD, ema=0.5, validate_every=1, select="score")
    fitted = fit(Normed(), nets, sequences(), plan, validate=validate)
    assert fitted.best == {"score": 0.9} and len(fitted.validations) == 5
    for key, value in nets.student.state_dict().items():
        assert torch.equal(value, kept[1][key]), key  # the first of equals; nan is no score


class Averaging:
    """Trains the student with a companion; the result is an average that no turn is taken for."""

    learner = "average"

    def setup(self, nets: Nets, probe: Batch) -> None:
        nets.average, nets.reader = copy.deepcopy(nets.student).requires_grad_(False), nn.Linear(1, 1).double()
        nets.companions["student"] = ["reader"]

    def step(self, nets: Nets, batch: Batch, clock: Clock) -> Iterator[Turn]:
        yield "student", (nets.reader(nets.student(batch["inputs"])) - 1).square().mean()

    def after(self, nets: Nets, player: str, clock: Clock) -> None:
        ema_update(nets.average, nets.student, 0.5)


@pytest.mark.parametrize("stopped", [False, True])
def test_the_best_are_kept_with_their_companions_and_the_result(stopped: bool, tmp_path: Path):
    kept: list[dict[str, Tensor]] = []

    def validate(nets: Nets) -> dict[str, float]:
        kept.append({name: state(nets, name) for name in nets})
        return {"score": -float(len(kept))}  # the first look is the best

    plan, nets = Plan(5, optimizer=SGD, validate_every=1, select="score", log_every=1), student()
    if stopped:
        with pytest.raises(Interrupted):
            fit(Averaging(), nets, sequences(), plan, validate=validate, folder=tmp_path, on_event=raising(2))
        nets = student()
    fitted = fit(Averaging(), nets, sequences(), plan, validate=validate, folder=tmp_path, resume=stopped)
    assert fitted.best == {"score": -1.0} and len(kept) == 5
    for name in ("student", "reader", "average"):
        assert torch.equal(state(nets, name), kept[0][name]) and not torch.equal(kept[0][name], kept[-1][name]), name


def test_selection_by_something_that_is_not_measured_is_refused():
    with pytest.raises(BadInput, match="no 'acuracy' to select by; did you mean `accuracy`"):
        path(Plan(2, select="acuracy"), validate=Scripted([0.5], "accuracy"))


def test_looking_changes_nothing():
    def look(nets: Nets) -> dict[str, float]:
        torch.rand(3), random.random(), np.random.rand(3)
        nets.student.train()
        return {"score": 0.0}

    for precision in ("fp32", "bf16"):
        plans = [Plan(5, optimizer=SGD, validate_every=n, precision=precision) for n in (0, 1, 2)]
        ends = [state(path(plan, Noise(), validate=look)[0].nets) for plan in plans]
        assert torch.equal(ends[0], ends[1]) and torch.equal(ends[0], ends[2])


# ---- time, precision, values that are none ---------------------------------------------------------------------------
def test_a_time_limit_stops_the_run_and_counts_what_went_before_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    now = [100.0]
    monkeypatch.setattr(loop.time, "monotonic", lambda: now[0])
    progress: list[float] = []

    class Slow:
        stop = 3

        def step(self, nets: Nets, batch: Batch, clock: Clock) -> Iterator[Turn]:
            progress.append(clock.progress)
            now[0] += 30.0
            if len(progress) == self.stop:
                signal.raise_signal(signal.SIGTERM)
            yield "student", nets.student(batch["inputs"]).square().mean()

    plan = Plan(10**9, max_minutes=4, schedule="linear", save_every=1)
    look = Scripted([0.5] * 9)
    with pytest.raises(Interrupted):
        fit(Slow(), student(), sequences(), plan, folder=tmp_path, validate=look)
    assert look.seen == []
    now[0] += 1e6  # a pause does not count
    fitted = fit(Slow(), student(), sequences(), plan, folder=tmp_path, validate=look, resume=True)
    assert progress == pytest.approx([i / 8 for i in range(8)])
    assert fitted.steps == 8 and fitted.seconds == 240 and len(look.seen) == 1  # the last step is looked at


def test_half_precision_is_close_to_full_and_leaves_full_weights():
    data = labelled()
    data.table.columns["inputs"] = data.table["inputs"].float()
    ends = {}
    for precision in ("fp32", "bf16", "fp16"):
        nets, seen = classes(), []
        nets.student, nets.teacher = nets.student.float(), nets.teacher.float()
        nets.student.register_forward_hook(lambda _module, _inputs, out, seen=seen: seen.append(out.dtype))
        data.load_state_dict({"position": 0})
        fitted = fit(Distill(), nets, data, Plan(20, optimizer=SGD, precision=precision, log_every=1))
        kinds = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
        assert seen[-1] == kinds[precision] and nets.student.weight.dtype == torch.float32
        ends[precision] = (state(nets), [sum(parts.values()) for *_, parts in fitted.turns])
    for precision, tolerance in (("bf16", 2e-2), ("fp16", 2e-2)):
        torch.testing.assert_close(ends[precision][0], ends["fp32"][0], rtol=tolerance, atol=tolerance)
        assert ends[precision][1] == pytest.approx(ends["fp32"][1], rel=tolerance)
        assert not torch.equal(ends[precision][0], ends["fp32"][0])


@dataclass(frozen=True)
class Lost:
    """Becomes nan at step `at`."""

    at: int

    def step(self, nets: Nets, batch: Batch, clock: Clock) -> Iterator[Turn]:
        factor = float("nan") if clock.t >= self.at else 1.0
        yield (
            "student",
            {"fine": nets.student.weight.sum(), "bad": factor * nets.student(batch["inputs"]).square().mean()},
        )


def test_a_loss_that_is_no_number_is_one_sentence():
    with pytest.raises(LimbeckError) as said:
        path(Plan(30, optimizer=SGD, log_every=10), Lost(10))
    assert str(said.value) == (
        "part 'bad' of 'student' became nan at step 10; "
        "lower its learning rate or weight, clip gradients, or train in fp32"
    )


def test_a_lost_run_does_not_replace_a_good_checkpoint(tmp_path: Path):
    plan = Plan(30, optimizer=SGD, log_every=0, save_every=2)
    with pytest.raises(LimbeckError, match="became nan at step 5"):
        fit(Lost(5), student(), sequences(), plan, folder=tmp_path)
    found = checkpoint.latest(tmp_path / "checkpoints")
    assert found is not None and found[0]["t"] == 4
    assert all(v.isfinite().all() for v in found[0]["nets"]["student"].values())


# ---- signals ---------------------------------------------------------------------------------------------------------
def raising(at: int, number: int = signal.SIGTERM, times: int = 1) -> Callable[[dict[str, Any]], None]:
    def stop(event: dict[str, Any]) -> None:
        if event["t"] == at:
            for _ in range(times):
                signal.raise_signal(number)

    return stop


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_are_dealt_with_as_before_when_the_run_is_over(number: int, tmp_path: Path):
    heard: list[int] = []

    def own(number: int, _frame: Any) -> None:
        heard.append(number)

    outside = signal.signal(number, own)
    try:
        plan = Plan(3, log_every=1)
        path(plan)
        assert signal.getsignal(number) is own
        with pytest.raises(Interrupted):
            path(plan, folder=tmp_path, on_event=raising(1, number))
        assert signal.getsignal(number) is own and heard == []
        with pytest.raises(LimbeckError, match="nan"):
            path(plan, Lost(0))
        assert signal.getsignal(number) is own
        with pytest.raises(Interrupted, match="nowhere: no folder was given"):
            path(plan, on_event=raising(1, number))
    finally:
        signal.signal(number, outside)


def test_a_second_ctrl_c_does_not_wait(tmp_path: Path):
    with pytest.raises(KeyboardInterrupt):
        path(Plan(3, log_every=1), folder=tmp_path, on_event=raising(1, signal.SIGINT, 2))
    assert not (tmp_path / "checkpoints").exists()


def test_a_run_in_a_thread_leaves_signals_to_their_owner():
    ends: list[int] = []
    before = signal.getsignal(signal.SIGINT)
    thread = threading.Thread(target=lambda: ends.append(path(Plan(3))[0].steps))
    thread.start()
    thread.join(60)
    assert ends == [3] and signal.getsignal(signal.SIGINT) is before


class Patient:
    """Noise that waits and says where it is, so that another process knows when to interrupt it."""

    def __init__(self, wait: float = 0.0) -> None:
        self.wait = wait

    def step(self, nets: Nets, batch: Batch, clock: Clock) -> Iterator[Turn]:
        if self.wait:
            time.sleep(self.wait)
            print("step", clock.t, flush=True)
        yield from Noise().step(nets, batch, clock)


def patient(folder: Path) -> None:
    """What the other process does: as the command line, it prints one sentence and leaves with the error's code."""
    try:
        fit(Patient(0.02), student(), sequences(), Plan(10**6), folder=folder)
    except LimbeckError as error:
        print(error, file=sys.stderr)
        sys.exit(error.code)


def test_a_process_that_is_stopped_saves_leaves_and_can_be_resumed(tmp_path: Path):
    numbers = {"term": signal.SIGTERM, "int": signal.SIGINT}
    here = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(Path(__file__).parent)]), "OMP_NUM_THREADS": "1"}
    code = f"from {Path(__file__).stem} import Path, patient; import sys; patient(Path(sys.argv[1]))"
    pipe = subprocess.PIPE
    running = {
        name: subprocess.Popen(
            [sys.executable, "-c", code, tmp_path / name], env=here, stdout=pipe, stderr=pipe, text=True
        )
        for name in numbers
    }
    for name, process in running.items():
        assert process.stdout is not None
        for _ in range(3):
            assert process.stdout.readline().startswith("step")
        process.send_signal(numbers[name])
        _, said = process.communicate(timeout=60)
        found = checkpoint.latest(tmp_path / name / "checkpoints")
        assert process.returncode == 130 and found is not None and found[0]["t"] >= 3
        assert said == f"interrupted; the state is saved in {found[1]}\n"
        plan = Plan(found[0]["t"] + 3)
        again = fit(Patient(), student(), sequences(), plan, folder=tmp_path / name, resume=True)
        whole = fit(Patient(), student(), sequences(), plan)
        assert torch.equal(state(again.nets), state(whole.nets))


# ---- disks -----------------------------------------------------------------------------------------------------------
def saved(folder: Path) -> list[str]:
    return sorted(p.name for p in (folder / "checkpoints").iterdir())


def test_a_disk_that_fills_up_while_saving(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    plan = Plan(8, optimizer={"adam": {"lr": 0.1}}, save_every=2, log_every=1)
    whole, _ = path(plan, Noise())
    real, calls = checkpoint.save_file, [0]

    def fills(tensors: dict[str, Tensor], file: Path) -> None:
        calls[0] += 1
        if calls[0] == 3:
            file.write_bytes(b"half of it")
            raise OSError(errno.ENOSPC, "No space left on device")
        real(tensors, file)

    monkeypatch.setattr(checkpoint, "save_file", fills)
    with pytest.raises(LimbeckError) as said:
        path(plan, Noise(), folder=tmp_path)
    where = tmp_path / "checkpoints" / "step-00000006"
    assert str(said.value) == f"could not save the checkpoint {where}: the disk is full; earlier checkpoints are intact"
    assert saved(tmp_path) == ["step-00000002", "step-00000004"]
    again, _ = path(plan, Noise(), folder=tmp_path, resume=True)
    assert torch.equal(state(again.nets), state(whole.nets)) and again.turns == whole.turns


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no device that is always full")
def test_a_disk_that_fills_up_while_logging(tmp_path: Path):
    (tmp_path / "log.jsonl").symlink_to("/dev/full")
    with pytest.raises(LimbeckError, match="could not write .*log.jsonl: No space left on device; earlier checkpoints"):
        path(Plan(3), folder=tmp_path)


def test_the_checkpoint_before_a_torn_one_is_used(tmp_path: Path):
    plan = Plan(9, optimizer={"adam": {"lr": 0.1}}, save_every=2, log_every=1)
    whole, _ = path(plan, Noise())
    with pytest.raises(Interrupted):
        path(plan, Noise(), folder=tmp_path, on_event=raising(6))
    assert saved(tmp_path) == ["step-00000006", "step-00000007"]
    log = tmp_path / "log.jsonl"
    log.write_text(log.read_text() + '{"t": 7, "sta')  # as a power cut leaves it
    file = tmp_path / "checkpoints" / "step-00000007" / checkpoint.FILES[0]
    file.write_bytes(file.read_bytes()[:-40])
    again, _ = path(plan, Noise(), folder=tmp_path, resume=True)
    assert torch.equal(state(again.nets), state(whole.nets)) and again.turns == whole.turns
    assert [json.loads(line)["t"] for line in log.read_text().splitlines()] == list(range(9))
    for manifest in tmp_path.rglob("manifest.json"):
        manifest.write_text("{}")
    with pytest.raises(BadCheckpoint, match="is not a whole checkpoint"):
        path(plan, Noise(), folder=tmp_path, resume=True)


def test_a_checkpoint_of_another_run_is_refused(tmp_path: Path):
    plan = Plan(6, optimizer={"adam": {"lr": 0.1}}, log_every=1)
    with pytest.raises(Interrupted):
        fit(Distill(), classes(), labelled(), plan, folder=tmp_path, on_event=raising(2))

    def go_on(plan: Plan = plan, **other: nn.Module) -> None:
        nets = classes()
        for name, module in other.items():
            setattr(nets, name, module)
        fit(Distill(), nets, labelled(), plan, folder=tmp_path, resume=True)

    log = (tmp_path / "log.jsonl").read_text()
    with pytest.raises(BadCheckpoint, match="made with another 'teacher' network than the one given now"):
        go_on(teacher=nn.Linear(WIDE, 4).double())
    wide = nn.Sequential(nn.Linear(WIDE, 6), nn.Linear(6, 4)).double()
    with pytest.raises(BadCheckpoint, match="made with another 'student' network: ") as said:
        go_on(student=wide)
    assert "\n" not in str(said.value)
    with pytest.raises(BadCheckpoint, match="made with another optimizer of 'student'"):
        go_on(Plan(6, optimizer=SGD))
    assert (tmp_path / "log.jsonl").read_text() == log and saved(tmp_path) == ["step-00000003"]
    go_on()


def test_a_new_run_forgets_the_checkpoints_of_an_old_one(tmp_path: Path):
    with pytest.raises(Interrupted):
        path(Plan(9, log_every=1), folder=tmp_path, on_event=raising(6))
    path(Plan(3, save_every=1, seed=1), folder=tmp_path)
    assert saved(tmp_path) == ["step-00000001", "step-00000002"]


def test_resuming_needs_a_folder():
    with pytest.raises(BadInput, match="resuming needs the run's folder"):
        path(Plan(2), resume=True)


# ---- trackers --------------------------------------------------------------------------------------------------------
@pytest.mark.skipif(find_spec("tensorboard") is None, reason="tensorboard is an extra")
def test_tensorboard_gets_what_the_log_gets(tmp_path: Path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    plan = Plan(5, optimizer=SGD, schedule="linear", log_every=2, validate_every=2)
    with setting.tracking("tensorboard", tmp_path) as accelerator:
        assert isinstance(accelerator, Accelerator)
        path(plan, folder=tmp_path, validate=Scripted([0.25, 0.5, 0.75]), accelerator=accelerator)
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    log = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    for part in log[0]["parts"]:
        found = [(e.step, e.value) for e in events.Scalars(f"student/{part}")]
        assert [t for t, _ in found] == [0, 2, 4]
        assert [v for _, v in found] == pytest.approx(
            [line["parts"][part] for line in log if "parts" in line], rel=1e-6
        )
    assert [e.value for e in events.Scalars("student/lr")] == pytest.approx([0.1, 0.05, 0.0])
    assert [(e.step, e.value) for e in events.Scalars("validation/score")] == [(2, 0.25), (4, 0.5), (5, 0.75)]


def test_a_tracker_that_is_not_there(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    with (
        pytest.raises(BadInput, match="no tracker 'tensorbord'; did you mean `tensorboard`"),
        setting.tracking("tensorbord", tmp_path),
    ):
        pass
    monkeypatch.setattr(setting, "find_spec", lambda name: None)
    with (
        pytest.raises(MissingExtra, match=r"pip install 'limbeck\[track\]'"),
        setting.tracking("tensorboard", tmp_path),
    ):
        pass
    with setting.tracking("", tmp_path) as accelerator:
        assert accelerator.trackers == []
    assert list(tmp_path.iterdir()) == []


# ---- memory ----------------------------------------------------------------------------------------------------------
FAULTS = """
import ctypes, resource, sys
import torch
from limbeck.core import loop

def faults():
    blocks = [torch.ones(2_000_000) for _ in range(4)]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(5):
        del blocks
        blocks = [torch.ones(2_000_000) for _ in range(4)]
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

torch.set_num_threads(1)
loop._keep_memory()
print(faults())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc has to be told")
def test_what_a_step_frees_serves_the_next_one():
    running = []
    for said in ({}, {"MALLOC_TRIM_THRESHOLD_": "0"}):  # what the environment says goes first
        here = os.environ | {"PYTHONPATH": str(ROOT)} | said
        running.append(subprocess.Popen([sys.executable, "-c", FAULTS], env=here, stdout=subprocess.PIPE, text=True))
    kept, given_back = (int(process.communicate(timeout=120)[0]) for process in running)
    assert 10 * kept < given_back
