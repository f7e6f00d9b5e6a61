"""Logits are brought to mean 0 and deviation 1 before the softmax: the student need not copy the teacher's scale."""

from torch import Tensor

from limbeck.core.card import method, require
from limbeck.core.maths import kl
from limbeck.core.responses import standardized


@method(
    paper="Sun et al. 2024, Z-score standardised softmax",
    year=2024,
    arxiv="2403.01427",
    code="sunshangquan/logit-standardization-KD@f6e5aa5:mdistiller/distillers/KD.py",
    zero_at_match=True,
    variant_of="kd",
)
def logit_standardization(student_logits: Tensor, teacher_logits: Tensor, *, temperature: float = 2.0) -> Tensor:
    """T^2 KL(softmax(Z(teacher) / T) || softmax(Z(student) / T)).  [..., C] x 2 -> [...]

    Z(z) = (z - mean) / (std + 1e-7), with the mean and the (unbiased) deviation of an element's own classes: `kd` with
    a temperature of its own, T std(z), for every element and either side; 0 where z_student = a z_teacher + b, a > 0.

    temperature: T > 0 after standardisation; 2 to 3 on CIFAR-100.

    *Needs*: logits of both over the same classes, at least 2; no labels.
    *Relates to*: add `ce`, which sets the scale that this leaves free: 0.1 ce + 9 of this is usual on CIFAR-100 (6 to
        15), ce at 1 with few classes. `ctkd` and `mlkd` take the same step by their knob `standardize`. `luminet`
        standardises along the batch instead.
    """
    require(temperature > 0, "temperature", temperature, "> 0")
    student, teacher = standardized(student_logits), standardized(teacher_logits.detach())
    return temperature**2 * kl(student, teacher, temperature)
