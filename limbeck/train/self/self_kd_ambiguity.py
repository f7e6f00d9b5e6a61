"""A lower layer, which sees less, tells the last how ambiguous an example is; where it is most, doubt is restored."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from limbeck.core.card import method, require
from limbeck.core.errors import BadInput
from limbeck.core.features import pick, pooled, width
from limbeck.core.loop import Clock, Stage, Turn
from limbeck.core.maths import FLOOR, kl_logprobs, log_probs, upcast
from limbeck.core.nets import Batch, Nets, evaluating
from limbeck.core.past import Past
from limbeck.core.reduce import mean
from limbeck.losses.logits.ce import ce
from limbeck.losses.logits.kd import kd


@method(
    paper="Park et al. 2024, section 3",
    year=2024,
    arxiv="2406.09719",
    differs="the paper's criterion and capping could not be looked up and are made definite here: an example is "
    "ambiguous when its label is not the lower layer's first choice, or by the entropy; the label then gets as much as "
    "the first of the others. Layer, weight and threshold are for the user to set",
    exact_accumulation=True,
)
@dataclass(frozen=True)
class SelfKDAmbiguity:
    """Stage 1: CE(label, z) + CE(label, z_l) + weight T^2 KL(softmax(z_l / T) || softmax(z / T)), z_l constant in KL.

    z_l is what a linear classifier reads off the student's `layer`; it is dropped after training. What it last said
    of each example, p, is remembered. Stage 2: where p is ambiguous (the label is not its first choice, or its entropy
    is above `threshold` log C) the student learns KL(q || softmax z) instead, where q is p with the label raised to the
    largest of the others, if below, and scaled to sum 1; all else is as before.

    weight: of the KL, >= 0; with 0, and share 1, this is training with two exits.
    temperature: T > 0.
    layer: which of the student's features, from shallow (0) or from deep (-1).
    threshold: share of the largest entropy, in [0, 1]; at 1 only the first choice decides.
    share: of all steps that stage 1 takes, in (0, 1]; 1 leaves stage 2 out.
    class_token: whether tokens begin with one, which is then read in the place of the mean over real tokens.

    *Needs*: nets.student that returns inner `feats` and logits [B, C]; labels; the `index` of each example.
    *Relates to*: judge it by calibration and by agreement with several annotators, less by accuracy; `ps_kd` takes
        its distribution from the same layer's past, `byot` teaches the other way, deep to shallow.
    """

    weight: float = 1.0
    temperature: float = 1.0
    layer: int = 0
    threshold: float = 0.9
    share: float = 0.8
    class_token: bool = False

    def __post_init__(self) -> None:
        require(self.weight >= 0, "weight", self.weight, ">= 0")
        require(self.temperature > 0, "temperature", self.temperature, "> 0")
        require(0 <= self.threshold <= 1, "threshold", self.threshold, "in [0, 1]")
        require(0 < self.share <= 1, "share", self.share, "in (0, 1]")

    def setup(self, nets: Nets, probe: Batch) -> None:
        """The lower classifier, and room for what it says of each example."""
        with torch.no_grad(), evaluating(nets.student):
            out = nets.run("student", probe)
        if "feats" not in out:
            raise BadInput("the student returns no `feats`; tap its layers (taps: {feats: [path, ...]})")
        if "index" not in probe:
            raise BadInput("the batches bring no `index`, by which what is said of an example is remembered")
        feature, classes = out["feats"][pick("layer", out["feats"], self.layer, "student")], out["logits"].shape[-1]
        nets.lower = nn.Linear(width(tuple(feature.shape)), classes)
        nets.companions["student"] = ["lower"]
        nets.past = Past(int(probe.get("examples") or probe["index"].max() + 1), (classes,))

    def stages(self, nets: Nets, steps: int) -> Iterator[Stage]:
        """Learning from below, then taking back confidence."""
        first = steps if self.share == 1 else min(steps - 1, max(1, round(self.share * steps)))
        yield Stage(first, "distil", until=self.share)
        if first < steps:
            yield Stage(steps - first, "recalibrate")

    def step(self, nets: Nets, batch: Batch, clock: Clock) -> Iterator[Turn]:
        """One turn of the student with its lower classifier."""
        out, labels, mask = nets.run("student", batch), batch["labels"], batch.get("mask")
        feature, real = out["feats"][self.layer], batch.get("attention_mask")
        first = self.class_token and feature.ndim == 3
        read = feature[:, 0] if first else pooled(feature, real if feature.ndim == 3 else None)
        below = nets.lower(read.to(nets.lower.weight.dtype))
        truth, said = ce(out["logits"], labels), log_probs(out["logits"])
        learned = self.weight * kd(out["logits"], below.detach(), temperature=self.temperature)
        if clock.stage:
            even = torch.zeros_like(said).scatter_(-1, labels.unsqueeze(-1), 1.0)  # never seen: not ambiguous
            q, doubtful = recalibrated(nets.past.recall(batch["index"], even), labels, self.threshold)
            truth = torch.where(doubtful, kl_logprobs(q.log().clamp_min(FLOOR), said), truth)
            learned = torch.where(doubtful, 0.0, learned)
        else:
            nets.past.remember(batch["index"], upcast(below.detach()).softmax(-1), mask)
        parts = {"ce": mean(truth, mask), "lower": mean(ce(below, labels), mask)}
        if self.weight:
            parts["kl"] = mean(learned, mask)
        yield "student", parts


def recalibrated(p: Tensor, labels: Tensor, threshold: float) -> tuple[Tensor, Tensor]:
    """q [B, C], p with its label no less than the first of the others, and whether p is ambiguous [B]."""
    label = labels.unsqueeze(-1)
    other = p.scatter(-1, label, 0.0).amax(-1, keepdim=True)
    own = p.gather(-1, label)
    entropy = -(p * p.clamp_min(torch.finfo(p.dtype).tiny).log()).sum(-1)
    greatest = torch.tensor(float(p.shape[-1]), dtype=p.dtype, device=p.device).log()
    doubtful = (own < other).squeeze(-1)
    if threshold < 1:  # at 1 rounding alone lifts an entropy above the largest
        doubtful |= entropy > threshold * greatest
    q = p.scatter(-1, label, torch.maximum(own, other))
    return q / q.sum(-1, keepdim=True), doubtful
