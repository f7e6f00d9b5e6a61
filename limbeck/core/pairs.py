"""Several pairs of learner and teacher in one scheme, by name: where their losses live, and when those train."""

from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn

from limbeck.core.loop import Stage
from limbeck.core.nets import Batch, Nets
from limbeck.core.pair import Pair, parse_all

Losses = tuple[Any, ...]
Pairs = dict[str, Pair]


def students(**matches: Losses) -> Pairs:
    """Student and teacher under several lists of losses; what those of one own goes to `losses.NAME`."""
    return {name: Pair("student", "teacher", parse_all(specs), f"losses.{name}") for name, specs in matches.items()}


def own(nets: Nets, pairs: Pairs, probes: Mapping[str, Batch]) -> None:
    """Check every pair on its batch; the losses that own weights train with its learner."""
    owned = {name: pair.build(nets, probes[name]) for name, pair in pairs.items()}
    if any(owned.values()):
        nets.losses = nn.ModuleDict(owned)
        for pair in pairs.values():
            nets.companions.setdefault(pair.learner, []).append(pair.losses)


def in_turn(nets: Nets, pairs: Pairs, *stages: Stage) -> Iterator[Stage]:
    """A stage for each pair, in which no other's losses train."""
    for pair, stage in zip(pairs.values(), stages, strict=True):
        if "losses" in nets:
            nets.companions[pair.learner] = [pair.losses]
        yield stage
