"""A hint: the student's inner layer, sent through a learned regressor, predicts an inner layer of the teacher."""

from torch import Tensor, nn

from limbeck.core.card import method
from limbeck.core.errors import BadInput
from limbeck.core.maths import pair

Shape = tuple[int, ...]


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
    ReLU. Vectors [B, D] and tokens [B, T, D]: linear.

    layer: which of the paired features, counted from shallow (0) or from deep (-1).

    *Needs*: one feature of each, the same number of tapped layers a side; maps of any size, tokens of equal number. Tap
        the teacher before its ReLU only for linear regressors: those for maps end in one.
    *Relates to*: add `ce` and `kd`; use weight 100 for maps after ReLU. Helps when the networks are of one family;
        otherwise use `rkd` or `crd`, which do not force the teacher's coordinates on the student.
    *Differs*: see the card.
    """

    def __init__(self, student_feats: list[Shape], teacher_feats: list[Shape], *, layer: int = -1) -> None:
        super().__init__()
        self.layer = layer
        for side, feats in (("student", student_feats), ("teacher", teacher_feats)):
            if not -len(feats) <= layer < len(feats):
                raise BadInput(f"`layer` {layer} is none of the {len(feats)} features of the {side}")
        student, teacher = student_feats[layer], teacher_feats[layer]
        same_kind = len(student) == len(teacher) in (2, 3, 4)
        if not same_kind or (len(student) == 3 and student[1] != teacher[1]):
            raise BadInput(
                "fitnets compares maps with maps, vectors with vectors, or tokens with as many tokens, but layer "
                f"{layer} of the student gives {student} and of the teacher {teacher}"
            )
        self.projector = _for_maps(student, teacher) if len(student) == 4 else nn.Linear(student[-1], teacher[-1])

    def forward(self, student_feats: list[Tensor], teacher_feats: list[Tensor]) -> Tensor:
        """Per example, or per token for tokens."""
        weight = next(self.projector.parameters())
        predicted = self.projector(student_feats[self.layer].to(weight.dtype))
        predicted, hint = pair(predicted, teacher_feats[self.layer].detach())
        error = (predicted - hint).square()
        return error.flatten(1).mean(1) if error.ndim == 4 else error.mean(-1)


def _for_maps(student: Shape, teacher: Shape) -> nn.Sequential:
    """From [B, C, H, W] of the student to that of the teacher."""
    (_, c, *size), (_, out, *wanted) = student, teacher
    resize: nn.Module
    if size == [2 * s for s in wanted]:
        resize = nn.Conv2d(c, out, kernel_size=3, stride=2, padding=1)
    elif [2 * s for s in size] == wanted:
        resize = nn.ConvTranspose2d(c, out, kernel_size=4, stride=2, padding=1)
    elif all(a >= b for a, b in zip(size, wanted, strict=True)):
        resize = nn.Conv2d(c, out, kernel_size=(1 + size[0] - wanted[0], 1 + size[1] - wanted[1]))
    else:
        resize = nn.Sequential(nn.Conv2d(c, out, 1), nn.Upsample(tuple(wanted), mode="bilinear"))
    return nn.Sequential(resize, nn.BatchNorm2d(out), nn.ReLU())
