"""A network that is trained already takes from any teacher what that knows better, and keeps the rest by itself."""

import copy
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from limbeck.core.card import method, require
from limbeck.core.errors import BadInput
from limbeck.core.loop import Clock, Turn
from limbeck.core.maths import log_probs
from limbeck.core.nets import Batch, Nets
from limbeck.core.reduce import mean
from limbeck.core.taps import untap
from limbeck.losses.logits.kd import kd

START = "teacher_start"


@method(
    paper="Roth et al. 2024, KL-Dist + DP transfer, section 4.3",
    year=2023,
    arxiv="2310.17653",
    differs="the authors' repository holds no code: temperature and learning rate are ours",
    row="general_knowledge_transfer",
    exact_accumulation=True,
)
@dataclass(frozen=True)
class Transfer:
    """mean_i T^2 KL(p_source(i) || p_student), the source of every element being who explains it best.

    Sources are all teachers and a frozen copy of the student as it starts, which wins ties. What no teacher explains
    better is self-distillation, so that nothing is forgotten; there the gradient is 0 as long as the student is as it
    was. The choice is made by predictions alone and has no gradient.

    labelled: the best is who gives the label the highest probability; False, where there are no labels: who is surest.
    temperature: T > 0 of the KL; the choice is made at 1.

    *Needs*: a trained student; one teacher or several (networks called teacher...), at hand or as stored
        `teacher_logits`, weaker ones too; a small learning rate. Teachers one after the other are stages of a recipe.
    *Relates to*: kd at temperature 1 in `distill` for the plain transfer that forgets, with `ce` beside it for the
        XE-KL variant, with `train: {ema: 0.9999}` for weights held back by a moving average (MCL). `lwf` keeps
        old tasks. Report accuracy after minus before: positive means that the teacher had something to give.
    """

    labelled: bool = True
    temperature: float = 1.0

    def __post_init__(self) -> None:
        require(self.temperature > 0, "temperature", self.temperature, "> 0")

    def setup(self, nets: Nets, probe: Batch) -> None:
        """Keep the student as it starts."""
        if "teacher_logits" not in probe and not self.teachers(nets):
            raise BadInput("`transfer` needs a teacher or stored `teacher_logits`; here is neither")
        start = copy.deepcopy(nets.student)
        untap(start)
        setattr(nets, START, start)

    def teachers(self, nets: Nets) -> list[str]:
        """Everyone who may know something better."""
        return [name for name in nets if name.startswith("teacher") and name != START]

    def source(self, nets: Nets, batch: Batch) -> Tensor:
        """Logits [..., C] of whoever explains each element best."""
        best: Tensor = nets.run(START, batch)["logits"]
        stored = [batch["teacher_logits"]] if "teacher_logits" in batch else []
        for other in stored or [nets.run(name, batch)["logits"] for name in self.teachers(nets)]:
            if other.shape != best.shape:
                raise BadInput(f"`transfer` compares class by class: {list(best.shape)} against {list(other.shape)}")
            better = self.score(other, batch) > self.score(best, batch)
            best = torch.where(better.unsqueeze(-1), other, best)
        return best.detach()

    def score(self, logits: Tensor, batch: Batch) -> Tensor:
        """How well an element is explained, [...]: log-probability of the label, or the largest one."""
        log_p = log_probs(logits)
        return log_p.gather(-1, batch["labels"].unsqueeze(-1)).squeeze(-1) if self.labelled else log_p.amax(-1)

    def step(self, nets: Nets, batch: Batch, clock: Clock) -> Iterator[Turn]:
        """One turn of the student."""
        source = self.source(nets, batch)
        loss = kd(nets.run("student", batch)["logits"], source, temperature=self.temperature)
        yield "student", mean(loss, batch.get("mask"))
