"""Sampling from any network that maps tokens [B, T] to next-token logits [B, T, V]."""

import torch
from torch import Tensor, nn

from limbeck.core.card import require
from limbeck.core.maths import upcast
from limbeck.core.nets import evaluating, outputs


def choose(logits: Tensor, temperature: float = 1.0) -> Tensor:
    """One class drawn from softmax(logits / temperature): [..., V] -> [...]; the likeliest at temperature 0."""
    require(temperature >= 0, "temperature", temperature, ">= 0")
    if temperature == 0:
        return logits.argmax(-1)
    probabilities = torch.softmax(upcast(logits) / temperature, -1)
    return torch.multinomial(probabilities.flatten(0, -2), 1).view(logits.shape[:-1])


@torch.no_grad()
def sample(
    module: nn.Module,
    prompts: Tensor,
    length: int,
    temperature: float = 1.0,
    *,
    lengths: Tensor | None = None,
    end: int | None = None,
) -> Tensor:
    """Continue `prompts` [B, P] by `length` tokens drawn from the network: [B, P + length].

    The network is asked in eval mode and without gradient; randomness is torch's global generator. A row with a
    shorter prompt goes on right where its own prompt stops, so that all rows end together.

    length: tokens after the longest prompt, >= 0. temperature: >= 0, where 0 takes the likeliest token.
    lengths: [B] tokens of each row that are its prompt, in [1, P]; all P when None. end: token that ends a text; what
    follows it in a row is filled with it.
    """
    rows, longest = prompts.shape
    require(length >= 0, "length", length, ">= 0")
    require(longest >= 1, "prompts", tuple(prompts.shape), "at least one token long: the network continues something")
    starts = torch.full((rows,), longest, device=prompts.device) if lengths is None else lengths.to(prompts.device)
    require(bool(((starts >= 1) & (starts <= longest)).all()), "lengths", starts.tolist(), f"in [1, {longest}]")
    tokens = torch.cat([prompts, prompts.new_zeros(rows, length)], 1)
    ended = torch.zeros(rows, dtype=torch.bool, device=prompts.device)
    with evaluating(module):
        for t in range(int(starts.min()), longest + length):
            drawn = choose(outputs(module, {"inputs": tokens[:, :t]})["logits"][:, -1], temperature)
            if end is not None:
                drawn = torch.where(ended, end, drawn)
            free = t >= starts
            tokens[:, t] = torch.where(free, drawn, tokens[:, t])
            if end is not None:
                ended |= free & (tokens[:, t] == end)
    return tokens
