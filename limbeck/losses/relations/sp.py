"""Examples that look alike to the teacher should look alike to the student: similarities in the batch are compared."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from limbeck.core.card import method
from limbeck.core.layerwise import counted, paired
from limbeck.core.maths import gram, upcast


@method(
    paper="Tung and Mori 2019, eq. 4",
    year=2019,
    arxiv="1907.09682",
    code="HobbitLong/RepDistiller@b84f547:distiller_zoo/SP.py",
    differs="one process compares the examples of its own batch only",
    zero_at_match=True,
)
def sp(
    student_feats: list[Tensor],
    teacher_feats: list[Tensor],
    mask: Tensor | None = None,
    *,
    layers: tuple[int, ...] = (-1,),
) -> Tensor:
    """Sum over layers of |G_s - G_t|^2 / B^2, G = norm_rows(Q Q^T), Q [B, everything else].  [B, ...] lists -> []

    G [B, B] says how alike any two examples look to a layer, each row in units of its own length. Only G is compared:
    shapes may differ, no projector is needed, and rotating or scaling Q changes nothing. B counts what is not masked.

    layers: which of the paired features, counted from shallow (0) or from deep (-1); () takes all.

    *Needs*: a feature of each, of any shape; the paper takes the last before the pooling. The batch size matters: one
        example says nothing, 64 and more are usual.
    *Relates to*: use weight 3000 beside `ce` at 64 examples. Use `rkd` for distances and angles of embeddings, `pkt`
        for probabilities, `ickd` for the same among channels.
    """
    pairs = paired(student_feats, teacher_feats, layers)
    return torch.stack([_apart(student, teacher.detach(), mask) for student, teacher in pairs]).sum()


def _apart(student: Tensor, teacher: Tensor, mask: Tensor | None) -> Tensor:
    counts = counted(mask, student)
    difference = _likeness(student, counts) - _likeness(teacher, counts)
    return difference.square().sum() / counts.sum().clamp_min(1).square()


def _likeness(feature: Tensor, counts: Tensor) -> Tensor:
    rows = torch.where(counts.unsqueeze(1), upcast(feature).flatten(1), 0.0)
    return F.normalize(gram(rows))
