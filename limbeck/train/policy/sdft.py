"""A model that has seen the demonstration teaches itself without it, on texts that it writes without it."""

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from limbeck.core.card import method, require
from limbeck.core.generate import sample
from limbeck.core.loop import Clock, Turn
from limbeck.core.nets import Batch, Nets
from limbeck.core.policy import completions, divergence, divergence_of_heads, rollout, text
from limbeck.core.reduce import mean
from limbeck.core.state import ema_update
from limbeck.core.voices import compared, hear, last, spare


@method(
    paper="Shenfeld et al. 2026, section 3",
    year=2026,
    arxiv="2601.19897",
    code="huggingface/trl@f2cd577:trl/experimental/sdft/loss_utils.py",
    differs="the code is another library's, as the authors' could not be had; the demonstration is shown as plain text "
    "before the prompt, without a chat template; the whole vocabulary is compared, not its top; one text a prompt",
)
@dataclass(frozen=True)
class SDFT:
    """Mean over completion tokens of D(pi'(. | c, x, y_<t) || pi(. | x, y_<t)), y ~ pi(. | x), c the demonstration.

    c is the batch's own text: prompt and completion. D is the reverse KL(pi || pi') at beta 1. pi' is an average of the
    student over time, or nets.teacher when there is one.

    beta: of the generalised Jensen-Shannon divergence as in `gkd`: 1 is the paper's reverse KL, 0 the forward.
    rate: in [0, 1], how far the average moves to the student after each update; 0 keeps the first student, 1 copies it.
    skip: tokens at the start of each completion that do not count, >= 0, where a model may say "as in the example".
    between: ids of tokens put between the demonstration and the prompt, such as those of a blank line.
    sampling: temperature of the writing, > 0.
    prompt: tokens at the start of each text that are given, >= 1; more where the batch's mask begins later.
    end: id of the token that ends a text, -1 for none.

    *Needs*: a student that follows an example in its context, and reads more than twice the length of a text; texts
    that demonstrate the task. *Relates to*: `distill` with "ce" on the same texts learns the task faster and forgets
    more of the rest. *Differs*: see the card.
    """

    beta: float = 1.0
    rate: float = 0.05
    skip: int = 0
    between: tuple[int, ...] = ()
    sampling: float = 1.0
    prompt: int = 1
    end: int = -1

    def __post_init__(self) -> None:
        for name in ("beta", "rate"):
            require(0 <= getattr(self, name) <= 1, name, getattr(self, name), "in [0, 1]")
        require(self.skip >= 0, "skip", self.skip, ">= 0")
        require(self.sampling > 0, "sampling", self.sampling, "> 0")
        require(self.prompt >= 1, "prompt", self.prompt, ">= 1")

    def setup(self, nets: Nets, probe: Batch) -> None:
        """Begin the average when there is no teacher, and see whose logits can be spared."""
        if "teacher" not in nets:
            nets.wiser = copy.deepcopy(nets.student)
            nets.freeze("wiser")
        spare(nets, probe, "student", "teacher" if "teacher" in nets else "wiser")

    def shown(self, batch: Batch, new: Batch) -> Batch:
        """The new texts with the demonstration before each: inputs [B, T + 1 + len(between) + T]."""
        told, written = text(batch), new["inputs"]
        between = torch.tensor(self.between, dtype=told.dtype, device=told.device).expand(len(told), -1)
        out: Batch = {"inputs": torch.cat([told, between, written], 1)}
        if "attention_mask" in batch:
            seen = batch["attention_mask"]
            last = batch["mask"][:, -1:].to(seen) if "mask" in batch else torch.ones_like(seen[:, :1])
            out["attention_mask"] = torch.cat([seen, last, torch.ones_like(between), new["attention_mask"]], 1)
        return out

    def counted(self, new: Batch) -> Tensor:
        """Where a token counts: [B, T]."""
        mask = completions(new, self.prompt)
        return mask & (mask.cumsum(1) > self.skip)

    def step(self, nets: Nets, batch: Batch, clock: Clock) -> Iterator[Turn]:
        """One turn of the student."""
        writer = partial(sample, nets.student, temperature=self.sampling)
        new = rollout(batch, writer, prompt=self.prompt, end=self.end)
        teacher, mask = "teacher" if "teacher" in nets else "wiser", self.counted(new)
        wise = last(hear(nets, teacher, self.shown(batch, new)), new["inputs"].shape[1])
        student, terms = hear(nets, "student", new), [divergence_of_heads(self.beta)]
        values = compared(student, wise, partial(divergence, beta=self.beta), terms, mask, batch.get("words"))
        yield "student", mean(values, mask)

    def after(self, nets: Nets, player: str, clock: Clock) -> None:
        """Move the average."""
        if "wiser" in nets:
            ema_update(nets.wiser, nets.student, 1 - self.rate)
