"""One student learns at once from several sources, each with words of its own."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor

from limbeck.core.card import method, require
from limbeck.core.fusion import best, cost, heard, pooled
from limbeck.core.loop import Clock, Turn
from limbeck.core.match import Match
from limbeck.core.nets import Batch, Nets
from limbeck.core.pair import Pair, parse_all
from limbeck.core.pairs import own


@method(
    paper="Yan et al. 2025, unified fusion",
    year=2025,
    arxiv="2501.02795",
    differs="how the paper sums its sources up is not known for certain: the mean of all, or the best of each text",
    row="infifusion",
    exact_accumulation=True,
)
@dataclass(frozen=True)
class UnifiedFusion:
    """Sum of losses between a student and labels, and of the means over sources of losses between it and a source.

    match: losses as names, {name: {knob: value, weight: number}} or callables. Those that ask for no teacher are there
        once, each other one for every source, whose losses that own weights are its own.
    choose: all, the mean over sources; or best, where each text learns only from the source whose words tell it at the
        least cost, in nats a token of the student.

    *Needs*: nets.teachers (nets.teacher counts as a list of one), trained; of texts in other tokens `retold` in the
        data. *Relates to*: `fusellm` mixes distributions word by word, `pairwise_fusion` weights; `several_teachers`
        for teachers over the student's own words. Costs a forward pass a source.
    *Differs*: see the card.
    """

    match: tuple[Any, ...] = ("ce", "infifusion")
    choose: Literal["all", "best"] = "all"

    def __post_init__(self) -> None:
        require(self.choose in ("all", "best"), "choose", self.choose, "all or best")

    @cached_property
    def matches(self) -> dict[bool, tuple[Match, ...]]:
        """The losses, by whether a source is asked."""
        every = parse_all(self.match)
        asks = [any(name.startswith("teacher_") for name in m.needs) for m in every]
        return {told: tuple(m for m, a in zip(every, asks, strict=True) if a is told) for told in (False, True)}

    @cached_property
    def plain(self) -> Pair:
        """The student and what it learns from labels."""
        return Pair("student", "", self.matches[False], "losses.labels")

    def source(self, number: int) -> Pair:
        """The student and what it learns from one source, which speaks in the batch."""
        return Pair("student", "teacher", self.matches[True], f"losses.source{number}")

    def setup(self, nets: Nets, probe: Batch) -> None:
        """Check the losses of every source on one batch, and build those that own weights."""
        probes = {f"source{k}": told for k, told in enumerate(heard(nets, probe, "unified_fusion"))}
        pairs = {name: self.source(k) for k, name in enumerate(probes)}
        own(nets, {**pairs, "labels": self.plain}, {**probes, "labels": probe})

    def step(self, nets: Nets, batch: Batch, clock: Clock) -> Iterator[Turn]:
        """One turn of the student."""
        sources = heard(nets, batch, "unified_fusion")
        said = nets.run("student", batch)
        parts = self.plain.parts(nets, batch, clock.progress, said=said)
        if self.choose == "best":
            masks = best(torch.stack([cost(s["teacher_logits"], s) for s in sources]), self.everyone(batch))
            sources = [{**source, "mask": mask} for source, mask in zip(sources, masks, strict=True)]
        told = [self.source(k).parts(nets, source, clock.progress, said=said) for k, source in enumerate(sources)]
        parts |= {m.name: pooled([part[m.name] for part in told]) for m in self.matches[True]}
        yield "student", parts

    def everyone(self, batch: Batch) -> Tensor:
        """The mask of a batch, or all True."""
        mask: Tensor = batch["mask"].bool() if "mask" in batch else torch.ones_like(batch["labels"], dtype=torch.bool)
        return mask
