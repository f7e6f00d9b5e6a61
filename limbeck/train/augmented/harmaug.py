"""A local writer makes more of the rare class from the few examples there are, and the teacher says what they are."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from limbeck.core.card import method, require
from limbeck.core.errors import BadInput
from limbeck.core.loop import Clock, Turn
from limbeck.core.match import Match
from limbeck.core.memory import Memory
from limbeck.core.nets import Batch, Nets
from limbeck.core.pair import Pair, parse_all
from limbeck.core.writer import written_like


@method(
    paper="Lee et al. 2024, section 3",
    year=2024,
    arxiv="2410.01524",
    code="imnotkind/HarmAug@c9d716c:src/kd_trainer.py",
    differs="in the place of a large language model, made to go on writing harmful requests, n-grams of the rare class "
    "write, from the examples seen so far and anew in every step; there are no answers to judge with a request. The "
    "code draws every class alike often; here batches are as the data have them, and what is written is rare by design",
)
@dataclass(frozen=True)
class HarmAug:
    """(CE(label, s(x)) + KL(softmax t(x) || softmax s(x))) / 2 over a batch and `written` texts that a writer made.

    Texts of the class `positive` are kept as they come by; the writer makes texts of their n-grams. Their label is the
    teacher's first choice, so a text that has lost what made it harmful is taught as harmless, and how sure the
    teacher is flows through the KL.

    match: losses between student and teacher, over data and written texts alike.
    positive: class that the writer imitates; null for any: plain text, which tells what the class is worth.
    written: texts a step, >= 0; 0 is plain distillation.
    order: n of the n-grams, >= 1: 1 draws single words; long ones repeat what there is.
    memory: most texts that are kept, the newest, >= 1.

    *Needs*: nets.teacher at hand, a classifier of token ids, and labels; losses that read logits, labels and inner
        layers, but no banks: what is written has no `index`.
    *Relates to*: for few examples of a class that matters (a guard of what is unsafe); compare with `order: 1,
        positive: null`, text at random. `zskt` and others make inputs by gradients, which words do not have.
    *Differs*: see the card.
    """

    match: tuple[Any, ...] = ({"ce": 0.5}, {"kd": {"temperature": 1.0, "weight": 0.5}})
    positive: int | None = 1
    written: int = 32
    order: int = 3
    memory: int = 500

    def __post_init__(self) -> None:
        require(self.positive is None or self.positive >= 0, "positive", self.positive, ">= 0, or null")
        require(self.written >= 0, "written", self.written, ">= 0")
        require(self.order >= 1, "order", self.order, ">= 1")
        require(self.memory >= 1, "memory", self.memory, ">= 1")

    @cached_property
    def matches(self) -> tuple[Match, ...]:
        """The losses, parsed."""
        return parse_all(self.match)

    @property
    def pair(self) -> Pair:
        """Student and teacher."""
        return Pair("student", "teacher", self.matches)

    def setup(self, nets: Nets, probe: Batch) -> None:
        """Check that there are texts and a teacher, and make room for those that the writer reads."""
        inputs, labels = probe["inputs"], probe.get("labels")
        if "teacher" not in nets:
            raise BadInput("`harmaug` asks the teacher about texts made in each step: give the teacher, not a store")
        if inputs.ndim != 2 or inputs.is_floating_point() or labels is None or labels.ndim != 1:
            raise BadInput("`harmaug` writes texts: it needs token ids [B, T] with one class label each")
        nets.kept = Memory(self.memory, {"text": inputs})
        self.pair.own(nets, self.with_teacher(nets, _own(probe), len(inputs)))

    def with_teacher(self, nets: Nets, batch: Batch, real: int) -> Batch:
        """A batch with what the teacher says of it, whose examples from number `real` on get their label from it."""
        told = nets.run("teacher", batch)
        label = torch.cat([batch["labels"][:real], told["logits"][real:].argmax(-1)])
        return batch | {"labels": label} | {f"teacher_{name}": value for name, value in told.items()}

    def step(self, nets: Nets, batch: Batch, clock: Clock) -> Iterator[Turn]:
        """Keep what the writer shall imitate; one turn of the student, on the batch and on what is written."""
        inputs, labels = batch["inputs"], batch["labels"]
        wanted = labels >= 0 if self.positive is None else labels == self.positive
        if "mask" in batch:
            wanted = wanted & batch["mask"].bool()
        if bool(wanted.any()):
            nets.kept.add(text=inputs[wanted])
        batch, real = _own(batch), len(inputs)
        if self.written and len(nets.kept):
            pad = _padding(batch)
            more = written_like(nets.kept.all()["text"], self.written, order=self.order, pad=pad)
            batch = {name: torch.cat([column, _of(name, more, pad)]) for name, column in batch.items()}
        yield "student", self.pair.parts(nets, self.with_teacher(nets, batch, real), clock.progress)


def _own(batch: Batch) -> Batch:
    """The columns that written texts have, too."""
    return {name: batch[name] for name in ("inputs", "labels", "attention_mask", "mask") if name in batch}


def _padding(batch: Batch) -> int:
    """The id that pads, as the batch shows it; 0 where it shows none."""
    padded = batch["inputs"][~batch["attention_mask"].bool()] if "attention_mask" in batch else batch["inputs"][:0, 0]
    return int(padded[0]) if len(padded) else 0


def _of(name: str, texts: Tensor, pad: int) -> Tensor:
    """A column of written texts [M, T]; their labels are room for what the teacher will say."""
    if name == "inputs":
        return texts
    if name == "attention_mask":
        return texts != pad
    return torch.ones_like(texts[:, 0], dtype=torch.bool if name == "mask" else torch.long)
