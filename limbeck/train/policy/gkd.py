"""A language model is taught on texts that it wrote itself, where it makes its own mistakes."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from limbeck.core.card import method, require
from limbeck.core.generate import sample
from limbeck.core.loop import Clock, Turn
from limbeck.core.maths import js, kl, reverse_kl
from limbeck.core.nets import Batch, Nets
from limbeck.core.reduce import mean


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
    tokens). *Relates to*: use `distill` with `forward_kl` or `reverse_kl` when sampling is too slow: a text of T tokens
    costs T forward passes here, since any module that maps tokens to logits will do.
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
        if self.beta == 0:
            return kl(student_logits, teacher_logits, self.temperature)
        if self.beta == 1:
            return reverse_kl(student_logits, teacher_logits, self.temperature)
        return js(student_logits, teacher_logits, self.beta, self.temperature)

    def starts(self, batch: Batch) -> Tensor:
        """How many tokens of each text are its prompt: [B]; one more than there are inputs when none is free."""
        inputs: Tensor = batch["inputs"]
        length = inputs.shape[1]
        free: Tensor = batch["mask"].bool() if "mask" in batch else torch.ones_like(inputs, dtype=torch.bool)
        first = torch.where(free.any(1), free.int().argmax(1) + 1, length + 1)
        return first.clamp(min(self.prompt, length + 1))

    def rollout(self, nets: Nets, batch: Batch) -> Batch:
        """The batch with its completions written anew by the student, from the same prompts and to the same length."""
        text, starts = torch.cat([batch["inputs"], batch["labels"][:, -1:].clamp_min(0)], 1), self.starts(batch)
        longest = int(starts.max())
        end = self.end if self.end >= 0 else None
        text = sample(nets.student, text[:, :longest], text.shape[1] - longest, self.sampling, lengths=starts, end=end)
        inputs, labels = text[:, :-1], text[:, 1:]
        written = torch.arange(text.shape[1], device=text.device) >= starts[:, None]
        mask = written[:, 1:]
        if end is not None:
            mask = mask & ((written[:, :-1] & (inputs == end)).cumsum(1) == 0)
        new: Batch = {**batch, "inputs": inputs, "labels": labels, "mask": mask}
        if "attention_mask" in batch:
            new["attention_mask"] = torch.ones_like(inputs)
        return new

    def step(self, nets: Nets, batch: Batch, clock: Clock) -> Iterator[Turn]:
        """One turn of the student, on its own texts or on the given ones."""
        if float(torch.rand(())) < self.on_policy:
            batch = self.rollout(nets, batch)
        place = torch.arange(1, batch["inputs"].shape[1] + 1, device=batch["inputs"].device)
        mask = place >= self.starts(batch)[:, None]
        if "mask" in batch:
            mask = mask & batch["mask"].bool()
        student, teacher = nets.run("student", batch)["logits"], nets.run("teacher", batch)["logits"]
        yield "student", mean(self.divergence(student, teacher), mask)
