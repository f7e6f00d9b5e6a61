"""Peers that start untrained teach each other, one after the other on the same batch."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch

from limbeck.core.card import method, require
from limbeck.core.group import form, members
from limbeck.core.loop import Clock, Turn
from limbeck.core.nets import Batch, Nets
from limbeck.core.pair import classes
from limbeck.core.reduce import Part, labelled, mean
from limbeck.losses.logits.ce import ce
from limbeck.losses.logits.kd import kd


@method(
    paper="Zhang et al. 2017, algorithm 1",
    year=2017,
    arxiv="1706.00384",
    code="YingZhangDUT/Deep-Mutual-Learning@34a2058:train_models.py",
    differs="the code draws a new batch for every peer; the paper, followed here, gives all of them the same one",
    exact_accumulation=True,
)
@dataclass(frozen=True)
class DML:
    """Peer k minimises CE(labels, p_k) + w / (K - 1) sum_{l != k} KL(p_l || p_k), where p_l is a constant.

    Each peer is updated before the next one looks at it. Examples labelled -100 take part in the KL alone
    (semi-supervised).

    weight: w of the KL part, >= 0; 0 trains each peer alone.
    temperature: of both sides in the KL, > 0; the paper's is 1.
    peers: how many to build when the recipe does not give them, >= 1: the first as the student, others as `peer`.

    *Needs*: nets.peers, equal or of different architecture, or factories "student" and "peer"; no teacher.
    *Relates to*: use `distill` when a good teacher exists: mutual learning is for starting from nothing.
    *Differs*: see the card. Peers speak in training mode, as in the code, so that dropout and batch statistics stay on.
    """

    weight: float = 1.0
    temperature: float = 1.0
    peers: int = 2

    learner: ClassVar[str] = "peers.0"

    def __post_init__(self) -> None:
        require(self.weight >= 0, "weight", self.weight, ">= 0")
        require(self.temperature > 0, "temperature", self.temperature, "> 0")
        require(self.peers >= 1, "peers", self.peers, ">= 1")

    def setup(self, nets: Nets, probe: Batch) -> None:
        """Build the peers when they are not given, and see that they can be compared."""
        classes(nets, probe, "dml", form(nets, self.peers))

    def step(self, nets: Nets, batch: Batch, clock: Clock) -> Iterator[Turn]:
        """A turn for every peer, in order."""
        players = members(nets)
        labels, mask, known = batch["labels"], batch.get("mask"), labelled(batch)
        for player in players:
            others = [p for p in players if p != player]
            with torch.no_grad():
                theirs = [nets.run(p, batch)["logits"] for p in others]
            mine = nets.run(player, batch)["logits"]
            parts: dict[str, Part] = {"ce": mean(ce(mine, labels), known)}
            if others and self.weight:
                kl = torch.stack([kd(mine, t, temperature=self.temperature) for t in theirs]).mean(0)
                parts["kl"] = self.weight * mean(kl, mask)
            yield player, parts
