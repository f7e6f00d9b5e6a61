"""A chain of networks between teacher and student, each taught by the one before: small steps, not a large one."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any

from torch import nn

from limbeck.core.card import method, require
from limbeck.core.errors import BadInput
from limbeck.core.loop import Clock, Stage, Turn
from limbeck.core.match import Match
from limbeck.core.nets import Batch, Nets
from limbeck.core.pair import Pair, parse_all
from limbeck.core.pairs import own


@method(
    paper="Mirzadeh et al. 2019, eq. 3",
    year=2019,
    arxiv="1902.03393",
    code="imirzadeh/Teacher-Assistant-Knowledge-Distillation@0f8168f:train.py",
    differs="KL is summed over the classes as in the paper; the code's mean over them makes lambda C times weaker",
    exact_accumulation=True,
)
@dataclass(frozen=True)
class TAKD:
    """Teacher -> assistants.0 -> assistants.1 -> ... -> student, every link trained from its predecessor alone.

    A link minimises (1 - lambda) CE(labels) + lambda T^2 KL(softmax(z_before / T) || softmax(z / T)), or any other
    losses, for the full number of steps; then the learner is frozen and teaches the next.

    match: losses of every link; the first is (1 - lambda) and the second lambda and T of the paper, which searches
        both (lambda 0.05 to 1, T 1 to 20).
    links: one such list a link instead, from the teacher to the student; () uses `match` throughout.
    assistants: how many to build when the recipe gives only how to build one (`assistant`), >= 0; 0 is plain
        distillation.

    *Needs*: nets.teacher (or its stored signals), nets.student, nets.assistants in falling size, or a factory of them.
    *Relates to*: use `distill` unless the student is many times smaller than its teacher; costs a training a link.
    *Differs*: see the card. The paper keeps each link's best weights by test accuracy; assistants keep their last.
    """

    match: tuple[Any, ...] = ({"ce": 0.1}, {"kd": {"weight": 0.9, "temperature": 4.0}})
    links: tuple[tuple[Any, ...], ...] = ()
    assistants: int = 1

    def __post_init__(self) -> None:
        require(self.assistants >= 0, "assistants", self.assistants, ">= 0")

    @cached_property
    def matches(self) -> list[tuple[Match, ...]]:
        """The losses of each link, parsed; a single entry serves all of them."""
        return [parse_all(link) for link in self.links or (self.match,)]

    def setup(self, nets: Nets, probe: Batch) -> None:
        """Build what is missing, and check every link on one batch."""
        if "assistants" not in nets:
            wanted = self.assistants if "assistant" in nets.factories else 0
            nets.assistants = nn.ModuleList(nets.fresh("assistant") for _ in range(wanted))
        count = len(nets.assistants) + 1
        if self.links and len(self.links) != count:
            raise BadInput(f"`links` must have an entry for each of the {count} links, got {len(self.links)}")
        pairs = {f"link{k}": pair for k, pair in enumerate(self.pairs(nets))}
        own(nets, pairs, dict.fromkeys(pairs, probe))

    def pairs(self, nets: Nets) -> list[Pair]:
        """Every link: who learns from whom."""
        chain = ["teacher", *(f"assistants.{i}" for i in range(len(nets.assistants))), "student"]
        matches = self.matches * (1 if self.links else len(chain) - 1)
        links = zip(pairwise(chain), matches, strict=True)
        return [Pair(below, above, m, f"losses.link{k}") for k, ((above, below), m) in enumerate(links)]

    def stages(self, nets: Nets, steps: int) -> Iterator[Stage]:
        """One stage a link."""
        pairs = self.pairs(nets)
        for k, pair in enumerate(pairs):
            last = k + 1 == len(pairs)
            yield Stage(steps, pair.learner, until=(k + 1) / len(pairs), validated=last)
            if not last:
                nets.freeze(pair.learner)

    def step(self, nets: Nets, batch: Batch, clock: Clock) -> Iterator[Turn]:
        """One turn of the link's learner."""
        pair = self.pairs(nets)[clock.stage]
        yield pair.learner, pair.parts(nets, batch, clock.progress)
