"""Student and teacher find the same stretches of text equally likely, whatever tokens they write them in."""

import torch
from torch import Tensor

from limbeck.core.card import method, require
from limbeck.core.maths import upcast
from limbeck.core.spans import counted, edges, joined, on_places, spread
from limbeck.core.vocabularies import stretch_logprobs

EPSILON = 1e-6  # taken off the tempered log-likelihoods by the authors' code, so that 1 - p is never 0


@method(
    paper="Minixhofer et al. 2025, eq. 5-7 (binarised f-divergence of chunk likelihoods)",
    year=2025,
    arxiv="2503.20083",
    code="bminixhofer/tokenkit@bcacdef:tokenkit/training/losses.py",
    differs="binary cross-entropy only; merged stretches do not end with the likelihood of a space (an option of the "
    "code); no hidden-state term; the sum over stretches is divided by the student's places",
)
def alm(
    student_vocab_logits: Tensor,
    teacher_vocab_logits: Tensor,
    labels: Tensor,
    teacher_labels: Tensor,
    student_spans: Tensor,
    teacher_spans: Tensor,
    mask: Tensor | None = None,
    teacher_mask: Tensor | None = None,
    word_starts: Tensor | None = None,
    *,
    temperature: float = 100.0,
    certainty: float = 0.0,
) -> Tensor:
    """- a log b - (1 - a) log(1 - b) of each stretch, a = p_T^(1/tau), b = p_S^(1/tau).  [B, T, V], [B, U, W] -> [B, T]

    p is the probability of a stretch, the product over its tokens. Least, the entropy of a, exactly where p_S = p_T. A
    stretch's value is given to its places in equal parts, so that the mean over places is the paper's mean over
    stretches times (stretches / places).

    A stretch that ends within a word is told apart by what the teacher's tokens can say there, not by the text alone;
    `certainty` joins it with the next.

    temperature: tau > 0. At 1 likely stretches decide; far above, the gap of the log-likelihoods counts for all alike.
    certainty: least probability, in [0, 1), that the teacher gives to a new word after a stretch, else it is as one
        with the next; the paper's 0.1 suits vocabularies of long words, 0 leaves all stretches as they are.

    *Needs*: two tokenizers in the batch (labels, spans, masks of both; `word_starts` for `certainty`); a stretch with a
        masked place does not count.
    *Relates to*: can stand without `ce`. Its gradient shrinks with tau: beside `ce` a weight of tau to 10 tau. Use
        `uld` or `gold` to compare whole distributions; with one tokenizer, `forward_kl`.
    *Differs*: see the card.
    """
    require(temperature > 0, "temperature", temperature, "> 0")
    require(0 <= certainty < 1, "certainty", certainty, "in [0, 1)")
    stretches = student_spans.shape[1]
    if certainty and word_starts is not None:
        new_word = (upcast(teacher_vocab_logits.detach()).softmax(-1) * word_starts).sum(-1)
        new_word = torch.where(on_places(teacher_mask, teacher_spans), new_word, 1.0)  # the text ends before it
        new_word = torch.cat([new_word[:, 1:], torch.ones_like(new_word[:, :1])], 1)
        closed = new_word.gather(1, edges(teacher_spans, stretches)[1]) > certainty
        student_spans, teacher_spans = joined(student_spans, closed), joined(teacher_spans, closed)
    counts = counted(student_spans, teacher_spans, mask, teacher_mask)
    log_b = stretch_logprobs(student_vocab_logits, labels, student_spans, stretches)
    log_a = stretch_logprobs(teacher_vocab_logits.detach(), teacher_labels, teacher_spans, stretches)
    log_a, log_b = log_a.clamp_max(0) / temperature - EPSILON, log_b.clamp_max(0) / temperature - EPSILON
    entropy = -(log_a.exp() * log_b - torch.expm1(log_a) * _log_rest(log_b))
    return spread(torch.where(counts, entropy, 0.0), student_spans)


def _log_rest(log_p: Tensor) -> Tensor:
    """log(1 - p) of log p < 0, where either form keeps its digits."""
    small = log_p < -0.6931
    return torch.where(
        small,
        torch.log1p(-torch.where(small, log_p, -1.0).exp()),
        torch.log(-torch.expm1(torch.where(small, -0.5, log_p))),
    )
