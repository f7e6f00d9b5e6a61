"""Every place of the student's last layer learns what the teacher says of that place, later of the whole picture."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from limbeck.core.card import method, require
from limbeck.core.errors import BadInput
from limbeck.core.features import picture, same_places
from limbeck.core.graft import last_maps, watched
from limbeck.core.loop import Clock, Turn
from limbeck.core.maths import upcast
from limbeck.core.nets import Batch, Nets, evaluating
from limbeck.core.project import projector
from limbeck.core.reduce import mean
from limbeck.core.surgery import copied
from limbeck.core.teachers import at_hand

FUSIONS: dict[str, Callable[[float], float]] = {
    "linear": lambda x: 1 - x,
    "square": lambda x: (1 - x) ** 2,
    "cosine": lambda x: math.cos(math.pi * x / 2),
}


@method(
    paper="Zhao et al. 2023, eq. 5-9",
    year=2023,
    arxiv="2307.08500",
    code="Zzzzz1/CSKD@fa0d8b8:cskd/cskd.py",
    differs="one classifier learns from labels and teacher, where the paper's student has a token for each and "
    "averages them; the share of local answers falls with the steps, to exactly 0, not with the epochs; the soft "
    "variant of the code is left out",
    exact_accumulation=True,
)
@dataclass(frozen=True)
class CSKD:
    """(1 - alpha) CE(z_s, label) + alpha CE(z_s, argmax G_t) + dense_weight mean over places CE(D_s, argmax F).

    D_t [B, C, H, W] is the teacher's classifier at every place of the map before its pooling, G_t their mean, the
    teacher's logits; F = r D_t + (1 - r) G_t with r from 1 to 0. D_s is a linear classifier at every token of the
    student, for training only, averaged down to the teacher's places.

    alpha: share of the teacher's hard label, in [0, 1].
    dense_weight: >= 0.
    fusion: how r falls with the progress x: "linear" 1 - x, "square" (1 - x)^2 or "cosine" cos(pi x / 2).

    *Needs*: nets.teacher at hand with a linear head on the mean over its last map; `feats` of the student that are
        maps or a square picture of tokens; labels.
    *Relates to*: made for convolutional teachers of vision transformers, with strong augmentation and long training.
        With dense_weight 0 it is hard-label distillation (DeiT); `ofa_kd` reads inner layers, too.
    """

    alpha: float = 0.5
    dense_weight: float = 1.0
    fusion: Literal["linear", "square", "cosine"] = "linear"

    def __post_init__(self) -> None:
        require(0 <= self.alpha <= 1, "alpha", self.alpha, "in [0, 1]")
        require(self.dense_weight >= 0, "dense_weight", self.dense_weight, ">= 0")
        require(self.fusion in FUSIONS, "fusion", self.fusion, f"one of {', '.join(FUSIONS)}")

    def setup(self, nets: Nets, probe: Batch) -> None:
        """Find the teacher's classifier, and build one for the places of the student."""
        at_hand(nets, "cskd", "asks the teacher place by place")
        teacher = watched(nets, "teacher", probe)
        with torch.no_grad(), evaluating(nets.student):
            said = nets.run("student", probe)
        classes = said["logits"].shape[-1]
        if teacher.head.out_features != classes:
            raise BadInput(
                f"cskd needs the same classes, but the teacher knows {teacher.head.out_features}, the student {classes}"
            )
        nets.teacher_head = copied(teacher.head)  # a name of its own: the head inside reads what is pooled
        nets.dense = projector("linear", picture(said["feats"][-1]).shape[1], classes)
        nets.companions["student"] = ["dense"]

    def step(self, nets: Nets, batch: Batch, clock: Clock) -> Iterator[Turn]:
        """One turn of the student."""
        told, said = nets.run("teacher", batch), nets.run("student", batch)
        aim = at_places(nets.teacher_head, told)
        labels, logits, mask = batch["labels"], upcast(said["logits"]), batch.get("mask")
        dense = nets.dense(picture(said["feats"][-1]))
        places = dense_loss(dense, aim, FUSIONS[self.fusion](clock.progress))
        truth, hard = (F.cross_entropy(logits, y, reduction="none") for y in (labels, aim.mean((2, 3)).argmax(1)))
        yield (
            "student",
            {
                "ce": (1 - self.alpha) * mean(truth, mask),
                "hard": self.alpha * mean(hard, mask),
                "dense": self.dense_weight * mean(places, mask),
            },
        )


def dense_loss(student: Tensor, teacher: Tensor, share: float) -> Tensor:
    """Cross-entropy of D_s [B, C, H, W] with the first choice of share D_t + (1 - share) G_t, mean over places: [B]."""
    student, teacher = same_places(upcast(student), upcast(teacher))
    fused = share * teacher + (1 - share) * teacher.mean((2, 3), keepdim=True)
    return F.cross_entropy(student, fused.argmax(1), reduction="none").mean((1, 2))


def at_places(head: nn.Module, told: dict[str, Any]) -> Tensor:
    """A linear classifier at every place of a network's last map: [B, C, H, W]."""
    answers: Tensor = head(last_maps(told).movedim(1, -1)).movedim(-1, 1)
    return upcast(answers)
