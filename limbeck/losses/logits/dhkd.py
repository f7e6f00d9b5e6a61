"""A second head, dropped after training, takes the teacher's logits, so that the classifier is left to the labels."""

from torch import Tensor, nn

from limbeck.core.bernoulli import bernoulli_kl
from limbeck.core.card import method, require
from limbeck.core.features import Shape
from limbeck.core.maths import pair, upcast


@method(
    paper="Yang et al. 2024, dual head and BinaryKL-Norm",
    year=2024,
    arxiv="2411.08937",
    code="penghui-yang/DHKD@7976c69:distiller_zoo/BinaryKLNorm.py",
    differs="the code cuts sigmoid(d) at 1e-8, beyond which it has no gradient; here it goes on. Gradient alignment is "
    "the training method `aligned`, gradient clipping a setting of every recipe",
)
class DHKD(nn.Module):
    """T^2 sum_c KL(Bern(1/2) || Bern(sigmoid(d_c))), d = (head(student_emb) - z_t) / T.  [B, D], [B, C] -> [B]

    Each term is T^2 log cosh(d / 2): 0 only where the teacher's logits z_t are met exactly; a softmax forgets what is
    added to all of them. One head cannot serve this and the labels, whose gradients on it oppose each other;
    below it they agree. So the main head never sees this loss, and the second one never sees the labels.

    temperature: T > 0.
    hidden: units of a hidden layer in the second head, >= 0; 0 makes it linear, 200 is the paper's other choice, with
        dropout before batch norm and a ReLU after it.
    dropout: of that hidden layer, in [0, 1).

    *Needs*: the student's embedding, which its own head reads, and the teacher's logits; no labels.
    *Relates to*: ce + this, both at weight 1 (0.1 for this on ImageNet); `aligned` instead of `distill` takes out what
        still opposes the labels. Use `kd` where a single head should remain.
    """

    def __init__(
        self,
        student_emb: Shape,
        teacher_logits: Shape,
        *,
        temperature: float = 2.0,
        hidden: int = 0,
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        require(temperature > 0, "temperature", temperature, "> 0")
        require(hidden >= 0, "hidden", hidden, ">= 0")
        require(0 <= dropout < 1, "dropout", dropout, "in [0, 1)")
        self.temperature, self.hidden, self.dropout = temperature, hidden, dropout
        width, classes = student_emb[-1], teacher_logits[-1]
        inner = (nn.Linear(width, hidden), nn.Dropout(dropout), nn.BatchNorm1d(hidden), nn.ReLU()) if hidden else ()
        self.head = nn.Sequential(*inner, nn.Linear(hidden or width, classes))

    def forward(self, student_emb: Tensor, teacher_logits: Tensor) -> Tensor:
        """Per example."""
        said = upcast(self.head(student_emb.to(next(self.head.parameters()).dtype)))
        said, wanted = pair(said, teacher_logits.detach())
        d = (said - wanted) / self.temperature
        return self.temperature**2 * bernoulli_kl(d, d.new_zeros(()).expand_as(d)).sum(-1)
