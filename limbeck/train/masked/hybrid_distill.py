"""Two teachers see the tokens that are left: one shows what a picture holds, the other where its tokens look."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from limbeck.core.card import method, require
from limbeck.core.dropping import losing, relations_at
from limbeck.core.errors import BadInput
from limbeck.core.features import per_example
from limbeck.core.loop import Clock, Stage, Turn
from limbeck.core.masked import masked_first, sides
from limbeck.core.maths import pair
from limbeck.core.nets import Batch, Nets, evaluating
from limbeck.core.pair import Pair, parse_all
from limbeck.core.project import projector
from limbeck.core.reduce import Part, mean


@method(
    paper="Shi et al. 2023, Hybrid Distill",
    year=2023,
    arxiv="2306.15876",
    differs="the repository holds no code, and layers, ratios and the measure of redundancy are ours: mean cosine "
    "similarity to all others, of the student's tokens. Both stages together take the steps that a control has for one",
)
@dataclass(frozen=True)
class HybridDistill:
    """Stage 1: alpha mean smooth |P(h_s) - LN(h_a)| + beta mean (KL(A_b || A_s) + KL(R_b || R_s)). Stage 2: `match`.

    h are the last tokens of student and teacher a (nets.teacher, supervised or contrastive), LN without weights. A is
    the attention softmax(Q K^T / sqrt(d)) and R = softmax(V V^T / sqrt(d)) of each head, of student and teacher b
    (nets.teacher_masked, a masked autoencoder), means over heads, tokens and `layers`. At each of `drops` the tokens of
    the student that are most like the rest go, from it and from both teachers alike. P goes after stage 1.

    match: losses of the second stage; with labels in the paper. alpha, beta: >= 0; 1 and 1 in the paper.
    layers: shares of the depth, in (0, 1]. drops: the same, in [0, 1); keep: share of tokens left at each, in (0, 1].
    share: of all steps that the first stage takes, in (0, 1). smooth: > 0, where |d| turns from square to straight.
    projector: P: linear or mlp.
    blocks, teacher_blocks, masked_blocks: path of each network's list of blocks.

    *Needs*: vision transformers of as many patches, which return `feats` and, for beta > 0, `attn` and `values` with as
        many heads (`attn: true` in the zoo); the teachers at hand. *Relates to*: `dmae` has one teacher, and hides
        tokens by lot. beta = 0 and no drops is plain distillation of features. *Differs*: see the card.
    """

    match: tuple[Any, ...] = ("ce",)
    alpha: float = 1.0
    beta: float = 1.0
    layers: tuple[float, ...] = (0.75,)
    drops: tuple[float, ...] = (0.25, 0.5)
    keep: float = 0.8
    share: float = 0.5
    smooth: float = 2.0
    projector: Literal["linear", "mlp"] = "linear"
    blocks: str = "blocks"
    teacher_blocks: str = "blocks"
    masked_blocks: str = "blocks"

    def __post_init__(self) -> None:
        require(self.alpha >= 0, "alpha", self.alpha, ">= 0")
        require(self.beta >= 0 and self.alpha + self.beta > 0, "beta", self.beta, ">= 0, and > 0 where alpha is 0")
        require(len(self.layers) > 0 and all(0 < d <= 1 for d in self.layers), "layers", self.layers, "each in (0, 1]")
        require(all(0 <= d < 1 for d in self.drops), "drops", self.drops, "each in [0, 1)")
        require(0 < self.keep <= 1, "keep", self.keep, "in (0, 1]")
        require(0 < self.share < 1, "share", self.share, "in (0, 1)")
        require(self.smooth > 0, "smooth", self.smooth, "> 0")
        require(self.projector in ("linear", "mlp"), "projector", self.projector, "linear or mlp")

    @cached_property
    def pair(self) -> Pair:
        """Who learns what from whom in the second stage."""
        return Pair("student", "teacher", parse_all(self.match))

    @property
    def teachers(self) -> dict[str, str]:
        """Those that are asked, with the path of their blocks."""
        known = {"teacher": self.teacher_blocks, "teacher_masked": self.masked_blocks}
        return {name: path for (name, path), w in zip(known.items(), (self.alpha, self.beta), strict=True) if w}

    def setup(self, nets: Nets, probe: Batch) -> None:
        """Check that all cut pictures alike and lose tokens alike, and build the projector."""
        cuts = {}
        for player, path in {"student": self.blocks, **self.teachers}.items():
            if player not in nets:
                raise BadInput(f"hybrid_distill asks nets.{player}, and there is none")
            cuts[player] = sides(nets, player, f"{path}.0", probe)
        if len({*cuts.values()}) > 1:
            raise BadInput(f"networks must cut a picture into as many patches, but along a side they have {cuts}")
        nets.pretext = nn.ModuleDict()
        nets.pretext.register_buffer("patches", torch.tensor(cuts["student"] ** 2))
        with torch.no_grad(), evaluating(*nets.modules.values()):
            told = self.told(nets, probe)
            if self.alpha:
                widths = [told[player]["feats"][-1].shape[2] for player in ("student", "teacher")]
                nets.pretext["projector"] = projector(self.projector, *widths)
            if self.beta:
                self.relations(told)
        nets.losses = self.pair.build(nets, probe)

    def stages(self, nets: Nets, steps: int) -> Iterator[Stage]:
        """Both teachers, then the task."""
        yield from masked_first(nets, self.share, steps)

    def told(self, nets: Nets, batch: Batch) -> dict[str, dict[str, Any]]:
        """What the student says while it loses tokens, and what teachers say who lose the same."""
        chosen: list[Tensor] = []
        told = {}
        for player, path in {"student": self.blocks, **self.teachers}.items():
            with losing(nets.find(player), path, self.drops, self.keep, int(nets.pretext.patches), chosen):
                told[player] = nets.run(player, batch)
        return told

    def relations(self, told: dict[str, dict[str, Any]]) -> Tensor:
        """How far student and masked teacher are apart in where tokens look and how their values relate: [B]."""
        for player in ("student", "teacher_masked"):
            if not {"attn", "values"} <= set(told[player]):
                raise BadInput(f"beta > 0 needs `attn` and `values` of the {player}: `attn: true` where it is built")
        return relations_at(told["student"], told["teacher_masked"], self.layers)

    def hybrid(self, nets: Nets, batch: Batch) -> dict[str, Part]:
        """The losses of the first stage."""
        told, parts, mask = self.told(nets, batch), dict[str, Part](), batch.get("mask")
        if self.alpha:
            mine = nets.pretext["projector"](told["student"]["feats"][-1])
            parts["features"] = self.alpha * mean(features_apart(mine, told["teacher"]["feats"][-1], self.smooth), mask)
        if self.beta:
            parts["relations"] = self.beta * mean(self.relations(told), mask)
        return parts

    def step(self, nets: Nets, batch: Batch, clock: Clock) -> Iterator[Turn]:
        """One turn of the student."""
        yield "student", self.pair.parts(nets, batch, clock.progress) if clock.stage else self.hybrid(nets, batch)


def features_apart(student: Tensor, teacher: Tensor, smooth: float) -> Tensor:
    """Mean smooth difference of tokens [B, T, D] from the teacher's, brought to mean 0 and deviation 1 each: [B].

    Where one side has a class token more, it is left out.
    """
    mine, aim = pair(student, teacher.detach())
    tokens = min(mine.shape[1], aim.shape[1])
    mine, aim = mine[:, -tokens:], F.layer_norm(aim[:, -tokens:], aim.shape[2:])
    return per_example(F.smooth_l1_loss(mine, aim, reduction="none", beta=smooth))
