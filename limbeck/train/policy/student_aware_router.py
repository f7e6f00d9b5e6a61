"""A mixture uses all of its experts, and its routers learn to weigh them so that the student can follow."""

import copy
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from limbeck.core.card import method, require
from limbeck.core.loop import Clock, Turn
from limbeck.core.nets import Batch, Nets, evaluating
from limbeck.core.policy import completions, divergence, own_words
from limbeck.core.reduce import Part, mean
from limbeck.core.routing import every, imbalance, routed, routers


@method(
    paper="Kim et al. 2025, student-aware router",
    year=2025,
    arxiv="2502.12947",
    differs="no official code; the load-balancing loss is the importance loss on the full gates, as loads are equal "
    "when all experts are active; routers have no noise to learn; the teacher itself stays still, a copy is guided",
    row="moe_expert_kd",
)
@dataclass(frozen=True)
class StudentAwareRouter:
    """Turn of the guide's routers: D(p_G || p_S) + balance * CV^2, student fixed; then the student's: D(p_G || p_S).

    G is a copy of the teacher in which every place uses all experts, weighted by their gates; all but its routers is
    frozen. CV^2 is the squared coefficient of variation of the experts' mean gates, averaged over layers. D and the
    texts, the same in both turns, are as in `gkd`; the paper's D is the reverse KL(p_S || p_G).

    balance: >= 0, the paper's beta.
    on_policy: probability in [0, 1] that a batch is continued by the student.
    beta: of the generalised Jensen-Shannon divergence in [0, 1]: 1 is the reverse KL, 0 the forward.
    temperature: of both distributions in D, > 0.
    sampling: temperature of the student's own texts, > 0.
    prompt: tokens at the start of each text that are given, >= 1; more where the batch's mask begins later.
    end: id of the token that ends a text, -1 for none.

    *Needs*: nets.teacher with layers of experts (`tiny_moe_lm`; Mixtral, Qwen-MoE and their like of transformers) and a
    student over the same vocabulary; a learning rate for the player `guide`, well below the student's, or the routers
    give up what they knew. *Relates to*: `moe_augmented` leaves the routers alone. *Differs*: see the card.
    """

    balance: float = 0.01
    on_policy: float = 1.0
    beta: float = 1.0
    temperature: float = 1.0
    sampling: float = 1.0
    prompt: int = 1
    end: int = -1

    def __post_init__(self) -> None:
        for name in ("on_policy", "beta"):
            require(0 <= getattr(self, name) <= 1, name, getattr(self, name), "in [0, 1]")
        for name in ("temperature", "sampling"):
            require(getattr(self, name) > 0, name, getattr(self, name), "> 0")
        require(self.balance >= 0, "balance", self.balance, ">= 0")
        require(self.prompt >= 1, "prompt", self.prompt, ">= 1")

    def setup(self, nets: Nets, probe: Batch) -> None:
        """Copy the teacher, with nothing but its routers to be trained."""
        guide = copy.deepcopy(nets.teacher).requires_grad_(False)
        for router in routers(guide).values():
            router.requires_grad_(True)
        nets.guide = guide

    def guided(self, nets: Nets, batch: Batch) -> tuple[Tensor, Tensor]:
        """The guide's logits [B, T, V] with all experts in use, and how unevenly its gates load them, []."""
        mask = completions(batch, self.prompt)
        with evaluating(nets.guide), routed(nets.guide, every) as gates:
            logits = nets.run("guide", batch)["logits"]
        return logits, torch.stack([imbalance(p, mask) for p in gates.values()]).mean()

    def towards(self, nets: Nets, batch: Batch) -> dict[str, Tensor | Part]:
        """What the routers minimise: the same divergence, seen from the other side."""
        with torch.no_grad():
            student = nets.run("student", batch)["logits"]
        guide, uneven = self.guided(nets, batch)
        value = divergence(guide, student, 1 - self.beta, self.temperature)
        parts: dict[str, Tensor | Part] = {"divergence": mean(value, completions(batch, self.prompt))}
        return parts | ({"balance": self.balance * uneven} if self.balance else {})

    def step(self, nets: Nets, batch: Batch, clock: Clock) -> Iterator[Turn]:
        """A turn of the routers, then one of the student, on the same texts."""
        batch = own_words(nets, batch, self.on_policy, temperature=self.sampling, prompt=self.prompt, end=self.end)
        yield "guide", self.towards(nets, batch)
        with torch.no_grad():
            guide, _ = self.guided(nets, batch)
        student = nets.run("student", batch)["logits"]
        yield "student", mean(divergence(student, guide, self.beta, self.temperature), completions(batch, self.prompt))
