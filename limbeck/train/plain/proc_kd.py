"""What a teacher of another task saw, as a bank of prototypes of parts, is read by the student before it decides."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from limbeck.core.card import method, require
from limbeck.core.features import per_example, picture, tokens
from limbeck.core.graft import Grafted, anatomy
from limbeck.core.loop import Clock, Stage, Turn
from limbeck.core.maths import upcast
from limbeck.core.nets import Batch, Nets, evaluating
from limbeck.core.pair import Pair, parse_all
from limbeck.core.prototypes import Bank, Guide
from limbeck.core.reduce import mean
from limbeck.core.teachers import at_hand


@method(
    paper="Li et al. 2022, prototype learning and task-adaptive feature augmentation",
    year=2022,
    arxiv="2212.13180",
    differs="no code is public, and rule of assignment, size of the bank, fusion and weights are our reading of the "
    "paper's outline, not checked against it: nearest prototype in stage 1, soft reading in stage 2. A commitment term "
    "is left out, since its gradient would go to the frozen teacher",
)
@dataclass(frozen=True)
class ProCKD:
    """Stage 1: min_k |f_t - p_k|^2 at every place. Stage 2: `match` of the augmented student + weight |W f_s - a P|^2.

    f_t is the teacher's feature, whose places are parts of objects; prototypes P begin at such features and are fixed
    in stage 2. There the student's last feature becomes f_s + V a P with a = softmax(W f_s . P / (temperature
    sqrt(D))), then its mean goes to its own head. The difference is squared and its mean taken over channels and
    places. W, V and P stay in the student and count as its parameters and buffers.

    match: losses of the augmented student, such as cross-entropy with its own labels.
    weight: of the distance between what is asked and what is read, >= 0.
    prototypes: how many, >= 1.
    temperature: of the reading, > 0.
    pretraining: steps of the first stage, as a share of those of the second, in (0, 1]. The student has no part in it.
    layer: which of the teacher's features, counted from shallow (0) or from deep (-1).

    *Needs*: a teacher at hand with `feats`; a student whose logits a linear layer gives. Their classes may differ.
    *Relates to*: use it when no teacher knows the task itself. `fitnets` copies features picture by picture, also
        across tasks, and leaves the student as it was.
    """

    match: tuple[Any, ...] = ("ce",)
    weight: float = 1.0
    prototypes: int = 64
    temperature: float = 1.0
    pretraining: float = 0.2
    layer: int = -1

    def __post_init__(self) -> None:
        require(self.weight >= 0, "weight", self.weight, ">= 0")
        require(self.prototypes >= 1, "prototypes", self.prototypes, ">= 1")
        require(self.temperature > 0, "temperature", self.temperature, "> 0")
        require(0 < self.pretraining <= 1, "pretraining", self.pretraining, "in (0, 1]")

    @cached_property
    def pair(self) -> Pair:
        """The student and its teacher, for the losses beside."""
        return Pair("student", "teacher", parse_all(self.match))

    def setup(self, nets: Nets, probe: Batch) -> None:
        """Begin the prototypes at features of one batch, and put the neck into the student."""
        at_hand(nets, "proc_kd", "learns prototypes of the teacher's features")
        with torch.no_grad(), evaluating(nets.teacher):
            feature = upcast(nets.run("teacher", probe)["feats"][self.layer])
        real = probe.get("mask", torch.ones(len(feature))).bool()
        features = tokens(feature)[real.to(feature.device)].flatten(0, 1)
        nets.bank = Bank(self.prototypes, features.shape[1])
        nets.bank.start(features)
        student = anatomy(nets, "student", probe)
        width = picture(student.feature).shape[1]
        neck = Guide(width, features.shape[1], self.prototypes, self.temperature)
        nets.student = Grafted(nets.student, neck, student.head, cut=student.path, reads=student.reads)
        nets.losses = self.pair.build(nets, probe)
        nets.companions["student"] = ["losses"]

    def stages(self, nets: Nets, steps: int) -> Iterator[Stage]:
        """The prototypes', then the student's."""
        before = max(1, round(self.pretraining * steps))
        yield Stage(before, "prototypes", until=before / (before + steps), validated=False)
        nets.student.neck.prototypes.copy_(nets.bank.prototypes.detach())
        nets.freeze("bank")
        yield Stage(steps, "student")

    def step(self, nets: Nets, batch: Batch, clock: Clock) -> Iterator[Turn]:
        """One turn of whoever learns in this stage."""
        mask = batch.get("mask")
        if clock.stage == 0:
            places = tokens(upcast(nets.run("teacher", batch)["feats"][self.layer]))
            yield "bank", mean(nets.bank(places).mean(1), mask)
            return
        have, owned = {**self.pair.gather(nets, batch), "progress": clock.progress}, nets.losses
        parts = {
            m.name: m.part(have, clock.progress, owned[m.name] if m.is_module else None) for m in self.pair.matches
        }
        if self.weight:
            parts["asked"] = self.weight * mean(per_example(upcast(have["student_grafted"]).square()), mask)
        yield "student", parts
