"""The teacher's words are given to the student's nearest in spelling, where both cut the text alike."""

import torch
from torch import Tensor

from limbeck.core.card import method
from limbeck.core.fusion import partners, reworded
from limbeck.core.maths import kl, label_logprobs, upcast


@method(
    paper="Wan et al. 2024, section 3.2 (MinED)",
    year=2024,
    arxiv="2401.10491",
    code="songmzhang/DSKD@077337a:code/criterions/min_edit_dis_kld.py",
    differs="texts are aligned by bytes, not by warping token strings of least edit distance: a step is used where one "
    "token of each side is the same bytes after the same text",
)
def mined(
    student_vocab_logits: Tensor,
    teacher_vocab_logits: Tensor,
    labels: Tensor,
    student_spans: Tensor,
    teacher_spans: Tensor,
    nearest_words: Tensor,
    mask: Tensor | None = None,
    teacher_mask: Tensor | None = None,
) -> Tensor:
    """KL(teacher, in the student's words || student) at each place.  [B, T, V], [B, U, W] -> [B, T]

    The logit of a student's word is the largest of the teacher's words that are nearest to it, -1e5 without any. Where
    a stretch is not one token of each side, and where the teacher has none, the target is the label alone: `ce`.

    *Needs*: two tokenizers in the batch, with `nearest_words`: by least edit distance, equal words first.
    *Relates to*: add `ce`; both at 0.5. Good where most words are in both vocabularies; else most of it is `ce`, and
        `alm` or `gold` say more. With one vocabulary it is `forward_kl`.
    *Differs*: see the card.
    """
    z, t = upcast(student_vocab_logits), upcast(teacher_vocab_logits.detach())
    alike, partner = partners(student_spans, teacher_spans, mask, teacher_mask)
    t = t.gather(1, partner.unsqueeze(-1).expand(-1, -1, t.shape[-1]))
    target = reworded(t, nearest_words, z.shape[-1])
    return torch.where(alike, kl(z, target), -label_logprobs(z, labels))
