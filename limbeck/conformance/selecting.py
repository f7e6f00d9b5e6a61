"""Checks of data methods: selections and weights from tensors, and filters and generators of text rows."""

import inspect
from collections.abc import Iterator
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from limbeck.conformance import vectors
from limbeck.conformance.expect import close, concerns, expect
from limbeck.conformance.tensors import Inputs, N, fresh, permute, tensors
from limbeck.core import find

Row = dict[str, Any]


def selects(method: Any) -> bool:
    """Whether the method picks a budget of examples."""
    return "budget" in find.knobs(method)


def reads_rows(method: Any) -> bool:
    """Whether the method is a filter of text rows."""
    return "rows" in find.needs(method)


def from_tensors(method: Any) -> bool:
    """Whether the method sees examples as tensors."""
    return not {"rows", "seeds", "teacher"} & set(find.needs(method))


def ask(method: Any, inputs: Inputs, seed: int = 0, **knobs: Any) -> Any:
    """Call a data method, with torch's generator at `seed`; iterators are read to their end."""
    torch.manual_seed(seed)
    optional = {n: inputs[n] for n in find.wants(method) if n in inputs}
    out = method(*[inputs[n] for n in find.needs(method)], **optional, **knobs)
    return list(out) if isinstance(out, Iterator) else out


def toys(method: Any, *, optional: bool = True, **options: Any) -> Inputs:
    """Features and labels of N examples."""
    return fresh(tensors(method, lead=(N,), optional=optional, **options), grad=False)


def check_reference(name: str) -> None:
    """The answer is that of the vector."""
    method, vector = find.get(name), vectors.filled(name)
    found = ask(method, vectors.inputs(vector), **vector.get("knobs", {}))
    wanted = vector["value"]
    if isinstance(found, Tensor) and found.is_floating_point():
        close(found, torch.tensor(wanted, dtype=torch.float64), "the answer", rtol=1e-9, atol=1e-12)
        return
    found = found.tolist() if isinstance(found, Tensor) else found
    expect(found == wanted, f"the answer is {found!r:.300}, the vector has {wanted!r:.300}")


@concerns(selects)
def check_budget(name: str) -> None:
    """As many different examples as the budget says, all of them from the set."""
    method = find.get(name)
    for optional in (False, True):
        for dtype in (torch.float64, torch.bfloat16):
            for budget in (1, 7, N - 1, N):
                chosen = ask(method, toys(method, optional=optional, dtype=dtype), budget=budget)
                expect(
                    isinstance(chosen, Tensor) and chosen.dtype == torch.long,
                    f"a selection is a tensor of int64 indices, got {chosen!r:.80}",
                )
                expect(
                    tuple(chosen.shape) == (budget,), f"for a budget of {budget} there are {list(chosen.shape)} indices"
                )
                expect(
                    chosen.unique().numel() == budget,
                    f"for a budget of {budget} an example is chosen twice: {sorted(chosen.tolist())}",
                )
                expect(int(chosen.min()) >= 0 and int(chosen.max()) < N, f"an index is outside 0..{N - 1}")


@concerns(selects)
def check_impossible_budget(name: str) -> None:
    """A budget that cannot be kept is refused with the knob's name."""
    method = find.get(name)
    for budget in (0, -1, N + 1):
        try:
            ask(method, toys(method), budget=budget)
        except ValueError as error:
            expect("budget" in str(error), f"budget={budget} of {N} is refused without the knob's name: {error}")
        else:
            expect(False, f"budget={budget} of {N} examples is not refused")


@concerns(from_tensors)
def check_same_seed(name: str) -> None:
    """The same seed gives the same answer, and inputs are left alone."""
    method = find.get(name)
    inputs = toys(method)
    before = fresh(inputs, grad=False)
    knobs = {"budget": 7} if selects(method) else {}
    first, second = (ask(method, inputs, seed=3, **knobs) for _ in range(2))
    expect(torch.equal(first, second), "the same seed gives two different answers")
    expect(
        torch.equal(first, ask(method, before, seed=3, **knobs)),
        "the answer depends on something else than inputs and seed",
    )
    for key, value in inputs.items():
        expect(
            not isinstance(value, Tensor) or torch.equal(value, before[key]), f"the method changes its input {key!r}"
        )


@concerns(from_tensors)
def check_order(name: str) -> None:
    """The answer goes with the examples, not with their places."""
    method = find.get(name)
    inputs = toys(method)
    order = torch.randperm(N, generator=torch.Generator().manual_seed(1))
    moved = {
        k: v[order] if k == "features" else v[:, order] if k == "curves" else permute({k: v}, order)[k]
        for k, v in inputs.items()
    }
    if selects(method):
        here, there = ask(method, inputs, budget=7), ask(method, moved, budget=7)
        same = set(order[there].tolist()) == set(here.tolist())
        expect(
            same,
            f"after the examples changed places others are chosen: {sorted(order[there].tolist())}, "
            f"before {sorted(here.tolist())}",
        )
    else:
        close(
            ask(method, moved),
            ask(method, inputs)[order],
            "the answer after the examples changed places",
            rtol=1e-9,
            atol=1e-12,
        )


@concerns(from_tensors)
def check_one_answer_an_example(name: str) -> None:
    """Weights are finite, one an example, never negative; a selection does not see the labels' names."""
    method = find.get(name)
    if selects(method):
        return
    weights = ask(method, toys(method))
    expect(
        tuple(weights.shape) == (N,) and weights.is_floating_point(),
        f"weights have shape [N], got {list(weights.shape)}",
    )
    expect(bool(weights.isfinite().all()) and bool((weights >= 0).all()), "a weight is negative or not finite")


def _rows(name: str) -> tuple[list[Row], dict[str, Any]]:
    vector = vectors.filled(name)
    rows: list[Row] = vector["inputs"]["rows"]
    return rows, vector.get("knobs", {})


def _plain(row: Row) -> Row:
    return {k: v for k, v in row.items() if k != "provenance"}


def _origin(row: Row) -> list[Any]:
    held = row.get("provenance", [])
    return held if isinstance(held, list) else [held]


@concerns(reads_rows)
def check_rows(name: str) -> None:
    """What comes out are rows that went in, in order, with their provenance kept; what went in is not changed."""
    method = find.get(name)
    rows, knobs = _rows(name)
    given = [dict(row) for row in rows]
    kept = ask(method, {"rows": given}, **knobs)
    expect(given == rows, "the filter changes the rows that it is given")
    expect(0 < len(kept) < len(rows), f"of the vector's {len(rows)} rows {len(kept)} are kept: it must show both")
    left = iter(rows)
    for row in kept:
        match = next((r for r in left if _plain(r) == _plain(row)), None)
        expect(match is not None, f"a row comes out that did not go in, or in another order: {row!r:.120}")
        history = _origin(match or {})
        expect(_origin(row)[: len(history)] == history, f"a row loses its provenance {history}: {_origin(row)}")


@concerns(reads_rows)
def check_lazy(name: str) -> None:
    """Rows are read one by one: a filter serves an endless stream, and starts nothing before it is asked."""
    method = find.get(name)
    rows, knobs = _rows(name)
    read: list[int] = []

    def endless() -> Iterator[Row]:
        while True:
            for i, row in enumerate(rows):
                read.append(i)
                expect(len(read) <= 3 * len(rows), "the filter reads on without giving a row")
                yield dict(row)

    out = method(endless(), **knobs)
    expect(inspect.isgenerator(out) or isinstance(out, Iterator), "a filter of rows returns an iterator")
    expect(not read, f"{len(read)} rows are read before the first is asked for")
    expect(len(list(islice(out, 2))) == 2, "the filter ends on an endless stream")
