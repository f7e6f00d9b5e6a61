"""A network as blocks, one after the other: where each ends, what is put in the place of its output, which weights are
whose."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from limbeck.core.errors import BadInput
from limbeck.core.features import width
from limbeck.core.nets import Batch, Nets, evaluating
from limbeck.core.project import projector
from limbeck.core.taps import find_layer, spread, unwrap


def ends(nets: Nets, player: str, batch: Batch) -> list[str]:
    """Paths of the layers that give a network's `feats`, shallow to deep: its taps, or those found on one batch."""
    if player in nets.taps and "feats" in nets.taps[player].paths:
        paths = nets.taps[player].paths["feats"]
        if inner := [p for p in paths if p.endswith(":in")]:
            raise BadInput(f"a block ends after a layer, but {inner[0]!r} is before one: tap the layer that gives it")
        return paths
    module, gave = unwrap(nets.find(player)), []

    def keep(path: str) -> Any:
        def hook(_layer: nn.Module, _inputs: Any, output: Any) -> None:
            gave.append((path, output[0] if isinstance(output, (tuple, list)) else output))

        return hook

    handles = [layer.register_forward_hook(keep(path)) for path, layer in module.named_modules() if path]
    try:
        with torch.no_grad(), evaluating(module):
            feats = nets.run(player, batch).get("feats", [])
    finally:
        for handle in handles:
            handle.remove()
    if not feats:
        raise BadInput(
            f"the {player} ({type(module).__name__}) returns no feats: tap where its blocks end, taps: {{feats: [...]}}"
        )
    found = []
    for i, feat in enumerate(feats):
        paths = [path for path, output in gave if output is feat]
        if not paths:
            raise BadInput(f"no layer of the {player} ({type(module).__name__}) gives its feature {i}: tap its layers")
        found.append(next((p for p in reversed(paths) if paths[0].startswith(f"{p}.")), paths[0]))
    return found


@contextmanager
def fed(module: nn.Module, instead: Mapping[str, Tensor]) -> Iterator[dict[str, Tensor]]:
    """Inside, whoever reads one of these layers gets another tensor; what the layer itself gave is told by its path."""
    gave: dict[str, Tensor] = {}

    def swap(path: str, other: Tensor) -> Any:
        def hook(_layer: nn.Module, _inputs: Any, output: Any) -> Any:
            several = isinstance(output, (tuple, list))
            gave[path] = output[0] if several else output
            return type(output)([other, *output[1:]]) if several else other

        return hook

    handles = [find_layer(module, p).register_forward_hook(swap(p, other)) for p, other in instead.items()]
    try:
        yield gave
    finally:
        for handle in handles:
            handle.remove()


class Seams(nn.Module):
    """Where a student is cut along its teacher, at equal relative depth, and what fits either's width to the other's.

    cuts: (path in the student, index in the teacher's feats), shallow to deep, the end of the last block left out.
    into, out: from teacher to student and back, linear at every place; nothing where widths agree.
    """

    def __init__(self, paths: Sequence[str], student: Sequence[Tensor], teacher: Sequence[Tensor]) -> None:
        super().__init__()
        pairs = spread(len(student), len(teacher))[:-1]
        self.cuts = [(paths[i], j) for i, j in pairs]
        self.into, self.out = nn.ModuleList(), nn.ModuleList()
        for i, j in pairs:
            mine, its = student[i], teacher[j]
            places = [x.shape[2:] if x.ndim == 4 else x.shape[1:-1] for x in (mine, its)]
            if mine.ndim != its.ndim or places[0] != places[1]:
                raise BadInput(
                    f"a block of the student cannot read what the teacher's reads: feature {i} of the student is "
                    f"{list(mine.shape)}, feature {j} of the teacher {list(its.shape)}; they may differ in width alone"
                )
            own, other = width(tuple(mine.shape)), width(tuple(its.shape))
            self.into.append(nn.Identity() if own == other else projector("linear", other, own))
            self.out.append(nn.Identity() if own == other else projector("linear", own, other))


class Depths(nn.Module):
    """Which weights come in where: `names` of a network's parameters, one list for each of its feats and one for the
    rest. The first list holds all that the first feature depends on, the next what the second needs besides ..."""

    def __init__(self, names: list[list[str]]) -> None:
        super().__init__()
        self.names = names


def depths(nets: Nets, player: str, batch: Batch, *, embedding: bool = False) -> Depths:
    """Found on one batch. embedding: embedded `tokens`, where the network returns them, are the first of the feats."""
    module = nets.find(player)
    with torch.enable_grad(), evaluating(module):
        told = nets.run(player, batch)
    feats = [told["tokens"]] if embedding and "tokens" in told else []
    feats += told.get("feats", [])
    if not feats:
        raise BadInput(f"the {player} ({type(module).__name__}) returns no feats, by which its layers could be told")
    left, names = dict(module.named_parameters()), []
    for feat in feats:
        grads = torch.autograd.grad(feat.sum(), list(left.values()), retain_graph=True, allow_unused=True)
        names.append([name for name, grad in zip(left, grads, strict=True) if grad is not None])
        left = {name: p for name, p in left.items() if name not in names[-1]}
    return Depths([*names, list(left)])


def train_only(module: nn.Module, names: Iterable[str]) -> None:
    """Of a network's parameters only those ask for a gradient."""
    chosen = set(names)
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(name in chosen)


def one_layer(have: Mapping[str, Any], layer: int, layers: int) -> dict[str, Any]:
    """What losses may ask for, of one of the student's `layers` alone and of the teacher's of equal relative depth."""
    now = dict(have)
    for name, told in have.items():
        if isinstance(told, (list, tuple)) and name.startswith(("student_", "teacher_")):
            if len(told) < layers:
                raise BadInput(
                    f"each of the student's {layers} layers learns from one of the teacher's; {name} are {len(told)}"
                )
            now[name] = [told[spread(layers, len(told))[layer][1]]]
    return now
