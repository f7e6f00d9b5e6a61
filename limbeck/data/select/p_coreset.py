"""Picks examples of which a network thinks differently from all that were picked before."""

import torch
from torch import Tensor

from limbeck.core.active import farthest
from limbeck.core.card import method, require
from limbeck.core.maths import log_probs


@method(
    paper="Kang et al. 2025, PCoreSet",
    year=2025,
    arxiv="2506.00910",
    code="erjui/PCoreSet@075a76a:strategies.py",
    differs="without anything chosen before, the first pick is the farthest from the mean prediction",
    row="pcoreset_activekd",
)
def p_coreset(student_logits: Tensor, chosen: Tensor | None = None, *, budget: int = 10) -> Tensor:
    """Greedy k-centre among predictions: argmax_u min_s |p(u) - p(s)|_2 over picked s, p = softmax(logits), one by one.

    Indices in the order of choice.  [N, C], [N] -> [budget]

    budget: how many to pick, 1..number of those not chosen yet.

    *Needs*: what the student says of all; `chosen`, True for those labelled already, which are the first centres.
    *Relates to*: follows the classes that a biased teacher has taught; `herding` and others look at features.
    *Differs*: see the card.
    """
    before = torch.zeros(len(student_logits), dtype=torch.bool) if chosen is None else chosen.bool()
    before = before.to(student_logits.device)
    free = int((~before).sum())
    require(1 <= budget <= free, "budget", budget, f"in 1..{free}")
    return farthest(log_probs(student_logits).exp(), before, budget)
