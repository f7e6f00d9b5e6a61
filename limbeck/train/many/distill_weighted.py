"""Networks trained on other tasks teach a student through heads of their own, each as much as its task is alike."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from limbeck.core.card import method, require
from limbeck.core.errors import BadInput
from limbeck.core.features import pooled
from limbeck.core.loop import Clock, Turn
from limbeck.core.nets import Batch, Nets, evaluating
from limbeck.core.reduce import Part, labelled, mean
from limbeck.core.selection import teachers_of
from limbeck.core.similarity import Probe
from limbeck.losses.logits.ce import ce
from limbeck.losses.logits.kd import kd


@method(
    paper="Borup et al. 2023, eq. 1 to 4",
    year=2023,
    arxiv="2304.12314",
    differs="the authors' repository holds no code; sources weigh alike until the first pass over the data has shown "
    "enough labelled examples to score them by; T^2 stands before the divergence",
    exact_accumulation=True,
)
@dataclass(frozen=True)
class DistillWeighted:
    """l CE(labels, z) + (1 - l) sum_s w_s T^2 KL(softmax(h_s(x) / T) || softmax(a_s(phi(x)) / T)), on all examples.

    h_s is source s, over classes of its own, a_s a linear head on the student's embedding phi, trained with it and
    dropped. w_s = max(e_s, 0)^power / sum, e_s the rank correlation between how pairs of labelled examples differ in
    the source's features and in their labels (PARC). Examples labelled -100 take part in the divergences alone.

    labelled: l in [0, 1], of the cross-entropy. temperature: T > 0.
    power: >= 0; 0 weighs all sources alike, .inf listens to the best alone (DistillNearest).
    probe: labelled examples that sources are scored by, >= 3. components: to which their features are reduced, 0 for
        none.

    *Needs*: nets.teachers (or nets.teacher) with `emb` or `feats`; a student with `emb`; few labels and many examples.
    *Relates to*: `several_teachers` and `transfer` for teachers over the student's own classes.
    *Differs*: see the card.
    """

    labelled: float = 0.8
    temperature: float = 1.0
    power: float = 9.0
    probe: int = 500
    components: int = 32

    def __post_init__(self) -> None:
        require(0 <= self.labelled <= 1, "labelled", self.labelled, "in [0, 1]")
        require(self.temperature > 0, "temperature", self.temperature, "> 0")
        require(self.power >= 0, "power", self.power, ">= 0")
        require(self.probe >= 3, "probe", self.probe, ">= 3")
        require(self.components >= 0, "components", self.components, ">= 0")

    def setup(self, nets: Nets, probe: Batch) -> None:
        """Build a head for each source, and the memory by which they are scored."""
        if not teachers_of(nets):
            raise BadInput("distill_weighted needs nets.teachers, a list of at least one network, or nets.teacher")
        with torch.no_grad(), evaluating(*nets.modules.values()):
            told = nets.run("student", probe)
            said = [nets.run(name, probe) for name in teachers_of(nets)]
        if "emb" not in told:
            raise BadInput("distill_weighted needs a student that returns `emb`, or taps that read it")
        width = told["emb"].shape[-1]
        nets.heads = nn.ModuleList(nn.Linear(width, source["logits"].shape[-1]) for source in said)
        nets.companions["student"] = ["heads"]
        nets.sources = Probe([feature(source).shape[-1] for source in said], self.probe)

    def step(self, nets: Nets, batch: Batch, clock: Clock) -> Iterator[Turn]:
        """One turn of the student with all heads."""
        labels, mask, known = batch["labels"], batch.get("mask"), labelled(batch)
        with torch.no_grad():
            said = [nets.run(name, batch) for name in teachers_of(nets)]
        if not nets.sources.done:
            nets.sources.add([feature(source) for source in said], labels, known)
        told = nets.run("student", batch)
        parts: dict[str, Part] = {}
        if self.labelled:
            parts["ce"] = self.labelled * mean(ce(told["logits"], labels), known)
        if self.labelled < 1:
            heads = zip(nets.heads, said, nets.sources.weights.float(), strict=True)
            each = [
                w * kd(head(told["emb"]), source["logits"], temperature=self.temperature) for head, source, w in heads
            ]
            parts["sources"] = (1 - self.labelled) * mean(torch.stack(each).sum(0), mask)
        yield "student", parts

    def after(self, nets: Nets, player: str, clock: Clock) -> None:
        """Weigh the sources once enough labelled examples, or all of them, have been seen."""
        sources = nets.sources
        if not sources.done and (int(sources.count) >= self.probe or clock.epoch):
            sources.settle(self.power, self.components)


def feature(told: Mapping[str, Any]) -> Tensor:
    """What a source knows of an example before it names a class: [B, D]."""
    if "emb" in told:
        emb: Tensor = told["emb"].flatten(1)
        return emb
    if "feats" not in told:
        raise BadInput("distill_weighted needs sources that return `emb` or `feats`, or taps that read them")
    return pooled(told["feats"][-1])
