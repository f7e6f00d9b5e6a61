"""Every student layer learns from a mixture of all teacher layers, weighed by how alike they see the batch."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from limbeck.core.alignment import Alignment, all_pairs
from limbeck.core.card import method, require
from limbeck.core.errors import BadInput
from limbeck.core.features import Shape, apart, same_places, tokens, width
from limbeck.core.maths import gram


@method(
    paper="Chen et al. 2020, eq. 4-9",
    year=2020,
    arxiv="2012.03236",
    code="DefangChen/SimKD@2b389c3:models/util.py",
    differs="a batch smaller than that of the start, which the code skips, counts as if the missing examples were zero",
    exceptions={
        "batch order": "the paper embeds rows of the batch's similarity matrix, whose columns are in the batch's order",
        "mask": "similarities to masked examples and the regressors' batch norm take in the whole batch",
    },
)
class SemCKD(nn.Module):
    """Mean over student layers of sum_t alpha_st mean (r_st(F_s) - F_t)^2, all S x T pairs.  lists -> [B]

    alpha_s. = softmax over t of <q_s, k_t> / temperature, for each example: q and k are unit vectors, embedded by a
    layer's own two-layer network from an example's row of the similarities F F^T of the batch. The larger map is
    averaged down to the smaller; r_st is 1x1, 3x3, 1x1 convolutions with batch norm and ReLU between. Tokens that make
    no square picture are convolved as a row of places.

    temperature: > 0; lower makes the mixture sharper (`soft` of the code).

    *Needs*: features of both, any number of layers; batches of one size, at least 4, known when training starts.
    *Relates to*: weight 400 beside `ce` and `kd`, both at weight 1. Use it where nobody knows which layers belong
        together, such as networks of two families; `afd` when only where they look is to be matched; `fitnets` for one
        known pair at a fraction of the time.
    """

    def __init__(self, student_feats: list[Shape], teacher_feats: list[Shape], *, temperature: float = 1.0) -> None:
        super().__init__()
        self.temperature, self.examples = temperature, student_feats[0][0]
        require(self.examples >= 4, "batch size", self.examples, ">= 4")
        self.alignment = Alignment(
            [Row(self.examples) for _ in student_feats],
            [Row(self.examples) for _ in teacher_feats],
            temperature=temperature,
        )
        self.regressors = nn.ModuleList(
            nn.ModuleList(_regressor(width(s), width(t)) for t in teacher_feats) for s in student_feats
        )

    def forward(self, student_feats: list[Tensor], teacher_feats: list[Tensor]) -> Tensor:
        """Per example."""
        self.alignment.temperature = self.temperature
        teacher = [t.detach() for t in teacher_feats]
        weights = self.alignment([self._rows(s) for s in student_feats], [self._rows(t) for t in teacher])

        def cost(i: int, j: int) -> Tensor:
            source, target = same_places(student_feats[i], teacher[j])
            guess: Tensor = self.regressors[i][j](_picture(source))  # type: ignore[index]
            return apart(guess, _picture(target))

        costs = all_pairs(cost, len(student_feats), len(teacher))
        mixed: Tensor = (weights * costs).sum(-1)
        return mixed.mean(-1)

    def _rows(self, feature: Tensor) -> Tensor:
        """Similarities of each example to those of the batch [B, examples]; 0 to examples that are missing."""
        missing = self.examples - len(feature)
        if missing < 0:
            raise BadInput(f"semckd was built for batches of {self.examples} examples, got {len(feature)}")
        return F.pad(gram(feature.flatten(1)), (0, missing))


class Row(nn.Module):
    """From an example's similarities [B, B] to a unit vector [B, B // 4]."""

    def __init__(self, examples: int) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(examples, examples // 4 * 2), nn.Linear(examples // 4 * 2, examples // 4)

    def forward(self, rows: Tensor) -> Tensor:
        with torch.autocast(rows.device.type, enabled=False):
            inner = F.relu(self.first(rows.to(self.first.weight.dtype)))
            unit: Tensor = F.normalize(self.second(inner))
            return unit


def _picture(feature: Tensor) -> Tensor:
    """A map as it is; tokens and vectors as a map of one column."""
    return feature if feature.ndim == 4 else tokens(feature).mT.unsqueeze(-1)


def _regressor(channels: int, out: int) -> nn.Module:
    inner = 2 * out
    return nn.Sequential(
        nn.Conv2d(channels, inner, 1, bias=False),
        nn.BatchNorm2d(inner),
        nn.ReLU(),
        nn.Conv2d(inner, inner, 3, padding=1, bias=False),
        nn.BatchNorm2d(inner),
        nn.ReLU(),
        nn.Conv2d(inner, out, 1, bias=False),
    )
