"""Draws examples that tell the student much, but so that it loses little when the teacher is wrong about some."""

import torch
from torch import Tensor

from limbeck.core.active import gains, robust, without_replacement
from limbeck.core.card import method, require


@method(
    paper="Baykal et al. 2022 (Robust Active Distillation), section 3",
    year=2022,
    arxiv="2210.01213",
    differs="no official code; where fewer examples have any chance than are asked for, the rest are those with the "
    "largest gains",
    row="rad_active",
    exceptions={"order": "a random choice goes by position: the same seed picks others when they change places"},
)
def robust_sampling(
    student_logits: Tensor, chosen: Tensor | None = None, *, budget: int = 10, wrong: float = 0.1
) -> Tensor:
    """max_p min_{|S|=k} sum_{i not in S} p_i g_i, g = 1 - margin of the student; p in closed form, drawn without
    replacement by torch's generator.  [N, C], [N] -> [budget]

    budget: how many to pick, 1..number of those not chosen yet.
    wrong: k as a share of the pool in [0, 1), how many the teacher is expected to get wrong; 0 is margin sampling, and
        near 1 all are drawn, those with small gains the more.

    *Needs*: what the student says of all; `chosen`, True for those labelled already. *Relates to*: `p_coreset` looks
        at all predictions, not each alone. Estimate `wrong` on validation data.
    *Differs*: see the card.
    """
    before = torch.zeros(len(student_logits), dtype=torch.bool) if chosen is None else chosen.bool()
    rows = (~before).nonzero()[:, 0].to(student_logits.device)
    require(1 <= budget <= len(rows), "budget", budget, f"in 1..{len(rows)}")
    require(0 <= wrong < 1, "wrong", wrong, "in [0, 1)")
    gain = gains(student_logits[rows])
    return rows[without_replacement(robust(gain, int(wrong * len(rows))), gain, budget)]
