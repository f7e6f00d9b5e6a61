"""The student learns new pictures by steps that also help it on pictures of before: acquire, and retain."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from limbeck.core.adapt import step_ahead
from limbeck.core.card import method, require
from limbeck.core.imagine import check_generator, imagine, imagined, need_embedding, run_with, unevenness
from limbeck.core.loop import Clock, Turn
from limbeck.core.maths import js, log_probs, upcast
from limbeck.core.memory import Memory
from limbeck.core.nets import Batch, Nets
from limbeck.core.reduce import mean
from limbeck.losses.logits.ce import ce


def apart(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean absolute difference of logits: [B, C] x 2 -> [B]."""
    return (upcast(student) - upcast(teacher)).abs().mean(-1)


@method(
    paper="Patel et al. 2023, eq. 1-8 and algorithm 1",
    year=2023,
    arxiv="2302.14290",
    code="gaurav104/LRA@40a8941:src/agents/predfkd_meta_memory.py",
    differs="Memory of pictures; not the paper's other one, an autoencoder that makes them again. Disagreement is the "
    "Jensen-Shannon divergence, which the code turns round, clamps and divides by C. Pictures are put into memory "
    "every so many steps, not epochs. In the code theta' starts from a copy of theta, so that retention gives the "
    "student no gradient: it is `retention: 0` here",
)
@dataclass(frozen=True)
class LRADFKD:
    """The student minimises L(x, m; theta) + retention L(m; theta'), theta' = theta - rate dL(x; theta)/dtheta.

    L is the mean |z_s - z_t| over logits, x are new pictures, m remembered ones. To first order the second term adds
    -rate <dL(x), dL(m)>: it seeks steps on new pictures along which the old are not forgotten. The generator minimises
    onehot CE(z_t, argmax z_t) + entropy sum_c p_c log10 p_c - activation mean|f_t| + disagreement (1 - JS(p_t, p_s)),
    p_c the mean of p_t over the batch, JS at temperature 3, gradient to p_s alone.

    onehot, entropy, activation, disagreement: weights >= 0 of the generator's terms, as in `dafl`.
    retention: weight >= 0; 0 is the plain memory that the paper compares with.
    rate: of the step in thought, >= 0.
    every: steps from one time that pictures are remembered to the next, >= 1; an eighth of the batch is, and as many
        are looked at again in each turn. memory: pictures kept, >= 1.
    student_steps: turns a step, >= 1. latent: numbers in a code, which the generator reads, >= 1.

    *Needs*: nets.teacher that returns logits and, unless activation is 0, "emb"; nets.student, nets.generator. The
    batch tells only how many pictures to make. *Relates to*: `dfad` is the game without memory.
    """

    onehot: float = 1.0
    entropy: float = 5.0
    activation: float = 0.1
    disagreement: float = 1.0
    retention: float = 1.0
    rate: float = 0.9
    every: int = 360
    memory: int = 640
    student_steps: int = 10
    latent: int = 1000
    dataless = True

    def __post_init__(self) -> None:
        for name in ("onehot", "entropy", "activation", "disagreement", "retention", "rate"):
            require(getattr(self, name) >= 0, name, getattr(self, name), ">= 0")
        for name in ("every", "memory", "student_steps", "latent"):
            require(getattr(self, name) >= 1, name, getattr(self, name), ">= 1")

    def optimizers(self) -> dict[str, dict[str, Any]]:
        """The paper's."""
        student = {"sgd": {"lr": 0.1, "momentum": 0.9, "weight_decay": 5e-4}}
        return {"generator": {"adam": {"lr": 0.02}}, "student": student}

    def setup(self, nets: Nets, probe: Batch) -> None:
        """Check that generator and teacher fit; make room for pictures."""
        pictures, told = check_generator(nets, self.latent)
        if self.activation:
            need_embedding(told, "activation")
        nets.memory = Memory(self.memory, {"inputs": pictures})

    def realism(self, nets: Nets, pictures: Tensor) -> dict[str, Tensor]:
        """The generator's loss on its pictures: {part: []}."""
        shown = {"inputs": pictures}
        told, student = nets.run("teacher", shown, through=True), nets.run("student", shown)["logits"]
        logits = told["logits"]
        parts = {"onehot": self.onehot * ce(logits, log_probs(logits).argmax(-1)).mean()}
        parts["entropy"] = self.entropy * unevenness(logits) / torch.tensor(10.0).log()
        if self.activation:
            parts["activation"] = -self.activation * told["emb"].abs().mean()
        parts["disagreement"] = self.disagreement * (1 - js(student, logits.detach(), temperature=3.0).mean())
        return parts

    def retained(self, nets: Nets, new: Tensor, old: Tensor) -> Tensor:
        """L(m; theta') [B]: how far the student would be off on old pictures after a step on the new alone."""
        told_new, told_old = (nets.run("teacher", {"inputs": x})["logits"] for x in (new, old))
        first = run_with(nets, "student", {}, {"inputs": new})["logits"]
        ahead = step_ahead(nets.student, apart(first, told_new).mean(), self.rate)
        return apart(run_with(nets, "student", ahead, {"inputs": old})["logits"], told_old)

    def step(self, nets: Nets, batch: Batch, clock: Clock) -> Iterator[Turn]:
        """A turn of the generator, then of the student on new and old pictures."""
        count = len(batch["index"])
        few = max(1, count // 8)
        yield "generator", self.realism(nets, imagine(nets, count, self.latent))
        for _ in range(self.student_steps):
            new = imagined(nets, count, self.latent)
            old = nets.memory.some(few)["inputs"]
            shown = {"inputs": torch.cat([new, old])}
            teacher, student = nets.run("teacher", shown)["logits"], nets.run("student", shown)["logits"]
            parts = {"acquisition": mean(apart(student, teacher))}
            if self.retention and len(old):
                parts["retention"] = self.retention * mean(self.retained(nets, new, old))
            yield "student", parts
        if clock.t % self.every == 0:
            nets.memory.add(inputs=new[:few])
