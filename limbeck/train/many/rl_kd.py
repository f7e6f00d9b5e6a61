"""A policy picks, for each example, which teachers are listened to, and is rewarded by how the student then does."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from limbeck.core.card import method, require
from limbeck.core.imagine import run_with
from limbeck.core.loop import Clock, Turn
from limbeck.core.nets import Batch, Nets, evaluating
from limbeck.core.reduce import Part, labelled, mean
from limbeck.core.selection import Episode, Policy, all_say, states
from limbeck.losses.logits.ce import ce
from limbeck.losses.logits.kd import kd


@method(
    paper="Yuan et al. 2021 (RL-KD), section 3",
    year=2021,
    arxiv="2012.06048",
    differs="there is no official code; the view of an example is the student's own embedding, not that of a separate "
    "encoder; a running mean of the rewards is taken off them, which `baseline: 0` leaves out; the reward by accuracy "
    "on held-out data is left out",
)
@dataclass(frozen=True)
class RLKD:
    """CE(labels, z) + a mean_{k in A(x)} T^2 KL(softmax(z_k / T) || softmax(z / T)), A(x) drawn by the policy.

    Teacher k is in A(x) with probability sigmoid(w^T s_k + b), s_k = [student's embedding of x, the teacher's
    probabilities, its cross-entropy on x]. After `episode` batches the policy climbs sum r grad log pi(A | s), where r
    is the reward of the student right after it has learned from that batch, on that batch. Chosen by nobody, an example
    has its label alone.

    alpha: a >= 0. temperature: T > 0. episode: batches between two turns of the policy, >= 1.
    reward: "ce", minus the cross-entropy, or "total", minus both terms.
    start: chance of every teacher before the policy has learned, in (0, 1). baseline: in [0, 1), how much of the mean
        of past rewards is kept at each new one.

    *Needs*: nets.teachers (or nets.teacher) over the student's classes; one label an example; nets.student, best with
        `emb`. *Relates to*: `several_teachers` listens to all of them; use this one where some are wrong at times.
    *Differs*: see the card. Costs one more forward pass of the student a step. The reward is read with the statistics
    of the batch, where there are batch norms, as running ones lag behind a student that moves fast. `figures` say how
    often each teacher was chosen.
    """

    alpha: float = 1.0
    temperature: float = 4.0
    episode: int = 5
    reward: Literal["ce", "total"] = "ce"
    start: float = 0.9
    baseline: float = 0.9

    def __post_init__(self) -> None:
        require(self.alpha >= 0, "alpha", self.alpha, ">= 0")
        require(self.temperature > 0, "temperature", self.temperature, "> 0")
        require(self.episode >= 1, "episode", self.episode, ">= 1")
        require(self.reward in ("ce", "total"), "reward", self.reward, '"ce" or "total"')
        require(0 < self.start < 1, "start", self.start, "in (0, 1)")
        require(0 <= self.baseline < 1, "baseline", self.baseline, "in [0, 1)")

    def optimizers(self) -> dict[str, dict[str, Any]]:
        """Of the policy."""
        return {"policy": {"sgd": {"lr": 0.1}}}

    def setup(self, nets: Nets, probe: Batch) -> None:
        """Build the policy on one batch."""
        require(probe["labels"].ndim == 1, "labels", list(probe["labels"].shape), "one an example, [B]")
        with torch.no_grad(), evaluating(nets.student):
            seen = states(nets.run("student", probe), all_say(nets, probe, "rl_kd"), probe["labels"])
        teachers, width = len(seen), seen.shape[-1]
        nets.policy, nets.episode = Policy(width, self.start), Episode(width, self.baseline, teachers)

    def taught(self, logits: Tensor, teachers: Tensor, actions: Tensor) -> Tensor:
        """Mean over the chosen teachers of the student's divergence: [B, C], [M, B, C], [M, B] -> [B]."""
        each = torch.stack([kd(logits, z, temperature=self.temperature) for z in teachers])
        return (actions * each).sum(0) / actions.sum(0).clamp_min(1)

    def step(self, nets: Nets, batch: Batch, clock: Clock) -> Iterator[Turn]:
        """A turn of the policy when an episode is over; then one of the student, and its reward."""
        labels, mask, known = batch["labels"], batch.get("mask"), labelled(batch)
        if clock.t and clock.t % self.episode == 0:
            yield "policy", nets.episode.objective(nets.policy)
        teachers = all_say(nets, batch, "rl_kd")
        told = nets.run("student", batch)
        seen = states(told, teachers, torch.where(known, labels, -1))
        with torch.no_grad():
            odds = nets.policy(seen).float()
            actions = torch.bernoulli(odds.sigmoid())
        parts: dict[str, Part] = {"ce": mean(ce(told["logits"], labels), known)}
        if self.alpha:
            parts["kd"] = self.alpha * mean(self.taught(told["logits"], teachers, actions), mask)
        yield "student", parts
        with torch.no_grad():
            now = run_with(nets, "student", {}, batch)["logits"]
        reward = -mean(ce(now, labels), known).value
        if self.reward == "total":
            reward = reward - self.alpha * mean(self.taught(now, teachers, actions), mask).value
        nets.episode.add(seen, odds, actions, reward, torch.ones_like(known) if mask is None else mask.bool())

    def after(self, nets: Nets, player: str, clock: Clock) -> None:
        """A new episode begins once the policy has moved."""
        if player == "policy":
            nets.episode.end()

    def figures(self, nets: Nets) -> dict[str, float]:
        """How often each teacher was chosen, of all that it could have been: in [0, 1]."""
        rates = nets.episode.chosen / nets.episode.offered.clamp_min(1)
        return {f"chosen_teacher_{k}": float(rate) for k, rate in enumerate(rates)}
