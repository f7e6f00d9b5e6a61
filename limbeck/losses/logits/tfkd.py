"""A virtual teacher, sure of the label and equally unsure of the rest, takes the place of a trained one."""

import torch
from torch import Tensor

from limbeck.core.card import method, require
from limbeck.core.maths import kl_logprobs, log_probs, where_labelled


@method(
    paper="Yuan et al. 2019, section 5, regularisation",
    year=2019,
    arxiv="1909.11723",
    code="yuanli2333/Teacher-free-Knowledge-Distillation@d000ab3:my_loss_function.py",
    differs="the paper softens the student as well; its code, followed here, does not (student_temperature). The code "
    "takes the mean over classes too, which `as_released` does: its multiplier, 100 for CIFAR-100, mostly undoes that",
)
def tfkd(
    student_logits: Tensor,
    labels: Tensor,
    *,
    certainty: float = 0.99,
    temperature: float = 20.0,
    student_temperature: float = 1.0,
    as_released: bool = False,
) -> Tensor:
    """KL(softmax(p / T) || softmax(student / T_s)), p = `virtual_teacher` of the label.  [..., C], [...] -> [...]

    The probabilities p are softened as if they were logits, so that at T = 20 the target is all but even: the label
    has e^0.05 times the chance of another class.

    certainty: a in (0, 1), what the virtual teacher gives to the label; 0.9 and more in the paper.
    temperature: T > 0 of the virtual teacher; 20 or 40 in the paper.
    student_temperature: T_s > 0.
    as_released: divide by C, as the code's mean over batch and classes does.

    *Needs*: labels and at least 2 classes; no teacher.
    *Relates to*: 0.9 ce + 0.1 of this (ResNet-18, DenseNet-121). `ce` with label_smoothing is its kin, whose target is
        not softened. The paper's other scheme, Tf-KD_self, is `ban` with generations 1 and `kd` at the paper's T.
    *Differs*: see the card.
    """
    require(0 < certainty < 1, "certainty", certainty, "in (0, 1)")
    require(temperature > 0, "temperature", temperature, "> 0")
    require(student_temperature > 0, "student_temperature", student_temperature, "> 0")
    log_q = log_probs(student_logits, student_temperature)
    virtual = virtual_teacher(labels.clamp_min(0), log_q.shape[-1], certainty).to(log_q)
    loss = where_labelled(kl_logprobs(log_probs(virtual, temperature), log_q), labels)
    return loss / log_q.shape[-1] if as_released else loss


def virtual_teacher(labels: Tensor, classes: int, certainty: float) -> Tensor:
    """`certainty` on the label, (1 - certainty) / (classes - 1) on each other class: [...] -> [..., classes], fp64.

    It is label smoothing by (1 - certainty) classes / (classes - 1).
    """
    rest = (1 - certainty) / max(1, classes - 1)
    even = torch.full((*labels.shape, classes), rest, dtype=torch.float64, device=labels.device)
    return even.scatter_(-1, labels.unsqueeze(-1), certainty)
