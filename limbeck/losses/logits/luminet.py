"""Each class's logits are normalised over the batch first: what counts is which examples a class stands out for."""

from torch import Tensor

from limbeck.core.card import method, require
from limbeck.core.maths import kl
from limbeck.core.responses import average, rows

EPSILON = 1e-5  # added to the variance


@method(
    paper="Hossain et al. 2023, perception of logits",
    year=2023,
    arxiv="2310.03669",
    code="ismail31416/LumiNet@8cf749b:mdistiller/distillers/Luminet.py",
    zero_at_match=True,
)
def luminet(
    student_logits: Tensor,
    teacher_logits: Tensor,
    mask: Tensor | None = None,
    *,
    alpha: float = 33.0,
    temperature: float = 4.0,
) -> Tensor:
    """alpha^2 KL(softmax(h_teacher / T) || softmax(h_student / T)), h = (z - m_c) / sqrt(v_c + 1e-5).
    [..., C] x 2 -> [...]

    m_c, v_c: mean and (biased) variance of the logits of class c over the batch, of student and teacher each their own;
    the gradient flows through the student's. Shifting or scaling a class for the whole batch changes nothing.

    alpha: the weight is alpha^2 >= 0, which stands where `kd` has T^2; 33 to 75 on CIFAR-100, 2 on ImageNet.
    temperature: T > 0 of normalised logits; 4 to 8 on CIFAR-100, 0.7 on ImageNet.

    *Needs*: logits of both over the same classes, a batch of many examples; no labels. Masked elements are left out
        of the statistics. In data-parallel training the statistics are those of each process's own examples.
    *Relates to*: add `ce` at weight 1 or 2 on the raw logits; raise the weight of this over the first epochs (20 of
        240). `logit_standardization` normalises each example instead and does not depend on the batch.
    """
    require(alpha >= 0, "alpha", alpha, ">= 0")
    require(temperature > 0, "temperature", temperature, "> 0")
    student, teacher = _normalised(student_logits, mask), _normalised(teacher_logits.detach(), mask)
    return alpha**2 * kl(student, teacher, temperature).view(student_logits.shape[:-1])


def _normalised(logits: Tensor, mask: Tensor | None) -> Tensor:
    """[..., C] -> [N, C], of mean 0 and variance 1 in each column over the rows that count."""
    z, counts = rows(logits, mask)
    centred = z - average(z, counts)
    return centred / (average(centred.square(), counts) + EPSILON).sqrt()
