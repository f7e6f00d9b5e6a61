"""Several small encoders of texts in the place of a large one, each for some of the domains, such as languages."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from limbeck.core.errors import BadInput
from limbeck.zoo.transformer import text_encoder


class Routed(nn.Module):
    """Gives {"logits", "emb"} of the encoder to whose group an example's `domain` belongs.

    groups: of domains, each domain 0, 1, ... in exactly one of them.
    """

    reads = ("inputs", "domain")

    route: Tensor

    def __init__(self, members: Sequence[nn.Module], groups: Sequence[Sequence[int]]) -> None:
        super().__init__()
        known = [d for group in groups for d in group]
        if sorted(known) != list(range(len(known))) or not all(groups) or len(members) != len(groups):
            raise BadInput(
                f"`groups` must hold each domain 0, 1, ... exactly once, and no group be empty, got {groups}"
            )
        self.members = nn.ModuleList(members)
        route = [next(k for k, group in enumerate(groups) if d in group) for d in range(len(known))]
        self.register_buffer("route", torch.tensor(route), persistent=False)

    def forward(self, inputs: Tensor, domain: Tensor) -> dict[str, Any]:
        """[B, T], [B] -> {"logits": [B, C], "emb": [B, D]}."""
        if int(domain.max()) >= len(self.route):
            raise BadInput(f"`domain` must be in [0, {len(self.route)}), those of `groups`, got {int(domain.max())}")
        whose = self.route[domain]
        rows = [(whose == k).nonzero()[:, 0] for k in range(len(self.members))]
        parts = [member(inputs[r]) for member, r in zip(self.members, rows, strict=True) if len(r)]
        back = torch.cat(rows).argsort()
        return {name: torch.cat([part[name] for part in parts])[back] for name in ("logits", "emb")}


def routed_encoder(
    *,
    classes: int,
    vocab: int,
    groups: list[list[int]],
    width: int = 64,
    layers: int = 2,
    heads: int = 4,
    length: int = 64,
    dropout: float = 0.1,
) -> Routed:
    """groups: of the column `domain`, an encoder for each group, such as [[0], [1, 2]]. width, layers, heads, length,
    dropout: of each encoder, as for text_encoder."""

    def member() -> nn.Module:
        return text_encoder(
            classes=classes, vocab=vocab, width=width, layers=layers, heads=heads, length=length, dropout=dropout
        )

    return Routed([member() for _ in groups], groups)
