"""The experts that a mixture leaves idle speak, too: the student hears the teacher with several choices of them."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from limbeck.core.card import method, require
from limbeck.core.loop import Clock, Turn
from limbeck.core.nets import Batch, Nets
from limbeck.core.policy import completions, divergence, own_words
from limbeck.core.reduce import mean
from limbeck.core.routing import routed, routers, sampled


@method(
    paper="Kim et al. 2025, knowledge augmentation",
    year=2025,
    arxiv="2502.12947",
    differs="no official code: that each place of each layer draws by itself, and that divergences are averaged over "
    "the passes, is read into the paper; one draw of on-policy or not a batch, as in `gkd`",
    row="moe_expert_kd",
)
@dataclass(frozen=True)
class MoEAugmented:
    """Mean over completion tokens and over M passes of the teacher of D(p_T^m || p_S)(y_t | x, y_<t).

    In each pass every layer of N experts uses N - left_out at each place, the likeliest or, with probability `chance`,
    ones drawn without replacement in proportion to their gates; gates are renormalised over those in use. D and the
    texts y are as in `gkd`; the paper's D is the reverse KL(p_S || p_T^m).

    passes: M, >= 1.
    chance: lambda in [0, 1], of drawing the experts at a place; at 0 one pass says all.
    left_out: experts that stay idle in each layer, >= 0; at 0, with one pass, all are always active (the paper's
        ablation ALL).
    on_policy: probability in [0, 1] that a batch is continued by the student.
    beta: of the generalised Jensen-Shannon divergence in [0, 1]: 1 is the reverse KL, 0 the forward.
    temperature: of both distributions in D, > 0.
    sampling: temperature of the student's own texts, > 0.
    prompt: tokens at the start of each text that are given, >= 1; more where the batch's mask begins later.
    end: id of the token that ends a text, -1 for none.

    *Needs*: nets.teacher with layers of experts (`tiny_moe_lm`; Mixtral, Qwen-MoE and their like of transformers) and a
    student over the same vocabulary; M passes of nearly all experts cost accordingly. *Relates to*: `gkd` asks the
    teacher as it is; `student_aware_router` lets it weigh all experts for the student. *Differs*: see the card.
    """

    passes: int = 2
    chance: float = 0.05
    left_out: int = 1
    on_policy: float = 1.0
    beta: float = 1.0
    temperature: float = 1.0
    sampling: float = 1.0
    prompt: int = 1
    end: int = -1

    def __post_init__(self) -> None:
        for name in ("passes", "prompt"):
            require(getattr(self, name) >= 1, name, getattr(self, name), ">= 1")
        for name in ("chance", "on_policy", "beta"):
            require(0 <= getattr(self, name) <= 1, name, getattr(self, name), "in [0, 1]")
        for name in ("temperature", "sampling"):
            require(getattr(self, name) > 0, name, getattr(self, name), "> 0")
        require(self.left_out >= 0, "left_out", self.left_out, ">= 0")

    def setup(self, nets: Nets, probe: Batch) -> None:
        """Check that every layer of experts has enough of them."""
        fewest = min(int(router.num_experts) for router in routers(nets.teacher).values())  # type: ignore[arg-type]
        require(self.left_out < fewest, "left_out", self.left_out, f"less than the {fewest} experts of a layer")

    def choose(self, probabilities: Tensor) -> Tensor:
        """The experts in use: [P, N] -> [P, N - left_out]."""
        return sampled(probabilities, probabilities.shape[-1] - self.left_out, self.chance)

    def said(self, nets: Nets, batch: Batch) -> list[Tensor]:
        """The teacher's logits of each pass: [B, T, V], M times."""
        with routed(nets.teacher, self.choose):
            return [nets.run("teacher", batch)["logits"] for _ in range(self.passes)]

    def loss(self, student_logits: Tensor, teachers_logits: list[Tensor]) -> Tensor:
        """D of each token, averaged over the passes: [..., V] x (1 + M) -> [...]."""
        each = [divergence(student_logits, logits, self.beta, self.temperature) for logits in teachers_logits]
        return torch.stack(each).mean(0)

    def step(self, nets: Nets, batch: Batch, clock: Clock) -> Iterator[Turn]:
        """One turn of the student, on its own texts or on the given ones."""
        batch = own_words(nets, batch, self.on_policy, temperature=self.sampling, prompt=self.prompt, end=self.end)
        teachers = self.said(nets, batch)
        student = nets.run("student", batch)["logits"]
        yield "student", mean(self.loss(student, teachers), completions(batch, self.prompt))
