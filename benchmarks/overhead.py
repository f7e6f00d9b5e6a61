"""A run of the one loop against a bare hand-written loop of the same work: what does limbeck cost a step?

`python benchmarks/overhead.py` prints a table and writes benchmarks/results/overhead.json. ResNet-8 learns from
ResNet-20 by cross-entropy and distillation on 28x28 images, batch 128, fp32, one thread. Both ways run in one process
and take turns in short segments: the stream that feeds `fit` runs a segment of the bare loop before it goes on, so that
everything the loop does between two batches is on its own account. A segment is compared with the mean of the bare ones
before and after it, which takes out what drifts. Processor seconds decide; those of the wall are noted, too.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from limbeck.core.batches import Batches, Table
from limbeck.core.loop import Clock, Plan, Turn, fit
from limbeck.core.nets import Batch, Nets
from limbeck.train.plain.distill import Distill
from limbeck.zoo.resnet import resnet

ROOT = Path(__file__).resolve().parent.parent
BAR = 1.03
CLASSES, TEMPERATURE, LR, MOMENTUM, DECAY = 10, 4.0, 0.05, 0.9, 5e-4
CLOCKS: dict[str, Callable[[], float]] = {"processor": time.process_time, "wall": time.perf_counter}


def pictures(count: int) -> Table:
    g = torch.Generator().manual_seed(0)
    columns = {
        "inputs": torch.randn(count, 1, 28, 28, generator=g),
        "labels": torch.randint(CLASSES, (count,), generator=g),
    }
    return Table(columns, kind="images")


def networks() -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    teacher = resnet(classes=CLASSES, channels=1, depth=20).eval().requires_grad_(False)
    return teacher, resnet(classes=CLASSES, channels=1, depth=8).train()


class Bare:
    """The loop that one would write by hand for this one task."""

    def __init__(self, batches: Batches, steps: int) -> None:
        self.batches, self.steps, self.t = batches, steps, 0
        self.teacher, self.student = networks()
        self.optimizer = torch.optim.SGD(self.student.parameters(), LR, MOMENTUM, weight_decay=DECAY)
        self.losses: list[float] = []

    def run(self, steps: int, log_every: int) -> None:
        for _ in range(steps):
            batch = next(self.batches)
            with torch.no_grad():
                teacher = self.teacher(batch["inputs"])["logits"]
            student = self.student(batch["inputs"])["logits"]
            soft = F.log_softmax(teacher / TEMPERATURE, -1)
            kl = F.kl_div(F.log_softmax(student / TEMPERATURE, -1), soft, reduction="batchmean", log_target=True)
            loss = F.cross_entropy(student, batch["labels"]) + TEMPERATURE**2 * kl
            for group in self.optimizer.param_groups:
                group["lr"] = LR * (1 + math.cos(math.pi * self.t / (self.steps - 1))) / 2
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            if self.t % log_every == 0:
                self.losses.append(loss.item())
            self.t += 1


@dataclass
class Alternating:
    """The batches of `fit`; after every `each` of them the bare loop takes its turn, and both are timed."""

    batches: Batches
    bare: Bare
    each: int
    log_every: int
    served: int = 0
    began: dict[str, float] = field(default_factory=dict)
    times: dict[str, list[dict[str, float]]] = field(default_factory=lambda: {"limbeck": [], "bare": []})

    @property
    def epoch(self) -> int:
        return self.batches.epoch

    def state_dict(self) -> dict[str, int]:
        return self.batches.state_dict()

    def load_state_dict(self, state: dict[str, int]) -> None:
        """After the loop has looked at one batch to build what it needs, it starts again from the first."""
        self.batches.load_state_dict(state)
        self.served = -1

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        return self

    def __next__(self) -> dict[str, Tensor]:
        self.served += 1
        if self.served % self.each == 0:
            self.turn()
        return next(self.batches)

    def turn(self) -> None:
        """Close a segment of the loop, run one of the bare loop, open the next."""
        if self.began:
            self.times["limbeck"].append(self.since())
        self.began = {name: clock() for name, clock in CLOCKS.items()}
        self.bare.run(self.each, self.log_every)
        self.times["bare"].append(self.since())
        self.began = {name: clock() for name, clock in CLOCKS.items()}

    def since(self) -> dict[str, float]:
        return {name: (clock() - self.began[name]) / self.each for name, clock in CLOCKS.items()}


class Idle:
    """A method with next to nothing to do: what is left of a step is the loop's own share of it."""

    def step(self, nets: Nets, batch: Batch, clock: Clock) -> Iterator[Turn]:
        yield "student", nets.student.head.bias.sum()


def own_share(steps: int = 500, warm: int = 50) -> float:
    """Processor seconds of a step that calls no network; backward and step over one vector included."""
    moments: list[float] = []

    def batches() -> Iterator[Batch]:
        for t in range(warm + steps + 1):
            if t in (warm, warm + steps):
                moments.append(time.process_time())
            yield {"inputs": torch.zeros(1)}

    teacher, student = networks()
    fit(
        Idle(), Nets(teacher=teacher, student=student), batches(), Plan(warm + steps + 1, optimizer={"sgd": {"lr": LR}})
    )
    return (moments[1] - moments[0]) / steps


def compare(times: dict[str, list[dict[str, float]]], clock: str) -> dict[str, Any]:
    """Seconds a step and ratios by one clock."""
    loop, bare = ([t[clock] for t in times[way]] for way in ("limbeck", "bare"))
    pairs = [mine / ((before + after) / 2) for mine, before, after in zip(loop, bare, bare[1:], strict=False)]
    low, _, high = statistics.quantiles(pairs, n=4)
    return {
        "ratio_of_medians": statistics.median(loop) / statistics.median(bare),
        "median_ratio_of_pairs": statistics.median(pairs),
        "quartiles_of_pairs": [low, high],
        "pairs": pairs,
        "seconds_a_step": {"limbeck": statistics.median(loop), "bare": statistics.median(bare)},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=24, help="segments of each loop that count")
    parser.add_argument("--steps", type=int, default=3, help="steps a segment")
    parser.add_argument("--batch", type=int, default=128, help="examples a step")
    parser.add_argument("--log-every", type=int, default=10, help="steps between lines of the log, 10 as in a recipe")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "overhead.json")
    args = parser.parse_args()
    torch.set_num_threads(1)
    table = pictures(args.batch * 16)
    steps = args.steps * (args.pairs + 2)  # the first segments warm up
    bare = Bare(Batches(table, args.batch, seed=1), steps)
    feed = Alternating(Batches(table, args.batch, seed=1), bare, args.steps, args.log_every)
    teacher, student = networks()
    plan = Plan(
        steps,
        optimizer={"sgd": {"lr": LR, "momentum": MOMENTUM, "weight_decay": DECAY}},
        schedule="cosine",
        log_every=args.log_every,
    )
    with tempfile.TemporaryDirectory() as folder:
        method = Distill(match=("ce", {"kd": {"temperature": TEMPERATURE}}))
        fitted = fit(method, Nets(teacher=teacher, student=student), feed, plan, folder=Path(folder))
    logged = [sum(parts.values()) for _, t, _, parts in fitted.turns if t % args.log_every == 0]
    apart = max(abs(a - b) / abs(b) for a, b in zip(logged[:2], bare.losses[:2], strict=True))
    if apart > 1e-4:
        raise SystemExit(f"the two loops do different work: their first losses are {apart:.1e} apart")
    for way in feed.times.values():
        del way[0]
    result = {clock: compare(feed.times, clock) for clock in CLOCKS} | {
        "bar": BAR,
        "seconds_of_the_loop_itself": own_share(),
        "losses_apart": apart,
        "setting": {"pairs": args.pairs, "steps_a_segment": args.steps, "batch": args.batch, "threads": 1},
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
    print(f"{'clock':<10} {'limbeck ms':>11} {'bare ms':>9} {'medians':>9} {'pairs':>8}   quartiles of pairs")
    for clock in CLOCKS:
        found = result[clock]
        mine, other = (1000 * found["seconds_a_step"][way] for way in ("limbeck", "bare"))
        low, high = found["quartiles_of_pairs"]
        print(
            f"{clock:<10} {mine:>11.1f} {other:>9.1f} {found['ratio_of_medians']:>8.4f}x "
            f"{found['median_ratio_of_pairs']:>7.4f}x   {low:.4f} to {high:.4f}"
        )
    print(f"of a step, the loop itself takes {1000 * result['seconds_of_the_loop_itself']:.2f} ms")
    held = result["processor"]["median_ratio_of_pairs"] <= BAR
    print(f"at most {BAR}x: {'held' if held else 'NOT held'}; first losses differ by {apart:.1e}")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=1) + "\n")
    if not held:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
