"""Checks of measures."""

import math
from typing import Any

import torch
from torch import Tensor

from limbeck.conformance import vectors
from limbeck.conformance.expect import expect
from limbeck.conformance.tensors import Inputs, change, fresh
from limbeck.core import find


def measure(method: Any, inputs: Inputs, **knobs: Any) -> dict[str, float]:
    """What a measure says, by name; a single number is called "value"."""
    optional = {n: inputs[n] for n in find.wants(method) if n in inputs}
    out = method(*[inputs[n] for n in find.needs(method)], **optional, **knobs)
    named = out if isinstance(out, dict) else {"value": out}
    for key, value in named.items():
        expect(
            isinstance(key, str) and type(value) is float, f"{key!r} is {type(value).__name__}; a measure gives floats"
        )
    return named


def _vector(name: str) -> tuple[Any, Inputs, dict[str, Any]]:
    vector = vectors.filled(name)
    return find.get(name), vectors.inputs(vector), vector.get("knobs", {})


def _examples(key: str, value: Tensor) -> int:
    """The dimension that counts the examples: [..., N, C] of logits, [N, ...] of everything else."""
    return value.ndim - 2 if key.endswith("_logits") else 0


def _same(found: dict[str, float], wanted: dict[str, float], when: str, tolerance: float = 1e-9) -> None:
    expect(found.keys() == wanted.keys(), f"{when} it gives {sorted(found)}, expected {sorted(wanted)}")
    for key, value in wanted.items():
        ok = math.isclose(found[key], value, rel_tol=tolerance, abs_tol=1e-12)
        expect(ok, f"{when} {key!r} is {found[key]!r}, expected {value!r}")


def check_reference(name: str) -> None:
    """The numbers are those of the vector."""
    method, inputs, knobs = _vector(name)
    wanted = vectors.read(name)["value"]
    _same(measure(method, inputs, **knobs), wanted if isinstance(wanted, dict) else {"value": wanted}, "on the vector")


def check_finite(name: str) -> None:
    """Student equal to teacher, one class only, logits of 1e4, a single example and single precision give numbers."""
    method, inputs, knobs = _vector(name)
    names = find.needs(method) + find.wants(method)
    other = {"student": "teacher", "teacher": "student"}

    def equal(key: str, value: Tensor) -> Tensor:
        side, _, rest = key.partition("_")
        twin = inputs.get(f"student_{rest}")
        return twin.clone() if side in other and isinstance(twin, Tensor) else value

    kinds = {
        "student equal to teacher": change(inputs, equal),
        "one class only": change(inputs, lambda k, v: torch.zeros_like(v) if k == "labels" else v),
        "logits of 1e4": change(inputs, lambda k, v: v * 1e4 if k.endswith("_logits") else v),
        "single precision": change(inputs, lambda _, v: v.float() if v.is_floating_point() else v),
        "half precision": change(inputs, lambda _, v: v.bfloat16() if v.is_floating_point() else v),
    }
    if not any(n.endswith("_samples") for n in names):  # a distribution of one example has no spread
        kinds["a single example"] = change(inputs, lambda k, v: v.narrow(_examples(k, v), 0, 1))
    for what, these in kinds.items():
        for key, value in measure(method, these, **knobs).items():
            expect(math.isfinite(value), f"for {what}, {key!r} is {value}")


def check_order(name: str) -> None:
    """The order of the examples does not matter, and inputs are left alone."""
    method, inputs, knobs = _vector(name)
    first = measure(method, inputs, **knobs)
    before = fresh(inputs, grad=False)
    measure(method, inputs, **knobs)
    expect(
        all(torch.equal(v, before[k]) for k, v in inputs.items() if isinstance(v, Tensor)),
        "the measure changes its inputs",
    )
    sizes = {k: v.shape[_examples(k, v)] for k, v in inputs.items() if isinstance(v, Tensor)}
    orders = {n: torch.randperm(n, generator=torch.Generator().manual_seed(n)) for n in sizes.values()}
    moved = change(inputs, lambda k, v: v.index_select(_examples(k, v), orders[sizes[k]]))
    _same(measure(method, moved, **knobs), first, "after the examples changed places")


def check_every_example_counts(name: str) -> None:
    """The set twice over says what the set says: a measure is a mean, not a sum."""
    method, inputs, knobs = _vector(name)
    twice = change(inputs, lambda k, v: torch.cat([v, v], _examples(k, v)))
    tolerance = 0.2 if any(k.endswith("_samples") for k in inputs) else 1e-9  # covariances divide by N - 1
    _same(measure(method, twice, **knobs), measure(method, inputs, **knobs), "for the set twice over", tolerance)
