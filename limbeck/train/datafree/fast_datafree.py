"""A generator that learns to be adapted: a few steps of a copy make a batch of pictures, which the student learns."""

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from limbeck.core.card import method, require
from limbeck.core.imagine import agreed, carrying, check_generator, look, views
from limbeck.core.loop import Clock, Turn
from limbeck.core.memory import Memory
from limbeck.core.nets import Batch, Nets, evaluating
from limbeck.core.reduce import mean
from limbeck.core.statistics import Recent, Seen, watching
from limbeck.losses.logits.ce import ce
from limbeck.losses.logits.kd import kd


@method(
    paper="Fang et al. 2022, eq. 4-8 and algorithm 1",
    year=2021,
    arxiv="2112.06253",
    code="zju-vipa/Fast-Datafree@0dcecbc:datafree/synthesis/fast_meta.py",
    differs="First-order gradients (the code's FOMAML); its Reptile, and the new start of the generator's first layer "
    "late in training, are left out",
)
@dataclass(frozen=True)
class FastDataFree:
    """A copy of the generator and codes e minimise statistics R + label CE(z_t, y) - adversarial E[KL(p_t || p_s)].

    Every `every` steps a copy takes `inner` steps of Adam from the generator's weights; the pictures of least cost are
    kept, and the generator then has one turn with the sum of the copy's gradients. R is as in `deepinversion`, but of a
    moving average of the batches' statistics. The third term counts where both name the same class. The student
    minimises T^2 KL(teacher || student) on pictures that are kept.

    statistics, label, adversarial: weights >= 0.
    inner: steps of a copy, >= 1; 2, 5 and 10 in the paper. rate, code_rate: of its Adam for weights and codes, > 0.
    momentum: share in [0, 1) of the past in the average of statistics.
    every: steps of the student from one batch of pictures to the next, >= 1.
    warmup: batches >= 0 of pictures made before the student's first step, without the adversarial term.
    memory: pictures kept, >= 1. flip: whether views are mirrored half of the time; not for digits.
    temperature: T > 0 of the student's loss. latent: numbers in a code, which the generator reads, >= 1.

    *Needs*: nets.teacher with batch norm, nets.student, nets.generator. The batch tells only how many pictures to make.
    Its generator's rate is `inner` times `rate`. *Relates to*: `cmi` starts a generator anew for each batch of pictures
        and takes hundreds of steps. *Differs*: see the card.
    """

    statistics: float = 10.0
    label: float = 0.5
    adversarial: float = 1.1
    inner: int = 5
    rate: float = 3e-3
    code_rate: float = 0.01
    momentum: float = 0.9
    every: int = 400
    warmup: int = 20
    memory: int = 51200
    flip: bool = True
    temperature: float = 20.0
    latent: int = 256
    dataless = True

    def __post_init__(self) -> None:
        for name in ("statistics", "label", "adversarial", "warmup"):
            require(getattr(self, name) >= 0, name, getattr(self, name), ">= 0")
        for name in ("inner", "every", "memory", "latent"):
            require(getattr(self, name) >= 1, name, getattr(self, name), ">= 1")
        for name in ("rate", "code_rate", "temperature"):
            require(getattr(self, name) > 0, name, getattr(self, name), "> 0")
        require(0 <= self.momentum < 1, "momentum", self.momentum, "in [0, 1)")

    def optimizers(self) -> dict[str, dict[str, Any]]:
        """The code's."""
        student = {"sgd": {"lr": 0.2, "momentum": 0.9, "weight_decay": 1e-4}}
        return {"generator": {"adam": {"lr": self.inner * self.rate, "betas": [0.5, 0.999]}}, "student": student}

    def setup(self, nets: Nets, probe: Batch) -> None:
        """Room for pictures and for the statistics of past ones."""
        pictures, _ = check_generator(nets, self.latent)
        nets.recent = Recent(nets.teacher, self.momentum)
        nets.memory = Memory(self.memory, {"inputs": pictures})

    def cost(self, nets: Nets, pictures: Tensor, labels: Tensor, adversarial: float) -> tuple[Tensor, list[Seen]]:
        """What the copy minimises [], and what the teacher's norm layers saw."""
        shown = {"inputs": look(views(pictures.shape[-1], self.flip)[0], pictures)}
        with watching(nets.teacher) as seen:
            logits = nets.run("teacher", shown, through=True)["logits"]
        loss = self.statistics * torch.stack(nets.recent.distances(seen)).sum() + self.label * ce(logits, labels).mean()
        if adversarial:
            with evaluating(nets.student):
                student = nets.run("student", shown)["logits"]
            loss = loss - adversarial * agreed(student, logits).mean()
        return loss, seen

    def synthesis(self, nets: Nets, count: int, adversarial: float) -> Iterator[Turn]:
        """Pictures by a few steps of a copy, and one turn of the generator."""
        classes = check_generator(nets, self.latent)[1]["logits"].shape[-1]
        labels = torch.randint(classes, (count,)).to(nets.device)
        codes = torch.randn(count, self.latent, device=nets.device).requires_grad_()
        generator = copy.deepcopy(nets.generator)
        weights = list(generator.parameters())
        groups: list[dict[str, Any]] = [{"params": weights}, {"params": [codes], "lr": self.code_rate}]
        adam = torch.optim.Adam(groups, lr=self.rate, betas=(0.5, 0.999))
        gradients, costs = [torch.zeros_like(w) for w in weights], list[Tensor]()
        for _ in range(self.inner):
            pictures = generator(codes)
            loss, seen = self.cost(nets, pictures, labels, adversarial)
            found = torch.autograd.grad(loss, [*weights, codes])
            for parameter, gradient in zip([*weights, codes], found, strict=True):
                parameter.grad = gradient
            gradients = [total + gradient for total, gradient in zip(gradients, found, strict=False)]
            if not costs or bool(loss < min(costs)):
                best = pictures.detach()
            costs.append(loss.detach())
            adam.step()
        nets.recent.update(seen)
        nets.memory.add(inputs=best)
        yield "generator", carrying(torch.stack(costs).mean(), list(nets.generator.parameters()), gradients)

    def step(self, nets: Nets, batch: Batch, clock: Clock) -> Iterator[Turn]:
        """Now and then the making of new pictures; then a turn of the student."""
        count = len(batch["index"])
        for _ in range(self.warmup if clock.t == 0 else 0):
            yield from self.synthesis(nets, count, 0.0)
        if clock.t % self.every == 0:
            yield from self.synthesis(nets, count, self.adversarial)
        pictures = nets.memory.draw(count)["inputs"]
        shown = {"inputs": look(views(pictures.shape[-1], self.flip)[0], pictures)}
        teacher, student = nets.run("teacher", shown)["logits"], nets.run("student", shown)["logits"]
        yield "student", mean(kd(student, teacher, temperature=self.temperature))
