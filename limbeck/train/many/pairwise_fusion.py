"""Copies of one student learn from a source each, whatever its words are; their weights are merged into one."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

from limbeck.core.card import method, require
from limbeck.core.fusion import branch, heard, merge
from limbeck.core.loop import Clock, Stage, Turn
from limbeck.core.match import Match
from limbeck.core.merging import MERGES
from limbeck.core.nets import Batch, Nets
from limbeck.core.pair import Pair, parse_all
from limbeck.core.pairs import own
from limbeck.core.selection import teachers_of


@method(
    paper="Yan et al. 2025, pairwise fusion",
    year=2025,
    arxiv="2501.02795",
    differs="how the paper merges its copies is not known for certain: a mean of weights, or as `merge` says",
    row="infifusion",
    exact_accumulation=True,
)
@dataclass(frozen=True)
class PairwiseFusion:
    """Copy k of the student minimises the losses with source k alone; then W = merge(W_start, W_0, W_1, ...).

    match: losses of every copy, as names, {name: {knob: value, weight: number}} or callables.
    merge: average, task_arithmetic, ties or arcee_fusion. scale: of task_arithmetic and ties, on what the copies have
        learned, > 0. keep: of ties, the part of a copy's changes that is left, in (0, 1].

    *Needs*: nets.teachers (nets.teacher counts as a list of one), trained; of texts in other tokens `retold` in the
        data. A student that knows something already: copies that begin at random do not average. *Relates to*:
        `unified_fusion` trains one network for all sources and costs as many times less; `branch_merge` gives each
        copy a domain instead of a source. *Differs*: see the card. All copies are in memory at once.
    """

    match: tuple[Any, ...] = ("ce", "infifusion")
    merge: Literal["average", "task_arithmetic", "ties", "arcee_fusion"] = "average"
    scale: float = 1.0
    keep: float = 0.2

    def __post_init__(self) -> None:
        require(self.merge in MERGES, "merge", self.merge, f"one of {', '.join(MERGES)}")
        require(self.scale > 0, "scale", self.scale, "> 0")
        require(0 < self.keep <= 1, "keep", self.keep, "in (0, 1]")

    @cached_property
    def matches(self) -> tuple[Match, ...]:
        """The losses, parsed."""
        return parse_all(self.match)

    def pair(self, number: int) -> Pair:
        """A copy and its source, which speaks in the batch."""
        return Pair(f"branches.{number}", "teacher", self.matches, f"losses.source{number}")

    def setup(self, nets: Nets, probe: Batch) -> None:
        """Copy the student, and check the losses of every source on one batch."""
        branch(nets, max(1, len(teachers_of(nets))), "pairwise_fusion")
        probes = {f"source{k}": told for k, told in enumerate(heard(nets, probe, "pairwise_fusion"))}
        own(nets, {name: self.pair(k) for k, name in enumerate(probes)}, probes)

    def stages(self, nets: Nets, steps: int) -> Iterator[Stage]:
        """The copies; their merge is the student."""
        yield Stage(steps, "sources", validated=False)
        merge(nets, self.merge, scale=self.scale, keep=self.keep)

    def step(self, nets: Nets, batch: Batch, clock: Clock) -> Iterator[Turn]:
        """One turn of each copy."""
        for k, told in enumerate(heard(nets, batch, "pairwise_fusion")):
            yield f"branches.{k}", self.pair(k).parts(nets, told, clock.progress)
