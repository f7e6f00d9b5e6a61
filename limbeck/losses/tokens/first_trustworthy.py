"""A few kept words of the teacher, made less sure of themselves before the student learns them."""

import torch
from torch import Tensor

from limbeck.core.card import method, require
from limbeck.core.maths import FLOOR, kl_logprobs, pair, with_tail


@method(
    paper="Shum et al. 2024 (FIRST), trustworthy maximization",
    year=2024,
    arxiv="2408.12168",
    code="SHUMKASHUN/FIRST@c2c7c76:distill.py",
    differs="the code compares probabilities as if they were their logarithms and smooths logarithms; here the "
    "divergence that it means, with one more class for all words that are not kept",
)
def first_trustworthy(
    student_logits: Tensor,
    teacher_ids: Tensor,
    teacher_logprobs: Tensor,
    teacher_tail: Tensor | None = None,
    *,
    temperature: float = 1.0,
    smoothing: float = 0.0,
) -> Tensor:
    """KL over the K kept words and one class for all others, of a teacher that is re-calibrated first.

    [..., V], [..., K] x 2, [...] -> [...]. The kept probabilities p become proportional to p^(1/T), with the same sum;
    then `smoothing` is moved from the likeliest of them evenly to the other kept ones. The student's are its softmax
    over the whole vocabulary.

    temperature: T > 0 of the teacher alone; above 1 makes it less sure. The paper's preferred way: choose the T that
        gives the teacher the least calibration error on validation data.
    smoothing: mass in [0, 1) that is taken from the likeliest word, all it has at most; the paper's other way, 0.1.

    *Needs*: a store of kind `topk`, or a server's top log-probabilities; the paper keeps 5 of a teacher that was
        fine-tuned gently.
    *Relates to*: `top_k_kd` is the case T = 1 without smoothing. Look at calibration as well as accuracy.
    *Differs*: see the card.
    """
    require(temperature > 0, "temperature", temperature, "> 0")
    require(0 <= smoothing < 1, "smoothing", smoothing, "in [0, 1)")
    logits, log_p = pair(student_logits, teacher_logprobs.detach())
    kept = recalibrated(log_p.clamp(FLOOR, 0), temperature, smoothing).log()
    tail = 1 - log_p.exp().sum(-1) if teacher_tail is None else teacher_tail.detach().to(kept)
    # a kept word is real, even where smoothing leaves it nothing
    real = torch.where(log_p > FLOOR, kept.clamp_min(FLOOR / 2), FLOOR)
    log_q, log_p = with_tail(logits, teacher_ids, real, tail)
    return kl_logprobs(log_p, log_q)


def recalibrated(log_p: Tensor, temperature: float, smoothing: float) -> Tensor:
    """The kept probabilities [..., K] after both changes, with the sum that they had."""
    real = log_p > FLOOR
    p = log_p.exp().sum(-1, keepdim=True) * torch.softmax((log_p / temperature).masked_fill(~real, FLOOR), -1)
    others = real.sum(-1, keepdim=True) - 1
    top, place = p.max(-1, keepdim=True)
    moved = torch.where(others > 0, top.clamp_max(smoothing), 0.0)
    spread = (p + moved / others.clamp_min(1)) * real
    return spread.scatter(-1, place, top - moved)
