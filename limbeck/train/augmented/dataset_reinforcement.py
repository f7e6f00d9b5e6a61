"""A data set that was reinforced once, with views and what a strong teacher says of them, trains any student."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from limbeck.core.card import method, require
from limbeck.core.errors import BadInput
from limbeck.core.loop import Clock, Turn
from limbeck.core.maths import kl_logprobs, log_probs
from limbeck.core.nets import Batch, Nets, evaluating
from limbeck.core.reduce import mean
from limbeck.core.store import recover


@method(
    paper="Faghri et al. 2023, section 3",
    year=2023,
    arxiv="2303.08983",
    code="apple/ml-dr@a21113c:dr/utils.py, trainers.py",
    differs="where the label is taken, the view stays the stored one; the code loads the plain picture. Views of two "
    "mixed pictures are not stored, nor posterising, solarising and equalising",
)
@dataclass(frozen=True)
class DatasetReinforcement:
    """KL(p || softmax(z)), p what is stored of this view, the mass that is missing spread evenly over other classes.

    reinforced: share of the examples that learn from the store, in [0, 1]; the others, drawn anew in each step,
        from their label if they have one.

    *Needs*: nets.student, and batches from a store with many views an example (`store: {views: 20, topk: 10, augment:
        [resized_crop, flip, randaugment, erase]}`) of a strong teacher, best an `Ensemble`; labels when reinforced < 1.
    *Relates to*: with reinforced 1 the gradient is that of `fkd`. The store depends on no student: capture it once, and
        train each student for what labels alone cost.
    *Differs*: see the card.
    """

    reinforced: float = 0.99

    def __post_init__(self) -> None:
        require(0 <= self.reinforced <= 1, "reinforced", self.reinforced, "in [0, 1]")

    def setup(self, nets: Nets, probe: Batch) -> None:
        """Check that the batches come from a store and that its classes are the student's."""
        needed = {"teacher_ids", "teacher_logprobs", *(["labels"] if self.reinforced < 1 else [])}
        if missing := needed - probe.keys():
            raise BadInput(
                f"the batches hold no {min(missing)}: `dataset_reinforcement` reads a store, which `limbeck label` "
                "writes, and labels"
            )
        with torch.no_grad(), evaluating(nets.student):
            classes = nets.run("student", probe)["logits"].shape[-1]
        if (largest := int(probe["teacher_ids"].max())) >= classes:
            raise BadInput(f"the store holds class {largest}, but the student has {classes} classes")

    def target(self, batch: Batch, classes: int) -> Tensor:
        """What each example learns, [B, C], summing to 1."""
        said = recover(batch["teacher_ids"], batch["teacher_logprobs"], classes)
        if self.reinforced == 1:
            return said
        labels = batch["labels"]
        stays = (torch.rand(len(said)).to(said.device) < self.reinforced) | (labels < 0)
        return torch.where(stays.unsqueeze(-1), said, F.one_hot(labels.clamp_min(0), classes).to(said))

    def loss(self, student_logits: Tensor, target: Tensor) -> Tensor:
        """KL for each example: [B, C] x 2 -> [B]."""
        return kl_logprobs(target.log(), log_probs(student_logits))

    def step(self, nets: Nets, batch: Batch, clock: Clock) -> Iterator[Turn]:
        """One turn of the student."""
        student = nets.run("student", batch)["logits"]
        yield "student", mean(self.loss(student, self.target(batch, student.shape[-1])), batch.get("mask"))
