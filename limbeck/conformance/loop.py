"""What the loop, its checkpoints and its reduction promise whatever the method; seconds in all."""

import json
import random
import signal
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from limbeck.conformance.expect import Broken, close, expect, same_state
from limbeck.core import checkpoint, schedule
from limbeck.core.batches import Batches, Stream, Table
from limbeck.core.errors import BadCheckpoint, Interrupted, LimbeckError
from limbeck.core.loop import Clock, Fitted, Plan, Turn, fit
from limbeck.core.match import Match
from limbeck.core.nets import Batch, Nets
from limbeck.core.reduce import Part, mean
from limbeck.core.state import Ema, Queue, ema_update


@dataclass(frozen=True)
class Regression:
    """The smallest method: least squares, with a second part that counts something else."""

    noise: float = 0.0

    def step(self, nets: Nets, batch: Batch, clock: Clock) -> Iterator[Turn]:
        x = batch["inputs"]
        if self.noise:
            x = x + self.noise * (torch.randn_like(x) + random.random() + float(np.random.rand()))
        error = (nets.student(x)[:, 0] - batch["target"]).square()
        yield "student", {"all": 0.5 * mean(error), "some": mean(error, batch["mask"])}


class Duel:
    """Two players whose losses reach each other's weights."""

    def step(self, nets: Nets, batch: Batch, clock: Clock) -> Iterator[Turn]:
        for player in ("left", "right"):
            yield player, (nets.left(batch["inputs"]) * nets.right(batch["inputs"])).mean()


def _data(size: int = 8) -> Batches:
    g = torch.Generator().manual_seed(0)
    x = torch.randn(32, 3, generator=g)
    columns = {"inputs": x, "target": x @ torch.tensor([1.0, -2.0, 0.5]), "mask": torch.rand(32, generator=g) > 0.6}
    return Batches(Table(columns), size, seed=1)


def _nets(*players: str) -> Nets:
    torch.manual_seed(0)
    return Nets(**{p: nn.Linear(3, 1) for p in players or ("student",)})


def _run(
    plan: Plan, *, method: Any = None, data: Callable[[], Any] | None = None, size: int = 8, **options: Any
) -> Fitted:
    return fit(method or Regression(), _nets(), data() if data else _data(size), plan, **options)


def _weights(nets: Nets, player: str = "student") -> Tensor:
    return torch.cat([p.detach().flatten() for p in nets.find(player).parameters()]).cpu()


def _cut(plan: Plan, at: int, folder: Path, **options: Any) -> Fitted:
    """The same run, stopped by a signal after step `at` and resumed."""

    def stop(event: dict[str, Any]) -> None:
        if event["t"] == at and "parts" in event:
            signal.raise_signal(signal.SIGTERM)

    try:
        _run(plan, folder=folder, on_event=stop, **options)
    except Interrupted:
        return _run(plan, folder=folder, resume=True, **options)
    raise Broken("a signal does not stop the run")


def _by_hand(steps: int, rate: Callable[[int], float], clip: float = 0.0) -> list[Tensor]:
    """The weights after every step of plain gradient descent on `Regression`, written out."""
    nets, data, seen = _nets(), _data(), []
    for t in range(steps):
        batch = next(data)
        error = (nets.student(batch["inputs"])[:, 0] - batch["target"]).square()
        mask = batch["mask"].float()
        loss = 0.5 * error.mean() + (error * mask).sum() / mask.sum().clamp_min(1)
        grads = torch.autograd.grad(loss, list(nets.student.parameters()))
        length = float(torch.cat([g.flatten() for g in grads]).norm())
        factor = min(1.0, clip / length) if clip else 1.0
        with torch.no_grad():
            for p, g in zip(nets.student.parameters(), grads, strict=True):
                p -= rate(t) * factor * g
        seen.append(_weights(nets))
    return seen


def check_gradient_descent(name: str) -> None:
    """The loop does what the textbook does, and the learning rate follows its schedule."""
    plan = Plan(6, optimizer={"sgd": {"lr": 0.1}}, schedule={"cosine": {"warmup": 0.2, "final": 0.1}}, log_every=1)
    seen: list[float] = []
    found = _run(plan, on_event=lambda event: seen.append(event["lr"]))
    rates = [0.1 * schedule.rate(plan.schedule, t / 5) for t in range(6)]
    expect(rates[0] == 0 and max(rates) > 0.09 and abs(rates[-1] - 0.01) < 1e-9, f"the schedule gives {rates}")
    expect(seen == rates, f"the learning rate takes {seen}, its schedule says {rates}")
    close(
        _weights(found.nets), _by_hand(6, lambda t: rates[t])[-1], "the weights after six steps", rtol=1e-5, atol=1e-6
    )


def check_clipping(name: str) -> None:
    """No step is longer than the clipped gradient allows."""
    found = _run(Plan(3, optimizer={"sgd": {"lr": 0.1}}, clip=0.3))
    close(
        _weights(found.nets),
        _by_hand(3, lambda t: 0.1, 0.3)[-1],
        "the weights after clipped steps",
        rtol=1e-4,
        atol=1e-6,
    )


def check_average(name: str) -> None:
    """The average of the weights is that of the weights after every step, and is the result."""
    start, path = _weights(_nets()), _by_hand(5, lambda t: 0.1)
    average = path[0]
    for now in path[1:]:
        average = 0.7 * average + 0.3 * now
    found = _run(Plan(5, optimizer={"sgd": {"lr": 0.1}}, ema=0.7))
    wanted = [average, 0.7**5 * start + sum(0.3 * 0.7 ** (4 - i) * w for i, w in enumerate(path))]
    ok = any(torch.allclose(_weights(found.nets), w, rtol=1e-4, atol=1e-6) for w in wanted)
    expect(ok, "the result is not the moving average of the weights, begun at the start or after the first step")


def _scores(values: list[float]) -> Callable[[Nets], dict[str, float]]:
    left = iter(values)
    return lambda nets: {"score": next(left), "weight": float(_weights(nets)[0])}


def check_best_weights(name: str) -> None:
    """The weights of the best validation are the result, also when the run was stopped after it."""
    plan = Plan(6, optimizer={"sgd": {"lr": 0.1}}, validate_every=1, select="score", log_every=1)
    scores, best = [0.1, 0.2, 0.9, 0.3, 0.4, 0.5], _by_hand(6, lambda t: 0.1)[2]
    found = _run(plan, validate=_scores(scores))
    close(_weights(found.nets), best, "the weights chosen by validation", rtol=1e-4, atol=1e-6)
    expect(found.best is not None and found.best["score"] == 0.9, f"the best validation is said to be {found.best}")
    lowest = _run(
        Plan(6, optimizer={"sgd": {"lr": 0.1}}, validate_every=1, select="score", maximise=False),
        validate=_scores([-s for s in scores]),
    )
    close(_weights(lowest.nets), best, "the weights chosen by the lowest score", rtol=1e-4, atol=1e-6)
    with tempfile.TemporaryDirectory() as root:
        validate = _scores([*scores[:5], *scores[5:]])
        again = _cut(plan, 4, Path(root), validate=validate)
    close(_weights(again.nets), best, "the weights chosen by a run that was stopped", rtol=1e-4, atol=1e-6)


def check_resume_with_everything(name: str) -> None:
    """Moments, schedules, averages, selection, three random generators and the place in the data survive a stop."""
    kinds: list[tuple[Any, Callable[[], Any]]] = [
        ({"adam": {"lr": 0.05}}, _data),
        ({"sgd": {"lr": 0.05, "momentum": 0.9}}, lambda: Stream([next(d) for d in [_data()] for _ in range(4)])),
        ({"adam": {"lr": 0.05}}, lambda: (batch for batch in _data())),  # cannot tell its place
    ]
    for optimizer, data in kinds:
        plan = Plan(8, optimizer=optimizer, schedule="cosine", ema=0.8, clip=1.0, log_every=1)
        method = Regression(noise=0.5)
        whole = _run(plan, method=method, data=data)
        for at in (0, 3, 7):
            with tempfile.TemporaryDirectory() as root:
                again = _cut(plan, at, Path(root), method=method, data=data)
            same = torch.equal(_weights(again.nets), _weights(whole.nets))
            expect(same, f"stopped after step {at}, the run ends elsewhere")
            expect(again.turns == whole.turns, f"stopped after step {at}, the run logs other values")


def check_resume_after_a_crash(name: str) -> None:
    """A run that dies between two checkpoints goes on from the last one, and its log holds every step once."""
    plan = Plan(7, optimizer={"adam": {"lr": 0.05}}, save_every=2, log_every=1)

    def die(event: dict[str, Any]) -> None:
        if event["t"] == 4:
            raise KeyError("power cut")

    with tempfile.TemporaryDirectory() as root:
        whole = _run(plan, folder=Path(root) / "whole")
        try:
            _run(plan, folder=Path(root) / "cut", on_event=die)
        except KeyError:
            again = _run(plan, folder=Path(root) / "cut", resume=True)
        else:
            raise Broken("what a listener raises does not come through")
        expect(torch.equal(_weights(again.nets), _weights(whole.nets)), "after a crash the run ends elsewhere")
        logs = [(Path(root) / f / "log.jsonl").read_text().splitlines() for f in ("whole", "cut")]
        steps = [[(json.loads(line)["t"], json.loads(line)["loss"]) for line in log] for log in logs]
        expect(
            steps[0] == steps[1],
            f"the log of a run that crashed has {len(steps[1])} lines, it should have {len(steps[0])}",
        )


def check_uneven_halves(name: str) -> None:
    """Micro-batches that count differently many elements add up to the mean over the whole step."""
    plans = [Plan(4, optimizer={"sgd": {"lr": 0.1}}, accumulate=k, log_every=1) for k in (1, 2, 4)]
    runs = [_run(plan, size=8 // plan.accumulate) for plan in plans]
    for plan, run in zip(plans[1:], runs[1:], strict=True):
        what = f"the weights after steps in {plan.accumulate} pieces"
        close(_weights(run.nets), _weights(runs[0].nets), what, rtol=1e-5, atol=1e-6)
        for (_, _, _, a), (_, _, _, b) in zip(run.turns, runs[0].turns, strict=True):
            for key in a:
                expect(
                    abs(a[key] - b[key]) <= 1e-5 * abs(b[key]) + 1e-7,
                    f"part {key!r} is logged as {a[key]}, it is {b[key]}",
                )


def check_turns_are_apart(name: str) -> None:
    """A turn moves its own player; what the backward pass left on others is dropped, not kept for their turn."""
    nets = _nets("left", "right")
    with torch.no_grad():
        for p in nets.right.parameters():
            p.add_(0.3)
    left, bias_left, right, bias_right = (
        nets.find(player).get_parameter(key).detach().clone()
        for player in ("left", "right")
        for key in ("weight", "bias")
    )
    batch = next(_data())["inputs"]
    fit(Duel(), nets, _data(), Plan(1, optimizer={"sgd": {"lr": 0.1}}))
    by_right = batch @ right.T + bias_right
    left = left - 0.1 * (by_right * batch).mean(0, keepdim=True)
    bias_left = bias_left - 0.1 * by_right.mean(0)
    right = right - 0.1 * ((batch @ left.T + bias_left) * batch).mean(0, keepdim=True)
    close(nets.left.weight.cpu(), left, "the first player after its turn", rtol=1e-5, atol=1e-6)
    close(
        nets.right.weight.cpu(),
        right,
        "the second player, whose turn comes after the first has moved,",
        rtol=1e-5,
        atol=1e-6,
    )
    expect(
        all(p.grad is None for m in nets.modules.values() for p in m.parameters()), "a gradient is kept after the run"
    )


def check_reduction(name: str) -> None:
    """The mean is over what counts, masked places have no influence, and of nothing it is 0 with a zero gradient."""
    values = torch.tensor([1.0, 2.0, 4.0, torch.nan], requires_grad=True)
    mask = torch.tensor([True, False, True, False])
    part = mean(values, mask)
    expect(part.value.item() == 2.5, f"the mean of 1 and 4 is said to be {part.value.item()}")
    expect(float(0.5 * part) == 1.25, "a weight times a part does not multiply its mean")
    (grad,) = torch.autograd.grad(part.value, values)
    expect(torch.equal(grad, torch.tensor([0.5, 0.0, 0.5, 0.0])), f"the gradient of a masked mean is {grad.tolist()}")
    nothing = mean(values, torch.zeros(4, dtype=torch.bool))
    (grad,) = torch.autograd.grad(nothing.value, values)
    expect(nothing.value.item() == 0 and not grad.any(), "the mean of nothing is not 0 with a zero gradient")
    expect(mean(torch.ones(2, 3)).value.item() == 1, "the mean of [B, T] is not over its elements")
    tokens, rows = torch.ones(2, 3), torch.tensor([True, False])
    expect(
        mean(tokens, rows).value.item() == 1 and float(mean(tokens, rows).count) == 3,
        "a mask of rows does not reach their tokens",
    )
    expect(
        isinstance(mean(torch.ones(())), Part) and mean(torch.ones(())).count == 1, "a single value does not count once"
    )


def check_checkpoints(name: str) -> None:
    """A checkpoint comes back bit for bit; a torn or altered one is found out, and the one before is used."""
    tied = torch.randn(3)
    tree = {
        "a": [torch.randn(4), (1, None, "x")],
        3: {"b": tied, "c": tied},
        "flag": True,
        "half": torch.ones(2).bfloat16(),
    }
    with tempfile.TemporaryDirectory() as root:
        folder = Path(root)
        first, second = (checkpoint.save(folder, step, {**tree, "step": step}) for step in (1, 2))
        found = checkpoint.load(first)
        expect(
            found["a"][1] == (1, None, "x") and found[3]["b"].equal(tied) and found["flag"] is True,
            "a checkpoint comes back altered",
        )
        expect(found["half"].dtype == torch.bfloat16, "a checkpoint changes precision")
        latest = checkpoint.latest(folder)
        expect(latest is not None and latest[0]["step"] == 2, "the newest checkpoint is not the one that is used")
        for file in checkpoint.FILES:
            whole = (second / file).read_bytes()
            for torn in (whole[: len(whole) // 2], whole[:-1] + bytes([whole[-1] ^ 1]), b""):
                (second / file).write_bytes(torn)
                latest = checkpoint.latest(folder)
                expect(latest is not None and latest[0]["step"] == 1, f"a checkpoint with a torn {file} is used")
            (second / file).write_bytes(whole)
        for path in (first, second):
            (path / "manifest.json").write_text("{")
        try:
            checkpoint.latest(folder)
        except BadCheckpoint:
            return
        raise Broken("all checkpoints are torn, and nobody says so")


def check_failed_save(name: str) -> None:
    """A save that fails half-way leaves the checkpoints before it as they were, and nothing half-written."""
    with tempfile.TemporaryDirectory() as root:
        folder = Path(root)
        checkpoint.save(folder, 1, {"x": torch.ones(2)})
        checkpoint.save(folder, 2, {"x": torch.ones(2)})
        real = checkpoint._sync

        def broken(path: Path) -> None:
            raise OSError(28, "No space left on device")

        checkpoint._sync = broken
        try:
            checkpoint.save(folder, 2, {"x": torch.zeros(2)})
        except LimbeckError as error:
            expect("full" in str(error), f"a full disk is reported as: {error}")
        else:
            raise Broken("a save that cannot reach the disk says that it worked")
        finally:
            checkpoint._sync = real
        latest = checkpoint.latest(folder)
        expect(
            latest is not None and latest[0]["x"].equal(torch.ones(2)),
            "a failed save destroys the checkpoint that it replaces",
        )
        left = sorted(p.name for p in folder.iterdir() if not p.name.startswith("step-"))
        expect(not left, f"a failed save leaves {left} behind")


def check_frozen_networks(name: str) -> None:
    """A teacher is frozen by its name: eval mode and no gradient, also when others are put in training mode."""
    nets = Nets(teacher=nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)), student=nn.Linear(3, 1))
    before = {k: v.clone() for k, v in nets.teacher.state_dict().items()}
    nets.train()
    out = nets.run("teacher", {"inputs": torch.randn(4, 3)})["logits"]
    expect(
        not out.requires_grad and not any(p.requires_grad for p in nets.teacher.parameters()),
        "a teacher asks for a gradient",
    )
    expect(not any(m.training for m in nets.teacher.modules()), "a teacher is in training mode")
    expect(not same_state(nets.teacher.state_dict(), before), "running a teacher moves its statistics")
    expect(nets.student.training, "a student is not in training mode")


def check_moving_average(name: str) -> None:
    """core/state: the average takes its share, and gives the module its own weights back."""
    module = nn.Linear(1, 1, bias=False)
    with torch.no_grad():
        module.weight.fill_(0.0)
    ema = Ema(module, 0.75)
    with torch.no_grad():
        module.weight.fill_(4.0)
    ema.update(module)
    with ema.swapped(module):
        expect(
            module.weight.item() == 1.0, f"the average of 0 and 4 at decay 0.75 is said to be {module.weight.item()}"
        )
    expect(module.weight.item() == 4.0, "after a look at the average the module does not have its own weights")
    norms = [nn.BatchNorm1d(1) for _ in range(2)]
    with torch.no_grad():
        norms[0].weight.fill_(0.0)
        norms[1].weight.fill_(4.0)
    norms[1].running_mean = torch.full((1,), 7.0)
    ema_update(norms[0], norms[1], 0.75)
    expect(
        norms[0].weight.item() == 1.0, f"ema_update takes 0 to {norms[0].weight.item()} towards 4 at decay 0.75, not 1"
    )
    expect(norms[0].running_mean == 7.0, "ema_update does not copy statistics")


def check_queue(name: str) -> None:
    """core/state: first in, first out, and what is held is state."""
    queue = Queue(3, 1)
    for row in range(4):
        queue.push(torch.full((1, 1), float(row)))
    expect(
        sorted(queue.read().flatten().tolist()) == [1, 2, 3],
        f"after 0, 1, 2, 3 a queue of three holds {queue.read().tolist()}",
    )
    again = Queue(3, 1)
    again.load_state_dict(queue.state_dict())
    for one in (queue, again):
        one.push(torch.full((1, 1), 4.0))
    expect(again.read().equal(queue.read()), "a loaded queue goes on differently")


def check_matching(name: str) -> None:
    """core/match: weights and knobs, plain or on a schedule, reach the loss; the mask reaches the mean."""
    scaled: Callable[..., Tensor] = lambda student_logits, *, scale=1.0: scale * student_logits
    have = {"student_logits": torch.tensor([1.0, 3.0, 50.0]), "mask": torch.tensor([True, True, False])}
    match = Match("scaled", scaled, {"scale": {"linear": [1.0, 3.0]}}, weight={"linear": [1.0, 0.0]})
    for progress, wanted in ((0.0, 2.0), (0.25, 0.75 * 1.5 * 2.0), (1.0, 0.0)):
        found = float(match.part(have, progress))
        expect(abs(found - wanted) < 1e-6, f"at progress {progress} a scheduled loss is {found}, not {wanted}")
