"""One target out of what several networks say of labelled examples: [M, ..., C], [...] -> [..., C], no gradient."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from limbeck.core.bank import everyone
from limbeck.core.maths import upcast

SPREAD = 1e-6  # of the mean error, on the diagonal of a covariance that is to be inverted
ROUNDS = 60  # of the search for the best mixture


def losses(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of everybody at every place, 0 where there is no label: [M, ..., C], [...] -> [M, ...]."""
    log_p = torch.log_softmax(upcast(logits), -1)
    known = labels.clamp_min(0).expand(log_p.shape[:-1]).unsqueeze(-1)
    return torch.where(labels >= 0, -log_p.gather(-1, known).squeeze(-1), 0.0)


def naive(logits: Tensor, labels: Tensor) -> Tensor:
    """At every place, the logits of whoever has the smallest cross-entropy there."""
    best = losses(logits, labels).argmin(0)
    return logits.gather(0, best[None, ..., None].expand(1, *logits.shape[1:]))[0]


def min_logit(logits: Tensor, labels: Tensor) -> Tensor:
    """The least of each class, once everybody's logit of the label is 0: nobody finds the label as likely as this."""
    known = labels.clamp_min(0).expand(logits.shape[:-1]).unsqueeze(-1)
    return (logits - logits.gather(-1, known)).amin(0)


def linear_weights(logits: Tensor, labels: Tensor, mask: Tensor | None = None) -> Tensor:
    """Weights [M] >= 0 of sum 1 whose mixture of logits has the least mean cross-entropy, by exponentiated gradients.

    Convex: a step that does not descend is taken back and tried smaller. Never worse than the best of the members.
    """
    counts = (labels >= 0) if mask is None else (labels >= 0) & mask.bool()
    z = torch.where(counts.unsqueeze(-1), upcast(logits.detach()), 0.0)
    total = counts.sum().clamp_min(1)
    hot = torch.zeros_like(z[0]).scatter_(-1, labels.clamp_min(0).unsqueeze(-1), 1.0)

    def cost(weights: Tensor) -> tuple[Tensor, Tensor]:
        mixed = torch.tensordot(weights, z, 1)
        log_p = torch.log_softmax(mixed, -1)
        wrong = (log_p.exp() - hot) * counts.unsqueeze(-1)
        slope = (wrong * z).flatten(1).sum(1) / total
        return -((log_p * hot).sum(-1) * counts).sum() / total, slope

    members = torch.eye(len(z), dtype=z.dtype, device=z.device)
    alone = torch.stack([cost(member)[0] for member in members])
    weights, rate = torch.full_like(members[0], 1 / len(z)), torch.ones_like(alone[0])
    value, slope = cost(weights)
    for _ in range(ROUNDS):
        tried = torch.softmax(weights.clamp_min(1e-30).log() - rate * slope, 0)
        new, steep = cost(tried)
        better = new <= value
        weights, slope = torch.where(better, tried, weights), torch.where(better, steep, slope)
        value, rate = torch.where(better, new, value), torch.where(better, 2 * rate, rate / 4)
    best = alone.argmin()
    return torch.where(value <= alone[best], weights, members[best])


def covariance_weights(errors: Tensor) -> Tensor:
    """w_k = sum_j (C^-1)_kj / sum_ij (C^-1)_ij of the covariance [M, M] of the errors: sum 1, some may be < 0."""
    c = errors.double()
    c = c + torch.eye(len(c), dtype=c.dtype, device=c.device) * (SPREAD * c.diagonal().mean()).clamp_min(1e-12)
    rows = torch.linalg.solve(c, torch.ones_like(c[:, :1]))[:, 0]
    weights: Tensor = rows / rows.sum()
    return weights


def mixed(weights: Tensor, logits: Tensor) -> Tensor:
    """sum_k weights_k logits_k: [M], [M, ..., C] -> [..., C]."""
    out: Tensor = torch.tensordot(weights.to(logits), logits, 1)
    return out


class Errors(nn.Module):
    """Products of errors on held-out examples, summed over an epoch; from the next on they make `weights`."""

    sums: Tensor
    count: Tensor
    weights: Tensor
    epoch: Tensor

    def __init__(self, members: int) -> None:
        super().__init__()
        self.register_buffer("sums", torch.zeros(members, members, dtype=torch.float64))
        self.register_buffer("count", torch.tensor(0))
        self.register_buffer("weights", torch.full((members,), 1 / members, dtype=torch.float64))
        self.register_buffer("epoch", torch.tensor(0))

    @torch.no_grad()
    def add(self, logits: Tensor, labels: Tensor, counts: Tensor, epoch: int) -> None:
        """Take in what members [M, ..., C] say where `counts` [...] holds; a new epoch turns the last into weights."""
        if epoch > int(self.epoch):
            if int(self.count):
                self.weights.copy_(covariance_weights(self.sums / self.count))
            self.sums.zero_()
            self.count.zero_()
            self.epoch.fill_(epoch)
        # each process sums its own first: it may hold more or fewer such places than another
        rows, y = logits[:, counts].transpose(0, 1), labels[counts]
        p = rows.double().softmax(-1)
        p[torch.arange(len(y), device=y.device), :, y] -= 1
        self.sums += everyone(torch.einsum("bic,bjc->ij", p, p)[None]).sum(0)
        self.count += everyone(counts.sum()[None]).sum()


TARGETS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "naive": naive,
    "min_logit": min_logit,
    "linear": lambda logits, labels: mixed(linear_weights(logits, labels), logits),
}
