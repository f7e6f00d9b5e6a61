"""Copies of one student learn a domain each from the teacher; their weights are merged into one, without training."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor

from limbeck.core.card import method, require
from limbeck.core.errors import BadInput
from limbeck.core.fusion import branch, merge
from limbeck.core.loop import Clock, Stage, Turn
from limbeck.core.match import Match
from limbeck.core.merging import MERGES
from limbeck.core.nets import Batch, Nets
from limbeck.core.pair import Pair, parse_all
from limbeck.core.pairs import own
from limbeck.core.partition import by_client, only, quiet


@method(
    paper="Sun et al. 2025 (TinyR1), section 2",
    year=2025,
    arxiv="2503.04872",
    code="arcee-ai/mergekit@a6e4028:mergekit/merge_methods/arcee_fusion.py",
    differs="any losses for training on texts of the teacher; quantiles are those of all entries, where the code takes "
    "a random million of them, and importance is computed in fp64",
    exact_accumulation=True,
)
@dataclass(frozen=True)
class BranchMerge:
    """Branch k minimises the losses on domain k alone; then W = merge(W_start, W_0, W_1, ...), and nobody trains.

    arcee_fusion goes in sequence, W <- merge(W into W_k as the base): an entry is W's where |W - W_k| KL(softmax of its
    row in W || that in W_k) >= median + 1.5 (Q3 - Q1) of the tensor's, else W_k's. The last domain is the last base.

    match: losses of every branch; the paper's is "ce" on answers of the teacher to the domain's questions.
    branches: how many, >= 1: one a domain.
    together: in [0, 1), the part of the steps in which the student itself learns from all domains, before it branches;
        0 where it comes trained, as the paper's. A merge is good for branches that are still alike.
    merge: arcee_fusion, average, task_arithmetic or ties.
    scale: of task_arithmetic and ties, on what the branches have learned, > 0. keep: of ties, the part of a branch's
        changes that is left, in (0, 1]; 0.2 in its paper.

    *Needs*: nets.student; nets.teacher when a loss asks for it; batches with `domain` in [0, branches), or `index`, by
    which examples without domain are dealt out at random. *Relates to*: `distill` on all domains at once, which a merge
    of branches has to beat; branches can be trained apart, on machines that do not know one another.
    *Differs*: see the card. All branches are in memory at once, each learning from its part of every batch.
    """

    match: tuple[Any, ...] = ("ce",)
    branches: int = 2
    together: float = 0.0
    merge: Literal["arcee_fusion", "average", "task_arithmetic", "ties"] = "arcee_fusion"
    scale: float = 1.0
    keep: float = 0.2

    def __post_init__(self) -> None:
        require(self.branches >= 1, "branches", self.branches, ">= 1")
        require(0 <= self.together < 1, "together", self.together, "in [0, 1)")
        require(self.scale > 0, "scale", self.scale, "> 0")
        require(0 < self.keep <= 1, "keep", self.keep, "in (0, 1]")
        require(self.merge in MERGES, "merge", self.merge, f"one of {', '.join(MERGES)}")

    @cached_property
    def matches(self) -> tuple[Match, ...]:
        """The losses, parsed."""
        return parse_all(self.match)

    def pair(self, learner: str) -> Pair:
        """Who learns from the teacher."""
        return Pair(learner, "teacher", self.matches, f"losses.{learner.replace('.', '')}")

    def setup(self, nets: Nets, probe: Batch) -> None:
        """Copy the student, and check the losses on one batch."""
        branch(nets, self.branches, "branch_merge")
        self.whose(probe)
        pairs = [self.pair(name) for name in (*(["student"] if self.together else []), *self.players)]
        named = {pair.losses.partition(".")[2]: pair for pair in pairs}
        own(nets, named, dict.fromkeys(named, probe))

    @property
    def players(self) -> list[str]:
        """The branches, in order."""
        return [f"branches.{k}" for k in range(self.branches)]

    def stages(self, nets: Nets, steps: int) -> Iterator[Stage]:
        """The student, then its branches; their merge is the student."""
        first = max(1, round(self.together * steps)) if self.together else 0
        if first:
            yield Stage(first, "together", until=self.together)
        for one in nets.branches:
            one.load_state_dict(nets.student.state_dict())
        yield Stage(max(1, steps - first), "branches", validated=False)
        merge(nets, self.merge, scale=self.scale, keep=self.keep)

    def step(self, nets: Nets, batch: Batch, clock: Clock) -> Iterator[Turn]:
        """One turn of the student, or of each branch on its own examples."""
        if self.together and not clock.stage:
            yield "student", self.pair("student").parts(nets, batch, clock.progress)
            return
        whose = self.whose(batch)
        for k, player in enumerate(self.players):
            own = only(batch, whose == k)
            with quiet(nets.find(player), own):
                parts = self.pair(player).parts(nets, own, clock.progress)
            yield player, parts

    def whose(self, batch: Batch) -> Tensor:
        """The branch [B] that learns from each example."""
        if "domain" in batch:
            domain: Tensor = batch["domain"]
            if (last := int(domain.max())) >= self.branches:
                raise BadInput(f"`domain` must be in [0, {self.branches}), the branches, got {last}")
            return domain
        if "index" not in batch:
            raise BadInput("branch_merge needs `domain` or `index` in a batch, to know which branch an example is for")
        share = torch.full((1, self.branches), 1 / self.branches)
        return by_client(batch["index"], torch.zeros_like(batch["index"]), share)
