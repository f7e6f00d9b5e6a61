"""On a stream that changes, the moving average of the student's own weights is the teacher that forgets slowly."""

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Generator, Tensor

from limbeck.core.augment import build
from limbeck.core.card import method, require
from limbeck.core.loop import Clock, Stage, Turn
from limbeck.core.nets import Batch, Nets
from limbeck.core.partition import by_class
from limbeck.core.reduce import mean
from limbeck.core.state import Reservoir, ema_update
from limbeck.losses.logits.ce import ce
from limbeck.losses.logits.kd import kd


@method(
    paper="Michel et al. 2023, momentum knowledge distillation",
    year=2023,
    arxiv="2309.02870",
    code="Nicolas1203/mkd_ocl@8796e3d:src/learners/ema/er_ema.py",
    differs="the base is plain replay; the teacher starts as the student, without the code's correction, in eval mode",
)
@dataclass(frozen=True)
class MKDOCL:
    """CE(labels) + weight / 2 [KD(momentum(x'), student(x')) + KD(momentum(x'), student(x))] over stream and memory.

    x' is x augmented, KD = T^2 KL(softmax(z_T / T) || softmax(z_S / T)), and after every step momentum <- (1 - rate)
    momentum + rate student. The memory is a uniform sample of the stream so far. Borders between tasks are not used.

    tasks: how many there are, each a stage of the full number of steps on the data pool task0, task1, ..., >= 1.
    weight: lambda >= 0; 0 is plain replay. The paper's is 5.5 to 8, by the base method.
    rate: in [0, 1], the part of the student that enters the teacher in a step.
    temperature: T > 0.
    memory: examples kept, >= 1. replay: of them in each step, >= 1.
    augment: how x' is made when x are pictures, as in a recipe; () leaves x' = x.

    *Needs*: nets.student with a column for every class there will be; batches with labels. No teacher.
    *Relates to*: `lwf` when tasks have borders and nothing may be kept.
    *Differs*: see the card. The paper trains in one pass; its code uses Adam at 1e-4 on CIFAR-10.
    """

    tasks: int = 2
    weight: float = 5.5
    rate: float = 0.01
    temperature: float = 4.0
    memory: int = 1000
    replay: int = 64
    augment: tuple[Any, ...] = ("resized_crop", "flip")

    def __post_init__(self) -> None:
        for name in ("tasks", "memory", "replay"):
            require(getattr(self, name) >= 1, name, getattr(self, name), ">= 1")
        require(self.weight >= 0, "weight", self.weight, ">= 0")
        require(0 <= self.rate <= 1, "rate", self.rate, "in [0, 1]")
        require(self.temperature > 0, "temperature", self.temperature, "> 0")

    def setup(self, nets: Nets, probe: Batch) -> None:
        """The teacher starts as a copy of the student, the memory is empty."""
        nets.momentum = copy.deepcopy(nets.student)
        nets.freeze("momentum")
        nets.memory = Reservoir(self.memory, {name: probe[name] for name in ("inputs", "labels")})

    def pools(self, labels: Tensor) -> dict[str, Tensor]:
        """The rows of each task: an equal part of the classes."""
        return by_class(labels, self.tasks)

    def stages(self, nets: Nets, steps: int) -> Iterator[Stage]:
        """One stage a task: a stretch of the stream."""
        for task in range(self.tasks):
            yield Stage(steps, f"task{task}", f"task{task}", until=(task + 1) / self.tasks)

    def changed(self, inputs: Tensor) -> Tensor:
        """x' of x, by torch's global generator."""
        augment = build(self.augment, inputs.shape[-1]) if inputs.ndim == 4 else None
        if augment is None:
            return inputs
        own = Generator().manual_seed(int(torch.randint(2**62, ())))
        return augment.apply(inputs, augment.draw(own, len(inputs)))

    def step(self, nets: Nets, batch: Batch, clock: Clock) -> Iterator[Turn]:
        """One turn of the student on new and remembered examples."""
        old = nets.memory.draw(self.replay)
        nets.memory.add(batch)
        x, labels = (torch.cat([old[name], batch[name]]) for name in ("inputs", "labels"))
        other = self.changed(x)
        taught = nets.run("momentum", {"inputs": other})["logits"]
        seen, plain = (nets.run("student", {"inputs": view})["logits"] for view in (other, x))
        both = kd(seen, taught, temperature=self.temperature) + kd(plain, taught, temperature=self.temperature)
        yield "student", {"ce": mean(ce(seen, labels)), "momentum": self.weight / 2 * mean(both)}

    def after(self, nets: Nets, player: str, clock: Clock) -> None:
        """The teacher follows the student."""
        ema_update(nets.momentum, nets.student, 1 - self.rate)
