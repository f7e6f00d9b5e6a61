"""The student's features should tell as much as possible about the teacher's, channel by channel as far as they can."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from limbeck.core.card import method, require
from limbeck.core.features import Shapes
from limbeck.core.layerwise import Layers, each, matched, summed, widths
from limbeck.core.maths import pair
from limbeck.core.project import Pointwise, perceptron, through

EPSILON = 1e-5  # least variance


@method(
    paper="Ahn et al. 2019, eq. 5",
    year=2019,
    arxiv="1904.05835",
    code="HobbitLong/RepDistiller@b84f547:distiller_zoo/VID.py",
    differs="constants of the likelihood are left out, as in the code, so that values may be negative",
)
class VID(nn.Module):
    """Sum over layers of the mean of ((f_t - mu(f_s))^2 / v + log v) / 2.  maps, vectors -> [B], tokens -> [B, T]

    Minus the log-likelihood of the teacher's feature under a Gaussian that the student's feature predicts: a lower
    bound on their mutual information. mu is a network at every place, three layers with ReLUs, as wide as the teacher;
    v, one variance a teacher channel, is learned, so that the student may give up channels that it cannot predict.

    variance: v at the start, > 1e-5.
    layers: which of the paired features, counted from shallow (0) or from deep (-1); () takes all.

    *Needs*: features of each, of any kind; larger maps are average-pooled to the smaller.
    *Relates to*: use weight 1 beside `ce`; add `kd`. `fitnets` is the case of one fixed variance.
    """

    def __init__(
        self, student_feats: Shapes, teacher_feats: Shapes, *, variance: float = 5.0, layers: Layers = ()
    ) -> None:
        super().__init__()
        require(variance > EPSILON, "variance", variance, f"> {EPSILON}")
        self.variance, self.layers = variance, layers
        pairs, start = widths(student_feats, teacher_feats, layers), math.log(math.expm1(variance - EPSILON))
        self.means = nn.ModuleList(Pointwise(perceptron(s, t, t, t, bias=False)) for s, t in pairs)
        self.spreads = nn.ParameterList(torch.full((t,), start) for _, t in pairs)

    def forward(self, student_feats: list[Tensor], teacher_feats: list[Tensor]) -> Tensor:
        """Per example, or per token for tokens."""
        losses = []
        pairs = matched(student_feats, teacher_feats, self.layers)
        for (student, teacher), mean, spread in zip(pairs, self.means, self.spreads, strict=True):
            predicted, teacher = pair(through(mean, student), teacher)
            variance = F.softplus(spread) + EPSILON
            variance = variance[:, None, None] if teacher.ndim == 4 else variance
            losses.append(each((teacher - predicted).square() / variance + variance.log()) / 2)
        return summed(losses)
