"""Each example comes twice in a row, and should be spoken of the second time as it was the first."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from limbeck.core.card import method, require
from limbeck.core.loop import Clock, Turn
from limbeck.core.nets import Batch, Nets, evaluating
from limbeck.core.past import LastBatch
from limbeck.core.reduce import mean
from limbeck.core.views import another
from limbeck.losses.logits.ce import ce
from limbeck.losses.logits.kd import kd


@method(
    paper="Shen et al. 2022, eq. 4-6",
    year=2022,
    arxiv="2203.16172",
    code="Meta-knowledge-Lab/DLB@8949a46:dlb.py",
    differs="both halves go through the network together, as in the paper; the code runs them one after the other, so "
    "that batch norm sees each on its own",
)
@dataclass(frozen=True)
class DLB:
    """CE(labels, z) over the last batch and this one + weight T^2 KL(softmax(z' / T) || softmax(z / T)) over the last.

    z' is what the student said of the last batch one step before, a constant. The first step has this batch alone.
    `batch_size` is n, of the new examples: the network reads 2n, and each example twice.

    weight: alpha >= 0 of the KL part.
    temperature: T > 0.
    augment: of pictures, drawn anew when they come again, on top of what they came with; as in `data: augment`.

    *Needs*: nets.student and labels; no index and no teacher: one batch is remembered. Batches of one shape; without
        `accumulate`, where the batch before would be one of the same step.
    *Relates to*: compare with `ce` for as many passes, twice as many steps. `ps_kd` remembers all the set for a whole
        pass and costs no second one; made for noisy labels and strong augmentation. *Differs*: see the card.
    """

    weight: float = 1.0
    temperature: float = 3.0
    augment: tuple[Any, ...] = ("crop",)

    def __post_init__(self) -> None:
        require(self.weight >= 0, "weight", self.weight, ">= 0")
        require(self.temperature > 0, "temperature", self.temperature, "> 0")

    def setup(self, nets: Nets, probe: Batch) -> None:
        """Room for one batch and what is said of it."""
        with torch.no_grad(), evaluating(nets.student):
            said = nets.run("student", probe)["logits"]
        nets.last = LastBatch(told(probe) | {"logits": said})

    def step(self, nets: Nets, batch: Batch, clock: Clock) -> Iterator[Turn]:
        """One turn of the student on the last batch and this one."""
        now, last = told(batch), nets.last.read()
        before = last.pop("logits")
        seen = now
        if clock.t:
            last["inputs"] = another(last["inputs"], self.augment)
            seen = now | {name: torch.cat([column, now[name]]) for name, column in last.items()}
        said = nets.run("student", seen)["logits"]
        parts = {"ce": mean(ce(said, seen["labels"]), seen["mask"])}
        if clock.t:
            again = kd(said[: len(before)], before, temperature=self.temperature)
            parts["kl"] = self.weight * mean(again, last["mask"])
        yield "student", parts
        nets.last.keep(now | {"logits": said[len(said) - len(now["mask"]) :]})


def told(batch: Batch) -> Batch:
    """The batch with a mask, if need be of ones."""
    return batch if "mask" in batch else batch | {"mask": torch.ones_like(batch["labels"], dtype=torch.bool)}
