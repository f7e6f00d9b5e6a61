"""The student looks where the teacher looks; which of its layers answers for which of the teacher's is learned."""

import torch.nn.functional as F
from torch import Tensor, nn

from limbeck.core.alignment import Alignment, all_pairs
from limbeck.core.card import method, require
from limbeck.core.features import Shape, as_map, pooled, width
from limbeck.core.features import tokens as places
from limbeck.core.maths import pair, upcast


@method(
    paper="Ji et al. 2021, eq. 1-5",
    year=2021,
    arxiv="2102.02973",
    code="clovaai/attention-feature-distillation@dd990d0:distill/AFD.py",
    exceptions={"mask": "queries and keys are batch-normalised over the whole batch, masked examples too"},
)
class AFD(nn.Module):
    """Sum over teacher layers of sum_s alpha_ts mean over places (phi_s - phi_t)^2.  [B, C, H, W] lists -> [B]

    phi = the mean of the squared channels at each place, as a unit vector over the places; a student's picture is first
    resized to the teacher's by averaging. alpha_t. = softmax over s of (q_t W_t k_s + p_t p_s) / sqrt(D) for each
    example, where q = BN(linear(h)) of a teacher layer and k = ReLU(BN(linear(h))) of a student layer see the channels'
    means over the places, W_t is a batch-normalised linear map and p are learned vectors of the layers.

    key_width: D of queries and keys, >= 1.

    *Needs*: feature maps, or tokens of equal number or square pictures of them; all layers that might serve, such as
        the output of every block.
    *Relates to*: weight 50 to 200 beside `ce` and `kd` (0.1 and 0.9 in the paper). Use `at` when the pairs are known,
        of which this is the case of one layer each; `semckd` when what the channels say is to be matched, too.
    """

    def __init__(self, student_feats: list[Shape], teacher_feats: list[Shape], *, key_width: int = 128) -> None:
        super().__init__()
        require(key_width >= 1, "key_width", key_width, ">= 1")
        self.key_width = key_width
        self.alignment = Alignment(
            [_normed(width(t), key_width) for t in teacher_feats],
            [nn.Sequential(_normed(width(s), key_width), nn.ReLU()) for s in student_feats],
            temperature=key_width**0.5,
            positions=key_width,
            bilinear=_normed(key_width, key_width * len(teacher_feats)),
        )

    def forward(self, student_feats: list[Tensor], teacher_feats: list[Tensor]) -> Tensor:
        """Per example."""
        teacher, dtype = [t.detach() for t in teacher_feats], next(self.parameters()).dtype
        weights = self.alignment([pooled(t).to(dtype) for t in teacher], [pooled(s).to(dtype) for s in student_feats])
        looks = [_look(t) for t in teacher]

        def cost(i: int, j: int) -> Tensor:
            student, target = pair(_look(student_feats[j], teacher[i]), looks[i])
            return (student - target).square().mean(1)

        costs = all_pairs(cost, len(teacher), len(student_feats))
        total: Tensor = (weights * costs).sum((1, 2))
        return total


def _normed(features: int, out: int) -> nn.Module:
    return nn.Sequential(nn.Linear(features, out), nn.BatchNorm1d(out))


def _look(feature: Tensor, like: Tensor | None = None) -> Tensor:
    """Where activations are large, a unit vector over the places [B, places] of `like`."""
    strength = upcast(feature).square()
    if like is not None and places(feature).shape[1] != places(like).shape[1]:
        _, _, *size = as_map(like).shape
        strength = F.adaptive_avg_pool2d(as_map(strength).mean(1, keepdim=True), (size[0], size[1]))
    return F.normalize(places(strength).mean(2))
