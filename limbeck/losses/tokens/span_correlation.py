"""Within a word or phrase, what is likely at one place goes with what is likely at the next: that bond is matched."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from limbeck.core.card import method
from limbeck.core.maths import pair


@method(
    paper="Liu et al. 2024 (MGSR), span level",
    year=2024,
    arxiv="2407.10068",
    differs="the row's reading of the paper: products of the distributions of neighbouring places. Spans come from the "
    "batch, or end at given tokens, not from a chunker",
    row="mgsr_llm",
    zero_at_match=True,
    exceptions={"leading dimensions": "neighbouring places are compared, so examples and places are told apart"},
)
def span_correlation(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor | None = None,
    phrases: Tensor | None = None,
    mask: Tensor | None = None,
    *,
    breaks: Sequence[int] = (),
) -> Tensor:
    """|p_before * p_t - q_before * q_t|^2 for neighbours of one span, else 0.  [B, T, V] x 2, [B, T] -> [B, T]

    p = softmax(teacher), q = softmax(student), * word by word. The value stands at the later of the two places; the one
    before is the last that the mask counts. A mean over places is that over pairs times pairs / places.

    breaks: ids of the tokens that end a span when the batch brings no `phrases`, such as those of space and full stop;
        the token itself belongs to the span that it ends. () takes each text as one span.

    *Needs*: logits of both over one vocabulary; `phrases`, or labels and `breaks`.
    *Relates to*: a small addition to `dac_kl` or `forward_kl`, weight 1: products of probabilities are small.
    *Differs*: see the card.
    """
    student, teacher = pair(student_logits, teacher_logits.detach())
    p, q = teacher.softmax(-1), student.softmax(-1)
    place = torch.arange(p.shape[1], device=p.device).expand(p.shape[:2])
    counts = torch.ones_like(place, dtype=torch.bool) if mask is None else mask.bool()
    last = torch.where(counts, place, -1).cummax(-1).values
    before = F.pad(last[:, :-1], (1, 0), value=-1)
    spans = _numbered(place, labels, breaks) if phrases is None else phrases
    there = before.clamp_min(0)
    bound = counts & (before >= 0) & (spans >= 0) & (spans.gather(1, there) == spans)
    at = there.unsqueeze(-1).expand_as(p)
    apart = (p * p.gather(1, at) - q * q.gather(1, at)).square().sum(-1)
    return torch.where(bound, apart, 0.0)


def _numbered(place: Tensor, labels: Tensor | None, breaks: Sequence[int]) -> Tensor:
    """The number of the span of each place [B, T], when a span ends with one of `breaks`."""
    if not breaks:
        return torch.zeros_like(place)
    if labels is None:
        raise ValueError("`breaks` lists tokens to look for among the labels, and the batch holds none")
    ends = torch.isin(labels, torch.tensor(list(breaks), device=labels.device)).long()
    return ends.cumsum(-1) - ends
