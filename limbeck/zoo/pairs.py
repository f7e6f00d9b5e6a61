"""An encoder with several exits that reads pairs of texts, for retrieval."""

import zlib
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from limbeck.core.card import require
from limbeck.core.errors import BadInput
from limbeck.zoo.transformer import Block, real_tokens, started


class PairEncoder(nn.Module):
    """A bidirectional transformer over token ids, id 0 being padding, with a linear head on some of its layers: each
    exit embeds a text as what its head makes of the mean over real tokens.

    It reads two texts side by side, a token `separator` between them, and returns exits ([B, 2, D] an exit, shallow to
    deep) and logits [B, K, 2 D], the same in one tensor. The two do not see one another. feats are the outputs of the
    layers that have exits, of both texts on top of each other [2 B, T, D].
    """

    def __init__(
        self, vocab: int, width: int, exits: tuple[int, ...], heads: int, length: int, dim: int, separator: int
    ) -> None:
        super().__init__()
        self.exits, self.length, self.separator = exits, length, separator
        self.sizes = (vocab, width, heads, dim)
        self.embed = nn.Embedding(vocab, width, padding_idx=0)
        self.places = nn.Embedding(length, width)
        self.blocks = nn.ModuleList(Block(width, heads, False, False, False) for _ in range(exits[-1]))
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in exits)
        self.heads = nn.ModuleList(nn.Linear(width, dim) for _ in exits)
        started(self)

    def forward(self, inputs: Tensor) -> dict[str, Any]:
        first, second = apart(inputs, self.separator)
        embedded, feats = self.read(torch.cat([first, second]))
        exits = [torch.stack(e.chunk(2), 1) for e in embedded]
        return {"logits": torch.stack(exits, 1).flatten(2), "exits": exits, "feats": feats}

    def read(self, texts: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """Embeddings [B, D] of single texts [B, T], one an exit, and the outputs of those layers [B, T, D]."""
        if texts.shape[1] > self.length:
            raise BadInput(f"this encoder reads {self.length} tokens at most, got {texts.shape[1]}: raise its `length`")
        real = real_tokens(texts)
        x = self.embed(texts) + self.places(torch.arange(texts.shape[1], device=texts.device))
        share = real.unsqueeze(-1).to(x.dtype) / real.sum(1).view(-1, 1, 1)
        embedded, feats = [], []
        for depth, block in enumerate(self.blocks, 1):
            x, _ = block(x, real)
            if depth in self.exits:
                at = self.exits.index(depth)
                embedded.append(self.heads[at]((self.norms[at](x) * share).sum(1)))
                feats.append(x)
        return embedded, feats

    def cut(self, exit_: int) -> "PairEncoder":
        """The encoder up to exit number `exit_`, 1 for the first: a plain, smaller one with copies of its weights."""
        require(1 <= exit_ <= len(self.exits), "exit_", exit_, f"in [1, {len(self.exits)}]")
        vocab, width, heads, dim = self.sizes
        small = PairEncoder(vocab, width, self.exits[:exit_], heads, self.length, dim, self.separator)
        small.to(self.embed.weight)
        small.load_state_dict({k: v for k, v in self.state_dict().items() if k in small.state_dict()})
        return small.train(self.training)


def apart(inputs: Tensor, separator: int) -> tuple[Tensor, Tensor]:
    """The two texts before and after the first `separator` of each row: [B, T] -> [B, T] x 2, padded with 0 at the end,
    without the columns in which nothing is left."""
    found = inputs == separator
    if not bool(found.any(1).all()):
        row = int((~found.any(1)).nonzero()[0])
        raise BadInput(
            f"row {row} of the batch holds no token {separator} that parts its two texts: name two columns in the "
            "data's `inputs`, use `tokenizer: hash` (or tell the encoder its `separator`), and raise `length` if the "
            "first texts are longer"
        )
    at, place = found.int().argmax(1, keepdim=True), torch.arange(inputs.shape[1], device=inputs.device)
    first = torch.where(place < at, inputs, 0)
    later = at + 1 + place
    second = torch.where(later < inputs.shape[1], inputs.gather(1, later.clamp_max(inputs.shape[1] - 1)), 0)
    used = max(1, int(((first != 0) | (second != 0)).any(0).sum()))
    return first[:, :used], second[:, :used]


def pair_encoder(
    *,
    vocab: int,
    width: int = 64,
    exits: tuple[int, ...] = (2, 4, 6),
    heads: int = 4,
    length: int = 64,
    dim: int = 64,
    separator: int | None = None,
) -> PairEncoder:
    """width, heads: of the transformer. exits: after which layers it may be cut, ascending; the last is its depth.
    length: longest text. dim: of an embedding. separator: id of the token between two texts; where it is not told, that
    of "|" in `tokenizer: hash`."""
    require(width % heads == 0, "width", width, f"a multiple of {heads} heads")
    ascending = bool(exits) and exits[0] >= 1 and all(a < b for a, b in pairwise(exits))
    require(ascending, "exits", exits, "numbers of layers from 1 on, ascending")
    bar = 1 + zlib.crc32(b"|") % (vocab - 1) if separator is None else separator
    return PairEncoder(vocab, width, tuple(exits), heads, length, dim, bar)
