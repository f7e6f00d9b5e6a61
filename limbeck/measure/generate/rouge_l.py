"""How long a sequence of words what the student writes has in common with the real answer, whatever lies between."""

from statistics import fmean

from torch import Tensor

from limbeck.core.card import method
from limbeck.core.ngrams import common, pairs


@method(
    paper="Lin 2004, section 3.1",
    year=2004,
    code="google-research/google-research@4c42994:rouge/rouge_scorer.py",
    differs="precision and recall weigh alike (F1), as in the code; words are those of `bleu`: capitals and marks "
    "count, no stemming, any language",
)
def rouge_l(student_answers: Tensor, real_answers: Tensor) -> float:
    """100 x mean over answers of 2 L / (words written + words wanted), L their longest common subsequence.
    [N, T] x 2 -> number <= 100

    *Needs*: data of prompts and answers (`kind: chat`, or pairs of texts); the student writes greedily.
    *Relates to*: `bleu` for translations.
    """
    both = pairs(student_answers, real_answers)
    return 100 * fmean(2 * common(a, b) / (len(a) + len(b)) if a or b else 1.0 for a, b in both)
