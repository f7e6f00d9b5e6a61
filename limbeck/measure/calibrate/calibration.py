"""Can the student's probabilities be believed?"""

import torch
import torch.nn.functional as F
from torch import Tensor

from limbeck.core.card import method, require


@method(
    paper="Guo et al. 2017, eq. 3",
    year=2017,
    arxiv="1706.04599",
    code="gpleiss/temperature_scaling@ce1154e:temperature_scaling.py",
)
def calibration(student_logits: Tensor, labels: Tensor, *, bins: int = 15) -> dict[str, float]:
    """Calibration error and the two proper scores.  [..., C], [...] -> three numbers

    ece: sum over bins of confidence of (share of examples) |accuracy - mean confidence|, in [0, 1]; bins are of equal
    width and closed above. nll: mean -log p_label in nats. brier: mean sum_c (p_c - onehot_c)^2, in [0, 2].

    bins: >= 1; the ece rises with it when examples are few.

    *Needs*: labels of held-out data. *Relates to*: `accuracy` for being right at all. ece alone is fooled by a student
        that always says the base rate; nll and brier are not.
    """
    require(bins >= 1, "bins", bins, ">= 1")
    require(labels.numel() > 0, "labels", tuple(labels.shape), "the labels of at least one example")
    log_p, y = student_logits.double().log_softmax(-1).flatten(0, -2), labels.flatten()
    p = log_p.exp()
    confidence, choice = p.max(-1)
    edges = torch.linspace(0, 1, bins + 1, dtype=p.dtype, device=p.device)
    place = (torch.bucketize(confidence, edges) - 1).clamp(0, bins - 1)
    gap = torch.zeros(bins, dtype=p.dtype, device=p.device)
    gap.index_add_(0, place, (choice == y).to(p.dtype) - confidence)
    return {
        "ece": (gap.abs().sum() / len(y)).item(),
        "nll": F.nll_loss(log_p, y).item(),
        "brier": (p - F.one_hot(y, p.shape[-1])).square().sum(-1).mean().item(),
    }
