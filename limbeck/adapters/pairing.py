"""Two tokenizers: the text of a table once more, in the teacher's tokens, aligned with the student's by bytes."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from limbeck.adapters import likeness
from limbeck.adapters.pieces import Pieces, pieces_of, placed
from limbeck.core.batches import Splits, Table
from limbeck.core.errors import BadInput, nearest
from limbeck.core.spans import Counts, Span, align

__all__ = ["CONSTANTS", "Report", "Retell", "retell", "retell_all", "retell_several", "same_words", "word_starts"]


@dataclass(frozen=True)
class Report:
    """What the alignment of a table came to.

    counts: of tokens, stretches and bytes. student, teacher: what the tokenizers are called. same, vocabularies: byte
    strings that both know, and how many ids each has. unread: tokens of the teacher that were not found in the text.
    specials: tokens of the student for which the teacher has none.
    """

    counts: Counts
    student: str
    teacher: str
    same: int
    vocabularies: tuple[int, int]
    unread: int = 0
    specials: int = 0

    def __str__(self) -> str:
        c = self.counts
        more = [f"{self.specials:,} special tokens that the teacher lacks"] if self.specials else []
        more += [f"{self.unread:,} teacher tokens that are not in the text"] if self.unread else []
        left = f"{c.student_tokens - c.student_aligned:,} of {c.student_tokens:,} student tokens and "
        left += f"{c.teacher_tokens - c.teacher_aligned:,} of {c.teacher_tokens:,} teacher tokens"
        return (
            f"two tokenizers, {self.student} and {self.teacher} of the teacher, have {self.same:,} words in common (of "
            f"{self.vocabularies[0]:,} and {self.vocabularies[1]:,}); {c.stretches:,} stretches ({c.single:,} of one "
            f"token each, {c.merged:,} merged) cover {c.aligned_size / max(1, c.size):.2%} of the bytes; left out: "
            + ", among them ".join([left, *([" and ".join(more)] if more else [])])
        )


def retell(table: Table, tokenizer: Any, *, constants: Sequence[str] = ("same_words",)) -> tuple[Table, Report]:
    """A language table with its text in a second tokenizer beside it, and what could not be aligned.

    Adds `teacher_inputs`, `teacher_labels`, `teacher_mask` and `teacher_attention_mask` [N, U], shifted like the
    student's; `student_spans` [N, T] and `teacher_spans` [N, U]; and `teacher_words` and the constants asked for (see
    `CONSTANTS`). Rows that follow one another in one text are read as that text, so that words at their edges are not
    cut; a token that reaches beyond an edge is left out. Other rows are texts of their own. What the tokenizer puts
    before every text comes first in every row. A special token is aligned with the one of the same name, the end of a
    text with the end of a text; where the teacher has none, it does not see it. Places that the student's mask leaves
    out are left out of the teacher's.
    """
    if table.kind != "tokens" or table.tokenizer is None or table["inputs"].shape != table["labels"].shape:
        raise BadInput(f"{table.name} is no language table with its tokenizer; two tokenizers need inputs and labels")
    if "segments" in table.columns:
        raise BadInput(
            f"{table.name} holds several texts in a row; two tokenizers need one a row: leave out the packing"
        )
    student, teacher = pieces_of(table.tokenizer), pieces_of(tokenizer)
    reader = _Reader(student, teacher)
    columns, counts = _told(reader, table.columns)
    found_words = same_words(student, teacher)
    made = {name: _constant(name)(student, teacher) for name in constants}
    report = Report(
        counts,
        student.name,
        teacher.name,
        len(found_words),
        (len(student.ids()), len(teacher.ids())),
        reader.unread,
        reader.specials,
    )
    flat = {n: c for part in made.values() for n, c in part.items()}
    both = replace(
        table,
        columns={**table.columns, **columns},
        constants={**table.constants, **flat, "teacher_words": torch.tensor([len(teacher.words)])},
        teacher_tokenizer=tokenizer,
        retell=Retell(student, teacher),
    )
    return both, report


@dataclass(frozen=True)
class Retell:
    """Reads texts that are new, such as those that a student writes, in the teacher's tokens."""

    student: Pieces
    teacher: Pieces

    def __call__(self, inputs: Tensor, labels: Tensor, mask: Tensor) -> dict[str, Tensor]:
        """What `retell` adds for texts of their own: [B, T] each -> teacher_* [B, U] and both spans, on their device.

        U is as long as these texts need. Bytes that are no whole characters are in no stretch.
        """
        columns, _ = _told(
            _Reader(self.student, self.teacher), {"inputs": inputs, "labels": labels, "mask": mask}, apart=True
        )
        columns["teacher_words"] = torch.tensor([len(self.teacher.words)])
        return {name: column.to(inputs.device) for name, column in columns.items()}


def retell_all(
    splits: Splits,
    tokenizer: Any,
    note: Callable[[str], None] | None = None,
    constants: Sequence[str] = ("same_words",),
) -> Splits:
    """`retell` of all three parts; note: told what came of the training part."""
    train, report = retell(splits.train, tokenizer, constants=constants)
    _aligned(splits.train, report, note)
    rest = [retell(part, tokenizer, constants=())[0] if len(part) else part for part in splits[1:]]
    return Splits(train, *rest)


def retell_several(
    splits: Splits,
    tokenizers: Sequence[Any],
    note: Callable[[str], None] | None = None,
    constants: Sequence[str] = ("nearest_words", "same_words"),
) -> Splits:
    """The training part in the tokens of several teachers: what `retell` adds for the k-th is teachers.k.NAME.

    `core.teachers.read_by` gives these columns and constants their usual names. The other parts stay as they are: their
    teachers are not judged. note: told of each what could be aligned.
    """
    columns, found = dict(splits.train.columns), dict(splits.train.constants)
    for k, tokenizer in enumerate(tokenizers):
        told, report = retell(splits.train, tokenizer, constants=constants)
        _aligned(splits.train, report, note)
        columns |= {f"teachers.{k}.{n}": c for n, c in told.columns.items() if n not in splits.train.columns}
        found |= {f"teachers.{k}.{n}": c for n, c in told.constants.items() if n not in splits.train.constants}
    return splits._replace(train=replace(splits.train, columns=columns, constants=found))


def _aligned(table: Table, report: Report, note: Callable[[str], None] | None) -> None:
    """Raise BadInput where nothing was aligned, and say what was."""
    if not report.counts.stretches:
        raise BadInput(f"nothing of {table.name} could be aligned: {report}")
    if note is not None:
        note(str(report))


def _told(reader: _Reader, table: Mapping[str, Tensor], *, apart: bool = False) -> tuple[dict[str, Tensor], Counts]:
    """The new columns for those of a table, and what could be aligned; apart: each row is a text of its own."""
    counts, columns = Counts(), _Columns(reader.teacher.pad, table["inputs"].shape[1])
    for mine, theirs, mask in reader.rows(table, apart):
        labels = [span for _, span in mine[1:]]
        my_spans, their_spans, found = align(labels, [span for _, span in theirs[1:]])
        counts += found
        columns.add(my_spans, theirs, their_spans, None if mask.all() else _counted(labels, mask.tolist()))
    return columns.tensors(), counts


# ---- texts -----------------------------------------------------------------------------------------------------------
Token = tuple[int, Span]


@dataclass
class _Reader:
    """Reads the student's tokens as a text, and that text as tokens of the teacher."""

    student: Pieces
    teacher: Pieces
    unread: int = 0
    specials: int = 0
    _names: dict[int, int | None] = field(init=False)

    def __post_init__(self) -> None:
        mine, theirs = self.student, self.teacher
        self._names = {i: theirs.specials.get(name) for name, i in mine.specials.items()}
        if mine.end is not None and self._names.get(mine.end) is None:
            self._names[mine.end] = theirs.end

    def rows(self, table: Mapping[str, Tensor], apart: bool) -> Iterator[tuple[list[Token], list[Token], Tensor]]:
        """Of each row the student's tokens with their places in the text, the teacher's, and which labels count."""
        inputs, labels = table["inputs"].cpu(), table["labels"].cpu()
        mask = table.get("mask", torch.ones_like(labels)).cpu().bool() & (labels >= 0)
        labels = torch.where(labels < 0, torch.cat([inputs[:, 1:], inputs[:, -1:]], 1), labels)  # -100 hides a token
        real = mask.long().flip(1).cummax(1).values.flip(1).bool()  # prompts are read, though they are not predicted
        if "attention_mask" in table:
            seen = table["attention_mask"].cpu().bool()
            real = real | torch.cat([seen[:, :-1] & seen[:, 1:], torch.zeros_like(seen[:, :1])], 1)
        sizes = real.sum(1).tolist()
        if not apart and len(inputs) > 1 and bool(real[:-1].all()) and torch.equal(inputs[1:, 0], labels[:-1, -1]):
            line = [*inputs[0, :1].tolist(), *labels[real].tolist()]
            mine, theirs = self.both(line)
            starts, ends = [s for _, (s, _) in theirs], [e for _, (_, e) in theirs]
            at = 0
            for row, size in enumerate(sizes):
                part = mine[at : at + size + 1]
                low = max(0, bisect_right(starts, part[0][1][0]) - 1)
                yield part, self.begun(theirs[low : max(low, bisect_right(ends, part[-1][1][1]))]), mask[row, :size]
                at += size
            return
        for row, size in enumerate(sizes):
            mine, theirs = self.both([*inputs[row, :1].tolist(), *labels[row, :size].tolist()])
            yield mine, self.begun(theirs), mask[row, :size]

    def begun(self, tokens: list[Token]) -> list[Token]:
        """The teacher's tokens after what its tokenizer puts before every text."""
        if self.teacher.start is None or not tokens or tokens[0][0] == self.teacher.start:
            return tokens
        at = tokens[0][1][0]
        return [(self.teacher.start, (at, at)), *tokens]

    def both(self, ids: Sequence[int]) -> tuple[list[Token], list[Token]]:
        """The student's tokens in a text, and the teacher's; a special token that both know takes up one byte."""
        mine: list[Token] = []
        theirs: list[Token] = []
        text, began, at = bytearray(), 0, 0
        for i in ids:
            piece = self.student.words[i] if i < len(self.student.words) else b""
            mine.append((i, (at, at + len(piece))))
            text += piece
            at += len(piece)
            if piece:
                continue
            theirs += self.read(bytes(text), began)
            other = self._names.get(i)
            if other is None:
                self.specials += 1
            else:
                mine[-1] = (i, (at, at + 1))
                theirs.append((other, (at, at + 1)))
                at += 1
            text, began = bytearray(), at
        return mine, theirs + self.read(bytes(text), began)

    def read(self, text: bytes, began: int) -> list[Token]:
        """The teacher's tokens of a text that begins there; bytes that are no whole characters are passed over."""
        found: list[Token] = []
        while text:
            broken = 0
            try:
                whole = text.decode()
            except UnicodeDecodeError as error:
                whole, broken = text[: error.start].decode(), error.end
            if whole:
                ids = self.teacher.encode(whole)
                size = len(self.teacher.words)
                spans = placed([self.teacher.words[i] if i < size else b"" for i in ids], whole.encode())
                self.unread += sum(a == b for a, b in spans)
                found += [(i, (began + a, began + b)) for i, (a, b) in zip(ids, spans, strict=True)]
            if not broken:
                break
            text, began = text[broken:], began + broken
        return found


def _counted(spans: Sequence[Span], mask: Sequence[bool]) -> list[Span]:
    """The parts of the text that the student's mask counts, joined where they touch."""
    parts: list[Span] = []
    for (start, end), counts in zip(spans, mask, strict=True):
        if counts and start < end:
            joined = bool(parts) and parts[-1][1] == start
            parts[-1:] = [(parts[-1][0], end)] if joined else [*parts[-1:], (start, end)]
    return parts


@dataclass
class _Columns:
    """The new columns, row by row."""

    pad: int
    width: int
    student_spans: list[list[int]] = field(default_factory=list)
    rows: list[tuple[list[int], list[int], list[bool]]] = field(default_factory=list)

    def add(self, student_spans: list[int], tokens: list[Token], spans: list[int], parts: list[Span] | None) -> None:
        """parts: of the text that count; None: all of it."""
        self.student_spans.append(student_spans)
        counts = [True] * len(spans)
        if parts is not None:
            begins = [start for start, _ in parts]
            for n, (_, (start, end)) in enumerate(tokens[1:]):
                k = bisect_right(begins, start) - 1
                counts[n] = start < end and k >= 0 and end <= parts[k][1]
        self.rows.append(([i for i, _ in tokens], spans, counts))

    def tensors(self) -> dict[str, Tensor]:
        n, width = len(self.rows), max(1, max((len(ids) - 1 for ids, _, _ in self.rows), default=1))
        line = torch.full((n, width + 1), self.pad)
        told = {"teacher_spans": torch.full((n, width), -1), "student_spans": torch.full((n, self.width), -1)}
        told |= {f"teacher_{name}": torch.zeros(n, width, dtype=torch.bool) for name in ("mask", "attention_mask")}
        for row, (ids, spans, counts) in enumerate(self.rows):
            line[row, : len(ids)] = torch.tensor(ids, dtype=torch.long)
            told["teacher_spans"][row, : len(spans)] = torch.tensor(spans, dtype=torch.long)
            told["teacher_mask"][row, : len(counts)] = torch.tensor(counts, dtype=torch.bool)
            told["teacher_attention_mask"][row, : max(1, len(spans))] = True
            mine = self.student_spans[row]
            told["student_spans"][row, : len(mine)] = torch.tensor(mine, dtype=torch.long)
        return {"teacher_inputs": line[:, :-1].clone(), "teacher_labels": line[:, 1:].clone(), **told}


# ---- constants of two vocabularies -----------------------------------------------------------------------------------
def same_words(student: Pieces, teacher: Pieces) -> Tensor:
    """[W, 2]: ids, the student's and the teacher's, of equal byte strings and of special tokens of the same name."""
    mine, theirs = student.ids(), teacher.ids()
    pairs = {i: theirs[piece] for piece, i in mine.items() if piece in theirs}
    pairs |= {i: teacher.specials[name] for name, i in student.specials.items() if name in teacher.specials}
    return torch.tensor(sorted(pairs.items()), dtype=torch.long).view(-1, 2)


def word_starts(pieces: Pieces) -> Tensor:
    """[W]: ids that begin with white space, and the one that ends a text."""
    starts = [piece[:1].isspace() for piece in pieces.words]
    if pieces.end is not None:
        starts[pieces.end] = True
    return torch.tensor(starts)


CONSTANTS: dict[str, Callable[[Pieces, Pieces], dict[str, Tensor]]] = {
    "same_words": lambda mine, theirs: {"same_words": same_words(mine, theirs)},
    "nearest_words": lambda mine, theirs: {"nearest_words": likeness.nearest_words(mine, theirs)},
    "word_starts": lambda mine, theirs: {"word_starts": word_starts(theirs)},
    "projection": likeness.projection,
    "projection_weights": likeness.projection,
}


def _constant(name: str) -> Callable[[Pieces, Pieces], dict[str, Tensor]]:
    if name not in CONSTANTS:
        raise BadInput(f"two vocabularies have no constant {name!r}{nearest(name, CONSTANTS)}")
    return CONSTANTS[name]
