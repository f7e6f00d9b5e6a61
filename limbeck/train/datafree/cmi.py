"""Pictures that the teacher takes for its own data, each told apart from all others; the student learns from those."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from limbeck.core.card import method, require
from limbeck.core.imagine import agreed, check_generator, look, views
from limbeck.core.loop import Clock, Turn
from limbeck.core.memory import Memory, Noise
from limbeck.core.nets import Batch, Nets, evaluating
from limbeck.core.reduce import mean
from limbeck.core.statistics import distances, watching
from limbeck.core.synset import renew
from limbeck.losses.logits.ce import ce
from limbeck.losses.logits.kd import kd


def contrast(near: Tensor, far: Tensor, made: int, temperature: float) -> Tensor:
    """-log softmax(near far^T / temperature) of its own [], the mean over the first `made` rows and that over the
    others, which are remembered, added up; no gradient to far. [M, D] x 2, rows of unit length."""
    own = -torch.log_softmax(near @ far.detach().mT / temperature, 1).diagonal()
    return own[:made].mean() + (own[made:].mean() if len(own) > made else 0.0)


@method(
    paper="Fang et al. 2021, eq. 3-8 and algorithm 1",
    year=2021,
    arxiv="2105.08584",
    code="zju-vipa/DataFree@9e79fa9:datafree/synthesis/contrastive.py",
    differs="The generator's Adam goes on from one batch of pictures to the next, where the code starts anew: its "
    "second moments are made short-lived. Fresh weights are drawn by the layers' own rule, not with deviation 0.02.",
)
@dataclass(frozen=True)
class CMI:
    """Generator G and codes e minimise statistics R + label CE(z_t, y) - adversarial E[KL(p_t || p_s)] + contrast I.

    R is that of `deepinversion`. The third term counts where teacher and student name the same class. I tells a crop
    of each picture, by what a head makes of the mean inputs of the teacher's norm layers, from all others, of which
    `negatives` are remembered. Every `every` steps a new G with new codes has `iterations` turns, and the pictures of
    least cost are kept. The student minimises T^2 KL(teacher || student) on those that are kept.

    statistics, label, adversarial, contrast: weights >= 0. Without the last two it is `deepinversion` by a generator.
    contrast_temperature: > 0. width: numbers that the head makes, >= 1.
    negatives: pictures remembered that the new ones are told from, >= 0. bank: how many are remembered, >= 1.
    every, iterations: see above, >= 1. memory: pictures kept, >= 1. flip: whether half of the views are mirrored; not
    for digits. temperature: T > 0 of the student's loss. latent: numbers in a code, which the generator reads, >= 1.

    *Needs*: nets.teacher with batch norm, nets.student, nets.generator that can be made anew. The batch tells only how
    many pictures to make. *Relates to*: `fast_datafree` needs a few turns where this takes hundreds.
    """

    statistics: float = 1.0
    label: float = 0.5
    adversarial: float = 0.5
    contrast: float = 0.8
    contrast_temperature: float = 0.1
    width: int = 256
    negatives: int = 4096
    bank: int = 40960
    every: int = 400
    iterations: int = 200
    memory: int = 51200
    flip: bool = True
    temperature: float = 20.0
    latent: int = 256
    dataless = True

    def __post_init__(self) -> None:
        for name in ("statistics", "label", "adversarial", "contrast", "negatives"):
            require(getattr(self, name) >= 0, name, getattr(self, name), ">= 0")
        for name in ("width", "bank", "every", "iterations", "memory", "latent"):
            require(getattr(self, name) >= 1, name, getattr(self, name), ">= 1")
        for name in ("contrast_temperature", "temperature"):
            require(getattr(self, name) > 0, name, getattr(self, name), "> 0")

    def optimizers(self) -> dict[str, dict[str, Any]]:
        """The code's rates."""
        student = {"sgd": {"lr": 0.1, "momentum": 0.9, "weight_decay": 1e-4}}
        return {"generator": {"adam": {"lr": 1e-3, "betas": [0.5, 0.9]}}, "student": student}

    def setup(self, nets: Nets, probe: Batch) -> None:
        """Codes and a head, which learn with the generator, and room for pictures and features."""
        with watching(nets.teacher) as seen:
            pictures, _ = check_generator(nets, self.latent)
        nets.codes = Noise(len(probe["index"]), self.latent)
        nets.companions["generator"] = ["codes"]
        nets.memory = Memory(self.memory, {"inputs": pictures})
        if self.contrast:
            means = torch.cat([s.means for s in seen], 1)
            size = means.shape[1]
            nets.head = nn.Sequential(nn.Linear(size, size), nn.ReLU(), nn.Linear(size, self.width))
            nets.companions["generator"].append("head")
            nets.bank = Memory(self.bank, {"near": means, "far": means})

    def realism(self, nets: Nets, pictures: Tensor, labels: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """What the pictures cost: {part: []}; and what is to be remembered of them: {"near", "far": [B, D]}."""
        whole, part = (look(view, pictures) for view in views(pictures.shape[-1], self.flip))
        with watching(nets.teacher) as seen:
            logits = nets.run("teacher", {"inputs": whole}, through=True)["logits"]
        parts = {"statistics": self.statistics * torch.stack(distances(seen)).sum()}
        parts["label"] = self.label * ce(logits, labels).mean()
        if self.adversarial:
            with evaluating(nets.student):
                student = nets.run("student", {"inputs": whole})["logits"]
            parts["adversarial"] = -self.adversarial * agreed(student, logits).mean()
        if not self.contrast:
            return parts, {}
        with watching(nets.teacher) as seen_near:
            nets.run("teacher", {"inputs": part}, through=True)
        means = {"near": torch.cat([s.means for s in seen_near], 1), "far": torch.cat([s.means for s in seen], 1)}
        past = nets.bank.some(self.negatives)
        near, far = (F.normalize(nets.head(torch.cat([means[k], past[k]]))) for k in ("near", "far"))
        parts["contrast"] = self.contrast * contrast(near, far, len(pictures), self.contrast_temperature)
        return parts, {name: rows.detach() for name, rows in means.items()}

    def synthesis(self, nets: Nets) -> Iterator[Turn]:
        """Turns of the generator; the best pictures and their features are kept."""
        classes = check_generator(nets, self.latent)[1]["logits"].shape[-1]
        labels = torch.randint(classes, (len(nets.codes()),)).to(nets.device)
        least: Tensor | None = None
        for _ in range(self.iterations):
            pictures = nets.generator(nets.codes())
            parts, means = self.realism(nets, pictures, labels)
            cost = torch.stack([p.detach() for p in parts.values()]).sum()
            if least is None or bool(cost < least):
                least, best = cost, (pictures.detach(), means)
            yield "generator", parts
        nets.memory.add(inputs=best[0])
        if self.contrast:
            nets.bank.add(**best[1])

    def step(self, nets: Nets, batch: Batch, clock: Clock) -> Iterator[Turn]:
        """Now and then the making of new pictures; then a turn of the student."""
        if clock.t % self.every == 0:
            yield from self.synthesis(nets)
        pictures = nets.memory.draw(len(batch["index"]))["inputs"]
        shown = {"inputs": look(views(pictures.shape[-1], self.flip)[0], pictures)}
        teacher, student = nets.run("teacher", shown)["logits"], nets.run("student", shown)["logits"]
        yield "student", mean(kd(student, teacher, temperature=self.temperature))

    def after(self, nets: Nets, player: str, clock: Clock) -> None:
        """A new generator and new codes before pictures are made again."""
        if player == "student" and (clock.t + 1) % self.every == 0:
            renew(nets, "generator")
            nets.codes.renew()
