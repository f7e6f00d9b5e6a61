"""A convolutional student is led into a transformer's two spaces: its attention, and the features of its places."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from limbeck.core.adapt import reverse_gradient
from limbeck.core.card import method, require
from limbeck.core.features import Shape, as_map, per_example, pick, tokens, width
from limbeck.core.heads import split
from limbeck.core.maths import gram, pair


@method(
    paper="Liu et al. 2022, eq. 3-8",
    year=2022,
    arxiv="2207.05273",
    differs="means of squares for squared norms, head by head as the teacher attends; student and discriminator move "
    "in one step, by a reversed gradient, not in turns; the views are the recipe's augmentation; weights, which are "
    "not given, are knobs",
    row="cross_arch_pca_gl",
    exceptions={
        "batch order": "which entries are the teacher's is drawn anew for each example, in the order of the batch",
        "gradcheck": "the student's gradient of the discriminator's loss is reversed on purpose",
    },
)
class PCAGL(nn.Module):
    """w_a (|A_t - A_s|^2 + |V_t V_t^T - V_s V_s^T|^2 / d) + w_f |h_t - G(h_s)|^2 + adversary's loss.  lists -> [B]

    A_t = softmax(Q K^T / sqrt(d)) V of the teacher. Q_s, K_s, V_s are three 3x3 convolutions of the student's map; A_s
    is their attention after each entry has been replaced by the teacher's with probability `replaced`. G has a matrix
    for each of blocks x blocks parts of the picture. A discriminator D tells h_t from G(h_s): it goes down and the
    student goes up on -log D(h_t) - log(1 - D(G(h_s))). The student's map is averaged to the teacher's places.

    attention_weight: w_a >= 0. feature_weight: w_f >= 0. adversarial_weight: of the last term, >= 0.
    replaced: in [0, 1]; at 1 only the values' relation is left of the first term. blocks: along a side, >= 1.
    dropout: before G, in [0, 1). layer: of the lists, counted from shallow (0) or from deep (-1).

    *Needs*: `queries`, `keys`, `values`, `attn` and `feats` of a transformer teacher (`attn: true` in the zoo); `feats`
        of the student that are maps, or tokens that make a square picture.
    *Relates to*: weight 0.03 to 1 beside `ce` and `kd`, with strong augmentation. `ofa_kd` crosses architectures by
        logits, `dual_view` by cross-attention.
    """

    def __init__(
        self,
        student_feats: list[Shape],
        teacher_feats: list[Shape],
        teacher_queries: list[Shape],
        teacher_keys: list[Shape],
        teacher_values: list[Shape],
        teacher_attn: list[Shape],
        *,
        attention_weight: float = 1.0,
        feature_weight: float = 1.0,
        adversarial_weight: float = 0.1,
        replaced: float = 0.5,
        blocks: int = 4,
        dropout: float = 0.1,
        layer: int = -1,
    ) -> None:
        super().__init__()
        weights = (attention_weight, feature_weight, adversarial_weight)
        require(min(weights) >= 0, "attention_weight, feature_weight, adversarial_weight", weights, ">= 0")
        require(0 <= replaced <= 1, "replaced", replaced, "in [0, 1]")
        require(blocks >= 1, "blocks", blocks, ">= 1")
        require(0 <= dropout < 1, "dropout", dropout, "in [0, 1)")
        self.attention_weight, self.feature_weight = attention_weight, feature_weight
        self.adversarial_weight, self.replaced, self.blocks = adversarial_weight, replaced, blocks
        self.dropout, self.layer = dropout, layer
        mine = width(student_feats[pick("layer", student_feats, layer, "student")])
        aim = width(teacher_feats[pick("layer", teacher_feats, layer, "teacher")])
        wide = [s[pick("layer", s, layer, "teacher")][-1] for s in (teacher_queries, teacher_keys, teacher_values)]
        self.convolutions = nn.ModuleList(nn.Conv2d(mine, d, 3, padding=1) for d in wide)
        self.parts = nn.Parameter(torch.empty(blocks * blocks, mine, aim))
        nn.init.uniform_(self.parts, -(mine**-0.5), mine**-0.5)
        self.discriminator = nn.Sequential(nn.Linear(aim, aim), nn.ReLU(), nn.Linear(aim, 1))

    def forward(
        self,
        student_feats: list[Tensor],
        teacher_feats: list[Tensor],
        teacher_queries: list[Tensor],
        teacher_keys: list[Tensor],
        teacher_values: list[Tensor],
        teacher_attn: list[Tensor],
    ) -> Tensor:
        """Per example."""
        layer, heads = self.layer, teacher_attn[self.layer].shape[1]
        feature = as_map(student_feats[layer]).to(self.parts.dtype)
        aims = [x[layer].detach() for x in (teacher_queries, teacher_keys, teacher_values)]
        with torch.autocast(feature.device.type, enabled=False):
            looks = self._attention(feature, aims, heads)
            return self.attention_weight * looks + self._places(feature, teacher_feats[layer].detach())

    def _attention(self, feature: Tensor, aims: list[Tensor], heads: int) -> Tensor:
        mine = [_places_as(conv(feature), aim) for conv, aim in zip(self.convolutions, aims, strict=True)]
        aims = [aim.to(own) for own, aim in zip(mine, aims, strict=True)]
        mixed = [torch.where(_chance(own) < self.replaced, aim, own) for own, aim in zip(mine, aims, strict=True)]
        looks = per_example((_attend(aims, heads) - _attend(mixed, heads)).square())
        own, aim = split(mine[2], heads), split(aims[2], heads)
        return looks + per_example((gram(own) - gram(aim)).square()) / own.shape[-1]

    def _places(self, feature: Tensor, target: Tensor) -> Tensor:
        own = _places_as(feature, target)
        if self.training and self.dropout > 0:
            own = torch.where(_chance(own) < self.dropout, 0.0, own / (1 - self.dropout))
        guess = torch.einsum("btc,tcd->btd", own, self.parts[self._part(target)])
        guess, aim = pair(guess, tokens(target))
        true, false = self.discriminator(aim.to(guess)), self.discriminator(reverse_gradient(guess))
        judged = per_example(F.softplus(-true) + F.softplus(false))
        return self.feature_weight * per_example((guess - aim).square()) + self.adversarial_weight * judged

    def _part(self, target: Tensor) -> Tensor:
        """Which part of the picture each place of a feature lies in [T]."""
        n, size = self.blocks, _size(target)
        if size is None:
            places = tokens(target).shape[1]
            return torch.arange(places, device=target.device) * (n * n) // places
        row, column = (torch.arange(s, device=target.device) * n // s for s in size)
        return (row.unsqueeze(1) * n + column).flatten()


def _attend(qkv: list[Tensor], heads: int) -> Tensor:
    q, k, v = (split(x, heads) for x in qkv)
    out: Tensor = (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1) @ v
    return out


def _places_as(feature: Tensor, target: Tensor) -> Tensor:
    """A map averaged to the places of a target, as tokens [B, T, C]; to a row of them when they make no picture."""
    size = _size(target)
    if size is None:
        return F.adaptive_avg_pool1d(feature.flatten(2), tokens(target).shape[1]).mT
    return tokens(F.adaptive_avg_pool2d(feature, size))


def _size(target: Tensor) -> tuple[int, int] | None:
    side = math.isqrt(tokens(target).shape[1])
    if target.ndim == 4:
        return target.shape[2], target.shape[3]
    return (side, side) if side * side == tokens(target).shape[1] else None


def _chance(like: Tensor) -> Tensor:
    """Uniform numbers in [0, 1), the same ones whatever the precision."""
    return torch.rand(like.shape, dtype=torch.float32, device=like.device)
