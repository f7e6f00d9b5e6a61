"""KD as far as the teacher can be trusted: weighted by how high it ranks the right answers of this batch."""

import torch
from torch import Tensor

from limbeck.core.card import method, require
from limbeck.core.maths import kl


@method(
    paper="Casimiro Carrino et al. 2023, section 3.3",
    year=2023,
    arxiv="2309.17134",
    code="ccasimiro88/self-distillation-gxlt-qa@c6b7f10:src/utils.py",
    differs="the reverse and the symmetric KL of the code are left out",
    row="skd_map",
    zero_at_match=True,
)
def map_kd(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor,
    mask: Tensor | None = None,
    *,
    temperature: float = 2.0,
    top: int = 10,
    margin: int = 5,
) -> Tensor:
    """a T^2 mean KL(softmax(teacher / T) || softmax(student / T)), a = mean 1 / rank.  [..., C] x 2, [...] -> []

    rank is that of the teacher's first choice c with label - margin <= c < label + margin, and 1 / rank is 0 where
    none is among its `top`: the mean average precision at `top` with one right answer, in [0, 1]. For answers that are
    spans the logits are [B, 2, T], over T places for start and end, and the labels [B, 2].

    temperature: T > 0.
    top: choices that are looked at, >= 1.
    margin: places around the label that count as right, >= 0; 0 is the label alone (mean reciprocal rank), as it must
        be where classes have no order.

    *Needs*: logits of both, labels; unlabelled examples (-100) have no say in a, but take part in the mean KL.
    *Relates to*: beside `ce` at weight 1, in `skd_map`, whose teacher begins weak. `kd` is this with a = 1; `wsld`
        weighs example by example instead of the batch as a whole.
    *Differs*: see the card.
    """
    require(temperature > 0, "temperature", temperature, "> 0")
    require(top >= 1, "top", top, ">= 1")
    require(margin >= 0, "margin", margin, ">= 0")
    counts = torch.ones_like(labels, dtype=torch.bool) if mask is None else mask.bool()
    apart = temperature**2 * kl(student_logits, teacher_logits.detach(), temperature)
    return precision(teacher_logits, labels, counts, top, margin).to(apart) * over(apart, counts)


def precision(logits: Tensor, labels: Tensor, counts: Tensor, top: int, margin: int) -> Tensor:
    """Mean over labelled places that count of 1 / rank of the first right choice; 0 without any. -> []"""
    chosen = logits.topk(min(top, logits.shape[-1])).indices - labels.unsqueeze(-1)
    right = (chosen >= -margin) & (chosen < max(1, margin))
    first = 1 / (1 + right.int().argmax(-1).double())
    return over(torch.where(right.any(-1), first, 0.0), counts & (labels >= 0))


def over(values: Tensor, counts: Tensor) -> Tensor:
    """Mean over the places that count; 0 where there is none. [...] x 2 -> []"""
    return torch.where(counts, values, 0.0).sum() / counts.sum().clamp_min(1)
