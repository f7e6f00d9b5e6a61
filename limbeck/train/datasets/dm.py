"""Images whose mean embedding, under any randomly initialised network, is that of the real images of their class."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from limbeck.core.augment import OPS, Siamese
from limbeck.core.card import method
from limbeck.core.errors import BadInput
from limbeck.core.loop import Clock, Turn
from limbeck.core.maths import upcast
from limbeck.core.nets import Batch, Nets, outputs
from limbeck.core.synset import by_class, siamese


@method(
    paper="Zhao and Bilen 2021, eq. 5 and algorithm 1",
    year=2021,
    arxiv="2110.04181",
    code="VICO-UoE/DatasetCondensation@53f63a672eab9ade02aabe6432706ef56f317d64:main_DM.py",
    differs="All classes go through the network together, as in the code with batch norm only; augmentation is seeded.",
)
@dataclass(frozen=True)
class DM:
    """Squared distance between the mean embeddings of real and synthetic images, summed over features and classes.

    Each step embeds with a new random network that is never trained; both sides of a class get the same augmentation.

    augment: siamese operations of which one is drawn a class and step, for pictures; () for none.

    *Needs*: nets.images, nets.fresh("net") returning `emb`; batches with labels, some of each class (256 in the paper).
    *Relates to*: use it before `dc` and `mtt`: no inner loop, the fastest of the three, and it scales to many classes.
    """

    augment: tuple[str, ...] = OPS

    @cached_property
    def transform(self) -> Siamese:
        """The augmentation."""
        return Siamese(ops=self.augment)

    def optimizers(self) -> dict[str, dict[str, dict[str, float]]]:
        """The paper's; its rate is 10 for 50 images a class."""
        return {"images": {"sgd": {"lr": 1.0, "momentum": 0.5}}}

    def step(self, nets: Nets, batch: Batch, clock: Clock) -> Iterator[Turn]:
        """One turn of the images."""
        net = nets.fresh("net").requires_grad_(False)
        x, y = nets.images()
        pairs = [siamese(self.transform, batch["inputs"][rows], x[own]) for rows, own in by_class(batch["labels"], y)]
        real, synthetic = zip(*pairs, strict=True)
        with torch.no_grad():
            goal = class_means(net, real)
        yield "images", (goal - class_means(net, synthetic)).square().sum()


def class_means(net: torch.nn.Module, groups: tuple[Tensor, ...]) -> Tensor:
    """Mean embedding [C, D] of each of C groups of inputs [n_c, ...], all in one forward pass."""
    out = outputs(net, {"inputs": torch.cat(groups)})
    if "emb" not in out:
        raise BadInput(f"`dm` compares embeddings, but the network returns {', '.join(sorted(out))}; return 'emb' too")
    return torch.stack([g.mean(0) for g in upcast(out["emb"]).flatten(1).split([len(g) for g in groups])])
