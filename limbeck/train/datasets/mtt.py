"""Images on which a few steps of training lead a network where experts were led by epochs of the real data."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from math import ceil

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from limbeck.core.augment import OPS, Siamese
from limbeck.core.card import method, require
from limbeck.core.errors import BadInput
from limbeck.core.loop import Clock, Stage, Turn
from limbeck.core.nets import Batch, Nets, outputs
from limbeck.core.synset import Trajectories, siamese
from limbeck.core.unroll import Functional, unroll


@method(
    paper="Cazenavette et al. 2022, eq. 1 and algorithm 1",
    year=2022,
    arxiv="2203.11932",
    code="GeorgeCazenavette/mtt-distillation@50dccea47ba48b9cfb3b9c59375d7da92e4e603b:distill.py",
    differs="The step size is trained by the images' optimiser, in units that make it the paper's own; the unroll is "
    "replayed in backward (same gradient, a fraction of the memory). Whitening and texture mode are left out.",
)
@dataclass(frozen=True)
class MTT:
    """|w_N - w*_{e+M}|**2 / |w*_e - w*_{e+M}|**2, where w_N is N gradient steps on the images away from w*_e.

    First stages: one expert each is trained on the real data by plain SGD, and its weights are kept after each epoch.
    Last stage: the images (and the step size of the N steps) learn to make the same way from a random epoch e.

    experts: networks trained on the real data, >= 1. epochs: that each is trained, >= match_epochs.
    every: SGD steps from one kept point to the next, >= 0; 0 is one pass over the data.
    inner_steps: N, gradient steps on the synthetic images, >= 1. match_epochs: M, expert epochs they must equal, >= 1.
    max_start: e is drawn below this, >= 1; late epochs move too little.
    batch_size: images an inner step, >= 0; 0 is all.
    rate: step size of the N steps at the start, > 0.
    rate_unit: the step size is stored in this unit, > 0: SGD moves it unit**2 times as fast as the pixels, Adam unit
        times. 1e-4 with SGD at 1000 for the images is the paper's 1e-5 for the step size.
    augment: siamese operations for pictures, one drawn a step, in both kinds of training; () for none.

    *Needs*: nets.images (a SynSet), nets.fresh("net"); or nets.experts, `Trajectories` of given ones.
    *Relates to*: `dm` and `dc` need no experts; this is the strongest of the three at few images a class.
    """

    experts: int = 100
    epochs: int = 50
    every: int = 0
    inner_steps: int = 20
    match_epochs: int = 3
    max_start: int = 25
    batch_size: int = 0
    rate: float = 0.01
    rate_unit: float = 1e-4
    augment: tuple[str, ...] = OPS

    def __post_init__(self) -> None:
        for name in ("experts", "inner_steps", "match_epochs", "max_start"):
            require(getattr(self, name) >= 1, name, getattr(self, name), ">= 1")
        for name in ("every", "batch_size"):
            require(getattr(self, name) >= 0, name, getattr(self, name), ">= 0")
        require(self.epochs >= self.match_epochs, "epochs", self.epochs, f">= match_epochs ({self.match_epochs})")
        require(self.rate > 0 and self.rate_unit > 0, "rate", self.rate, "> 0, and so must `rate_unit`")

    @cached_property
    def transform(self) -> Siamese:
        """The augmentation."""
        return Siamese(ops=self.augment)

    def optimizers(self) -> dict[str, dict[str, dict[str, float]]]:
        """The paper's, for images and experts."""
        return {"images": {"sgd": {"lr": 1000.0, "momentum": 0.5}}, "net": {"sgd": {"lr": 0.01}}}

    def setup(self, nets: Nets, probe: Batch) -> None:
        """Give the images a step size of their own, and make room for the experts unless they are given."""
        nets.images.learn_rate(self.rate, self.rate_unit)
        nets.net = nets.fresh("net")
        if "experts" not in nets:
            every = self.every or ceil(probe.get("examples", 0) / len(probe["inputs"]))
            if not every:
                raise BadInput(
                    "`mtt` cannot tell how many steps an epoch of this data has; say so with its knob `every`"
                )
            size = len(Functional(nets.net).flat())
            nets.experts = Trajectories(torch.zeros(self.experts, self.epochs + 1, size), self.experts, every)

    def stages(self, nets: Nets, steps: int) -> Iterator[Stage]:
        """A stage an expert, then `steps` for the images."""
        for number in range(nets.experts.todo):
            nets.net = nets.fresh("net")
            yield Stage(self.epochs * nets.experts.every, f"expert {number}")
        yield Stage(steps, "images")

    def step(self, nets: Nets, batch: Batch, clock: Clock) -> Iterator[Turn]:
        """One turn of the expert in training, or of the images."""
        if clock.stage < nets.experts.todo:
            if clock.t == 0:
                nets.experts.put(clock.stage, 0, Functional(nets.net).flat())
            (x,) = siamese(self.transform, batch["inputs"], alike=False)
            yield "net", cross_entropy(outputs(nets.net, {"inputs": x})["logits"], batch["labels"])
            return
        path = nets.experts.weights
        path = path[int(torch.randint(len(path), ()))]
        start = int(torch.randint(min(self.max_start, len(path) - self.match_epochs), ()))
        w0, goal = path[start], path[start + self.match_epochs]
        x, y = nets.images()
        w = self.train(Functional(nets.net), w0, x, y, nets.images.rate)
        yield "images", (w - goal).square().sum() / (w0 - goal).square().sum()

    def after(self, nets: Nets, player: str, clock: Clock) -> None:
        """Keep the expert's weights at the end of each epoch."""
        if player == "net" and (clock.t + 1) % nets.experts.every == 0:
            nets.experts.put(clock.stage, (clock.t + 1) // nets.experts.every, Functional(nets.net).flat())

    def train(self, net: Functional, w0: Tensor, x: Tensor, y: Tensor, rate: Tensor) -> Tensor:
        """Weights [P] after the N steps from w0 [P] on the images, differentiable in x, y and rate."""
        size, rows = self.batch_size or len(x), list[Tensor]()
        while len(rows) < self.inner_steps:
            rows += torch.randperm(len(x)).split(size)

        def loss(step: int, w: Tensor, x: Tensor, y: Tensor) -> Tensor:
            (seen,) = siamese(self.transform, x[rows[step]], alike=False)
            out = net(w, seen)
            return cross_entropy(out if isinstance(out, Tensor) else out["logits"], y[rows[step]])

        return unroll(loss, w0, (x, y), steps=self.inner_steps, lr=rate)
