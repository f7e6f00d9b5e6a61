"""The one loop. It owns seeds, turns, optimisers, accumulation, clipping, averages and checkpoints; it knows no method.

A method's `step` is a generator that yields (player, loss or parts). The loop runs backward, keeps only that player's
gradients, steps its optimiser and resumes the generator. Gradient averaging over processes is done here, for the
player whose turn it is: DistributedDataParallel would wait in every backward pass for the parameters of networks that
have no turn.
"""

import ctypes
import json
import math
import os
import random
import shutil
import signal
import sys
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, field
from functools import cache
from itertools import chain
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from limbeck.core import checkpoint, optim, schedule, shard
from limbeck.core.batches import generator
from limbeck.core.errors import BadCheckpoint, BadInput, Diverged, Interrupted, LimbeckError, nearest
from limbeck.core.nets import Batch, Nets
from limbeck.core.reduce import Part, mean
from limbeck.core.state import Ema
from limbeck.core.turns import FILE, StageTurns, TurnRecord

Parts = Tensor | Part | Mapping[str, Tensor | Part]
Turn = tuple[str, Parts]


@dataclass(frozen=True)
class Clock:
    """When it is. t: step within the stage. steps: of the stage. stage: index. epoch: passes over the data so far."""

    t: int
    steps: int
    stage: int = 0
    epoch: int = 0
    late: float = 0.0  # share of a time limit that is used up

    @property
    def progress(self) -> float:
        """Training progress within the stage, 0 at the first step and 1 at the last."""
        return max(self.t / max(1, self.steps - 1), self.late)


class Stage(NamedTuple):
    """One stage of a method.

    steps: its length. pool: which of several data pools it reads, '' for the only one. until: the share of a time limit
    that is used up when it ends. validated: whether the network that validation looks at learns in this stage.
    """

    steps: int
    name: str = ""
    pool: str = ""
    until: float = 1.0
    validated: bool = True


class Method(Protocol):
    """What the loop asks of a training method. Optional besides `step`: setup(nets, probe), stages(nets, steps),
    after(nets, player, clock), optimizers() with the paper's default optimiser of each player, and figures(nets): what
    a run has cost or counted, by name, such as {"labels_bought": 40.0}, read from buffers of `nets`, for the report.
    `dataless = True` promises that of a batch only its size and shapes are read: pictures are made, not looked at."""

    def step(self, nets: Nets, batch: Batch, clock: Clock) -> Iterator[Turn]:
        """Yield (player, loss or parts) for each turn on one batch."""
        ...


@dataclass(frozen=True)
class Plan:
    """How long and how to train.

    steps: optimiser steps (a method may share them out over stages). optimizer: default for every player.
    optimizers: by player (or its root name), before the method's own defaults. schedule: of the learning rate.
    accumulate: micro-batches a step. clip: largest gradient norm of a player. precision: "fp32", "bf16" or "fp16"
    autocast. ema: decay of an average of each trained network, used for validation and as the result; its companions,
    which may remember more than weights, stay as they are. max_minutes: stop then, and count progress by time.
    validate_every, save_every, log_every: in steps; 0 is never (the log: first and last step). select: name of the
    validation metric by which the best weights are kept, '' for the last.
    """

    steps: int
    optimizer: Any = field(default_factory=lambda: {"adam": {"lr": 1e-3}})
    optimizers: Mapping[str, Any] = field(default_factory=dict)
    schedule: Any = "constant"
    accumulate: int = 1
    clip: float | None = None
    precision: str = "fp32"
    ema: float | None = None
    max_minutes: float | None = None
    validate_every: int = 0
    save_every: int = 0
    log_every: int = 10
    select: str = ""
    maximise: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("steps", "accumulate"):
            if getattr(self, name) < 1:
                raise BadInput(f"`{name}` must be at least 1, got {getattr(self, name)}")
        if self.precision not in ("fp32", "bf16", "fp16"):
            raise BadInput(f"`precision` must be fp32, bf16 or fp16, got {self.precision!r}")


@dataclass
class Fitted:
    """What came out. turns: (stage, t, player, {part: value}) of each logged turn; validations: (stage, t, metrics);
    trained: who had how many turns in each stage."""

    nets: Nets
    turns: list[tuple[int, int, str, dict[str, float]]]
    validations: list[tuple[int, int, dict[str, float]]]
    steps: int
    seconds: float
    best: dict[str, float] | None = None
    trained: list[StageTurns] = field(default_factory=list)


Validate = Callable[[Nets], dict[str, float]]


def fit(
    method: Method,
    nets: Nets,
    data: Iterable[Batch] | Mapping[str, Iterable[Batch]],
    plan: Plan,
    *,
    validate: Validate | None = None,
    folder: Path | None = None,
    resume: bool = False,
    on_event: Callable[[dict[str, Any]], None] | None = None,
    accelerator: Accelerator | None = None,
) -> Fitted:
    """Train `nets` by `method` on `data` (or pools of data by name), for `plan.steps` optimiser steps.

    folder: where log.jsonl and checkpoints go; without it nothing is written. resume: go on from the newest whole
    checkpoint there; method, networks and data must be built as they were at first. Raises Interrupted after SIGTERM
    or Ctrl-C, with the state saved. The global random state outside is left as it was.
    """
    outside, accelerator = _rng(), accelerator or Accelerator()
    if accelerator.device.type == "cpu":
        _keep_memory()
    try:
        return _Run(method, nets, data, plan, validate, folder, on_event, accelerator).go(resume)
    finally:
        _set_rng(outside)


class _Run:
    def __init__(
        self,
        method: Method,
        nets: Nets,
        data: Iterable[Batch] | Mapping[str, Iterable[Batch]],
        plan: Plan,
        validate: Validate | None,
        folder: Path | None,
        on_event: Callable[[dict[str, Any]], None] | None,
        accelerator: Accelerator,
    ) -> None:
        self.method, self.nets, self.plan, self.validate = method, nets, plan, validate
        self.folder, self.on_event, self.accelerator = folder, on_event, accelerator
        self.pools: dict[str, Iterable[Batch]] = dict(data) if isinstance(data, Mapping) else {"": data}
        self.world, self.main = accelerator.num_processes, accelerator.is_main_process
        self.defaults: dict[str, Any] = method.optimizers() if hasattr(method, "optimizers") else {}
        self.optimizers: dict[str, torch.optim.Optimizer] = {}
        self.emas: dict[str, Ema] = {}
        self.best: tuple[float, dict[str, float], dict[str, Any]] | None = None
        self.scaler = torch.amp.GradScaler(accelerator.device.type, enabled=plan.precision == "fp16")
        self.done, self.before, self.began = 0, 0.0, time.monotonic()
        self.fitted = Fitted(nets, [], [], 0, 0.0)
        self.latest: list[tuple[str, dict[str, Tensor]]] = []  # the turns of the last step
        self.record = TurnRecord()
        self.signal = 0
        self.plain: weakref.WeakKeyDictionary[nn.Module, nn.Module] = weakref.WeakKeyDictionary()
        self.stage, self.stage_began = Stage(plan.steps), 0.0
        self.drawn: dict[str, int] = {}  # batches taken from pools that cannot tell their position
        self.skipped: dict[str, Iterator[Batch]] = {}

    # ---- the run as a whole ----------------------------------------------------------------------------------------
    def go(self, resume: bool) -> Fitted:
        _seed(self.plan.seed)  # what `setup` makes is the same on every process
        shard.check(self.nets, self.accelerator)
        self.nets.to(self.accelerator.device)
        probe, self.pools = self._peek()
        if hasattr(self.method, "setup"):
            self.method.setup(self.nets, probe)
            self.nets.to(self.accelerator.device)  # also what was put into a network that was there already
        _seed(self.plan.seed + self.accelerator.process_index)  # and then each draws its own noise
        self.initial = {name: _mark(module) for name, module in self.nets.modules.items() if name in self.nets.frozen}
        self.prints = {n: checkpoint.fingerprint(self.nets.modules[n]) for n in self.initial} if self.folder else {}
        state = self._find_checkpoint() if resume else None
        with ExitStack() as stack:
            stack.enter_context(self._signals())
            self.log = stack.enter_context(self._open_log(state))
            for index, stage in enumerate(self._stages()):
                if state is not None and index < state["stage"]:
                    continue
                start = 0
                if state is not None:
                    start = self._restore(state, stage)
                    state = None
                self._stage(index, stage, start)
            shard.restore(self.nets, self.plain)
            shard.agree(self.nets)
        self.fitted.steps, self.fitted.seconds = self.done, self._elapsed()
        self.fitted.trained = self.record.stages
        return self.fitted

    def _stages(self) -> Iterator[Stage]:
        if not hasattr(self.method, "stages"):
            yield Stage(self.plan.steps)
            return
        for stage in self.method.stages(self.nets, self.plan.steps):
            yield stage if isinstance(stage, Stage) else Stage(int(stage))

    def _stage(self, index: int, stage: Stage, start: int) -> None:
        if start == 0:  # each stage starts with its own optimisers, averages and selection
            self.optimizers, self.emas, self.best = {}, {}, None
            self.stage_began = self._time_used()
            self.record.stage(stage.name, stage.steps, self._elapsed())
        self.stage = stage
        pool = self._pool(stage)
        batches = self._stream(stage.pool)
        shard.agree(self.nets)
        shard.prepare(self.nets, self.accelerator, self.plain)
        t, plan = start, self.plan
        late = self._late()
        while t < stage.steps and late < 1:
            self.nets.train()
            micro = [self._to_device(self._draw(batches, stage.pool)) for _ in range(plan.accumulate)]
            self._step(micro, Clock(t, stage.steps, index, getattr(pool, "epoch", 0), late))
            t, self.done = t + 1, self.done + 1
            late = self._late()
            last = t == stage.steps or late >= 1
            if self.validate and stage.validated and (last or (plan.validate_every and t % plan.validate_every == 0)):
                self._validate(index, t)
            if self._stop_asked(t):
                where = self._save(index, t)
                raise Interrupted(str(where or "nowhere: no folder was given"))
            if self.folder and plan.save_every and t % plan.save_every == 0 and not last:
                self._save(index, t)
        self._close_stage()
        self._write_turns()

    def _close_stage(self) -> None:
        """The stage's result: the best weights by validation, else the average, else the last."""
        if self.best is not None:
            _, self.fitted.best, weights = self.best
            for name, state in weights.items():
                shard.load(self.nets.find(name), state)
        else:
            for player, ema in self.emas.items():
                self.nets.find(player).load_state_dict(ema.shadow)

    # ---- one optimiser step ----------------------------------------------------------------------------------------
    def _step(self, micro: list[Batch], clock: Clock) -> None:
        turns: list[tuple[str, dict[str, Tensor]]] = []
        self.record.step()
        generators = [self.method.step(self.nets, batch, clock) for batch in micro]
        while (turn := self._backward(generators)) is not None:
            player, parts = turn
            shard.reshard(self.nets, self.accelerator)
            params = self.nets.params(player)
            keep = {id(p) for p in params}
            for name, module in self.nets.modules.items():
                if name == player or name in self.nets.frozen:
                    continue  # all of it is kept, or has no gradient
                for p in module.parameters():
                    if p.grad is not None and id(p) not in keep:
                        p.grad = None
            optimizer = self._optimizer(player, params)
            factor = schedule.rate(self.plan.schedule, clock.progress)
            for group in optimizer.param_groups:
                group["lr"] = group["initial_lr"] * factor
            if self.world > 1:
                shard.sum_gradients(params, shard.factor(self.accelerator))
            if self.plan.clip is not None:
                self.scaler.unscale_(optimizer)
                nn.utils.clip_grad_norm_(params, self.plan.clip)
            self.scaler.step(optimizer)
            self.scaler.update()
            optimizer.zero_grad(set_to_none=True)
            if self.plan.ema is not None:
                if player not in self.emas:
                    self.emas[player] = Ema(self.nets.find(player), self.plan.ema)
                self.emas[player].update(self.nets.find(player))
            if hasattr(self.method, "after"):
                self.method.after(self.nets, player, clock)
            turns.append((player, parts))
            self._log_turn(player, parts, clock, optimizer)
            self.record.turn(player, parts, clock.t, optimizer)
        self.latest = turns

    def _backward(self, generators: list[Iterator[Turn]]) -> tuple[str, dict[str, Tensor]] | None:
        """Advance every micro-batch by one yield and leave the gradient of the mean over all of them in .grad.

        Not `backward(inputs=...)`: under FSDP2 the sharded parameters are outside the graph and silently miss it.
        """
        turns: list[tuple[str, dict[str, Part]]] = []
        sums: _Sums | None = None
        ended = False
        for i, moves in enumerate(generators):
            with torch.autocast(
                self.accelerator.device.type,
                torch.bfloat16 if self.plan.precision == "bf16" else torch.float16,
                enabled=self.plan.precision != "fp32",
            ):
                move = next(moves, None)
            if i and (move is None) != ended:
                raise LimbeckError("the micro-batches of one step took different turns")
            ended = move is None
            if move is None:
                continue  # the others still have to do what comes after their last turn
            player, parts = move[0], _parts(move[1])
            turns.append((player, parts))
            if len(generators) == 1:
                counts = self._global([part.count for part in parts.values()])
                values = {n: _divided(p, count) for (n, p), count in zip(parts.items(), counts, strict=True)}
                loss = sum(values.values(), torch.zeros(()))
                self.scaler.scale(loss * shard.factor(self.accelerator)).backward()
                return player, {name: value.detach() for name, value in values.items()}
            if player != turns[0][0]:
                raise LimbeckError(f"micro-batches yielded {turns[0][0]!r} and {player!r} in one turn")
            sums = sums or _Sums(lambda: self.nets.params(turns[0][0]), parts, self._global)
            sums.add(parts, lambda x: self.scaler.scale(x * shard.factor(self.accelerator)))
        if ended:
            return None
        assert sums is not None
        return turns[0][0], sums.finish()

    def _global(self, counts: list[Tensor | int]) -> list[Tensor | int]:
        """Counts over all processes, each at least 1."""
        if self.world > 1:
            counts = list(self._over_processes(counts))
        return [c.clamp_min(1) if isinstance(c, Tensor) else max(c, 1) for c in counts]

    def _over_processes(self, numbers: Sequence[Tensor | float]) -> Tensor:
        """Sums over all processes."""
        device = self.accelerator.device
        kind = torch.float32 if device.type == "mps" else torch.float64
        mine = torch.stack([torch.as_tensor(n, dtype=kind, device=device) for n in numbers])
        total: Tensor = self.accelerator.reduce(mine, reduction="sum")
        return total

    def _optimizer(self, player: str, params: list[nn.Parameter]) -> torch.optim.Optimizer:
        if player not in self.optimizers:
            root = player.split(".")[0]
            for choice in (self.plan.optimizers, self.defaults):
                spec = choice.get(player, choice.get(root))
                if spec is not None:
                    break
            if not params:
                raise LimbeckError(f"the method yields {player!r}, which has no trainable parameters")
            self.optimizers[player] = optim.build(spec or self.plan.optimizer, params)
        return self.optimizers[player]

    # ---- validation, log, time -------------------------------------------------------------------------------------
    def _validate(self, stage: int, t: int) -> None:
        assert self.validate is not None
        with ExitStack() as stack, torch.no_grad():
            for player, ema in self.emas.items():
                stack.enter_context(ema.swapped(self.nets.find(player)))
            for module in self.nets.modules.values():
                module.eval()
            before = _rng()
            metrics = shard.first(self.validate(self.nets))
            _set_rng(before)  # looking must not change what follows
            select = self.plan.select
            if select and select not in metrics:
                raise BadInput(f"validation gives no {select!r} to select by{nearest(select, metrics)}")
            score = metrics.get(select, math.nan) * (1 if self.plan.maximise else -1)
            if not math.isnan(score) and (self.best is None or score > self.best[0]):
                weights = {
                    name: {k: v.detach().cpu().clone() for k, v in shard.full(self.nets.find(name)).items()}
                    for name in self._kept()
                }
                self.best = (score, metrics, weights)
        self.nets.train()
        self.fitted.validations.append((stage, t, metrics))
        self._write({"t": t, "stage": stage, "validation": metrics})

    def _kept(self) -> list[str]:
        """Whose weights are kept with the best: who has been trained, what trains with them, and the result."""
        names = [name for player in self.optimizers for name in (player, *self.nets.companions.get(player, ()))]
        result = getattr(self.method, "learner", "student")
        if result.split(".")[0] in self.nets:  # an average, say, which moves without a turn
            names.append(result)
        return list(dict.fromkeys(names))

    def _log_turn(self, player: str, parts: dict[str, Tensor], clock: Clock, optimizer: torch.optim.Optimizer) -> None:
        every = self.plan.log_every
        if not (clock.t == 0 or clock.t == clock.steps - 1 or (every and clock.t % every == 0)):
            return  # reading a loss waits for the device: only when it is wanted
        values = self._values(player, parts, clock.t)
        self.fitted.turns.append((clock.stage, clock.t, player, values))
        line = {"t": clock.t, "stage": clock.stage, "player": player, "loss": sum(values.values()), "parts": values}
        self._write(
            {**line, "lr": optimizer.param_groups[0]["lr"], "seconds": round(self._elapsed(), 3), "steps": clock.steps}
        )

    def _values(self, player: str, parts: dict[str, Tensor], t: int) -> dict[str, float]:
        """The parts as numbers, summed over processes. Raises Diverged when one is not finite."""
        values = [float(part) for part in parts.values()]
        if self.world > 1:  # each process has its own elements, divided by the count of all
            values = self._over_processes(values).tolist()
        for name, value in zip(parts, values, strict=True):
            if not math.isfinite(value):
                raise Diverged(
                    f"part {name!r} of {player!r} became {value} at step {t}; "
                    "lower its learning rate or weight, clip gradients, or train in fp32"
                )
        return dict(zip(parts, values, strict=True))

    def _write(self, line: dict[str, Any]) -> None:
        if not self.main:
            return
        if self.log is not None:
            try:
                self.log.write(json.dumps(line).encode() + b"\n")
            except OSError as error:
                where = f"could not write {self.log.name}: {error.strerror}"
                raise LimbeckError(f"{where}; earlier checkpoints are intact") from error
        if self.accelerator.trackers:
            root = line.get("player", "validation")
            values = line["parts"] | {"lr": line["lr"]} if "parts" in line else line["validation"]
            self.accelerator.log({f"{root}/{name}": value for name, value in values.items()}, step=self.done)
        if self.on_event is not None:
            self.on_event(line)

    def _write_turns(self) -> None:
        if self.folder is None or not self.main:
            return
        try:
            self.record.write(self.folder, self._elapsed())
        except OSError as error:
            where = f"could not write {self.folder / FILE}: {error.strerror}"
            raise LimbeckError(f"{where}; earlier checkpoints are intact") from error

    def _open_log(self, state: dict[str, Any] | None) -> Any:
        if self.folder is None or not self.main:
            return nullcontext()
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / "log.jsonl"
        if state is None:
            for old in (self.folder / "checkpoints").glob("step-*"):
                shutil.rmtree(old)  # a new run must never go on from the state of an old one
            (self.folder / FILE).unlink(missing_ok=True)
        elif path.exists():
            with path.open("r+b") as file:  # what was logged after the checkpoint will be logged again
                file.truncate(min(state["log"], path.stat().st_size))
        return path.open("ab" if state is not None else "wb", buffering=0)  # nothing is left to fail in closing

    def _elapsed(self) -> float:
        return self.before + time.monotonic() - self.began

    def _time_used(self) -> float:
        """Share of the time limit of the run that is used up, by the first process's watch."""
        return shard.first(self._elapsed()) / 60 / self.plan.max_minutes if self.plan.max_minutes else 0.0

    def _late(self) -> float:
        """Share of the stage's part of the time limit that is used up."""
        if not self.plan.max_minutes:
            return 0.0
        part = self.stage.until - self.stage_began
        return (self._time_used() - self.stage_began) / part if part > 0 else 1.0

    # ---- data ------------------------------------------------------------------------------------------------------
    def _peek(self) -> tuple[Batch, dict[str, Iterable[Batch]]]:
        """One batch of the first pool, without using it up."""
        name, first = next(iter(self.pools.items()))
        pools = dict(self.pools)
        batches = iter(first)
        try:
            probe = next(batches)
        except StopIteration:
            raise BadInput("the training data is empty") from None
        if hasattr(first, "load_state_dict"):
            first.load_state_dict({"position": 0})
        elif batches is first:
            pools[name] = chain([probe], batches)
        told = {"examples": len(getattr(first, "table", ())), "steps_per_pass": getattr(first, "steps_per_pass", 0)}
        return self._to_device(probe) | told, pools

    def _pool(self, stage: Stage) -> Iterable[Batch]:
        if stage.pool not in self.pools:
            raise BadInput(f"stage {stage.name!r} reads the data pool {stage.pool!r}, there is {', '.join(self.pools)}")
        return self.pools[stage.pool]

    def _stream(self, name: str) -> Iterator[Batch]:
        """The batches of a pool for a new stage: from its start when it can be started again."""
        if name in self.skipped:
            return self.skipped.pop(name)
        batches = iter(self.pools[name])
        if batches is not self.pools[name]:
            self.drawn[name] = 0
        return batches

    def _draw(self, batches: Iterator[Batch], name: str) -> Batch:
        try:
            batch = next(batches)
        except StopIteration:
            raise BadInput(
                f"the data{f' pool {name!r}' if name else ''} ended after {self.drawn.get(name, 0)} batches; training "
                "needs an endless stream (limbeck.core.batches.Stream repeats any list or DataLoader)"
            ) from None
        self.drawn[name] = self.drawn.get(name, 0) + 1
        return batch

    def _to_device(self, batch: Batch) -> Batch:
        device = self.accelerator.device
        return {k: v.to(device, non_blocking=True) if isinstance(v, Tensor) else v for k, v in batch.items()}

    # ---- interruption, saving, resuming ----------------------------------------------------------------------------
    def _signals(self) -> ExitStack:
        """Note SIGTERM and Ctrl-C, to be served between steps; a second one is served at once."""
        stack = ExitStack()

        def note(number: int, _frame: FrameType | None) -> None:
            self.signal = number
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)

        for number in (signal.SIGINT, signal.SIGTERM):
            try:
                old = signal.signal(number, note)
            except ValueError:  # not in the main thread: its owner deals with signals
                break
            stack.callback(signal.signal, number, signal.SIG_DFL if old is None else old)
        return stack

    def _stop_asked(self, t: int) -> bool:
        if self.world > 1:
            if t % max(1, self.plan.log_every):
                return False  # processes agree only now and then: it costs a collective
            return bool(self._over_processes([self.signal]))
        return bool(self.signal)

    def _save(self, stage: int, t: int) -> Path | None:
        if self.folder is None:
            return None
        for player, parts in self.latest:
            self._values(player, parts, t - 1)  # a checkpoint of a run that is lost would replace one that is not
        nets = self.nets
        whole = [
            n for n in nets.modules if self.initial.get(n) != _mark(nets.modules[n])
        ]  # frozen ones may be averaged
        tree = {
            "stage": stage,
            "t": t,
            "done": self.done,
            "elapsed": self._elapsed(),
            "stage_began": self.stage_began,
            "drawn": self.drawn,
            "log": self.log.tell() if self.log else 0,
            "nets": {n: shard.full(nets.modules[n]) for n in whole},
            "frozen": {n: p for n, p in self.prints.items() if n not in whole},
            "optimizers": {p: shard.full_optimizer(o) for p, o in self.optimizers.items()},
            "emas": {p: shard.whole(e.shadow) for p, e in self.emas.items()},
            "best": self.best,
            "data": {name: pool.state_dict() for name, pool in self.pools.items() if hasattr(pool, "state_dict")},
            "rng": shard.gather_objects(_rng()),
            "scaler": self.scaler.state_dict(),
            "turns": self.fitted.turns,
            "validations": self.fitted.validations,
            "trained": self.record.state(self._elapsed()),
        }
        self._write_turns()
        return checkpoint.save(self.folder / "checkpoints", self.done, tree) if self.main else self.folder

    def _find_checkpoint(self) -> dict[str, Any] | None:
        if self.folder is None:
            raise BadInput("resuming needs the run's folder")
        found = checkpoint.latest(self.folder / "checkpoints")
        return found[0] if found else None

    def _restore(self, state: dict[str, Any], stage: Stage) -> int:
        nets = self.nets
        for name, print_ in state["frozen"].items():
            if self.prints.get(name) != print_:
                raise BadCheckpoint(f"the checkpoint was made with another {name!r} network than the one given now")
        shard.prepare(nets, self.accelerator, self.plain)
        for name, weights in state["nets"].items():
            if name not in nets:
                raise BadCheckpoint(f"the checkpoint holds a network {name!r} that this method does not have")
            try:
                shard.load(nets.modules[name], weights)
            except RuntimeError as error:
                problem = str(error).splitlines()[-1].strip()
                raise BadCheckpoint(f"the checkpoint was made with another {name!r} network: {problem}") from error
        for player, saved in state["optimizers"].items():
            groups = self._optimizer(player, nets.params(player)).state_dict()["param_groups"]
            if [g.keys() for g in saved["param_groups"]] != [g.keys() for g in groups]:
                raise BadCheckpoint(f"the checkpoint was made with another optimizer of {player!r}")
            shard.load_optimizer(self._optimizer(player, nets.params(player)), saved)
        for player, shadow in state["emas"].items():
            self.emas[player] = Ema(nets.find(player), self.plan.ema or 0.0)
            self.emas[player].load(shard.share(shadow, nets.find(player)))
        self.best = state["best"]
        for name, position in state["data"].items():
            self.pools[name].load_state_dict(position)  # type: ignore[attr-defined]
        self._pool(stage)
        for name, pool in self.pools.items():
            if name not in state["data"]:
                batches = iter(pool)
                for _ in range(state["drawn"].get(name, 0)):
                    self._draw(batches, name)
                if batches is not pool and name == stage.pool:
                    self.skipped[name] = batches
        self.drawn, self.stage_began = state["drawn"], state["stage_began"]
        self.scaler.load_state_dict(state["scaler"])
        self.done, self.before, self.began = state["done"], state["elapsed"], time.monotonic()
        self.fitted.turns = [(s, t, p, v) for s, t, p, v in state["turns"]]
        self.fitted.validations = [(s, t, m) for s, t, m in state["validations"]]
        self.record.load(state.get("trained", []))  # checkpoints may be older than the record
        if not self.record.stages:
            self.record.stage(stage.name, stage.steps, self.before)
        _set_rng(state["rng"][min(self.accelerator.process_index, len(state["rng"]) - 1)])
        return int(state["t"])


class _Sums:
    """Exact means over several micro-batches whose parts count different things (tokens, examples, batches).

    Parts that share one count are summed in one backward pass; each further kind of count costs a pass and a buffer.
    """

    def __init__(
        self,
        params: Callable[[], list[nn.Parameter]],
        parts: Mapping[str, Part],
        over_processes: Callable[[list[Tensor | int]], list[Tensor | int]],
    ) -> None:
        # to be asked for after a backward pass: FSDP shows others, without gradients, between forward and backward
        self.params, self.over_processes = params, over_processes
        groups: dict[Any, list[str]] = {}
        for name, part in parts.items():
            groups.setdefault(name if part.key is None else (part.key,), []).append(name)
        self.groups = list(groups.values())
        # sums stay in fp16's range; every process divides by the same, for FSDP mixes their gradients in backward
        self.references = over_processes([parts[names[0]].count for names in self.groups])
        self.grads: list[dict[int, Tensor]] = [{} for _ in self.groups]
        self.counts: list[list[Tensor | int]] = [[] for _ in self.groups]
        self.totals: dict[str, Tensor] = {}

    def add(self, parts: Mapping[str, Part], scale: Callable[[Tensor], Tensor]) -> None:
        """Backward of one micro-batch."""
        known = {n for names in self.groups for n in names}
        if parts.keys() != known:
            raise LimbeckError(f"the micro-batches of one step have different parts: {sorted(parts.keys() ^ known)}")
        for g, names in enumerate(self.groups):
            if len({c for n in names if isinstance(c := parts[n].count, int)}) > 1:
                raise LimbeckError(
                    f"parts {', '.join(names)} count alike in one micro-batch and not in the next: leave elements out "
                    "by a mask, not by indexing"
                )
            total = sum((parts[n].weight * parts[n].total for n in names), torch.zeros(())) / self.references[g]
            if total.requires_grad or len(self.groups) == 1:  # what is constant is only logged
                scale(total).backward(retain_graph=g + 1 < len(self.groups))
            self.counts[g].append(parts[names[0]].count)
            for n in names:
                now = (parts[n].weight * parts[n].total).detach()
                self.totals[n] = self.totals[n] + now if n in self.totals else now
            if len(self.groups) > 1:
                for i, p in enumerate(self.params()):
                    if p.grad is not None:
                        self.grads[g][i] = self.grads[g][i] + p.grad if i in self.grads[g] else p.grad
                        p.grad = None

    def finish(self) -> dict[str, Tensor]:
        """Leave the gradient of the mean in .grad; the means of the parts are returned."""
        counts = self.over_processes([sum(c) for c in self.counts])
        for i, p in enumerate(self.params()):
            if len(self.groups) == 1:
                if p.grad is not None:
                    p.grad *= self.references[0]  # the ratio of two whole numbers would be taken in fp32
                    p.grad /= counts[0]
                continue
            held = zip(self.grads, self.references, counts, strict=True)
            pieces = [grads[i] * r / n for grads, r, n in held if i in grads]
            p.grad = sum(pieces[1:], pieces[0]) if pieces else None
        return {n: self.totals[n] / counts[g] for g, names in enumerate(self.groups) for n in names}


def _mark(module: nn.Module) -> tuple[tuple[int, int], ...]:
    """Which tensors a network holds and how often each was written to: tells, at no cost, whether it has changed."""
    tensors = chain(module.parameters(), module.buffers())
    return tuple((t.data_ptr(), 0 if t.is_inference() else t._version) for t in tensors)


def _divided(part: Part, count: Tensor | int) -> Tensor:
    return part.weight * part.total / count


def _parts(loss: Parts) -> dict[str, Part]:
    named = loss if isinstance(loss, Mapping) else {"loss": loss}
    return {name: part if isinstance(part, Part) else mean(part) for name, part in named.items()}


def _seed(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed % 2**32)
    # not `seed` itself: the networks were probably built under it, and a fresh one would be the same again
    torch.manual_seed(generator("training", seed).initial_seed())


@cache
def _keep_memory() -> None:
    """Have glibc keep what a step frees for the next one, instead of giving it back and asking for it again.

    Fresh pages cost up to a tenth of a step on processors. What the environment says about it goes first.
    """
    trim, mmap = -1, -3  # M_TRIM_THRESHOLD and M_MMAP_THRESHOLD of malloc.h
    said = "MALLOC_TRIM_THRESHOLD_" in os.environ or "MALLOC_MMAP_THRESHOLD_" in os.environ
    if sys.platform == "linux" and not said and "malloc" not in os.environ.get("GLIBC_TUNABLES", ""):
        libc = ctypes.CDLL(None)
        if hasattr(libc, "gnu_get_libc_version") and libc.mallopt(mmap, 2**30):
            libc.mallopt(trim, 2**31 - 1)


def _rng() -> dict[str, Any]:
    version, numbers, gauss = random.getstate()
    kind, keys, pos, has, cached = np.random.get_state(legacy=True)
    state = {
        "torch": torch.get_rng_state(),
        "python": [version, list(numbers), gauss],
        "numpy": [str(kind), torch.from_numpy(np.asarray(keys).astype(np.int64)), int(pos), int(has), float(cached)],
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state_all()
    return state


def _set_rng(state: dict[str, Any]) -> None:
    torch.set_rng_state(state["torch"])
    version, numbers, gauss = state["python"]
    random.setstate((version, tuple(numbers), gauss))
    kind, keys, pos, has, cached = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), pos, has, cached))
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["cuda"])
