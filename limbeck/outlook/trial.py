"""What a step costs: a few are taken with throw-away networks."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from limbeck.core.loop import Clock, Turn, fit
from limbeck.core.nets import Batch, Nets
from limbeck.outlook.facts import Cost
from limbeck.recipe import Recipe
from limbeck.verbs.setting import Setting, make_plan, method_of

STEPS = 2  # that are timed, after one to warm up


class _Timed:
    """A method that notes when each of its steps begins."""

    def __init__(self, method: Any) -> None:
        self._method, self.began = method, [0.0] * 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._method, name)

    def step(self, nets: Nets, batch: Batch, clock: Clock) -> Iterator[Turn]:
        """The method's own."""
        self.began.append(_now())
        yield from self._method.step(nets, batch, clock)


def trial(made: Setting, recipe: Recipe) -> Cost:
    """Three steps of the recipe, the first to warm up, with throw-away networks."""
    with recipe.blamed("match" if recipe.method is None else "method"):
        method = method_of(recipe)
        torch.manual_seed(0)
        nets = made.nets(recipe, method)
        batches = made.pools(recipe, method, 0)
        pool = next(iter(batches.values())) if isinstance(batches, Mapping) else batches
        whole = make_plan(recipe.train, getattr(pool, "steps_per_epoch", None), 0)
        plan = replace(
            whole, steps=STEPS + 1, validate_every=0, save_every=0, log_every=0, select="", max_minutes=None, ema=None
        )
        timed = _Timed(method)
        before = _memory(reset=True)
        try:
            fit(timed, nets, batches, plan)
        finally:
            for taps in nets.taps.values():
                taps.remove()
    ended, first = _now(), plan.accumulate  # a step begins so many times
    seconds = (ended - timed.began[first]) / (len(timed.began) / first - 1) if len(timed.began) > first else math.nan
    steps = None if recipe.train.steps is None and recipe.train.epochs is None else whole.steps
    runs = (2 + len(recipe.beside)) * len(recipe.seeds)
    return Cost(_memory(), before, seconds, recipe.train.batch_size, steps, runs)


def _now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.monotonic()


def _memory(*, reset: bool = False) -> int:
    """Peak memory in bytes since the last reset, and right after a reset what is taken now; since the start of the
    process where the system cannot reset."""
    if torch.cuda.is_available():
        if reset:
            torch.cuda.reset_peak_memory_stats()
        return int(torch.cuda.max_memory_allocated())
    try:
        if reset:
            Path("/proc/self/clear_refs").write_text("5")
        told = Path("/proc/self/status").read_text()
        return 1024 * int(told.partition("VmHWM:")[2].split()[0])
    except (OSError, IndexError, ValueError):
        import resource

        most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return most if sys.platform == "darwin" else 1024 * most
