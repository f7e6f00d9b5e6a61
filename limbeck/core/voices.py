"""What networks say of a batch of texts, with logits or without: for methods that do more than compare by `match`.

A voice is logits [B, T, V], or where `spare` has found that they need not be built, the head over hidden states that
they can be made from. The functions here say the same of both, up to rounding.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from limbeck.core.errors import BadInput
from limbeck.core.headloss import Head, Logits, Term, divergences, head_loss
from limbeck.core.headloss.route import head_of, height
from limbeck.core.maths import label_logprobs
from limbeck.core.nets import Batch, Nets, evaluating
from limbeck.core.policy import ONE_TOKENIZER
from limbeck.core.reduce import Part, mean
from limbeck.core.vocabularies import shared_words

Voice = Tensor | Head
TILE = 256  # rows of a teacher's logits that are looked at together


def spare(nets: Nets, probe: Batch, *players: str) -> None:
    """Find out on one batch whose logits over a large vocabulary need not be built. The first is who learns.

    Raises BadInput where the teacher reads its own tokens: nobody has aligned texts that are not written yet.
    """
    if "teacher_inputs" in probe:
        raise BadInput(ONE_TOKENIZER)
    with torch.no_grad(), evaluating(*nets.modules.values()):
        heights = {player: height(nets, player, probe) for player in players}
    learner = heights[players[0]]
    if learner:
        nets.logit_free |= {p for p, rows in heights.items() if rows == learner or (rows and "words" in probe)}


def hear(nets: Nets, player: str, batch: Mapping[str, Any]) -> Voice:
    """What a network says of a batch; without gradient when it is frozen."""
    if player not in nets.logit_free:
        logits: Tensor = nets.run(player, batch)["logits"]
        return logits
    head = head_of({f"student_{k}": v for k, v in nets.run(player, batch, logits=False).items()}, "student")
    assert head is not None  # `spare` has seen it
    return head


@torch.no_grad()
def overhear(nets: Nets, player: str, batch: Mapping[str, Any]) -> Voice:
    """The same in eval mode and without gradient, as the network was when it wrote."""
    with evaluating(nets.find(player)):
        voice = hear(nets, player, batch)
    return voice.detached() if isinstance(voice, Head) else voice  # the head's weights are the parameters themselves


def last(voice: Voice, places: int) -> Voice:
    """The voice at the last places of each text."""
    return replace(voice, hidden=voice.hidden[:, -places:]) if isinstance(voice, Head) else voice[:, -places:]


def logprobs(
    voice: Voice, labels: Tensor, mask: Tensor, temperature: float = 1.0, *, weights: Tensor | None = None
) -> Tensor:
    """Log-probability of each label at a temperature: [B, T]; only where the mask is True it means anything.

    weights [B, T]: how the caller is going to weigh the places, up to a factor, which spares work where it is so.
    """
    if not isinstance(voice, Head):
        return label_logprobs(voice, labels, temperature)
    term = Term(divergences.cross_entropy, temperature, against="labels")
    (found,) = head_loss(voice, None, [term], labels=labels.clamp_min(0), mask=mask, weights=weights)
    return -found


def supervised(nets: Nets, batch: Batch) -> Part:
    """Mean cross-entropy of the student with the batch's own words."""
    voice, labels = hear(nets, "student", batch), batch["labels"]
    mask = batch["mask"].bool() if "mask" in batch else torch.ones_like(labels, dtype=torch.bool)
    values = torch.where(labels >= 0, -logprobs(voice, labels, mask & (labels >= 0)), 0.0)
    return mean(values, mask)


def compared(
    student: Voice,
    teacher: Voice,
    plainly: Callable[[Tensor, Tensor], Tensor],
    terms: Sequence[Term],
    mask: Tensor,
    words: Tensor | None = None,
    labels: Tensor | None = None,
) -> Tensor:
    """A loss of logits at each place, or the sum of its terms, each times its weight, which says the same: [B, T].

    plainly: of the student's and the teacher's logits. mask: where a place counts; elsewhere nothing is meant. words:
    how many words both share, where their heads are padded to other heights. labels: where a term or the loss asks for
    them; a term against labels is 0 where there is none.
    """
    if not isinstance(student, Head):
        assert not isinstance(teacher, Head)  # only a learner that spares its logits lets others do so
        return plainly(*of_one_height(student, teacher, words))
    shared = words_of_both(student, teacher, words)
    said = teacher if isinstance(teacher, Head) else Logits(teacher)
    given = None if labels is None else labels.clamp_min(0)
    values = head_loss(student, said, terms, labels=given, mask=mask, words=shared)
    told = 1.0 if labels is None else labels >= 0
    parts = [t.weight * (v * told if t.against == "labels" else v) for t, v in zip(terms, values, strict=True)]
    return torch.stack(parts).sum(0)


def words_of_both(student: Voice, teacher: Voice, words: Tensor | None) -> int | None:
    """How many words both share, as `shared_words` has it."""
    mine, its = (len(v.weight) if isinstance(v, Head) else v.shape[-1] for v in (student, teacher))
    return shared_words(mine, its, words)


def of_one_height(student: Tensor, teacher: Tensor, words: Tensor | None) -> tuple[Tensor, Tensor]:
    """Logits [..., V] and [..., W] of the words that both share."""
    shared = words_of_both(student, teacher, words)
    return student[..., :shared], teacher[..., :shared]


class Likeliest(NamedTuple):
    """The K likeliest words of each place: ids and logits [B, T, K]."""

    ids: Tensor
    logits: Tensor


@torch.no_grad()
def likeliest(voice: Voice, count: int, mask: Tensor, words: int | None = None) -> Likeliest:
    """The `count` likeliest of the first `words` words where the mask is True; anything elsewhere."""
    if not isinstance(voice, Head):
        found = voice[..., :words].topk(count, -1)
        return Likeliest(found.indices, found.values)
    places = mask.flatten().nonzero()[:, 0]
    ids = torch.zeros(mask.numel(), count, dtype=torch.long, device=mask.device)
    logits = torch.zeros(mask.numel(), count, device=mask.device)
    for some in places.split(TILE):
        best = voice.at(some).logits()[..., :words].topk(count, -1)
        ids[some], logits[some] = best.indices, best.values.to(logits.dtype)
    return Likeliest(ids.view(*mask.shape, count), logits.view(*mask.shape, count))
