"""The student's text is corrected at its first bad mistake and written on from there, before anybody learns from it."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from limbeck.core.card import method, require
from limbeck.core.generate import sample
from limbeck.core.loop import Clock, Turn
from limbeck.core.maths import kl, log_probs
from limbeck.core.nets import Batch, Nets
from limbeck.core.policy import asked, completions, rollout, starts, text, told_anew, vocabulary
from limbeck.core.reduce import Part, mean
from limbeck.core.voices import of_one_height
from limbeck.losses.logits.ce import ce


@method(
    paper="Liu et al. 2024, section 3.1",
    year=2024,
    arxiv="2407.10068",
    differs="the sequence level alone: the token level's learned limits and the span level, which needs a chunker, are "
    "left out, the whole KL(teacher || student) stands in their place",
)
@dataclass(frozen=True)
class MgsrLLM:
    """supervised CE on the data + mean KL(p_T || p_S) over the completion tokens of a corrected text of the student.

    Both models read what the student wrote. At the first token y_t where max_v p_T(v) - p_T(y_t) > threshold, the
    teacher's likeliest token takes its place, and the student writes the rest again; `rounds` times.

    threshold: in [0, 1]; 1 corrects nothing, which is `gkd` at beta 0.
    rounds: corrections of each text, >= 1; the paper's is 1.
    supervised: weight >= 0 of the cross-entropy with the data.
    sampling: temperature of the student's texts, > 0.
    prompt: tokens at the start of each text that are given, >= 1; more where the batch's mask begins later.
    end: id of the token that ends a text, -1 for none.

    *Needs*: nets.teacher and nets.student over one vocabulary. *Relates to*: `skd_speculative` corrects every token
    that the teacher would not say. *Differs*: see the card.
    """

    threshold: float = 0.5
    rounds: int = 1
    supervised: float = 1.0
    sampling: float = 1.0
    prompt: int = 1
    end: int = -1

    def __post_init__(self) -> None:
        require(0 <= self.threshold <= 1, "threshold", self.threshold, "in [0, 1]")
        require(self.supervised >= 0, "supervised", self.supervised, ">= 0")
        require(self.sampling > 0, "sampling", self.sampling, "> 0")
        for name in ("rounds", "prompt"):
            require(getattr(self, name) >= 1, name, getattr(self, name), ">= 1")

    def faults(self, teacher_logits: Tensor, labels: Tensor, mask: Tensor) -> Tensor:
        """Place of the first bad mistake of each text: [B]; the number of places where there is none."""
        p = log_probs(teacher_logits).exp()
        gap = p.amax(-1) - p.gather(-1, labels.unsqueeze(-1)).squeeze(-1)
        bad = (gap > self.threshold) & mask
        return torch.where(bad.any(1), bad.int().argmax(1), labels.shape[1])

    def corrected(self, nets: Nets, new: Batch, begun: Tensor) -> Batch:
        """The texts with their first mistake corrected and the rest written again. begun: [B], length of prompts."""
        words = vocabulary(new)
        logits, mask, tokens = asked(nets, "teacher", new)[..., :words], completions(new), text(new)
        first, length = self.faults(logits, new["labels"], mask), new["inputs"].shape[1]
        wrong = first < length
        at = first.clamp_max(length - 1)
        row = torch.arange(len(tokens), device=tokens.device)
        tokens[row, at + 1] = torch.where(wrong, logits[row, at].argmax(-1), tokens[row, at + 1])
        kept = torch.where(wrong, first + 2, length + 1)
        if self.end >= 0:  # a text that ends with the correction is not written on
            kept = torch.where(wrong & (tokens[row, at + 1] == self.end), length + 1, kept)
            closed = wrong[:, None] & (torch.arange(length + 1, device=row.device) > at[:, None] + 1)
            tokens = torch.where(closed & (tokens[row, at + 1] == self.end)[:, None], self.end, tokens)
        longest = int(kept.max())
        end = self.end if self.end >= 0 else None
        rest = length + 1 - longest
        tokens = sample(nets.student, tokens[:, :longest], rest, self.sampling, lengths=kept, end=end, words=words)
        return told_anew(new, tokens, begun, self.end)

    def step(self, nets: Nets, batch: Batch, clock: Clock) -> Iterator[Turn]:
        """One turn of the student."""
        writer = partial(sample, nets.student, temperature=self.sampling)
        new, begun = rollout(batch, writer, prompt=self.prompt, end=self.end), starts(batch, self.prompt)
        for _ in range(self.rounds):
            new = self.corrected(nets, new, begun)
        student, teacher = nets.run("student", new)["logits"], nets.run("teacher", new)["logits"]
        student, teacher = of_one_height(student, teacher, new.get("words"))
        parts: dict[str, Part] = {"kl": mean(kl(student, teacher), completions(new, self.prompt))}
        if self.supervised:
            given = nets.run("student", batch)["logits"]
            parts["ce"] = self.supervised * mean(ce(given, batch["labels"]), batch.get("mask"))
        yield "student", parts
