"""Pictures are painted anew so that the teacher is sure of them and the student is not, and the student learns them."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from limbeck.core.card import method, require
from limbeck.core.errors import BadInput
from limbeck.core.loop import Clock, Stage, Turn
from limbeck.core.maths import label_logprobs
from limbeck.core.mixing import pictures
from limbeck.core.nets import Batch, Nets, evaluating
from limbeck.core.painting import Painted, repaint, sketcher
from limbeck.core.pair import classes
from limbeck.core.reduce import mean
from limbeck.core.sampler import Denoiser, denoising
from limbeck.losses.logits.ce import ce
from limbeck.losses.logits.kd import kd


@method(
    paper="Popp et al. 2025 (ConfiG), confidence-guided augmentation",
    year=2025,
    arxiv="2506.02294",
    differs="no official code; the gradient is taken at the picture expected in each step, not through the sampler to "
    "latent or text, and the denoiser is a small one trained on the same pictures unless one is given",
)
@dataclass(frozen=True)
class ConfigDiffusionAugment:
    """hard CE(label) + soft T^2 KL(t || s) on pictures x, then also soft T^2 KL(t || s) on x^, one painted for each x.

    x^ = x noised up to `strength`, and denoised as its class in `steps` steps, in each of which the expected picture
    moves by guidance grad [log p_t(y | x_0) - log p_s(y | x_0)]. The student learns for half of the steps, then all
    pictures of a pass are painted, once, against the student as it is, and it goes on with both.

    hard, soft: weights, >= 0. temperature: T > 0.
    guidance: >= 0; 0 is plain diffusion augmentation.
    strength: level of noise in (0, 1]; small keeps the content.
    steps: of the sampler, >= 1.
    sure: least p_t(y | x^) of a painted picture that is learned, in [0, 1].
    prepare: steps that train the painter first, >= 0; 0 takes `painter` of the recipe's `nets` as it is.

    *Needs*: nets.teacher at hand, better than the data; labels of all; pictures; memory for as many again.
        One process. nets.painter, a class-conditional Denoiser, if there is one.
    *Relates to*: where the data hold a cue that the teacher does not use and the student would; elsewhere `kd`.
    *Differs*: see the card.
    """

    hard: float = 0.1
    soft: float = 0.9
    temperature: float = 4.0
    guidance: float = 5.0
    strength: float = 0.5
    steps: int = 8
    sure: float = 0.5
    prepare: int = 1000

    def __post_init__(self) -> None:
        for name in ("hard", "soft", "guidance", "prepare"):
            require(getattr(self, name) >= 0, name, getattr(self, name), ">= 0")
        require(self.temperature > 0, "temperature", self.temperature, "> 0")
        require(0 < self.strength <= 1, "strength", self.strength, "in (0, 1]")
        require(self.steps >= 1, "steps", self.steps, ">= 1")
        require(0 <= self.sure <= 1, "sure", self.sure, "in [0, 1]")

    def optimizers(self) -> dict[str, dict[str, Any]]:
        """The painter's."""
        return {"painter": {"adam": {"lr": 2e-3}}} if self.prepare else {}

    def setup(self, nets: Nets, probe: Batch) -> None:
        """Make what is missing."""
        if "teacher" not in nets or "labels" not in probe:
            raise BadInput("`config_diffusion_augment` needs a teacher at hand, not a store, and labels")
        if (probe["labels"] < 0).any():
            raise BadInput("`config_diffusion_augment` paints pictures as their class and needs the labels of all")
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            raise BadInput("`config_diffusion_augment` paints all pictures in one process; start it without a launcher")
        images = pictures(probe, "config_diffusion_augment")
        known = classes(nets, probe, "config_diffusion_augment")
        if "painter" not in nets:
            if not self.prepare:
                raise BadInput("`prepare` is 0, and there is no painter: name one in the recipe's `nets`")
            nets.painter = sketcher(images.shape[1], known)
        if not isinstance(nets.painter, Denoiser):
            raise BadInput(f"the painter must be a Denoiser, and it is a {type(nets.painter).__name__}")
        examples = int(probe.get("examples") or probe["index"].max() + 1)
        nets.painted = Painted(examples, images, probe.get("steps_per_pass", 0))

    def stages(self, nets: Nets, steps: int) -> Iterator[Stage]:
        """The painter, half of the student's training, the painting, the other half."""
        if self.prepare:
            yield Stage(self.prepare, "painter", until=0.3, validated=False)
        nets.freeze("painter")
        yield Stage(max(1, steps // 2), "before", until=0.65, validated=False)
        yield Stage(nets.painted.look, "painting", validated=False)
        yield Stage(max(1, steps - steps // 2), "after")

    def pull(self, nets: Nets, x0: Tensor, labels: Tensor) -> Tensor:
        """guidance grad [log p_t(y | x_0) - log p_s(y | x_0)], of each picture: [B, C, H, W]."""
        with torch.enable_grad(), evaluating(nets.student):
            x = x0.detach().requires_grad_()
            teacher, student = (nets.run(p, {"inputs": x}, through=True)["logits"] for p in ("teacher", "student"))
            gap = label_logprobs(teacher, labels) - label_logprobs(student, labels)
            (slope,) = torch.autograd.grad(gap.sum(), x)
        return self.guidance * slope

    @torch.no_grad()
    def paint(self, nets: Nets, batch: Batch) -> None:
        """Paint the pictures of a batch that are not painted yet."""
        todo = ~nets.painted.done[batch["index"]]
        if not todo.any():
            return
        index, labels = batch["index"][todo], batch["labels"][todo]
        pull = (lambda x0: self.pull(nets, x0, labels)) if self.guidance else None
        images = repaint(
            nets.painter, batch["inputs"][todo], labels, strength=self.strength, steps=self.steps, pull=pull
        )
        sure = label_logprobs(nets.run("teacher", {"inputs": images})["logits"], labels).exp()
        nets.painted.images[index], nets.painted.done[index] = images.to(nets.painted.images), True
        nets.painted.kept[index] = sure >= self.sure

    def step(self, nets: Nets, batch: Batch, clock: Clock) -> Iterator[Turn]:
        """One turn of the painter or the student, or a few pictures painted."""
        phase, labels, mask = clock.stage - (1 if self.prepare else 0), batch["labels"], batch.get("mask")
        if phase < 0:
            yield "painter", {"denoising": mean(denoising(nets.painter, batch["inputs"], labels=labels), mask)}
            return
        if phase == 1:
            self.paint(nets, batch)
            return
        told, said = nets.run("teacher", batch)["logits"], nets.run("student", batch)["logits"]
        parts = {"ce": self.hard * mean(ce(said, labels), mask)}
        parts["kd"] = self.soft * mean(kd(said, told, temperature=self.temperature), mask)
        if phase == 2:
            kept = nets.painted.kept[batch["index"]]
            seen = {"inputs": nets.painted.images[batch["index"]].to(batch["inputs"])}
            told, said = nets.run("teacher", seen)["logits"], nets.run("student", seen)["logits"]
            counts = kept & mask.bool() if mask is not None else kept
            parts["painted"] = self.soft * mean(kd(said, told, temperature=self.temperature), counts)
        yield "student", parts
