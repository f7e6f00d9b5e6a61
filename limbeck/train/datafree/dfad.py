"""A game without data: the generator looks for pictures on which student and teacher differ most in their logits."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from limbeck.core.card import method, require
from limbeck.core.features import per_example
from limbeck.core.imagine import check_generator, imagine, imagined
from limbeck.core.loop import Clock, Turn
from limbeck.core.maths import pair
from limbeck.core.nets import Batch, Nets
from limbeck.core.reduce import mean


def discrepancy(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """Mean |teacher - student| over the logits of an example: [B, C, ...] x 2 -> [B]; gradient to both."""
    student, teacher = pair(student_logits, teacher_logits)
    return per_example((teacher - student).abs())


@method(
    paper="Fang et al. 2019, eq. 3-6 and algorithm 1",
    year=2019,
    arxiv="1912.11006",
    differs="the generator minimises minus the distance, as for classification in the authors' code; `logarithm` is "
    "the paper's form of it",
)
@dataclass(frozen=True)
class DFAD:
    """The student minimises mean |z_t(G(e)) - z_s(G(e))|, the generator minus that; z are logits, e is noise.

    A step is `student_steps` turns of the student, each on new pictures, then one of the generator. Absolute
    differences pull as hard when the two are close as when they are far apart, where those of KL or squares die out.

    logarithm: whether the generator minimises -log(1 + distance): tamer where distances are large.
    student_steps: turns a step, >= 1.
    latent: numbers in a code, which the generator reads [B, latent], >= 1.

    *Needs*: nets.teacher, nets.student, nets.generator. Logits [B, C] or, for segmentation, [B, C, H, W]. The batch
    tells only how many pictures to make.
    *Relates to*: `zskt` plays the game in KL and adds attention; `lra_dfkd` remembers past pictures. Logits that differ
        by a constant make the same prediction, and yet cost here. *Differs*: see the card.
    """

    logarithm: bool = False
    student_steps: int = 5
    latent: int = 256
    dataless = True

    def __post_init__(self) -> None:
        for name in ("student_steps", "latent"):
            require(getattr(self, name) >= 1, name, getattr(self, name), ">= 1")

    def optimizers(self) -> dict[str, dict[str, Any]]:
        """The paper's."""
        student = {"sgd": {"lr": 0.1, "momentum": 0.9, "weight_decay": 5e-4}}
        return {"generator": {"adam": {"lr": 1e-3}}, "student": student}

    def setup(self, nets: Nets, probe: Batch) -> None:
        """Check that the generator reads codes of `latent` numbers and that the teacher reads its pictures."""
        check_generator(nets, self.latent)

    def step(self, nets: Nets, batch: Batch, clock: Clock) -> Iterator[Turn]:
        """Turns of the student, then one of the generator."""
        count = len(batch["index"])
        for _ in range(self.student_steps):
            shown = {"inputs": imagined(nets, count, self.latent)}
            teacher, student = nets.run("teacher", shown), nets.run("student", shown)
            yield "student", mean(discrepancy(student["logits"], teacher["logits"]))
        shown = {"inputs": imagine(nets, count, self.latent)}
        teacher, student = nets.run("teacher", shown, through=True), nets.run("student", shown)
        apart = discrepancy(student["logits"], teacher["logits"])
        yield "generator", -apart.mean().log1p() if self.logarithm else -1.0 * mean(apart)
