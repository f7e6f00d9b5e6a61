"""Trains a diffusion or flow model on data: what the methods that shorten samplers start from."""

from collections.abc import Iterator
from dataclasses import dataclass

from limbeck.core.card import method
from limbeck.core.loop import Clock, Turn
from limbeck.core.nets import Batch, Nets
from limbeck.core.reduce import mean
from limbeck.core.sampler import denoising


@method(paper="Karras et al. 2022, eq. 2 and 108", year=2022, arxiv="2206.00364", exact_accumulation=False)
@dataclass(frozen=True)
class Denoising:
    """w(t) |D(alpha x_0 + sigma eps, t) - x_0|**2 at times and weights of the denoiser's own schedule.

    guided: give the labels of the batch to the network, for those that take them.

    *Needs*: nets.student, a Denoiser; batches of data. *Relates to*: makes the teachers of `consistency_distillation`,
    `dmd2` and `reflow`.
    """

    guided: bool = False

    def step(self, nets: Nets, batch: Batch, clock: Clock) -> Iterator[Turn]:
        """One turn of the denoiser."""
        labels = batch["labels"] if self.guided else None
        yield "student", {"denoising": mean(denoising(nets.student, batch["inputs"], labels=labels))}
