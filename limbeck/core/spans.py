"""Two tokenisations of one text: the stretches that both of them cover, and what losses make of such stretches.

A stretch runs from one place in the text where both have a boundary to the next; where boundaries differ it holds
several tokens, of one side or of both. Places in the text are counted in bytes.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import astuple, dataclass
from itertools import pairwise

import torch
from torch import Tensor

Span = tuple[int, int]


@dataclass(frozen=True)
class Counts:
    """What was aligned, added up over texts.

    stretches: all of them. single: those of one token on each side. student_tokens, teacher_tokens: tokens that are to
    be predicted. student_aligned, teacher_aligned: those of them in a stretch. size: bytes that the student is to
    predict. aligned_size: bytes in stretches.
    """

    stretches: int = 0
    single: int = 0
    student_tokens: int = 0
    student_aligned: int = 0
    teacher_tokens: int = 0
    teacher_aligned: int = 0
    size: int = 0
    aligned_size: int = 0

    def __add__(self, other: Counts) -> Counts:
        return Counts(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))

    @property
    def merged(self) -> int:
        """Stretches of several tokens on either side."""
        return self.stretches - self.single


def align(student: Sequence[Span], teacher: Sequence[Span]) -> tuple[list[int], list[int], Counts]:
    """The number of the stretch that each token lies in, for both sides; -1 for none.

    student, teacher: where each token begins and ends in the text, in order and without overlaps; there may be gaps,
    and a token that stands for no text begins where it ends. A stretch is the shortest part between two boundaries that
    both sides have, and that both cover without a gap.
    """
    edges = [{edge for span in side if span[0] < span[1] for edge in span} for side in (student, teacher)]
    cuts = sorted(edges[0] & edges[1])
    places, covered = zip(*(_between(cuts, side) for side in (student, teacher)), strict=True)
    numbers, sizes = [-1] * (len(cuts) + 1), list[int]()
    for k, (a, b) in enumerate(pairwise(cuts)):
        if covered[0][k] == covered[1][k] == b - a:
            numbers[k] = len(sizes)
            sizes.append(b - a)
    mine, theirs = ([numbers[k] for k in side] for side in places)
    held = [_tally(side, len(sizes)) for side in (mine, theirs)]
    counts = Counts(
        len(sizes),
        sum(a == b == 1 for a, b in zip(*held, strict=True)),
        len(mine),
        sum(held[0]),
        len(theirs),
        sum(held[1]),
        sum(b - a for a, b in student),
        sum(sizes),
    )
    return mine, theirs, counts


def _between(cuts: list[int], side: Sequence[Span]) -> tuple[list[int], list[int]]:
    """The part between two cuts that each token lies in, -1 for none; and how many bytes of each part are covered."""
    places, covered = [], [0] * (len(cuts) + 1)
    for start, end in side:
        k = bisect_right(cuts, start) - 1 if start < end else -1
        places.append(k if 0 <= k < len(cuts) - 1 else -1)
        covered[places[-1]] += end - start
    return places, covered


def _tally(numbers: list[int], size: int) -> list[int]:
    held = [0] * (size + 1)
    for number in numbers:
        held[number] += 1
    return held[:size]


# ---- tensors: values at places become values of stretches, and the reverse -------------------------------------------
def sums(values: Tensor, spans: Tensor, stretches: int) -> Tensor:
    """Sum over the places of each stretch: values [B, T, ...], spans [B, T] -> [B, stretches, ...].

    Places at -1 or in a stretch beyond the last one asked for do not count; a stretch without places gets 0.
    """
    out = values.new_zeros(len(values), stretches + 1, *values.shape[2:])
    where = _where(spans, stretches).view(*spans.shape, *[1] * (values.ndim - 2)).expand_as(values)
    return out.scatter_add(1, where, values)[:, :stretches]


def edges(spans: Tensor, stretches: int) -> tuple[Tensor, Tensor]:
    """First and last place of each stretch: [B, T] -> [B, stretches] twice; 0 where there is no such stretch."""
    places, where = torch.arange(spans.shape[1], device=spans.device).expand_as(spans), _where(spans, stretches)
    out = spans.new_zeros(len(spans), stretches + 1)
    first, last = (
        out.scatter_reduce(1, where, places, how, include_self=False)[:, :stretches] for how in ("amin", "amax")
    )
    return first, last


def counted(
    student_spans: Tensor, teacher_spans: Tensor, mask: Tensor | None = None, teacher_mask: Tensor | None = None
) -> Tensor:
    """Stretches that both sides have, with no masked place: [B, T], [B, U] -> bool [B, T], as many as places.

    mask [B, T] or [B], teacher_mask [B, U]: True where the place, or the example, counts.
    """
    stretches = student_spans.shape[1]
    held = [_whole(spans, m, stretches) for spans, m in ((student_spans, mask), (teacher_spans, teacher_mask))]
    return held[0] & held[1]


def on_places(mask: Tensor | None, spans: Tensor) -> Tensor:
    """A mask of places [B, T] or of examples [B], or none at all, as one of the places of `spans` [B, T]."""
    if mask is None:
        return torch.ones_like(spans, dtype=torch.bool)
    return mask.bool().view(len(spans), -1).expand_as(spans)


def spread(values: Tensor, spans: Tensor) -> Tensor:
    """Every stretch's value in equal parts over its places: [B, stretches], [B, T] -> [B, T]; 0 at places without."""
    size = sums(torch.ones_like(spans, dtype=values.dtype), spans, values.shape[1]).clamp_min(1)
    shares = torch.cat([values / size, values.new_zeros(len(values), 1)], 1)
    return shares.gather(1, _where(spans, values.shape[1]))


def joined(spans: Tensor, closed: Tensor) -> Tensor:
    """Spans [B, T] with every stretch that is not closed [B, stretches] as one with the next, numbered anew."""
    number = closed.long().cumsum(1) - closed.long()
    return torch.where(spans < 0, -1, number.gather(1, spans.clamp(0, closed.shape[1] - 1)))


def _whole(spans: Tensor, mask: Tensor | None, stretches: int) -> Tensor:
    ones = torch.ones_like(spans)
    there = sums(ones, spans, stretches)
    return (there > 0) & (sums(ones * on_places(mask, spans), spans, stretches) == there)


def _where(spans: Tensor, stretches: int) -> Tensor:
    return torch.where((spans < 0) | (spans >= stretches), stretches, spans)
