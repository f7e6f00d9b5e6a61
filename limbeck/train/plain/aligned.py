"""What the other losses pull against the first is taken out of every step, the rest goes on."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from limbeck.core.adapt import gradient
from limbeck.core.card import method
from limbeck.core.errors import BadInput
from limbeck.core.loop import Clock, Turn
from limbeck.core.nets import Batch, Nets
from limbeck.core.pair import Pair, parse_all


@method(
    paper="Yang et al. 2024, gradient alignment",
    year=2024,
    arxiv="2411.08937",
    code="penghui-yang/DHKD@7976c69:helper/optimizer.py",
    row="dhkd",
)
@dataclass(frozen=True)
class Aligned:
    """g = g_1 + g_2 - c g_1, c = min(0, <g_1, g_2>) / |g_1|^2: g_1 the first loss's gradient, g_2 that of the others.

    Where the two oppose each other, g_2 loses its part along g_1, so that no step is uphill for the first loss: PCGrad
    one way. The same as a weight of 1 - c >= 1 on the first loss, which is how it is done.

    match: losses as in `distill`; the first leads.

    *Needs*: two or more losses and what they need, one more backward pass. Every micro-batch or process has its own c.
    *Relates to*: `dhkd` after `ce`, or any loss that is suspected to work against the labels. `distill` otherwise.
    """

    match: tuple[Any, ...] = ("ce", "dhkd")

    @cached_property
    def pair(self) -> Pair:
        """The student, its teacher, and the losses between them."""
        return Pair("student", "teacher", parse_all(self.match))

    def setup(self, nets: Nets, probe: Batch) -> None:
        """Check that every loss finds what it asks for, and build the losses that own weights."""
        if len(self.match) < 2:
            raise BadInput(f"`aligned` keeps the others from opposing the first loss; `match` has {len(self.match)}")
        self.pair.own(nets, probe)

    def step(self, nets: Nets, batch: Batch, clock: Clock) -> Iterator[Turn]:
        """One turn of the student."""
        parts = self.pair.parts(nets, batch, clock.progress)
        first, *others = parts
        params, rest = nets.params("student"), torch.stack([parts[name].value for name in others]).sum()
        g1, g2 = gradient(parts[first].value, params), gradient(rest, params)
        along, length = (sum((a * b).sum() for a, b in zip(g1, g, strict=True)) for g in (g2, g1))
        c = torch.as_tensor(along).clamp_max(0) / torch.as_tensor(length).clamp_min(1e-30)
        yield "student", {**parts, first: (1 - c) * parts[first]}
