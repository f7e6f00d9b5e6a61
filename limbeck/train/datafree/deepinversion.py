"""Noise is turned into pictures that the teacher takes for its own data; the student learns from those."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from limbeck.core.augment import Flip
from limbeck.core.card import method, require
from limbeck.core.loop import Clock, Stage, Turn
from limbeck.core.maths import js
from limbeck.core.memory import Best, Memory, Noise
from limbeck.core.nets import Batch, Nets, evaluating
from limbeck.core.priors import magnitude, total_variation
from limbeck.core.reduce import mean
from limbeck.core.statistics import distances, norms, watching
from limbeck.losses.logits.ce import ce
from limbeck.losses.logits.kd import kd


@method(
    paper="Yin et al. 2020, eq. 1-9",
    year=2019,
    arxiv="1912.08795",
    code="NVlabs/DeepInversion@2413af1:cifar10/deepinversion_cifar10.py",
    differs="Competition is 1 - JS(p_t, p_s) as in the paper: the code turns the two divergences round and clamps "
    "probabilities to [0.01, 0.99]. One resolution; values are not clipped to those of real pictures.",
)
@dataclass(frozen=True)
class DeepInversion:
    """x = argmin CE(z_t(x), y) + statistics R(x) + variation TV(x) + length mean|x| + competition (1 - JS(p_t, p_s)).

    R sums |mean - running mean| + |variance - running variance| over the norm layers of the teacher. Each batch of
    pictures is a stage of its own from noise, seen under a random roll and flip; those of the least cost are kept.
    Then a stage of the student: T^2 KL(teacher || student) on pictures that are kept.

    statistics, variation, length: weights >= 0. Without the first it is DeepDream.
    competition: weight >= 0, from the second round on: pictures on which the student disagrees, which makes it
        Adaptive DeepInversion (0.2 in the paper). spread: T > 0 of its predictions there.
    first_factor: >= 0, on the first norm layer; 10 for ImageNet.
    batches: made in a round, >= 1. iterations: steps that each takes, >= 1. rounds: of making and teaching, >= 1.
    jitter: largest roll in pixels, >= 0. flip: whether to mirror half of the time; not for digits.
    temperature: T > 0 of the student's loss.

    *Needs*: nets.teacher with batch norm (unless statistics is 0), nets.student; batches that tell how many pictures
    to make, and of which size, and no more. The rate of "images" follows the schedule anew in every stage: a cosine is
    the paper's. *Relates to*: `cmi` makes a batch by a generator, and each unlike the others; `fast_datafree` is the
        quickest of this kind; `dafl` keeps no pictures. *Differs*: see the card.
    """

    statistics: float = 10.0
    variation: float = 2.5e-5
    length: float = 0.0
    competition: float = 0.0
    spread: float = 3.0
    first_factor: float = 1.0
    batches: int = 200
    iterations: int = 1000
    rounds: int = 1
    jitter: int = 2
    flip: bool = False
    temperature: float = 20.0
    dataless = True

    def __post_init__(self) -> None:
        for name in ("statistics", "variation", "length", "competition", "first_factor", "jitter"):
            require(getattr(self, name) >= 0, name, getattr(self, name), ">= 0")
        for name in ("batches", "iterations", "rounds"):
            require(getattr(self, name) >= 1, name, getattr(self, name), ">= 1")
        for name in ("spread", "temperature"):
            require(getattr(self, name) > 0, name, getattr(self, name), "> 0")

    def optimizers(self) -> dict[str, dict[str, Any]]:
        """The rate is that of the code for CIFAR, the betas those of its ImageNet form; the student's are ours."""
        student = {"sgd": {"lr": 0.1, "momentum": 0.9, "weight_decay": 1e-4}}
        return {"images": {"adam": {"lr": 0.1, "betas": [0.5, 0.9]}}, "student": student}

    def setup(self, nets: Nets, probe: Batch) -> None:
        """Make room for the pictures."""
        if self.statistics:
            norms(nets.teacher)
        with torch.no_grad(), evaluating(nets.teacher):
            nets.images = Noise(*probe["inputs"].shape)
            pictures = nets.images()
            classes = nets.run("teacher", {"inputs": pictures})["logits"].shape[-1]
        nets.best = Best(torch.arange(len(pictures), device=nets.device) % classes, pictures)
        nets.memory = Memory(self.rounds * self.batches * len(pictures), {"inputs": pictures})

    def stages(self, nets: Nets, steps: int) -> Iterator[Stage]:
        """In every round a stage a batch of pictures, then the student's share of `steps`."""
        for k in range(self.rounds):
            for b in range(self.batches):
                nets.images.renew()
                nets.best.cost.fill_(torch.inf)
                until = (k + 0.5 * (b + 1) / self.batches) / self.rounds
                yield Stage(self.iterations, f"pictures {k * self.batches + b}", until=until, validated=False)
                nets.memory.add(inputs=nets.best.pictures)
            share = steps * (k + 1) // self.rounds - steps * k // self.rounds
            yield Stage(share, f"student {k}", until=(k + 1) / self.rounds)

    def seen(self, pictures: Tensor) -> Tensor:
        """The pictures under one random roll and flip."""
        down, right = torch.randint(-self.jitter, self.jitter + 1, (2,)).tolist()
        rolled = torch.roll(pictures, (down, right), (-2, -1))
        return Flip().apply(rolled, torch.rand(1, 1).round()) if self.flip else rolled

    def realism(self, nets: Nets, pictures: Tensor, labels: Tensor, competition: float) -> dict[str, Tensor]:
        """What the pictures cost: {part: []}."""
        shown = {"inputs": pictures}
        if self.statistics:
            with watching(nets.teacher) as seen:
                logits = nets.run("teacher", shown, through=True)["logits"]
            first, *others = distances(seen)
            parts = {"statistics": self.statistics * (self.first_factor * first + sum(others))}
        else:
            logits, parts = nets.run("teacher", shown, through=True)["logits"], {}
        parts["label"] = ce(logits, labels).mean()
        if self.variation:
            parts["variation"] = self.variation * total_variation(pictures)
        if self.length:
            parts["length"] = self.length * magnitude(pictures)
        if competition:
            with evaluating(nets.student):
                student = nets.run("student", shown)["logits"]
            parts["competition"] = competition * (1 - js(student, logits, temperature=self.spread).mean())
        return parts

    def step(self, nets: Nets, batch: Batch, clock: Clock) -> Iterator[Turn]:
        """One turn of the pictures or of the student."""
        rounds, rest = divmod(clock.stage, self.batches + 1)
        if rest < self.batches:
            pictures = nets.images()
            parts = self.realism(nets, self.seen(pictures), nets.best.labels, self.competition if rounds else 0.0)
            nets.best.note(pictures, torch.stack([p.detach() for p in parts.values()]).sum())
            yield "images", parts
            return
        shown = nets.memory.draw(len(batch["index"]))
        teacher, student = nets.run("teacher", shown)["logits"], nets.run("student", shown)["logits"]
        yield "student", mean(kd(student, teacher, temperature=self.temperature))
