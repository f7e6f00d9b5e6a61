"""Of several language models each text has the one that knows it best, and the student learns its distribution."""

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from limbeck.core.card import method, require
from limbeck.core.errors import BadInput
from limbeck.core.fusion import NOBODY, cost, heard, partners, reworded, top_logits
from limbeck.core.loop import Clock, Turn
from limbeck.core.maths import log_probs, upcast
from limbeck.core.nets import Batch, Nets, evaluating
from limbeck.core.reduce import Part, labelled, mean
from limbeck.core.taps import untap
from limbeck.losses.logits.ce import ce


@method(
    paper="Wan et al. 2024, eq. 3-6, MinED, MinCE and AvgCE",
    year=2024,
    arxiv="2401.10491",
    code="fanqiwan/FuseAI@7d9a307:FuseLLM/src/utils/trainer.py",
    differs="texts are aligned by bytes, and what a place predicts with it: the code warps token strings, and its "
    "one-hot fallback is the place's own token, here the next one; the cross-entropy that chooses is of a source's own "
    "tokens as in the code, but a token of the student, not of the source; sources are asked while the student learns",
    exact_accumulation=True,
)
@dataclass(frozen=True)
class FuseLLM:
    """weight CE(labels) + (1 - weight) CE(P || student), P = the matrix of the source with the least CE on the text.

    A source's matrix holds at each place of the student softmax(z / T) over its `top` largest logits, each given to the
    student's word that is nearest in spelling (the largest where several meet), or the label alone where one token of
    the source is not one of the student, or all of its words are strangers. Rows sum to 1.

    weight: of the labels, in [0, 1]; 1 is continued training. fusion: min_ce, or avg_ce, where P is the mean of all
    matrices weighed by softmax over sources of exp(-CE).
    own: the student as it starts is a source, too. top: >= 1. temperature: T > 0, of sources.

    *Needs*: nets.teachers (nets.teacher counts as a list of one), trained; of texts in other tokens `retold` in the
        data. A student that knows something already, whose training goes on. *Relates to*: `mined` for one teacher;
        `unified_fusion` learns from all sources alike, and compares by rank. Costs a forward pass a source.
    *Differs*: see the card.
    """

    weight: float = 0.9
    fusion: Literal["min_ce", "avg_ce"] = "min_ce"
    own: bool = True
    top: int = 10
    temperature: float = 1.0

    def __post_init__(self) -> None:
        require(0 <= self.weight <= 1, "weight", self.weight, "in [0, 1]")
        require(self.fusion in ("min_ce", "avg_ce"), "fusion", self.fusion, "min_ce or avg_ce")
        require(self.top >= 1, "top", self.top, ">= 1")
        require(self.temperature > 0, "temperature", self.temperature, "> 0")

    def setup(self, nets: Nets, probe: Batch) -> None:
        """Keep the student as it is, and check that the sources' words are known."""
        if self.own:
            nets.teacher_own = copy.deepcopy(nets.student)
            untap(nets.teacher_own)
            nets.freeze("teacher_own")
        with torch.no_grad(), evaluating(*nets.modules.values()):
            self.fused(nets, probe, nets.run("student", probe)["logits"].shape[-1])

    def fused(self, nets: Nets, batch: Batch, words: int) -> Tensor:
        """P [..., words] of a batch."""
        sources = heard(nets, batch, "fusellm")
        costs = [cost(source["teacher_logits"], source) for source in sources]
        told = [self.matrix(source, words) for source in sources]
        if self.own:
            plain = {name: value for name, value in batch.items() if not name.startswith("teacher_")}
            logits = nets.run("teacher_own", plain)["logits"]
            costs.insert(0, cost(logits, plain))
            told.insert(0, self.matrix({"teacher_logits": logits}, words))
        return fuse(torch.stack(told), torch.stack(costs), self.fusion)

    def matrix(self, source: Batch, words: int) -> Tensor:
        """What one source says, in the student's words [..., words]."""
        z = top_logits(source["teacher_logits"], self.top)
        if "teacher_inputs" not in source:
            if z.shape[-1] != words:
                raise BadInput(f"a source knows {z.shape[-1]} words and the student {words}: add `retold` to the data")
            return (z / self.temperature).softmax(-1)
        masks = source.get("mask"), source.get("teacher_mask")
        alike, place = partners(source["student_spans"], source["teacher_spans"], *masks)
        z = reworded(z, source["nearest_words"], words)
        z = z.gather(1, place.unsqueeze(-1).expand(-1, -1, words))
        known = alike & (z.amax(-1) > NOBODY)
        label = F.one_hot(source["labels"].clamp_min(0), words).to(z)
        return torch.where(known.unsqueeze(-1), (z / self.temperature).softmax(-1), label)

    def step(self, nets: Nets, batch: Batch, clock: Clock) -> Iterator[Turn]:
        """One turn of the student."""
        z = nets.run("student", batch)["logits"]
        parts: dict[str, Part] = {}
        if self.weight:
            parts["labels"] = self.weight * mean(ce(z, batch["labels"]), labelled(batch))
        if self.weight < 1:
            with torch.no_grad():
                target = self.fused(nets, batch, z.shape[-1])
            apart = -(target * log_probs(upcast(z))).sum(-1)
            parts["fused"] = (1 - self.weight) * mean(apart, batch.get("mask"))
        yield "student", parts


def fuse(matrices: Tensor, costs: Tensor, fusion: str) -> Tensor:
    """One matrix [B, ...] of those of all sources [M, B, ...], which cost [M, B]; among equals the first is best."""
    if fusion == "min_ce":
        return matrices[costs.argmin(0), torch.arange(costs.shape[1], device=costs.device)]
    weights = (-costs).exp().softmax(0).view(*costs.shape, *[1] * (matrices.ndim - 2))
    return (weights.to(matrices) * matrices).sum(0)
