"""A search for an architecture whose supernet is held to what it said before, so that it settles in flat places."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from limbeck.core.card import method, require
from limbeck.core.ensemble import mean_logits
from limbeck.core.errors import BadInput
from limbeck.core.loop import Clock, Stage, Turn
from limbeck.core.maths import kl
from limbeck.core.nets import Batch, Nets
from limbeck.core.partition import by_client, only
from limbeck.core.reduce import Part, labelled, mean
from limbeck.core.searching import Architecture, Past
from limbeck.losses.logits.ce import ce


@method(
    paper="Zhu et al. 2023, section 3",
    year=2023,
    arxiv="2302.05629",
    differs="no official code; spacing, weight, temperature and the vote, a mean of probabilities, are ours. The "
    "step of the architecture is of first order, and cells that halve pictures have no plan of their own",
)
@dataclass(frozen=True)
class SDDarts:
    """a: min CE on held-out examples of the mixture softmax(a); w: min CE + weight T^2 KL(vote || softmax(z / T)).

    vote = mean_k softmax(z_k / T) of `teachers` frozen copies (w, a) of the supernet, the newest of those kept after
    every `spacing` steps of the search; there is no KL before the first. Then every node keeps its two best edges and
    each edge its best operation, and that network learns from a new random start, by the labels alone.

    weight: of the KL, >= 0; 0 is DARTS. temperature: T > 0.
    teachers: K >= 1. spacing: steps, >= 1.
    held_out: part of the examples that the architecture learns from, and the weights do not, in (0, 1).
    share: part of all steps that is the search, in (0, 1]; 1: no training follows, the chosen network keeps the
        supernet's weights, and its accuracy tells what the choice has cost.

    *Needs*: a supernet such as `darts` of the zoo as student: called with inputs and a mixture, with `chosen` and
        `choose`; labels; `index` in a batch. *Relates to*: `ps_kd` remembers answers, `mean_teacher` an average.
        `core.curvature.top_eigenvalue` of the loss for `nets.architecture` says how flat it is.
    *Differs*: see the card.
    """

    weight: float = 1.0
    temperature: float = 1.0
    teachers: int = 3
    spacing: int = 20
    held_out: float = 0.5
    share: float = 0.5

    def __post_init__(self) -> None:
        require(self.weight >= 0, "weight", self.weight, ">= 0")
        require(self.temperature > 0, "temperature", self.temperature, "> 0")
        require(self.teachers >= 1, "teachers", self.teachers, ">= 1")
        require(self.spacing >= 1, "spacing", self.spacing, ">= 1")
        require(0 < self.held_out < 1, "held_out", self.held_out, "in (0, 1)")
        require(0 < self.share <= 1, "share", self.share, "in (0, 1]")

    def optimizers(self) -> dict[str, dict[str, Any]]:
        """DARTS' own for the architecture."""
        return {"architecture": {"adam": {"lr": 3e-4, "betas": [0.5, 0.999], "weight_decay": 1e-3}}}

    def setup(self, nets: Nets, probe: Batch) -> None:
        """The mixture, and room for the past."""
        if not all(hasattr(nets.student, name) for name in ("chosen", "choose")):
            raise BadInput(f"`sd_darts` searches in a supernet such as `darts`, not in {type(nets.student).__name__}")
        if "index" not in probe:
            raise BadInput("`sd_darts` needs `index` in a batch, to know what is held out")
        nets.architecture = Architecture(nets.student.chosen)
        nets.past = Past(nets.student, self.teachers)
        nets.freeze("past")

    def stages(self, nets: Nets, steps: int) -> Iterator[Stage]:
        """The search; then the chosen network is trained."""
        search = max(1, round(self.share * steps))
        yield Stage(search, "search", until=self.share, validated=False)
        if self.share < 1:
            nets.student = nets.fresh("student")
        nets.student.choose(nets.architecture())
        if self.share < 1:
            yield Stage(max(1, steps - search), "train")

    def step(self, nets: Nets, batch: Batch, clock: Clock) -> Iterator[Turn]:
        """In the search a turn of the architecture, then one of the weights; after it one of the student."""
        if clock.stage:
            said = nets.run("student", batch)["logits"]
            yield "student", {"ce": mean(ce(said, batch["labels"]), labelled(batch))}
            return
        held = self.apart(batch["index"])
        theirs, mine = only(batch, held), only(batch, ~held)
        said = nets.student(theirs["inputs"], nets.architecture())["logits"]
        yield "architecture", {"ce": mean(ce(said, theirs["labels"]), labelled(theirs))}
        said = nets.student(mine["inputs"], nets.architecture().detach())["logits"]
        parts: dict[str, Part] = {"ce": mean(ce(said, mine["labels"]), labelled(mine))}
        if self.weight and int(nets.past.kept):
            parts["past"] = self.weight * mean(self.distance(said, self.vote(nets, mine)), mine.get("mask"))
        yield "student", parts

    def vote(self, nets: Nets, batch: Batch) -> Tensor:
        """Log of what the kept supernets say together, at T: [B, C]."""
        count = min(int(nets.past.kept), self.teachers)
        return mean_logits(
            torch.stack([nets.run(f"past.nets.{k}", batch)["logits"] / self.temperature for k in range(count)])
        )

    def distance(self, logits: Tensor, vote: Tensor) -> Tensor:
        """T^2 KL(vote || softmax(z / T)): [B, C] x 2 -> [B]."""
        return self.temperature**2 * kl(logits / self.temperature, vote)

    def apart(self, index: Tensor) -> Tensor:
        """Which examples [B] are the architecture's: always the same ones."""
        return by_client(index, torch.zeros_like(index), torch.tensor([[1 - self.held_out, self.held_out]])) == 1

    def after(self, nets: Nets, player: str, clock: Clock) -> None:
        """Keep a copy of the supernet now and then."""
        if self.weight and player == "student" and clock.stage == 0 and (clock.t + 1) % self.spacing == 0:
            nets.past.keep(nets.student, nets.architecture())
