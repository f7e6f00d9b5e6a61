"""All heads of the student, mixed by a learned map, stand for every head of the teacher: no layers need be paired."""

import torch
from torch import Tensor, nn

from limbeck.core.card import method
from limbeck.core.errors import BadInput
from limbeck.core.features import Shape
from limbeck.core.maths import FLOOR, kl, pair
from limbeck.core.project import projector


@method(
    paper="Jin et al. 2024, eq. 3-5",
    year=2024,
    arxiv="2403.01479",
    code="ncsoft/Align-to-Distill@08340a2:fairseq/criterions/kd_label_smoothed_cross_entropy.py",
    differs="one value an example, where the code sums over the batch; pairs of tokens with padding are left out, but "
    "count in the code; the decay with the epochs is a schedule of the weight in a recipe",
    row="a2d_align_to_distill",
)
class A2D(nn.Module):
    """Sum over teacher heads c of KL(softmax(A_t,c) || softmax(sum_k w_ck A_s,k + b_c)).  [B, h, T, T] lists -> [B]

    A are attention maps after their softmax; k counts the heads of all layers of the student, c those of the teacher.
    The softmax here is over all pairs of tokens of one map. w is a 1x1 convolution that trains with the student.

    *Needs*: `attn` of both (`attn: true` in the zoo), of any number of layers and heads, of the same tokens.
    *Relates to*: weight 10 to 1000, decaying to a tenth, beside 0.5 `ce` and 0.5 `kd` at temperature 1; the paper's sum
        over a batch, at weight 1, decays by 0.9 an epoch. `minilm` and `tinybert` need heads of equal number; `afd`
        does this for maps of convolutional networks.
    """

    def __init__(self, student_attn: list[Shape], teacher_attn: list[Shape]) -> None:
        super().__init__()
        mine, aims = (sum(shape[1] for shape in maps) for maps in (student_attn, teacher_attn))
        self.alignment = projector("linear", mine, aims)

    def forward(
        self, student_attn: list[Tensor], teacher_attn: list[Tensor], attention_mask: Tensor | None = None
    ) -> Tensor:
        """Per example."""
        student, teacher = torch.cat(student_attn, 1), torch.cat(teacher_attn, 1).detach()
        if student.shape[2:] != teacher.shape[2:]:
            raise BadInput(
                f"a2d compares attention among the same tokens, got maps of {tuple(student.shape[2:])} of the student "
                f"and {tuple(teacher.shape[2:])} of the teacher"
            )
        mixed = self.alignment(student.to(next(self.alignment.parameters()).dtype))
        mixed, aims = pair(mixed, teacher)
        if attention_mask is not None:
            real = attention_mask.bool()
            pairs = (real[:, None, :] & real[:, :, None]).unsqueeze(1)
            mixed, aims = (torch.where(pairs, x, FLOOR) for x in (mixed, aims))
        return kl(mixed.flatten(2), aims.flatten(2)).sum(1)
