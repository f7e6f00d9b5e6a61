"""Stored labels of crops are repaired: kept where the teacher was sure, replaced by the truth where it saw little."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from limbeck.core.card import method, require
from limbeck.core.errors import BadInput
from limbeck.core.loop import Clock, Turn
from limbeck.core.maths import log_probs
from limbeck.core.mixing import Mix, cutmix, pictures
from limbeck.core.nets import Batch, Nets, evaluating
from limbeck.core.reduce import mean
from limbeck.core.store import recover


class Known(nn.Module):
    """How many classes there are: labels are mixed before the student has spoken."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.classes = classes


@method(
    paper="Shen 2023, sections 3.2 and 3.3",
    year=2023,
    arxiv="2312.17473",
    code="szq0214/FKD@afd5294:FKD/utils_FKD.py",
    differs="thresholds, their defaults, how moderate labels are adapted and what counts as similar are chosen here: "
    "the paper's code holds labels only. Thresholds are probabilities, not ranks over the store",
)
@dataclass(frozen=True)
class FerKD:
    """-sum_c q_c log softmax(z)_c, q the stored label p of this crop, repaired by its reliability r.

    r >= easy: q = p. hard <= r < easy: q = (1 - w) p + w y, w rising from 0 at easy to `adapt` at hard. r < hard:
    q = y, the label smoothed by `smoothing` (or dropped). Then each crop gets a box of the next crop of the same
    picture (SelfMix) where their q differ little; q is mixed by the pixels.

    hard, easy: thresholds, 0 <= hard <= easy <= 1; both 0, without selfmix, is `fkd`.
    reliability: "top", the largest probability, or "label", that of the true class.
    least: what becomes of the least reliable: "label" or "drop".
    adapt: w at the threshold `hard`, in [0, 1].
    smoothing: mass that y spreads evenly over the classes, in [0, 1).
    selfmix: probability that a batch is mixed, in [0, 1]; needs `crops` of the store to be 2 or more.
    similar: largest half of the summed differences of two labels that are mixed, in [0, 1].

    *Needs*: batches from a store (`limbeck label`) with several crops; labels, without which an example does not
        count; pictures for selfmix.
    *Relates to*: use it over `fkd` when crops are small enough to miss the object.
    *Differs*: see the card.
    """

    hard: float = 0.15
    easy: float = 0.5
    reliability: Literal["top", "label"] = "label"
    least: Literal["label", "drop"] = "label"
    adapt: float = 0.5
    smoothing: float = 0.1
    selfmix: float = 0.5
    similar: float = 0.3

    def __post_init__(self) -> None:
        require(0 <= self.hard <= self.easy <= 1, "hard", self.hard, f"in [0, easy], easy {self.easy} in [hard, 1]")
        require(self.reliability in ("top", "label"), "reliability", self.reliability, "top or label")
        require(self.least in ("label", "drop"), "least", self.least, "label or drop")
        require(0 <= self.smoothing < 1, "smoothing", self.smoothing, "in [0, 1)")
        for name in ("adapt", "selfmix", "similar"):
            require(0 <= getattr(self, name) <= 1, name, getattr(self, name), "in [0, 1]")

    def setup(self, nets: Nets, probe: Batch) -> None:
        """Check that the batches come from a store and that its classes are the student's."""
        if missing := {"teacher_ids", "teacher_logprobs", "labels"} - probe.keys():
            raise BadInput(f"the batches hold no {min(missing)}: `ferkd` reads labels and a store by `limbeck label`")
        with torch.no_grad(), evaluating(nets.student):
            classes = nets.run("student", probe)["logits"].shape[-1]
        if (largest := int(probe["teacher_ids"].max())) >= classes:
            raise BadInput(f"the store holds class {largest}, but the student has {classes} classes")
        nets.known = Known(classes)

    def repaired(self, said: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Targets [B, C], summing to 1, and which count [B], of stored labels p [B, C]."""
        classes = said.shape[-1]
        known, labels = labels >= 0, labels.clamp_min(0)
        truth = F.one_hot(labels, classes).to(said)
        r = said.gather(-1, labels.unsqueeze(-1)) if self.reliability == "label" else said.amax(-1, keepdim=True)
        rise = (self.easy - r) / max(self.easy - self.hard, 1e-12)
        weight = torch.where(r < self.easy, self.adapt * rise, 0.0)
        smooth = (1 - self.smoothing) * truth + self.smoothing / classes
        target = torch.where(r < self.hard, smooth, (1 - weight) * said + weight * truth)
        return target, known & (r.squeeze(-1) >= self.hard) if self.least == "drop" else known

    def mix(self, batch: Batch, target: Tensor) -> Mix:
        """The next crop of the same picture cut into each, where their targets are alike."""
        index = batch["index"].cpu()
        same = index[:, None] == index[None, :]
        ahead = (torch.arange(len(index))[None, :] - torch.arange(len(index))[:, None]) % len(index)
        partner = ahead.masked_fill(~same | (ahead == 0), len(index)).argmin(1)
        partner = torch.where(same.sum(1) > 1, partner, torch.arange(len(index)))
        apart = (target - target[partner.to(target.device)]).abs().sum(-1) / 2
        partner = torch.where(apart.cpu() <= self.similar, partner, torch.arange(len(index)))
        return cutmix(pictures(batch, "ferkd"), per="example", partner=partner)

    def loss(self, student_logits: Tensor, target: Tensor) -> Tensor:
        """Soft cross-entropy for each: [B, C] x 2 -> [B]."""
        return -(target * log_probs(student_logits)).sum(-1)

    def step(self, nets: Nets, batch: Batch, clock: Clock) -> Iterator[Turn]:
        """One turn of the student."""
        seen: Batch = {name: batch[name] for name in ("inputs", "mask") if name in batch}
        said = recover(batch["teacher_ids"], batch["teacher_logprobs"], nets.known.classes)
        target, counts = self.repaired(said, batch["labels"])
        if self.selfmix and torch.rand(()) < self.selfmix:
            mix = self.mix(batch, target)
            seen, target = mix.batch(batch), mix.targets(target)
            counts = counts & counts[mix.partner.to(counts.device)]
        if "mask" in seen:
            counts = counts & seen["mask"].bool()
        yield "student", mean(self.loss(nets.run("student", seen)["logits"], target), counts)
