"""The temperature is learned against the student: it rises to make the task harder, gently at first."""

import math

import torch
from torch import Tensor, nn

from limbeck.core.adapt import reverse_gradient
from limbeck.core.card import method, require
from limbeck.core.features import Shape
from limbeck.core.maths import kl, upcast
from limbeck.core.responses import standardized


@method(
    paper="Li et al. 2022, curriculum temperature",
    year=2022,
    arxiv="2211.16231",
    code="zhengli97/CTKD@7d52522:models/temp_global.py",
    differs="the curriculum runs on the share of training that is over, not on epochs. The network for a temperature "
    "an example is not in the code: two layers on the logits of both, without gradient to them",
    variant_of="kd",
    exceptions={"gradcheck": "the gradient of the temperature is reversed and scaled by the curriculum on purpose"},
)
class CTKD(nn.Module):
    """T^2 KL(softmax(teacher / T) || softmax(student / T)), T = lowest + span sigmoid(theta).  [..., C] x 2 -> [...]

    The student goes down on this loss; theta goes up on it, with the factor lambda = (1 - cos(pi min(1, progress /
    curriculum))) / 2, which grows from 0 to 1. The student's gradient is that of `kd` at the T of the moment.

    lowest: T stays above this, > 0.
    span: T stays below lowest + span, >= 0.
    curriculum: share of training after which lambda is 1, in [0, 1]; 10 of 240 epochs, 5 of 120 on ImageNet.
    instance_width: hidden units of a network that gives every element its own theta; 0: one theta, which starts at 1.
    standardize: bring logits to mean 0 and deviation 1 first, as `logit_standardization` does.

    *Needs*: logits of both over the same classes; no labels. Without `progress` lambda is 1.
    *Relates to*: 0.1 ce + 0.9 of this (1 + 1 on ImageNet), instead of a search for the temperature of `kd`. theta
        trains with the student's optimiser; raise `curriculum` for short trainings.
    """

    def __init__(
        self,
        student_logits: Shape,
        teacher_logits: Shape,
        *,
        lowest: float = 1.0,
        span: float = 20.0,
        curriculum: float = 10 / 240,
        instance_width: int = 0,
        standardize: bool = False,
    ) -> None:
        super().__init__()
        require(lowest > 0, "lowest", lowest, "> 0")
        require(span >= 0, "span", span, ">= 0")
        require(0 <= curriculum <= 1, "curriculum", curriculum, "in [0, 1]")
        require(instance_width >= 0, "instance_width", instance_width, ">= 0")
        self.lowest, self.span, self.curriculum = lowest, span, curriculum
        self.instance_width, self.standardize = instance_width, standardize
        if instance_width:
            both = student_logits[-1] + teacher_logits[-1]
            self.predict = nn.Sequential(nn.Linear(both, instance_width), nn.ReLU(), nn.Linear(instance_width, 1))
        else:
            self.theta = nn.Parameter(torch.ones(1))

    def forward(self, student_logits: Tensor, teacher_logits: Tensor, progress: float | None = None) -> Tensor:
        """Per element."""
        teacher_logits = teacher_logits.detach()
        if self.standardize:
            student_logits, teacher_logits = standardized(student_logits), standardized(teacher_logits)
        temperature = self.temperature(student_logits, teacher_logits, 1.0 if progress is None else progress)
        return temperature.squeeze(-1) ** 2 * kl(student_logits, teacher_logits, temperature)

    def temperature(self, student_logits: Tensor, teacher_logits: Tensor, progress: float) -> Tensor:
        """T: [1], or [..., 1] with a temperature an element; its gradient is reversed."""
        strength = (1 - math.cos(math.pi * min(1.0, progress / self.curriculum))) / 2 if self.curriculum else 1.0
        if self.instance_width:
            both = torch.cat([upcast(student_logits.detach()), upcast(teacher_logits)], -1)
            theta = upcast(self.predict(both.to(next(self.predict.parameters()).dtype)))
        else:
            theta = self.theta
        return self.lowest + self.span * reverse_gradient(theta, strength).sigmoid()
