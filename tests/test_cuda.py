"""On a CUDA device, where there is one: every loss gives what it gives on a processor, every method trains there."""

from collections.abc import Iterator
from functools import partial
from itertools import chain

import pytest
import torch
from accelerate.state import AcceleratorState, PartialState

from limbeck import conformance
from limbeck.conformance.calling import build, loss
from limbeck.conformance.suite import checks, judge
from limbeck.conformance.tensors import change, fresh, tensors
from limbeck.core import find
from limbeck.verbs.together import processes

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
torch.set_num_threads(1)

LOSSES = sorted(name for name in find.names() if find.family(name) == "losses")
METHODS = sorted(name for name in find.names() if find.family(name) in ("train", "shape"))
# Sums on a GPU come out in no fixed order, and its random numbers are others than those that the toys were made with.
BITS = {"same seed", "resume", "in training", "gain"}


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The loop takes the GPU."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "false")
    AcceleratorState._reset_state(reset_partial_state=True)
    assert processes().device.type == "cuda"
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    monkeypatch.undo()
    assert PartialState(cpu=True).device.type == "cpu"


def moved(device: str, _: str, value: torch.Tensor) -> torch.Tensor:
    return value.to(device)


@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_is_what_it_is_on_a_processor(name: str) -> None:
    method = find.get(name)
    inputs = tensors(method, dtype=torch.float32)
    found: dict[tuple[str, int], tuple[torch.Tensor, list[torch.Tensor]]] = {}
    for device, seed in (("cpu", 0), ("cpu", 1), ("cuda", 0)):
        mine = fresh(change(inputs, partial(moved, device)))
        module = build(method, inputs).to(device) if isinstance(method, type) else None
        value = loss(method, mine, module=module, seed=seed)
        given = chain.from_iterable(v if isinstance(v, list) else [v] for v in mine.values())
        leaves = [t for t in given if isinstance(t, torch.Tensor) and t.requires_grad]
        grads = torch.autograd.grad(value, leaves, allow_unused=True)
        found[device, seed] = value.detach().cpu(), [g.cpu() for g in grads if g is not None]
    here, there = found["cpu", 0], found["cuda", 0]
    assert bool(there[0].isfinite()) and len(here[1]) == len(there[1])
    if torch.equal(here[0], found["cpu", 1][0]):  # it draws no random numbers
        for mine_, theirs in zip([here[0], *here[1]], [there[0], *there[1]], strict=True):
            torch.testing.assert_close(theirs, mine_, rtol=2e-3, atol=1e-4)


@pytest.mark.parametrize("name", METHODS)
def test_a_method_does_its_work_there(name: str, gpu: None) -> None:
    excused = {key.replace("_", " ") for key in find.get(name).card.exceptions}
    wanted = {key: check for key, check in checks(name).items() if key not in BITS | excused}
    outcomes = [judge(name, key, check) for key, check in wanted.items()]
    wrong = [f"{outcome.check}: {outcome.message}" for outcome in outcomes if not outcome.passed]
    assert outcomes and not wrong, wrong


def test_the_loop_goes_on_from_a_checkpoint(gpu: None) -> None:
    (outcome,) = conformance.self_test(only="resume with everything")
    assert outcome.passed, outcome.message
