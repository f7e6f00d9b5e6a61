"""The likelihood of the teacher's texts is pulled up and that of the student's own pushed down, by two skewed KLs."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from limbeck.core.card import method, require
from limbeck.core.generate import sample
from limbeck.core.loop import Clock, Turn
from limbeck.core.maths import kl_logprobs, label_logprobs, log_probs
from limbeck.core.nets import Batch, Nets
from limbeck.core.policy import Numbers, completions, rollout
from limbeck.core.reduce import mean
from limbeck.core.voices import of_one_height


@method(
    paper="Ko et al. 2025, eqs. 4 and 6",
    year=2025,
    arxiv="2503.07067",
    code="jongwooko/distillm-2@fe4cf9b:src/distillm_trainer.py",
    differs="both texts are written anew for each batch instead of once an epoch; the curriculum's reference is the "
    "mean of the first batch instead of the first logging interval",
)
@dataclass(frozen=True)
class DistiLLM2:
    """(2 - b) KL(p || a1 p + (1 - a1) q) on texts of the teacher p + b KL(q || (1 - a2) p + a2 sg[q]) on those of q.

    Each is a mean over the tokens of a text, then over the texts. With the curriculum a1 = clip(1 - (1 - a) m /
    (P - Q + 1e-5), 0.01, a) of each text, where P and Q are exp of the mean log-probability of its tokens under teacher
    and student, and m the mean of P - Q in the first batch; a2 alike with P and Q exchanged. No gradient flows through
    a1, a2 or the student inside the second mixture.

    alpha: a in [0.01, 1), the largest skew.
    curriculum: whether the skew of a text falls as student and teacher come to agree on it.
    grow: >= 0 and <= 1, b goes from 1 to 1 + grow over the first half of the training; the code's is 0.5 where used.
    sampling: temperature of both writers, > 0.
    prompt: tokens at the start of each text that are given, >= 1; more where the batch's mask begins later.
    end: id of the token that ends a text, -1 for none.

    *Needs*: nets.teacher and nets.student over one vocabulary. *Relates to*: `distillm` when writing two texts a prompt
    is too slow. *Differs*: see the card.
    """

    alpha: float = 0.1
    curriculum: bool = True
    grow: float = 0.0
    sampling: float = 0.8
    prompt: int = 1
    end: int = -1

    def __post_init__(self) -> None:
        require(0.01 <= self.alpha < 1, "alpha", self.alpha, "in [0.01, 1)")
        require(0 <= self.grow <= 1, "grow", self.grow, "in [0, 1]")
        require(self.sampling > 0, "sampling", self.sampling, "> 0")
        require(self.prompt >= 1, "prompt", self.prompt, ">= 1")

    def skew(self, ahead: Tensor, reference: Tensor) -> Tensor:
        """The skew of each text [B] from how far the writer is ahead of the other [B]; nan for no reference yet."""
        found = (1 - (1 - self.alpha) * reference / (ahead + 1e-5)).clamp(0.01, self.alpha)
        return torch.where(reference.isnan() | ahead.isnan(), torch.full_like(found, self.alpha), found)

    def pull(self, student_logits: Tensor, teacher_logits: Tensor, alpha: Tensor) -> Tensor:
        """KL(p || a p + (1 - a) q) of each token: [B, T, V] x 2, [B] -> [B, T]."""
        log_p, log_q = log_probs(teacher_logits.detach()), log_probs(student_logits)
        return kl_logprobs(log_p, _mixed(log_p, log_q, alpha))

    def push(self, student_logits: Tensor, teacher_logits: Tensor, alpha: Tensor) -> Tensor:
        """sum q log q / ((1 - a) p + a sg[q]) of each token: [B, T, V] x 2, [B] -> [B, T]."""
        log_p, log_q = log_probs(teacher_logits.detach()), log_probs(student_logits)
        return kl_logprobs(log_q, _mixed(log_q.detach(), log_p, alpha))

    def setup(self, nets: Nets, probe: Batch) -> None:
        """Make room for the references of the curriculum."""
        nets.reference = Numbers(teacher=float("nan"), student=float("nan"))

    def turn(self, nets: Nets, batch: Batch, writer: str) -> tuple[Tensor, Tensor]:
        """Loss of each text [B] that a writer adds, and whether it has tokens [B]."""
        write = partial(sample, nets.find(writer), temperature=self.sampling)
        new = rollout(batch, write, prompt=self.prompt, end=self.end)
        mask, labels = completions(new, self.prompt), new["labels"]
        student, teacher = nets.run("student", new)["logits"], nets.run("teacher", new)["logits"]
        student, teacher = of_one_height(student, teacher, new.get("words"))
        with torch.no_grad():
            q, p = (_per_text(label_logprobs(logits, labels), mask).exp() for logits in (student, teacher))
            ahead, reference = (p - q if writer == "teacher" else q - p), getattr(nets.reference, writer)
            skew = self.skew(ahead, reference if self.curriculum else torch.full_like(reference, float("nan")))
            if bool(reference.isnan()):
                reference.copy_(mean(ahead, mask).value)
        value = self.pull if writer == "teacher" else self.push
        return _per_text(value(student, teacher, skew), mask), mask.any(1)

    def step(self, nets: Nets, batch: Batch, clock: Clock) -> Iterator[Turn]:
        """One turn of the student, on a text of each writer."""
        b = 1 + self.grow * min(1.0, 2 * clock.progress)
        pull, push = self.turn(nets, batch, "teacher"), self.turn(nets, batch, "student")
        yield "student", {"pull": (2 - b) * mean(*pull), "push": b * mean(*push)}


def _mixed(log_x: Tensor, log_y: Tensor, alpha: Tensor) -> Tensor:
    """log(a x + (1 - a) y) [B, T, V] with one a a text [B]."""
    a = alpha[:, None, None]
    return torch.logaddexp(a.log() + log_x, (-a).log1p() + log_y)


def _per_text(values: Tensor, mask: Tensor) -> Tensor:
    """Mean over the tokens of each text that count: [B, T] -> [B]."""
    return torch.where(mask, values, 0.0).sum(1) / mask.sum(1).clamp_min(1)
