"""A teacher that is free but biased teaches on all examples; the few labels that are bought are chosen in rounds."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from limbeck.core.active import Pool
from limbeck.core.card import method, require
from limbeck.core.ensemble import mean_logits
from limbeck.core.errors import BadInput
from limbeck.core.loop import Clock, Stage, Turn
from limbeck.core.nets import Batch, Nets, evaluating
from limbeck.core.pair import classes
from limbeck.core.reduce import mean
from limbeck.losses.logits.ce import ce
from limbeck.losses.logits.kd import kd


@method(
    paper="Kang et al. 2025, ActiveKD and PCoreSet",
    year=2025,
    arxiv="2506.00910",
    code="erjui/PCoreSet@075a76a:train_active_others.py",
    differs="the two heads are the student's own plus and minus a linear one that is dropped, so that what is kept is "
    "the mean of their logits, where the code averages their probabilities (as is done here to choose); the teacher is "
    "not fitted anew in each round; labelled and other examples go through the student together",
)
@dataclass(frozen=True)
class PCoresetActiveKD:
    """hard CE(z + d, label) on L + soft [T^2 KL(t || z - d) on L + T^2 KL(t || z - d) on U], d = linear(embedding).

    Labels count only once they are chosen: `start` of each class at first, then `budget` a round, by what the student
    thinks, p = softmax(z + d) / 2 + softmax(z - d) / 2. Each of rounds + 1 trainings starts anew, for the full number
    of steps. `figures` counts the labels.

    rounds: how often labels are bought, >= 0. budget: how many a round, >= 0; 0 is one for each class.
    start: of each class at first, >= 1, those that come first.
    select: who chooses: a method of data/select with a budget, with its knobs.
    hard, soft: weights, >= 0. temperature: T > 0.
    memory: largest number of labelled examples, which are kept, >= 1.

    *Needs*: nets.teacher at hand; a student that returns `emb`; labels of all, of which it takes what it pays for.
        Each batch holds as many labelled examples (all, if they are fewer) as others. One process.
    *Relates to*: `select: random_subset` is the baseline. With rounds 0 it is semi-supervised dual-head distillation.
    *Differs*: see the card.
    """

    rounds: int = 15
    budget: int = 0
    start: int = 1
    select: Any = "p_coreset"
    hard: float = 0.5
    soft: float = 0.5
    temperature: float = 2.0
    memory: int = 4096

    def __post_init__(self) -> None:
        for name in ("rounds", "budget", "hard", "soft"):
            require(getattr(self, name) >= 0, name, getattr(self, name), ">= 0")
        require(self.start >= 1, "start", self.start, ">= 1")
        require(self.temperature > 0, "temperature", self.temperature, "> 0")
        require(self.memory >= 1, "memory", self.memory, ">= 1")

    def setup(self, nets: Nets, probe: Batch) -> None:
        """Make the memory and the second head, and try the choice."""
        if "teacher" not in nets or "labels" not in probe or (probe["labels"] < 0).any():
            raise BadInput(
                "`pcoreset_activekd` needs a teacher at hand and the labels of all, which it takes one by one"
            )
        with torch.no_grad(), evaluating(nets.student):
            said = nets.run("student", probe)
        if "emb" not in said:
            raise BadInput(f"the student returns {', '.join(said)}; a second head needs `emb`, which taps can read")
        classes(nets, probe, "pcoreset_activekd")
        examples = int(probe.get("examples") or probe["index"].max() + 1)
        nets.pool = Pool(
            examples, said["logits"].shape[-1], probe["inputs"], self.memory, probe.get("steps_per_pass", 0)
        )
        nets.pool.trial(self.select, said["logits"])
        nets.split = nn.Linear(said["emb"].shape[-1], said["logits"].shape[-1])
        nets.companions["student"] = ["split"]

    def stages(self, nets: Nets, steps: int) -> Iterator[Stage]:
        """A training, then a look at the pool, and so on; the last is a training."""
        for r in range(self.rounds + 1):
            if r:
                yield Stage(nets.pool.look, f"look {r}", validated=False)
                nets.pool.query(self.select, self.budget or nets.pool.said.shape[1])
                nets.student.load_state_dict(nets.fresh("student").state_dict())
            nn.init.zeros_(nets.split.weight)
            nn.init.zeros_(nets.split.bias)
            yield Stage(steps, f"training {r}", until=(r + 1) / (self.rounds + 1), validated=r == self.rounds)

    def heads(self, nets: Nets, inputs: Tensor) -> tuple[Tensor, Tensor]:
        """z + d, which learns labels, and z - d, which learns from the teacher: [B, C] x 2."""
        said = nets.run("student", {"inputs": inputs})
        d = nets.split(said["emb"])
        return said["logits"] + d, said["logits"] - d

    def step(self, nets: Nets, batch: Batch, clock: Clock) -> Iterator[Turn]:
        """A turn of the student on labelled and other examples, or a look at the pool."""
        pool, index = nets.pool, batch["index"]
        if clock.stage % 2:
            with torch.no_grad(), evaluating(nets.student):
                pool.note(index, mean_logits(torch.stack(self.heads(nets, batch["inputs"]))))
            return
        counts = batch["mask"].bool() if "mask" in batch else torch.ones_like(index, dtype=torch.bool)
        pool.begin(batch, counts, self.start)
        wanted = counts & pool.chosen[index]
        slots, new = pool.meet(batch, wanted)
        pool.labels[slots] = batch["labels"][wanted]
        pool.asked += new.sum()
        known = pool.draw(len(index))
        inputs = torch.cat([pool.inputs[known].to(batch["inputs"]), batch["inputs"]])
        told = nets.run("teacher", {"inputs": inputs})["logits"]
        first, second = self.heads(nets, inputs)
        soft, n = kd(second, told, temperature=self.temperature), len(known)
        yield (
            "student",
            {
                "ce": self.hard * mean(ce(first[:n], pool.labels[known])),
                "labelled": self.soft * mean(soft[:n]),
                "unlabelled": self.soft * mean(soft[n:], counts & ~pool.chosen[index]),
            },
        )

    def figures(self, nets: Nets) -> dict[str, float]:
        """How many examples a label was paid for."""
        return {"labels_bought": float(nets.pool.asked)}
