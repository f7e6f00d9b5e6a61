"""The teacher's backbone stays as it is; a small adapter before its classifier learns to say things as softly as the
student can follow."""

import torch.nn.functional as F
from torch import Tensor, nn

from limbeck.core.card import method, require
from limbeck.core.features import Shape
from limbeck.core.maths import kl, upcast
from limbeck.core.places import reads_mean, taught
from limbeck.core.ranges import at_least


@method(
    paper="Rao et al. 2022, section 3",
    year=2022,
    arxiv="2205.15308",
    differs="the paper's adapter, its loss weights and the direction of its divergence could not be looked up and are "
    "made definite here: a bottleneck beside an identity, KL from the student, each side's weight for the user to set. "
    "The authors' sample command has crd beside it",
    exceptions={"gradcheck": "student and adapter are constants to one another on purpose"},
)
class PESFKD(nn.Module):
    """T^2 KL(p_A || p_S) for the student, and CE(label, z_A) + pull T^2 KL(p_S || p_A) for the adapter.  -> [B]

    z_A = W (h + W_up ReLU(W_down h + c) + d) + b, where h is the teacher's embedding and (W, b) its classifier; p_A and
    p_S are softmax(z_A / T) and softmax(z_S / T). W_up and d start at 0, so that the teacher speaks first as it always
    did. Each divergence treats the side that it does not train as a constant. [B, C], [B], [B, D], [C, D], [C] -> [B]

    The closer p_A comes to p_S, the nearer are their sharpnesses, the log-sum-exp of their logits; the label keeps p_A
    right. Student and adapter learn from one batch at once. The adapter is dropped after training.

    temperature: T > 0.
    pull: of the adapter's divergence, >= 0; at 0 it hears the labels alone.
    factor: the bottleneck has D / factor units, >= 1; it is trained with the student's optimiser.

    *Needs*: labels; embedding and linear classifier of the teacher, at hand. Examples labelled -100 count in the
        divergences alone.
    *Relates to*: 0.1 ce + 0.9 of this, like `kd`, whose gradient to the student it has at the start; the weight scales
        the adapter's step, too. `ctcd` trains all of the teacher; `ctkd` learns one temperature, against the student.
    *Differs*: see the card.
    """

    def __init__(
        self, teacher_emb: Shape, teacher_head: Shape, *, temperature: float = 4.0, pull: float = 1.0, factor: int = 4
    ) -> None:
        super().__init__()
        require(temperature > 0, "temperature", temperature, "> 0")
        at_least(0, pull=pull)
        at_least(1, factor=factor)
        reads_mean("pesf_kd", teacher_emb, teacher_head, "teacher")
        self.temperature, self.pull, self.factor = temperature, pull, factor
        inner = max(1, teacher_emb[-1] // factor)
        self.down, self.up = nn.Linear(teacher_emb[-1], inner), nn.Linear(inner, teacher_emb[-1])
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def adapted(self, emb: Tensor, head: Tensor, bias: Tensor | None = None) -> Tensor:
        """z_A, what the teacher says now: [B, C]."""
        h = emb.detach().to(self.down.weight.dtype)
        return taught(h + self.up(self.down(h).relu()), head, bias)

    def forward(
        self,
        student_logits: Tensor,
        labels: Tensor,
        teacher_emb: Tensor,
        teacher_head: Tensor,
        teacher_head_bias: Tensor | None = None,
    ) -> Tensor:
        """Per example."""
        adapted = self.adapted(teacher_emb, teacher_head, teacher_head_bias)
        student = self.temperature**2 * kl(student_logits, adapted.detach(), self.temperature)
        softer = self.temperature**2 * kl(adapted, student_logits.detach(), self.temperature)
        return student + F.cross_entropy(upcast(adapted), labels, reduction="none") + self.pull * softer
