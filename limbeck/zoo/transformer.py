"""Small transformers: a language model and classifiers of pictures and texts that share one block."""

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from limbeck.core.card import require
from limbeck.core.errors import BadInput
from limbeck.core.generate import Memory, Room


def rotate(x: Tensor, start: int = 0) -> Tensor:
    """Rotary positions: pairs of features of x [B, h, T, D] turned by an angle that grows with the place, the first of
    which is `start`."""
    t, half = x.shape[-2], x.shape[-1] // 2
    speed = torch.exp(torch.arange(half, device=x.device, dtype=torch.float32) * (-math.log(10000.0) / half))
    angle = torch.arange(start, start + t, device=x.device, dtype=torch.float32)[:, None] * speed
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * cos - b * sin, a * sin + b * cos], -1)


class Attention(nn.Module):
    """Multi-head self-attention; returns its output and, when `maps` is on, what it looked at (see `TOLD`).

    real [B, T]: False where nobody may look, as at padding.
    """

    def __init__(self, width: int, heads: int, causal: bool, rotary: bool, maps: bool) -> None:
        super().__init__()
        self.heads, self.causal, self.rotary, self.maps = heads, causal, rotary, maps
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(
        self, x: Tensor, real: Tensor | None = None, room: Room | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        b, t, width = x.shape
        flat = self.qkv(x)
        q, k, v = flat.view(b, t, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        if self.rotary:
            start = 0 if room is None else room.read
            q, k = rotate(q, start), rotate(k, start)
        told: dict[str, Tensor] = {}
        if room is not None:
            mixed = _looking_back(q, *room.take(k, v))
            return self.out(mixed.transpose(1, 2).reshape(b, t, width)), told
        allowed = None if real is None else real[:, None, None]
        if self.maps:
            scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
            hidden = scores
            if self.causal:
                later = torch.ones(t, t, dtype=torch.bool, device=x.device).triu(1)
                hidden = hidden.masked_fill(later, float("-inf"))
            if allowed is not None:
                hidden = hidden.masked_fill(~allowed, float("-inf"))
            attention = hidden.softmax(-1)
            mixed = attention @ v
            queries, keys, values = flat.chunk(3, -1)
            told = dict(zip(TOLD, (attention, scores, queries, keys, values), strict=True))
        else:
            mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=allowed, is_causal=self.causal)
        return self.out(mixed.transpose(1, 2).reshape(b, t, width)), told


def _looking_back(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention of the last t of T places: q [B, h, t, D], k and v [B, h, T, D] -> [B, h, t, D]."""
    t, whole = q.shape[2], k.shape[2]
    if t == whole:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)
    earlier = torch.ones(t, whole, dtype=torch.bool, device=q.device).tril(whole - t) if t > 1 else None
    return F.scaled_dot_product_attention(q, k, v, attn_mask=earlier)


# Attention [B, h, T, T] after and before the softmax; queries, keys and values [B, T, D], heads side by side.
TOLD = ("attn", "attn_scores", "queries", "keys", "values")


class Block(nn.Module):
    """Layer norm before attention and before a four times wider GELU layer, each beside an identity."""

    def __init__(self, width: int, heads: int, causal: bool, rotary: bool, maps: bool) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attention = Attention(width, heads, causal, rotary, maps)
        self.norm2 = nn.LayerNorm(width)
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)

    def forward(
        self, x: Tensor, real: Tensor | None = None, room: Room | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        mixed, told = self.attention(self.norm1(x), real, room)
        x = x + mixed
        return x + self.down(F.gelu(self.up(self.norm2(x)))), told


def _through(
    blocks: Iterable[nn.Module], x: Tensor, real: Tensor | None = None, rooms: Sequence[Room] = ()
) -> tuple[Tensor, dict[str, list[Tensor]]]:
    """The last block's output, and by name what every block showed: feats, and `TOLD` when maps are on. rooms: of each
    block, when the text goes on."""
    seen: dict[str, list[Tensor]] = {"feats": []}
    for i, block in enumerate(blocks):
        x, told = block(x, real, rooms[i]) if rooms else block(x, real)
        seen["feats"].append(x)
        for name, value in told.items():
            seen.setdefault(name, []).append(value)
    return x, seen


def started(module: nn.Module) -> None:
    """Draw the weights of linear and embedding layers as GPT's; biases are 0."""
    for layer in module.modules():
        if isinstance(layer, (nn.Linear, nn.Embedding)):
            nn.init.normal_(layer.weight, std=0.02)
        if isinstance(layer, nn.Linear) and layer.bias is not None:
            nn.init.zeros_(layer.bias)


def real_tokens(inputs: Tensor) -> Tensor:
    """Where tokens [B, T] are no padding, which is id 0; a text of padding alone looks at all of it: attention needs a
    place."""
    real = inputs != 0
    return real | ~real.any(1, keepdim=True)


class LanguageModel(nn.Module):
    """GPT-like: each place sees itself and what came before, and its logits are of the next token. Or BERT-like, not
    causal: each place sees all of the text but padding, id 0, and its logits are of the token that stands there.

    Returns logits [B, T, V], tokens [B, T, D] before the first block, feats (after each block [B, T, D]), hidden
    [B, T, D] before the head, head and embedding [V, D], and `TOLD` when asked for. `length` is the longest text it can
    read; None with rotary positions, which have no end.
    """

    def __init__(
        self, vocab: int, width: int, layers: int, heads: int, length: int | None, tied: bool, causal: bool, maps: bool
    ) -> None:
        super().__init__()
        self.length, self.vocab, self.causal = length, vocab, causal
        self.embed = nn.Embedding(vocab, width)
        self.places = None if length is None else nn.Embedding(length, width)
        self.blocks = nn.ModuleList(Block(width, heads, causal, length is None, maps) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocab, bias=False)
        started(self)
        if tied:
            self.head.weight = self.embed.weight

    def memory(self, length: int) -> Memory | None:
        """Room for texts of up to that many tokens, so that they can be read on; None for a network that cannot."""
        can = self.causal and all(isinstance(block, Block) for block in self.blocks)
        return Memory(length, len(self.blocks)) if can else None

    def forward(self, inputs: Tensor, *, logits: bool = True, memory: Memory | None = None) -> dict[str, Any]:
        """memory: what came before the inputs, which are added to it; no gradient flows to what is in it, and what is
        returned is of the inputs alone, without `TOLD`."""
        x = self.embed(inputs)
        first = 0 if memory is None else memory.read
        if self.places is not None:
            x = x + self.places(torch.arange(first, first + inputs.shape[1], device=inputs.device))
        rooms = () if memory is None else memory.rooms
        tokens, (x, seen) = x, _through(self.blocks, x, None if self.causal else real_tokens(inputs), rooms)
        hidden = self.norm(x)
        told = {"logits": self.head(hidden)} if logits else {}
        told |= {"hidden": hidden, "head": self.head.weight, "embedding": self.embed.weight}
        return {**seen, **told, "tokens": tokens}


def tiny_lm(
    *,
    vocab: int,
    width: int = 128,
    layers: int = 4,
    heads: int = 4,
    length: int | None = None,
    tied: bool = True,
    causal: bool = True,
    attn: bool = False,
) -> LanguageModel:
    """width: of the residual stream, a multiple of 2 heads. layers, heads: of attention. length: longest text, which
    makes positions learned instead of rotary. tied: the head is the embedding. causal: false for a masked language
    model, whose data say `masked: true`. attn: also return `TOLD`."""
    require(width % (2 * heads) == 0, "width", width, f"a multiple of 2 x {heads} heads")
    return LanguageModel(vocab, width, layers, heads, length, tied, causal, attn)


class ViT(nn.Module):
    """A vision transformer (Dosovitskiy et al. 2020) without class token: the mean over patches is classified.

    Returns logits [B, classes], feats (patches after each block [B, T, D]), emb [B, D], head [classes, D], head_bias,
    and `TOLD` when asked for.
    """

    def __init__(
        self, classes: int, channels: int, size: int, patch: int, width: int, layers: int, heads: int, maps: bool
    ) -> None:
        super().__init__()
        self.patches = nn.Conv2d(channels, width, patch, patch)
        self.places = nn.Parameter(torch.empty(1, (size // patch) ** 2, width))
        self.blocks = nn.ModuleList(Block(width, heads, False, False, maps) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, classes)
        started(self)
        nn.init.normal_(self.places, std=0.02)

    def forward(self, inputs: Tensor) -> dict[str, Any]:
        x = self.patches(inputs).flatten(2).transpose(1, 2) + self.places
        x, seen = _through(self.blocks, x)
        emb = self.norm(x).mean(1)
        return {**seen, "logits": self.head(emb), "emb": emb, "head": self.head.weight, "head_bias": self.head.bias}


def vit_tiny(
    *,
    classes: int,
    channels: int,
    size: int,
    patch: int | None = None,
    width: int = 96,
    layers: int = 4,
    heads: int = 4,
    attn: bool = False,
) -> ViT:
    """patch: side of a patch in pixels, a divisor of the picture's; the smallest from 2 and an eighth up if left out.
    width, layers, heads: of the transformer. attn: also return `TOLD`."""
    patch = patch or next(p for p in range(max(2, size // 8), size + 1) if size % p == 0)
    require(size % patch == 0, "patch", patch, f"a divisor of the picture's side {size}")
    require(width % heads == 0, "width", width, f"a multiple of {heads} heads")
    return ViT(classes, channels, size, patch, width, layers, heads, attn)


class TextEncoder(nn.Module):
    """A bidirectional transformer over token ids, where id 0 is padding; the mean over real tokens is classified.

    Returns logits [B, classes], tokens [B, T, D] before the first block, feats (after each block [B, T, D]), emb [B, D]
    and head [classes, D], head_bias, and `TOLD` when asked for. One that is masked knows one more token, `mask`, and
    while `tells_words` is true its logits are of the token at each place [B, T, vocab], with `hidden` [B, T, D] before
    that head, the embedding, and without emb.
    """

    def __init__(
        self,
        classes: int,
        vocab: int,
        width: int,
        layers: int,
        heads: int,
        length: int,
        dropout: float,
        masked: bool,
        maps: bool,
    ) -> None:
        super().__init__()
        self.length = length
        self.mask = vocab if masked else None
        self.tells_words: bool | None = False if masked else None
        self.embed = nn.Embedding(vocab + masked, width, padding_idx=0)
        self.places = nn.Embedding(length, width)
        self.blocks = nn.ModuleList(Block(width, heads, False, False, maps) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(width, classes)
        started(self)

    def forward(self, inputs: Tensor) -> dict[str, Any]:
        if inputs.shape[1] > self.length:
            raise BadInput(
                f"this encoder reads {self.length} tokens at most, got {inputs.shape[1]}: raise its `length`"
            )
        real = real_tokens(inputs)
        tokens = self.embed(inputs) + self.places(torch.arange(inputs.shape[1], device=inputs.device))
        x, seen = _through(self.blocks, self.dropout(tokens), real)
        if self.tells_words:
            hidden, head = self.norm(x), self.embed.weight[:-1]
            return {**seen, "logits": hidden @ head.mT, "tokens": tokens, "hidden": hidden, "head": head}
        return {**seen, **self.judged(x, real), "tokens": tokens}

    def judged(self, x: Tensor, real: Tensor) -> dict[str, Tensor]:
        """What the head says of the last block's output [B, T, D], real [B, T]: logits, emb, head and head_bias."""
        weight = real.unsqueeze(-1).to(x.dtype)
        emb = (self.norm(x) * weight).sum(1) / weight.sum(1)
        logits = self.head(self.dropout(emb))
        return {"logits": logits, "emb": emb, "head": self.head.weight, "head_bias": self.head.bias}


def text_encoder(
    *,
    classes: int,
    vocab: int,
    width: int = 64,
    layers: int = 2,
    heads: int = 4,
    length: int = 64,
    dropout: float = 0.1,
    masked: bool = False,
    attn: bool = False,
) -> TextEncoder:
    """width, layers, heads: of the transformer. length: longest text. dropout: of the embedded tokens and before the
    head, in [0, 1). masked: it can also say which words of a text are hidden. attn: also return `TOLD`."""
    require(width % heads == 0, "width", width, f"a multiple of {heads} heads")
    return TextEncoder(classes, vocab, width, layers, heads, length, dropout, masked, attn)
