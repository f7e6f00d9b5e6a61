"""Losses of vocabulary logits computed from hidden states and heads, where their cards say how."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from limbeck.core import schedule
from limbeck.core.card import Card
from limbeck.core.headloss.heads import Head, Logits, Sparse, Teacher, Term
from limbeck.core.headloss.loss import head_loss
from limbeck.core.match import Match
from limbeck.core.maths import FLOOR
from limbeck.core.nets import Batch, Nets, can_spare_logits
from limbeck.core.reduce import Part, mean

# Words from which on logits cost more than the tiles do.
WORTH = 4096


def has_head_form(matches: Sequence[Match]) -> bool:
    """Whether every loss can do without logits, all through the run."""
    return bool(matches) and all(term_of(m, progress) is not None for m in matches for progress in (0.0, 1.0))


def term_of(match: Match, progress: float) -> Term | None:
    """A loss's form for heads, with its knobs as they are now; None where it has none."""
    card: Card | None = getattr(match.loss, "card", None)
    if card is None or card.head is None:
        return None
    term: Term | None = card.head(**{k: schedule.value(v, progress) for k, v in match.knobs.items()})
    return term


def few(batch: Batch) -> Batch:
    """The first places of the first text: logits of a whole batch are what is to be spared."""
    return {k: v[:1, :8] for k, v in batch.items() if k in ("inputs", "attention_mask", "segments")}


def height(nets: Nets, player: str, probe: Batch) -> int:
    """Rows of a player's head, if the logits of a large vocabulary can be made from it and the hidden states, which is
    tried on a few places; else 0."""
    if not player or player.split(".")[0] not in nets or not can_spare_logits(nets.find(player)):
        return 0
    with torch.no_grad():
        have = {f"student_{k}": v for k, v in nets.run(player, few(probe)).items()}
    head = head_of(have, "student")
    if head is None or len(head.weight) < WORTH or have["student_logits"].shape[-1] != len(head.weight):
        return 0
    told, made = have["student_logits"].float(), head.logits().float()
    same = torch.allclose(told, made, rtol=1e-2, atol=1e-2 * float(told.abs().max()))
    return len(head.weight) if same else 0


def head_of(have: Mapping[str, Any], side: str) -> Head | None:
    """The head of the student or teacher over its hidden states; None where they are not at hand."""
    if f"{side}_hidden" not in have or f"{side}_head" not in have:
        return None
    return Head(
        have[f"{side}_hidden"],
        have[f"{side}_head"],
        have.get(f"{side}_head_bias"),
        scale=have.get(f"{side}_head_scale", 1.0),
        softcap=have.get(f"{side}_head_softcap"),
        lora=have.get(f"{side}_head_lora"),
    )


def teacher_of(have: Mapping[str, Any]) -> Teacher | None:
    """What is known of the teacher: a head, stored logits, or a few stored words a place."""
    if "teacher_weights" in have:
        drawn = have["teacher_weights"] > 0
        return Sparse.counts(have["teacher_ids"].where(drawn, -1), have["teacher_weights"])
    if "teacher_ids" in have:
        kept = have["teacher_logprobs"] > FLOOR
        return Sparse(have["teacher_ids"].where(kept, -1), have["teacher_logprobs"])
    return head_of(have, "teacher") or (Logits(have["teacher_logits"]) if "teacher_logits" in have else None)


def parts(matches: Sequence[Match], have: Mapping[str, Any], progress: float) -> dict[str, Part]:
    """The weighted mean of every loss by name, in one pass over the vocabulary.

    A place without a label, as -100 says, gives 0 to the losses that ask for labels, as it does with logits.
    """
    student = head_of(have, "student")
    assert student is not None
    mask, labels = have.get("mask"), have.get("labels")
    weights = [float(schedule.value(m.weight, progress)) for m in matches]
    terms: list[Term] = []
    for m, weight in zip(matches, weights, strict=True):
        term = term_of(m, progress)
        assert term is not None
        terms.append(replace(term, weight=term.weight * weight))
    told = None if labels is None else labels >= 0
    groups = [list(range(len(terms)))]
    if told is not None and not bool(told.all()):
        of_labels = [k for k, m in enumerate(matches) if "labels" in m.needs]
        groups = [of_labels, [k for k in groups[0] if k not in of_labels]]
    values: dict[int, Tensor] = {}
    for group, counts in zip(groups, (mask, mask) if len(groups) == 1 else (_both(mask, told), mask), strict=False):
        if group:
            asked = [terms[k] for k in group]
            teacher = teacher_of(have) if any(t.against == "teacher" for t in asked) else None
            safe = None if labels is None else labels.clamp_min(0)
            padded = isinstance(teacher, Head) and len(teacher.weight) != len(student.weight)
            words = int(have["words"]) if padded else None
            found = head_loss(student, teacher, asked, labels=safe, mask=counts, words=words)
            values |= dict(zip(group, found, strict=True))
    if "teacher_weights" in have:  # draws from a tempered proposal sum to 1 on average only, and must stay so
        total = have["teacher_weights"].detach().sum(-1)
        values |= {k: total.to(v.dtype) * v for k, v in values.items() if terms[k].against == "teacher"}
    return {m.name: terms[k].weight * mean(values[k], mask) for k, m in enumerate(matches)}


def _both(mask: Tensor | None, told: Tensor | None) -> Tensor | None:
    return told if mask is None or told is None else mask.bool() & told
