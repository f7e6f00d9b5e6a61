"""Every layer of the student copies one of the teacher: where it looks, before the softmax, and what it then says."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import torch
from torch import Tensor, nn

from limbeck.core.card import method, require
from limbeck.core.features import Shape, per_example, same_places, width
from limbeck.core.heads import maps_apart, real_mean, same_heads
from limbeck.core.maths import pair
from limbeck.core.project import projector
from limbeck.core.taps import spread

T = TypeVar("T", Tensor, Shape)
HIDDEN = -100.0  # scores at or below are those of a mask that was added to them


@method(
    paper="Jiao et al. 2019, eq. 7-9",
    year=2019,
    arxiv="1909.10351",
    code="huawei-noah/Pretrained-Language-Model@0598f02:TinyBERT/task_distill.py",
    differs="the code averages over padding, too, and has one linear map, with bias, for tokens and layers alike "
    "(`shared`); here the maps have a bias, and the prediction loss, a later step, is `kd` at temperature 1",
)
class TinyBERT(nn.Module):
    """w_e |E_s W_e - E_t|^2 + sum_m w_h |H_s,m W_h - H_t,g(m)|^2 + w_a |A_s,m - A_t,g(m)|^2, means of squares.  -> [B]

    E [B, T, D] are the embedded tokens, H [B, T, D] the outputs of the layers, A [B, h, T, T] the scores of attention
    before their softmax, head by head; g(m) = m N / M spreads the student's M layers over the N of the teacher, last
    on last. Means are over real tokens, and pairs of them.

    embedding_weight: w_e >= 0. hidden_weight: w_h >= 0. attention_weight: w_a >= 0.
    shared: one linear map for tokens and layers, instead of one for the tokens and one for all layers; layers of
        other widths than the rest have their own in any case.

    *Needs*: `tokens`, `feats` and `attn_scores` of both, of all layers (`attn: true` in the zoo), the same tokens, as
        many heads. Scores of a mask, <= -100 on either side, count as 0.
    *Relates to*: weight 1 alone on raw text, then alone on the task's texts, then `kd` at temperature 1 alone
        (`stagewise`); or beside `ce` and `kd` at 0.1 to 1. Use `minilm_v2` where heads differ in number.
    """

    def __init__(
        self,
        student_tokens: Shape,
        teacher_tokens: Shape,
        student_feats: list[Shape],
        teacher_feats: list[Shape],
        student_attn_scores: list[Shape],
        teacher_attn_scores: list[Shape],
        *,
        embedding_weight: float = 1.0,
        hidden_weight: float = 1.0,
        attention_weight: float = 1.0,
        shared: bool = False,
    ) -> None:
        super().__init__()
        require(embedding_weight >= 0, "embedding_weight", embedding_weight, ">= 0")
        require(hidden_weight >= 0, "hidden_weight", hidden_weight, ">= 0")
        require(attention_weight >= 0, "attention_weight", attention_weight, ">= 0")
        self.embedding_weight, self.hidden_weight = embedding_weight, hidden_weight
        self.attention_weight, self.shared = attention_weight, shared
        same_heads("tinybert", (*student_attn_scores, *teacher_attn_scores))
        require(
            len(student_feats) <= len(teacher_feats),
            "layers of the student",
            len(student_feats),
            f"<= {len(teacher_feats)}, those of the teacher",
        )
        pairs = [(student_tokens, teacher_tokens), *_matched(student_feats, teacher_feats)]
        self.names = [
            "embedding" if n == 0 and not shared else f"{width(s)}to{width(t)}" for n, (s, t) in enumerate(pairs)
        ]
        self.maps = nn.ModuleDict()
        for name, (s, t) in zip(self.names, pairs, strict=True):
            if name not in self.maps:
                self.maps[name] = projector("linear", width(s), width(t))

    def forward(
        self,
        student_tokens: Tensor,
        teacher_tokens: Tensor,
        student_feats: list[Tensor],
        teacher_feats: list[Tensor],
        student_attn_scores: list[Tensor],
        teacher_attn_scores: list[Tensor],
        attention_mask: Tensor | None = None,
    ) -> Tensor:
        """Per example."""
        real = None if attention_mask is None else attention_mask.bool()
        said = [(student_tokens, teacher_tokens), *_matched(student_feats, teacher_feats)]
        apart = [self._apart(n, s, t.detach(), real) for n, (s, t) in zip(self.names, said, strict=True)]
        scores = [_scores_apart(s, t.detach(), real) for s, t in _matched(student_attn_scores, teacher_attn_scores)]
        embedding, hidden = apart[0], torch.stack(apart[1:]).sum(0)
        attention = torch.stack(scores).sum(0)
        return self.embedding_weight * embedding + self.hidden_weight * hidden + self.attention_weight * attention

    def _apart(self, name: str, student: Tensor, teacher: Tensor, real: Tensor | None) -> Tensor:
        student, teacher = same_places(student, teacher)
        dtype = next(self.maps[name].parameters()).dtype
        guess, aim = pair(self.maps[name](student.to(dtype)), teacher)
        error = (guess - aim).square()
        return real_mean(error.mean(-1), real) if error.ndim == 3 else per_example(error)


def _scores_apart(student: Tensor, teacher: Tensor, real: Tensor | None) -> Tensor:
    """Mean over heads and pairs of tokens of (A_s - A_t)^2: [B]."""
    looks, aim = (torch.where(x > HIDDEN, x, 0.0) for x in pair(student, teacher))
    return maps_apart(looks, aim, real)


def _matched(student: Sequence[T], teacher: Sequence[T]) -> list[tuple[T, T]]:
    """The student's layers, each with the one of the teacher that it copies."""
    return [(student[i], teacher[j]) for i, j in spread(len(student), len(teacher))]
