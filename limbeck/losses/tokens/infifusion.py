"""Place by place the student's largest logits fall off as the teacher's do, whatever words they belong to."""

import torch
from torch import Tensor

from limbeck.core.card import method, require
from limbeck.core.fusion import in_order
from limbeck.core.maths import upcast
from limbeck.core.responses import standardized
from limbeck.core.spans import on_places
from limbeck.core.vocabularies import ranked_distance


@method(
    paper="Yan et al. 2025, top-K logits and logit standardisation",
    year=2025,
    arxiv="2501.02795",
    differs="the paper's K is not known for certain; the deviation is the unbiased one plus 1e-7; the mean is over the "
    "student's places",
    variant_of="uld",
)
def infifusion(
    student_vocab_logits: Tensor,
    teacher_vocab_logits: Tensor,
    mask: Tensor | None = None,
    teacher_mask: Tensor | None = None,
    *,
    top: int = 10,
    standardize: bool = True,
    temperature: float = 1.0,
) -> Tensor:
    """sum_k |p_S,(k) - p_T,(k)| over ranks k <= top, p = softmax(Z(largest) / T).  [B, T, V], [B, U, W] -> [B, T]

    Z(z) = (z - mean) / (std + 1e-7), of each side's `top` largest logits, so that neither scale nor shift counts; in
    [0, 2]. The n-th place that counts for the student meets the n-th of the teacher, as far as both go; 0 at others.

    top: K >= 2 (1 without standardize), cut to either vocabulary. standardize: without, and with all words, it is
    `uld`. temperature: T > 0, of both.

    *Needs*: logits over any two vocabularies, and both masks: the first place that counts should be the same text.
    *Relates to*: add `ce` (1); 0.1 to 2 of this. `unified_fusion` and `pairwise_fusion` take it from several sources.
        `gold` and `alm` align the text first.
    *Differs*: see the card.
    """
    require(top >= 1 + standardize, "top", top, f">= {1 + standardize}")
    require(temperature > 0, "temperature", temperature, "> 0")
    mine, theirs = (
        on_places(m, z[..., 0]) for m, z in ((mask, student_vocab_logits), (teacher_mask, teacher_vocab_logits))
    )
    meets, partner = in_order(mine, theirs)
    p, q = (
        _probabilities(z, top, standardize, temperature) for z in (student_vocab_logits, teacher_vocab_logits.detach())
    )
    q = q.to(p).gather(1, partner.unsqueeze(-1).expand(-1, -1, q.shape[-1]))
    return torch.where(meets, ranked_distance(p, q), 0.0)


def _probabilities(logits: Tensor, top: int, standardize: bool, temperature: float) -> Tensor:
    """Of the largest logits alone: [..., V] -> [..., top]."""
    largest = upcast(logits).topk(min(top, logits.shape[-1])).values
    return ((standardized(largest) if standardize else largest) / temperature).softmax(-1)
