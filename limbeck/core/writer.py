"""Texts that read like others: every next word is one that stood, somewhere, after the same few words."""

import torch
from torch import Tensor


def written_like(texts: Tensor, count: int, *, order: int, pad: int = 0) -> Tensor:
    """`count` texts by the n-grams of others, drawn by torch's global generator: [N, T] -> [count, T].

    Each next word is what follows a random one of the places in `texts` that come after the same order - 1 words
    (fewer only at the start of a text, which counts as a word of its own); order 1 draws words as often as they are
    used, after a first one. A text ends where the one ends that its last word is from. pad: id after that end.
    """
    length, width = texts.shape[1], order - 1
    begun = torch.cat([texts.new_full((len(texts), width), -1), texts], 1) + 1
    there = torch.ones_like(texts, dtype=torch.bool)
    there[:, 1:] = texts[:, :-1] != pad  # the end of a text is drawn as a word is, what comes after it is not
    windows = begun.unfold(1, order, 1)[there]  # [places, order]: the last of each follows the others
    at = torch.arange(length, device=texts.device).expand_as(texts)[there]
    after, cut = windows[:, -1] - 1, at == length - 1
    group = (at > 0).long()  # what begins a text is told apart even by order 1, so that no text is empty
    for n in range(width):  # places of one group come after the same words
        group = torch.unique(group * (int(windows.max()) + 1) + windows[:, n], return_inverse=True)[1]
    sizes = torch.bincount(group)
    places, first = group.argsort(stable=True), sizes.cumsum(0) - sizes
    made = texts.new_full((count, length), pad)
    now = group[:1].expand(count)  # the first place begins a text
    going = torch.ones(count, dtype=torch.bool, device=texts.device)
    for t in range(length):
        drawn = (torch.rand(count, device=texts.device) * sizes[now]).long().clamp_max(sizes[now] - 1)
        place = places[first[now] + drawn]
        made[:, t] = torch.where(going, after[place], pad)
        going = going & (made[:, t] != pad) & ~cut[place]
        now = group[(place + 1).clamp_max(len(group) - 1)]  # the place after this one follows the word just written
    return made
