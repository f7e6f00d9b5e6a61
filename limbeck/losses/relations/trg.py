"""Tokens of all images of a batch form a graph of neighbours, and the student's graph should be the teacher's."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from limbeck.core.card import method
from limbeck.core.features import Shape, common, pick, same_places, tokens, width
from limbeck.core.layerwise import counted
from limbeck.core.maths import FLOOR, gram, pair, pairwise_distances, reverse_kl
from limbeck.core.ranges import above, at_least

SMALLEST = 1e-6  # mean squared distance, so that tokens that are all alike have a finite slope


@method(
    paper="Zhang et al. 2023, token-level relationship graph",
    year=2023,
    arxiv="2306.12442",
    differs="numbers that the paper leaves open are knobs: the width of the kernel is in units of the mean squared "
    "distance, so that it suits any feature; means over tokens for sums; the falling temperature is a schedule of the "
    "knob in a recipe",
    row="trg_token_graph",
)
class TRG(nn.Module):
    """inner_weight (C_s - C_t)^2 + local_weight KL(softmax A_s || softmax A_t) + global_weight InfoNCE.  lists -> []

    C = softmax(F F^T / sqrt(D)) relates the tokens F [T, D] of one image, mean of squares. A joins all tokens of the
    batch: A_ij = exp(-|f_i - f_j|^2 / (2 sigma d)) where j is one of the nearest neighbours of i, else 0; d is the mean
    squared distance; the divergence is the mean over its rows. InfoNCE: the projected student token must find its own
    teacher token among all of the batch, by cosine / temperature.

    inner_weight: >= 0. local_weight: >= 0. global_weight: >= 0.
    neighbours: of a token, >= 1. sigma: width of the kernel, > 0.
    temperature: > 0; from coarse to fine in the paper, such as a schedule from 1 to 0.1.
    sampled: tokens of an image, drawn anew each time, >= 1; the cost grows with the square of (batch x this).
    layer: which of the features, counted from shallow (0) or from deep (-1).

    *Needs*: one feature of each with places: maps or tokens; the larger picture is averaged down to the smaller.
        Batches of 64 and more.
    *Relates to*: weight 0.1 to 10 beside `ce` and `kd`. `rkd` and `sp` relate whole images; this helps rare classes,
        whose tokens have company where the images have none.
    """

    def __init__(
        self,
        student_feats: list[Shape],
        teacher_feats: list[Shape],
        *,
        inner_weight: float = 1.0,
        local_weight: float = 1.0,
        global_weight: float = 1.0,
        neighbours: int = 8,
        sigma: float = 0.5,
        temperature: float = 0.1,
        sampled: int = 16,
        layer: int = -1,
    ) -> None:
        super().__init__()
        at_least(0, inner_weight=inner_weight, local_weight=local_weight, global_weight=global_weight)
        at_least(1, neighbours=neighbours, sampled=sampled)
        above(0, sigma=sigma, temperature=temperature)
        self.inner_weight, self.local_weight, self.global_weight = inner_weight, local_weight, global_weight
        self.neighbours, self.sigma, self.temperature = neighbours, sigma, temperature
        self.sampled, self.layer = sampled, layer
        student, teacher = common(
            student_feats[pick("layer", student_feats, layer, "student")],
            teacher_feats[pick("layer", teacher_feats, layer, "teacher")],
        )
        self.projector = nn.Linear(width(student), width(teacher))

    def forward(
        self,
        student_feats: list[Tensor],
        teacher_feats: list[Tensor],
        attention_mask: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """One value a batch; 0 when all of it is masked."""
        student, teacher = pair(*same_places(student_feats[self.layer], teacher_feats[self.layer].detach()))
        usable = counted(mask, student).unsqueeze(1).expand(-1, tokens(student).shape[1])
        if attention_mask is not None and student.ndim == 3:
            usable = usable & attention_mask.bool()
        student, teacher, usable = self._drawn(tokens(student), tokens(teacher), usable)
        s, t, counts = student.flatten(0, 1), teacher.flatten(0, 1), usable.flatten()
        pairs = usable.unsqueeze(1) & usable.unsqueeze(2)
        inner = (_context(student, usable) - _context(teacher, usable)).square()
        local = reverse_kl(self._graph(s, counts), self._graph(t, counts))
        found = F.cross_entropy(self._likeness(s, t, counts), torch.arange(len(s), device=s.device), reduction="none")
        return (
            self.inner_weight * _mean(inner, pairs)
            + self.local_weight * _mean(local, counts)
            + self.global_weight * _mean(found, counts)
        )

    def _drawn(self, student: Tensor, teacher: Tensor, usable: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """At most `sampled` tokens [B, S, D] of each image, those of one place in both; unusable ones are 0."""
        if student.shape[1] > self.sampled:
            chance = torch.rand(usable.shape, device=usable.device) + usable
            chosen = chance.topk(self.sampled, 1).indices
            student, teacher = (x.gather(1, chosen.unsqueeze(2).expand(-1, -1, x.shape[2])) for x in (student, teacher))
            usable = usable.gather(1, chosen)
        student, teacher = (torch.where(usable.unsqueeze(2), x, 0.0) for x in (student, teacher))
        return student, teacher, usable

    def _graph(self, rows: Tensor, counts: Tensor) -> Tensor:
        """Adjacency [N, N]; nothing leads to rows that do not count."""
        apart = pairwise_distances(rows, squared=True)
        joined = counts & counts.unsqueeze(1)
        typical = _mean(apart, joined).clamp_min(SMALLEST)
        strange = ~joined | torch.eye(len(rows), dtype=torch.bool, device=rows.device)
        near = apart.detach().masked_fill(strange, torch.inf).topk(min(self.neighbours, len(rows)), 1, largest=False)
        edges = torch.zeros_like(strange).scatter(1, near.indices, True) & ~strange
        adjacency = torch.where(edges, (apart / (-2 * self.sigma * typical)).exp(), 0.0)
        return torch.where(counts, adjacency, FLOOR)

    def _likeness(self, student: Tensor, teacher: Tensor, counts: Tensor) -> Tensor:
        """Cosine / temperature of every student token with every teacher token that counts: [N, N]."""
        with torch.autocast(student.device.type, enabled=False):
            mine = F.normalize(self.projector(student.to(self.projector.weight.dtype)), dim=1)
            cosine = mine @ F.normalize(teacher, dim=1).to(mine).mT
        return torch.where(counts, cosine / self.temperature, FLOOR)


def _context(rows: Tensor, usable: Tensor) -> Tensor:
    """softmax(F F^T / sqrt(D)) over an image's own usable tokens: [B, S, D] -> [B, S, S]."""
    return torch.where(usable.unsqueeze(1), gram(rows) / rows.shape[2] ** 0.5, FLOOR).softmax(2)


def _mean(values: Tensor, counts: Tensor) -> Tensor:
    return torch.where(counts, values, 0.0).sum() / counts.sum().clamp_min(1)
