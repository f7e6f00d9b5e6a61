"""The student writes, the teacher only says how likely each of its words is, and that is the reward."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from limbeck.core.card import method, require
from limbeck.core.generate import sample
from limbeck.core.loop import Clock, Stage, Turn
from limbeck.core.nets import Batch, Nets
from limbeck.core.partition import rows
from limbeck.core.policy import completions, rollout, to_go, warmed_up
from limbeck.core.reduce import mean
from limbeck.core.voices import hear, logprobs, overhear, spare, supervised


@method(
    paper="Lu and Thinking Machines Lab 2025, On-Policy Distillation",
    year=2025,
    code="thinking-machines-lab/tinker-cookbook@9dfcc3a:tinker_cookbook/distillation/train_on_policy.py",
    differs="mean over completion tokens where the code sums them; no task reward",
)
@dataclass(frozen=True)
class OnPolicyDistillation:
    """Mean over completion tokens of -ratio_t A_t, A_t = coefficient (log p(y_t) - log q(y_t)), y ~ q the student.

    ratio_t = q_now(y_t) / q(y_t). The mean of -A_t over y_t is KL(q || p) after its prefix, and so is, at the first
    update, that of the gradient. Only log-probabilities of written tokens are asked of the teacher.

    coefficient: factor on the advantage, > 0.
    discount: in [0, 1], of the rewards that come after a token; 0 looks at the token alone.
    samples: texts written for each prompt, >= 1.
    updates: optimiser steps on each written batch, >= 1.
    sampling: temperature of the writing, > 0; q is the student at this temperature, p the teacher at 1.
    supervised: share in [0, 1) of the updates that first train the student on the data's own words, a stage of its own.
    prompt: tokens at the start of each text that are given, >= 1; more where the batch's mask begins later.
    end: id of the token that ends a text, -1 for none.

    *Needs*: nets.teacher and a student over one vocabulary that can write, trained before or by `supervised`.
    *Relates to*: `gkd` at beta 1 is its mean over all words and far less noisy, where the teacher's whole distribution
    is at hand; `mini_llm` for the future's rewards. *Differs*: see the card.
    """

    coefficient: float = 1.0
    discount: float = 0.0
    samples: int = 1
    updates: int = 1
    sampling: float = 1.0
    supervised: float = 0.0
    prompt: int = 1
    end: int = -1

    def __post_init__(self) -> None:
        require(0 <= self.supervised < 1, "supervised", self.supervised, "in [0, 1)")
        for name in ("coefficient", "sampling"):
            require(getattr(self, name) > 0, name, getattr(self, name), "> 0")
        require(0 <= self.discount <= 1, "discount", self.discount, "in [0, 1]")
        for name in ("samples", "updates", "prompt"):
            require(getattr(self, name) >= 1, name, getattr(self, name), ">= 1")

    def advantages(self, log_q: Tensor, log_p: Tensor, mask: Tensor) -> Tensor:
        """A of each written token: [B, T]."""
        return self.coefficient * to_go(log_p - log_q, mask, self.discount)

    def loss(self, now: Tensor, log_q: Tensor, advantages: Tensor) -> Tensor:
        """-ratio A of each written token: [B, T]. now: log q_now, which the gradient flows to."""
        return -(now - log_q).exp() * advantages

    def setup(self, nets: Nets, probe: Batch) -> None:
        """See whose logits can be spared."""
        spare(nets, probe, "student", "teacher")

    def stages(self, nets: Nets, steps: int) -> Iterator[Stage]:
        """The student learns to write before its writing is judged."""
        return warmed_up(self.supervised, steps)

    def step(self, nets: Nets, batch: Batch, clock: Clock) -> Iterator[Turn]:
        """Write once, then `updates` turns of the student."""
        if self.supervised and clock.stage == 0:
            yield "student", supervised(nets, batch)
            return
        index = torch.arange(len(batch["inputs"]), device=batch["inputs"].device).repeat_interleave(self.samples)
        writer = partial(sample, nets.student, temperature=self.sampling)
        new = rollout(rows(batch, index), writer, prompt=self.prompt, end=self.end)
        mask, labels = completions(new, self.prompt), new["labels"]
        log_q = logprobs(overhear(nets, "student", new), labels, mask, self.sampling)
        advantages = self.advantages(log_q, logprobs(hear(nets, "teacher", new), labels, mask), mask)
        for _ in range(self.updates):
            now = logprobs(hear(nets, "student", new), labels, mask, self.sampling, weights=advantages)
            yield "student", mean(self.loss(now, log_q, advantages), mask)
