"""New classes are learned from new data alone; the network before them is the teacher that keeps the old ones."""

import copy
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from limbeck.core.card import method, require
from limbeck.core.loop import Clock, Stage, Turn
from limbeck.core.maths import FLOOR
from limbeck.core.nets import Batch, Nets, evaluating
from limbeck.core.partition import by_class
from limbeck.core.reduce import Part, mean
from limbeck.losses.logits.ce import ce
from limbeck.losses.logits.kd import kd


class Heads(nn.Module):
    """Remembers in which task each class came first: `of` [C], -1 for a class that has not come yet."""

    of: Tensor

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.register_buffer("of", torch.full((classes,), -1))

    @torch.no_grad()
    def meet(self, labels: Tensor, task: int) -> None:
        """Give the classes that are seen for the first time to `task`."""
        seen = torch.zeros_like(self.of, dtype=torch.bool)
        seen[labels.flatten()] = True
        self.of.copy_(torch.where(seen & (self.of < 0), task, self.of))

    def columns(self, task: int) -> Tensor:
        """The classes that came with a task."""
        return (self.of == task).nonzero()[:, 0]


@method(
    paper="Li and Hoiem 2016, figure 3",
    year=2016,
    arxiv="1606.09282",
    differs="one head whose columns belong to tasks; without the warm-up of the new columns before joint training",
)
@dataclass(frozen=True)
class LwF:
    """CE(labels, z_new) + w sum over earlier tasks k of CE(softmax(z_old_k / T), softmax(z_k / T)).

    z_k are the logits of the classes that came with task k, z_new those of the classes that this task brings, z_old
    those of the frozen network before this task, all on the new data. The prediction is over all classes.

    tasks: how many there are, each a stage of the full number of steps on the data pool task0, task1, ..., >= 1.
    weight: w >= 0 of the old tasks; the paper's is 1; 0 is plain fine-tuning.
    temperature: T > 0; the paper's is 2.

    *Needs*: nets.student with a column for every class there will be; batches with labels. The teacher is the student
    of the task before. *Relates to*: `mkd_ocl` when some old examples may be kept or tasks have no borders.
    *Differs*: see the card. KL is taken for the cross-entropy of old and new: they differ by a constant.
    """

    tasks: int = 2
    weight: float = 1.0
    temperature: float = 2.0

    def __post_init__(self) -> None:
        require(self.tasks >= 1, "tasks", self.tasks, ">= 1")
        require(self.weight >= 0, "weight", self.weight, ">= 0")
        require(self.temperature > 0, "temperature", self.temperature, "> 0")

    def setup(self, nets: Nets, probe: Batch) -> None:
        """Make room for the tasks' classes."""
        with torch.no_grad(), evaluating(nets.student):
            nets.heads = Heads(nets.run("student", probe)["logits"].shape[-1])

    def pools(self, labels: Tensor) -> dict[str, Tensor]:
        """The rows of each task: an equal part of the classes."""
        return by_class(labels, self.tasks)

    def stages(self, nets: Nets, steps: int) -> Iterator[Stage]:
        """One stage a task; what was learned so far becomes the teacher."""
        for task in range(self.tasks):
            if task:
                nets.teacher = copy.deepcopy(nets.student)
            yield Stage(steps, f"task{task}", f"task{task}", until=(task + 1) / self.tasks)

    def step(self, nets: Nets, batch: Batch, clock: Clock) -> Iterator[Turn]:
        """One turn of the student."""
        nets.heads.meet(batch["labels"], clock.stage)
        z, mine = nets.run("student", batch)["logits"], nets.heads.of == clock.stage
        among = torch.where(mine, z, FLOOR)  # an example of an old class counts for the old tasks alone
        parts: dict[str, Part] = {"ce": mean(ce(among, batch["labels"]), mine[batch["labels"]])}
        if clock.stage and self.weight:
            old = nets.run("teacher", batch)["logits"]
            for task in range(clock.stage):
                theirs = nets.heads.columns(task)
                kept = kd(z[..., theirs], old[..., theirs], temperature=self.temperature)
                parts[f"task{task}"] = self.weight / self.temperature**2 * mean(kept)
        yield "student", parts
