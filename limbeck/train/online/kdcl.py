"""Peers see different distortions of a picture, and all learn from one target made of what they say of them."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from limbeck.core.card import method, require
from limbeck.core.consensus import TARGETS, Errors, mixed
from limbeck.core.errors import BadInput
from limbeck.core.group import form, members
from limbeck.core.loop import Clock, Turn
from limbeck.core.nets import Batch, Nets
from limbeck.core.pair import classes
from limbeck.core.partition import by_client
from limbeck.core.reduce import UNLABELLED, Part, labelled, mean
from limbeck.core.views import another
from limbeck.losses.logits.ce import ce
from limbeck.losses.logits.kd import kd


@method(
    paper="Guo et al. 2020 (KDCL), section 3",
    year=2020,
    differs="there is no official code; the covariance of `general` is taken as training goes, on examples that no "
    "network learns from, instead of in a pass after each epoch",
)
@dataclass(frozen=True)
class KDCL:
    """Peer k minimises CE(labels, z_k) + w T^2 KL(softmax(t / T) || softmax(z_k / T)), each on its own view x_k.

    All peers speak before any of them is updated; the target t is a constant, made of z_1 .. z_m by

    - naive: z_k of the smallest cross-entropy, example by example;
    - linear: sum_k a_k z_k, a >= 0 of sum 1, with the least cross-entropy over the batch;
    - min_logit: min_k (z_k,j - z_k,y) for every class j, which is 0 for the label y;
    - general: sum_k w_k z_k, w from the inverse covariance of the peers' errors on held-out examples.

    target: one of these four. weight: w of the KL, >= 0. temperature: T > 0.
    augment: of pictures, drawn for every peer anew, on top of what the data brings; as in `data: augment`.
    peers: how many to build when the recipe does not give them, >= 2: the first as the student, others as `peer`.
    held_out: of `general`, the part of examples that is kept from learning, in (0, 1).

    *Needs*: labels; nets.peers, or factories "student" and "peer", which may be larger; `index` for general.
    *Relates to*: `dml` lets each learn from every other as it is; here the best of all is what is learned.
    *Differs*: see the card.
    """

    target: Literal["naive", "linear", "min_logit", "general"] = "min_logit"
    weight: float = 1.0
    temperature: float = 2.0
    augment: tuple[Any, ...] = ("crop",)
    peers: int = 2
    held_out: float = 0.1

    learner: ClassVar[str] = "peers.0"

    def __post_init__(self) -> None:
        require(self.target in (*TARGETS, "general"), "target", self.target, f"{', '.join(TARGETS)} or general")
        require(self.weight >= 0, "weight", self.weight, ">= 0")
        require(self.temperature > 0, "temperature", self.temperature, "> 0")
        require(self.peers >= 2, "peers", self.peers, ">= 2")
        require(0 < self.held_out < 1, "held_out", self.held_out, "in (0, 1)")

    def setup(self, nets: Nets, probe: Batch) -> None:
        """Build the peers when they are not given, and what is remembered of their errors."""
        players = form(nets, self.peers)
        classes(nets, probe, "kdcl", players)
        if self.target == "general":
            if "index" not in probe:
                raise BadInput("kdcl with `target: general` needs `index` in a batch, to know what is held out")
            nets.errors = Errors(len(players))

    def step(self, nets: Nets, batch: Batch, clock: Clock) -> Iterator[Turn]:
        """All speak, then a turn for every peer, in order."""
        players, labels, counts = members(nets), batch["labels"], labelled(batch)
        views = [batch | {"inputs": another(batch["inputs"], self.augment)} for _ in players]
        said = [nets.run(player, view)["logits"] for player, view in zip(players, views, strict=True)]
        told = torch.stack([z.detach() for z in said])
        if self.target == "general":
            apart = self.apart(batch["index"]).view(-1, *[1] * (labels.ndim - 1))
            nets.errors.add(told, labels, counts & apart, clock.epoch)
            target, counts = mixed(nets.errors.weights, told), counts & ~apart
        else:
            target = TARGETS[self.target](told, torch.where(counts, labels, UNLABELLED))
        for player, mine in zip(players, said, strict=True):
            parts: dict[str, Part] = {"ce": mean(ce(mine, labels), counts)}
            if self.weight:
                parts["kl"] = self.weight * mean(kd(mine, target, temperature=self.temperature), counts)
            yield player, parts

    def apart(self, index: Tensor) -> Tensor:
        """Which of the examples [B] are held out: always the same ones."""
        shares = torch.tensor([[1 - self.held_out, self.held_out]])
        return by_client(index, torch.zeros_like(index), shares) == 1
