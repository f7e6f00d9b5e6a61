"""The teacher's assistant is chosen among narrower copies of the teacher, all trained at once in one set of weights."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from limbeck.core.batches import generator
from limbeck.core.card import method, require
from limbeck.core.elastic import Candidates, narrowed, slopes
from limbeck.core.errors import BadInput
from limbeck.core.loop import Clock, Stage, Turn
from limbeck.core.nets import Batch, Nets
from limbeck.core.pair import Pair, parse_all
from limbeck.core.pairs import own
from limbeck.core.reduce import Part
from limbeck.core.surgery import copied
from limbeck.core.taps import Taps


@method(
    paper="Han et al. 2024, section 3",
    year=2024,
    arxiv="2407.04208",
    differs="of the groups that the paper prunes only the inner units of blocks go, ranked by their weights; every "
    "candidate has a part in every step; scores are of labelled examples held out from the assistants",
)
@dataclass(frozen=True)
class AMD:
    """Teacher -> all candidates A together -> the one of largest -(P_T - P_A) / (S_T - S_A) -> student.

    A candidate has the teacher's weights at the start, and of each block's inner units the share that is its scale,
    those of the largest weights, so that small ones lie inside large ones. Stage 1 minimises the mean over candidates
    of `match` with the teacher, in one network; stage 2 takes their accuracies P on examples held out, and trains
    nobody; S is the size. Stage 3 minimises `match` between the student and the chosen one, frozen.

    match: losses of either link; the paper's are labels, logits and features.
    scales: shares of inner units, each in (0, 1); the paper's grid has steps of a tenth.
    held: share of the labelled examples that the candidates do not learn from, in (0, 1). looks: batches of them that
        are scored, >= 1.

    *Needs*: a transformer as teacher, at hand, without batch norm, whose statistics candidates would share; labels.
    *Relates to*: `takd` when the assistant is known. Costs a training of all candidates beside the student's.
    *Differs*: see the card. Heads and layers all stay, so that no candidate is smaller than about a third.
    """

    match: tuple[Any, ...] = ("ce", {"kd": {"temperature": 4.0}}, "fitnets")
    scales: tuple[float, ...] = (0.2, 0.4, 0.6, 0.8)
    held: float = 0.2
    looks: int = 10

    def __post_init__(self) -> None:
        require(len(self.scales) > 0 and all(0 < s < 1 for s in self.scales), "scales", self.scales, "each in (0, 1)")
        require(0 < self.held < 1, "held", self.held, "in (0, 1)")
        require(self.looks >= 1, "looks", self.looks, ">= 1")

    @cached_property
    def pairs(self) -> dict[str, Pair]:
        """Both links: who learns from whom."""
        losses = parse_all(self.match)
        return {
            "link0": Pair("assistant", "teacher", losses, "losses.link0"),
            "link1": Pair("student", "assistant", losses, "losses.link1"),
        }

    def pools(self, labels: Tensor) -> dict[str, Tensor]:
        """Examples for the candidates, for their scores, always the same draw, and all, for the student."""
        known = (labels >= 0).nonzero()[:, 0]
        order = torch.randperm(len(known), generator=generator("held"))  # labels may lie in any order
        held = known[order[: max(1, int(len(known) * self.held))]].sort().values
        learned = torch.ones(len(labels), dtype=torch.bool).index_fill(0, held, False)
        return {"learned": learned.nonzero()[:, 0], "held": held, "all": torch.arange(len(labels))}

    def setup(self, nets: Nets, probe: Batch) -> None:
        """Copy the teacher, rank its units, and check both links on one batch."""
        if "teacher" not in nets:
            raise BadInput("candidates are cut from the teacher: it must be at hand, a store of its signals is not it")
        nets.assistant = copied(nets.teacher)
        if "teacher" in nets.taps:
            taps = nets.taps["teacher"]
            told = {name: paths[0] if name in taps.single else paths for name, paths in taps.paths.items()}
            nets.taps["assistant"] = Taps(nets.assistant, told)
        nets.candidates = Candidates(nets.teacher, self.scales)
        own(nets, self.pairs, dict.fromkeys(self.pairs, probe))

    def stages(self, nets: Nets, steps: int) -> Iterator[Stage]:
        """The candidates, their scores, the student."""
        yield Stage(steps, "candidates", "learned", until=0.5, validated=False)
        nets.freeze("assistant")
        yield Stage(self.looks, "scores", "held", until=0.55, validated=False)
        yield Stage(steps, "student", "all")

    def step(self, nets: Nets, batch: Batch, clock: Clock) -> Iterator[Turn]:
        """One turn of all candidates, or of the student; none while they are scored."""
        candidates = nets.candidates
        if clock.stage == 0:
            parts: dict[str, Part] = {}
            for c in range(len(candidates)):
                with narrowed(nets.assistant, candidates.masks(c)):
                    found = self.pairs["link0"].parts(nets, batch, clock.progress)
                parts |= {f"{name}_{self.scales[c]}": part * (1 / len(candidates)) for name, part in found.items()}
            yield "assistant", parts
        elif clock.stage == 1:
            self._score(nets, batch)
        else:
            with narrowed(nets.assistant, candidates.masks(int(candidates.chosen))):
                parts = self.pairs["link1"].parts(nets, batch, clock.progress)
            yield "student", parts

    def _score(self, nets: Nets, batch: Batch) -> None:
        """Count on one batch who is right, and choose by what is known by now."""
        candidates, labels = nets.candidates, batch["labels"]
        counts = batch.get("mask", torch.ones_like(labels, dtype=torch.bool)).bool()
        for c in range(len(candidates)):
            with narrowed(nets.assistant, candidates.masks(c)):
                candidates.right[c] += right(nets.run("assistant", batch)["logits"], labels, counts)
        candidates.right[-1] += right(nets.run("teacher", batch)["logits"], labels, counts)
        candidates.seen += counts.sum()
        candidates.chosen.copy_(slopes(candidates.right / candidates.seen.clamp_min(1), candidates.sizes).argmax())


def right(logits: Tensor, labels: Tensor, counts: Tensor) -> Tensor:
    """How many of the examples that count have their label on top."""
    return ((logits.argmax(-1) == labels) & counts).sum()
