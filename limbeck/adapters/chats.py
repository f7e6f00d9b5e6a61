"""Conversations as language batches: the assistant's words are learned, what comes before them is read."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from limbeck.adapters.words import PAD, next_tokens
from limbeck.core.batches import Tokenizer
from limbeck.core.errors import BadInput, nearest

__all__ = ["Message", "columns", "dialogues", "encoded"]

Message = Mapping[str, str]

PROMPTS = ("prompt", "instruction", "question", "query", "problem")
ANSWERS = ("response", "completion", "output", "answer", "solution")
TURNS = ("messages", "conversations", "conversation")
OPEN = 64  # rows that a short text may still go into
SPEAKERS = {"human": "user", "gpt": "assistant", "bot": "assistant", "model": "assistant"}


class Coded(NamedTuple):
    """Token ids of a conversation, and for each whether the assistant says it."""

    ids: list[int]
    said: list[bool]


def dialogues(
    rows: Sequence[Mapping[str, Any]], where: str, inputs: str | None = None, labels: str | None = None
) -> list[list[Message]]:
    """The turns of each row, as {"role": system, user or assistant, "content": text}.

    A row holds a list of turns (`messages`, or `conversations` of from and value), or a prompt and an answer by their
    usual names or by those given for inputs and labels; a column `input` beside `instruction` is put below it.
    """
    has = list(rows[0])
    for wanted in (inputs, labels):
        if wanted is not None and wanted not in has:
            raise BadInput(f"{where} has no column {wanted!r}{nearest(wanted, has)}")
    turns = next((name for name in TURNS if name in has), None) if labels is None else None
    if turns is not None:
        return [_turns(row[turns], f"row {i} of {where}") for i, row in enumerate(rows)]
    prompt = inputs or next((name for name in PROMPTS if name in has), None)
    answer = labels or next((name for name in ANSWERS if name in has), None)
    if prompt is None or answer is None:
        raise BadInput(
            f"{where} has no conversations: rows need `messages`, or a prompt ({', '.join(PROMPTS)}) and an answer "
            f"({', '.join(ANSWERS)}); name the columns in `inputs` and `labels`; found {', '.join(has)}"
        )
    out: list[list[Message]] = []
    for row in rows:
        more = row.get("input") if prompt == "instruction" else None
        asked = f"{row[prompt]}\n\n{more}" if more else str(row[prompt])
        said = [{"role": "user", "content": asked}, {"role": "assistant", "content": str(row[answer])}]
        system = [{"role": "system", "content": str(row["system"])}] if row.get("system") else []
        out.append([*system, *said])
    return out


def _turns(given: Any, where: str) -> list[Message]:
    if not isinstance(given, (list, tuple)) or not all(isinstance(turn, Mapping) for turn in given):
        raise BadInput(f"{where} must hold a list of turns like {{'role': 'user', 'content': ...}}, got {given!r:.60}")
    out: list[Message] = []
    for turn in given:
        role, content = turn.get("role", turn.get("from")), turn.get("content", turn.get("value"))
        role = SPEAKERS.get(str(role), str(role))
        if role not in ("system", "user", "assistant") or not isinstance(content, str):
            raise BadInput(f"{where} has a turn that is no text of system, user or assistant: {turn!r:.60}")
        out.append({"role": role, "content": content})
    return out


def encoded(tokenizer: Tokenizer, messages: Sequence[Message]) -> Coded:
    """A conversation in tokens, by the tokenizer's own chat template where it has one.

    What the assistant says counts, with the mark that ends its turn. It is tokenised apart from its prompt, so that
    training sees the prompt in the very tokens that a server will send.
    """
    ids: list[int] = []
    said: list[bool] = []
    for text, answer in _pieces(getattr(tokenizer, "inner", None), messages):
        more = tokenizer.encode(text)
        ids += more
        said += [answer] * len(more)
    return Coded(ids, said)


def _pieces(inner: Any, messages: Sequence[Message]) -> Iterable[tuple[str, bool]]:
    """The conversation as text, in pieces that the assistant says or does not."""
    if getattr(inner, "chat_template", None) is None:
        end = getattr(inner, "eos_token", None) or "\n"
        for message in messages:
            answer = message["role"] == "assistant"
            yield message["content"] + (end if answer else "\n"), answer
        return
    done = ""
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before: str = inner.apply_chat_template(messages[:i], tokenize=False, add_generation_prompt=True)
        whole: str = inner.apply_chat_template(messages[: i + 1], tokenize=False)
        if not (before.startswith(done) and whole.startswith(before)):
            raise BadInput(
                "the tokenizer's chat template rewrites earlier turns when later ones follow, so that nobody could say "
                "which tokens the assistant wrote; split such conversations into one row an answer"
            )
        yield before[len(done) :], False
        answer_text = whole[len(before) :]
        yield answer_text.rstrip(), True
        yield answer_text[len(answer_text.rstrip()) :], False
        done = whole


def columns(
    coded: Iterable[Coded], length: int, pad: int = PAD, *, pack: bool = False
) -> tuple[dict[str, Tensor], list[int], int]:
    """Conversations for next-token prediction: inputs, labels, mask and attention_mask [N, T], T <= length.

    Labels are the tokens one place further on, and the mask counts those that the assistant says. Texts are cut after
    `length` places. pack: several short ones share a row, first fit in order; then `segments` [N, T], the number of the
    text in its row and -1 for padding, takes the place of attention_mask.

    Returned with it: the conversation that each row begins with, and how many were left out because nothing that the
    assistant says was within `length`.
    """
    bins: list[list[Coded]] = []
    room: list[int] = []
    first: list[int] = []
    lost = 0
    for number, (ids, said) in enumerate(coded):
        text = Coded(ids[: length + 1], said[: length + 1])
        if not any(text.said[1:]):
            lost += 1
            continue
        size = len(text.ids) - 1
        recent = range(max(0, len(bins) - OPEN), len(bins))
        at = next((k for k in recent if room[k] >= size), None) if pack else None
        if at is None:
            bins.append([])
            room.append(length)
            first.append(number)
            at = len(bins) - 1
        bins[at].append(text)
        room[at] -= size
    width = length if pack else max((len(texts[0].ids) - 1 for texts in bins), default=1)
    inputs, labels = torch.full((len(bins), width), pad), torch.full((len(bins), width), pad)
    mask, segments = torch.zeros(len(bins), width, dtype=torch.bool), torch.full((len(bins), width), -1)
    for row, texts in enumerate(bins):
        start = 0
        for number, text in enumerate(texts):
            at_row = slice(start, start + len(text.ids) - 1)
            inputs[row, at_row], labels[row, at_row] = next_tokens(torch.tensor(text.ids))
            mask[row, at_row], segments[row, at_row] = torch.tensor(text.said[1:]), number
            start = at_row.stop
    table = {"inputs": inputs, "labels": labels, "mask": mask}
    table |= {"segments": segments} if pack else {"attention_mask": segments >= 0}
    return table, first, lost
