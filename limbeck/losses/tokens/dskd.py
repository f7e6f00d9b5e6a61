"""Both networks are compared in the student's space of hidden states and in the teacher's, matched by attention."""

import torch
from torch import Tensor, nn

from limbeck.core.card import method
from limbeck.core.features import Shape
from limbeck.core.maths import kl, label_logprobs, upcast
from limbeck.core.spans import on_places

FAR = -1e5  # the score of a place that does not count, as in the authors' code


@method(
    paper="Zhang et al. 2024, eq. 4-14 (dual space, cross-model attention)",
    year=2024,
    arxiv="2406.17328",
    code="songmzhang/DSKD@077337a:code/criterions/dual_space_kd_with_cross_model_attention.py",
    differs="forward KL in both spaces; projectors start as torch's linear layers and learn at the student's rate; "
    "deviations are those of all places, padding included, as in the code, so that a little depends on what fills up",
    exceptions={
        "gradient": "as published the student's head and embedding are detached: hidden states and projectors learn",
        "gradcheck": "finite differences see what is detached as published: the student's head and embedding",
    },
)
class DSKD(nn.Module):
    """KL(t2s || student) where t2s is right + CE(t2s, label) + the teacher's KL(teacher || s2t).  -> [B, T]

    Attention A [T, U] of the student's places (embedded input and label, projected) to the teacher's (the same, over
    their deviation): t2s = A P(h_T / std + e_label / std) read by the student's head, s2t = A' P'(h_S) read by the
    teacher's, where A' attends from the teacher's places. KL in the student's space counts where the likeliest word of
    t2s is the label, and has no gradient to t2s. The divergences at the teacher's places are summed and given to the
    student's in equal parts, so that the mean over places is the code's sum over both divided by the student's tokens.

    *Needs*: two tokenizers in the batch (they may be the same), hidden states, heads, embeddings and logits of both.
        Its three projectors train with the student and are dropped.
    *Relates to*: `ce` 0.5 and this at 0.5, the published rate. `alm` needs no inner states.
    *Differs*: see the card.
    """

    def __init__(self, student_hidden: Shape, teacher_hidden: Shape) -> None:
        super().__init__()
        width, wide = student_hidden[-1], teacher_hidden[-1]
        self.query = nn.Linear(2 * width, 2 * wide)
        self.to_student = nn.Linear(wide, width)
        self.to_teacher = nn.Linear(width, wide)

    def forward(
        self,
        student_hidden: Tensor,
        teacher_hidden: Tensor,
        student_vocab_logits: Tensor,
        teacher_vocab_logits: Tensor,
        student_head: Tensor,
        teacher_head: Tensor,
        student_embedding: Tensor,
        teacher_embedding: Tensor,
        inputs: Tensor,
        labels: Tensor,
        teacher_inputs: Tensor,
        teacher_labels: Tensor,
        mask: Tensor | None = None,
        teacher_mask: Tensor | None = None,
    ) -> Tensor:
        """At the student's places."""
        mine, theirs = on_places(mask, labels), on_places(teacher_mask, teacher_labels)
        with torch.autocast(student_hidden.device.type, enabled=False):
            h, teacher, words, seen, said = (
                x.to(self.query.weight.dtype)
                for x in (
                    student_hidden,
                    teacher_hidden.detach(),
                    student_embedding.detach(),
                    teacher_embedding[teacher_inputs].detach(),
                    teacher_embedding[teacher_labels].detach(),
                )
            )
            scores = (
                self.query(torch.cat([words[inputs], words[labels.clamp_min(0)]], -1))
                @ _scaled(torch.cat([seen, said], -1)).mT
            )
            scores = scores / (2 * teacher.shape[-1]) ** 0.5
            scores = torch.where(mine.unsqueeze(2) & theirs.unsqueeze(1), scores, scores + FAR)
            to_student = scores.softmax(-1) @ self.to_student(_scaled(teacher) + _scaled(said))
            to_teacher = scores.mT.softmax(-1) @ self.to_teacher(h)
            heads = student_head[: student_vocab_logits.shape[-1]], teacher_head[: teacher_vocab_logits.shape[-1]]
            t2s, s2t = (x @ head.detach().to(h).mT for x, head in zip((to_student, to_teacher), heads, strict=True))
            right = t2s.argmax(-1) == labels
            here = torch.where(right, kl(student_vocab_logits, t2s.detach()), 0.0) - label_logprobs(t2s, labels)
            there = torch.where(theirs, kl(s2t, upcast(teacher_vocab_logits.detach())), 0.0).sum(1, keepdim=True)
            return here + torch.where(mine, there / mine.sum(1, keepdim=True).clamp_min(1), 0.0)


def _scaled(x: Tensor) -> Tensor:
    """Over the deviation of all its numbers."""
    return x / x.std().clamp_min(torch.finfo(x.dtype).tiny)
