"""A small network learns which part of the teacher's ranked words is worth learning, and the target is cut to it."""

import torch
from torch import Tensor, nn

from limbeck.core.card import method, require
from limbeck.core.features import Shape
from limbeck.core.maths import FLOOR, kl_logprobs, log_probs, pair


@method(
    paper="Liu et al. 2024 (MGSR), token level",
    year=2024,
    arxiv="2407.10068",
    differs="the paper's network is not known here: two layers on the likeliest words of the teacher. The student "
    "keeps its whole distribution: cut as well, it could say anything outside, and the limits would close to one word",
    row="mgsr_llm",
)
class DACKL(nn.Module):
    """KL(p' || q), p' = m p / sum(m p), p = softmax(teacher), q = softmax(student).  [..., V] x 2 -> [...]

    With the words in falling order of p, and c the teacher's mass before a word, m is 1 where the word's share [c, c +
    p] meets [lower, upper], and falls to 0 over a further `ramp` of mass, so that a gradient reaches the limits; the
    likeliest word always stays. A network of the `reads` largest p, and of q at the same words, without gradient to
    either, gives lower and upper; it begins near lower = 0, upper = 1 and trains with the student.

    reads: how many of the likeliest words the network reads, >= 1.
    width: of its hidden layer, >= 1.
    ramp: > 0, mass over which m falls from 1 to 0.

    *Needs*: logits of both over one vocabulary, aligned. It sorts the vocabulary at every place.
    *Relates to*: instead of `forward_kl`, with `span_correlation` and `ce` beside it, all at weight 1.
    *Differs*: see the card.
    """

    def __init__(
        self,
        student_logits: Shape,
        teacher_logits: Shape,
        *,
        reads: int = 32,
        width: int = 32,
        ramp: float = 0.1,
    ) -> None:
        super().__init__()
        require(reads >= 1, "reads", reads, ">= 1")
        require(width >= 1, "width", width, ">= 1")
        require(ramp > 0, "ramp", ramp, "> 0")
        self.reads, self.width, self.ramp = reads, width, ramp
        limits = nn.Linear(width, 2)
        with torch.no_grad():
            limits.bias.copy_(torch.tensor([-4.0, 4.0]))
        self.limits = nn.Sequential(nn.Linear(2 * min(reads, teacher_logits[-1]), width), nn.ReLU(), limits)

    def forward(self, student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
        """Per place."""
        student, teacher = pair(student_logits, teacher_logits.detach())
        log_p, order = log_probs(teacher).sort(-1, descending=True)
        log_q = log_probs(student).gather(-1, order)
        p = log_p.exp()
        seen = torch.cat([p[..., : self.reads], log_q.detach()[..., : self.reads].exp()], -1)
        lower, upper = self.limits(seen.to(next(self.limits.parameters()).dtype)).sigmoid().to(p).split(1, -1)
        end = p.cumsum(-1)
        below = (1 + (upper - (end - p)) / self.ramp).clamp(0, 1)
        above = (1 + (end - lower) / self.ramp).clamp(0, 1)
        inside = torch.cat([torch.ones_like(p[..., :1]), (below * above)[..., 1:]], -1)
        cut = inside * p
        target = cut / cut.sum(-1, keepdim=True)
        return kl_logprobs(target.clamp_min(torch.finfo(p.dtype).tiny).log().masked_fill(cut == 0, FLOOR), log_q)
