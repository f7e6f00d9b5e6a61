"""Speculative decoding: a small network drafts, a large one reads the draft in one call and keeps what it would say.

The text is distributed exactly as if the large network had written it alone (Leviathan et al. 2022, 2211.17192).
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from limbeck.core.card import require
from limbeck.core.errors import BadInput
from limbeck.core.generate import Reader, chances
from limbeck.core.nets import evaluating


@dataclass(frozen=True)
class Count:
    """What happened. written: tokens. calls: of the target. kept: drafted tokens that it kept. refused: that it looked
    at and replaced; what was drafted after them was never judged."""

    written: int = 0
    calls: int = 0
    kept: int = 0
    refused: int = 0

    @property
    def acceptance(self) -> float:
        """Share of the judged tokens that were kept; an estimate of the measure `acceptance`. nan for none."""
        judged = self.kept + self.refused
        return self.kept / judged if judged else float("nan")

    @property
    def efficiency(self) -> float:
        """Tokens written a call of the target. nan for none."""
        return self.written / self.calls if self.calls else float("nan")

    def __add__(self, other: "Count") -> "Count":
        return Count(*(getattr(self, n) + getattr(other, n) for n in self.__dataclass_fields__))


@torch.no_grad()
def speculate(
    target: nn.Module,
    draft: nn.Module,
    prompts: Tensor,
    length: int,
    temperature: float = 1.0,
    *,
    block: int = 5,
    lenience: float = 1.0,
    end: int | None = None,
    words: int | None = None,
) -> tuple[Tensor, Count]:
    """Continue `prompts` [B, P] by `length` tokens of the target, drafted by another network: [B, P + length], count.

    Any two networks over one vocabulary. Texts are written one by one, as each keeps another part of its drafts.

    temperature: of both, >= 0; at 0 the text is the target's greedy one. block: tokens drafted a call, >= 1.
    lenience: e in (0, 1]; a draft is kept with probability min(1, p / (e q)). Below 1 the text is no longer distributed
    as the target's, and written faster. end: token that ends a text, counted as the target's own; it fills the rest of
    the row. words: ids from it on are no words and never written, where heads are padded to different heights.
    """
    require(block >= 1, "block", block, ">= 1")
    require(0 < lenience <= 1, "lenience", lenience, "in (0, 1]")
    done, total = [], Count()
    with evaluating(target, draft):
        for row in prompts.split(1):
            stop, ended = row.shape[1] + length, False
            judge, writer = Reader(target, stop), Reader(draft, stop)
            while row.shape[1] < stop and not ended:
                before = row.shape[1]
                row, count = _block(judge, writer, row, min(block, stop - before - 1), temperature, lenience, words)
                row, ended = _until(row, before, end)
                if ended:
                    written = row.shape[1] - before
                    count = Count(written, 1, written - 1, 0)
                total = total + count
            done.append(_filled(row, stop, end))
    return torch.cat(done), total


def _block(
    judge: Reader, writer: Reader, row: Tensor, size: int, temperature: float, lenience: float, words: int | None
) -> tuple[Tensor, Count]:
    """One call of the target: what it keeps of `size` drafted tokens, and one token of its own."""
    text, drafted = row, []
    for _ in range(size):
        q = chances(writer.after(text)[:, -1, :words], temperature)[0]
        drafted.append(q)
        text = torch.cat([text, _one(q, temperature)[None, None]], 1)
    p = chances(judge.after(text, size + 1)[0, :, :words], temperature)
    kept = 0
    for q, own, token in zip(drafted, p[:-1], text[0, row.shape[1] :], strict=True):
        if float(torch.rand(())) * float(q[token]) * lenience >= float(own[token]):
            break
        kept += 1
    rest = p[kept]
    if kept < size:
        left = (rest - lenience * drafted[kept]).clamp_min(0)
        rest = left if bool(left.sum() > 0) else rest
    row = torch.cat([text[:, : row.shape[1] + kept], _one(rest / rest.sum(), temperature)[None, None]], 1)
    for reader in (judge, writer):
        reader.forget(row.shape[1] - 1)
    return row, Count(kept + 1, 1, kept, int(kept < size))


def _until(row: Tensor, start: int, end: int | None) -> tuple[Tensor, bool]:
    """The text [1, T] up to the first `end` from place `start` on, and whether there is one."""
    found = (row[0, start:] == end).nonzero() if end is not None else row[0, :0]
    return (row[:, : start + int(found[0]) + 1], True) if len(found) else (row, False)


def _filled(row: Tensor, length: int, end: int | None) -> Tensor:
    """The text [1, T] with its end repeated up to a length."""
    return row if end is None else F.pad(row, (0, length - row.shape[1]), value=end)


def _one(p: Tensor, temperature: float) -> Tensor:
    """A token of the distribution p [V]: []."""
    return torch.multinomial(p, 1)[0] if temperature > 0 else p.argmax()


@torch.no_grad()
def assisted(
    target: Any,
    draft: Any,
    prompts: Tensor,
    length: int,
    temperature: float = 0.0,
    *,
    block: int = 5,
    end: int | None = None,
) -> tuple[Tensor, Count]:
    """The same by transformers' own assisted generation, of two of its models over one vocabulary.

    temperature: >= 0; at 0 both decode greedily. block: tokens drafted a call, >= 1, the same for every call.
    end: as in `speculate`. No text may hold the models' padding token: the draft would not see it.
    """
    for name, model in (("target", target), ("draft", draft)):
        if not hasattr(model, "generate"):
            raise BadInput(f"the {name} is a {type(model).__name__}, which cannot `generate`: use `speculate` for it")
    if target is draft:
        raise BadInput("target and draft are one and the same network, whose calls cannot be told apart")
    require(block >= 1, "block", block, ">= 1")
    require(temperature >= 0, "temperature", temperature, ">= 0")
    how: dict[str, Any] = {"do_sample": temperature > 0, "max_new_tokens": length, "eos_token_id": end}
    if end is None:  # nor does the end that a model knows of its own stop it
        how |= {"min_new_tokens": length}
        del how["eos_token_id"]
    if temperature > 0:
        how |= {"temperature": temperature, "top_k": 0, "top_p": 1.0}
    settings = draft.generation_config
    names = ("num_assistant_tokens", "num_assistant_tokens_schedule", "assistant_confidence_threshold")
    before = {name: getattr(settings, name, None) for name in names}
    read: list[tuple[int, int]] = []  # places that each call of the target reads, and how long the text is then

    def note(_module: nn.Module, _args: Any, given: dict[str, Any], out: Any) -> None:
        read.append((int(given["input_ids"].shape[1]), int(out.past_key_values.get_seq_length())))

    done, total = [], Count()
    hook = target.register_forward_hook(note, with_kwargs=True)
    try:
        for name, value in zip(names, (block, "constant", 0.0), strict=True):
            setattr(settings, name, value)
        with evaluating(target, draft):
            for row in prompts.split(1):
                read.clear()
                mask = torch.ones_like(row)
                stop = int(row.shape[1]) + length
                text, ended = _until(
                    target.generate(row, attention_mask=mask, assistant_model=draft, **how), row.shape[1], end
                )
                done.append(_filled(text, stop, end))
                total = total + _counted(read, int(row.shape[1]), int(text.shape[1]), ended)
    finally:
        hook.remove()
        for name, value in before.items():
            setattr(settings, name, value)
    return torch.cat(done), total


def _counted(read: list[tuple[int, int]], prompt: int, end: int, ended: bool) -> Count:
    """What happened in one text, from what each call of the target read: its first reads the prompt as well. ended:
    before there was no more room, with a token that counts as the target's own."""
    sizes = [places - (1 if i else prompt) for i, (places, _) in enumerate(read)]
    before = [length - size for size, (_, length) in zip(sizes, read, strict=True)]
    kept = [after - start - 1 for start, after in zip(before, [*before[1:], end], strict=True)]
    judged = list(zip(kept, sizes, strict=True))
    refused = sum(k < size for k, size in (judged[:-1] if ended else judged))
    return Count(end - prompt, len(read), sum(kept), refused)
