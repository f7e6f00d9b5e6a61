"""Predictions at several temperatures agree per example, in how examples resemble each other, and in how classes do."""

import torch
from torch import Tensor

from limbeck.core.card import method, require
from limbeck.core.maths import gram, kl
from limbeck.core.reduce import mean
from limbeck.core.responses import rows, standardized


@method(
    paper="Jin et al. 2023, Multi-level Logit Distillation, CVPR, multi-level alignment",
    year=2023,
    code="Jin-Ying/Multi-Level-Logit-Distillation@5ee473f:mdistiller/distillers/KD_ours.py",
    differs="the paper's three terms on one view; `two_views` adds the strongly augmented one. The code multiplies its "
    "weak terms, already means, by a mask of the less certain half of examples or classes: weight 0.5; and its strong "
    "instance term takes T = 2 and 6 from the weak view: see `two_views`",
    zero_at_match=True,
)
def mlkd(
    student_logits: Tensor,
    teacher_logits: Tensor,
    mask: Tensor | None = None,
    *,
    temperatures: tuple[float, ...] = (2.0, 3.0, 4.0, 5.0, 6.0),
    instance_weight: float = 1.0,
    batch_weight: float = 1.0,
    class_weight: float = 1.0,
    standardize: bool = False,
) -> Tensor:
    """sum_T (T^2 mean_i KL(t_i || s_i) + |t t' - s s'|^2 / B + |t' t - s' s|^2 / C), each weighted.  [..., C] x 2 -> []

    s, t: probabilities [B, C] at temperature T, ' the transpose, |.|^2 the sum of squares.
    temperatures: all are summed, each > 0.
    instance_weight: weight of the examples' own predictions, >= 0; with the other two at 0 and one temperature, `kd`.
    batch_weight: weight of how alike every two examples are, >= 0; costs B x B numbers.
    class_weight: weight of how alike every two classes are, >= 0.
    standardize: bring logits to mean 0 and deviation 1 first in the instance term, as `logit_standardization` does.

    *Needs*: logits of both over the same classes, several examples a batch; no labels. What is masked is left out.
    *Relates to*: 0.1 ce + 0.9 of this in any scheme; `two_views` trains it on the paper's weak and strong views.
    """
    require(len(temperatures) > 0 and min(temperatures) > 0, "temperatures", temperatures, "one or more numbers > 0")
    for name, weight in (("instance", instance_weight), ("batch", batch_weight), ("class", class_weight)):
        require(weight >= 0, f"{name}_weight", weight, ">= 0")
    (student, counts), (teacher, _) = rows(student_logits, mask), rows(teacher_logits.detach(), mask)
    z_s, z_t = (standardized(z) if standardize else z for z in (student, teacher))
    examples = len(student) if counts is None else counts.sum().clamp_min(1)
    total = student.new_zeros(())
    for T in temperatures:
        s, t = (student / T).softmax(-1), (teacher / T).softmax(-1)
        if counts is not None:
            s, t = torch.where(counts, s, 0.0), torch.where(counts, t, 0.0)
        instance = mean(T**2 * kl(z_s, z_t, T), counts).value
        batch = (gram(t) - gram(s)).square().sum() / examples
        category = (gram(t.mT) - gram(s.mT)).square().sum() / student.shape[-1]
        total = total + instance_weight * instance + batch_weight * batch + class_weight * category
    return total
