"""The student is patient: its middle layers say of a text, up to scale, what middle layers of the teacher say."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from limbeck.core.card import method, require
from limbeck.core.errors import BadInput
from limbeck.core.features import Shape, pooled, width
from limbeck.core.maths import pair


@method(
    paper="Sun et al. 2019, eq. 6",
    year=2019,
    arxiv="1908.09355",
    code="intersun/PKD-for-BERT-Model-Compression@9e9e860:src/KD_loss.py",
    differs="the code's mean over layers and channels is this / (layers x width), so its weights of 10 to 1000 are "
    "divided by that; its KD term is a mean over classes, too, where `kd` is their sum. Students of another width, "
    "which paper and code do not have, get a linear map a layer",
    zero_at_match=True,
)
class PatientKD(nn.Module):
    """Sum over layers i of |h_s,i / |h_s,i| - h_t,I(i) / |h_t,I(i)||^2 of one state an example.  [B, T, D] lists -> [B]

    The last layers are left to the logits: a student of k layers has its first k - 1 compared. skip: I(i) = i n / k of
    n teacher layers, every n/k-th; last: I(i) = n - k + i, the ones just below the teacher's last.

    layers: "skip" or "last"; the paper finds skip the better.
    state: "first" token of each sequence, as BERT's class token, or the "mean" over real tokens, for encoders without
        one. Maps and vectors are always averaged.
    normalized: compare unit vectors; False compares the states themselves, as the code can.

    *Needs*: `feats` of all layers of both, at least two a side. Widths may differ.
    *Relates to*: 0.3 ce + 0.7 kd (temperature 5 to 20) + 0.1 to 10 of this; start the student from the teacher's first
        k layers (`weight_inheritance`). `tinybert` compares every token and the attention.
    """

    def __init__(
        self,
        student_feats: list[Shape],
        teacher_feats: list[Shape],
        *,
        layers: Literal["skip", "last"] = "skip",
        state: Literal["first", "mean"] = "first",
        normalized: bool = True,
    ) -> None:
        super().__init__()
        require(layers in ("skip", "last"), "layers", layers, '"skip" or "last"')
        require(state in ("first", "mean"), "state", state, '"first" or "mean"')
        self.layers, self.state, self.normalized = layers, state, normalized
        self.chosen = patient_layers(len(student_feats), len(teacher_feats), layers)
        widths = [(width(student_feats[i]), width(teacher_feats[j])) for i, j in self.chosen]
        self.projectors = nn.ModuleList(nn.Identity() if s == t else nn.Linear(s, t, bias=False) for s, t in widths)

    def forward(
        self, student_feats: list[Tensor], teacher_feats: list[Tensor], attention_mask: Tensor | None = None
    ) -> Tensor:
        """Per example."""
        apart = []
        for projector, (i, j) in zip(self.projectors, self.chosen, strict=True):
            state = self._state(student_feats[i], attention_mask)
            if isinstance(projector, nn.Linear):
                state = projector(state.to(projector.weight.dtype))
            state, aim = pair(state, self._state(teacher_feats[j].detach(), attention_mask))
            if self.normalized:
                state, aim = F.normalize(state, dim=-1), F.normalize(aim, dim=-1)
            apart.append((state - aim).square().sum(-1))
        return torch.stack(apart).sum(0)

    def _state(self, feature: Tensor, real: Tensor | None) -> Tensor:
        if feature.ndim == 3:
            return feature[:, 0] if self.state == "first" else pooled(feature, real)
        return pooled(feature)


def patient_layers(student: int, teacher: int, layers: str) -> list[tuple[int, int]]:
    """Pairs (student layer, teacher layer), from 0, for networks of that many layers; both last ones are left out."""
    if not 2 <= student <= teacher:
        raise BadInput(
            f"patient_kd leaves out the last layer of both and needs no fewer layers of the teacher, got {student} of "
            f"the student and {teacher} of the teacher; tap the output of every block"
        )
    if layers == "last":
        return [(i, teacher - student + i) for i in range(student - 1)]
    return [(i, (i + 1) * teacher // student - 1) for i in range(student - 1)]
