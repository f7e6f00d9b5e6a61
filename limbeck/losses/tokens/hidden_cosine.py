"""The student's last hidden states point where the teacher's do, whatever their length."""

import torch.nn.functional as F
from torch import Tensor, nn

from limbeck.core.card import method
from limbeck.core.features import Shape
from limbeck.core.maths import pair


@method(
    paper="Sanh et al. 2019 (DistilBERT), section 3",
    year=2019,
    arxiv="1910.01108",
    code="huggingface/transformers-research-projects@fccd0cd:distillation/distiller.py",
    differs="the cosine term of the row only; its other two are `ce` on masked words and `kd`, its start is "
    "`layer_choice`. The code takes it, and unless told otherwise the KL, at all tokens, these count where the data's "
    "mask is True, which is at the hidden ones. A learned matrix brings a student of another width to the teacher's",
    row="distilbert",
    zero_at_match=True,
)
class HiddenCosine(nn.Module):
    """1 - cos(student, teacher) of the hidden states before the head, in [0, 2].  [B, T, D], [B, T, E] -> [B, T]

    States of one width are compared as they are, as those of a student that is made of the teacher's layers; else one
    matrix, which trains along, takes the student's to the teacher's width.

    *Needs*: hidden states of both at the same places.
    *Relates to*: the paper's triple loss is 2 ce + 5 kd at temperature 2 + 1 of this.
    *Differs*: see the card.
    """

    def __init__(self, student_hidden: Shape, teacher_hidden: Shape) -> None:
        super().__init__()
        wide, wider = student_hidden[-1], teacher_hidden[-1]
        self.project = None if wide == wider else nn.Linear(wide, wider, bias=False)

    def forward(self, student_hidden: Tensor, teacher_hidden: Tensor) -> Tensor:
        """Per place."""
        if self.project is not None:
            student_hidden = self.project(student_hidden)
        student, teacher = pair(student_hidden, teacher_hidden.detach())
        # half the squared distance of the unit vectors: never negative, and exact near the match
        return (F.normalize(student, dim=-1) - F.normalize(teacher, dim=-1)).square().sum(-1) / 2
