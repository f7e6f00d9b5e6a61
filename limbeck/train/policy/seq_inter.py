"""Of the answers that the teacher holds for likely, the student learns the one that is most like the data's."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from limbeck.core.beam import Beams, best, keep_texts, with_texts
from limbeck.core.card import method, require
from limbeck.core.loop import Clock, Turn
from limbeck.core.nets import Batch, Nets
from limbeck.core.ngrams import sentence_bleu
from limbeck.core.pair import Pair, parse_all
from limbeck.core.policy import completions, starts


@method(
    paper="Kim and Rush 2016, section 3.3",
    year=2016,
    arxiv="1606.07947",
    code="harvardnlp/seq2seq-attn@2d36b43:s2sa/beam.lua and s2sa/scorers/bleu.lua",
    differs="for a language model that reads prompt and answer as one text; among equally good texts the likelier one; "
    "an ended text keeps its place in the beam, where the code sets it aside and continues another",
    row="seqkd",
)
@dataclass(frozen=True)
class SeqInter:
    """Mean over completion tokens of -log p_S(y_t | x, y_<t), y = argmax BLEU(y, y*) over the teacher's K-best list.

    y* is the data's answer, and BLEU that of one text, over its tokens without the end: the first n-gram order without
    a match counts half a one, the next a quarter. Texts are written when an example is first met, and kept.

    match: losses on the chosen texts, as names, {name: {knob: value, weight: number}} or callables; "ce" is the
        paper's.
    beams: K >= 1, texts to choose from; 1 is `seqkd` with one beam.
    order: longest n-grams that count, >= 1.
    penalty: a >= 0, of the search's log p(y | x) / |y|^a; 0 is the paper's.
    prompt: tokens at the start of each text that are given, >= 1; more where the batch's mask begins later.
    end: id of the token that ends a text, -1 for none.

    *Needs*: what `seqkd` needs, and K times its memory while it writes. *Relates to*: the paper trains by `seqkd` first
    and goes on with this at a small learning rate: two stages of a recipe. *Differs*: see the card.
    """

    match: tuple[Any, ...] = ("ce",)
    beams: int = 35
    order: int = 4
    penalty: float = 0.0
    prompt: int = 1
    end: int = -1

    def __post_init__(self) -> None:
        for name in ("beams", "order", "prompt"):
            require(getattr(self, name) >= 1, name, getattr(self, name), ">= 1")
        require(self.penalty >= 0, "penalty", self.penalty, ">= 0")

    @cached_property
    def pair(self) -> Pair:
        """Student, teacher, and the losses between them."""
        return Pair("student", "teacher", parse_all(self.match))

    def setup(self, nets: Nets, probe: Batch) -> None:
        """Make room for the texts, check that every loss finds what it asks for, and build those that own weights."""
        keep_texts(nets, probe)
        self.pair.own(nets, probe)

    def likeness(self, found: Beams, batch: Batch) -> Tensor:
        """BLEU of each text with the data's answer, [B, K], in [0, 1]; -1 where the list has no further text."""
        mask, begun = completions(batch, self.prompt), starts(batch, self.prompt).tolist()
        scores = torch.full(found.logprobs.shape, -1.0)
        for b, start in enumerate(begun):
            wanted = [i for i in batch["labels"][b][mask[b]].tolist() if i != self.end]
            for k in range(scores.shape[1]):
                if found.logprobs[b, k].isfinite():
                    written = found.tokens[b, k, start : start + int(found.counts[b, k])].tolist()
                    scores[b, k] = sentence_bleu([i for i in written if i != self.end], wanted, self.order)
        return scores

    def write(self, nets: Nets, batch: Batch) -> Tensor:
        """The chosen text for each prompt: [B, T + 1]."""
        found = best(nets.teacher, batch, self.beams, penalty=self.penalty, prompt=self.prompt, end=self.end)
        chosen = self.likeness(found, batch).argmax(1).to(found.tokens.device)  # the first of the best is the likeliest
        return found.tokens[torch.arange(len(chosen), device=chosen.device), chosen]

    def step(self, nets: Nets, batch: Batch, clock: Clock) -> Iterator[Turn]:
        """One turn of the student."""
        batch = with_texts(nets, batch, lambda new: self.write(nets, new), prompt=self.prompt, end=self.end)
        yield "student", self.pair.parts(nets, batch, clock.progress)
