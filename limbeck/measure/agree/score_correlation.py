"""How well scores order and follow the true ones, as metrics are compared with human ratings."""

import torch
from torch import Tensor

from limbeck.core.bernoulli import multi_hot
from limbeck.core.card import method, require


@method(
    paper="Kendall 1945, tau-b",
    year=1945,
    differs="with Pearson's correlation beside it; both are 0 where all scores, or all true ones, are equal",
    row="bleurt_distill",
)
def score_correlation(student_logits: Tensor, labels: Tensor) -> dict[str, float]:
    """kendall: (pairs in the same order - in the other) / sqrt(pairs that s tells apart x that y tells apart), in
    [-1, 1]; pearson: cov(s, y) / sqrt(var(s) var(y)).  [N, C], [N, C] or [N] -> two numbers

    *Needs*: labels as a score for each output, or class indices; all outputs are taken together.
    *Relates to*: `accuracy` where labels are classes. kendall asks for the order of examples alone.
    *Differs*: see the card. Each takes memory for 1,024 rows of pairs, and time for all of them.
    """
    require(labels.numel() > 0, "labels", tuple(labels.shape), "the labels of at least one example")
    y = multi_hot(labels, student_logits).double().flatten()
    s = student_logits.double().nan_to_num(nan=0.0).flatten()
    agree, told, true = (s.new_zeros(()) for _ in range(3))
    for rows in torch.arange(len(s), device=s.device).split(1024):
        one, other = ((v[rows, None] - v).sign() for v in (s, y))
        agree, told, true = agree + (one * other).sum(), told + one.abs().sum(), true + other.abs().sum()
    kendall = agree / (told * true) ** 0.5 if told * true else s.new_zeros(())
    a, b = s - s.mean(), y - y.mean()
    spread = a.norm() * b.norm()
    pearson = (a * b).sum() / spread if spread else s.new_zeros(())
    return {"kendall": float(kendall), "pearson": float(pearson)}
