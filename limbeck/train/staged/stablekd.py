"""Every block of the student learns alone from what goes in and out of the teacher's; then blocks are joined again."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from limbeck.core.blocks import Seams, ends, fed
from limbeck.core.card import method, require
from limbeck.core.errors import BadInput
from limbeck.core.layerwise import each
from limbeck.core.loop import Clock, Turn
from limbeck.core.maths import pair
from limbeck.core.nets import Batch, Nets, evaluating
from limbeck.core.pair import Pair, parse_all
from limbeck.core.reduce import mean


@method(
    paper="Kao et al. 2023, section 3",
    year=2023,
    arxiv="2312.13223",
    differs="the last block ends in the logits, which learn by the losses of the whole from the start; what fits "
    "widths is linear, and merges are even in time: the paper's form and moments were not at hand",
    exact_accumulation=True,
)
@dataclass(frozen=True)
class StableKD:
    """L = match(z_s, z_t) + weight sum_k mean (A_k(B_k(a_k(f_t^(k-1)))) - f_t^k)^2; then N -> N/2 -> ... -> 1 blocks.

    Blocks end where the networks' feats lie. In one pass each block B_k of the student reads the teacher's feature
    f_t^(k-1), detached, and not what the block before it gave: no gradient passes from block to block. The last one
    ends in the logits. Neighbours merge, the optimiser going on, until the student is whole and `match` is all.

    match: losses of the last block, at the end of the whole student; kd at temperature 4 beside ce.
    weight: of the features that blocks give, >= 0.
    share: of all steps in which there is more than one block, in (0, 1]; as many for each number of blocks.

    *Needs*: nets.teacher at hand; both return `feats`, the outputs of layers, equal but for their width.
    *Relates to*: `stagewise` matches features end to end, first, `distill` all at once. Use it when steps or data are
        few; adapters a_k, A_k are dropped.
    *Differs*: see the card.
    """

    match: tuple[Any, ...] = ("ce", {"kd": {"temperature": 4.0}})
    weight: float = 1.0
    share: float = 0.5

    def __post_init__(self) -> None:
        require(self.weight >= 0, "weight", self.weight, ">= 0")
        require(0 < self.share <= 1, "share", self.share, "in (0, 1]")

    @cached_property
    def pair(self) -> Pair:
        """The whole student and its teacher."""
        return Pair("student", "teacher", parse_all(self.match))

    def setup(self, nets: Nets, probe: Batch) -> None:
        """Find the blocks on one batch, and build what fits widths and the losses that own weights."""
        if "teacher" not in nets:
            raise BadInput("blocks learn from the teacher's inner features, which no store holds: it must be at hand")
        paths = ends(nets, "student", probe)
        with torch.no_grad(), evaluating(nets.student):
            mine, its = (nets.run(player, probe).get("feats", []) for player in ("student", "teacher"))
        nets.blocks = Seams(paths, mine, its)
        nets.losses = self.pair.build(nets, probe)
        nets.companions["student"] = ["losses", "blocks"]

    def seams(self, progress: float, blocks: int) -> list[int]:
        """Which of the blocks - 1 cuts are still open: each, then every second, every fourth ..., none."""
        merges = math.ceil(math.log2(blocks))
        every = 2 ** min(merges, int(progress / self.share * merges))
        return [k for k in range(blocks - 1) if (k + 1) % every == 0]

    def step(self, nets: Nets, batch: Batch, clock: Clock) -> Iterator[Turn]:
        """One turn of the student: all of its blocks."""
        blocks, told = nets.blocks, nets.run("teacher", batch)
        cuts = [(k, *blocks.cuts[k]) for k in self.seams(clock.progress, len(blocks.cuts) + 1)]
        known = {**batch, **{f"teacher_{name}": value for name, value in told.items()}}
        with fed(nets.student, {path: blocks.into[k](told["feats"][j]) for k, path, j in cuts}) as gave:
            parts = self.pair.parts(nets, known, clock.progress)
        for k, path, j in cuts:
            mine, aim = pair(blocks.out[k](gave[path]), told["feats"][j])
            parts[f"block{k}"] = self.weight * mean(each((mine - aim).square()), batch.get("mask"))
        yield "student", parts
