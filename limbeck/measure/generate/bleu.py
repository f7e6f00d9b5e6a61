"""How many short stretches of words what the student writes shares with the real answers."""

from torch import Tensor

from limbeck.core import ngrams
from limbeck.core.card import method, require


@method(
    paper="Papineni et al. 2002, section 2.3",
    year=2002,
    code="mjpost/sacrebleu@f591c7e:sacrebleu/metrics/bleu.py",
    differs="one real answer each; orders without a match are smoothed as the code does by default",
)
def bleu(student_answers: Tensor, real_answers: Tensor, *, order: int = 4) -> float:
    """100 x brevity penalty x geometric mean of n-gram precisions, all over the whole set.  [N, T] x 2 -> number <= 100

    order: N >= 1, longest n-grams that count.

    *Needs*: data of prompts and answers (`kind: chat`, or pairs of texts); the student writes greedily. *Relates to*:
    `rouge_l` where the order of words matters more than stretches, or a set is small: this is no mean over answers.
    """
    require(order >= 1, "order", order, ">= 1")
    return 100 * ngrams.bleu(ngrams.overlap(ngrams.pairs(student_answers, real_answers), order))
