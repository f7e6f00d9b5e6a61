"""How well present classes are told from absent ones when any number of them may be present."""

import torch
from torch import Tensor

from limbeck.core.bernoulli import multi_hot
from limbeck.core.card import method, require
from limbeck.core.ranking import ranked


@method(
    paper="Termritthikun et al. 2023, section 4",
    year=2023,
    arxiv="2305.06244",
    differs="the paper reports the area under the ROC curve; precision and F1 are those of multi-label distillation "
    "(arXiv 2308.06453). Classes that are present everywhere or nowhere are left out",
    row=("explainable_kd_cxr", "l2d_multilabel"),
)
def multilabel(student_logits: Tensor, labels: Tensor, *, threshold: float = 0.5) -> dict[str, float]:
    """Means over the classes, and one figure over all answers.  [N, C] x 2 -> three numbers in [0, 1]

    map: mean average precision, sum over thresholds of (recall gained) x precision. auroc: chance that an example with
    the class scores above one without, ties count half. f1: 2 tp / (2 tp + fp + fn) over all classes together. Each is
    0 where there is nothing to tell.

    threshold: of the probability sigmoid(z) above which f1 takes a class as present, in (0, 1).

    *Needs*: labels as 0 and 1 for every class, or class indices. *Relates to*: `accuracy` where exactly one class is
        present. map is the stricter of the two where positives are rare.
    """
    require(0 < threshold < 1, "threshold", threshold, "in (0, 1)")
    require(len(labels) > 0, "labels", tuple(labels.shape), "the labels of at least one example")
    z = student_logits.double().nan_to_num(nan=float("-inf"))
    y = multi_hot(labels, student_logits) > 0.5
    told = [ranked(z[:, c], y[:, c]) for c in range(z.shape[1]) if y[:, c].any() and not y[:, c].all()]
    precision, area = torch.tensor(told, dtype=torch.float64).mean(0).tolist() if told else (0.0, 0.0)
    yes = z.sigmoid() > threshold
    right, wrong = (yes & y).sum().item(), (yes != y).sum().item()
    return {"map": precision, "auroc": area, "f1": 2 * right / max(1, 2 * right + wrong)}
