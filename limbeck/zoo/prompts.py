"""Soft prompts: learned vectors before a text, through which a frozen encoder is put to a task."""

from typing import Any

import torch
from torch import Tensor, nn

from limbeck.core.card import require
from limbeck.core.errors import BadInput
from limbeck.zoo.transformer import TextEncoder, real_tokens, text_encoder

OWN = ("prompt", "body.head.weight", "body.head.bias")


class PromptedEncoder(nn.Module):
    """A text encoder with vectors of its own before the tokens of every layer, where all tokens look (Liu et al. 2021,
    2110.07602, in the place of whose keys and values stand what the layer makes of them).

    Returns logits [B, classes], tokens [B, T, D], feats (after each block, without the prompt [B, T, D]), emb [B, D],
    head and head_bias. Weights of an encoder with another head or prompt are taken but for these, which stay fresh.
    """

    def __init__(self, body: TextEncoder, prompt: int, frozen: bool) -> None:
        super().__init__()
        self.body = body
        self.prompt = nn.Parameter(0.02 * torch.randn(len(body.blocks), prompt, body.head.in_features))
        if frozen:
            body.requires_grad_(False)
            body.head.requires_grad_(True)
        self.register_load_state_dict_pre_hook(_keep_what_differs)  # type: ignore[no-untyped-call]

    def forward(self, inputs: Tensor) -> dict[str, Any]:
        body, (b, t), p = self.body, inputs.shape, self.prompt.shape[1]
        if t > body.length:
            raise BadInput(f"this encoder reads {body.length} tokens at most, got {t}: raise its `length`")
        real = real_tokens(inputs)
        seen = torch.cat([real.new_ones(b, p), real], 1)
        tokens = body.embed(inputs) + body.places(torch.arange(t, device=inputs.device))
        x, feats = body.dropout(tokens), []
        for block, prompt in zip(body.blocks, self.prompt, strict=True):
            x, _ = block(torch.cat([prompt.expand(b, -1, -1).to(x.dtype), x], 1), seen)
            x = x[:, p:]
            feats.append(x)
        return {**body.judged(x, real), "tokens": tokens, "feats": feats}


def _keep_what_differs(module: nn.Module, state: dict[str, Tensor], prefix: str, *_rest: object) -> None:
    """Put the module's own prompt or head in the place of one of another shape that is to be loaded."""
    own = module.state_dict()
    for name in OWN:
        if prefix + name in state and state[prefix + name].shape != own[name].shape:
            state[prefix + name] = own[name]


def prompted_encoder(
    *,
    classes: int,
    vocab: int,
    width: int = 64,
    layers: int = 2,
    heads: int = 4,
    length: int = 64,
    dropout: float = 0.1,
    prompt: int = 20,
    frozen: bool = True,
) -> PromptedEncoder:
    """prompt: vectors of each layer, >= 0. frozen: nothing but prompt and head learns; say false to train the encoder
    itself first. All else as in `text_encoder`."""
    require(prompt >= 0, "prompt", prompt, ">= 0")
    body = text_encoder(
        classes=classes, vocab=vocab, width=width, layers=layers, heads=heads, length=length, dropout=dropout
    )
    return PromptedEncoder(body, prompt, frozen)
