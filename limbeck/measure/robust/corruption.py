"""How accuracy falls as the inputs are corrupted more and more."""

import torch
from torch import Tensor

from limbeck.core.card import method, require


@method(
    paper="Hendrycks and Dietterich 2019, section 4.2",
    year=2019,
    arxiv="1903.12261",
    code="hendrycks/robustness@8190fe3:ImageNet-C/test.py",
    differs="one kind of corruption a call, and its error is not divided by that of AlexNet",
)
def corruption(student_logits: Tensor, labels: Tensor) -> dict[str, float]:
    """Accuracy at each severity, and the curve in two numbers.  [S, N, C], [N] -> S + 3 numbers

    student_logits holds the same N examples at S severities in rising order, the first of them clean. accuracy_0 ...
    are the points of the curve. area: the area under it over its length, 1 for a perfect student (trapezoids).
    corruption_error: mean error over all severities but the clean one. relative_corruption_error: how much of that is
    owed to the corruption: less the clean error.

    *Needs*: logits on corrupted copies of the test set, S >= 2, and their labels.
    *Relates to*: `accuracy` is its first point. Compare students by the relative error when their clean accuracies
        differ.
    *Differs*: see the card.
    """
    severities = student_logits.shape[0] if student_logits.ndim == 3 else 0
    require(severities >= 2, "student_logits", tuple(student_logits.shape), "of shape [S, N, C] with S >= 2 severities")
    hits = (student_logits.argmax(-1) == labels) & ~student_logits.isnan().any(-1)
    curve = hits.double().mean(-1)
    error = 1 - curve
    return {f"accuracy_{i}": a for i, a in enumerate(curve.tolist())} | {
        "area": (torch.trapezoid(curve) / (severities - 1)).item(),
        "corruption_error": error[1:].mean().item(),
        "relative_corruption_error": (error[1:].mean() - error[0]).item(),
    }
