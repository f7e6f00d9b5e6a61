"""Values that change while training runs: learning rates, loss weights, temperatures. progress runs from 0 to 1."""

import math
from collections.abc import Mapping
from typing import Any

from limbeck.core.errors import BadInput, nearest

KINDS = ("constant", "linear", "cosine", "steps", "warmup")
RATES = ("constant", "linear", "cosine", "step")


def is_schedule(spec: Any) -> bool:
    """Whether a knob's value is a schedule rather than a plain value: {"linear": [1, 0]}."""
    return isinstance(spec, Mapping) and len(spec) == 1 and next(iter(spec)) in KINDS


def value(spec: Any, progress: float) -> Any:
    """The value at `progress` of a number (itself) or a schedule.

    {"constant": a}; {"linear": [a, b]} and {"cosine": [a, b]} go from a to b; {"steps": [[0, a], [0.5, b]]} holds a,
    then b from half-way; {"warmup": [a, over]} rises from 0 to a over the first `over` of the run, then holds.
    """
    if not is_schedule(spec):
        return spec
    ((kind, arguments),) = spec.items()
    if kind == "constant":
        return float(arguments)
    if not isinstance(arguments, (list, tuple)) or len(arguments) < 2:
        raise BadInput(f"schedule {kind!r} takes a list of two, got {arguments!r}")
    if kind == "steps":
        return float(max((p for p in arguments if p[0] <= progress), key=lambda p: p[0], default=arguments[0])[1])
    first, second = (float(a) for a in arguments)
    if kind == "warmup":
        return first * min(1.0, progress / second) if second > 0 else first
    share = progress if kind == "linear" else (1 - math.cos(math.pi * progress)) / 2
    return first + (second - first) * share


def rate(spec: Any, progress: float) -> float:
    """Factor on the learning rate at `progress`.

    "constant", "linear" (1 to 0), "cosine" (1 to 0), {"step": {"at": [0.5, 0.75], "factor": 0.1}}; each may be written
    {"cosine": {"warmup": 0.05, "final": 0.01}}: rise from 0 over the first 5 %, end at 1 % of the rate.
    """
    kind, options = (spec, {}) if isinstance(spec, str) else next(iter(spec.items()))
    options = dict(options or {})
    if kind not in RATES:
        raise BadInput(f"no learning-rate schedule {kind!r}{nearest(str(kind), RATES)}")
    warmup, final = float(options.pop("warmup", 0.0)), float(options.pop("final", 0.0))
    at, factor = options.pop("at", [0.5, 0.75]), float(options.pop("factor", 0.1))
    if options:
        raise BadInput(f"schedule {kind!r} has no option {next(iter(options))!r}; it takes warmup, final, at, factor")
    rise = min(1.0, progress / warmup) if warmup > 0 else 1.0
    left = (progress - warmup) / (1 - warmup) if progress > warmup < 1 else 0.0
    if kind == "constant":
        return rise
    if kind == "step":
        return float(rise * factor ** sum(progress >= a for a in at))
    fall = 1 - left if kind == "linear" else (1 + math.cos(math.pi * left)) / 2
    return rise * (final + (1 - final) * fall)
