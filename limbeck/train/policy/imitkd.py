"""The teacher says what comes next after prefixes that are more and more often the student's own (DAgger)."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from limbeck.core.card import method, require
from limbeck.core.generate import sample
from limbeck.core.headloss import Head, Sparse, Term, divergences, head_loss
from limbeck.core.loop import Clock, Turn
from limbeck.core.maths import log_probs
from limbeck.core.nets import Batch, Nets
from limbeck.core.policy import SHARES, completions, either, rollout, share
from limbeck.core.reduce import mean
from limbeck.core.voices import Voice, compared, hear, likeliest, spare, words_of_both


@method(
    paper="Lin et al. 2020, algorithm 1 and eq. 6",
    year=2020,
    arxiv="2009.07253",
    code="asappresearch/imitkd@8b9fadd:generation/distillation.py",
    differs="the code keeps the data's next word on data prefixes when the teacher's greedy word is the target; the "
    "paper, followed here, asks the teacher on both; for a language model instead of a translator",
)
@dataclass(frozen=True)
class ImitKD:
    """-sum_v p*(v) log p_S(v) on prefixes y_<t of the data (with probability b_t, each text by itself) or the student.

    p* is the teacher's distribution over its K likeliest tokens, renormalised: its greedy word at K = 1. b_t falls
    from 1: exponentially to 1/200, along a line to 0, or along a sigmoid.

    schedule: of b_t: "exponential" (200^-progress, the paper's), "linear", "sigmoid", "data" (1: word-level
        distillation) or "student" (0: always on its own prefixes).
    candidates: K >= 0; 1 is the paper's optimal action, 0 takes the whole distribution (its variant ImitKD-full).
    sampling: temperature of the student's own texts, >= 0; at 0 it writes greedily.
    prompt: tokens at the start of each text that are given, >= 1; more where the batch's mask begins later.
    end: id of the token that ends a text, -1 for none.

    *Needs*: nets.teacher and nets.student over one vocabulary. *Relates to*: `gkd` for other divergences at a constant
    share; `seqkd` data as a start, as in the paper. *Differs*: see the card.
    """

    schedule: str = "exponential"
    candidates: int = 1
    sampling: float = 0.0
    prompt: int = 1
    end: int = -1

    def __post_init__(self) -> None:
        require(self.schedule in SHARES, "schedule", self.schedule, f"one of {', '.join(SHARES)}")
        require(self.candidates >= 0, "candidates", self.candidates, ">= 0")
        require(self.sampling >= 0, "sampling", self.sampling, ">= 0")
        require(self.prompt >= 1, "prompt", self.prompt, ">= 1")

    def loss(self, student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
        """Cross-entropy with the oracle for each token: [..., V] x 2 -> [...]."""
        log_q = log_probs(student_logits)
        if not self.candidates:
            return -(log_probs(teacher_logits.detach()).exp() * log_q).sum(-1)
        best = teacher_logits.detach().topk(self.candidates, -1)
        return -(log_probs(best.values).exp() * log_q.gather(-1, best.indices)).sum(-1)

    def values(self, student: Voice, teacher: Voice, mask: Tensor, words: Tensor | None = None) -> Tensor:
        """The same, where logits may be spared: [B, T]."""
        term = Term(divergences.cross_entropy)
        if not self.candidates or not isinstance(student, Head):
            return compared(student, teacher, self.loss, [term], mask, words)
        shared = words_of_both(student, teacher, words)
        best = likeliest(teacher, self.candidates, mask, shared)
        oracle = Sparse(best.ids, log_probs(best.logits), "none")
        (found,) = head_loss(student, oracle, [term], mask=mask, words=shared)
        return found

    def setup(self, nets: Nets, probe: Batch) -> None:
        """See whose logits can be spared."""
        spare(nets, probe, "student", "teacher")

    def mixed(self, nets: Nets, batch: Batch, progress: float) -> Batch:
        """The batch with the completions of some texts written by the student."""
        data = torch.rand(len(batch["inputs"]), device=batch["inputs"].device) < share(self.schedule, progress)
        if data.all():
            return batch
        new = rollout(batch, partial(sample, nets.student, temperature=self.sampling), prompt=self.prompt, end=self.end)
        return either(data, {**batch, "mask": completions(batch, self.prompt)}, new)

    def step(self, nets: Nets, batch: Batch, clock: Clock) -> Iterator[Turn]:
        """One turn of the student."""
        batch = self.mixed(nets, batch, clock.progress)
        mask = completions(batch, self.prompt)
        teacher, student = hear(nets, "teacher", batch), hear(nets, "student", batch)
        yield "student", mean(self.values(student, teacher, mask, batch.get("words")), mask)
