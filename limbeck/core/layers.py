"""Which layer of the student to match with which of the teacher: by how alike they see one batch (CKA), in order."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from limbeck.core.errors import BadInput
from limbeck.core.features import width
from limbeck.core.maths import cka
from limbeck.core.nets import evaluating, outputs
from limbeck.core.taps import unwrap


@dataclass(frozen=True)
class Pairing:
    """One proposed pair. alike: linear CKA in [0, 1] (below 0 by chance). projector: what brings one to the other."""

    student: str
    teacher: str
    student_shape: tuple[int, ...]
    teacher_shape: tuple[int, ...]
    alike: float
    projector: str


def layers(module: nn.Module, batch: Mapping[str, Any]) -> dict[str, Tensor]:
    """The outermost layers that have layers of their own and give a tensor with a row an example: path -> output.

    A network without inner structure gives its leaves. Eval mode, no gradient; the module is left as it was.
    """
    inner = unwrap(module)
    examples = len(batch["inputs"])
    seen: dict[str, Tensor] = {}

    def keep(path: str) -> Any:
        def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
            first = output[0] if isinstance(output, (tuple, list)) and output else output
            if isinstance(first, Tensor) and first.ndim >= 2 and len(first) == examples and first.is_floating_point():
                seen[path] = first.detach()

        return hook

    handles = [layer.register_forward_hook(keep(path)) for path, layer in inner.named_modules() if path]
    try:
        with torch.no_grad(), evaluating(module):
            outputs(module, batch)
    finally:
        for handle in handles:
            handle.remove()
    parents = {path for path, layer in inner.named_modules() if path and any(True for _ in layer.children())}
    found = [path for path in seen if path in parents]
    outer = [path for path in found if not any(path.startswith(f"{other}.") for other in found)]
    if len(outer) < 2:  # one wrapper around everything, or no structure at all
        outer = [path for path in found if path not in outer] or [path for path in seen if path not in parents]
    if not outer:
        raise BadInput(f"{type(inner).__name__} has no inner layer that gives a tensor with a row an example")
    return {path: seen[path] for path in outer}


def likeness(student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
    """Unbiased linear CKA of every student layer with every teacher layer: [S, T]. At least 4 examples."""
    return torch.stack([torch.stack([cka(s, t, unbiased=True) for t in teacher]) for s in student])


def affinity(alike: Tensor) -> Tensor:
    """What pairs layers: alike [S, T] without what is common to a row or a column, less a little for unequal depth.

    Shallow layers resemble everything more than deep ones do, above all in an untrained student, so plain likeness
    would tie all of it to the teacher's first layers. Where likeness says nothing, equal relative depth decides.
    """
    s, t = alike.shape
    alone = alike.double() - alike.mean(0).double() - alike.mean(1, keepdim=True).double() + alike.mean().double()
    depth = (torch.arange(s).unsqueeze(1) + 1) / s - (torch.arange(t) + 1) / t
    return alone - 0.1 * depth.double().square()


def in_order(affinities: Tensor) -> list[tuple[int, int]]:
    """The pairs of highest total in which depth never goes back: affinity [S, T] -> min(S, T) pairs.

    Every layer of the network with fewer layers is matched; no layer is used twice.
    """
    s, t = affinities.shape
    if s > t:
        return [(i, j) for j, i in in_order(affinities.T)]
    best = torch.full((s + 1, t + 1), -torch.inf, dtype=torch.float64)
    best[0] = 0.0
    for i in range(1, s + 1):
        for j in range(i, t + 1):
            best[i, j] = torch.maximum(best[i, j - 1], best[i - 1, j - 1] + affinities[i - 1, j - 1])
    pairs, i, j = [], s, t
    while i:
        if j > i and best[i, j] == best[i, j - 1]:
            j -= 1
        else:
            pairs.append((i - 1, j - 1))
            i, j = i - 1, j - 1
    return pairs[::-1]


def propose(student: nn.Module, teacher: nn.Module, batch: Mapping[str, Any]) -> list[Pairing]:
    """Pairs of layers, shallow to deep, from what both networks make of one batch of at least 4 examples."""
    if len(batch["inputs"]) < 4:
        raise BadInput(f"comparing layers needs a batch of at least 4 examples, got {len(batch['inputs'])}")
    ours, theirs = layers(student, batch), layers(teacher, batch)
    alike = likeness(list(ours.values()), list(theirs.values()))
    out = []
    for i, j in in_order(affinity(alike)):
        (path, one), (other, two) = list(ours.items())[i], list(theirs.items())[j]
        shapes = tuple(one.shape[1:]), tuple(two.shape[1:])
        out.append(Pairing(path, other, *shapes, float(alike[i, j]), suggested(tuple(one.shape), tuple(two.shape))))
    return out


def suggested(student: tuple[int, ...], teacher: tuple[int, ...]) -> str:
    """The simplest projector that brings a student feature to the teacher's width: none, linear, or conv for maps."""
    if width(student) == width(teacher):
        return "none"
    return "conv" if len(student) == len(teacher) == 4 and student[2:] != teacher[2:] else "linear"


def taps_of(pairs: Sequence[Pairing]) -> dict[str, dict[str, list[str]]]:
    """What a recipe says: {"student": {"feats": [...]}, "teacher": {"feats": [...]}}."""
    return {
        "student": {"feats": [pair.student for pair in pairs]},
        "teacher": {"feats": [pair.teacher for pair in pairs]},
    }
