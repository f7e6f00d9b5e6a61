"""Teacher and student are set against a generator that looks for pictures on which the two disagree."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from limbeck.core.card import method, require
from limbeck.core.imagine import check_generator, need_features
from limbeck.core.loop import Clock, Turn
from limbeck.core.maths import kl
from limbeck.core.nets import Batch, Nets, evaluating
from limbeck.core.reduce import mean
from limbeck.losses.attention.at import at


@method(
    paper="Micaelli and Storkey 2019, algorithm 1 and eq. 1-2",
    year=2019,
    arxiv="1905.09768",
    code="polo5/ZeroShotKnowledgeTransfer@e24915d:solver.py",
    differs="KL is summed over the classes as in the paper, where the code takes the mean over them: its 250 is 250 C "
    "here. Attention as in the code and `at`: the mean over places of the squared difference, a sum over layers",
)
@dataclass(frozen=True)
class ZSKT:
    """The generator minimises -KL(teacher || student), the student KL(teacher || student) + attention AT.

    A step takes one batch of codes: `generator_steps` turns of the generator, then `student_steps` turns of the student
    on the pictures that it makes of them in the end. AT compares where both look, layer by layer, as `at` does.

    temperature: T > 0 of both divergences, without T^2.
    attention: weight >= 0 of AT; 0 where the teacher shows only its logits.
    generator_steps, student_steps: turns a step, >= 1. 7 to 10 of the student is usual.
    latent: numbers in a code, which the generator reads [B, latent], >= 1.

    *Needs*: nets.teacher, nets.student, nets.generator; feats of both unless attention is 0. The batch tells only how
    many pictures to make. Clip gradients at 5 (train.clip) and anneal the rates by a cosine, as the paper does.
    *Relates to*: `dfad` is the same game in the L1 distance of the logits; `dfq` holds the generator to what the
        teacher remembers of its data, `dafl` has no game. *Differs*: see the card.
    """

    temperature: float = 1.0
    attention: float = 250.0
    generator_steps: int = 1
    student_steps: int = 10
    latent: int = 100
    dataless = True

    def __post_init__(self) -> None:
        require(self.temperature > 0, "temperature", self.temperature, "> 0")
        require(self.attention >= 0, "attention", self.attention, ">= 0")
        for name in ("generator_steps", "student_steps", "latent"):
            require(getattr(self, name) >= 1, name, getattr(self, name), ">= 1")

    def optimizers(self) -> dict[str, dict[str, Any]]:
        """The paper's."""
        return {"generator": {"adam": {"lr": 1e-3}}, "student": {"adam": {"lr": 2e-3}}}

    def setup(self, nets: Nets, probe: Batch) -> None:
        """Check that the generator reads codes of `latent` numbers and that the teacher reads its pictures."""
        pictures, told = check_generator(nets, self.latent)
        if self.attention:
            with torch.no_grad(), evaluating(nets.student):
                for said in (told, nets.run("student", {"inputs": pictures})):
                    need_features(said, "attention")

    def step(self, nets: Nets, batch: Batch, clock: Clock) -> Iterator[Turn]:
        """Turns of the generator, then of the student, on the pictures of one batch of codes."""
        codes = torch.randn(len(batch["index"]), self.latent, device=nets.device)
        for _ in range(self.generator_steps):
            shown = {"inputs": nets.generator(codes)}
            teacher, student = nets.run("teacher", shown, through=True), nets.run("student", shown)
            yield "generator", -1.0 * mean(kl(student["logits"], teacher["logits"], self.temperature))
        with torch.no_grad():
            shown = {"inputs": nets.generator(codes)}
        teacher = nets.run("teacher", shown)
        for _ in range(self.student_steps):
            student = nets.run("student", shown)
            parts = {"kl": mean(kl(student["logits"], teacher["logits"], self.temperature))}
            if self.attention:
                parts["attention"] = self.attention * mean(at(student["feats"], teacher["feats"]))
            yield "student", parts
