"""The student's states of a text are carried to the teacher's of the same text, or of its reasoning, at least cost."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from limbeck.core.card import method, require
from limbeck.core.features import Shape
from limbeck.core.maths import sinkhorn
from limbeck.core.spans import on_places

FAR = 1e6  # the cost of a masked place of the teacher: nothing is carried there, from the first iteration on


@method(
    paper="Le et al. 2025 (CoT2Align), optimal transport of sequences and layers",
    year=2025,
    arxiv="2502.16806",
    differs="the transport term alone: take `ce` and a loss such as `uld` or `dskd` beside it; which text the teacher "
    "reads, the same or its chain of thought, is the data's business; uniform marginals",
)
class CoT2Align(nn.Module):
    """<P, C> of the embedded tokens and of the last hidden states, C_ij = 1 - cos(W h_i, h_j).  -> [B]

    P is the plan of exp(-C / epsilon) with equal weight on all places that count, of T for the student and U for the
    teacher; no place needs a partner. W is a linear map to the teacher's width, one for each of the two layers. A sum
    over both layers, in [0, 4]; 0 only when every projected state lies in the direction of a teacher's state.

    epsilon: blur of the plan, > 0, in units of C.
    iterations: Sinkhorn steps, >= 1.

    *Needs*: embedded tokens and last hidden states of both, and both masks. For the paper's second term give the
        teacher the text with its reasoning (`teacher_inputs`) and the student the plain one. Memory grows with T x U.
    *Relates to*: add `ce` and `uld` or `dskd`; weights of 0.5 each, as published. `alm` aligns by the text instead.
    *Differs*: see the card.
    """

    def __init__(
        self,
        student_tokens: Shape,
        teacher_tokens: Shape,
        student_hidden: Shape,
        teacher_hidden: Shape,
        *,
        epsilon: float = 0.1,
        iterations: int = 50,
    ) -> None:
        super().__init__()
        require(epsilon > 0, "epsilon", epsilon, "> 0")
        require(iterations >= 1, "iterations", iterations, ">= 1")
        self.epsilon, self.iterations = epsilon, iterations
        self.of_tokens = nn.Linear(student_tokens[-1], teacher_tokens[-1], bias=False)
        self.of_hidden = nn.Linear(student_hidden[-1], teacher_hidden[-1], bias=False)

    def forward(
        self,
        student_tokens: Tensor,
        teacher_tokens: Tensor,
        student_hidden: Tensor,
        teacher_hidden: Tensor,
        mask: Tensor | None = None,
        teacher_mask: Tensor | None = None,
    ) -> Tensor:
        """Per example."""
        mine, theirs = on_places(mask, student_hidden[..., 0]), on_places(teacher_mask, teacher_hidden[..., 0])
        with torch.autocast(student_hidden.device.type, enabled=False):
            first = self._cost(self.of_tokens, student_tokens, teacher_tokens, mine, theirs)
            return first + self._cost(self.of_hidden, student_hidden, teacher_hidden, mine, theirs)

    def _cost(self, project: nn.Linear, student: Tensor, teacher: Tensor, mine: Tensor, theirs: Tensor) -> Tensor:
        ours = F.normalize(project(student.to(project.weight.dtype)), dim=-1)
        cost = 1 - ours @ F.normalize(teacher.detach().to(ours), dim=-1).mT
        both = mine.unsqueeze(2) & theirs.unsqueeze(1)
        a, b = (m / m.sum(1, keepdim=True).clamp_min(1) for m in (mine.to(cost), theirs.to(cost)))
        plan = sinkhorn(
            torch.where(theirs.unsqueeze(1), cost, FAR), a, b, epsilon=self.epsilon, iterations=self.iterations
        )
        return torch.where(both, plan * cost, 0.0).sum((1, 2))
