"""Picks examples one by one so that their mean follows the mean of all."""

import torch
import torch.nn.functional as F
from torch import Tensor

from limbeck.core.card import method, require
from limbeck.core.maths import upcast


@method(
    paper="Welling 2009, ICML (Herding dynamical weights to learn)",
    year=2009,
    code="PatrickZH/DeepCore@74ec709:deepcore/methods/herding.py",
    differs="the code takes the farthest point where the rule asks for the nearest; this takes the nearest",
)
def herding(features: Tensor, labels: Tensor | None = None, *, budget: int = 10, normalize: bool = False) -> Tensor:
    """Indices in the order of choice: each brings the mean of the chosen as close as can be to the mean of all.

    With labels every class is herded towards its own mean and the classes take turns, so that no class is ahead of
    another by more than one while both last. A smaller budget gives the beginning of the same.  [N, ...] -> [budget]

    budget: how many to pick, 1..N.
    normalize: bring every feature to unit length first (as for incremental learning), else take them as they are.

    *Needs*: features, best of a trained network; pixels will do. *Relates to*: for very few examples a class; at 50 and
        more `random_subset` often wins, since the chosen crowd the middle.
    *Differs*: see the card.
    """
    require(1 <= budget <= len(features), "budget", budget, f"in 1..{len(features)}")
    points = upcast(features).flatten(1)
    points = F.normalize(points) if normalize else points
    if labels is None:
        return _herd(points, budget)
    queues = [members[_herd(points[members], min(budget, len(members)))] for members in _classes(labels)]
    turns = [queue[turn : turn + 1] for turn in range(max(map(len, queues))) for queue in queues]
    return torch.cat(turns)[:budget]


def _herd(points: Tensor, budget: int) -> Tensor:
    centred = points - points.mean(0)
    square = centred.square().sum(-1)
    gap = torch.zeros_like(centred[0])  # sum of the chosen, less as many means: to be kept near 0
    free = torch.ones_like(square, dtype=torch.bool)
    chosen = []
    for _ in range(budget):
        cost = square + 2 * centred @ gap  # |gap + x|^2 but for |gap|^2, the same for all
        nearest = cost.masked_fill(~free, torch.inf).argmin()
        chosen.append(nearest)
        free[nearest] = False
        gap = gap + centred[nearest]
    return torch.stack(chosen)


def _classes(labels: Tensor) -> list[Tensor]:
    return [(labels == c).nonzero().squeeze(1) for c in labels.unique()]
