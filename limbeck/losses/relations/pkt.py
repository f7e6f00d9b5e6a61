"""The student copies how probable the teacher finds each example as a neighbour of each other one."""

from __future__ import annotations

import torch
from torch import Tensor

from limbeck.core.card import method
from limbeck.core.layerwise import counted
from limbeck.core.maths import gram, upcast

# Added by the code to lengths and to both sides of the logarithm; kept, so that published settings give its numbers.
EPSILON = 1e-7


@method(
    paper="Passalis and Tefas 2018, section 3",
    year=2018,
    arxiv="1803.10837",
    code="passalis/probabilistic_kt@a58fd1b:nn/pkt.py",
    differs="as the code: mean over all N^2 entries, an example's own included, where the paper sums over others",
    zero_at_match=True,
)
def pkt(student_emb: Tensor, teacher_emb: Tensor, mask: Tensor | None = None) -> Tensor:
    """mean_ij p_ij log(p_ij / q_ij), p of the teacher, q of the student.  [B, D], [B, E] -> []

    p_ij = k_ij / sum_m k_im with k_ij = (cos(e_i, e_j) + 1) / 2 is the probability that i picks j as its neighbour.
    Widths may differ; rotating the embeddings or rescaling any of them changes nothing, so no projector is needed.

    *Needs*: embeddings of both. One example says nothing.
    *Relates to*: use weight 30000 beside `ce` at 64 examples: the mean over N^2 entries is small. `rkd` and `sp` keep
        the same kind of knowledge by distances and by plain similarities.
    """
    counts = counted(mask, student_emb)
    p, q = _neighbours(teacher_emb.detach(), counts), _neighbours(student_emb, counts)
    total = (p * ((p + EPSILON) / (q + EPSILON)).log()).sum() / counts.sum().clamp_min(1).square()
    return total + (-total).clamp_min(0).detach()  # EPSILON and rounding may take it just below 0


def _neighbours(embedding: Tensor, counts: Tensor) -> Tensor:
    """Probabilities [B, B], each row summing to 1; 0 wherever an example does not count."""
    embedding = torch.where(counts.unsqueeze(1), upcast(embedding).flatten(1), 0.0)
    direction = embedding / (torch.linalg.vector_norm(embedding, dim=1, keepdim=True) + EPSILON)
    kernel = (gram(direction) + 1) / 2 * (counts.unsqueeze(1) & counts)
    return kernel / kernel.sum(1, keepdim=True).clamp_min(EPSILON)
