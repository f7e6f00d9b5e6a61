"""A student is taught without data: a generator learns to make pictures that the teacher takes for real ones."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from limbeck.core.card import method, require
from limbeck.core.imagine import check_generator, imagine, imagined, need_embedding
from limbeck.core.loop import Clock, Turn
from limbeck.core.maths import log_probs
from limbeck.core.nets import Batch, Nets
from limbeck.core.reduce import mean
from limbeck.losses.logits.ce import ce
from limbeck.losses.logits.kd import kd


@method(
    paper="Chen et al. 2019, algorithm 1 and eq. 7",
    year=2019,
    arxiv="1904.01186",
    code="huawei-noah/Data-Efficient-Model-Compression@5e8f4e4:DAFL/DAFL-train.py",
    differs="new codes for the student's turn as in algorithm 1; the code shows it the generator's own batch",
)
@dataclass(frozen=True)
class DAFL:
    """The generator minimises onehot CE(z, argmax z) - activation mean|f| + entropy sum_c p_c log10 p_c.

    z and f are the teacher's logits and features of the generated pictures, p is the mean of its predictions over the
    batch. Then the student minimises T^2 KL(teacher || student) on new pictures.

    onehot: weight >= 0; real pictures are classified with certainty.
    activation: weight >= 0; real pictures excite the features before the head.
    entropy: weight >= 0; all classes are made equally often. Base-10 logarithm, as in the code.
    temperature: T > 0 of the student's loss; the code's is 1.
    latent: numbers in a code, which the generator reads [B, latent], >= 1. 100 for digits, 1000 for CIFAR.

    *Needs*: nets.teacher that returns logits and "emb", nets.generator, nets.student. The batch tells only how many
    pictures to make; what is in it is never looked at. *Relates to*: use `distill` on any real data first, labelled or
    not: it beats generated pictures. *Differs*: see the card.
    """

    onehot: float = 1.0
    activation: float = 0.1
    entropy: float = 5.0
    temperature: float = 1.0
    latent: int = 100
    dataless = True

    def __post_init__(self) -> None:
        for name in ("onehot", "activation", "entropy"):
            require(getattr(self, name) >= 0, name, getattr(self, name), ">= 0")
        require(self.temperature > 0, "temperature", self.temperature, "> 0")
        require(self.latent >= 1, "latent", self.latent, ">= 1")

    def optimizers(self) -> dict[str, dict[str, Any]]:
        """The code's for digits."""
        return {"generator": {"adam": {"lr": 0.2}}, "student": {"adam": {"lr": 2e-3}}}

    def setup(self, nets: Nets, probe: Batch) -> None:
        """Check that the generator reads codes of `latent` numbers and that the teacher reads its pictures."""
        _, told = check_generator(nets, self.latent)
        if self.activation:
            need_embedding(told, "activation")

    def realism(self, out: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The generator's loss from what the teacher returns on its pictures: {part: []}."""
        logp = log_probs(out["logits"])
        p = logp.exp().mean(0)
        parts = {
            "onehot": self.onehot * ce(out["logits"], logp.argmax(-1)).mean(),
            "entropy": self.entropy * (p * p.clamp_min(torch.finfo(p.dtype).tiny).log10()).sum(),
        }
        if self.activation:
            parts["activation"] = -self.activation * out["emb"].abs().mean()
        return parts

    def step(self, nets: Nets, batch: Batch, clock: Clock) -> Iterator[Turn]:
        """A turn of the generator, then one of the student."""
        count = len(batch["index"])
        pictures = imagine(nets, count, self.latent)
        yield "generator", self.realism(nets.run("teacher", {"inputs": pictures}, through=True))
        shown = {"inputs": imagined(nets, count, self.latent)}
        teacher, student = nets.run("teacher", shown)["logits"], nets.run("student", shown)["logits"]
        yield "student", mean(kd(student, teacher, temperature=self.temperature))
