"""The student sees the very crops that the teacher was asked about beforehand, with what it said of each."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from limbeck.core.card import method, require
from limbeck.core.errors import BadInput
from limbeck.core.loop import Clock, Turn
from limbeck.core.maths import log_probs
from limbeck.core.nets import Batch, Nets, evaluating
from limbeck.core.reduce import mean
from limbeck.core.store import recover


@method(
    paper="Shen and Xing 2021, section 3",
    year=2021,
    arxiv="2112.01528",
    code="szq0214/FKD@afd5294:FKD/train_FKD.py",
    differs="every epoch walks on through an example's views instead of drawing them anew; mixed pictures are left out",
    exact_accumulation=True,
)
@dataclass(frozen=True)
class FKD:
    """-sum_c p_c log softmax(z / T)_c, where p is recovered from the stored entries of this view of the picture.

    recovery: "smooth" spreads the mass that was not stored evenly over the other classes (marginal smoothing),
        "renormalise" scales the stored entries to 1 (marginal re-norm).
    temperature: T > 0 of the student; labels are stored at 1, the paper's.

    *Needs*: nets.student, and batches from a store that `limbeck label` wrote (`core.store.StoredBatches`): they bring
    teacher_ids, teacher_logprobs and the pictures cropped and flipped as they were; no teacher and no labels.
    *Relates to*: `distill` reads the same store with any loss for teacher_ids; use it with a teacher at hand when
    the data are small. Saves the teacher's forward passes in every epoch. *Differs*: see the card.
    """

    recovery: Literal["smooth", "renormalise"] = "smooth"
    temperature: float = 1.0

    def __post_init__(self) -> None:
        require(self.recovery in ("smooth", "renormalise"), "recovery", self.recovery, "smooth or renormalise")
        require(self.temperature > 0, "temperature", self.temperature, "> 0")

    def setup(self, nets: Nets, probe: Batch) -> None:
        """Check that the batches come from a store and that its classes are the student's."""
        if missing := {"teacher_ids", "teacher_logprobs"} - probe.keys():
            raise BadInput(f"the batches hold no {min(missing)}: `fkd` reads a store, which `limbeck label` writes")
        with torch.no_grad(), evaluating(nets.student):
            classes = nets.run("student", probe)["logits"].shape[-1]
        if (largest := int(probe["teacher_ids"].max())) >= classes:
            raise BadInput(f"the store holds class {largest}, but the student has {classes} classes")

    def loss(self, student_logits: Tensor, teacher_ids: Tensor, teacher_logprobs: Tensor) -> Tensor:
        """Soft cross-entropy for each element: [..., C], [..., K] x 2 -> [...]."""
        p = recover(teacher_ids, teacher_logprobs, student_logits.shape[-1], self.recovery)
        return -(p * log_probs(student_logits, self.temperature)).sum(-1)

    def step(self, nets: Nets, batch: Batch, clock: Clock) -> Iterator[Turn]:
        """One turn of the student."""
        student = nets.run("student", batch)["logits"]
        loss = self.loss(student, batch["teacher_ids"], batch["teacher_logprobs"])
        yield "student", mean(loss, batch.get("mask"))
