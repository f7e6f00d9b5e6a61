"""Branches on one network: its deep layers exist several times, its shallow ones once, and a gate says who is heard."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from limbeck.core.errors import BadInput, nearest
from limbeck.core.features import pooled
from limbeck.core.maths import upcast
from limbeck.core.nets import Nets, evaluating, outputs
from limbeck.core.taps import unwrap


def ordered(module: nn.Module, run: Callable[[], object]) -> list[str]:
    """Paths of the layers with weights or statistics of their own, in the order in which `run` calls them."""
    called: list[str] = []

    def note(path: str) -> Any:
        return lambda *_: called.append(path)

    handles = [layer.register_forward_pre_hook(note(path)) for path, layer in weighted(module).items()]
    try:
        with torch.no_grad(), evaluating(module):
            run()
    finally:
        for handle in handles:
            handle.remove()
    return list(dict.fromkeys(called))


def weighted(module: nn.Module) -> dict[str, nn.Module]:
    """Layers that hold parameters or buffers themselves, by their paths."""
    return {
        path: layer
        for path, layer in unwrap(module).named_modules()
        if path and (any(True for _ in layer.parameters(False)) or any(True for _ in layer.buffers(False)))
    }


def deep_layers(called: Sequence[str], begin: str, part: float) -> list[str]:
    """Those layers, of all that are `called` in order, that a branch owns: from `begin` on, or the last `part`."""
    if begin:
        start = next((i for i, path in enumerate(called) if path == begin or path.startswith(f"{begin}.")), None)
        if start is None:
            raise BadInput(f"no layer with weights is at {begin!r}{nearest(begin, called)}")
    else:
        start = len(called) - round(part * len(called))
    if not 0 < start < len(called):
        raise BadInput(f"branches must share and own at least one layer, got {start} shared of {len(called)}")
    return list(called[start:])


class Branches(nn.Module):
    """Deep layers of further branches, and the gate over all of them; the first branch is the network itself.

    layers: paths that a branch owns. donors: networks of the same architecture, one a further branch, whose layers are
    taken. width: of the shared feature, averaged over its places.
    """

    def __init__(self, layers: Sequence[str], donors: Sequence[nn.Module], width: int) -> None:
        super().__init__()
        self.layers = tuple(layers)
        found = [weighted(donor) for donor in donors]
        self.own = nn.ModuleList(nn.ModuleList(layer[path] for path in layers) for layer in found)
        self.gate = nn.Linear(width, len(donors) + 1)
        self.norm = nn.BatchNorm1d(len(donors) + 1)

    def chances(self, shared: Tensor) -> Tensor:
        """softmax(ReLU(BN(FC(shared feature)))): any feature -> [B, branches], >= 0, sum 1 over the branches."""
        scores = self.norm(self.gate(pooled(shared).to(self.gate.weight.dtype)))
        return upcast(scores).relu().softmax(-1)

    def run(self, nets: Nets, player: str, batch: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        """Logits of all branches [M, B, ..., C], and the gate's weights [B, M]; shared layers are run once."""
        module = unwrap(nets.find(player))
        trunk = [layer for path, layer in weighted(module).items() if path not in self.layers]
        with recorded(trunk, weighted(module)[self.layers[0]]) as tape:
            said = [nets.run(player, batch)["logits"]]
        mine = [weighted(module)[path] for path in self.layers]
        for own in self.own:
            assert isinstance(own, nn.ModuleList)
            with replayed(tape, mine, list(own)):
                said.append(outputs(module, batch)["logits"])
        return torch.stack(said), self.chances(tape.feature)


class Tape:
    """What the shared layers returned, call by call, and the feature that the branches begin with."""

    def __init__(self) -> None:
        self.said: list[tuple[nn.Module, Any]] = []
        self.feature: Tensor = torch.empty(0)
        self.parted = False


@contextmanager
def recorded(trunk: Sequence[nn.Module], first: nn.Module) -> Iterator[Tape]:
    """Inside, what the layers of the trunk return is kept. first: the first layer that a branch owns."""
    tape = Tape()

    def keep(layer: nn.Module, _inputs: Any, output: Any) -> None:
        if tape.parted:
            raise BadInput(f"a shared {type(layer).__name__} is used after branches part; let them begin after it")
        tape.said.append((layer, _own(output)))

    def part(_layer: nn.Module, inputs: Any) -> None:
        if not tape.parted:
            tape.feature, tape.parted = inputs[0], True

    handles: list[Any] = [layer.register_forward_hook(keep) for layer in trunk]
    handles.append(first.register_forward_pre_hook(part))
    try:
        yield tape
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def replayed(tape: Tape, mine: Sequence[nn.Module], others: Sequence[nn.Module]) -> Iterator[None]:
    """Inside, shared layers return what is on the tape, and each of `others` stands in for one of `mine`."""
    rest: dict[nn.Module, list[Any]] = {}
    for layer, output in tape.said:
        rest.setdefault(layer, []).append(output)
    stand_ins: dict[nn.Module, Callable[..., Any]] = {layer: _next(said) for layer, said in rest.items()}
    stand_ins |= dict(zip(mine, others, strict=True))
    before = {layer: layer.__dict__.get("forward") for layer in stand_ins}
    try:
        for layer, stand_in in stand_ins.items():
            layer.__dict__["forward"] = stand_in
        yield
    finally:
        for layer, old in before.items():
            if old is None:
                layer.__dict__.pop("forward", None)
            else:
                layer.__dict__["forward"] = old


def _next(said: list[Any]) -> Callable[..., Any]:
    left = iter(said)
    return lambda *_args, **_options: _own(next(left))


def _own(said: Any) -> Any:
    """A copy, so that a network which adds to it or rectifies it in place does not write on the tape."""
    return said.clone() if isinstance(said, Tensor) else said
