"""The student should be right for the teacher's reasons: beside its answers, its explanations are the teacher's."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from limbeck.core.card import method, require
from limbeck.core.errors import BadInput
from limbeck.core.features import as_map, pick
from limbeck.core.loop import Clock, Turn
from limbeck.core.maths import upcast
from limbeck.core.nets import Batch, Nets
from limbeck.core.pair import Pair, parse_all
from limbeck.core.reduce import Part, mean
from limbeck.core.teachers import at_hand


@method(
    paper="Parchami-Araghi et al. 2024, eq. 1-2",
    year=2024,
    arxiv="2402.03119",
    code="m-parchami/GoodTeachersExplain@a1b7bb5:bcos/distillation_methods/TeachersExplain.py",
    differs="GradCAM alone; the weights of B-cos networks, and explanations kept from pictures before augmentation, "
    "are left out",
    exact_accumulation=True,
)
@dataclass(frozen=True)
class E2KD:
    """Other losses + weight (1 - cos(E_s, E_t)), E = ReLU(sum_k mean_places(dz_c / dF_k) F_k), resized to the picture.

    c is the teacher's first choice, z_c its logit in either network, F [B, C, H, W] a feature of each (GradCAM). The
    student's gradient goes through dz_c / dF, too, so a step takes about twice the time.

    match: other losses; none with the labels in the paper.
    weight: of the explanations, >= 0; 1, 5 and 10 in the paper.
    layer: which of the features, counted from shallow (0) or from deep (-1).
    every: explain in every so many steps only, >= 1.

    *Needs*: nets.student and nets.teacher at hand (a store has no gradients), pictures, and `feats` that are maps or
        square pictures of tokens, on the way to the logits. Best where the network still has places, before pooling.
    *Relates to*: use it with few labels or where teacher and student may learn shortcuts. `at` compares where features
        are strong, whatever they are for; `kd` is this with weight 0.
    """

    match: tuple[Any, ...] = ({"kd": {"temperature": 1.0}},)
    weight: float = 5.0
    layer: int = -1
    every: int = 1

    def __post_init__(self) -> None:
        require(self.weight >= 0, "weight", self.weight, ">= 0")
        require(self.every >= 1, "every", self.every, ">= 1")

    @cached_property
    def pair(self) -> Pair:
        """The student, its teacher, and the other losses."""
        return Pair("student", "teacher", parse_all(self.match))

    def setup(self, nets: Nets, probe: Batch) -> None:
        """Check that there are features to explain by, and build the losses that own weights."""
        at_hand(nets, "e2kd", "asks the teacher for gradients")
        if probe["inputs"].ndim != 4:
            raise BadInput(f"e2kd explains pictures [B, C, H, W], but inputs are {list(probe['inputs'].shape)}")
        self.pair.own(nets, probe)

    def step(self, nets: Nets, batch: Batch, clock: Clock) -> Iterator[Turn]:
        """One turn of the student."""
        images: Tensor = batch["inputs"].detach().requires_grad_()
        explains = clock.t % self.every == 0
        told = nets.run("teacher", {**batch, "inputs": images}, through=explains)
        classes = told["logits"].detach().argmax(-1)
        parts: dict[str, Part] = {}
        aim = self._explain(told, classes, images, again=False) if explains else None
        told = {name: _detached(value) for name, value in told.items()}  # lets go of the teacher's graph
        with sdpa_kernel(SDPBackend.MATH):  # the other kernels of attention have no second derivative
            said = nets.run("student", batch)
            if aim is not None:
                apart = 1 - F.cosine_similarity(self._explain(said, classes, images, again=True), aim)
                parts["explanation"] = self.weight * mean(apart, batch.get("mask"))
        have = {**batch, "progress": clock.progress}
        have |= {f"teacher_{name}": value for name, value in told.items()}
        have |= {f"student_{name}": value for name, value in said.items()}
        owned: Any = nets.losses if any(m.is_module for m in self.pair.matches) else {}
        for m in self.pair.matches:
            parts[m.name] = m.part(have, clock.progress, owned[m.name] if m.is_module else None)
        yield "student", parts

    def _explain(self, out: dict[str, Any], classes: Tensor, images: Tensor, *, again: bool) -> Tensor:
        """What the network looked at when it thought of `classes`, over the pixels: [B, H W]."""
        feature = out["feats"][pick("layer", out["feats"], self.layer, "network")]
        seen = grad_cam(out["logits"], feature, classes, again=again)
        size = (images.shape[-2], images.shape[-1])
        return F.interpolate(seen, size, mode="bilinear", align_corners=False).flatten(1)


def grad_cam(logits: Tensor, feature: Tensor, classes: Tensor, *, again: bool) -> Tensor:
    """ReLU of the channels of a map or of tokens, weighed by their mean slope: [B, 1, H, W].

    again: keep a graph of the slope, so that it can be learned; else the result has no gradient.
    """
    chosen = upcast(logits).gather(-1, classes.unsqueeze(-1)).sum()
    (slope,) = torch.autograd.grad(chosen, feature, create_graph=again)
    weight = upcast(as_map(slope)).mean((2, 3), keepdim=True)
    seen = F.relu((weight * upcast(as_map(feature))).sum(1, keepdim=True))
    return seen if again else seen.detach()


def _detached(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return [v.detach() for v in value]
    return value.detach() if isinstance(value, Tensor) else value
