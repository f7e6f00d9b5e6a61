"""The teacher writes the answer that it holds for the likeliest, once for each prompt, and the student learns that."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import Tensor

from limbeck.core.beam import best, keep_texts, with_texts
from limbeck.core.card import method, require
from limbeck.core.loop import Clock, Turn
from limbeck.core.nets import Batch, Nets
from limbeck.core.pair import Pair, parse_all


@method(
    paper="Kim and Rush 2016, section 3.2",
    year=2016,
    arxiv="1606.07947",
    code="harvardnlp/seq2seq-attn@2d36b43:s2sa/beam.lua",
    differs="for a language model that reads prompt and answer as one text instead of an encoder and a decoder; an "
    "ended text keeps its place in the beam, where the code sets it aside and continues another",
)
@dataclass(frozen=True)
class SeqKD:
    """Mean over completion tokens of -log p_S(y_t | x, y_<t), y = argmax p_T(y | x) as beam search finds it.

    The mode of the teacher's distribution over whole answers stands for the distribution: it is simpler than the data's
    answers, and what a small student learns of it is nearly all in its own greedy answer. Texts are written when an
    example is first met, and kept.

    match: losses on the teacher's texts, as names, {name: {knob: value, weight: number}} or callables; "ce" is the
        paper's, and with "forward_kl" beside it word- and sequence-level distillation are combined.
    beams: K >= 1, texts that the search keeps; 1 is greedy.
    penalty: a >= 0, of log p(y | x) / |y|^a; 0 is the paper's, above it longer answers are preferred.
    prompt: tokens at the start of each text that are given, >= 1; more where the batch's mask begins later.
    end: id of the token that ends a text, -1 for none.

    *Needs*: nets.teacher and nets.student over one vocabulary; batches with `index`, or every text is written each time
    that it is met; room behind short answers, as a text grows no longer than the batch is wide. *Relates to*: use
    `seq_inter` where the data's answers are good; `forward_kl` with `distill` is the word level; `distillspec` with
    `target: 1` draws the teacher's texts instead. *Differs*: see the card.
    """

    match: tuple[Any, ...] = ("ce",)
    beams: int = 5
    penalty: float = 0.0
    prompt: int = 1
    end: int = -1

    def __post_init__(self) -> None:
        for name in ("beams", "prompt"):
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

    def write(self, nets: Nets, batch: Batch) -> Tensor:
        """The teacher's likeliest text for each prompt: [B, T + 1]."""
        found = best(nets.teacher, batch, self.beams, penalty=self.penalty, prompt=self.prompt, end=self.end)
        return found.tokens[:, 0]

    def step(self, nets: Nets, batch: Batch, clock: Clock) -> Iterator[Turn]:
        """One turn of the student."""
        batch = with_texts(nets, batch, lambda new: self.write(nets, new), prompt=self.prompt, end=self.end)
        yield "student", self.pair.parts(nets, batch, clock.progress)
