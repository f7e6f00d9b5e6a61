"""No loss reads a value of a tensor on the host in a step, by which it would wait for an accelerator: every loss that
is found, forward and backward, on the toy tensors of the conformance suite."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from limbeck.conformance.calling import build, loss
from limbeck.conformance.tensors import fresh, tensors
from limbeck.core import find

# Calls from Python that bring a value to the host, and operations whose result, or its shape, hangs on one. A copy to
# the host need not be named: on this host it is none, and what comes of it is read by one of these.
READS = (
    *("item", "tolist", "numpy", "__array__", "__bool__", "__int__", "__float__", "__complex__", "__index__"),
    *("__contains__", "nonzero", "unique", "equal", "allclose"),
)
OPERATIONS = {
    *("_local_scalar_dense", "nonzero", "masked_select", "multinomial", "equal", "is_nonzero", "bincount"),
    *("_unique", "_unique2", "unique_dim", "unique_consecutive"),
}

# The losses that wait, and why they must.
WAITING = {
    "wad": "the rounds of leaving examples out are counted on the host",
    "hidden_state_shipping": "only places that count are projected, and the host must know how many they are",
    "bert_emd": "layers are matched by the Hungarian method, which runs on the host",
}

LOSSES = sorted(name for name in find.names() if find.family(name) == "losses")


class Watching(TorchDispatchMode):
    """Writes down operations that wait."""

    def __init__(self, seen: list[str]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.seen = seen

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, kwargs = func.overloadpacket.__name__, kwargs or {}
        by_mask = name in ("index", "index_put", "index_put_", "_index_put_impl_") and any(
            i is not None and i.dtype in (torch.bool, torch.uint8) for i in args[1]
        )
        counted = name == "repeat_interleave" and "output_size" not in kwargs
        if name in OPERATIONS or by_mask or counted:
            self.seen.append(name)
        return func(*args, **kwargs)


@contextmanager
def watched() -> Iterator[list[str]]:
    """What waits for a value, by name, in the order of its coming."""
    seen: list[str] = []

    def noted(name: str) -> Callable[..., Any]:
        plain = getattr(Tensor, name)

        def call(self: Tensor, *args: Any, **kwargs: Any) -> Any:
            seen.append(name)
            return plain(self, *args, **kwargs)

        return call

    with ExitStack() as stack:
        for name in READS:
            stack.enter_context(patch.object(Tensor, name, noted(name)))
        stack.enter_context(Watching(seen))
        yield seen


@pytest.mark.parametrize("optional", [True, False], ids=["with_all", "without_the_optional"])
@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_waits_for_no_value(name: str, optional: bool) -> None:
    method = find.get(name)
    inputs = fresh(tensors(method, dtype=torch.float32, optional=optional))
    module = build(method, inputs) if isinstance(method, type) else None
    loss(method, inputs, module=module).backward()  # a first call may set constants
    with watched() as seen:
        loss(method, inputs, module=module).backward()
    if name in WAITING:
        assert seen or not optional, f"{name} waits no more: take it from the list"
        pytest.xfail(f"waits at {', '.join(seen)}: {WAITING[name]}")
    assert not seen, f"{name} waits for a value at {', '.join(seen)}"


def test_the_list_names_losses() -> None:
    assert WAITING.keys() <= set(LOSSES)


@pytest.mark.parametrize(
    "wait",
    [
        lambda x: x.sum().item(),
        lambda x: bool(x.any()),
        lambda x: float(x[0]),
        lambda x: int(x[0]),
        lambda x: x.tolist(),
        lambda x: x.numpy(),
        lambda x: [1, 2, 3][x.argmax()],
        lambda x: x[x > 0],
        lambda x: x.masked_fill_(x > 0, 0) if (x > 0).any() else x,
        lambda x: x.nonzero(),
        lambda x: x.unique(),
        lambda x: torch.where(x > 0),
        lambda x: torch.equal(x, x),
        lambda x: torch.multinomial(x.abs(), 1),
        lambda x: x.repeat_interleave(torch.arange(3)),
        lambda x: 1.0 in x,
    ],
)
def test_the_watch_sees(wait: Callable[[Tensor], Any]) -> None:
    with watched() as seen:
        wait(torch.tensor([1.0, -1.0, 2.0]))
    assert seen


def test_the_watch_sees_nothing_else() -> None:
    x, index = torch.tensor([1.0, -1.0, 2.0]), torch.tensor([2, 0])
    with watched() as seen:
        torch.where(x > 0, x, 0.0).masked_fill(x < 0, 1.0)[index].sum().log()
        x[index] = x[index] + 1
        x.repeat_interleave(2)
    assert not seen
