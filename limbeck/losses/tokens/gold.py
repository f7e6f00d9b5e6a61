"""Stretch by stretch: words that both know are compared one by one, all others by rank."""

import torch
from torch import Tensor

from limbeck.core.card import method, require
from limbeck.core.maths import log_mix
from limbeck.core.spans import counted, spread
from limbeck.core.vocabularies import chained, ranked_distance

LEAST = 1e-8  # what the authors' code takes smaller probabilities for


@method(
    paper="Patiño et al. 2025 (GOLD), hybrid loss, as in TRL",
    year=2025,
    code="huggingface/trl@f2cd577:trl/experimental/gold/gold_trainer.py",
    differs="tokens of a stretch are merged by the chain rule only (`bayesian`): the code's default `observed` takes "
    "probabilities of the next token for its own; texts that the student writes are brought by `distillspec`",
)
def gold(
    student_vocab_logits: Tensor,
    teacher_vocab_logits: Tensor,
    labels: Tensor,
    teacher_labels: Tensor,
    student_spans: Tensor,
    teacher_spans: Tensor,
    same_words: Tensor,
    mask: Tensor | None = None,
    teacher_mask: Tensor | None = None,
    *,
    beta: float = 0.5,
    matched_weight: float | None = None,
) -> Tensor:
    """w JS_beta(matched words) + (1 - w) sum_i |p_S,(i) - p_T,(i)| (others, by rank).  [B, T, V], [B, U, W] -> [B, T]

    For each stretch p is the probability that it is written with a word as its last token: its earlier tokens' times
    the distribution at its last place; not normalised. JS = beta KL(p_T || m) + (1 - beta) KL(p_S || m), m = beta p_T +
    (1 - beta) p_S, summed over matched words as it is. A stretch's value is given to its places in equal parts: the
    mean over places is the mean over stretches times (stretches / places).

    beta: of the mixture, in (0, 1).
    matched_weight: w in [0, 1]; None for the share of the teacher's words that are matched.

    *Needs*: two tokenizers in the batch, with `same_words`; a stretch with a masked place does not count.
    *Relates to*: add `ce`; weight 0.5 to 2. `uld` without alignment, `alm` without distributions; with one tokenizer,
        `js`. In `distillspec` it is on-policy, as in the code.
    *Differs*: see the card.
    """
    require(0 < beta < 1, "beta", beta, "in (0, 1)")
    require(matched_weight is None or 0 <= matched_weight <= 1, "matched_weight", matched_weight, "in [0, 1] or None")
    stretches = student_spans.shape[1]
    p = chained(student_vocab_logits, labels, student_spans, stretches, LEAST)
    q = chained(teacher_vocab_logits.detach(), teacher_labels, teacher_spans, stretches, LEAST).to(p)
    mine, theirs = same_words.unbind(1)
    log_p, log_q = (x.clamp_min(LEAST).log() for x in (p[..., mine], q[..., theirs]))
    log_m = log_mix(log_q, log_p, beta)
    matched = (beta * log_q.exp() * (log_q - log_m) + (1 - beta) * log_p.exp() * (log_p - log_m)).sum(-1)
    unmatched = ranked_distance(_others(p, mine), _others(q, theirs))
    if len(same_words) in (p.shape[-1], q.shape[-1]):  # all of one side is matched: the other's rest meets nothing
        unmatched = torch.zeros_like(unmatched)
    w = len(same_words) / q.shape[-1] if matched_weight is None else matched_weight
    counts = counted(student_spans, teacher_spans, mask, teacher_mask)
    return spread(torch.where(counts, w * matched + (1 - w) * unmatched, 0.0), student_spans)


def _others(p: Tensor, matched: Tensor) -> Tensor:
    """The probabilities with those of matched words at 0, where they change no distance by rank."""
    return p.index_fill(-1, matched, 0.0)
