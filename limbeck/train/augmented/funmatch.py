"""The student matches the teacher as a function: on pictures blended anew each step, the same for both."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from limbeck.core.card import method, require
from limbeck.core.errors import BadInput
from limbeck.core.loop import Clock, Turn
from limbeck.core.mixing import Mix, drawn, neighbours, pictures
from limbeck.core.nets import Batch, Nets
from limbeck.core.pair import classes
from limbeck.core.reduce import mean
from limbeck.losses.logits.kd import kd


@method(
    paper="Beyer et al. 2021, section 3",
    year=2021,
    arxiv="2106.05237",
    code="google-research/big_vision@0127fb6:big_vision/trainers/proj/distill/distill.py",
    differs="one teacher (an `Ensemble` is one); the crop is the recipe's, for both at one resolution",
)
@dataclass(frozen=True)
class FunMatch:
    """T^2 KL(softmax(teacher(x') / T) || softmax(student(x') / T)), x'_i = a x_i + (1 - a) x_{i-1}, without labels.

    a is drawn once a batch, a = max(u, 1 - u), u from Beta(alpha, alpha). The teacher is asked about the very tensor
    that the student sees: the crop of the recipe's `augment`, then the blend.

    temperature: T > 0; 1 with many classes, 2 to 10 on small sets.
    alpha: of the Beta distribution, >= 0; 1 is uniform, 0 blends nothing.

    *Needs*: nets.teacher at hand (a store knows nothing of blends), nets.student, inputs that are pictures.
    *Relates to*: with alpha 0 it is `kd` alone. Patience is half of the method: it gains for many times as many epochs
        as labels bear, and loses to `kd` with labels when training is short. `fkd` asks the teacher once instead.
    *Differs*: see the card.
    """

    temperature: float = 1.0
    alpha: float = 1.0

    def __post_init__(self) -> None:
        require(self.temperature > 0, "temperature", self.temperature, "> 0")
        require(self.alpha >= 0, "alpha", self.alpha, ">= 0")

    def setup(self, nets: Nets, probe: Batch) -> None:
        """Check that there is a teacher to ask, of the same classes, and that inputs can be blended."""
        if "teacher" not in nets:
            raise BadInput("`funmatch` asks the teacher about pictures made in each step: give it, not a store")
        pictures(probe, "funmatch")
        classes(nets, probe, "funmatch")

    def mix(self, count: int) -> Mix:
        """Who is blended with whom in a batch of `count`, and how much."""
        if self.alpha == 0:
            return Mix(neighbours(count), torch.ones(count))
        share = drawn(count, self.alpha, "batch")
        return Mix(neighbours(count), torch.maximum(share, 1 - share))

    def loss(self, student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
        """Per example: [B, C] x 2 -> [B]."""
        return kd(student_logits, teacher_logits, temperature=self.temperature)

    def step(self, nets: Nets, batch: Batch, clock: Clock) -> Iterator[Turn]:
        """One turn of the student."""
        seen = self.mix(len(batch["inputs"])).batch(batch) if self.alpha else batch
        teacher, student = nets.run("teacher", seen)["logits"], nets.run("student", seen)["logits"]
        yield "student", mean(self.loss(student, teacher), seen.get("mask"))
