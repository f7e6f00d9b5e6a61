"""How alike two sequences of words are: shared stretches of one to four words, and the longest common subsequence."""

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from torch import Tensor

from limbeck.core.card import require


class Overlap(NamedTuple):
    """Of found and wanted sequences together: n-grams that both have, and those of what was found, for n = 1, 2, ...;
    the words of each."""

    shared: tuple[int, ...]
    total: tuple[int, ...]
    found: int
    wanted: int


def overlap(pairs: Iterable[tuple[Sequence[int], Sequence[int]]], order: int = 4) -> Overlap:
    """Counts over all (found, wanted) pairs; an n-gram is shared at most as often as the wanted one has it."""
    shared, total, sizes = [0] * order, [0] * order, [0, 0]
    for found, wanted in pairs:
        for n in range(1, order + 1):
            mine, its = (Counter(zip(*(s[i:] for i in range(n)), strict=False)) for s in (found, wanted))
            shared[n - 1] += sum(min(count, its[gram]) for gram, count in mine.items())
            total[n - 1] += sum(mine.values())
        sizes = [sizes[0] + len(found), sizes[1] + len(wanted)]
    return Overlap(tuple(shared), tuple(total), *sizes)


def bleu(told: Overlap, *, short: bool = False) -> float:
    """exp(min(0, 1 - wanted / found)) (prod_n shared_n / total_n)^(1 / N), in [0, 1].

    The first n without a shared n-gram counts as if half a one were, the next as a quarter, and so on. short: where
    nothing found has n words, that n counts as 1; else BLEU is 0 there.
    """
    if not told.found or not any(told.shared) or (not short and 0 in told.total):
        return 0.0
    halved, logs = 1.0, 0.0
    for shared, total in zip(told.shared, told.total, strict=True):
        if total and not shared:
            halved /= 2
        logs += math.log((shared or halved) / total) if total else 0.0
    return math.exp(min(0.0, 1 - told.wanted / told.found) + logs / len(told.total))


def sentence_bleu(found: Sequence[int], wanted: Sequence[int], order: int = 4) -> float:
    """Smoothed BLEU of one sequence, in [0, 1]."""
    return bleu(overlap([(found, wanted)], order), short=True)


def common(found: Sequence[int], wanted: Sequence[int]) -> int:
    """Length of the longest common subsequence. The row of the usual table is kept as bits of one integer: a 0 where it
    grows by one (Hyyro 2004)."""
    where: dict[int, int] = {}
    for i, word in enumerate(found):
        where[word] = where.get(word, 0) | 1 << i
    full = (1 << len(found)) - 1
    row = full
    for word in wanted:
        met = row & where.get(word, 0)
        row = (row + met | row - met) & full
    return len(found) - row.bit_count()


def pairs(found: Tensor, wanted: Tensor) -> list[tuple[list[int], list[int]]]:
    """The rows of two tensors of numbered words [N, T], without their padding -1."""
    require(
        len(found) == len(wanted) > 0, "student_answers", len(found), f"as many as real_answers, {len(wanted)}, > 0"
    )
    rows = ([[int(i) for i in row if i >= 0] for row in side.tolist()] for side in (found, wanted))
    return list(zip(*rows, strict=True))
