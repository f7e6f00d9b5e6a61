"""A critic of limited steepness tells pairs from strangers, and within a batch the two clouds are carried together."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from limbeck.core.bank import Bank
from limbeck.core.card import method, require
from limbeck.core.features import Shape
from limbeck.core.maths import sinkhorn, upcast
from limbeck.core.ranges import at_least

FORBIDDEN = 1e4  # what it costs to carry to or from a masked example


@method(
    paper="Chen et al. 2020, section 3",
    year=2020,
    arxiv="2012.08674",
    differs="vectors longer than 1 are cut to length 1 and shorter ones left, since only so the critic is 1-Lipschitz; "
    "it is linear in each vector, so the mean over all strangers is taken exactly, by the mean of their vectors; the "
    "paper's regularisation of the transport and its iterations are not known to us",
)
class WCoRD(nn.Module):
    """global_weight (E_strangers f - E_pairs f) + local_weight <plan, cost>.  [B, D], [B, E], [B] -> []

    f(h_t, h_s) = <u, v> with u = cut(W_t h_t), v = cut(W_s h_s), both W of spectral norm 1. The first part is the dual
    form of a Wasserstein distance, whose maximum over critics and student bounds their mutual information; strangers
    are all other examples of the training set, whose u and v a bank remembers. The second is the primal form in the
    batch: cost 1 - cos of W_t h_t and W_s h_s, plan by Sinkhorn from uniform to uniform weights.

    width: of the vectors, >= 1.
    momentum: of the banks, in [0, 1); they move in training mode with gradients on, once a call.
    global_weight: >= 0. local_weight: >= 0.
    epsilon: of the plan's entropy, > 0, in units of the cost, which lies in [0, 2].
    iterations: of Sinkhorn, >= 1.

    *Needs*: embeddings and the index of each example in a set of fixed size; 2 x N x width numbers of memory.
    *Relates to*: beside `ce` at weight 1, and `kd`. `crd` is the same with the critic of noise-contrastive estimation,
        sharper, but with a choice of negatives; `rkd` needs no memory.
    *Differs*: see the card; there is no official code.
    """

    def __init__(
        self,
        student_emb: Shape,
        teacher_emb: Shape,
        index: Shape,
        *,
        width: int = 128,
        momentum: float = 0.5,
        global_weight: float = 0.8,
        local_weight: float = 0.05,
        epsilon: float = 0.05,
        iterations: int = 20,
    ) -> None:
        super().__init__()
        at_least(1, width=width, iterations=iterations)
        at_least(0, global_weight=global_weight, local_weight=local_weight)
        require(0 <= momentum < 1, "momentum", momentum, "in [0, 1)")
        require(epsilon > 0, "epsilon", epsilon, "> 0")
        self.width, self.momentum, self.epsilon, self.iterations = width, momentum, epsilon, iterations
        self.global_weight, self.local_weight = global_weight, local_weight
        self.student_map = spectral_norm(nn.Linear(student_emb[-1], width, bias=False))
        self.teacher_map = spectral_norm(nn.Linear(teacher_emb[-1], width, bias=False))
        self.student_bank, self.teacher_bank = Bank(index[0], width), Bank(index[0], width)

    def forward(self, student_emb: Tensor, teacher_emb: Tensor, index: Tensor, mask: Tensor | None = None) -> Tensor:
        """One value a batch; moves the banks in training mode."""
        dtype = self.student_bank.rows.dtype
        student = upcast(self.student_map(student_emb.to(dtype)))
        teacher = upcast(self.teacher_map(teacher_emb.detach().to(dtype)))
        real = torch.ones_like(index, dtype=torch.bool) if mask is None else mask.bool()
        counts = (real | ~real.any()).to(student)
        weights = counts / counts.sum()

        v, u = _cut(student), _cut(teacher)
        strangers = (self.teacher_bank.others(index) * v).sum(1) + (u * self.student_bank.others(index)).sum(1)
        critic = (weights * (strangers / 2 - (u * v).sum(1))).sum()
        cost = 1 - F.normalize(teacher) @ F.normalize(student).mT
        cost = torch.where(weights.outer(weights) > 0, cost, FORBIDDEN)
        plan = sinkhorn(cost, weights, weights, epsilon=self.epsilon, iterations=self.iterations)
        if self.training and torch.is_grad_enabled():
            self.student_bank.remember(index, v, self.momentum, mask)
            self.teacher_bank.remember(index, u, self.momentum, mask)
        loss: Tensor = self.global_weight * critic + self.local_weight * (plan * cost).sum()
        return torch.where(real.any(), loss, 0.0)


def _cut(rows: Tensor) -> Tensor:
    """Rows longer than 1 at length 1: a map that brings no two points further apart."""
    length: Tensor = rows.norm(dim=1, keepdim=True)
    return rows / length.clamp_min(1)
