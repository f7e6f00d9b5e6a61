"""Networks that learn together: who is in the group, which places have a label, and what several say as one."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from limbeck.core.bank import everyone
from limbeck.core.ensemble import mean_logits
from limbeck.core.nets import Nets


def companions(nets: Nets, count: int) -> nn.ModuleList:
    """`count` fresh networks to learn beside the student: of the factory "peer", or else of its architecture."""
    return nn.ModuleList(nets.fresh("peer" if "peer" in nets.factories else "student") for _ in range(count))


def form(nets: Nets, count: int) -> list[str]:
    """The players of the group; those that are not given are built, the first as a student, the others as its peers."""
    if "peers" not in nets:
        nets.peers = nn.ModuleList([nets.fresh("student"), *companions(nets, count - 1)])
    return members(nets)


def members(nets: Nets) -> list[str]:
    """The players of the group, in order."""
    return [f"peers.{k}" for k in range(len(nets.peers))]


def joint(logits: Tensor, temperature: float) -> Tensor:
    """Logits whose softmax at `temperature` is the mean of the members' softened probabilities: [M, ..., C] -> [..., C]

    Multiplied by the temperature, so that a loss may divide by it again.
    """
    return temperature * mean_logits(logits.detach() / temperature)


def entropy(logits: Tensor) -> Tensor:
    """Of the softmax, in nats: [..., C] -> [...]."""
    log_p = torch.log_softmax(logits, -1)
    return -(log_p.exp() * log_p).sum(-1)


class Roles(nn.Module):
    """Who of a group is promoted to teach, and how good everybody has been so far, as buffers.

    members: how many. memory: in [0, 1), how much of an old record is kept at each step.
    right, loss: of the step that is under way, sums over its batches. record: moving average of the accuracy.
    """

    right: Tensor
    loss: Tensor
    count: Tensor
    record: Tensor
    promoted: Tensor

    def __init__(self, members: int, memory: float) -> None:
        super().__init__()
        self.memory = memory
        for name in ("right", "loss", "record"):
            self.register_buffer(name, torch.zeros(members, dtype=torch.float64))
        self.register_buffer("count", torch.tensor(0))
        self.register_buffer("promoted", torch.tensor(-1))

    @torch.no_grad()
    def note(self, logits: Tensor, labels: Tensor, counts: Tensor) -> None:
        """Take in what everybody says [M, ..., C] of labelled places, those where `counts` [...] holds."""
        log_p = torch.log_softmax(logits.double(), -1)
        known = labels.clamp_min(0).expand(log_p.shape[:-1])
        loss = -log_p.gather(-1, known.unsqueeze(-1)).squeeze(-1)
        right, loss = ((logits.argmax(-1) == labels) & counts), torch.where(counts, loss, 0.0)
        gathered = everyone(torch.stack([right.flatten(1).sum(1).double(), loss.flatten(1).sum(1)])[None])
        self.right += gathered[:, 0].sum(0)
        self.loss += gathered[:, 1].sum(0)
        self.count += everyone(counts.sum()[None]).sum()

    @torch.no_grad()
    def change(self) -> None:
        """Promote who was right most often in this step, the smaller loss deciding ties, and begin the next step.

        Who taught in this step is not taught, and so no candidate: roles change hands.
        """
        right = self.right.clone()
        if int(self.promoted) >= 0:
            right[self.promoted] = -1
        best = right == right.max()
        self.promoted.copy_(torch.where(best, self.loss, torch.inf).argmin())
        if int(self.count):
            self.record.lerp_(self.right / self.count, 1 - self.memory)
        for sums in (self.right, self.loss, self.count):
            sums.zero_()
