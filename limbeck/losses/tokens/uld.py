"""Place by place the student is as sure as the teacher, rank by rank, whatever words the ranks belong to."""

import torch
from torch import Tensor

from limbeck.core.card import method, require
from limbeck.core.fusion import in_order
from limbeck.core.maths import upcast
from limbeck.core.spans import on_places
from limbeck.core.vocabularies import ranked_distance


@method(
    paper="Boizard et al. 2024, eq. 3-4",
    year=2024,
    arxiv="2402.12030",
    code="Nicolas-BZRD/llm-recipes@ab6e798:models/distillation_model.py",
    differs="the mean is over the student's places, not over examples of means over the places that both have",
)
def uld(
    student_vocab_logits: Tensor,
    teacher_vocab_logits: Tensor,
    mask: Tensor | None = None,
    teacher_mask: Tensor | None = None,
    *,
    temperature: float = 1.0,
) -> Tensor:
    """sum_i |p_S,(i) - p_T,(i)| over ranks i, the shorter filled up with 0.  [B, T, V], [B, U, W] -> [B, T]

    The Wasserstein distance at a cost of 1 between any two words; in [0, 2]. The n-th place that counts for the student
    meets the n-th of the teacher, as far as both go; 0 at the others. So the mean over places is the paper's mean times
    (places that both have / places of the student), in a batch of one.

    temperature: of both, > 0.

    *Needs*: logits over any two vocabularies, and both masks: the first place that counts should be the same text.
    *Relates to*: add `ce` (1) and this at 1.5, the paper's weight. Places drift apart where the tokenizers differ: use
        `gold`, which aligns them first, or `alm`.
    *Differs*: see the card.
    """
    require(temperature > 0, "temperature", temperature, "> 0")
    mine = on_places(mask, student_vocab_logits[..., 0])
    theirs = on_places(teacher_mask, teacher_vocab_logits[..., 0])
    p = (upcast(student_vocab_logits) / temperature).softmax(-1)
    q = (upcast(teacher_vocab_logits.detach()) / temperature).softmax(-1).to(p)
    meets, partner = in_order(mine, theirs)
    q = q.gather(1, partner.unsqueeze(-1).expand(-1, -1, q.shape[-1]))
    return torch.where(meets, ranked_distance(p, q), 0.0)
