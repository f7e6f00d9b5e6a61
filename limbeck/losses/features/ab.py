"""Only whether each neuron of the teacher fires is copied: the student must be clearly on the same side of zero."""

import torch
from torch import Tensor, nn

from limbeck.core.card import method, require
from limbeck.core.features import Shapes, as_map
from limbeck.core.layerwise import Connector, Layers, deepest_most, matched, widths
from limbeck.core.maths import pair


@method(
    paper="Heo et al. 2018, section 3",
    year=2018,
    arxiv="1811.03233",
    code="bhheo/AB_distillation@a7701d3:cifar10_AB_distillation.py",
    differs="the code multiplies by 0.003: give that as the weight. The paper trains the student by this alone first, "
    "then by the labels or `kd`: `stagewise` does that; here it may also stand beside them. Where maps differ in size "
    "the larger is average-pooled",
    exceptions={"mask": "the connectors' batch norm takes its statistics over the whole batch, masked examples too"},
)
class AB(nn.Module):
    """Sum over layers of 2^(l + 1 - L) sum max(0, margin - sign(f_t) r(f_s))^2.  [B, ...] lists -> [B]

    f are features before the ReLU, l = 0 .. L - 1 from shallow to deep; sign is +1 where f_t > 0, else -1. r is a
    linear map at every place with batch norm where the widths differ, else nothing. A smooth stand-in for counting the
    neurons that fire for one network alone; how strongly the teacher's fire does not matter.

    margin: how far from zero is far enough, > 0.
    layers: which of the paired features, counted from shallow (0) or from deep (-1); () takes all.

    *Needs*: features before a ReLU, such as taps "blocks.2.relu2:in", usually one a stage.
    *Relates to*: first stage of `stagewise`, weight 0.003; `ofd` also copies how strongly neurons fire, in one stage.
    """

    def __init__(
        self, student_feats: Shapes, teacher_feats: Shapes, *, margin: float = 1.0, layers: Layers = ()
    ) -> None:
        super().__init__()
        require(margin > 0, "margin", margin, "> 0")
        self.margin, self.layers = margin, layers
        pairs = widths(student_feats, teacher_feats, layers)
        self.connectors = nn.ModuleList(nn.Identity() if s == t else Connector(s, t) for s, t in pairs)

    def forward(self, student_feats: list[Tensor], teacher_feats: list[Tensor]) -> Tensor:
        """Per example: a sum over channels and places."""
        losses = []
        pairs = matched(student_feats, teacher_feats, self.layers)
        for (student, teacher), connector in zip(pairs, self.connectors, strict=True):
            student, teacher = pair(as_map(connector(student)), as_map(teacher))
            lacking = self.margin - torch.where(teacher > 0, student, -student)
            losses.append(lacking.clamp_min(0).square().sum((1, 2, 3)))
        return deepest_most(losses)
