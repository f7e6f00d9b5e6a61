"""The student writes its own lessons, and the teacher replaces each word that it would hardly have said itself."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from limbeck.core.card import method, require
from limbeck.core.generate import checked
from limbeck.core.loop import Clock, Turn
from limbeck.core.nets import Batch, Nets
from limbeck.core.policy import completions, divergence, divergence_of_heads, rollout
from limbeck.core.reduce import mean
from limbeck.core.voices import compared, hear, spare


@method(
    paper="Xu et al. 2024, algorithm 1",
    year=2024,
    arxiv="2410.11325",
    code="google-research/google-research@4c42994:speculative_kd/train/ddp_skd.py",
    differs="a batch goes on together after the first place at which a word of any text was replaced, so that blocks "
    "pay for small batches; every text is distributed as if it were alone",
)
@dataclass(frozen=True)
class SKDSpeculative:
    """Mean over completion tokens of D(p_T || p_S)(y_t | x, y_<t), y drafted by the student and checked by the teacher.

    A drafted token stays if it is among the teacher's K likeliest after the same prefix; else a token drawn from the
    teacher takes its place and the student goes on from there. Early on most words are the teacher's (supervised),
    later most are the student's (on-policy), without a schedule.

    top_k: K >= 1; 1 lets only the teacher's greedy word pass, the size of the vocabulary is plain on-policy.
    block: tokens drafted for each call of the teacher, >= 1; changes speed alone.
    on_policy: probability in [0, 1] that a batch is rewritten so; the rest keeps its own text (the paper's mixed SKD).
    beta: of the generalised Jensen-Shannon divergence as in `gkd`: 0 is the forward KL, 1 the reverse.
    sampling, top_p: temperature >= 0 and nucleus in (0, 1] of the student's drafts.
    teacher_sampling, teacher_top_p: the same for the teacher's replacements; temperature 0 is greedy.
    prompt: tokens at the start of each text that are given, >= 1; more where the batch's mask begins later.
    end: id of the token that ends a text, -1 for none.

    *Needs*: nets.teacher and nets.student over one vocabulary. *Relates to*: use `gkd` when the student writes well
    from the start: it asks the teacher once a text. *Differs*: see the card.
    """

    top_k: int = 25
    block: int = 5
    on_policy: float = 1.0
    beta: float = 0.0
    sampling: float = 0.5
    top_p: float = 0.5
    teacher_sampling: float = 0.2
    teacher_top_p: float = 0.5
    prompt: int = 1
    end: int = -1

    def __post_init__(self) -> None:
        for name in ("top_k", "block", "prompt"):
            require(getattr(self, name) >= 1, name, getattr(self, name), ">= 1")
        for name in ("on_policy", "beta"):
            require(0 <= getattr(self, name) <= 1, name, getattr(self, name), "in [0, 1]")
        for name in ("sampling", "teacher_sampling"):
            require(getattr(self, name) >= 0, name, getattr(self, name), ">= 0")
        for name in ("top_p", "teacher_top_p"):
            require(0 < getattr(self, name) <= 1, name, getattr(self, name), "in (0, 1]")

    def setup(self, nets: Nets, probe: Batch) -> None:
        """See whose logits can be spared."""
        spare(nets, probe, "student", "teacher")

    def write(
        self, nets: Nets, prompts: Tensor, length: int, lengths: Tensor, end: int | None, words: int | None = None
    ) -> Tensor:
        """Continue prompts [B, P] by the student under the teacher's eyes: [B, P + length]."""
        found = checked(
            nets.student,
            nets.teacher,
            prompts,
            length,
            self.sampling,
            top_k=self.top_k,
            block=self.block,
            top_p=self.top_p,
            teacher_temperature=self.teacher_sampling,
            teacher_top_p=self.teacher_top_p,
            lengths=lengths,
            end=end,
            words=words,
        )
        return found.tokens

    def step(self, nets: Nets, batch: Batch, clock: Clock) -> Iterator[Turn]:
        """One turn of the student."""
        if float(torch.rand(())) < self.on_policy:
            batch = rollout(batch, partial(self.write, nets), prompt=self.prompt, end=self.end)
        mask, plainly = completions(batch, self.prompt), partial(divergence, beta=self.beta)
        teacher, student = hear(nets, "teacher", batch), hear(nets, "student", batch)
        terms = [divergence_of_heads(self.beta)]
        yield "student", mean(compared(student, teacher, plainly, terms, mask, batch.get("words")), mask)
