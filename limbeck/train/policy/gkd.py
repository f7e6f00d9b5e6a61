"""A language model is taught on texts that it wrote itself, where it makes its own mistakes."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from limbeck.core.card import method, require
from limbeck.core.generate import sample
from limbeck.core.headloss import Term
from limbeck.core.loop import Clock, Turn
from limbeck.core.nets import Batch, Nets
from limbeck.core.policy import completions, divergence, divergence_of_heads, rollout, starts
from limbeck.core.reduce import mean
from limbeck.core.voices import compared, hear, spare


@method(
    paper="Agarwal et al. 2023, algorithm 1 and section 3",
    year=2023,
    arxiv="2306.13649",
    differs="one draw of on-policy or not a batch, not a sequence; the reinforcement-learning term is left out",
)
@dataclass(frozen=True)
class GKD:
    """Mean over completion tokens of D(p_T || p_S)(y_t | x, y_<t), with y written by the student, or from the data.

    D is the generalised Jensen-Shannon divergence b KL(p_T || m) + (1 - b) KL(p_S || m), m = b p_T + (1 - b) p_S, and
    at its ends the forward KL(p_T || p_S) (b = 0) and the reverse KL(p_S || p_T) (b = 1). No gradient flows through the
    writing.

    on_policy: lambda in [0, 1], the probability that a batch is continued by the student; 0 is supervised, 1 always.
    beta: b in [0, 1].
    temperature: of both distributions in D, > 0.
    sampling: temperature of the student's own texts, > 0; the paper's is 1.
    prompt: tokens at the start of each text that are given, >= 1; more where the batch's mask begins later: what comes
        before its first True is all prompt.
    end: id of the token that ends a text, -1 for none; what a student writes after it does not count.

    *Needs*: nets.teacher and nets.student over one vocabulary, batches shifted by the collator (labels are the next
    tokens). *Relates to*: use `distill` with `forward_kl` or `reverse_kl` when sampling is too slow: T tokens cost T
    forward passes, of one place each for transformers models and of the whole text for others. `distillspec` takes any
    other loss in the place of D.
    *Differs*: the limits at b = 0 and 1 are D / b and D / (1 - b), so that D jumps there, as in later implementations.
    """

    on_policy: float = 0.5
    beta: float = 0.5
    temperature: float = 1.0
    sampling: float = 1.0
    prompt: int = 1
    end: int = -1

    def __post_init__(self) -> None:
        require(0 <= self.on_policy <= 1, "on_policy", self.on_policy, "in [0, 1]")
        require(0 <= self.beta <= 1, "beta", self.beta, "in [0, 1]")
        require(self.temperature > 0, "temperature", self.temperature, "> 0")
        require(self.sampling > 0, "sampling", self.sampling, "> 0")
        require(self.prompt >= 1, "prompt", self.prompt, ">= 1")

    def divergence(self, student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
        """D for each token: [..., V] x 2 -> [...]."""
        return divergence(student_logits, teacher_logits, self.beta, self.temperature)

    def terms(self) -> list[Term]:
        """D from hidden states."""
        return [divergence_of_heads(self.beta, self.temperature)]

    def setup(self, nets: Nets, probe: Batch) -> None:
        """See whose logits can be spared."""
        spare(nets, probe, "student", "teacher")

    def starts(self, batch: Batch) -> Tensor:
        """How many tokens of each text are its prompt: [B]."""
        return starts(batch, self.prompt)

    def rollout(self, nets: Nets, batch: Batch) -> Batch:
        """The batch with its completions written anew by the student, from the same prompts and to the same length."""
        return rollout(
            batch, partial(sample, nets.student, temperature=self.sampling), prompt=self.prompt, end=self.end
        )

    def step(self, nets: Nets, batch: Batch, clock: Clock) -> Iterator[Turn]:
        """One turn of the student, on its own texts or on the given ones."""
        if float(torch.rand(())) < self.on_policy:
            batch = self.rollout(nets, batch)
        mask = completions(batch, self.prompt)
        teacher, student = hear(nets, "teacher", batch), hear(nets, "student", batch)
        apart = compared(student, teacher, self.divergence, self.terms(), mask, batch.get("words"))
        yield "student", mean(apart, mask)
