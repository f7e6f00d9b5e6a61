"""Two views of a picture should look alike, and like what is said of similar pictures of the batch; then the task."""

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from limbeck.core.card import method, require
from limbeck.core.ema import follow
from limbeck.core.loop import Clock, Stage, Turn
from limbeck.core.maths import kl, pair, upcast
from limbeck.core.nets import Batch, Nets, evaluating
from limbeck.core.pretext import answer, before_task, check_area, check_share, cut, normed, pools, rising
from limbeck.core.reduce import Part, labelled, mean
from limbeck.core.taps import untap
from limbeck.losses.logits.ce import ce


@method(
    paper="Li et al. 2022, ICASSP, self-knowledge distillation based self-supervised learning",
    year=2022,
    arxiv="2206.03009",
    differs="there is no official code; how soft targets come from similarities is that of batch knowledge ensembling "
    "(Ge et al. 2021), lambda and temperatures are ours. Pre-training and fine-tuning together take the steps of a "
    "control",
)
@dataclass(frozen=True)
class SelfKDSSLCovid:
    """Stage 1: sum over both orders of (2 - 2 cos(q1, z2)) + weight KL(T || p(q1)). Stage 2: CE with labels.

    q1 is what student, projector and predictor make of one view, z2 what the average of student and projector makes of
    the other, a constant. p(v) = softmax(v / (|v| temperature)). T = (1 - w) (I - w A)^-1 P, row by row: P = p(z2), and
    A says how similar other pictures of the batch are, softmax over them of cos(f_i, f_j) / nearness, of the average's
    embeddings f. Projector, predictor and average are dropped after stage 1.

    weight: lambda of the soft targets, >= 0; 0 is BYOL.
    ensembling: w, in [0, 1): how much of T comes from other pictures.
    temperature, nearness: > 0.
    decay: of the average, in [0, 1), at the start; it rises to 1 by a half cosine.
    share: of all steps that the first stage takes, in [0, 1). probe: stage 2 trains the head alone.
    area: least and largest part of a picture that a view shows. augment: what is done to views beside, as `data:
        augment`. hidden, width: of projector and predictor, >= 1; the paper's are 4096 and 256.

    *Needs*: a student of pictures that returns `emb` (and `head`, to be probed); labels -100 for none.
    *Relates to*: use it where pictures are many and labels few. `mokd` has two networks and prototypes.
    *Differs*: see the card.
    """

    weight: float = 1.0
    ensembling: float = 0.5
    temperature: float = 0.1
    nearness: float = 0.1
    decay: float = 0.996
    share: float = 0.5
    probe: bool = False
    area: tuple[float, float] = (0.2, 1.0)
    augment: tuple[Any, ...] = ("flip", {"siamese": {"ops": ["color"]}})
    hidden: int = 128
    width: int = 64

    def __post_init__(self) -> None:
        require(self.weight >= 0, "weight", self.weight, ">= 0")
        require(0 <= self.ensembling < 1, "ensembling", self.ensembling, "in [0, 1)")
        require(self.temperature > 0, "temperature", self.temperature, "> 0")
        require(self.nearness > 0, "nearness", self.nearness, "> 0")
        require(0 <= self.decay < 1, "decay", self.decay, "in [0, 1)")
        require(min(self.hidden, self.width) >= 1, "hidden", (self.hidden, self.width), ">= 1, as `width`")
        check_share(self.share)
        check_area("area", self.area)

    def pools(self, labels: Tensor) -> dict[str, Tensor]:
        """The rows of both stages."""
        return pools(labels)

    def setup(self, nets: Nets, probe: Batch) -> None:
        """Projector and predictor, and the average, which starts as a copy."""
        with torch.no_grad(), evaluating(nets.student):
            width = nets.run("student", probe)["emb"].shape[1]
        projector = normed(width, self.hidden, self.width)
        predictor = normed(self.width, self.hidden, self.width)
        nets.pretext = nn.ModuleDict({"projector": projector, "predictor": predictor})
        nets.average = copy.deepcopy(nn.ModuleDict({"student": nets.student, "projector": projector}))
        nets.average.requires_grad_(False)
        untap(nets.average)

    def stages(self, nets: Nets, steps: int) -> Iterator[Stage]:
        """Views of all pictures, then those that have a label."""
        return before_task(nets, {"student": "pretext"}, self.share, steps)

    def alike(self, nets: Nets, batch: Batch) -> dict[str, Part]:
        """The losses of the first stage."""
        views = [batch | {"inputs": cut(batch["inputs"], self.area, self.augment)} for _ in range(2)]
        asked, told, targets = [], [], []
        for view in views:
            emb = nets.run("student", view)["emb"]
            asked.append(nets.pretext["predictor"](nets.pretext["projector"](emb)))
            with torch.no_grad():
                feature = nets.run("average.student", view)["emb"]
                told.append(nets.average["projector"](feature))
                said = sharpened(told[-1], self.temperature).softmax(-1)
                targets.append(ensembled(said, feature, self.ensembling, self.nearness, batch.get("mask")))
        parts = {"views": mean(far(asked[0], told[1]) + far(asked[1], told[0]), batch.get("mask"))}
        if self.weight:
            apart = [kl(sharpened(asked[i], self.temperature), targets[1 - i].log()) for i in (0, 1)]
            parts["similar"] = self.weight * mean(apart[0] + apart[1], batch.get("mask"))
        return parts

    def step(self, nets: Nets, batch: Batch, clock: Clock) -> Iterator[Turn]:
        """One turn of the student."""
        if self.share and clock.stage == 0:
            yield "student", self.alike(nets, batch)
            return
        told = answer(nets, "student", batch, probe=self.probe)
        yield "student", {"ce": mean(ce(told, batch["labels"]), labelled(batch))}

    def after(self, nets: Nets, player: str, clock: Clock) -> None:
        """The average follows, as long as it is asked."""
        if self.share and clock.stage == 0:
            decay = rising(self.decay, clock.progress)
            follow(nets.average["student"], nets.student, decay)
            follow(nets.average["projector"], nets.pretext["projector"], decay)


def far(student: Tensor, teacher: Tensor) -> Tensor:
    """2 - 2 cos of vectors [B, D] x 2: [B]; 0 where they are parallel."""
    mine, aim = pair(student, teacher.detach())
    return 2 - 2 * F.cosine_similarity(mine, aim, dim=-1)


def sharpened(vectors: Tensor, temperature: float) -> Tensor:
    """Vectors [B, D] of length 1 / temperature, as logits."""
    return F.normalize(upcast(vectors), dim=-1) / temperature


def ensembled(said: Tensor, features: Tensor, weight: float, nearness: float, mask: Tensor | None = None) -> Tensor:
    """(1 - w) (I - w A)^-1 P of probabilities P [B, K] and features [B, D], without gradient: [B, K] of sum 1.

    Who is alone, as no other example counts (mask [B]), keeps what was said.
    """
    unit, p = F.normalize(upcast(features.detach()), dim=-1), upcast(said.detach())
    eye = torch.eye(len(p), dtype=torch.bool, device=p.device)
    others = ~eye if mask is None else ~eye & mask.bool()
    near = ((unit @ unit.mT) / nearness).masked_fill(~others, -torch.inf).softmax(-1)
    near = torch.where(others.any(1, keepdim=True), near, eye.to(near)).to(p)
    spread: Tensor = torch.linalg.solve(eye.to(p) - weight * near, p)
    return (1 - weight) * spread
