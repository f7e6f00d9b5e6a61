"""Active choice: which examples are worth a label, under a budget, and the memory of those that have got one."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from limbeck.core import find, knobs
from limbeck.core.errors import BadInput
from limbeck.core.maths import log_probs, pairwise_distances
from limbeck.core.nets import Batch

__all__ = ["Pool", "choose", "farthest", "gains", "robust", "without_replacement"]

NOTHING = -1  # label of an example that has none


def gains(logits: Tensor) -> Tensor:
    """1 - (p_1 - p_2) of the two likeliest classes, in (0, 1]: 1 where they tie. [N, C] -> [N]"""
    best = log_probs(logits).exp().topk(2, -1).values
    return (1 - (best[:, 0] - best[:, 1])).clamp_min(1e-12)


def robust(gain: Tensor, wrong: int) -> Tensor:
    """Probabilities that earn most when an adversary spoils the `wrong` examples that hurt most: [N] -> [N], sum 1.

    max_p min_{|S| = wrong} sum_{i not in S} p_i g_i. With g sorted downwards and H_I = sum_{i <= I} 1 / g_i, the best
    support is the first I = argmax (I - wrong) / H_I, on which p_i g_i is the same: p_i = 1 / (g_i H_I).
    """
    order = gain.argsort(descending=True, stable=True)
    harmonic = (1 / gain[order].double()).cumsum(0)
    earned = (torch.arange(1, len(gain) + 1, device=gain.device) - wrong) / harmonic
    last = int(earned.argmax())
    p = torch.zeros_like(harmonic)
    p[order[: last + 1]] = 1 / (gain[order[: last + 1]].double() * harmonic[last])
    return p


def without_replacement(p: Tensor, then: Tensor, budget: int) -> Tensor:
    """`budget` indices drawn by p [N], none twice; where fewer have any chance, the rest by the largest `then` [N]."""
    take = min(budget, int((p > 0).sum()))
    drawn = torch.multinomial(p.cpu(), take).to(p.device)
    rest = then.double().index_fill(0, drawn, -torch.inf).argsort(descending=True, stable=True)
    return torch.cat([drawn, rest[: budget - take]])


def farthest(points: Tensor, chosen: Tensor, budget: int) -> Tensor:
    """Greedy k-centre: each pick is the point whose nearest centre is farthest away. [N, D], [N] -> [budget]

    chosen: True for the centres at the start; without any, the mean of all is the first centre, and is then forgotten.
    """
    near, taken = torch.full_like(points[:, 0], torch.inf), chosen.clone()
    for centres in points[chosen].split(256) if chosen.any() else ():
        near = torch.minimum(near, pairwise_distances(points, centres).amin(1))
    picked: list[Tensor] = []
    for _ in range(budget):
        far = near if taken.any() else pairwise_distances(points, points.mean(0, keepdim=True))[:, 0]
        picked.append(far.masked_fill(taken, -1.0).argmax())
        taken[picked[-1]] = True
        near = torch.minimum(near, pairwise_distances(points, points[picked[-1]].unsqueeze(0))[:, 0])
    return torch.stack(picked)


def choose(select: Any, logits: Tensor, chosen: Tensor, budget: int) -> Tensor:
    """Rows [<= budget] that a method of data/select picks among those that were looked at and not chosen before.

    select: its name, or {name: {knob: value}}. logits: [N, C] of the student, inf in rows that nobody looked at;
    a method that asks for `features` gets these. chosen: [N].
    """
    name, given = knobs.split(select)
    method = find.get(name)
    if find.folder(name) != "data/select" or "budget" not in find.knobs(method):
        raise BadInput(f"`select` takes a method of data/select with a budget, and {name!r} is none")
    seen = logits.isfinite().all(-1)
    knows = "chosen" in find.wants(method)
    rows = (seen if knows else seen & ~chosen).nonzero()[:, 0]
    budget = min(budget, int((seen & ~chosen).sum()))
    if budget == 0:
        return rows[:0]
    optional = {"chosen": chosen[rows]} if knows else {}
    asked = [logits[rows] for _ in find.needs(method)]
    picked: Tensor = method(*asked, **optional, budget=budget, **knobs.check(name, method, given))
    return rows[picked]


class Pool(nn.Module):
    """What is known of a training set of N examples: who was chosen, what the student thinks, and the chosen ones.

    like: inputs [B, ...] of a batch. memory: how many examples can be kept. steps: in which all examples come; 0 for
    N / B. chosen [N]: whose label was asked for. said [N, C]: the student's logits, inf before it was looked at. used:
    slots that are taken. asked: how many labels have been given. first [C]: how many of each class were chosen at the
    start. Everything is a buffer, so that a resumed run goes on with the same choice.
    """

    chosen: Tensor
    said: Tensor
    slot: Tensor
    used: Tensor
    asked: Tensor
    inputs: Tensor
    labels: Tensor
    told: Tensor
    first: Tensor

    def __init__(self, examples: int, classes: int, like: Tensor, memory: int, steps: int = 0) -> None:
        super().__init__()
        memory = min(memory, examples)
        self.register_buffer("chosen", torch.zeros(examples, dtype=torch.bool))
        self.register_buffer("said", torch.full((examples, classes), torch.inf))
        self.register_buffer("slot", torch.full((examples,), NOTHING))
        self.register_buffer("used", torch.tensor(0))
        self.register_buffer("asked", torch.tensor(0))
        self.register_buffer("inputs", like.new_zeros(memory, *like.shape[1:]))
        self.register_buffer("labels", torch.full((memory,), NOTHING))
        self.register_buffer("told", torch.zeros(memory, classes))
        self.register_buffer("first", torch.zeros(classes, dtype=torch.long))
        # a pass over all examples may begin in the middle of an epoch
        self.look = 2 * (steps or max(1, examples // len(like))) - 1

    @torch.no_grad()
    def meet(self, batch: Batch, wanted: Tensor) -> tuple[Tensor, Tensor]:
        """Keep the wanted [B] of a batch in their newest view; their slots [K], and which [K] are new."""
        index = batch["index"][wanted]
        new = self.slot[index] < 0
        start, more = int(self.used), int(new.sum())
        if start + more > len(self.inputs):
            raise BadInput(f"more than {len(self.inputs)} examples are labelled; raise `memory`")
        self.slot[index[new]] = torch.arange(start, start + more, device=index.device)
        self.used += more
        slots = self.slot[index]
        self.inputs[slots] = batch["inputs"][wanted].to(self.inputs)
        return slots, new

    def draw(self, count: int) -> Tensor:
        """Slots of min(count, used) kept examples, none twice."""
        return torch.randperm(int(self.used))[:count].to(self.slot.device)

    @torch.no_grad()
    def note(self, index: Tensor, logits: Tensor) -> None:
        """Remember what the student says [B, C] of examples [B]."""
        self.said[index] = logits.to(self.said)

    @torch.no_grad()
    def begin(self, batch: Batch, counts: Tensor, start: int) -> None:
        """Choose the first `start` of each class that come, of those that count [B]."""
        if (self.first >= start).all():
            return
        for index, label in zip(batch["index"][counts].tolist(), batch["labels"][counts].tolist(), strict=True):
            if int(self.first[label]) < start and not self.chosen[index]:
                self.chosen[index] = True
                self.first[label] += 1

    def trial(self, select: Any, logits: Tensor) -> None:
        """Raise BadInput unless `select` can choose one by the student's logits of a batch [B, C]."""
        choose(select, logits.float(), torch.zeros(len(logits), dtype=torch.bool, device=logits.device), 1)

    def query(self, select: Any, budget: int) -> None:
        """Choose `budget` more, by what the student said; then forget that."""
        self.chosen[choose(select, self.said, self.chosen, budget)] = True
        self.said.fill_(torch.inf)
