"""The student, trained on few labels, chooses round by round what a costly and fallible teacher is asked about."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from limbeck.core.active import Pool
from limbeck.core.card import method, require
from limbeck.core.errors import BadInput
from limbeck.core.loop import Clock, Stage, Turn
from limbeck.core.nets import Batch, Nets, evaluating
from limbeck.core.pair import agree
from limbeck.core.reduce import mean
from limbeck.losses.logits.kd import kd


@method(
    paper="Baykal et al. 2022, algorithm 1",
    year=2022,
    arxiv="2210.01213",
    differs="no official code; the share of wrong labels is given, not estimated on the way",
)
@dataclass(frozen=True)
class RADActive:
    """CE(label) on the labelled, soft_weight T^2 KL(teacher || student) on those that the teacher was asked about.

    Each of rounds + 1 trainings starts anew, for the full number of steps, on all that is known by then; before each
    but the first, the student looks at the pool, and `budget` of it are chosen. The teacher sees a chosen example
    once: `figures` counts.

    rounds: how often the teacher is asked, >= 0. budget: examples a round, >= 1.
    select: who chooses: a method of data/select with a budget, with its knobs.
    soft_weight: >= 0. temperature: T > 0.
    memory: largest number of labelled and asked examples, which are kept, >= 1.

    *Needs*: nets.teacher at hand; labels with -100 for the unlabelled (`data: {labelled: 5}`). One process.
    *Relates to*: compare with `select: random_subset` at the same budget, and with `robust_sampling` at wrong 0, which
        is margin sampling. `pcoreset_activekd` when the teacher is free and labels cost.
    *Differs*: see the card.
    """

    rounds: int = 3
    budget: int = 100
    select: Any = field(default_factory=lambda: {"robust_sampling": {"wrong": 0.1}})
    soft_weight: float = 1.0
    temperature: float = 1.0
    memory: int = 4096

    def __post_init__(self) -> None:
        require(self.rounds >= 0, "rounds", self.rounds, ">= 0")
        require(self.budget >= 1, "budget", self.budget, ">= 1")
        require(self.soft_weight >= 0, "soft_weight", self.soft_weight, ">= 0")
        require(self.temperature > 0, "temperature", self.temperature, "> 0")
        require(self.memory >= 1, "memory", self.memory, ">= 1")

    def setup(self, nets: Nets, probe: Batch) -> None:
        """Make the memory, and try the choice."""
        if "teacher" not in nets or "labels" not in probe:
            raise BadInput("`rad_active` needs a teacher at hand and labels, -100 for those without")
        with torch.no_grad(), evaluating(nets.student):
            logits = nets.run("student", probe)["logits"]
        examples = int(probe.get("examples") or probe["index"].max() + 1)
        nets.pool = Pool(examples, logits.shape[-1], probe["inputs"], self.memory, probe.get("steps_per_pass", 0))
        nets.pool.trial(self.select, logits)

    def stages(self, nets: Nets, steps: int) -> Iterator[Stage]:
        """A training, then a look at the pool, and so on; the last is a training."""
        for r in range(self.rounds + 1):
            if r:
                yield Stage(nets.pool.look, f"look {r}", validated=False)
                nets.pool.query(self.select, self.budget)
                nets.student.load_state_dict(nets.fresh("student").state_dict())
            yield Stage(steps, f"training {r}", until=(r + 1) / (self.rounds + 1), validated=r == self.rounds)

    def loss(self, student_logits: Tensor, labels: Tensor, told: Tensor) -> Tensor:
        """Per example, of those labelled and those that the teacher told of: [B, C], [B], [B, C] -> [B]."""
        ce = F.cross_entropy(student_logits.float(), labels, reduction="none", ignore_index=-1)
        return torch.where(
            labels >= 0, ce, self.soft_weight * kd(student_logits, told, temperature=self.temperature).to(ce)
        )

    def ask(self, nets: Nets, batch: Batch) -> None:
        """Keep what is labelled or chosen in a batch; the teacher is asked about the chosen that are new."""
        pool, labels = nets.pool, batch["labels"]
        wanted = (labels >= 0) | pool.chosen[batch["index"]]
        wanted = wanted & batch["mask"].bool() if "mask" in batch else wanted
        slots, new = pool.meet(batch, wanted)
        pool.labels[slots] = labels[wanted].clamp_min(-1)
        if (asked := new & (labels[wanted] < 0)).any():
            said = nets.run("teacher", {"inputs": batch["inputs"][wanted][asked]})["logits"]
            agree("rad_active", {"student": pool.told.shape[-1], "teacher": said.shape[-1]})
            pool.told[slots[asked]] = said.to(pool.told)
            pool.asked += len(said)

    def step(self, nets: Nets, batch: Batch, clock: Clock) -> Iterator[Turn]:
        """A turn of the student on a batch of what is known, or a look at the pool."""
        pool = nets.pool
        if clock.stage % 2:
            rows = batch["labels"] < 0
            with torch.no_grad(), evaluating(nets.student):
                pool.note(batch["index"][rows], nets.run("student", batch)["logits"][rows])
            return
        self.ask(nets, batch)
        known = pool.draw(len(batch["index"]))
        inputs, labels, told = (x[known] for x in (pool.inputs, pool.labels, pool.told))
        if len(known) == 0:  # nothing is known yet: nothing counts
            inputs, labels = batch["inputs"], torch.full_like(batch["labels"], -1)
            told = pool.told.new_zeros(len(labels), pool.told.shape[1])
        logits = nets.run("student", {"inputs": inputs.to(batch["inputs"])})["logits"]
        yield (
            "student",
            mean(self.loss(logits, labels, told), torch.full_like(labels, len(known) > 0, dtype=torch.bool)),
        )

    def figures(self, nets: Nets) -> dict[str, float]:
        """How many examples the teacher was asked about."""
        return {"teacher_queries": float(nets.pool.asked)}
