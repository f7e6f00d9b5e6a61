"""A student grows branches; a gate mixes what they say into a teacher, from which each of them learns."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from limbeck.core.branches import Branches, deep_layers, ordered, recorded, weighted
from limbeck.core.card import method, require
from limbeck.core.ema import sigmoid_rampup
from limbeck.core.features import pooled
from limbeck.core.loop import Clock, Turn
from limbeck.core.nets import Batch, Nets, evaluating
from limbeck.core.reduce import labelled, mean
from limbeck.core.taps import unwrap
from limbeck.losses.logits.ce import ce
from limbeck.losses.logits.kd import kd


@method(
    paper="Lan et al. 2018 (ONE), eq. 3 to 7",
    year=2018,
    arxiv="1806.04606",
    code="Lan1991Xu/ONE_NeurIPS2018@54afde3:cifar_one.py",
    differs="the code adds 1e-7 to each target probability; the ramp-up is a part of training instead of 80 of its 300 "
    "epochs",
)
@dataclass(frozen=True)
class OneEnsemble:
    """sum_i CE(labels, z_i) + CE(labels, z_e) + w(t) T^2 sum_i KL(softmax(z_e / T) || softmax(z_i / T)).

    z_i are the logits of M branches that share their shallow layers, z_e = sum_i g_i z_i, and the gate is g =
    softmax(ReLU(BN(FC(shared feature)))): >= 0, of sum 1. z_e is a constant in the KL. The first branch is the student
    itself, which leaves as a plain network; `ensemble` speaks for all of them (ONE-E). Examples labelled -100 take part
    in the KL alone.

    weight: of the KL, >= 0, reached by exp(-5 (1 - t / rampup)^2). rampup: a part of training in [0, 1].
    temperature: T > 0. branches: M >= 2.
    begin: path of the layer with which a branch begins; '' for the last part of all layers with weights, in the order
        in which they are called. part: how many of them, in (0, 1); a third is the last of three stages with its head.

    *Needs*: nets.student, and a factory of it, or layers that can reset themselves, for branches that start apart; no
        teacher. *Relates to*: `dml` for whole networks that teach each other, which costs more; `byot` for exits on the
        way. *Differs*: see the card.
    """

    weight: float = 1.0
    rampup: float = 80 / 300
    temperature: float = 3.0
    branches: int = 3
    begin: str = ""
    part: float = 1 / 3

    def __post_init__(self) -> None:
        require(self.weight >= 0, "weight", self.weight, ">= 0")
        require(0 <= self.rampup <= 1, "rampup", self.rampup, "in [0, 1]")
        require(self.temperature > 0, "temperature", self.temperature, "> 0")
        require(self.branches >= 2, "branches", self.branches, ">= 2")
        require(0 < self.part < 1, "part", self.part, "in (0, 1)")

    def setup(self, nets: Nets, probe: Batch) -> None:
        """Find where branches part, and build them and the gate."""
        student = unwrap(nets.student)
        called = ordered(student, lambda: nets.run("student", probe))
        layers = deep_layers(called, self.begin, self.part)
        trunk = [layer for path, layer in weighted(student).items() if path not in layers]
        with torch.no_grad(), evaluating(student), recorded(trunk, weighted(student)[layers[0]]) as tape:
            nets.run("student", probe)
        donors = [unwrap(nets.fresh("student")) for _ in range(self.branches - 1)]
        nets.branches = Branches(layers, donors, pooled(tape.feature).shape[-1])
        nets.companions["student"] = ["branches"]

    def speak(self, nets: Nets, batch: Batch) -> tuple[Tensor, Tensor]:
        """Logits of every branch [M, ..., C], and of their mixture [..., C]."""
        said, gate = nets.branches.run(nets, "student", batch)
        gate = gate.mT.reshape(*gate.mT.shape, *[1] * (said.ndim - 2))
        return said, (gate * said).sum(0)

    def step(self, nets: Nets, batch: Batch, clock: Clock) -> Iterator[Turn]:
        """One turn of the student with all its branches."""
        said, mixed = self.speak(nets, batch)
        hard = torch.stack([ce(z, batch["labels"]) for z in (*said, mixed)]).sum(0)
        parts = {"ce": mean(hard, labelled(batch))}
        if self.weight:
            height = self.weight * sigmoid_rampup(clock.progress, self.rampup)
            soft = torch.stack([kd(z, mixed, temperature=self.temperature) for z in said]).sum(0)
            parts["kl"] = height * mean(soft, batch.get("mask"))
        yield "student", parts

    def ensemble(self, nets: Nets, batch: Batch) -> Tensor:
        """Logits [..., C] of all branches by the gate, in eval mode (ONE-E)."""
        with torch.no_grad(), evaluating(nets.student, nets.branches):
            return self.speak(nets, batch)[1]
