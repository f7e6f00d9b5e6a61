"""The student's own last word on an example softens its label, the more the longer it has learned."""

import torch
from torch import Tensor, nn

from limbeck.core.card import method, require
from limbeck.core.features import Shape
from limbeck.core.maths import log_probs
from limbeck.core.past import Past


@method(
    paper="Kim et al. 2020, eq. 3-5",
    year=2020,
    arxiv="2006.12000",
    code="lgcnsai/PS-KD-Pytorch@9aa0828:main.py",
    differs="the share rises with every step, and not from epoch to epoch; it ends at the same value",
)
class PSKD(nn.Module):
    """-sum_c q_c log softmax(student)_c, q = (1 - a) onehot(label) + a p.  [..., C], [...], [B] -> [...]

    a = share * progress. p is what the student said of the example when it was last seen, in the pass before, under
    that pass's augmentation; an example that was never seen has its label for p. After each call in training mode
    with gradients on, p becomes softmax(student). The gradient to the logits is softmax(student) - q.

    share: a at the end of training, in [0, 1]; 0 is cross-entropy throughout.

    *Needs*: labels and the index of each example in a set of fixed size; no teacher. Without `progress` a is `share`.
        Memory for what is said of the whole set, N x C numbers.
    *Relates to*: in the place of `ce`, alone. Use `tfkd` or label smoothing when there is no index or no memory, `ban`
        when there is time for a second training: here the teacher is as young as the student.
    *Differs*: see the card.
    """

    def __init__(self, student_logits: Shape, index: Shape, *, share: float = 0.8) -> None:
        super().__init__()
        require(0 <= share <= 1, "share", share, "in [0, 1]")
        self.share = share
        self.past = Past(index[0], tuple(student_logits[1:]))

    def forward(
        self,
        student_logits: Tensor,
        index: Tensor,
        labels: Tensor,
        mask: Tensor | None = None,
        progress: float | None = None,
    ) -> Tensor:
        """Per element."""
        logp = log_probs(student_logits)
        q = self.targets(torch.zeros_like(logp).scatter_(-1, labels.unsqueeze(-1), 1.0), index, progress)
        if self.training and torch.is_grad_enabled():
            self.past.remember(index, logp.exp(), mask)
        return -(q * logp).sum(-1)

    def targets(self, label: Tensor, index: Tensor, progress: float | None) -> Tensor:
        """q of the examples `index` [B], whose labels are one-hot: [B, ..., C]."""
        share = self.share * (1.0 if progress is None else progress)
        return (1 - share) * label + share * self.past.recall(index, label)
