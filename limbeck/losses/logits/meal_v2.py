"""Several teachers' mean probabilities are all that the student learns, under the eyes of a judge of final outputs."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from limbeck.core.adapt import reverse_gradient
from limbeck.core.card import method, require
from limbeck.core.ensemble import mean_logits
from limbeck.core.features import Shape
from limbeck.core.maths import kl, upcast


@method(
    paper="Shen and Savvides 2020 (MEAL V2), section 3",
    year=2020,
    arxiv="2009.08453",
    code="szq0214/MEAL-V2@59e6bca:loss.py",
    differs="KL in the place of cross-entropy: the targets' entropy, a constant, is taken off; the code trains student "
    "and judge towards the same end, as `adversarial: false` does, where the idea is that the student deceives it; the "
    "code's judge, made for 1,000 classes, narrows eightfold",
)
class MealV2(nn.Module):
    """KL(mean_m softmax(teacher_m) || softmax(student)) + discriminator BCE(judge).  [B, C], [M, B, C] -> [B]

    The judge, three linear layers of which each ends in ReLU, C -> C / narrow -> C / narrow^2 -> 2, should say (1, 0)
    of the student's logits and (0, 1) of the teachers' mean logits; BCE is the mean over these four answers. Its
    weights train with the student and are dropped. No labels and no temperature.

    discriminator: weight of the judge, >= 0; 0 leaves it out.
    adversarial: whether the judge's gradient comes back to the student with the opposite sign.
    narrow: factor by which its layers narrow, >= 1.

    *Needs*: logits of M teachers over the student's classes, from `several_teachers`; a student that is trained
        already, a small learning rate and no weight decay. *Relates to*: use it without `ce`, which the paper finds to
        harm; `baby_llama` averages logits and softens them. *Differs*: see the card.
    """

    def __init__(
        self, student_logits: Shape, *, discriminator: float = 1.0, adversarial: bool = True, narrow: int = 2
    ) -> None:
        super().__init__()
        require(discriminator >= 0, "discriminator", discriminator, ">= 0")
        require(narrow >= 1, "narrow", narrow, ">= 1")
        self.discriminator, self.adversarial, self.narrow = discriminator, adversarial, narrow
        classes = student_logits[-1]
        wide, slim = max(1, classes // narrow), max(1, classes // narrow**2)
        layers = (nn.Linear(classes, wide), nn.Linear(wide, slim), nn.Linear(slim, 2))
        self.judge = nn.Sequential(*[part for layer in layers for part in (layer, nn.ReLU())])

    def forward(self, student_logits: Tensor, teachers_logits: Tensor) -> Tensor:
        """Per example."""
        teachers = upcast(teachers_logits.detach())
        loss = kl(student_logits, mean_logits(teachers))
        if not self.discriminator:
            return loss
        student = upcast(student_logits)
        mine = self._found(reverse_gradient(student) if self.adversarial else student, 0)
        return loss + self.discriminator * (mine + self._found(teachers.mean(0), 1)) / 2

    def _found(self, logits: Tensor, right: int) -> Tensor:
        """Mean BCE of the judge's two answers, of which `right` should be yes: [B, C] -> [B]."""
        answers = upcast(self.judge(logits.to(next(self.judge.parameters()).dtype)))
        wanted = torch.zeros_like(answers)
        wanted[..., right] = 1.0
        return F.binary_cross_entropy_with_logits(answers, wanted, reduction="none").mean(-1)
