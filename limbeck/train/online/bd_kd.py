"""A large and a small network start together; per example, the divergence that mends the gap in entropy is stressed."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from limbeck.core.card import method, require
from limbeck.core.group import entropy, form
from limbeck.core.loop import Clock, Turn
from limbeck.core.maths import upcast
from limbeck.core.nets import Batch, Nets
from limbeck.core.pair import classes
from limbeck.core.reduce import Part, labelled, mean
from limbeck.losses.logits.ce import ce
from limbeck.losses.logits.kd import kd
from limbeck.losses.logits.reverse_kl import reverse_kl


@method(
    paper="Amara et al. 2022 (BD-KD), section 3",
    year=2022,
    arxiv="2212.12965",
    differs="there is no official code: which numbers the paper weighs the two divergences with is not known, and both "
    "are knobs here",
    exact_accumulation=True,
)
@dataclass(frozen=True)
class BDKD:
    """The student minimises CE(labels, p_s) + d_i T^2 KL(p_t || p_s) + n_i T^2 KL(p_s || p_t), example by example.

    Where the student is surer than its partner, H(p_s) < H(p_t), the forward divergence, which spreads, is `stress`
    times as strong: d_i = stress * forward, n_i = reverse. Elsewhere the reverse one is, which sharpens. The partner
    minimises CE(labels, p_t) + w T^2 KL(p_t || p_s). Each is a constant to the other; both speak before either moves.
    Examples labelled -100 take part in the divergences alone.

    forward, reverse: weights of the student's divergences, >= 0. stress: factor on the one of them that is called for,
        >= 1; with reverse 0 and stress 1 the student learns as in `dml`.
    partner: w >= 0, of the partner's divergence; 0 lets it learn from labels alone.
    temperature: T > 0 of all divergences; entropies are those at 1.

    *Needs*: nets.peers, the student first and one larger partner, or factories "student" and "peer"; no teacher.
    *Relates to*: `dml` with forward divergences both ways. Made for a student whose confidence can be trusted: measure
        calibration. *Differs*: see the card.
    """

    forward: float = 1.0
    reverse: float = 1.0
    stress: float = 2.0
    partner: float = 1.0
    temperature: float = 1.0

    learner: ClassVar[str] = "peers.0"

    def __post_init__(self) -> None:
        for name, value in (("forward", self.forward), ("reverse", self.reverse), ("partner", self.partner)):
            require(value >= 0, name, value, ">= 0")
        require(self.stress >= 1, "stress", self.stress, ">= 1")
        require(self.temperature > 0, "temperature", self.temperature, "> 0")

    def setup(self, nets: Nets, probe: Batch) -> None:
        """Build student and partner when they are not given, and see that they can be compared."""
        players = form(nets, 2)
        require(len(players) == 2, "peers", len(players), "2 networks, the student and its partner")
        classes(nets, probe, "bd_kd", players)

    def balanced(self, student_logits: Tensor, partner_logits: Tensor) -> Tensor:
        """What the student pays for not saying what its partner does: [..., C] x 2 -> [...]."""
        spread = entropy(upcast(student_logits.detach())) < entropy(upcast(partner_logits.detach()))
        forward = kd(student_logits, partner_logits, temperature=self.temperature)
        reverse = reverse_kl(student_logits, partner_logits, temperature=self.temperature)
        onward = self.forward * forward * torch.where(spread, self.stress, 1.0)
        return onward + self.reverse * reverse * torch.where(spread, 1.0, self.stress)

    def step(self, nets: Nets, batch: Batch, clock: Clock) -> Iterator[Turn]:
        """Both speak; then a turn of the student, and one of its partner."""
        labels, mask, known = batch["labels"], batch.get("mask"), labelled(batch)
        mine, its = (nets.run(player, batch)["logits"] for player in ("peers.0", "peers.1"))
        said = mine.detach()
        parts: dict[str, Part] = {"ce": mean(ce(mine, labels), known)}
        if self.forward or self.reverse:
            parts["kl"] = mean(self.balanced(mine, its), mask)
        yield "peers.0", parts
        parts = {"ce": mean(ce(its, labels), known)}
        if self.partner:
            parts["kl"] = self.partner * mean(reverse_kl(its, said, temperature=self.temperature), mask)
        yield "peers.1", parts
