"""What a network answers to the prompts of a table, as numbered words, for measures of written texts."""

from __future__ import annotations

import re
from collections import Counter
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from limbeck.core.batches import Table
from limbeck.core.errors import BadInput
from limbeck.core.generate import sample
from limbeck.core.nets import device_of

NAMES = ("student_answers", "real_answers")
UNREAD = "\ufffd"  # what tokenizers write for what they cannot say
_SIGNS = {"&quot;": '"', "&amp;": "&", "&lt;": "<", "&gt;": ">"}  # as web pages write them
_SIGN = re.compile(r"([!-&(-+/:-@\[-`{-~])")  # ASCII punctuation but for ' , - .
_STOP = re.compile(r"(?<![0-9])([.,])|([.,])(?![0-9])")
_DASH = re.compile(r"(?<=[0-9])-")


def words(text: str) -> list[str]:
    """A text in words and punctuation marks, as BLEU is usually counted (NIST's 13a): no other language-specific rule.

    Marks stand alone, but for the apostrophe, the dash of a word, and the point or comma of a number.
    """
    for written, sign in _SIGNS.items():
        text = text.replace(written, sign)
    text = _SIGN.sub(r" \1 ", text.replace("\n", " "))
    return _DASH.sub(" - ", _STOP.sub(lambda met: f" {met[0]} ", f" {text} ")).split()


class Asked(NamedTuple):
    """prompts [N, P], padded on the right; lengths [N]; answers: the tokens of each real one; end: id that ends one, or
    None; room: tokens that a text may have in all."""

    prompts: Tensor
    lengths: Tensor
    answers: list[list[int]]
    end: int | None
    room: int


def asked(table: Table) -> Asked:
    """The prompts and answers of a language table: each stretch that counts is an answer, what its text says before is
    its prompt. Raises BadInput where everything counts, so that there are no prompts, or nobody can read the tokens.

    The end is the id with which most answers end.
    """
    told = table.kind == "tokens" and table.tokenizer is not None and table.cloze is None
    if not told or "mask" not in table.columns or table["labels"].ndim != 2:
        raise BadInput(f"measures of written answers need prompts and answers in tokens, which {table.name} has not")
    mask, labels = (table["mask"].bool() & (table["labels"] >= 0)).cpu(), table["labels"].cpu()
    inputs, segments = table["inputs"].cpu(), table.columns.get("segments")
    begins = mask & ~torch.nn.functional.pad(mask, (1, 0))[:, :-1]
    prompts, answers = [], []
    for row, place in begins.nonzero().tolist():
        length = int((~torch.nn.functional.pad(mask[row, place:], (0, 1))).int().argmax())
        first = 0 if segments is None else int((segments[row] == segments[row, place]).int().argmax())
        prompts.append(inputs[row, first : place + 1])
        answers.append(labels[row, place : place + length].tolist())
    if not any(len(prompt) > 1 for prompt in prompts):
        raise BadInput(
            f"{table.name} has no prompts: every token counts. Measures of written answers need `kind: chat` data, or "
            "a mask that begins where the answer does"
        )
    lengths = torch.tensor([len(prompt) for prompt in prompts])
    padded = torch.nn.utils.rnn.pad_sequence(prompts, batch_first=True)
    (last, times), *_ = Counter(answer[-1] for answer in answers).most_common(1)
    end = last if 2 * times > len(answers) else None
    return Asked(padded, lengths, answers, end, inputs.shape[1] + 1)


def answers(module: nn.Module, table: Table, *, batch_size: int = 64) -> dict[str, Tensor]:
    """student_answers and real_answers [N, T], words numbered alike, -1 for padding: see core/names.

    The network writes greedily, up to the end or as many tokens as the longest real answer has, and never beyond the
    width of the table. What a tokenizer cannot say equals nothing.
    """
    told, device = asked(table), device_of(module)
    order, longest = told.lengths.argsort(stable=True), max(map(len, told.answers))
    written: dict[int, list[int]] = {}
    for some in order.split(batch_size):
        lengths = told.lengths[some]
        width = int(lengths.max())
        more = max(0, min(longest, told.room - width))
        out = sample(
            module,
            told.prompts[some, :width].to(device),
            more,
            0.0,
            lengths=lengths.to(device),
            end=told.end,
        )
        for i, row, start in zip(some.tolist(), out.tolist(), lengths.tolist(), strict=True):
            written[i] = _until(row[start : start + longest], told.end)
    read: Any = table.tokenizer
    found = [words(read.decode(written[i])) for i in range(len(written))]
    wanted = [words(read.decode(_until(answer, told.end))) for answer in told.answers]
    numbers: dict[str, int] = {}
    return {
        name: _numbered(side, numbers, unread)
        for unread, (name, side) in enumerate(zip(NAMES, (found, wanted), strict=True))
    }


def _until(ids: list[int], end: int | None) -> list[int]:
    return ids[: ids.index(end)] if end in ids else ids


def _numbered(lines: list[list[str]], numbers: dict[str, int], unread: int) -> Tensor:
    """Words as numbers from 2 up; those that could not be said are 0 or 1, so that they differ between two sides."""
    rows = [
        torch.tensor([unread if UNREAD in w else numbers.setdefault(w, len(numbers) + 2) for w in line]).long()
        for line in lines
    ]
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=-1)
