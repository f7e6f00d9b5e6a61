"""Few of a batch are blended, and each example's temperature is the deviation of its logits."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from limbeck.core.card import method, require
from limbeck.core.errors import BadInput
from limbeck.core.loop import Clock, Turn
from limbeck.core.maths import kl
from limbeck.core.mixing import Mix, mixup, pictures
from limbeck.core.nets import Batch, Nets
from limbeck.core.pair import classes
from limbeck.core.reduce import mean
from limbeck.core.responses import standardized


@method(
    paper="Choi et al. 2023, partial mixup and rescaled logits",
    year=2023,
    arxiv="2211.03946",
    code="hchoi71/MIX-KD@6e8c149:distiller_zoo/MIXSTD.py, helper/loops_mixstd.py",
    differs="exactly the share `clean` stays as it is; the code draws which with replacement, so that 41 % of a batch "
    "is blended at 0.9. Logits are centred, which changes nothing, and deviations have 1e-7 added",
)
@dataclass(frozen=True)
class MixKD:
    """gamma CE(y, softmax(z_s / std z_s)) + alpha KL(softmax(z_t / std z_t) || softmax(z_s / std z_s)) on blends.

    x = a x_1 + (1 - a) x_2 and y alike, a from Beta(beta, beta) for each example, 1 for those that stay clean; teacher
    and student see the same. std is over the classes of one example, and the gradient flows through the student's.

    gamma, alpha: weights of labels and teacher, >= 0.
    beta: of the Beta distribution, > 0.
    clean: share of a batch that stays as it is, in [0, 1]: 0 is full mixup, 1 blends nothing.

    *Needs*: nets.teacher at hand, best trained without mixup; labels, -100 for none; pictures.
    *Relates to*: `logit_standardization` rescales alike at a temperature above 1, and leaves the label term as it is;
        `funmatch` blends all and reads no labels.
    *Differs*: see the card.
    """

    gamma: float = 0.1
    alpha: float = 0.9
    beta: float = 1.0
    clean: float = 0.9

    def __post_init__(self) -> None:
        require(self.gamma >= 0, "gamma", self.gamma, ">= 0")
        require(self.alpha >= 0, "alpha", self.alpha, ">= 0")
        require(self.beta > 0, "beta", self.beta, "> 0")
        require(0 <= self.clean <= 1, "clean", self.clean, "in [0, 1]")

    def setup(self, nets: Nets, probe: Batch) -> None:
        """Check that there is a teacher to ask, of the same classes, and that inputs can be blended."""
        if "teacher" not in nets:
            raise BadInput("`mix_kd` asks the teacher about pictures made in each step: give the teacher, not a store")
        pictures(probe, "mix_kd")
        classes(nets, probe, "mix_kd")

    def mix(self, count: int) -> Mix:
        """Who is blended with whom in a batch of `count`, and how much."""
        blend = mixup(count, alpha=self.beta, per="example")
        clean = torch.randperm(count)[: int(count * self.clean)]
        return Mix(blend.partner, blend.share.index_fill(0, clean, 1.0))

    def losses(self, student_logits: Tensor, teacher_logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """Weighted label and teacher terms for each example: [B, C] x 3 -> [B], [B]."""
        student, teacher = standardized(student_logits), standardized(teacher_logits.detach())
        truth = -(target * student.log_softmax(-1)).sum(-1)
        return self.gamma * truth, self.alpha * kl(student, teacher)

    def step(self, nets: Nets, batch: Batch, clock: Clock) -> Iterator[Turn]:
        """One turn of the student."""
        mix = self.mix(len(batch["inputs"]))
        seen = mix.batch(batch)
        teacher, student = nets.run("teacher", seen)["logits"], nets.run("student", seen)["logits"]
        target = mix.targets(F.one_hot(batch["labels"].clamp_min(0), student.shape[-1]).to(student))
        ce, soft = self.losses(student, teacher, target)
        mask, known = seen.get("mask"), batch["labels"] >= 0
        known = known & (known[mix.partner.to(known.device)] | (mix.share.to(known.device) == 1))
        yield "student", {"ce": mean(ce, known if mask is None else known & mask), "kd": mean(soft, mask)}
