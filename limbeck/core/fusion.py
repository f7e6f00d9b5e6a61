"""Several sources, each with a vocabulary of its own, are fused into one student: what they say, and how well."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from limbeck.core.errors import BadInput
from limbeck.core.maths import label_logprobs, upcast
from limbeck.core.merging import MERGES, check
from limbeck.core.nets import Batch, Nets
from limbeck.core.reduce import Part, labelled
from limbeck.core.selection import teachers_of
from limbeck.core.spans import counted, edges, spread, sums
from limbeck.core.teachers import read_by
from limbeck.core.vocabularies import of_words, stretch_logprobs

NOBODY = -1e5  # the logit of a word that no word of the teacher is near to


# ---- words and places of two vocabularies ----------------------------------------------------------------------------
def partners(
    student_spans: Tensor, teacher_spans: Tensor, mask: Tensor | None = None, teacher_mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Where one token of each side is the same text, True [B, T], and the teacher's place that has it there [B, T]."""
    stretches = student_spans.shape[1]
    one = [sums(torch.ones_like(spans), spans, stretches) == 1 for spans in (student_spans, teacher_spans)]
    single = one[0] & one[1] & counted(student_spans, teacher_spans, mask, teacher_mask)
    place = edges(teacher_spans, stretches)[0].gather(1, student_spans.clamp_min(0))
    return spread(single.float(), student_spans) > 0, place


def reworded(logits: Tensor, nearest_words: Tensor, words: int) -> Tensor:
    """Logits [..., W] -> [..., words], the student's: of those nearest to a word the largest, -1e5 without any."""
    heirs = torch.where(nearest_words < 0, words, nearest_words).expand_as(logits)
    blank = torch.full_like(logits[..., :1], NOBODY).repeat(*[1] * (logits.ndim - 1), words + 1)
    return blank.scatter_reduce(-1, heirs, logits, "amax")[..., :words]


def in_order(mine: Tensor, theirs: Tensor) -> tuple[Tensor, Tensor]:
    """The n-th place that counts for the student meets the n-th of the teacher: [B, T], [B, U] -> bool, long [B, T].

    Where one meets, as far as both go, and the teacher's place there.
    """
    rank = mine.long().cumsum(1) - 1
    meets = mine & (rank < theirs.sum(1, keepdim=True))
    order = (~theirs).long().argsort(dim=1, stable=True)  # the places that count, in order, before the others
    return meets, order.gather(1, rank.clamp(0, order.shape[1] - 1))


# ---- sources ---------------------------------------------------------------------------------------------------------
def heard(nets: Nets, batch: Batch, scheme: str) -> list[Batch]:
    """For each source the batch as it reads it, with what it says as teacher_*, the way a store would bring it."""
    players = teachers_of(nets)
    if not players:
        raise BadInput(f"{scheme} needs nets.teachers, a list of at least one network, or nets.teacher")
    read = [read_by(player, batch) for player in players]
    with torch.no_grad():
        said = [nets.run(player, b) for player, b in zip(players, read, strict=True)]
    for own, says in zip(read, said, strict=True):
        if "teacher_inputs" in own and "logits" in says:
            says["logits"] = of_words(says["logits"], own.get("teacher_words"))
    return [b | {f"teacher_{name}": value for name, value in s.items()} for b, s in zip(read, said, strict=True)]


def cost(logits: Tensor, batch: Batch) -> Tensor:
    """What each text costs a source, in nats a token of the student: [B]; inf where nothing could be aligned.

    logits: of the source, in the tokens in which it reads `batch`. Nats are those of its own tokens, so that sources
    that cut a text into few or many pieces compare.
    """
    if "teacher_inputs" not in batch:
        counts, nats = labelled(batch), -label_logprobs(logits, batch["labels"])
        flat = torch.where(counts, nats, 0.0).view(len(nats), -1)
        return flat.sum(1) / counts.view(len(nats), -1).sum(1).clamp_min(1)
    mine, theirs = batch["student_spans"], batch["teacher_spans"]
    stretches = mine.shape[1]
    counts = counted(mine, theirs, batch.get("mask"), batch.get("teacher_mask"))
    nats = -stretch_logprobs(logits, batch["teacher_labels"], theirs, stretches)
    tokens = (sums(torch.ones_like(mine), mine, stretches) * counts).sum(1)
    return torch.where(tokens > 0, torch.where(counts, nats, 0.0).sum(1) / tokens.clamp_min(1), torch.inf)


def best(costs: Tensor, mask: Tensor) -> list[Tensor]:
    """`mask` [B, ...] once a source, left only at the texts that cost it least; costs [M, B]."""
    chosen = costs.argmin(0).view(-1, *[1] * (mask.ndim - 1))
    return [mask & (chosen == k) for k in range(len(costs))]


def pooled(parts: Sequence[Part]) -> Part:
    """The mean over what several parts of one weight are means of."""
    count = sum((part.count for part in parts), start=torch.tensor(0, device=parts[0].total.device))
    return Part(torch.stack([part.total for part in parts]).sum(), count, parts[0].weight)


# ---- copies of a student ---------------------------------------------------------------------------------------------
def branch(nets: Nets, count: int, scheme: str) -> None:
    """Make `nets.branches`, copies of the student."""
    if "student" in nets.taps:
        raise BadInput(f"{scheme} copies its student, and what is tapped in it would not be read in the copies")
    nets.branches = nn.ModuleList(copy.deepcopy(nets.student) for _ in range(count))


def merge(nets: Nets, how: str, *, scale: float, keep: float) -> None:
    """Give the student the weights that `core.merging` makes of its branches; it still has those it branched at.

    scale: of task_arithmetic and ties; keep: of ties.
    """
    start, states = nets.student.state_dict(), [b.state_dict() for b in nets.branches]
    check(start, states)
    knobs: dict[str, dict[str, float]] = {"ties": {"scale": scale, "keep": keep}, "task_arithmetic": {"scale": scale}}
    nets.student.load_state_dict(MERGES[how](start, states, **knobs.get(how, {})))


def top_logits(logits: Tensor, top: int) -> Tensor:
    """Logits [..., W] with -1e5 in the place of all but the `top` largest."""
    z = upcast(logits.detach())
    kept = z.topk(min(top, z.shape[-1]))
    return torch.full_like(z, NOBODY).scatter(-1, kept.indices, kept.values)
