"""DINO's way to learn without labels: what a network says of one view is predicted from another, through heads with
prototypes that are dropped afterwards; beside the MLP head one of transformer blocks, which can be asked by others."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from limbeck.core.bank import everyone
from limbeck.core.card import require
from limbeck.core.features import tokens
from limbeck.core.maths import log_probs, pair, upcast
from limbeck.core.nets import Batch, Nets

HEADS = ("mlp", "transformer")


def started(module: nn.Module) -> None:
    """Linear maps begin at a deviation of 0.02, without bias."""
    for layer in module.modules():
        if isinstance(layer, nn.Linear):
            nn.init.trunc_normal_(layer.weight, std=0.02)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)


class Prototypes(nn.Module):
    """Inner products of [..., width] with `count` learned directions of length 1: [..., count]."""

    def __init__(self, width: int, count: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(count, width))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, F.normalize(self.weight, dim=1))


class MLPHead(nn.Module):
    """DINO's head: three linear maps with GELUs between, to unit length, then prototypes: [B, width] -> [B, count]."""

    def __init__(self, width: int, inner: int, bottleneck: int, count: int) -> None:
        super().__init__()
        sizes = nn.Linear(width, inner), nn.GELU(), nn.Linear(inner, inner), nn.GELU(), nn.Linear(inner, bottleneck)
        self.layers = nn.Sequential(*sizes)
        started(self)
        self.prototypes = Prototypes(bottleneck, count)

    def forward(self, emb: Tensor) -> Tensor:
        out: Tensor = self.prototypes(F.normalize(self.layers(emb), dim=-1))
        return out


class TransformerHead(nn.Module):
    """Transformer blocks over a feature of `places`, whose mean is held against prototypes: -> [B, count].

    A feature that is not `inner` wide is brought there by one matrix first. A query [B, inner], such as another
    network's `asked`, may join the tokens; it is looked at like them, but left out of the mean.
    """

    def __init__(self, width: int, places: int, inner: int, depth: int, heads: int, count: int) -> None:
        super().__init__()
        self.enter = nn.Identity() if width == inner else nn.Linear(width, inner)
        self.blocks = nn.Sequential(
            *(
                nn.TransformerEncoderLayer(
                    inner, heads, 4 * inner, 0.0, "gelu", layer_norm_eps=1e-6, batch_first=True, norm_first=True
                )
                for _ in range(depth)
            )
        )
        started(self)
        self.norm = nn.LayerNorm(inner, eps=1e-6)
        self.places = nn.Parameter(0.02 * torch.randn(places, inner))
        self.prototypes = Prototypes(inner, count)

    def asked(self, feature: Tensor) -> Tensor:
        """The feature as a query: the mean of its tokens, [B, inner]."""
        query: Tensor = self.enter(tokens(feature)).mean(1)
        return query

    def forward(self, feature: Tensor, query: Tensor | None = None) -> Tensor:
        x = self.enter(tokens(feature)) + self.places
        if query is not None:
            x = torch.cat([query.unsqueeze(1).to(x), x], 1)
        x = self.norm(self.blocks(x))
        out: Tensor = self.prototypes(x[:, 0 if query is None else 1 :].mean(1))
        return out


@dataclass(frozen=True)
class Sizes:
    """How large heads are: their prototypes; the MLP's layers and bottleneck; the transformer's width, depth, heads."""

    prototypes: int
    hidden: int
    bottleneck: int
    width: int
    depth: int
    heads: int

    def __post_init__(self) -> None:
        for name, size in vars(self).items():
            require(size >= 1, name, size, ">= 1")
        require(self.width % self.heads == 0, "width", self.width, f"a multiple of {self.heads} heads")


class Said(NamedTuple):
    """What a network says of V views: through either head [V, B, K], and its last feature [V * B, ...]."""

    mlp: Tensor
    transformer: Tensor
    feature: Tensor


class Heads(nn.Module):
    """An MLP head on a network's `emb` and a transformer head on the last of its `feats`.

    told: what the network returns, of which the heads take their shapes.
    """

    def __init__(self, told: Mapping[str, Any], sizes: Sizes) -> None:
        super().__init__()
        (_, places, width), count = tokens(told["feats"][-1]).shape, sizes.prototypes
        self.mlp = MLPHead(told["emb"].shape[1], sizes.hidden, sizes.bottleneck, count)
        self.transformer = TransformerHead(width, places, sizes.width, sizes.depth, sizes.heads, count)

    def forward(self, told: Mapping[str, Any], views: int) -> Said:
        feature = told["feats"][-1]
        mlp, transformer = (z.unflatten(0, (views, -1)) for z in (self.mlp(told["emb"]), self.transformer(feature)))
        return Said(mlp, transformer, feature)


def said(nets: Nets, network: str, heads: nn.Module, batch: Batch, views: Sequence[Tensor]) -> Said:
    """What a network says of views [B, C, H, W] of a batch, which it sees all at once."""
    told: Said = heads(nets.run(network, batch | {"inputs": torch.cat([*views])}), len(views))
    return told


class Centres(nn.Module):
    """The average of what was said so far through either head, [K], as buffers."""

    mlp: Tensor
    transformer: Tensor

    def __init__(self, count: int) -> None:
        super().__init__()
        for name in HEADS:
            self.register_buffer(name, torch.zeros(count))

    def taken(self, said: Said, head: str) -> Tensor:
        """What was said through a head, less its centre."""
        away: Tensor = getattr(said, head) - getattr(self, head)
        return away

    @torch.no_grad()
    def update(self, said: Said, decay: float) -> None:
        """centre <- decay centre + (1 - decay) mean of what is said now, by all processes."""
        for name in HEADS:
            centre, now = getattr(self, name), everyone(upcast(getattr(said, name)).flatten(0, 1)).mean(0)
            centre.lerp_(now.to(centre.dtype), 1 - decay)


@torch.no_grad()
def search(heads: Heads, feature: Tensor, query: Tensor, small: int) -> Tensor:
    """What heads make of the first large view when small ones ask: feature [2 * B, ...] of large views, query
    [small * B, D] -> [small, B, K], without gradient."""
    first = feature[: len(query) // small]
    found: Tensor = heads.transformer(torch.cat([first] * small), query.detach()).unflatten(0, (small, -1))
    return found


def agreement(student: Tensor, teacher: Tensor, temperature: float, teacher_temperature: float) -> Tensor:
    """Cross-entropy of softmax(student / temperature) to the same of the teacher at its own: [..., K] x 2 -> [...]."""
    mine, aim = pair(student, teacher.detach())
    crossed: Tensor = (aim / teacher_temperature).softmax(-1) * log_probs(mine, temperature)
    return -crossed.sum(-1)


def across_views(student: Tensor, teacher: Tensor, temperature: float, teacher_temperature: float) -> Tensor:
    """Mean `agreement` over pairs of different views: student [V, B, K], teacher [U, B, K], U <= V -> [B].

    The first U views of the student are those of the teacher, in order; a view is not held against itself.
    """
    u, v = len(teacher), len(student)
    apart = [
        agreement(student[i], teacher[j], temperature, teacher_temperature)
        for j in range(u)
        for i in range(v)
        if i != j
    ]
    return torch.stack(apart).mean(0)


def warm(start: float, end: float, progress: float, warmup: float) -> float:
    """A temperature that goes from start to end over a share of the training, linear."""
    return end if progress >= warmup else start + (end - start) * progress / warmup
