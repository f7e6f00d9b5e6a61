"""A small language model whose layers hold several experts each, of which every place uses a few."""

from typing import Any

from torch import Tensor, nn

from limbeck.core.routing import Experts
from limbeck.zoo.transformer import LanguageModel, started, tiny_lm


class MixtureBlock(nn.Module):
    """A transformer block with its norms and its attention as they are, and experts in the place of its GELU layer."""

    def __init__(self, block: Any, experts: Experts) -> None:
        super().__init__()
        self.norm1, self.attention, self.norm2, self.experts = block.norm1, block.attention, block.norm2, experts

    def forward(self, x: Tensor, real: Tensor | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        mixed, told = self.attention(self.norm1(x), real)
        x = x + mixed
        return x + self.experts(self.norm2(x)), told


def tiny_moe_lm(
    *,
    vocab: int,
    width: int = 128,
    layers: int = 4,
    heads: int = 4,
    length: int | None = None,
    tied: bool = True,
    attn: bool = False,
    experts: int = 8,
    top: int = 2,
    hidden: int | None = None,
    balance: float = 0.001,
) -> LanguageModel:
    """experts: of each layer, >= 2. top: how many of them a place uses. hidden: width of an expert; twice that of the
    residual stream if left out. balance: how fast the load is evened out in training, >= 0, see `core.routing.Router`;
    0 leaves it alone. All else as in `tiny_lm`."""
    model = tiny_lm(vocab=vocab, width=width, layers=layers, heads=heads, length=length, tied=tied, attn=attn)
    for i, block in enumerate(model.blocks):
        mixture = Experts(width, hidden or 2 * width, experts, top, balance)
        started(mixture)
        model.blocks[i] = MixtureBlock(block, mixture)
    return model
