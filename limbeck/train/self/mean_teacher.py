"""The teacher is the average of the student's own past weights; both see their own noise, and should say the same."""

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from limbeck.core.card import method, require
from limbeck.core.ema import follow, ramped, sigmoid_rampup
from limbeck.core.loop import Clock, Turn
from limbeck.core.maths import kl, pair
from limbeck.core.nets import Batch, Nets
from limbeck.core.reduce import labelled, mean
from limbeck.core.taps import untap
from limbeck.core.views import another
from limbeck.losses.logits.ce import ce


@method(
    paper="Tarvainen and Valpola 2017, section 2",
    year=2017,
    arxiv="1703.01780",
    code="CuriousAI/mean-teacher@546348f:pytorch/main.py",
    differs="the label term is the mean over labelled examples, where the code divides by all of the batch; the "
    "teacher starts as a copy, not as another random network; the second head with its logit distance is left out",
)
@dataclass(frozen=True)
class MeanTeacher:
    """CE(labels, z) + w(t) d(softmax z, softmax z'), where z' is what the average of the student says of another view.

    d is the mean over classes of squared differences, or KL(softmax z' || softmax z); labels -100 take part in d
    alone. After each step average <- a average + (1 - a) student, a = min(1 - 1 / (t + 1), decay), of parameters; the
    average is in training mode, with its own batch-norm statistics.

    weight: w at its height, >= 0; 100 on CIFAR, since squared differences of probabilities are small.
    rampup: share of training, in [0, 1], over which w rises as exp(-5 (1 - t / rampup)^2).
    decay: in [0, 1); early_decay: in its place during the ramp-up. With 0 the average is the student (the Pi model).
    distance: "mse" or "kl".
    augment: of pictures, drawn for student and average each, on top of what the data brings; as in `data: augment`.
    result: which network is kept, "average" or "student".

    *Needs*: nets.student with some noise: augmentation or dropout. Made for few labels among many examples (`labelled`
        in the recipe's data). *Relates to*: an average alone helps: compare with `ema` in the recipe's `train`; use
        `dml` for peers, `ps_kd` without a second pass. *Differs*: see the card.
    """

    weight: float = 100.0
    rampup: float = 0.25
    decay: float = 0.999
    early_decay: float = 0.99
    distance: Literal["mse", "kl"] = "mse"
    augment: tuple[Any, ...] = ("crop",)
    result: Literal["average", "student"] = "average"

    def __post_init__(self) -> None:
        require(self.weight >= 0, "weight", self.weight, ">= 0")
        require(0 <= self.rampup <= 1, "rampup", self.rampup, "in [0, 1]")
        require(0 <= self.decay < 1, "decay", self.decay, "in [0, 1)")
        require(0 <= self.early_decay < 1, "early_decay", self.early_decay, "in [0, 1)")
        require(self.distance in ("mse", "kl"), "distance", self.distance, '"mse" or "kl"')
        require(self.result in ("average", "student"), "result", self.result, '"average" or "student"')

    @property
    def learner(self) -> str:
        """The player whose network is the result."""
        return self.result

    def setup(self, nets: Nets, probe: Batch) -> None:
        """The average starts as a copy of the student."""
        if "student" not in nets:
            nets.student = nets.fresh("student")
        nets.average = copy.deepcopy(nets.student).requires_grad_(False)
        untap(nets.average)

    def step(self, nets: Nets, batch: Batch, clock: Clock) -> Iterator[Turn]:
        """One turn of the student."""
        said = nets.run("student", batch | {"inputs": another(batch["inputs"], self.augment)})["logits"]
        parts = {"ce": mean(ce(said, batch["labels"]), labelled(batch))}
        if self.weight or self.result == "average":  # its batch norm must have seen pictures, asked or not
            with torch.no_grad():
                told = nets.run("average", batch | {"inputs": another(batch["inputs"], self.augment)})["logits"]
        if self.weight:
            height = self.weight * sigmoid_rampup(clock.progress, self.rampup)
            parts["consistency"] = height * mean(apart(said, told, self.distance), batch.get("mask"))
        yield "student", parts

    def after(self, nets: Nets, player: str, clock: Clock) -> None:
        """The average follows the student."""
        decay = self.early_decay if clock.progress < self.rampup else self.decay
        follow(nets.average, nets.student, ramped(decay, clock.t + 1))


def apart(student_logits: Tensor, average_logits: Tensor, distance: str) -> Tensor:
    """How differently two networks speak of an example: [..., C] x 2 -> [...]."""
    if distance == "kl":
        return kl(student_logits, average_logits.detach())
    mine, its = pair(student_logits, average_logits.detach())
    return (mine.softmax(-1) - its.softmax(-1)).square().mean(-1)
