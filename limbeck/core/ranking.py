"""How well scores put the examples that are of a class before those that are not."""

import torch
from torch import Tensor


def ranked(scores: Tensor, present: Tensor) -> tuple[float, float]:
    """Average precision, and area under the ROC curve, of scores [N]; equal scores are one threshold.

    0 and nan where nothing is present; the area is nan where everything is.
    """
    order = scores.argsort(descending=True)
    ordered = scores[order]
    last = torch.ones_like(present)
    last[:-1] = ordered[1:] != ordered[:-1]
    hits = present[order].double().cumsum(0)[last]
    misses = (~present[order]).double().cumsum(0)[last]
    recall, fallout = hits / hits[-1].clamp_min(1), misses / misses[-1]
    start = recall.new_zeros(1)
    gained = recall.diff(prepend=start)
    precision = (gained * hits / (hits + misses)).sum()
    before = torch.cat([start, recall[:-1]])
    area = (fallout.diff(prepend=start) * (recall + before) / 2).sum()
    return precision.item(), area.item()
