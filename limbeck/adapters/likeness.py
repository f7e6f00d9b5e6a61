"""Which words of two vocabularies are alike: the nearest word by edit distance, and words as mixtures of others."""

from __future__ import annotations

from collections import defaultdict

import torch
from torch import Tensor

from limbeck.adapters.pieces import Pieces

MOST = 64  # words that one is compared with, the nearest in length of those that begin alike
KEPT = 4  # words of the teacher that a word of the student is spread over
DECAY = 0.1  # what each further piece of a word weighs, against the one before it


def nearest_words(student: Pieces, teacher: Pieces) -> Tensor:
    """For each id of the teacher the student's id of least edit distance, -1 where there is none: [W].

    Equal bytes come first. Else spaces at the ends do not count, and the word is looked for among those with the same
    first three bytes, or two, or one; of equally near ones the shortest, then the first.
    """
    mine = student.ids()
    begins: dict[bytes, list[tuple[bytes, int]]] = defaultdict(list)
    for piece, i in mine.items():
        if core := piece.strip(b" "):
            for n in range(1, min(3, len(core)) + 1):
                begins[core[:n]].append((core, i))
    for near in begins.values():
        near.sort(key=lambda word: (len(word[0]), word[1]))
    out = [-1] * len(teacher.words)
    for i, piece in enumerate(teacher.words):
        core = piece.strip(b" ")
        if piece in mine:
            out[i] = mine[piece]
        elif core:
            out[i] = _nearest(core, begins)
    for name, i in student.specials.items():
        if name in teacher.specials:
            out[teacher.specials[name]] = i
    return torch.tensor(out)


def _nearest(word: bytes, begins: dict[bytes, list[tuple[bytes, int]]]) -> int:
    for n in range(min(3, len(word)), 0, -1):
        if near := begins.get(word[:n]):
            few = sorted(near, key=lambda other: abs(len(other[0]) - len(word)))[:MOST] if len(near) > MOST else near
            return min(few, key=lambda other: (distance(word, other[0]), len(other[0]), other[1]))[1]
    return -1


def distance(a: bytes, b: bytes) -> int:
    """Least number of bytes to insert, delete or exchange, by columns held in the bits of a number (Myers 1999)."""
    if len(a) < len(b):
        a, b = b, a
    if not b:
        return len(a)
    ones, top = (1 << len(a)) - 1, 1 << (len(a) - 1)
    where: dict[int, int] = defaultdict(int)
    for n, byte in enumerate(a):
        where[byte] |= 1 << n
    up, down, far = ones, 0, len(a)
    for byte in b:
        equal = where.get(byte, 0)
        diagonal = (((equal & up) + up) ^ up) | equal | down
        more, less = down | ~(diagonal | up) & ones, up & diagonal
        far += bool(more & top) - bool(less & top)
        more = (more << 1 | 1) & ones
        up, down = (less << 1) & ones | ~(diagonal | more) & ones, more & diagonal
    return far


def projection(student: Pieces, teacher: Pieces) -> dict[str, Tensor]:
    """The student's words as mixtures of the teacher's: `projection` [E, 2] ids of both, `projection_weights` [E].

    A word that is the same bytes in both is itself. Any other is spread over the pieces that the teacher cuts it into,
    each a tenth of the one before, and over the teacher's words of which it is a piece, weighed alike; the four largest
    are kept and brought to sum 1. A word that the teacher cannot write gets no weight.
    """
    mine, theirs = student.ids(), teacher.ids()
    rows: dict[int, dict[int, float]] = defaultdict(lambda: defaultdict(float))
    for source, other, forth in ((mine, teacher, True), (theirs, student, False)):
        for piece, i in source.items():
            for j, weight in _cut(piece, other):
                word, part = (i, j) if forth else (j, i)
                rows[word][part] += weight
    for piece, i in mine.items():
        if piece in theirs:
            rows[i] = {theirs[piece]: 1.0}
    for name, i in student.specials.items():
        if name in teacher.specials:
            rows[i] = {teacher.specials[name]: 1.0}
    ids, weights = [], []
    for i in sorted(rows):
        kept = sorted(rows[i].items(), key=lambda entry: (-entry[1], entry[0]))[:KEPT]
        total = sum(weight for _, weight in kept)
        ids += [(i, j) for j, _ in kept]
        weights += [weight / total for _, weight in kept]
    return {
        "projection": torch.tensor(ids, dtype=torch.long).view(-1, 2),
        "projection_weights": torch.tensor(weights, dtype=torch.float32),
    }


def _cut(piece: bytes, other: Pieces) -> list[tuple[int, float]]:
    """The other tokenizer's pieces of a word, and how much each weighs, 1 in all; none for half a character."""
    try:
        ids = [j for j in other.encode(piece.decode()) if other.words[j]]
    except UnicodeDecodeError:
        return []
    shares = [DECAY**n for n in range(len(ids))]
    return [(j, share / sum(shares)) for j, share in zip(ids, shares, strict=True)]
