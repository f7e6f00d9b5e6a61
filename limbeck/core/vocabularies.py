"""Probabilities over two vocabularies: of a stretch of text, word by word where both know it, or by rank alone."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from limbeck.core.maths import label_logprobs, upcast
from limbeck.core.spans import edges, sums


def stretch_logprobs(logits: Tensor, labels: Tensor, spans: Tensor, stretches: int) -> Tensor:
    """Log-probability of the text of each stretch, in the tokens that it is written in: -> [B, stretches].

    logits [B, T, V], labels and spans [B, T]. A stretch without places has 0.
    """
    return sums(label_logprobs(logits, labels), spans, stretches)


def chained(logits: Tensor, labels: Tensor, spans: Tensor, stretches: int, least: float = 1e-8) -> Tensor:
    """Probability of each stretch with every word in the place of its last token: [B, T, V] -> [B, stretches, V].

    By the chain rule: the probabilities at its last place times those of its earlier tokens, each at least `least`.
    """
    logits = upcast(logits)
    _, last = edges(spans, stretches)
    at_last = logits.gather(1, last.unsqueeze(-1).expand(-1, -1, logits.shape[-1])).log_softmax(-1)
    said = label_logprobs(logits, labels).clamp_min(math.log(least))
    places = torch.arange(spans.shape[1], device=spans.device)
    earlier = places < last.gather(1, spans.clamp(0, stretches - 1))
    return (at_last + sums(said * earlier, spans, stretches).unsqueeze(-1)).exp()


def ranked_distance(p: Tensor, q: Tensor) -> Tensor:
    """sum |p_(i) - q_(i)| over ranks i, the largest first, the shorter filled up with 0: [..., V], [..., W] -> [...].

    In [0, 2] for probabilities; whose they are does not matter.
    """
    p, q = p.sort(-1, descending=True).values, q.sort(-1, descending=True).values
    lacking = q.shape[-1] - p.shape[-1]
    return (F.pad(p, (0, max(0, lacking))) - F.pad(q, (0, max(0, -lacking)))).abs().sum(-1)


def real_words(student_logits: Tensor, teacher_logits: Tensor, words: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Logits of the words that both heads of one family have, and what is dropped with the others.

    Heads of one tokenizer are often padded to different heights (151,936 and 152,064 rows for 151,665 words): ids
    below `words` are the same words in both, those above are nobody's. [..., V], [..., W] -> [..., words] x 2, and
    the probability that each put above, [...] x 2 without gradient.
    """
    least = min(student_logits.shape[-1], teacher_logits.shape[-1])
    if not 0 < words <= least:
        raise ValueError(f"`words` must be in [1, {least}], the words that both heads have, got {words}")
    dropped = [_mass_above(x, words) for x in (student_logits, teacher_logits)]
    return student_logits[..., :words], teacher_logits[..., :words], dropped[0], dropped[1]


def of_words(logits: Tensor, words: Tensor | None) -> Tensor:
    """Logits [..., V] without the rows that fill up a head: of the ids that its tokenizer has; all for None."""
    return logits if words is None else logits[..., : int(words)]


def shared_words(mine: int, its: int, words: Tensor | None) -> int | None:
    """How many words two heads of so many rows share, where one tokenizer is padded to two heights; else None."""
    return None if words is None or mine == its or int(words) > min(mine, its) else int(words)


def _mass_above(logits: Tensor, words: int) -> Tensor:
    z = upcast(logits.detach())
    if words == z.shape[-1]:
        return torch.zeros_like(z[..., 0])
    return (z[..., words:].logsumexp(-1) - z.logsumexp(-1)).exp()
