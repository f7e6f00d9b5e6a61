"""Any loss between student and teacher, on texts of the student, of the teacher, or given: drafts for fast decoding."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch

from limbeck.core.card import method, require
from limbeck.core.errors import BadInput
from limbeck.core.generate import sample
from limbeck.core.loop import Clock, Turn
from limbeck.core.nets import Batch, Nets
from limbeck.core.pair import Pair, parse_all
from limbeck.core.policy import completions, rollout


@method(
    paper="Zhou et al. 2023, section 4 and algorithm A.1",
    year=2023,
    arxiv="2310.08461",
    differs="one draw a batch decides who continues it",
    row=("distillspec", "domain_draft_training"),
)
@dataclass(frozen=True)
class DistillSpec:
    """Weighted sum of losses between draft and target, means over the completion tokens of texts from a mix of writers.

    In speculative decoding a draft q is as good as its acceptance, sum_v min(p_v, q_v) = 1 - TV(p, q) a place; texts
    that the draft writes itself show it the places that it will be asked about.

    match: losses as names, {name: {knob: value, weight: number}} or callables; which is best depends on task and
        decoding in the paper: forward or reverse KL, Jensen-Shannon, total variation. "ce" on texts of the target is
        training without its distributions (black-box).
    draft: probability in [0, 1] that a batch is continued by the student.
    target: probability in [0, 1] that it is continued by the teacher; the rest keeps its own text.
    sampling: temperature of both writers, >= 0; at 0 they write greedily. Take that of the decoding to come.
    prompt: tokens at the start of each text that are given, >= 1; more where the batch's mask begins later.
    end: id of the token that ends a text, -1 for none.

    *Needs*: nets.teacher (the target) and nets.student (the draft) over one vocabulary, or losses between two
    tokenizers, such as `gold` or `alm`, for which every text of the draft is read anew in the teacher's tokens (the
    target then cannot write). *Relates to*: the measure `acceptance` for what came of it; `gkd` is the same with one
    divergence. *Differs*: see the card.
    """

    match: tuple[Any, ...] = ("forward_kl",)
    draft: float = 1.0
    target: float = 0.0
    sampling: float = 1.0
    prompt: int = 1
    end: int = -1

    def __post_init__(self) -> None:
        for name in ("draft", "target"):
            require(0 <= getattr(self, name) <= 1, name, getattr(self, name), "in [0, 1]")
        require(self.draft + self.target <= 1 + 1e-9, "target", self.target, f"at most 1 - draft = {1 - self.draft}")
        require(self.sampling >= 0, "sampling", self.sampling, ">= 0")
        require(self.prompt >= 1, "prompt", self.prompt, ">= 1")

    @cached_property
    def pair(self) -> Pair:
        """Draft, target, and the losses between them."""
        return Pair("student", "teacher", parse_all(self.match))

    def setup(self, nets: Nets, probe: Batch) -> None:
        """Check that every loss finds what it asks for, and build the losses that own weights."""
        if self.target and "teacher_inputs" in probe:
            raise BadInput("the teacher cannot write for a student with another tokenizer: `target` must be 0")
        self.pair.own(nets, probe)

    def texts(self, nets: Nets, batch: Batch) -> Batch:
        """The batch, with its completions written anew by whoever is drawn."""
        r = float(torch.rand(()))
        if r >= self.draft + self.target:
            mask = completions(batch, self.prompt)
            anew = self.prompt > 1 and "retell" in batch  # so that its mask leaves out the same prompts
            return {**batch, "mask": mask, **(batch["retell"](batch["inputs"], batch["labels"], mask) if anew else {})}
        writer = nets.student if r < self.draft else nets.teacher
        write = partial(sample, writer, temperature=self.sampling)
        return rollout(batch, write, prompt=self.prompt, end=self.end, retell=True)

    def step(self, nets: Nets, batch: Batch, clock: Clock) -> Iterator[Turn]:
        """One turn of the draft."""
        yield "student", self.pair.parts(nets, self.texts(nets, batch), clock.progress)
