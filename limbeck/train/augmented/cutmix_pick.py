"""Of pictures cut together at random, the student learns what the teacher says of those that it is least sure of."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from limbeck.core.card import method, require
from limbeck.core.errors import BadInput
from limbeck.core.loop import Clock, Turn
from limbeck.core.maths import kl, log_probs
from limbeck.core.mixing import cutmix, pictures
from limbeck.core.nets import Batch, Nets, evaluating
from limbeck.core.pair import classes
from limbeck.core.reduce import mean
from limbeck.losses.logits.ce import ce
from limbeck.losses.logits.kd import kd


@method(
    paper="Wang et al. 2020, CutMixPick, section 3.3",
    year=2020,
    arxiv="2012.02909",
    code="MingSun-Tse/Good-DA-in-KD@75443f9:helper/loops.py",
    differs="the student rates the pool in eval mode, so that its statistics see what it learns from only",
)
@dataclass(frozen=True)
class CutMixPick:
    """hard CE(x, label) + soft T^2 [KL(teacher || student on x) + KL(teacher || student on x')].

    x' are the B with the largest score of a pool of runs B pictures, each with a box of another cut in (one box a run).
    Their targets are what the teacher says of them; their labels are not used.

    hard, soft: weights, >= 0.
    temperature: T > 0.
    runs: size of the pool in batches, >= 1; 1 is CutMix without a choice.
    score: "student" or "teacher" entropy (S.ent. and T.ent. of the paper), or "kl" from teacher to student at T.

    *Needs*: nets.teacher at hand, labels, pictures, at least 2 a batch.
    *Relates to*: costs two passes of the student and one to rate the pool; compare with `kd` on twice the batch. Gains
        grow with training. `deviation` below tells before any training which augmentation suits a teacher.
    *Differs*: see the card.
    """

    hard: float = 0.1
    soft: float = 0.9
    temperature: float = 4.0
    runs: int = 2
    score: Literal["student", "teacher", "kl"] = "student"

    def __post_init__(self) -> None:
        require(self.hard >= 0, "hard", self.hard, ">= 0")
        require(self.soft >= 0, "soft", self.soft, ">= 0")
        require(self.temperature > 0, "temperature", self.temperature, "> 0")
        require(self.runs >= 1, "runs", self.runs, ">= 1")
        require(self.score in ("student", "teacher", "kl"), "score", self.score, "student, teacher or kl")

    def setup(self, nets: Nets, probe: Batch) -> None:
        """Check that there is a teacher to ask, of the same classes, and that inputs can be cut."""
        if "teacher" not in nets:
            raise BadInput("`cutmix_pick` asks the teacher about pictures made in each step: give it, not a store")
        if len(pictures(probe, "cutmix_pick")) < 2:
            raise BadInput("`cutmix_pick` cuts pictures into one another, and the batch holds only one")
        classes(nets, probe, "cutmix_pick")

    def scores(self, student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
        """How much there is to learn from each: [..., C] x 2 -> [...]."""
        if self.score == "kl":
            return kl(student_logits, teacher_logits, self.temperature)
        log_p = log_probs(student_logits if self.score == "student" else teacher_logits)
        return -(log_p.exp() * log_p).sum(-1)

    @torch.no_grad()
    def pick(self, nets: Nets, batch: Batch) -> Batch:
        """The B pictures of the pool with the largest scores, and what the teacher says of them."""
        images = pictures(batch, "cutmix_pick")
        pools = [cutmix(images).batch(batch) for _ in range(self.runs)]
        pool = {name: torch.cat([p[name] for p in pools]) for name in pools[0]}
        pool["teacher_logits"] = nets.run("teacher", pool)["logits"]
        if self.runs == 1:
            return pool
        with evaluating(nets.student):
            student = nets.run("student", pool)["logits"] if self.score != "teacher" else pool["teacher_logits"]
        rated = self.scores(student, pool["teacher_logits"])
        if "mask" in pool:
            rated = rated.masked_fill(~pool["mask"], -torch.inf)
        chosen = rated.argsort(descending=True, stable=True)[: len(images)].sort().values
        return {name: value[chosen] for name, value in pool.items()}

    def step(self, nets: Nets, batch: Batch, clock: Clock) -> Iterator[Turn]:
        """One turn of the student, on both."""
        seen, mask = self.pick(nets, batch), batch.get("mask")
        teacher = nets.run("teacher", batch)["logits"]
        student, mixed = nets.run("student", batch)["logits"], nets.run("student", seen)["logits"]
        yield (
            "student",
            {
                "ce": self.hard * mean(ce(student, batch["labels"]), mask),
                "kd": self.soft * mean(kd(student, teacher, temperature=self.temperature), mask),
                "mixed": self.soft
                * mean(kd(mixed, seen["teacher_logits"], temperature=self.temperature), seen.get("mask")),
            },
        )


def deviation(logits: Tensor) -> Tensor:
    """T.stddev of what a teacher says of augmented pictures: deviation over pools of the mean prediction, mean over
    classes; the lower, the better is the augmentation. Pools of 5 batches are usual. [pools, n, C] -> []"""
    return log_probs(logits).exp().mean(1).std(0).mean()
