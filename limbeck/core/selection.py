"""Several teachers of one student: who they are, what they say, and a policy that picks some for each example."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from limbeck.core.bank import everyone
from limbeck.core.errors import BadInput
from limbeck.core.nets import Batch, Nets


def teachers_of(nets: Nets) -> list[str]:
    """Who teaches: nets.teachers, or nets.teacher as a list of one."""
    if "teachers" in nets:
        return [f"teachers.{i}" for i in range(len(nets.teachers))]
    return ["teacher"] if "teacher" in nets else []


def all_say(nets: Nets, batch: Batch, scheme: str) -> Tensor:
    """Logits of all teachers [M, ..., C]. Raises BadInput unless they know the same classes."""
    with torch.no_grad():
        said = [nets.run(name, batch)["logits"] for name in teachers_of(nets)]
    if not said:
        raise BadInput(f"{scheme} needs nets.teachers, a list of at least one network, or nets.teacher")
    apart = {tuple(logits.shape) for logits in said}
    if len(apart) > 1:
        raise BadInput(f"teachers must share their classes or words, got logits of shapes {sorted(apart)}")
    return torch.stack(said)


def states(told: Mapping[str, Any], teachers: Tensor, labels: Tensor) -> Tensor:
    """What a policy knows of an example and a teacher: [M, B, D].

    The student's view of the example (its `emb`, or else its probabilities), the teacher's probabilities [M, B, C], and
    the teacher's cross-entropy on the label.
    """
    view = told["emb"] if "emb" in told else told["logits"].softmax(-1)
    log_p = torch.log_softmax(teachers.float(), -1)
    cost = -log_p.gather(-1, labels.clamp_min(0).expand(log_p.shape[:-1]).unsqueeze(-1))
    seen = view.detach().float().flatten(1).expand(len(teachers), -1, -1)
    return torch.cat([seen, log_p.exp(), torch.where(labels.view(1, -1, 1) >= 0, cost, 0.0)], -1)


class Policy(nn.Module):
    """P(teacher k is chosen | s_k) = sigmoid(w^T s_k + b), one w for all teachers. start: that chance at first."""

    def __init__(self, width: int, start: float) -> None:
        super().__init__()
        self.linear = nn.Linear(width, 1)
        nn.init.zeros_(self.linear.weight)
        nn.init.constant_(self.linear.bias, math.log(start / (1 - start)))

    def forward(self, states: Tensor) -> Tensor:
        """Log-odds [M, B] of states [M, B, D]."""
        odds: Tensor = self.linear(states).squeeze(-1)
        return odds


def log_chance(odds: Tensor, actions: Tensor) -> Tensor:
    """Log-probability of a set of choices: the sum over teachers of Bernoulli ones. [M, B] x 2 -> [B]"""
    return -F.binary_cross_entropy_with_logits(odds, actions.to(odds), reduction="none").sum(0)


class Episode(nn.Module):
    """The policy gradient of the batches since the policy last moved, sum_i r_i grad log pi(a_i | s_i), as buffers.

    width: of a state. A running mean of past rewards, which forgets by `memory`, is the baseline where `memory` > 0.
    teachers: M; how often each was chosen since the start is in `chosen` [M], of `offered`.
    """

    weight: Tensor
    bias: Tensor
    count: Tensor
    mean: Tensor
    met: Tensor
    chosen: Tensor
    offered: Tensor

    def __init__(self, width: int, memory: float, teachers: int) -> None:
        super().__init__()
        self.memory = memory
        self.register_buffer("weight", torch.zeros(1, width))
        self.register_buffer("bias", torch.zeros(1))
        self.register_buffer("count", torch.tensor(0.0))
        self.register_buffer("mean", torch.tensor(0.0))
        self.register_buffer("met", torch.tensor(False))
        self.register_buffer("chosen", torch.zeros(teachers))
        self.register_buffer("offered", torch.tensor(0.0))

    @torch.no_grad()
    def add(self, states: Tensor, odds: Tensor, actions: Tensor, reward: Tensor, counts: Tensor) -> None:
        """Take in a batch: states [M, B, D], odds and actions [M, B], one reward [], which examples [B] count."""
        reward = everyone(reward.detach().float()[None]).mean()
        advantage = reward - torch.where(self.met, self.mean, reward) if self.memory else reward
        slope = (actions.to(odds) - odds.sigmoid()) * counts  # of the log-probability, to the log-odds
        self.weight += advantage * everyone(torch.einsum("mb,mbd->d", slope, states)[None]).sum(0)
        self.bias += advantage * everyone(slope.sum()[None]).sum()
        here = everyone(counts.sum().float()[None]).sum()
        self.count += here
        self.offered += here
        self.chosen += everyone((actions * counts).sum(1).float()[None]).sum(0)
        self.mean.copy_(torch.where(self.met, self.memory * self.mean + (1 - self.memory) * reward, reward))
        self.met.fill_(True)

    def objective(self, policy: Policy) -> Tensor:
        """Minus what the policy should climb: its gradient is minus the mean gradient of the episode. []"""
        climb = (self.weight * policy.linear.weight).sum() + (self.bias * policy.linear.bias).sum()
        return -climb / self.count.clamp_min(1)

    @torch.no_grad()
    def end(self) -> None:
        """Forget the gradient; the next episode begins."""
        for sums in (self.weight, self.bias, self.count):
            sums.zero_()
