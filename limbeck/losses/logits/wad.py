"""Unlabelled examples count by how clearly they are like one known class, so that unknown classes hardly do."""

from typing import cast

import torch
from torch import Tensor, nn

from limbeck.core.card import method, require
from limbeck.core.features import Shape
from limbeck.core.layerwise import counted
from limbeck.core.maths import log_probs

EPSILON = 1e-8  # added to lengths by the code


@method(
    paper="Du et al. 2023, Semi-Supervised Learning via Weight-aware Distillation, ICCV",
    year=2023,
    code="RUC-DWBI-ML/research@6e8a37b:WAD-master/evals/eval.py",
    differs="labelled and unlabelled examples share a batch, where the code draws one of each and takes two means. "
    "What is admitted goes by the loss when an example last came, not by a pass at the end of a round; anchors are "
    "those that have come so far",
    row="wad_ssl",
)
class WAD(nn.Module):
    """CE(student, y) if y is known, else unlabelled_weight w CE(student, c_1), w = s_1 - s_2.
    [B, C], [B, D], [B] x 2 -> [B]

    s_c(x): largest cosine between the teacher's embedding of x and that of any labelled example of class c; s_1 >= s_2
    the two best classes c_1 and c_2. The teacher has learned without labels, from known and unknown classes alike, so
    that an example of none is like several, or like none, and w is near 0. After round i the unlabelled on which
    student and pseudo label agree best, a part share (1 - i / rounds)^2 of all, are admitted: they are labelled then.

    rounds: how often examples are admitted, evenly over training, >= 0 (the last time none); needs `progress`.
    share: of the unlabelled that a round would admit before it shrinks, in [0, 1].
    unlabelled_weight: of unlabelled examples, >= 0.

    *Needs*: the teacher's embeddings (self-supervised), labels with -100 for the unlabelled, `index`. Memory of N x D.
    *Relates to*: alone, at weight 1; lift unlabelled_weight when most of a batch is unlabelled. The control is `ce` on
        the labelled ones.
    """

    bank: Tensor
    known: Tensor
    loss: Tensor
    guess: Tensor
    round: Tensor

    def __init__(
        self,
        student_logits: Shape,
        teacher_emb: Shape,
        index: Shape,
        *,
        rounds: int = 5,
        share: float = 0.1,
        unlabelled_weight: float = 1.0,
    ) -> None:
        super().__init__()
        require(rounds >= 0, "rounds", rounds, ">= 0")
        require(0 <= share <= 1, "share", share, "in [0, 1]")
        require(unlabelled_weight >= 0, "unlabelled_weight", unlabelled_weight, ">= 0")
        self.rounds, self.share, self.unlabelled_weight = rounds, share, unlabelled_weight
        self.register_buffer("bank", torch.zeros(index[0], teacher_emb[-1]))
        self.register_buffer("known", torch.full((index[0],), -1))  # class of an anchor
        self.register_buffer("loss", torch.full((index[0],), torch.inf))  # inf: has not come unlabelled yet
        self.register_buffer("guess", torch.full((index[0],), -1))
        self.register_buffer("round", torch.zeros((), dtype=torch.long))

    def forward(
        self,
        student_logits: Tensor,
        teacher_emb: Tensor,
        labels: Tensor,
        index: Tensor,
        mask: Tensor | None = None,
        progress: float | None = None,
    ) -> Tensor:
        """Per example."""
        log_p = log_probs(student_logits)
        z = teacher_emb.detach().to(self.bank.dtype)
        z = z / (z.norm(dim=-1, keepdim=True) + EPSILON)
        counts = counted(mask, z)
        if self.training:
            self._admit(0.0 if progress is None else progress)
            self._remember(z, torch.where(counts, labels, -1), index)
        best, first = self.scores(z, log_p.shape[-1]).topk(2)
        weight = torch.where(best.isfinite().all(-1), best[:, 0] - best[:, 1], 0.0).to(log_p)
        mine = self.known[index]
        mine = torch.where(labels >= 0, labels, mine)
        target = torch.where(mine >= 0, mine, first[:, 0])
        ce = -log_p.gather(-1, target.unsqueeze(-1)).squeeze(-1)
        if self.training:
            rest = counts & (mine < 0)
            self.loss[index] = torch.where(rest, ce.detach().to(self.loss), self.loss[index])
            self.guess[index] = torch.where(rest, target, self.guess[index])
        return torch.where(mine >= 0, 1.0, self.unlabelled_weight * weight) * ce

    @torch.no_grad()
    def scores(self, z: Tensor, classes: int) -> Tensor:
        """Largest cosine with an anchor of each class, [B, C]; -inf where a class has none yet."""
        alike = (z @ self.bank.mT).masked_fill(self.known < 0, -torch.inf)
        of = self.known.clamp_min(0).expand_as(alike)
        return alike.new_full((len(z), classes), -torch.inf).scatter_reduce(1, of, alike, "amax")

    @torch.no_grad()
    def _remember(self, z: Tensor, labels: Tensor, index: Tensor) -> None:
        old = self.known[index]
        anchor = labels >= 0
        self.known[index] = torch.where(anchor, labels, old)
        stays = (labels < 0) & (labels > -100)  # does not count
        self.bank[index] = torch.where(stays.unsqueeze(-1), self.bank[index], z)

    @torch.no_grad()
    def _admit(self, progress: float) -> None:
        """Admit what every round that is over admits."""
        over = min(int(progress * (self.rounds + 1)), self.rounds)
        for i in range(int(self.round) + 1, over + 1):
            rest = cast(int, self.loss.isfinite().sum().item())
            chosen = self.loss.argsort(stable=True)[: int(self.share * (1 - i / self.rounds) ** 2 * rest)]
            self.known[chosen] = self.guess[chosen]
            self.loss[chosen] = torch.inf
            self.round.fill_(i)
