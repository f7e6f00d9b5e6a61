"""The student's words are spread over the teacher's by a sparse matrix, and compared there stretch by stretch."""

import torch
from torch import Tensor

from limbeck.core.card import method, require
from limbeck.core.maths import upcast
from limbeck.core.spans import counted, on_places, spread, sums

EPSILON = 1e-10  # added to projected probabilities by the authors' code, before and in the logarithm


@method(
    paper="NVIDIA 2026 (X-Token), P-KL",
    year=2026,
    arxiv="2605.21699",
    code="NVIDIA-NeMo/RL@7ea279a:nemo_rl/algorithms/loss/loss_functions.py",
    differs="P-KL only: neither the form with ranks of unmatched words (see `gold`) nor several teachers; forward "
    "divergence; rows of the matrix sum to 1 after the cut, without the code's scale trick",
)
def xtoken(
    student_vocab_logits: Tensor,
    teacher_vocab_logits: Tensor,
    student_spans: Tensor,
    teacher_spans: Tensor,
    projection: Tensor,
    projection_weights: Tensor,
    mask: Tensor | None = None,
    teacher_mask: Tensor | None = None,
    *,
    top: int = 8192,
    temperature: float = 1.0,
) -> Tensor:
    """T^2 sum_k t_k (log t_k - log s_k) of each stretch, over k words of the teacher.  [B, T, V], [B, U, W] -> [B, T]

    s = mean over the stretch's places of softmax(student / T) M, brought to sum 1 over the k words; log t = mean over
    its places of the teacher's log-softmax over them, not normalised again, so that it can be below 0. The k words are
    those of the largest logit at a place that counts; M [V, W] is the sparse matrix of `projection`. A stretch's value
    is given to its places in equal parts: the mean over places is the mean over stretches times (stretches / places).

    top: k >= 1, cut to the teacher's vocabulary.
    temperature: T > 0.

    *Needs*: two tokenizers in the batch, with `projection`; a stretch with a masked place does not count.
    *Relates to*: add `ce` at 0.1 and this at 1, as published. Good where words of one side are made of few of the
        other's, such as numbers; `gold` compares the rest by rank, which costs arithmetic its digits.
    *Differs*: see the card.
    """
    require(top >= 1, "top", top, ">= 1")
    require(temperature > 0, "temperature", temperature, "> 0")
    p = (upcast(student_vocab_logits) / temperature).softmax(-1)
    t = upcast(teacher_vocab_logits.detach()) / temperature
    stretches, width = student_spans.shape[1], t.shape[-1]
    seen = t.masked_fill(~on_places(teacher_mask, teacher_spans).unsqueeze(-1), -torch.inf)
    theirs = seen.flatten(0, -2).amax(0).topk(min(top, width)).indices.sort().values
    place = theirs.new_full((width,), -1).scatter(0, theirs, torch.arange(len(theirs), device=theirs.device))
    q = t[..., theirs].log_softmax(-1)
    s = sums(_projected(p, projection, projection_weights, place, len(theirs)), student_spans, stretches)
    log_t = sums(q, teacher_spans, stretches)
    s = s / _size(student_spans, stretches, s)
    log_t = log_t / _size(teacher_spans, stretches, log_t)
    log_s = (s / (s.sum(-1, keepdim=True) + EPSILON) + EPSILON).log()
    divergence = temperature**2 * (log_t.exp() * (log_t - log_s)).sum(-1)
    return spread(
        torch.where(counted(student_spans, teacher_spans, mask, teacher_mask), divergence, 0.0), student_spans
    )


def _projected(p: Tensor, ids: Tensor, weights: Tensor, place: Tensor, words: int) -> Tensor:
    """p M over the kept words: [..., V] -> [..., words]; place: of each of the teacher's ids among them, or -1."""
    column = place[ids[:, 1]]
    entries = torch.stack([torch.where(column < 0, words, column), ids[:, 0]])
    with torch.autocast(p.device.type, enabled=False):  # there are no sparse products of half precision
        matrix = torch.sparse_coo_tensor(entries, weights.to(p.dtype), (words + 1, p.shape[-1]), check_invariants=False)
        flat: Tensor = torch.sparse.mm(matrix, p.flatten(0, -2).mT).mT
    return flat[:, :words].reshape(*p.shape[:-1], words)


def _size(spans: Tensor, stretches: int, like: Tensor) -> Tensor:
    return sums(torch.ones_like(spans, dtype=like.dtype), spans, stretches).clamp_min(1).unsqueeze(-1)
