"""Inner layers speak in logits too: exits from every student layer learn what the teacher says at its end."""

import torch
from torch import Tensor, nn

from limbeck.core.card import method
from limbeck.core.exits import exit_from, said
from limbeck.core.features import Shape
from limbeck.core.features import width as channels
from limbeck.core.maths import log_probs
from limbeck.core.ranges import above, at_least


@method(
    paper="Hao et al. 2023, eq. 7",
    year=2023,
    arxiv="2310.19444",
    code="Hao840/OFAKD@f7bb896:distillers/ofa.py",
    differs="an exit depends on how many tapped layers follow its own, not on four stages; its width is that of the "
    "widest tapped student layer, where the code takes the teacher's when that is wider, so that stored logits are "
    "enough; attention has biases, zero at the start; perceptrons, whose layers are vectors, get exits of their kind",
    exceptions={"mask": "the exits' batch norm takes its statistics over the whole batch, masked examples too"},
)
class OFAKD(nn.Module):
    """output_weight L(z) + branch_weight sum over layers of L(exit(feature)).  [B, C], lists, [B] -> [B]

    L(z) = -sum_c [(p_c + y_c)^gamma - y_c] log softmax(z / T)_c, with the teacher's p = softmax(z_t / T) and the label
    y as one-hot. gamma = 1 is the cross-entropy with p, whatever the label; above 1 the label weighs more, at
    (1 + p)^gamma - 1, and the doubtful rest less. Logits know nothing of the architecture, so any two networks will do.

    Exits: separable convolutions for maps, merges and transformer blocks for tokens, plain layers for vectors; they
    train with the student and are dropped (`core.exits`).

    gamma: > 0, of the paper's use 1 to 1.5; larger for teachers that are often right.
    temperature: T > 0, of both sides; the sum has no factor T^2.
    output_weight: of the student's own logits, >= 0.
    branch_weight: of the exits, >= 0.
    width: of what an exit's last layer reads, >= 1; None takes the widest student feature.
    class_token: whether token features begin with a class token, which is then read in the place of their mean.

    *Needs*: logits of both, labels, and one feature a stage of the student.
    *Relates to*: beside `ce` at weight 1, without `kd`. Made for unlike networks (transformer to CNN and the like),
        where `fitnets` or `at` compare what cannot be compared; within a family `dkd` and `reviewkd` do as well.
    """

    def __init__(
        self,
        student_feats: list[Shape],
        teacher_logits: Shape,
        *,
        gamma: float = 1.0,
        temperature: float = 1.0,
        output_weight: float = 1.0,
        branch_weight: float = 1.0,
        width: int | None = None,
        class_token: bool = False,
    ) -> None:
        super().__init__()
        above(0, gamma=gamma, temperature=temperature)
        at_least(0, output_weight=output_weight, branch_weight=branch_weight)
        self.gamma, self.temperature = gamma, temperature
        self.output_weight, self.branch_weight = output_weight, branch_weight
        self.width, self.class_token = width, class_token
        wide, last = width or max(map(channels, student_feats)), len(student_feats) - 1
        self.exits = nn.ModuleList(
            exit_from(shape, teacher_logits[-1], later=last - i, width=wide, class_token=class_token)
            for i, shape in enumerate(student_feats)
        )

    def forward(
        self, student_logits: Tensor, student_feats: list[Tensor], teacher_logits: Tensor, labels: Tensor
    ) -> Tensor:
        """Per example."""
        p = log_probs(teacher_logits.detach(), self.temperature).exp()
        label = torch.zeros_like(p).scatter_(-1, labels.unsqueeze(-1), 1.0)  # one_hot would read the labels first
        weights = (p + label) ** self.gamma - label
        inner = [said(leave, feat) for leave, feat in zip(self.exits, student_feats, strict=True)]
        adaptive = -(weights * log_probs(torch.stack([student_logits, *inner]), self.temperature)).sum(-1)
        return self.output_weight * adaptive[0] + self.branch_weight * adaptive[1:].sum(0)
