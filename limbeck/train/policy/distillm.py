"""Skewed divergences, on the student's own texts as often as its validation loss asks for, most of them used again."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from limbeck.core.bank import everyone
from limbeck.core.card import method, require
from limbeck.core.generate import sample
from limbeck.core.headloss import Term, divergences
from limbeck.core.loop import Clock, Turn
from limbeck.core.maths import skew_kl
from limbeck.core.nets import Batch, Nets
from limbeck.core.policy import Numbers, Replay, completions, rollout
from limbeck.core.reduce import mean
from limbeck.core.voices import Voice, compared, hear, overhear, spare


@method(
    paper="Ko et al. 2024, eqs. 6-7 and algorithm 1",
    year=2024,
    arxiv="2402.03898",
    code="jongwooko/distillm@d47e77f:finetune.py",
    differs="validates on some texts of the batch shown at the start, which are left out of training; both skewed "
    "divergences keep their entropy term, as in the paper; no loss on a second corpus",
)
@dataclass(frozen=True)
class DistiLLM:
    """Mean over completion tokens of a skewed divergence, on data, on fresh texts of the student or on replayed ones.

    SKL = KL(p || a p + (1 - a) q), SRKL = KL(q || (1 - a) p + a q), p the teacher, q the student. With probability phi
    a batch is the student's: fresh with phi (1 - progress), or while the buffer is not full, else from the buffer.
    phi grows by 0.1 whenever the loss on held-out texts is `margin` above that at which it last grew
    (before that, above the first).

    alpha: a in [0, 1), the skew.
    forward: share of SKL in [0, 1]; the rest is SRKL.
    share: phi at the start, in [0, 1]; the code's is 0.
    margin: > 0, by which the validation loss must have risen.
    every: updates between validations, >= 1.
    held: texts for validation, >= 1; at most a batch.
    capacity: texts in the buffer, at least a batch; the oldest leave first.
    sampling: temperature of the student's texts, > 0.
    prompt: tokens at the start of each text that are given, >= 1; more where the batch's mask begins later.
    end: id of the token that ends a text, -1 for none.

    *Needs*: nets.teacher and nets.student over one vocabulary; batches with `index`, or the held texts are trained on.
    *Relates to*: `gkd` for a constant share without replay; `skew_kl` alone by `distill`. *Differs*: see the card.
    """

    alpha: float = 0.1
    forward: float = 0.0
    share: float = 0.0
    margin: float = 0.1
    every: int = 100
    held: int = 8
    capacity: int = 1000
    sampling: float = 1.0
    prompt: int = 1
    end: int = -1

    def __post_init__(self) -> None:
        require(0 <= self.alpha < 1, "alpha", self.alpha, "in [0, 1)")
        for name in ("forward", "share"):
            require(0 <= getattr(self, name) <= 1, name, getattr(self, name), "in [0, 1]")
        for name in ("margin", "sampling"):
            require(getattr(self, name) > 0, name, getattr(self, name), "> 0")
        for name in ("every", "held", "capacity", "prompt"):
            require(getattr(self, name) >= 1, name, getattr(self, name), ">= 1")

    def divergence(self, student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
        """forward SKL + (1 - forward) SRKL of each token: [..., V] x 2 -> [...]."""
        value = torch.zeros(())
        if self.forward:
            value = self.forward * skew_kl(student_logits, teacher_logits, self.alpha)
        if self.forward < 1:
            value = value + (1 - self.forward) * skew_kl(teacher_logits, student_logits, self.alpha)
        return value

    def values(self, student: Voice, teacher: Voice, mask: Tensor, words: Tensor | None = None) -> Tensor:
        """The same, where logits may be spared: [B, T]."""
        both = {divergences.skew_kl: self.forward, divergences.skew_reverse_kl: 1 - self.forward}
        terms = [Term(partial(kind, alpha=self.alpha), weight=share) for kind, share in both.items() if share]
        return compared(student, teacher, self.divergence, terms, mask, words)

    def setup(self, nets: Nets, probe: Batch) -> None:
        """Make the buffer, put the held-out texts aside, and see whose logits can be spared."""
        spare(nets, probe, "student", "teacher")
        require(self.capacity >= len(probe["inputs"]), "capacity", self.capacity, "at least the size of a batch")
        nets.replay = Replay(self.capacity, probe)
        kept = {k: everyone(probe[k])[: self.held] for k in ("inputs", "labels", "index") if k in probe}
        mask = everyone(completions(probe, self.prompt))[: self.held]
        words = {"words": probe["words"]} if "words" in probe else {}
        nets.validation = Numbers(phi=self.share, before=float("inf"), mask=mask, **kept, **words)

    def validate(self, nets: Nets) -> None:
        """Look at the held-out texts, and let phi grow when they have become harder."""
        v = nets.validation
        texts = {"inputs": v.inputs, "labels": v.labels, "mask": v.mask}
        teacher, student = (overhear(nets, player, texts) for player in ("teacher", "student"))
        with torch.no_grad():
            loss = mean(self.values(student, teacher, v.mask, dict(v.named_buffers()).get("words")), v.mask).value
        if bool(v.before.isinf()):
            v.before.copy_(loss)
        elif bool(loss >= v.before + self.margin):
            v.phi.copy_((v.phi + 0.1).clamp_max(1.0))
            v.before.copy_(loss)

    def texts(self, nets: Nets, batch: Batch, progress: float) -> Batch:
        """The batch itself, or texts of the student."""
        r, phi = float(torch.rand(())), float(nets.validation.phi)
        if r >= phi:
            return batch
        if r < phi * (1 - progress) or len(nets.replay) < self.capacity:
            writer = partial(sample, nets.student, temperature=self.sampling)
            batch = rollout(batch, writer, prompt=self.prompt, end=self.end)
            nets.replay.add(batch)
            return batch
        drawn: Batch = nets.replay.draw(len(batch["inputs"]))
        return drawn

    def step(self, nets: Nets, batch: Batch, clock: Clock) -> Iterator[Turn]:
        """One turn of the student."""
        if clock.t == 0:
            self.validate(nets)
        mask = completions(batch, self.prompt)
        if "index" in batch and "index" in dict(nets.validation.named_buffers()):
            mask = mask & ~torch.isin(batch["index"], nets.validation.index)[:, None]
        words = batch.get("words")
        batch = self.texts(nets, {**batch, "mask": mask}, clock.progress)
        mask = completions(batch, self.prompt)
        teacher, student = hear(nets, "teacher", batch), hear(nets, "student", batch)
        yield "student", mean(self.values(student, teacher, mask, words), mask)

    def after(self, nets: Nets, player: str, clock: Clock) -> None:
        """Validate now and then."""
        if (clock.t + 1) % self.every == 0:
            self.validate(nets)
