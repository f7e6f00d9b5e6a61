"""Words that are hard for the student are learned with a part of the answer already mixed into what it says."""

import torch
from torch import Tensor

from limbeck.core.card import method, require
from limbeck.core.maths import FLOOR, kl_logprobs, log_probs, pair, where_labelled


@method(
    paper="Song et al. 2024, both stages",
    year=2024,
    arxiv="2412.15303",
    differs="the paper's share of the truth, threshold and map from difficulty to share are not known here: knobs, and "
    "g = prior (1 - exp(-d))",
    exceptions={"gradcheck": "how much of the answer is mixed in is held still on purpose"},
)
def self_evolution_kd(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor,
    mask: Tensor | None = None,
    *,
    truth: float = 0.5,
    hard: float = 0.5,
    prior: float = 0.5,
) -> Tensor:
    """KL(r || (1 - g) q + g r), r = b onehot(label) + (1 - b) softmax(teacher), q = softmax(student).

    [..., V] x 2, [...] -> [...]. The difficulty of a place is d = KL(r || q). Easy places have g = 0; hard ones, those
    whose d is at least the quantile of the batch, g = prior (1 - exp(-d)): the further the student is off, the more of
    the answer it is given, and the gentler the gradient. g has no gradient, and fades as the student learns.

    truth: b in [0, 1], the share of the true word in the target; 0 is plain distillation, 1 learns labels alone.
    hard: share of the places that count as hard, in [0, 1]; 0 gives KL(r || q) everywhere.
    prior: in [0, 1], the largest g.

    *Needs*: logits of both over one vocabulary, and the next words. The quantile is that of what is given at once.
    *Relates to*: alone, weight 1: labels are in it. The opposite of schemes that drop easy words: here hard ones are
        made easier. Use it where many words are out of the student's reach.
    *Differs*: see the card.
    """
    require(0 <= truth <= 1, "truth", truth, "in [0, 1]")
    require(0 <= hard <= 1, "hard", hard, "in [0, 1]")
    require(0 <= prior <= 1, "prior", prior, "in [0, 1]")
    student, teacher = pair(student_logits, teacher_logits.detach())
    log_q = log_probs(student)
    with torch.no_grad():
        target = (1 - truth) * teacher.softmax(-1)
        target = target.scatter_add(-1, labels.clamp_min(0).unsqueeze(-1), torch.full_like(target[..., :1], truth))
        log_r = target.log().clamp_min(FLOOR)
        difficulty = kl_logprobs(log_r, log_q)
        counts = labels >= 0 if mask is None else mask.bool() & (labels >= 0)
        seen = torch.where(counts, difficulty, torch.nan)
        is_hard = (difficulty >= seen.flatten().nanquantile(1 - hard)) & (hard > 0)
        share = torch.where(is_hard, -prior * (-difficulty).expm1(), 0.0).unsqueeze(-1)
        given = (share.log() + log_r).clamp_min(FLOOR)
    helped = torch.logaddexp((1 - share).log().clamp_min(FLOOR) + log_q, given)
    return where_labelled(kl_logprobs(log_r, helped), labels)
