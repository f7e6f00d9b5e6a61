"""The student's probabilities need only go up and down with the teacher's: across classes and across examples."""

from torch import Tensor

from limbeck.core.card import method, require
from limbeck.core.reduce import mean
from limbeck.core.responses import column_correlation, row_correlation, rows


@method(
    paper="Huang et al. 2022, inter-class and intra-class relations",
    year=2022,
    arxiv="2205.10536",
    code="hunto/image_classification_sota@6f7a70a:lib/models/losses/dist_kd.py",
    differs="as in the code, 1e-8 is added to the product of the lengths, so that it is 0 at student = teacher only up "
    "to about 1e-7, and both terms are multiplied by T^2",
)
def dist(
    student_logits: Tensor,
    teacher_logits: Tensor,
    mask: Tensor | None = None,
    *,
    beta: float = 1.0,
    gamma: float = 1.0,
    temperature: float = 1.0,
) -> Tensor:
    """T^2 (beta mean_i (1 - rho(s_i, t_i)) + gamma mean_c (1 - rho(s_:c, t_:c))).  [..., C] x 2 -> []

    s, t: probabilities at temperature T; rho: Pearson correlation, along the classes of an example i (inter-class) and
    along the examples of the batch for a class c (intra-class). Scale and offset of either side are free: a teacher
    that is much stronger, or much surer, is no contradiction.

    beta: weight of the inter-class term, >= 0.
    gamma: weight of the intra-class term, >= 0.
    temperature: T > 0; 1 on ImageNet, 4 on CIFAR-100 (with beta = gamma = 2 there).

    *Needs*: logits of both over the same classes, a batch of several examples; no labels. Masked elements are left out
        of both terms. In data-parallel training the intra-class term is that of each process's own examples.
    *Relates to*: add `ce` at weight 1, this at 1 to 3 (2 on ImageNet). Use it in the place of `kd` when the teacher is
        much larger than the student; `dist_plus` adds a feature.
    """
    require(beta >= 0, "beta", beta, ">= 0")
    require(gamma >= 0, "gamma", gamma, ">= 0")
    require(temperature > 0, "temperature", temperature, "> 0")
    (s, counts), (t, _) = rows(student_logits, mask), rows(teacher_logits.detach(), mask)
    s, t = (s / temperature).softmax(-1), (t / temperature).softmax(-1)
    inter = mean(1 - row_correlation(s, t), counts).value
    intra = (1 - column_correlation(s, t, counts)).mean()
    return temperature**2 * (beta * inter + gamma * intra)
