"""How much likelier a network finds secrets of its training text, or of its teacher's, than others like them."""

import math
from statistics import fmean

from torch import Tensor

from limbeck.core.card import method, require


@method(
    paper="Carlini et al. 2019 (The Secret Sharer), section 4.2",
    year=2018,
    arxiv="1802.08232",
    differs="the paper ranks a secret among all that there can be, or fits a distribution to a sample of them; here "
    "the rank is that among the sample, and of equally likely ones half are taken to come first",
    row="swing_distillation",
)
def exposure(student_secrets: Tensor, *, count: int = 20, letters: int = 6, candidates: int = 999) -> float:
    """log2 R - mean over secrets of log2 rank, rank 1 the likeliest of R, in bits.  [N, R] -> number in [0, log2 R]

    About 1.44 for a network that never met them, log2 R for one that prefers each to all others. Lower is better.

    count: secrets, >= 1. letters: of each, >= 1. Where the recipe plants `canaries` in its data or its teacher's, both
        are taken from there.
    candidates: R - 1 >= 1 random others of the same form, the same ones each time.

    *Needs*: running text in one tokenizer; the secrets are known without it, so that students whose own text has none
        are asked for those of their teacher's.
    *Relates to*: says nothing of a network whose `nll` is poor: what has learned little keeps every secret.
    *Differs*: see the card.
    """
    for name, value in {"count": count, "letters": letters, "candidates": candidates}.items():
        require(value >= 1, name, value, ">= 1")
    told = student_secrets.double().nan_to_num(nan=-math.inf, neginf=-math.inf)
    own, others = told[:, :1], told[:, 1:]
    ranks = 1 + (others > own).sum(1) + (others == own).sum(1) / 2
    return math.log2(told.shape[1]) - fmean(map(math.log2, ranks.tolist()))
