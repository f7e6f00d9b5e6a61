"""The student's embedding points to where the teacher has the class on average, and grows as long as the teacher's."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from limbeck.core.bank import ClassMeans
from limbeck.core.card import method, require
from limbeck.core.features import Mask, Shape
from limbeck.core.maths import pair


@method(
    paper="Wang et al. 2023, eq. 6",
    year=2023,
    arxiv="2305.17007",
    code="WangYZ1608/Knowledge-Distillation-via-ND@fc6f3f9:CIFAR/utils.py",
    differs="class means are those of the batches seen so far, augmented as they are, not of a pass over the training "
    "set before it begins",
    exceptions={
        "mask": "the projector's batch norm takes its statistics over the whole batch, masked examples too",
        "batch order": "the projector's dropout hits other units of an example that stands at another place",
    },
)
class NDLoss(nn.Module):
    """1 - <s, m_c / |m_c|> / max(|s|, |t|), c the label and m_c the teacher's mean embedding of c.  [B, D] x 2 -> [B]

    That is 1 - cos(s, m_c) |s| / max(|s|, |t|): s gains by length up to that of the teacher's t, a wrong direction
    always costs. Where widths differ, s goes through batch norm, dropout and a linear map, dropped after training.

    dropout: of that projector, in [0, 1); without one it does nothing.

    *Needs*: embeddings of both, labels, and the teacher's logits, of which only the number of classes is read.
    *Relates to*: weight 2 beside `ce` and `kd` (KD++), 4 beside `ce` and `dkd`, with a rising weight of those two over
        the first epochs; also beside `dist` and `reviewkd`. Use `fitnets` on embeddings where each example's place
        matters, not only that of its class.
    """

    def __init__(self, student_emb: Shape, teacher_emb: Shape, teacher_logits: Shape, *, dropout: float = 0.5) -> None:
        super().__init__()
        require(0 <= dropout < 1, "dropout", dropout, "in [0, 1)")
        self.dropout, student, teacher = dropout, student_emb[-1], teacher_emb[-1]
        self.norm = nn.Identity() if student == teacher else nn.BatchNorm1d(student)
        self.projector = nn.Identity() if student == teacher else nn.Linear(student, teacher)
        self.classes = ClassMeans(teacher_logits[-1], teacher)

    def forward(
        self, student_emb: Tensor, teacher_emb: Tensor, teacher_logits: Tensor, labels: Tensor, mask: Mask = None
    ) -> Tensor:
        """Per example; takes the teacher's embeddings into the class means in training mode, with gradients on."""
        student, teacher = pair(student_emb, teacher_emb.detach())
        if self.training and torch.is_grad_enabled():
            self.classes.add(teacher, labels, mask)
        if isinstance(self.projector, nn.Linear):
            normed = self.norm(student.to(self.projector.weight.dtype))
            student, teacher = pair(self.projector(F.dropout(normed, self.dropout, self.training)), teacher)
        centre = F.normalize(self.classes.means[labels].to(student))
        longer = torch.maximum(student.norm(dim=1), teacher.norm(dim=1)).clamp_min(1e-12)
        return 1 - (student * centre).sum(1) / longer
