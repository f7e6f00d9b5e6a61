"""What happens when a student drafts for its teacher, as tensors for the measure of it."""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from limbeck.core.batches import Table
from limbeck.core.errors import BadInput
from limbeck.core.nets import device_of
from limbeck.core.policy import starts, text
from limbeck.core.speculative import Count, assisted, speculate
from limbeck.core.taps import unwrap
from limbeck.verbs.answers import asked


def drafts(
    student: nn.Module,
    teacher: nn.Module,
    table: Table,
    *,
    texts: int,
    length: int,
    prompt: int,
    block: int,
    temperature: float,
) -> dict[str, Tensor]:
    """student_drafts [N, 2] and teacher_calls [N] of the first texts of a table: see core/names and the measure
    `speculation`. Texts are the teacher's; randomness is the same each time, and the caller's is left alone."""
    if table.kind != "tokens" or table["labels"].ndim != 2 or table.cloze is not None:
        raise BadInput(f"drafts are measured on texts whose next token is asked for, and {table.name} has none")
    few = table.select(range(min(len(table), 4 * texts)))
    rows, given = text(few.columns), starts(few.columns, prompt)
    width, end = rows.shape[1], _end(table)
    words = int(table.constants["words"]) if "words" in table.constants else None
    found: list[Count] = []
    devices = [d.index for d in {device_of(student), device_of(teacher)} if d.type == "cuda"]
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(0)
        for row, start in zip(rows, given.tolist(), strict=True):
            if start < width and len(found) < texts:
                place = row[None, :start].to(device_of(teacher))
                how = _How(min(length, width - start), block, temperature, end, words)
                found.append(_one(student, teacher, place, how))
    if not found:
        raise BadInput(f"no text of {table.name} is longer than its prompt: there is nothing to draft")
    return {
        "student_drafts": torch.tensor([[c.kept, c.refused] for c in found]),
        "teacher_calls": torch.tensor([c.calls for c in found]),
    }


class _How(NamedTuple):
    length: int
    block: int
    temperature: float
    end: int | None
    words: int | None


def _one(student: nn.Module, teacher: nn.Module, prompt: Tensor, how: _How) -> Count:
    """One text. transformers hides what it takes for padding from a draft, and wants heads of one height, so that all
    other texts are written our own way."""
    target: Any = unwrap(teacher)
    draft: Any = unwrap(student)
    theirs = target is not draft and all(hasattr(model, "generate") for model in (target, draft))
    theirs = theirs and target.config.vocab_size == draft.config.vocab_size
    if theirs and not _padding(draft) & {*prompt[0].tolist(), how.end}:
        return assisted(target, draft, prompt, how.length, how.temperature, block=how.block, end=how.end)[1]
    return speculate(
        teacher, student, prompt, how.length, how.temperature, block=how.block, end=how.end, words=how.words
    )[1]


def _padding(model: Any) -> set[int]:
    """The tokens that a model of transformers takes for padding: none where that is also its end."""
    settings, config = getattr(model, "generation_config", None), model.config
    pad, end = (getattr(settings, k, None) or getattr(config, k, None) for k in ("pad_token_id", "eos_token_id"))
    return set() if pad is None or pad in (end if isinstance(end, list) else [end]) else {int(pad)}


def _end(table: Table) -> int | None:
    """The id with which answers end; None where texts are no answers."""
    try:
        return asked(table).end
    except BadInput:
        return None
