"""Votes with noise, and how much privacy they cost: Renyi differential privacy by query, independent of what was voted
and dependent on it (Papernot et al. 2016, theorem 3; 2018, theorem 6). All in fp64."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from limbeck.core.reduce import UNLABELLED

ORDERS = (1.25, 1.5, 2.0, *(float(k) for k in range(3, 65)), 80.0, 100.0, 150.0, 200.0, 300.0, 500.0, 1000.0)


def noisy_vote(counts: Tensor, noise: str, scale: float) -> Tensor:
    """The class with the most votes after noise from torch's global generator: [B, C] -> [B].

    scale: of "laplace" noise its parameter, 1 / gamma; of "gaussian" noise its deviation; 0 is the plurality.
    """
    counts = counts.double()
    if noise == "gaussian":
        drawn = torch.randn_like(counts)
    else:  # the difference of two exponential draws
        drawn = torch.empty_like(counts).exponential_() - torch.empty_like(counts).exponential_()
    return (counts + scale * drawn).argmax(-1)


def log_q(counts: Tensor, noise: str, scale: float) -> Tensor:
    """Log of a bound on the chance that noise lets another class win than the plurality's: [B, C] -> [B]."""
    counts = counts.double()
    gap = counts.amax(-1, keepdim=True) - counts
    if noise == "gaussian":
        each = torch.special.log_ndtr(-gap / (math.sqrt(2) * scale))
    else:
        each = torch.log(2 + gap / scale) - math.log(4) - gap / scale
    rest = each.scatter(-1, counts.argmax(-1, keepdim=True), -torch.inf)
    return torch.logsumexp(rest, -1).clamp_max(math.log(1 - 1 / counts.shape[-1]))


def log1mexp(x: Tensor) -> Tensor:
    """log(1 - e^x) for x <= 0."""
    return torch.where(x < -1, torch.log1p(-x.exp()), torch.log(-torch.expm1(x)))


def rdp(noise: str, scale: float, orders: Tensor, log_wrong: Tensor | None = None) -> Tensor:
    """Renyi divergence that one vote may cost at each order: [L], or with `log_wrong` [B], as `log_q` says, [B, L]."""
    if noise == "gaussian":
        free = orders / scale**2
        return free if log_wrong is None else _gaussian(scale, orders, log_wrong)
    pure = 2 / scale
    free = (0.5 * pure**2 * orders).clamp_max(pure)
    if log_wrong is None:
        return free
    wrong = log_wrong.unsqueeze(-1)
    right = log1mexp(wrong)
    usual = right + (right - log1mexp((pure + wrong).clamp_max(-1e-300))) * (orders - 1)
    bound = torch.logaddexp(usual, wrong + pure * (orders - 1)) / (orders - 1)
    return torch.where(wrong <= -math.log(math.exp(pure) + 1), torch.minimum(free, bound), free)


def _gaussian(scale: float, orders: Tensor, log_wrong: Tensor) -> Tensor:
    wrong = log_wrong.unsqueeze(-1)
    low = (scale**2 * -wrong).sqrt()
    high = low + 1
    free = orders / scale**2
    spent_high, spent_low = high / scale**2, low / scale**2
    limit = (low - 1) * spent_low - low * (torch.log1p(1 / (high - 1)) + torch.log1p(1 / (low - 1).clamp_min(1e-12)))
    holds = (high > orders) & (low > 1) & (wrong <= limit) & (-wrong > spent_low)
    right = log1mexp(wrong)
    inner = torch.where(holds, (wrong + spent_low) * (1 - 1 / low), -1.0)
    usual = (orders - 1) * (right - log1mexp(inner))
    rare = (orders - 1) * (spent_high - wrong / (high - 1))
    bound = torch.logaddexp(right + usual, wrong + rare) / (orders - 1)
    return torch.where(holds, torch.minimum(free, bound), free)


def epsilon(spent: Tensor, orders: Tensor, delta: float) -> float:
    """The least epsilon of (epsilon, delta)-differential privacy that the costs [L] at these orders [L] allow."""
    return float((spent - math.log(delta) / (orders - 1)).amin())


class Ledger(nn.Module):
    """Public examples that have been voted on, each once, their noisy labels, and what this has cost.

    examples: of the whole set. like: inputs [B, ...] of a batch. queries: how many may be asked for.
    """

    slot: Tensor
    asked: Tensor
    inputs: Tensor
    labels: Tensor
    orders: Tensor
    free: Tensor
    spent: Tensor

    def __init__(self, examples: int, like: Tensor, queries: int) -> None:
        super().__init__()
        queries = min(queries, examples)
        self.register_buffer("slot", torch.full((examples,), -1))
        self.register_buffer("asked", torch.tensor(0))
        self.register_buffer("inputs", like.new_zeros(queries, *like.shape[1:]))
        self.register_buffer("labels", torch.full((queries,), UNLABELLED))
        self.register_buffer("orders", torch.tensor(ORDERS, dtype=torch.float64))
        self.register_buffer("free", torch.zeros(len(ORDERS), dtype=torch.float64))
        self.register_buffer("spent", torch.zeros(len(ORDERS), dtype=torch.float64))

    def new(self, index: Tensor, public: Tensor) -> Tensor:
        """Rows of a batch that may still be asked for: those that are public, not yet asked, as far as queries last."""
        rows = ((self.slot[index] < 0) & public).nonzero()[:, 0]
        return rows[: len(self.labels) - int(self.asked)]

    @torch.no_grad()
    def ask(self, index: Tensor, inputs: Tensor, counts: Tensor, noise: str, scale: float) -> None:
        """Label examples [K] by the votes [K, C] of those who know, and pay for it."""
        at = int(self.asked) + torch.arange(len(index), device=index.device)
        self.slot[index] = at
        self.inputs[at] = inputs.to(self.inputs)
        self.labels[at] = noisy_vote(counts, noise, scale)
        self.asked += len(index)
        if scale:
            self.free += len(index) * rdp(noise, scale, self.orders)
            self.spent += rdp(noise, scale, self.orders, log_q(counts, noise, scale)).sum(0)
        else:
            self.free += torch.inf
            self.spent += torch.inf

    def draw(self, count: int) -> Tensor:
        """Slots of min(count, asked) examples, none twice."""
        return torch.randperm(int(self.asked))[:count].to(self.slot.device)
