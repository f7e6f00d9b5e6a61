"""Byte pair encoding that is learned on the spot, for small language models that need no download."""

import heapq
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from itertools import pairwise

from limbeck.core.errors import BadInput

PAD = 0
_PART = re.compile(r"\s?\w+|\s?[^\w\s]+|\s+")  # what no token reaches beyond: a word with the space before it
Pair = tuple[int, int]


class Merges:
    """The 256 bytes of UTF-8, counted from 1, and the pairs that were merged most often in the training text; 0 pads.

    Learned as in Sennrich et al. 2016 (1508.07909), on bytes. Loses nothing. size: ids in all, > 257.
    """

    def __init__(self, texts: Iterable[str], size: int) -> None:
        if size <= 257:
            raise BadInput(f"bpe needs more than 257 symbols, its 256 bytes and padding, got {size}")
        self.pieces = [b"", *(bytes([byte]) for byte in range(256))]
        self._ranks: dict[Pair, int] = {}
        self._known: dict[str, list[int]] = {}
        self._learn(Counter(part for text in texts for part in _PART.findall(text)), size)
        self.size = size  # also where the text is too short for so many: the network is as wide as it was said

    def encode(self, text: str) -> list[int]:
        return [i for part in _PART.findall(text) for i in self._part(part)]

    def decode(self, ids: Sequence[int]) -> str:
        return b"".join(self.pieces[i] for i in ids if i < len(self.pieces)).decode(errors="replace")

    def _part(self, part: str) -> list[int]:
        ids = self._known.get(part)
        if ids is None:
            ids = [1 + byte for byte in part.encode()]
            while len(ids) > 1:
                rank, pair = min((self._ranks.get(p, self.size), p) for p in pairwise(ids))
                if rank == self.size:
                    break
                ids = _merged(ids, pair, rank)
            self._known[part] = ids
        return ids

    def _learn(self, parts: Counter[str], size: int) -> None:
        lines = [[1 + byte for byte in part.encode()] for part in parts]
        weights = list(parts.values())
        counts: Counter[Pair] = Counter()
        where: dict[Pair, set[int]] = defaultdict(set)
        for n, line in enumerate(lines):
            for pair in pairwise(line):
                counts[pair] += weights[n]
                where[pair].add(n)
        heap = [(-count, pair) for pair, count in counts.items()]
        heapq.heapify(heap)
        while heap and len(self.pieces) < size:
            count, pair = heapq.heappop(heap)
            if -count != counts[pair] or -count < 2:  # an old entry: the pair has been counted anew since
                continue
            new = self._ranks[pair] = len(self.pieces)
            self.pieces.append(self.pieces[pair[0]] + self.pieces[pair[1]])
            changed = set()
            for n in where.pop(pair):
                before, lines[n] = lines[n], _merged(lines[n], pair, new)
                for sign, line in ((-1, before), (1, lines[n])):
                    for p in pairwise(line):
                        counts[p] += sign * weights[n]
                        changed.add(p)
                        if sign > 0:
                            where[p].add(n)
            del counts[pair]
            changed.discard(pair)
            for p in changed:
                if counts[p] > 0:
                    heapq.heappush(heap, (-counts[p], p))


def _merged(ids: list[int], pair: Pair, new: int) -> list[int]:
    out: list[int] = []
    for i in ids:
        if out and (out[-1], i) == pair:
            out[-1] = new
        else:
            out.append(i)
    return out
