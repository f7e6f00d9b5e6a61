"""The reverse KL of whole texts, by policy gradient: words that the teacher finds likelier are rewarded."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from limbeck.core.card import method, require
from limbeck.core.generate import sample
from limbeck.core.headloss import Term, divergences
from limbeck.core.headloss import ce as ce_of_head
from limbeck.core.loop import Clock, Stage, Turn
from limbeck.core.maths import log_probs, reverse_kl
from limbeck.core.nets import Batch, Nets
from limbeck.core.policy import completions, remaining, rollout, to_go, warmed_up, whiten
from limbeck.core.reduce import Part, mean
from limbeck.core.voices import compared, hear, logprobs, overhear, spare, supervised
from limbeck.losses.logits.ce import ce


@method(
    paper="Gu et al. 2023, algorithm 1 and eqs. 4-6",
    year=2023,
    arxiv="2306.08543",
    code="microsoft/LMOps@4f2a9de:minillm/minillm/losses.py",
    differs="advantages are whitened over the places that count; the code's padding takes part. The plain corpus is "
    "the batch's own text. No forms of the code for padding, half precision and parallel heads",
)
@dataclass(frozen=True)
class MiniLLM:
    """Minimises KL(q || p) of texts y ~ (1 - mix) q + mix p, q the student and p the teacher, on tokens y_t of y.

    r_t = (log p(y_t) - log q(y_t)) / scale, clipped; A_t = whitened (sum_{s >= t} r_s / tokens left);
    ratio_t = w_t q_now(y_t) / q(y_t), w_t = q(y_t) / ((1 - mix) q(y_t) + mix p(y_t));
    policy = mean max(-A ratio, -A clip(ratio, 1 - clip, 1 + clip)), single = mean KL(q_now || p) at each place, and
    plain = mean of (1 - soft) CE + soft x cross-entropy with the teacher, on the batch's own text.

    mix: the teacher's share in the writing, in [0, 1); keeps students from hacking the reward with odd texts.
    epochs: updates on each written batch, >= 1; the paper's 4 are passes over 256 texts.
    scale: > 0, divides the rewards. bound: > 0, of the rewards. clip: e in (0, 1) of the ratio.
    single: weight >= 0 of the one-step part. plain: weight >= 0 of the plain text's loss; 0 leaves it out.
    soft: in [0, 1], share of the teacher in the plain text's loss; 0 is the paper's formula, 0.5 the code's default.
    temperature: of writing and of q and p, > 0. top_p: of writing, in (0, 1].
    supervised: share in [0, 1) of the updates that first train the student on the data's own words, a stage of its own.
    prompt: tokens at the start of each text that are given, >= 1; more where the batch's mask begins later.
    end: id of the token that ends a text, -1 for none.

    *Needs*: nets.teacher and a student that can write, trained before or by `supervised`. *Relates to*: `gkd` at beta 1
    has the one-step part alone, `on_policy_distillation` the policy part without memory of the future.
    *Differs*: see the card.
    """

    mix: float = 0.2
    epochs: int = 4
    scale: float = 0.5
    bound: float = 100.0
    clip: float = 0.2
    single: float = 1.0
    plain: float = 1.0
    soft: float = 0.5
    temperature: float = 1.0
    top_p: float = 1.0
    supervised: float = 0.0
    prompt: int = 1
    end: int = -1

    def __post_init__(self) -> None:
        require(0 <= self.mix < 1, "mix", self.mix, "in [0, 1)")
        require(0 < self.clip < 1, "clip", self.clip, "in (0, 1)")
        require(0 <= self.soft <= 1, "soft", self.soft, "in [0, 1]")
        require(0 <= self.supervised < 1, "supervised", self.supervised, "in [0, 1)")
        for name in ("epochs", "prompt"):
            require(getattr(self, name) >= 1, name, getattr(self, name), ">= 1")
        for name in ("scale", "bound", "temperature"):
            require(getattr(self, name) > 0, name, getattr(self, name), "> 0")
        for name in ("single", "plain"):
            require(getattr(self, name) >= 0, name, getattr(self, name), ">= 0")

    def rewards(self, log_q: Tensor, log_p: Tensor) -> Tensor:
        """r of each written token: [B, T] x 2 -> [B, T]."""
        return ((log_p - log_q) / self.scale).clamp(-self.bound, self.bound)

    def advantages(self, rewards: Tensor, mask: Tensor) -> Tensor:
        """A of each written token: [B, T]."""
        return whiten(to_go(rewards, mask) / remaining(mask), mask)

    def weights(self, log_q: Tensor, log_p: Tensor) -> Tensor:
        """w of each written token, at most 1 / (1 - mix): [B, T] x 2 -> [B, T]."""
        if not self.mix:  # 0 x inf otherwise, where the teacher alone finds a word possible
            return torch.ones_like(log_q)
        return 1 / (1 - self.mix + self.mix * (log_p - log_q).exp())

    def policy(self, now: Tensor, log_q: Tensor, weights: Tensor, advantages: Tensor) -> Tensor:
        """The clipped objective of each token: [B, T]. now: log q_now, which the gradient flows to."""
        ratio = weights * (now - log_q).exp()
        return torch.maximum(-advantages * ratio, -advantages * ratio.clamp(1 - self.clip, 1 + self.clip))

    def plainly(self, student_logits: Tensor, teacher_logits: Tensor, labels: Tensor) -> Tensor:
        """The loss of each token of plain text: [B, T]."""
        soft = -(log_probs(teacher_logits).exp() * log_probs(student_logits)).sum(-1)
        return (1 - self.soft) * ce(student_logits, labels) + self.soft * soft

    def setup(self, nets: Nets, probe: Batch) -> None:
        """See whose logits can be spared."""
        spare(nets, probe, "student", "teacher")

    def stages(self, nets: Nets, steps: int) -> Iterator[Stage]:
        """The student learns to write before its writing is judged."""
        return warmed_up(self.supervised, steps)

    def step(self, nets: Nets, batch: Batch, clock: Clock) -> Iterator[Turn]:
        """Write once, then `epochs` turns of the student."""
        if self.supervised and clock.stage == 0:
            yield "student", supervised(nets, batch)
            return
        mix = [(nets.teacher, self.mix)] if self.mix else []
        words = batch.get("words")
        writer = partial(
            sample,
            nets.student,
            temperature=self.temperature,
            top_p=self.top_p,
            mix=mix,
        )
        new = rollout(batch, writer, prompt=self.prompt, end=self.end)
        mask, labels, t = completions(new, self.prompt), new["labels"], self.temperature
        teacher = hear(nets, "teacher", new)
        log_q, log_p = logprobs(overhear(nets, "student", new), labels, mask, t), logprobs(teacher, labels, mask, t)
        weights, advantages = self.weights(log_q, log_p), self.advantages(self.rewards(log_q, log_p), mask)
        expert = hear(nets, "teacher", batch) if self.plain else None
        given = batch["mask"].bool() if "mask" in batch else torch.ones_like(batch["labels"], dtype=torch.bool)
        one_step = [Term(divergences.reverse_kl, t)]
        plain = [ce_of_head(1 - self.soft), Term(divergences.cross_entropy, weight=self.soft)]
        for _ in range(self.epochs):
            student = hear(nets, "student", new)
            now = logprobs(student, labels, mask, t)
            parts: dict[str, Part] = {"policy": mean(self.policy(now, log_q, weights, advantages), mask)}
            if self.single:
                single = compared(student, teacher, partial(reverse_kl, temperature=t), one_step, mask, words)
                parts["single"] = self.single * mean(single, mask)
            if expert is not None:
                plainly = partial(self.plainly, labels=batch["labels"])
                own = compared(hear(nets, "student", batch), expert, plainly, plain, given, words, batch["labels"])
                parts["plain"] = self.plain * mean(own, given)
            yield "student", parts
