"""A hint: the student's inner layer, sent through a learned regressor, predicts an inner layer of the teacher."""

from torch import Tensor, nn

from limbeck.core.card import method
from limbeck.core.features import Shape, common, same_places, width
from limbeck.core.layerwise import each, picked
from limbeck.core.maths import pair
from limbeck.core.project import map_regressor, projector


@method(
    paper="Romero et al. 2014, eq. 3",
    year=2014,
    arxiv="1412.6550",
    code="megvii-research/mdistiller@a08d46f:mdistiller/distillers/FitNet.py",
    differs="one joint stage beside the other losses instead of a hint stage before them; mean over the elements, so "
    "that the paper's half sum of squares is this times (elements of a teacher feature) / 2; the code's regressor "
    "(convolution, batch norm, ReLU); map sizes that the code refuses are brought over by bilinear resizing",
    exceptions={"mask": "the regressor's batch norm takes its statistics over the whole batch, masked examples too"},
)
class FitNets(nn.Module):
    """Mean squared error of the regressed student feature and the teacher feature.  maps, vectors -> [B], tokens [B, T]

    The regressor is sized from the shapes. Maps [B, C, H, W]: a convolution of stride 2 when the student's map is twice
    as large, a transposed one when half as large, else a kernel that takes off the difference, then batch norm and
    ReLU. All else: linear, at places that both have (a vector has one, the mean over the other's places).

    layer: which of the paired features, counted from shallow (0) or from deep (-1).

    *Needs*: one feature of each, of any kind. Tap the teacher before its ReLU only for linear regressors: those for
        maps end in one.
    *Relates to*: add `ce` and `kd`; use weight 100 for maps after ReLU. Helps when the networks are of one family;
        otherwise use `rkd` or `crd`, which do not force the teacher's coordinates on the student.
    """

    def __init__(self, student_feats: list[Shape], teacher_feats: list[Shape], *, layer: int = -1) -> None:
        super().__init__()
        self.layer = layer
        student, teacher = picked(student_feats, teacher_feats, layer)
        self.maps = len(student) == len(teacher) == 4
        if self.maps:
            self.projector: nn.Module = map_regressor(student, teacher)
        else:
            self.projector = projector("linear", *map(width, common(student, teacher)))

    def forward(self, student_feats: list[Tensor], teacher_feats: list[Tensor]) -> Tensor:
        """Per example, or per token for tokens."""
        student, hint = student_feats[self.layer], teacher_feats[self.layer].detach()
        if not self.maps:
            student, hint = same_places(student, hint)
        predicted, hint = pair(self.projector(student.to(next(self.parameters()).dtype)), hint)
        return each((predicted - hint).square())
