"""The student is taken for the top of the teacher: counted from the last, its layers feel and look as the teacher's."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from limbeck.core.card import method, require
from limbeck.core.features import Shape, per_example, same_places, width
from limbeck.core.heads import maps_apart, real_mean, same_heads
from limbeck.core.maths import pair
from limbeck.core.project import projector, through


@method(
    paper="Mukherjee et al. 2021, eq. 3-4",
    year=2021,
    arxiv="2106.04563",
    code="microsoft/xtreme-distil-transformers@708e1e5:models.py",
    differs="every real token is matched, where the code takes the first of a sentence, which its head reads "
    "(`first_token`), or all of a tagged one; the dropout before the maps, 0.1 in the code, is off; equal widths have "
    "no map",
    zero_at_match=True,
)
class XtremeDistil(nn.Module):
    """sum_i=1..L+1 mean (W_i H_s,-i - H_t,-i)^2 + attention_weight sum_i=1..L mean (A_s,-i - A_t,-i)^2.  -> [B]

    H [B, T, D] are the L outputs of the student's layers and its embedded tokens, A [B, h, T, T] its attention after
    the softmax, head by head; -i counts from the last on either side, so that a shallow student copies the top of the
    teacher. Every W_i is its own, with a bias. Means over real tokens, and pairs of them.

    attention_weight: >= 0; 1 in the code.
    first_token: of H match the first token alone, for networks whose head reads that.
    dropout: share of the student's features that are hidden from W_i, in [0, 1).

    *Needs*: `tokens`, `feats` and `attn` of both (`attn: true` in the zoo), the same tokens, as many heads.
    *Relates to*: alone on unlabelled texts in a first stage of `programme`, after which `squared_error` of the logits
        and then labels open one layer after the other. `tinybert` spreads layers over those of the teacher instead.
    """

    def __init__(
        self,
        student_tokens: Shape,
        teacher_tokens: Shape,
        student_feats: list[Shape],
        teacher_feats: list[Shape],
        student_attn: list[Shape],
        teacher_attn: list[Shape],
        *,
        attention_weight: float = 1.0,
        first_token: bool = False,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        require(attention_weight >= 0, "attention_weight", attention_weight, ">= 0")
        require(0 <= dropout < 1, "dropout", dropout, "in [0, 1)")
        self.attention_weight, self.first_token, self.dropout = attention_weight, first_token, dropout
        for mine, its in ((student_feats, teacher_feats), (student_attn, teacher_attn)):
            require(len(mine) <= len(its), "layers of the student", len(mine), f"<= {len(its)}, those of the teacher")
        same_heads("xtremedistil", (*student_attn, *teacher_attn))
        states = zip([student_tokens, *student_feats][::-1], [teacher_tokens, *teacher_feats][::-1], strict=False)
        widths = [(width(mine), width(its)) for mine, its in states]
        self.maps = nn.ModuleList(nn.Identity() if a == b else projector("linear", a, b) for a, b in widths)

    def forward(
        self,
        student_tokens: Tensor,
        teacher_tokens: Tensor,
        student_feats: list[Tensor],
        teacher_feats: list[Tensor],
        student_attn: list[Tensor],
        teacher_attn: list[Tensor],
        attention_mask: Tensor | None = None,
    ) -> Tensor:
        """Per example."""
        real = None if attention_mask is None else attention_mask.bool()
        mine, its = [student_tokens, *student_feats][::-1], [teacher_tokens, *teacher_feats][::-1]
        states = [self._apart(*each, real) for each in zip(self.maps, mine, its, strict=False)]
        looks = [
            maps_apart(*pair(s, t.detach()), real) for s, t in zip(student_attn[::-1], teacher_attn[::-1], strict=False)
        ]
        return torch.stack(states).sum(0) + self.attention_weight * torch.stack(looks).sum(0)

    def _apart(self, fit: nn.Module, student: Tensor, teacher: Tensor, real: Tensor | None) -> Tensor:
        student, teacher = same_places(student, teacher.detach())
        guess, aim = pair(through(fit, F.dropout(student, self.dropout, self.training)), teacher)
        error = (guess - aim).square()
        if error.ndim != 3:
            return per_example(error)
        return error[:, 0].mean(-1) if self.first_token else real_mean(error.mean(-1), real)
