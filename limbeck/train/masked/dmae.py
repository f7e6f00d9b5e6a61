"""Teacher and student see the same few patches; the student tells the other pixels, and what the teacher feels."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from limbeck.core.card import method, require
from limbeck.core.errors import BadInput
from limbeck.core.features import per_example
from limbeck.core.loop import Clock, Stage, Turn
from limbeck.core.masked import Decoder, check_decoder, draw, masked_first, only, patchify, sides, unseen
from limbeck.core.maths import pair
from limbeck.core.nets import Batch, Nets, evaluating
from limbeck.core.pair import Pair, parse_all
from limbeck.core.project import projector
from limbeck.core.reduce import Part, mean


@method(
    paper="Bai et al. 2022, section 3",
    year=2022,
    arxiv="2208.12256",
    code="UCSC-VLAA/DMAE@a0f4959:models_mae_distill.py",
    differs="the decoder has learned places and a layer norm of its own before it, and is smaller by default; both "
    "stages together take the steps that a control has for one",
)
@dataclass(frozen=True)
class DMAE:
    """Stage 1: mean (D(h) - x)^2 over hidden patches + weight mean |norm(h_t) - norm(P(h_s))|. Stage 2: `match`.

    One draw of visible patches serves both networks, and nothing hidden enters either. D, a small transformer, tells
    the pixels x of hidden patches from the student's last feature; h_s and h_t are features at the same share of the
    depth, norm(v) = v / |v| over channels of a token, class token included. D and P are dropped after stage 1.

    match: losses of the second stage; the paper's is cross-entropy with labels.
    weight: of the features, >= 0; 0 is a masked autoencoder by itself, which asks no teacher.
    hidden: share of hidden patches, in (0, 1); 0.75, up to 0.98 with a teacher.
    share: of all steps that the first stage takes, in (0, 1).
    depth: where along their `feats` the networks are compared, in (0, 1].
    projector: P: linear or mlp.
    decoder_width, decoder_depth, decoder_heads: of D, >= 1; the paper's are 512, 8 and 16.
    entry, teacher_entry: path of the first block of either network.

    *Needs*: vision transformers with the same number of patches, which return `feats` of tokens; a teacher at hand, in
        the paper one that was a masked autoencoder itself.
    *Relates to*: use it where pictures are many and labels few. With `kd` in `match` the teacher speaks in both stages.
    """

    match: tuple[Any, ...] = ("ce",)
    weight: float = 1.0
    hidden: float = 0.75
    share: float = 0.5
    depth: float = 0.75
    projector: Literal["linear", "mlp"] = "linear"
    decoder_width: int = 64
    decoder_depth: int = 1
    decoder_heads: int = 4
    entry: str = "blocks.0"
    teacher_entry: str = "blocks.0"

    def __post_init__(self) -> None:
        require(self.weight >= 0, "weight", self.weight, ">= 0")
        require(0 < self.hidden < 1, "hidden", self.hidden, "in (0, 1)")
        require(0 < self.share < 1, "share", self.share, "in (0, 1)")
        require(0 < self.depth <= 1, "depth", self.depth, "in (0, 1]")
        require(self.projector in ("linear", "mlp"), "projector", self.projector, "linear or mlp")
        check_decoder(self.decoder_width, self.decoder_depth, self.decoder_heads)

    @cached_property
    def pair(self) -> Pair:
        """Who learns what from whom in the second stage."""
        return Pair("student", "teacher", parse_all(self.match))

    def setup(self, nets: Nets, probe: Batch) -> None:
        """Check how the networks cut pictures, and build decoder and projector."""
        side = sides(nets, "student", self.entry, probe)
        with torch.no_grad(), evaluating(*nets.modules.values()):
            student = nets.run("student", probe)["feats"]
            teacher = nets.run("teacher", probe)["feats"] if self.weight else []
        width, out = student[-1].shape[2], patchify(probe["inputs"], side).shape[2]
        sizes = {"inner": self.decoder_width, "depth": self.decoder_depth, "heads": self.decoder_heads}
        nets.pretext = nn.ModuleDict({"decoder": Decoder(width, side**2, out, **sizes)})
        if self.weight:
            other = sides(nets, "teacher", self.teacher_entry, probe)
            if other != side:
                raise BadInput(
                    f"the student cuts a picture into {side} x {side} patches, the teacher {other} x {other}"
                )
            ends = self.at_depth(student).shape[2], self.at_depth(teacher).shape[2]
            nets.pretext["projector"] = projector(self.projector, *ends)
        nets.losses = self.pair.build(nets, probe)

    def stages(self, nets: Nets, steps: int) -> Iterator[Stage]:
        """Masked pictures, then whole ones."""
        yield from masked_first(nets, self.share, steps)

    def at_depth(self, feats: list[Tensor]) -> Tensor:
        """The feature at the chosen share of the depth."""
        return feats[max(0, round(self.depth * len(feats)) - 1)]

    def masked(self, nets: Nets, batch: Batch) -> dict[str, Part]:
        """The losses of the first stage."""
        pictures, mask, decoder = batch["inputs"], batch.get("mask"), nets.pretext["decoder"]
        patches = len(decoder.places)
        kept = min(patches - 1, max(1, int(patches * (1 - self.hidden))))
        shown = draw(len(pictures), patches, kept, pictures.device)
        teacher: list[Tensor] = []
        if self.weight:
            with only(nets.teacher, self.teacher_entry, shown, patches):
                teacher = nets.run("teacher", batch)["feats"]
        with only(nets.student, self.entry, shown, patches):
            student = nets.run("student", batch)["feats"]
        pixels = patchify(pictures, math.isqrt(patches))
        parts = {"pixels": mean(unseen(decoder(student[-1], shown), pixels, shown), mask)}
        if self.weight:
            mine, aim = nets.pretext["projector"](self.at_depth(student)), self.at_depth(teacher)
            parts["features"] = self.weight * mean(apart(mine, aim), mask)
        return parts

    def step(self, nets: Nets, batch: Batch, clock: Clock) -> Iterator[Turn]:
        """One turn of the student."""
        yield "student", self.pair.parts(nets, batch, clock.progress) if clock.stage else self.masked(nets, batch)


def apart(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean absolute difference of tokens [B, T, D] as unit vectors: [B]."""
    mine, aim = (F.normalize(x, dim=-1) for x in pair(student, teacher.detach()))
    return per_example((mine - aim).abs())
