"""Entries of a place (ids, counts, values) in few bits, read back by array operations over all places at once.

Ids become ranks in the order of frequency and are sorted within a place, for their order tells nothing. A gap between
neighbouring ranks, and a count, are each split into a class (the number of binary digits) and those digits. The pair
of classes is one symbol of a prefix code (Huffman), chosen by the largest gap class so far; the digits are plain bits.
Every place's symbols begin at a known bit, so a reader advances through all places side by side, one entry a turn.
A block of 64 places stands for itself:

    byte 0       bits a length takes
    lengths      bits of symbols, a place
    tails        16 bits a place, where kept
    symbols      place by place
    digits       of gap, of count, and the value, entry by entry
"""

import heapq
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

__all__ = ["BLOCK", "Codebook", "Entries", "Layout", "decode", "encode", "symbols"]

BLOCK = 64  # places that are read together
LIMIT = 12  # longest code, in bits; a table of 2^12 answers is held for every context
Array = NDArray[np.int64]
Bytes = NDArray[np.uint8]


@dataclass(frozen=True)
class Entries:
    """What is kept of some places. Flat arrays hold one place after the other.

    sizes: [P] entries of each place. ids, counts, values: [E]; counts >= 1, values below 2^bits. tails: [P] below 2^16.
    """

    sizes: Array
    ids: Array
    counts: Array
    values: Array
    tails: Array

    def rows(self, start: int, stop: int) -> "Entries":
        """Places start to stop."""
        edges = np.concatenate([[0], np.cumsum(self.sizes)])
        flat = slice(int(edges[start]), int(edges[stop]))
        return Entries(
            self.sizes[start:stop], self.ids[flat], self.counts[flat], self.values[flat], self.tails[start:stop]
        )


@dataclass(frozen=True)
class Layout:
    """How entries are written. count_classes: 1 when all counts are 1, else one more than the digits of the largest.
    bits: of a value, 0 for none. tail: whether each place has one. order: [V] the ids from frequent to rare."""

    count_classes: int
    bits: int
    tail: bool
    order: Array

    @property
    def symbols(self) -> int:
        """How many pairs of classes there are."""
        return (len(self.order).bit_length() + 1) * self.count_classes

    @property
    def contexts(self) -> int:
        """Classes of the largest gap so far, and none."""
        return len(self.order).bit_length() + 2


def _digits(numbers: Array) -> Array:
    """Binary digits behind the leading one, of numbers >= 1."""
    return np.frexp(numbers.astype(np.float64))[1].astype(np.int64) - 1


# ---- prefix codes ----------------------------------------------------------------------------------------------------
class Codebook:
    """One prefix code a context. lengths: [contexts, symbols] bits of each code, 1 to LIMIT."""

    def __init__(self, lengths: NDArray[np.uint8]) -> None:
        self.lengths = lengths
        self.codes = np.zeros(lengths.shape, np.int64)
        self.table = np.zeros((len(lengths), 1 << LIMIT), np.int32)  # symbol * 16 + length, by the next LIMIT bits
        for context, row in enumerate(lengths):
            code, last = 0, 0
            for symbol in np.lexsort((np.arange(len(row)), row)):
                code <<= int(row[symbol]) - last
                last = int(row[symbol])
                self.codes[context, symbol] = code
                first = code << (LIMIT - last)
                self.table[context, first : first + (1 << (LIMIT - last))] = symbol * 16 + last
                code += 1

    @staticmethod
    def of(counts: Array) -> "Codebook":
        """The best code for symbols seen that often, [contexts, symbols]; what was not seen can be written, too."""
        return Codebook(np.array([_lengths(row) for row in counts], np.uint8))


def _lengths(counts: Array) -> list[int]:
    """Bits of each symbol's Huffman code, at most LIMIT: rare symbols are made less rare until it holds."""
    weights = [16 * int(c) + 1 for c in counts]
    if len(weights) == 1:
        return [1]
    while True:
        depth = [0] * len(weights)
        heap = [(w, i, [i]) for i, w in enumerate(weights)]
        heapq.heapify(heap)
        while len(heap) > 1:
            (a, i, left), (b, _, right) = heapq.heappop(heap), heapq.heappop(heap)
            for leaf in left + right:
                depth[leaf] += 1
            heapq.heappush(heap, (a + b, i, left + right))
        if max(depth) <= LIMIT:
            return depth
        weights = [w // 2 + 1 for w in weights]


# ---- writing ---------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class _Split:
    """Entries in order of rank, as context, symbol and digits."""

    place: Array
    context: Array
    symbol: Array
    gap: Array
    gap_class: Array
    count: Array
    count_class: Array
    value: Array


def _split(entries: Entries, layout: Layout, ranks: Array) -> _Split:
    place = np.repeat(np.arange(len(entries.sizes)), entries.sizes)
    rank = ranks[entries.ids]
    order = np.lexsort((rank, place))
    rank, count, value = rank[order], entries.counts[order], entries.values[order]
    first = np.ones(len(rank), bool)
    first[1:] = place[1:] != place[:-1]
    before = np.where(first, -1, np.concatenate([[-1], rank[:-1]])[: len(rank)])
    gap = rank - before
    gap_class, count_class = _digits(gap), _digits(count)
    context = _largest_before(gap_class, entries.sizes)
    symbol = gap_class * layout.count_classes + count_class
    return _Split(place, context, symbol, gap, gap_class, count, count_class, value)


def _largest_before(classes: Array, sizes: Array) -> Array:
    """1 + the largest class before it in the same place, 0 for the first."""
    wide = int(sizes.max(initial=0))
    inside = np.arange(wide) < sizes[:, None]
    table = np.zeros((len(sizes), wide), np.int64)
    table[inside] = classes + 1
    before = np.zeros_like(table)
    before[:, 1:] = np.maximum.accumulate(table, 1)[:, :-1]
    return before[inside]


def symbols(entries: Entries, layout: Layout, ranks: Array) -> Array:
    """How often each symbol comes in each context: [contexts, symbols]. What a codebook is made of."""
    split = _split(entries, layout, ranks)
    counts = np.zeros((layout.contexts, layout.symbols), np.int64)
    np.add.at(counts, (split.context, split.symbol), 1)
    return counts


def _pack(values: Array, widths: Array) -> Bytes:
    """Each value in so many bits, the highest first, filled up to whole bytes."""
    ends = np.cumsum(widths)
    which = np.repeat(np.arange(len(values)), widths)
    shift = ends[which] - 1 - np.arange(len(which))
    return np.packbits(((values[which] >> shift) & 1).astype(np.uint8))


def encode(entries: Entries, layout: Layout, ranks: Array, book: Codebook) -> tuple[list[bytes], dict[str, int]]:
    """One string of bytes a block, and the bits that went into lengths, symbols, ids, weights and tails."""
    blocks: list[bytes] = []
    spent = dict.fromkeys(("frame", "symbols", "ids", "values", "tails"), 0)
    for start in range(0, len(entries.sizes), BLOCK):
        part = entries.rows(start, min(start + BLOCK, len(entries.sizes)))
        s = _split(part, layout, ranks)
        width = book.lengths[s.context, s.symbol].astype(np.int64)
        lengths = np.bincount(s.place, width, len(part.sizes)).astype(np.int64)
        wide = int(lengths.max(initial=0)).bit_length()
        parts = [(lengths, np.full_like(lengths, wide))]
        if layout.tail:
            parts.append((part.tails, np.full_like(part.tails, 16)))
        parts.append((book.codes[s.context, s.symbol], width))
        digits = s.gap_class + s.count_class + layout.bits
        gap, count = s.gap - (1 << s.gap_class), s.count - (1 << s.count_class)
        parts.append((((gap << s.count_class) + count << layout.bits) + s.value, digits))
        packed = _pack(np.concatenate([v for v, _ in parts]), np.concatenate([w for _, w in parts]))
        blocks.append(bytes([wide]) + packed.tobytes())
        told = {
            "symbols": width.sum(), "ids": s.gap_class.sum(), "values": s.count_class.sum() + layout.bits * len(s.gap),
            "tails": 16 * layout.tail * len(part.sizes),
        }  # fmt: skip
        told["frame"] = 8 * len(blocks[-1]) - sum(told.values())
        spent = {key: bits + int(told[key]) for key, bits in spent.items()}
    return blocks, spent


# ---- reading ---------------------------------------------------------------------------------------------------------
class _Bits:
    """Bits of a string of bytes, from many places at once."""

    def __init__(self, data: Bytes) -> None:
        padded = np.concatenate([data, np.zeros(8, np.uint8)])
        self.words: NDArray[np.uint64] = np.ndarray((len(data) + 1,), ">u8", padded, strides=(1,))
        self.halves: NDArray[np.uint32] = np.ndarray((len(data) + 1,), ">u4", padded, strides=(1,))

    def read(self, at: Array, width: Array) -> Array:
        """Numbers of at most 57 bits."""
        word = self.words[at >> 3].astype(np.uint64) << (at & 7).astype(np.uint64)
        return np.where(width > 0, word >> (64 - np.maximum(width, 1)).astype(np.uint64), 0).astype(np.int64)

    def peek(self, at: Array) -> Array:
        """The next LIMIT bits."""
        half = self.halves[at >> 3].astype(np.int64)
        found: Array = (half >> (32 - LIMIT - (at & 7))) & ((1 << LIMIT) - 1)
        return found


def _before(sizes: Array) -> Array:
    """Sum of the sizes of all that come before."""
    return np.cumsum(sizes) - sizes


def decode(data: Bytes, starts: Array, places: Array, layout: Layout, book: Codebook) -> Entries:
    """Entries of blocks that begin at the bytes `starts` [N] of `data` and have `places` [N] places, in that order."""
    bits = _Bits(data)
    block = np.repeat(np.arange(len(starts)), places)
    within = np.arange(len(block)) - _before(places)[block]
    wide, begin = data[starts].astype(np.int64), 8 * (starts + 1)
    lengths = bits.read(begin[block] + within * wide[block], wide[block])
    begin = begin + places * wide
    tails = np.zeros(len(block), np.int64)
    if layout.tail:
        tails = bits.read(begin[block] + 16 * within, np.full(len(block), 16))
        begin = begin + 16 * places
    before = _before(lengths)
    of_block = np.add.reduceat(lengths, _before(places)) if len(block) else np.zeros(0, np.int64)
    begun = begin[block] + before - before[_before(places)][block] if len(block) else before
    place, turn, symbol = _walk(bits, begun, begun + lengths, layout, book)
    sizes = np.bincount(place, minlength=len(block))
    flat = np.empty(len(symbol), np.int64)
    flat[_before(sizes)[place] + turn] = symbol
    gap_class, count_class = np.divmod(flat, layout.count_classes)
    owner = np.repeat(np.arange(len(block)), sizes)
    digits = gap_class + count_class + layout.bits
    at = _before(digits)
    in_block = np.bincount(block, sizes, len(starts)).astype(np.int64)
    base = np.concatenate([at, [0]])[np.minimum(_before(in_block), len(at))]  # a block without entries has no digits
    raw = bits.read(at + (begin + of_block - base)[block[owner]], digits)
    value = raw & ((1 << layout.bits) - 1)
    raw >>= layout.bits
    count = (1 << count_class) + (raw & ((1 << count_class) - 1))
    gap = (1 << gap_class) + (raw >> count_class)
    reach = np.cumsum(gap)
    rank = reach - (reach - gap)[np.minimum(_before(sizes)[owner], len(gap) - 1)] - 1
    return Entries(sizes, layout.order[rank], count, value, tails)


def _walk(bits: _Bits, at: Array, end: Array, layout: Layout, book: Codebook) -> tuple[Array, Array, Array]:
    """Place, turn and symbol of every entry: all places advance together, and leave when their symbols are over."""
    table, classes = book.table.reshape(-1), np.arange(layout.symbols) // layout.count_classes + 1
    live = np.flatnonzero(at < end)
    at, end, context = at[live], end[live], np.zeros(len(live), np.int64)
    places, symbols_, turns = [live[:0]], [live[:0]], [0]
    while len(live):
        found = table[(context << LIMIT) + bits.peek(at)]
        symbol = found >> 4
        places.append(live)
        symbols_.append(symbol)
        turns.append(len(turns) - 1)
        at = at + (found & 15)
        context = np.maximum(context, classes[symbol])
        go = at < end
        if not go.all():
            live, at, end, context = live[go], at[go], end[go], context[go]
    return np.concatenate(places), np.repeat(turns, [len(p) for p in places]), np.concatenate(symbols_)
