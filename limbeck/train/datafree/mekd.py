"""A generator learns to undo a teacher that only answers; then it shows the student how its answers differ."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from limbeck.core.adversarial import verdict
from limbeck.core.card import method, require
from limbeck.core.errors import BadInput
from limbeck.core.features import per_example
from limbeck.core.imagine import check_generator, imagine, imagined
from limbeck.core.loop import Clock, Stage, Turn
from limbeck.core.maths import kl, upcast
from limbeck.core.nets import Batch, Nets
from limbeck.core.queries import Answers, Queries
from limbeck.core.reduce import mean


@method(
    paper="Ma et al. 2024, section 3",
    year=2022,
    arxiv="2205.10490",
    code="HAIV-Lab/MEKD@72881bc:project/MEKD.py",
    differs="the second term of the generator is weighted by how sure the teacher is, where the code takes the number "
    "of the class that it names; the code adds 1e-5 within its logarithm. A batch of pictures that may not be asked "
    "about any more is filled up with those that were",
    exceptions={"gain": "80 steps of adversaries do not paint the toy, at other rates or with other critics either"},
)
@dataclass(frozen=True)
class MEKD:
    """First G minimises -log D(G(z)) - inform max_c p_c log D(G(z)), and D -log D(x) - log(1 - D(G(z))): p is what the
    teacher answers to G(z), x are local pictures. Then, on pictures G(z), the student minimises

    align mean|G(s / T_g) - G(t / T_g)| + soft T KL(softmax(t / T) || softmax(s / T)),

    s and t the answers of both. G reads as many numbers as there are classes, and so takes answers for codes. It is
    frozen by then, and the gradient passes through it to s. The teacher gives no gradient at all.

    budget: pictures that the teacher may be asked about, >= 4; 0 is any number. Half of them are for the student.
    answers: "soft", the logits, or "hard", the class alone. certainty: > 0, the logit of that class; the code has 1.
    inform, align, soft: weights >= 0. Without `align` it is `kd` / T on generated pictures.
    temperature, graft_temperature: T and T_g > 0.
    latent: numbers in a code, >= 2: as many as there are classes.
    memory: answered pictures that are kept for when the budget is spent, >= 1.

    *Needs*: nets.teacher, nets.student, nets.generator; local pictures as inputs, whose labels are not read, and
    nets.discriminator, which is made where there is none. Each stage has all the steps. `figures` counts.
    *Relates to*: `dafl` and `zskt` need gradients of the teacher; with these at hand they take no pictures.
    *Differs*: see the card.
    """

    budget: int = 0
    answers: Answers = "soft"
    certainty: float = 1.0
    inform: float = 0.5
    align: float = 1.0
    soft: float = 1.0
    temperature: float = 5.0
    graft_temperature: float = 5.0
    latent: int = 10
    memory: int = 10000

    def __post_init__(self) -> None:
        require(self.budget == 0 or self.budget >= 4, "budget", self.budget, "0 or >= 4")
        require(self.answers in ("soft", "hard"), "answers", self.answers, '"soft" or "hard"')
        for name in ("inform", "align", "soft"):
            require(getattr(self, name) >= 0, name, getattr(self, name), ">= 0")
        require(self.align + self.soft > 0, "soft", self.soft, "> 0 where align is 0")
        for name in ("certainty", "temperature", "graft_temperature"):
            require(getattr(self, name) > 0, name, getattr(self, name), "> 0")
        for name, least in (("latent", 2), ("memory", 1)):
            require(getattr(self, name) >= least, name, getattr(self, name), f">= {least}")

    def optimizers(self) -> dict[str, dict[str, Any]]:
        """The code's."""
        gan = {"adam": {"lr": 2e-4, "betas": [0.5, 0.999]}}
        student = {"sgd": {"lr": 0.1, "momentum": 0.9, "weight_decay": 5e-4}}
        return {"discriminator": gan, "generator": gan, "student": student}

    def setup(self, nets: Nets, probe: Batch) -> None:
        """Check that answers are codes, and begin to count."""
        pictures, told = check_generator(nets, self.latent)
        if (classes := told["logits"].shape[-1]) != self.latent:
            raise BadInput(f"mekd reads answers: `latent` must be {classes}, the classes, got {self.latent}")
        if pictures.shape[1:] != probe["inputs"].shape[1:]:
            made, local = list(pictures.shape[1:]), list(probe["inputs"].shape[1:])
            raise BadInput(f"mekd's generator makes pictures {made}, but the local ones are {local}")
        if "discriminator" not in nets:
            nets.discriminator = critic(pictures.shape[1])
        size = max(1, min(self.memory, self.budget))
        nets.queries = Queries(self.budget, size, pictures, told["logits"], self.answers, self.certainty)

    def stages(self, nets: Nets, steps: int) -> Iterator[Stage]:
        """The generator; then the student, for whom it is frozen."""
        yield Stage(steps, "generator", until=0.5, validated=False)
        nets.freeze("generator")
        yield Stage(steps, "student")

    def step(self, nets: Nets, batch: Batch, clock: Clock) -> Iterator[Turn]:
        """Turns of the discriminator and the generator; later one of the student."""
        count = len(batch["inputs"])
        if clock.stage == 0:
            yield from self.painting(nets, batch["inputs"], count)
        else:
            pictures, answers = nets.queries.learn(nets, imagined(nets, count, self.latent))
            yield "student", self.distance(nets, nets.run("student", {"inputs": pictures})["logits"], answers)

    def painting(self, nets: Nets, local: Tensor, count: int) -> Iterator[Turn]:
        """A turn of the discriminator, then one of the generator."""
        real, made = (verdict(nets, x, x, paired=False) for x in (local, imagined(nets, count, self.latent)))
        yield (
            "discriminator",
            {"real": mean(per_example(F.softplus(-real))), "made": mean(per_example(F.softplus(made)))},
        )
        pictures = imagine(nets, count, self.latent)
        surprise = per_example(F.softplus(-verdict(nets, pictures, pictures, paired=False)))
        parts = {"real": mean(surprise)}
        if self.inform:
            sure = upcast(nets.queries.ask(nets, pictures, reserve=self.budget // 2)).softmax(-1).amax(-1)
            parts["inform"] = self.inform * mean(F.pad(sure, (0, count - len(sure))) * surprise)
        yield "generator", parts

    def figures(self, nets: Nets) -> dict[str, float]:
        """How many pictures the teacher was asked about."""
        return {"teacher_queries": float(nets.queries.asked)}

    def distance(self, nets: Nets, student: Tensor, answers: Tensor) -> dict[str, Any]:
        """The student's loss on its logits and the teacher's answers, [B, C] x 2."""
        parts: dict[str, Any] = {}
        if self.soft:
            parts["soft"] = self.soft * self.temperature * mean(kl(student, answers, self.temperature))
        if self.align:
            mine, aim = (nets.generator(z / self.graft_temperature) for z in (student, answers))
            parts["align"] = self.align * mean(per_example((upcast(mine) - upcast(aim)).abs()))
        return parts


def critic(channels: int, width: int = 16) -> nn.Module:
    """Pictures [B, channels, H, W] -> a score of each of their patches, higher is more real, as the code's but for its
    last layer, which reads the whole."""
    layers: list[nn.Module] = []
    for i, takes in enumerate((channels, width, 2 * width)):
        gives = width * 2**i
        layers += [nn.Conv2d(takes, gives, 3, 2, 1), nn.LeakyReLU(0.2), nn.Dropout2d(0.25)]
        layers += [nn.BatchNorm2d(gives, 0.8)] if i else []
    return nn.Sequential(*layers, nn.Conv2d(4 * width, 1, 3, padding=1))
