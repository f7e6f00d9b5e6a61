"""The batch of student predictions is carried to the batch of teacher predictions at the least cost."""

import torch
from torch import Tensor

from limbeck.core.card import method, require
from limbeck.core.maths import sinkhorn
from limbeck.core.responses import rows

FAR = 1e6  # the cost of a masked teacher: nobody is carried there, from the first iteration on


@method(
    paper="Cui et al. 2024, the batch-wise Sinkhorn distance",
    year=2024,
    arxiv="2402.17110",
    code="2018cx/SinKD@1ffac90:loss.py",
    differs="the code multiplies by 0.001 (0.0008 for language models): take that into the weight. Iterations run on "
    "logarithms, so that a small epsilon does not underflow: same numbers",
)
def sinkd(
    student_logits: Tensor,
    teacher_logits: Tensor,
    mask: Tensor | None = None,
    *,
    temperature: float = 2.0,
    epsilon: float = 0.1,
    iterations: int = 20,
) -> Tensor:
    """sum_ij P_ij D_ij, D_ij = |s_i - t_j|_1, P = plan of exp(-D / epsilon) after the iterations.  [..., C] x 2 -> []

    s, t: probabilities of the B examples at temperature T. Every iteration brings the rows of P to sum 1, then the
    columns: in the end each teacher's prediction is served once, by whichever students are near. A sum over the batch,
    in (0, 2B); the gradient flows through the iterations. Not 0 at student = teacher, but near it for a small epsilon.

    temperature: T > 0.
    epsilon: blur of the plan, > 0, in units of D (which is at most 2).
    iterations: Sinkhorn steps, >= 1.

    *Needs*: logits of both over the same classes, a batch of several examples; no labels. Masked elements take no part.
        Memory and time grow with B x B (tokens: all of the batch).
    *Relates to*: add `ce` (0.1) and `kd` (0.9), and this at 8e-4: it is a sum over the batch. Use it where teacher
        and student hardly overlap.
    """
    require(temperature > 0, "temperature", temperature, "> 0")
    require(epsilon > 0, "epsilon", epsilon, "> 0")
    require(iterations >= 1, "iterations", iterations, ">= 1")
    (s, counts), (t, _) = rows(student_logits, mask), rows(teacher_logits.detach(), mask)
    cost = torch.cdist((s / temperature).softmax(-1), (t / temperature).softmax(-1), p=1)
    if counts is None:
        return len(s) * (sinkhorn(cost, epsilon=epsilon, iterations=iterations) * cost).sum()
    share = counts.squeeze(-1).to(cost) / counts.sum().clamp_min(1)
    cost = torch.where(counts.mT, cost, FAR)
    return counts.sum() * (sinkhorn(cost, share, share, epsilon=epsilon, iterations=iterations) * cost).sum()
