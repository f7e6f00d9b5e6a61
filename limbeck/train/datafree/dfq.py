"""A game without data whose generator is held to what the teacher remembers of its data, to certainty and evenness."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from limbeck.core.card import method, require
from limbeck.core.imagine import check_generator, imagine, imagined, unevenness
from limbeck.core.loop import Clock, Stage, Turn
from limbeck.core.maths import kl, log_probs
from limbeck.core.nets import Batch, Nets, evaluating
from limbeck.core.reduce import mean
from limbeck.core.statistics import divergences, norms, watching
from limbeck.losses.logits.kd import kd


@method(
    paper="Choi et al. 2020, eq. 3-7",
    year=2020,
    arxiv="2005.04136",
    differs="one generator and one student; the student is in eval mode while the generator learns, and its turns are "
    "several, each on new pictures, as in the authors' peers' zju-vipa/DataFree",
)
@dataclass(frozen=True)
class DFQ:
    """The generator minimises statistics D + certainty E[H(p_t)] - balance H(E[p_t]) - adversarial E[KL(p_t || p_s)].

    D is the sum over norm layers and channels of KL(N(mean, variance) || N(running mean, running variance)), p_t and
    p_s are predictions, E is the mean over the batch, H the entropy. The student minimises T^2 KL(p_t || p_s).

    adversarial, statistics, certainty, balance: weights >= 0. All but the first 0 is `zskt` without attention.
    warmup: steps, >= 0, in which the generator alone learns, before the others and without the adversarial term.
    generator_steps, student_steps: turns a step, >= 1.
    temperature: T > 0 of the student's loss; 20 is usual for networks that are sure of all they see.
    latent: numbers in a code, which the generator reads [B, latent], >= 1.

    *Needs*: nets.teacher with batch norm (unless statistics is 0), nets.student, nets.generator. The batch tells only
    how many pictures to make. *Relates to*: made for a student that is the teacher in few bits (student: the shape
        `fake_quant`), and as good for a small one. `zskt`, `dafl`; `fast_datafree` where pictures are kept.
    *Differs*: see the card.
    """

    adversarial: float = 1.0
    statistics: float = 1.0
    certainty: float = 1.0
    balance: float = 1.0
    warmup: int = 0
    generator_steps: int = 1
    student_steps: int = 10
    temperature: float = 1.0
    latent: int = 256
    dataless = True

    def __post_init__(self) -> None:
        for name in ("adversarial", "statistics", "certainty", "balance", "warmup"):
            require(getattr(self, name) >= 0, name, getattr(self, name), ">= 0")
        for name in ("generator_steps", "student_steps", "latent"):
            require(getattr(self, name) >= 1, name, getattr(self, name), ">= 1")
        require(self.temperature > 0, "temperature", self.temperature, "> 0")

    def optimizers(self) -> dict[str, dict[str, Any]]:
        """Those of zju-vipa/DataFree for CIFAR-10."""
        student = {"sgd": {"lr": 0.1, "momentum": 0.9, "weight_decay": 1e-4}}
        return {"generator": {"adam": {"lr": 1e-3, "betas": [0.5, 0.999]}}, "student": student}

    def setup(self, nets: Nets, probe: Batch) -> None:
        """Check that generator and teacher fit, and that the teacher has statistics."""
        check_generator(nets, self.latent)
        if self.statistics:
            norms(nets.teacher)

    def stages(self, nets: Nets, steps: int) -> Iterator[Stage]:
        """The generator alone where `warmup` asks for it, then both."""
        if self.warmup:
            yield Stage(self.warmup, "generator alone", until=0.1, validated=False)
        yield Stage(steps, "game")

    def realism(self, nets: Nets, pictures: Tensor, adversarial: float) -> dict[str, Tensor]:
        """The generator's loss on its pictures: {part: []}."""
        shown, parts = {"inputs": pictures}, {}
        if self.statistics:
            with watching(nets.teacher) as seen:
                logits = nets.run("teacher", shown, through=True)["logits"]
            parts["statistics"] = self.statistics * torch.stack(divergences(seen)).sum()
        else:
            logits = nets.run("teacher", shown, through=True)["logits"]
        logp = log_probs(logits)
        parts["certainty"] = self.certainty * -(logp.exp() * logp).sum(-1).mean()
        parts["balance"] = self.balance * unevenness(logits)
        if adversarial:
            with evaluating(nets.student):
                student = nets.run("student", shown)["logits"]
            parts["adversarial"] = -adversarial * kl(student, logits).mean()
        return parts

    def step(self, nets: Nets, batch: Batch, clock: Clock) -> Iterator[Turn]:
        """Turns of the generator, then of the student on new pictures."""
        count, alone = len(batch["index"]), bool(self.warmup) and clock.stage == 0
        for _ in range(self.generator_steps):
            pictures = imagine(nets, count, self.latent)
            yield "generator", self.realism(nets, pictures, 0.0 if alone else self.adversarial)
        for _ in range(0 if alone else self.student_steps):
            shown = {"inputs": imagined(nets, count, self.latent)}
            teacher, student = nets.run("teacher", shown)["logits"], nets.run("student", shown)["logits"]
            yield "student", mean(kd(student, teacher, temperature=self.temperature))
