"""Noise on what a network reads: words of a prompt that are lost, moved or exchanged, and dropout that stays on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd

from limbeck.core.errors import BadInput
from limbeck.core.nets import Batch
from limbeck.core.policy import starts
from limbeck.core.taps import unwrap


@dataclass(frozen=True)
class WordNoise:
    """What happens to the words of a prompt, each example by itself; the rest of a text stays as it is.

    drop: chance that a word is lost, in [0, 1). shuffle: no sentence goes more than that many places forward or back,
    >= 0. replace: chance, in [0, 1], that a word is exchanged for one of its `neighbours` >= 1 nearest. ends: ids that
    end a sentence. special: ids that are no words: they stay where they are, and nothing becomes one.
    """

    drop: float = 0.0
    shuffle: int = 0
    replace: float = 0.0
    neighbours: int = 1
    ends: tuple[int, ...] = ()
    special: tuple[int, ...] = ()

    def on(self, batch: Batch, embedding: Tensor | None, prompt: int = 1) -> tuple[Batch, Tensor]:
        """The batch with other prompts, and by how many places each text's completion came forward: [B].

        Labels and mask stay where they were: `put_back` brings what a network says to them. embedding: [V, D], by whose
        inner products words are neighbours; asked for by `replace` alone. prompt: as in `policy.starts`.
        """
        if "segments" in batch:
            raise BadInput("prompts cannot be changed where several texts share a row; leave `pack` out of the data")
        words, begun = batch["inputs"], starts(batch, prompt)[:, None]
        place = torch.arange(words.shape[1], device=words.device)
        ends = torch.isin(words, words.new_tensor(self.ends)).long()  # of the words as they were written
        if self.replace:
            if embedding is None:
                raise BadInput("exchanging words for their neighbours needs a network that returns its `embedding`")
            hit = self._free(words, place, begun) & (torch.rand(words.shape, device=words.device) < self.replace)
            words = words.masked_scatter(hit, neighbour(words[hit], embedding, self.neighbours, self.special))
        moved = torch.zeros_like(begun)
        if self.drop:
            lost = self._free(words, place, begun) & (torch.rand(words.shape, device=words.device) < self.drop)
            words, ends, moved = closed_up(words, lost), closed_up(ends, lost), lost.sum(1, keepdim=True)
        if self.shuffle and self.ends:
            free = self._free(words, place, begun - moved)
            last = ends.bool() & free
            jitter = (self.shuffle + 1) * torch.rand(words.shape, device=words.device)
            words = in_order(words, free, last.cumsum(1) - last.long(), jitter)
        new = {**batch, "inputs": words}
        if "attention_mask" in batch:
            real = batch["attention_mask"]
            there = place + moved
            new["attention_mask"] = torch.where(
                there < real.shape[1], real.gather(1, there.clamp_max(real.shape[1] - 1)), torch.zeros_like(real)
            )
        return new, moved[:, 0]

    def _free(self, words: Tensor, place: Tensor, begun: Tensor) -> Tensor:
        """Words of a prompt [B, T]; its last token, which a completion begins after, is none of them."""
        return (place < begun - 1) & ~torch.isin(words, words.new_tensor(self.special))


def closed_up(words: Tensor, lost: Tensor) -> Tensor:
    """Without the lost ones, the rest in order, padded with 0 at the end: [B, T] x 2 -> [B, T]."""
    order = lost.long().argsort(dim=1, stable=True)
    kept = ~lost.gather(1, order)
    return torch.where(kept, words.gather(1, order), 0)


def in_order(words: Tensor, free: Tensor, number: Tensor, jitter: Tensor) -> Tensor:
    """The free words [B, T] sorted by the place of their sentence and its jitter; others stay where they are.

    number: which sentence a word is in, counted from 0, [B, T]; jitter [B, S], one for each sentence: below k + 1, no
    sentence goes more than k places away.
    """
    key = number.to(jitter.dtype) + jitter.gather(1, number)
    now = torch.where(free, key, torch.inf).argsort(dim=1, stable=True)
    slots = (~free).long().argsort(dim=1, stable=True)
    return words.scatter(1, slots, words.gather(1, now))


def neighbour(words: Tensor, embedding: Tensor, count: int, special: Sequence[int] = ()) -> Tensor:
    """For each word one of the `count` others of the largest inner product with it, at random: [N] -> [N]."""
    rows, back = words.unique(return_inverse=True)
    alike = embedding[rows].detach() @ embedding.detach().T
    alike[torch.arange(len(rows), device=rows.device), rows] = -torch.inf
    alike[:, list(special)] = -torch.inf
    near = alike.topk(min(count, alike.shape[1] - 1 - len(special)), -1).indices
    chosen = torch.randint(near.shape[1], words.shape, device=words.device)
    return near[back, chosen]


def put_back(said: Tensor, moved: Tensor) -> Tensor:
    """What a network says of a text whose completion came `moved` [B] places forward, where it was: [B, T, V]."""
    place = torch.arange(said.shape[1], device=said.device) - moved[:, None]
    return said.gather(1, place.clamp_min(0).unsqueeze(-1).expand_as(said))


@contextmanager
def dropping(module: nn.Module, chance: float) -> Iterator[None]:
    """Inside, a network in any mode drops features with that chance; afterwards it is as it was.

    By its own dropout layers. Without any: what its token embeddings give, and its linear layers that give as many
    features, which are those that add to a transformer's stream.
    """
    layers = list(unwrap(module).modules())
    own = [(layer, layer.training, layer.p) for layer in layers if isinstance(layer, _DropoutNd)]
    handles = []
    if chance and not own:
        tables = [layer for layer in layers if isinstance(layer, nn.Embedding)]
        widths = {layer.embedding_dim for layer in tables}
        writers = [layer for layer in layers if isinstance(layer, nn.Linear) and layer.out_features in widths]
        if not tables:
            raise BadInput(f"{type(unwrap(module)).__name__} has neither dropout nor token embeddings to drop from")

        def hook(_layer: nn.Module, _inputs: Any, output: Tensor) -> Tensor:
            return F.dropout(output, chance)

        handles = [layer.register_forward_hook(hook) for layer in [*tables, *writers]]
    try:
        for layer, _, _ in own:
            layer.training, layer.p = chance > 0, chance
        yield
    finally:
        for layer, mode, rate in own:
            layer.training, layer.p = mode, rate
        for handle in handles:
            handle.remove()
