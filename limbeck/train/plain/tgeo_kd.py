"""A small network weighs soft against hard loss for each example by where student, teacher and label lie."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from limbeck.core.adapt import step_ahead
from limbeck.core.card import method, require
from limbeck.core.loop import Clock, Turn
from limbeck.core.maths import log_probs, upcast
from limbeck.core.nets import Batch, Nets, evaluating, outputs
from limbeck.core.reduce import Part, mean
from limbeck.losses.logits.ce import ce
from limbeck.losses.logits.kd import kd


class Weigher(nn.Module):
    """Remembers what the teacher says of each class on average, and weighs: nine points and edges [B, C] -> [B]."""

    said: Tensor
    times: Tensor

    def __init__(self, classes: int, widths: tuple[int, ...]) -> None:
        super().__init__()
        self.register_buffer("said", torch.zeros(classes, classes))
        self.register_buffer("times", torch.zeros(classes))
        layers: list[nn.Module] = []
        for reads, gives in zip((9 * classes, *widths), widths, strict=False):
            layers += [nn.Linear(reads, gives), nn.LeakyReLU()]
        self.net = nn.Sequential(*layers, nn.Linear((9 * classes, *widths)[-1], 1))

    @torch.no_grad()
    def note(self, teacher: Tensor, labels: Tensor, counts: Tensor) -> None:
        """Add what the teacher says [B, C] of the examples that count [B]."""
        self.said.index_add_(0, labels, (teacher * counts.unsqueeze(-1)).to(self.said))
        self.times.index_add_(0, labels, counts.to(self.times))

    def forward(self, student_logits: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
        """Weights in (0, 1), [B]."""
        s, t = log_probs(student_logits.detach()).exp(), teacher
        label = nn.functional.one_hot(labels, s.shape[-1]).to(s)
        times = self.times[labels].unsqueeze(-1)
        average = torch.where(times > 0, self.said[labels] / times.clamp_min(1), t.to(self.said))
        edges = (s - t, s - label, t - label, s - average, average - label)
        told = torch.cat([s, t, label, average, *edges], -1).to(self.said)
        weight: Tensor = upcast(self.net(told)).sigmoid().squeeze(-1)
        return weight


@method(
    paper="Hu et al. 2023, trilateral geometry",
    year=2023,
    arxiv="2312.15112",
    differs="no official code; the edges, widths and optimiser of the weigher follow the row's account of another "
    "implementation. Its held-out data are every k-th training example, on which the student is not trained. The "
    "teacher's mean of a class is that of what has been seen so far",
)
@dataclass(frozen=True)
class TGeoKD:
    """a_i T^2 KL(teacher || student) + (1 - a_i) CE(label), a_i = weigher(s, t, label, mean of t over the class).

    The weigher, a small perceptron with a sigmoid, reads the four points and the edges between them. It is trained by
    what helps: a step of the student with its weights is taken in thought, and CE after that step, on held-out data,
    is what it minimises. It learns to doubt a teacher that is wrong, or far from what it says of the class. It is
    dropped after training.

    temperature: T > 0.
    held_out: every k-th example, k >= 2, is kept from the student for the weigher: 10 keeps a tenth.
    rate: learning rate of the step in thought, > 0; that of the student's own optimiser is a good choice.
    every: turns of the student to one of the weigher, >= 1. A turn of the weigher costs about three of the student.
    widths: hidden units of the weigher.

    *Needs*: a teacher or stored `teacher_logits` over the same classes, labels; batches large enough to hold several
        held-out examples. Not for students in shards.
    *Relates to*: use it where labels or the teacher are wrong in places; `wsld` weighs by a formula, and `distill` with
        a constant weight is the case that this should beat.
    """

    temperature: float = 4.0
    held_out: int = 10
    rate: float = 0.05
    every: int = 1
    widths: tuple[int, ...] = (32, 16)

    def __post_init__(self) -> None:
        require(self.temperature > 0, "temperature", self.temperature, "> 0")
        require(self.held_out >= 2, "held_out", self.held_out, ">= 2")
        require(self.rate > 0, "rate", self.rate, "> 0")
        require(self.every >= 1, "every", self.every, ">= 1")

    def optimizers(self) -> dict[str, dict[str, Any]]:
        """The weigher's."""
        return {"weigher": {"adam": {"lr": 0.1, "weight_decay": 0.05}}}

    def setup(self, nets: Nets, probe: Batch) -> None:
        """Make the weigher for as many classes as there are."""
        with torch.no_grad(), evaluating(nets.student):
            nets.weigher = Weigher(nets.run("student", probe)["logits"].shape[-1], self.widths)

    def loss(self, weight: Tensor, logits: Tensor, told: Tensor, labels: Tensor, counts: Tensor) -> Part:
        """The mean over the examples that count of the weighted two."""
        soft = kd(logits, told, temperature=self.temperature)
        return mean(weight * soft + (1 - weight) * ce(logits, labels), counts)

    def step(self, nets: Nets, batch: Batch, clock: Clock) -> Iterator[Turn]:
        """A turn of the student and, now and then, one of the weigher."""
        labels = batch["labels"]
        counts = batch["mask"].bool() if "mask" in batch else torch.ones_like(labels, dtype=torch.bool)
        held = batch["index"] % self.held_out == 0
        told = batch["teacher_logits"] if "teacher_logits" in batch else nets.run("teacher", batch)["logits"]
        teacher = log_probs(told).exp()
        nets.weigher.note(teacher, labels, counts & ~held)
        logits = nets.run("student", batch)["logits"]
        with torch.no_grad():
            weight = nets.weigher(logits, teacher, labels)
        yield "student", self.loss(weight, logits, told, labels, counts & ~held)
        if clock.t % self.every == 0:
            logits = _said(nets, {}, batch)
            weight = nets.weigher(logits, teacher, labels)
            loss = self.loss(weight, logits, told, labels, counts & ~held).value
            ahead = step_ahead(nets.student, loss, self.rate)
            yield "weigher", mean(ce(_said(nets, ahead, batch), labels), counts & held)


class _Reader(nn.Module):
    """A network as `outputs` runs it, so that its weights can be replaced in one functional call."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, batch: Batch) -> Tensor:
        logits: Tensor = outputs(self.net, batch)["logits"]
        return logits


def _said(nets: Nets, weights: dict[str, Tensor], batch: Batch) -> Tensor:
    """Logits of the student with these weights; its own, and its statistics, are left alone."""
    statistics = {name: buffer.clone() for name, buffer in nets.student.named_buffers()}
    state = {f"net.{name}": value for name, value in {**statistics, **weights}.items()}
    logits: Tensor = torch.func.functional_call(_Reader(nets.student), state, (batch,))
    if "student" in nets.taps:
        nets.taps["student"].read()  # forget what was seen in thought
    return logits
