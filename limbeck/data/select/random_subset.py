"""Picks at random: what every other selection has to beat."""

import torch
from torch import Tensor

from limbeck.core.card import method, require


@method(
    paper="Guo et al. 2022 (DeepCore), section 3",
    year=2022,
    arxiv="2204.08499",
    code="PatrickZH/DeepCore@74ec709:deepcore/methods/uniform.py",
    differs="where rounding class by class would miss the budget, classes with the largest remainders get one more; "
    "nothing is drawn twice",
    row="coreset_random",
    exceptions={
        "order": "a random choice goes by position: the same seed picks other examples when they change places"
    },
)
def random_subset(features: Tensor, labels: Tensor | None = None, *, budget: int = 10) -> Tensor:
    """Indices drawn without replacement, each set equally likely, in rising order.  [N, ...] -> [budget]

    With labels every class keeps its share: round(budget n_c / N) examples. Draws from torch's generator.

    budget: how many to pick, 1..N.

    *Needs*: anything with N rows; the values are not looked at. *Relates to*: the control of `herding` and of every
        condensed set. Call it once an epoch for repeated random subsets, which beat most fixed ones.
    *Differs*: see the card.
    """
    n = len(features)
    require(1 <= budget <= n, "budget", budget, f"in 1..{n}")
    if labels is None:
        return torch.randperm(n)[:budget].sort().values.to(features.device)
    members = [(labels == c).nonzero().squeeze(1) for c in labels.unique()]
    share = torch.tensor([len(m) * budget / n for m in members], dtype=torch.float64)
    quota = share.floor().long()
    quota[(share - quota).argsort(descending=True, stable=True)[: budget - int(quota.sum())]] += 1
    chosen = [m[torch.randperm(len(m))[:q].to(m.device)] for m, q in zip(members, quota.tolist(), strict=True)]
    return torch.cat(chosen).sort().values
