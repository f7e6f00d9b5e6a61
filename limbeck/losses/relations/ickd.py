"""Channels that fire together in the teacher should fire together in the student."""

import torch.nn.functional as F
from torch import Tensor, nn

from limbeck.core.card import method, require
from limbeck.core.features import Shape, patches, same_places, width
from limbeck.core.layerwise import Connector, picked
from limbeck.core.maths import gram, pair


@method(
    paper="Liu et al. 2021, section 3",
    year=2021,
    arxiv="2202.03680",
    code="ADLab-AutoDrive/ICKD@403b8d3:Cifar100/distiller_zoo/ICKD.py",
    differs="as the code: rows of unit length and a sum divided by the channels C, not by C^2. The code has no grid. "
    "Where maps differ in size the larger is average-pooled",
    exceptions={"mask": "the connector's batch norm takes its statistics over the whole batch, masked examples too"},
)
class ICKD(nn.Module):
    """|N(F_s F_s^T) - N(F_t F_t^T)|^2 / C, F [C, places], N: rows to unit length.  [B, ...] lists -> [B]

    F F^T [C, C] says how much each channel has of each other one: diversity and redundancy of the channels. F_s is the
    student's feature after a linear map at every place with batch norm, as wide as the teacher's; positions of the
    student may come in any order.

    grid: patches a side, >= 1; more than 1 compares inside each patch and takes the mean (for dense prediction).
    layer: which of the paired features, counted from shallow (0) or from deep (-1).

    *Needs*: a map or tokens of each; the last before the pooling.
    *Relates to*: use weight 2.5 beside `ce`; add `kd`. `sp` does the same among examples and needs a batch, `nst`
        compares channels as a set.
    """

    def __init__(
        self, student_feats: list[Shape], teacher_feats: list[Shape], *, grid: int = 1, layer: int = -1
    ) -> None:
        super().__init__()
        require(grid >= 1, "grid", grid, ">= 1")
        self.grid, self.layer = grid, layer
        student, teacher = picked(student_feats, teacher_feats, layer)
        self.connector = Connector(width(student), width(teacher))

    def forward(self, student_feats: list[Tensor], teacher_feats: list[Tensor]) -> Tensor:
        """Per example."""
        student, teacher = same_places(student_feats[self.layer], teacher_feats[self.layer].detach())
        student, teacher = pair(self.connector(student), teacher)
        difference = self._correlation(student) - self._correlation(teacher)
        return difference.square().sum((2, 3)).mean(1) / difference.shape[-1]

    def _correlation(self, feature: Tensor) -> Tensor:
        """[B, patches, C, C], each row of unit length."""
        return F.normalize(gram(patches(feature, self.grid)), dim=-1)
