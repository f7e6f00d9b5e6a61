"""Soft labels count for an example as long as the student is worse on its label than the teacher is."""

from torch import Tensor

from limbeck.core.card import method, require
from limbeck.core.maths import label_logprobs, log_probs, where_labelled

EPSILON = 1e-7  # added to the teacher's label loss by the code


@method(
    paper="Zhou et al. 2021, weighted soft labels",
    year=2021,
    arxiv="2102.00650",
    code="bellymonster/Weighted-Soft-Label-Distillation@67820dd:knowledge_distiller.py",
    exceptions={"gradcheck": "the weight of an example is a constant in the gradient, as in the paper"},
)
def wsld(student_logits: Tensor, teacher_logits: Tensor, labels: Tensor, *, temperature: float = 2.0) -> Tensor:
    """-w T^2 sum_c t_c log s_c, w = 1 - exp(-CE(y, student) / CE(y, teacher)).  [..., C] x 2, [...] -> [...]

    t, s: probabilities at temperature T; the two label losses in w are at temperature 1 and without gradient. w is
    1 - 1/e where both fit the label y equally well and tends to 0 where the student fits it better: such examples only
    regularise, and hold its variance down at the price of bias.

    temperature: T > 0; 2 on ImageNet, 4 on CIFAR-100.

    *Needs*: logits of both and true labels.
    *Relates to*: add `ce` at weight 1, this at 2.5 (ImageNet) or 2.25 (CIFAR-100). With w = 1 it is `kd` plus a
        constant, the teacher's entropy; `dkd` also asks what soft labels say beyond the label.
    """
    require(temperature > 0, "temperature", temperature, "> 0")
    teacher_logits = teacher_logits.detach()
    student_ce, teacher_ce = (-label_logprobs(z, labels) for z in (student_logits.detach(), teacher_logits))
    weight = 1 - (-student_ce / (teacher_ce + EPSILON)).exp()
    soft = -(log_probs(teacher_logits, temperature).exp() * log_probs(student_logits, temperature)).sum(-1)
    return where_labelled(weight * temperature**2 * soft, labels)
