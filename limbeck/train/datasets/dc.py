"""Images that give a network the same gradients, class by class, as real images do, all along its training."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from limbeck.core.card import method, require
from limbeck.core.loop import Clock, Turn
from limbeck.core.nets import Batch, Nets, outputs
from limbeck.core.synset import by_class, hard, renew, seal


@method(
    paper="Zhao et al. 2021, eq. 9-11 and algorithm 1",
    year=2020,
    arxiv="2006.05929",
    code="VICO-UoE/DatasetCondensation@53f63a672eab9ade02aabe6432706ef56f317d64:main.py",
    differs="By default outer = images a class, inner = 500 / images a class, which the code's table has for 1, 10, 20 "
    "and 50. Batch-norm statistics are set from the real images, where the code moves them a tenth of the way.",
)
@dataclass(frozen=True)
class DC:
    """Sum over classes, layers and output units of 1 - cosine between the gradients of real and synthetic images.

    A random network is trained on the synthetic images between matches, and replaced by a new one after `outer`.

    outer: matches for one network, >= 1; 0 for as many as there are images a class.
    inner: passes over the synthetic set that the network is trained between matches, >= 1; 0 for 500 / outer, and 1 at
        one image a class.
    batch_size: synthetic images a step of that training, >= 1.

    *Needs*: nets.images, nets.fresh("net"); batches with labels, some of each class (256 in the paper).
    *Relates to*: `dm` is faster and better from ten images a class on; `mtt` looks many steps ahead.
    """

    outer: int = 0
    inner: int = 0
    batch_size: int = 256

    def __post_init__(self) -> None:
        require(self.outer >= 0, "outer", self.outer, ">= 0")
        require(self.inner >= 0, "inner", self.inner, ">= 0")
        require(self.batch_size >= 1, "batch_size", self.batch_size, ">= 1")

    def optimizers(self) -> dict[str, dict[str, dict[str, float]]]:
        """The paper's."""
        return {"images": {"sgd": {"lr": 0.1, "momentum": 0.5}}, "net": {"sgd": {"lr": 0.01}}}

    def setup(self, nets: Nets, probe: Batch) -> None:
        """Make the network that is trained along."""
        if "net" not in nets:
            nets.net = nets.fresh("net")

    def step(self, nets: Nets, batch: Batch, clock: Clock) -> Iterator[Turn]:
        """The images' turn, then the network's, on the images as they are now."""
        x, y = nets.images()
        ipc = int(hard(y).bincount().max())
        outer, inner = self.outer or ipc, self.inner or (1 if ipc == 1 else max(1, 500 // ipc))
        if clock.t % outer == 0:
            renew(nets, "net")
        settle_batch_norm(nets.net, batch)
        distance = x.new_zeros(())
        for rows, own in by_class(batch["labels"], y):
            real = gradients(nets.net, batch["inputs"][rows], batch["labels"][rows])
            mine = x[own]
            distance = distance + seal(gradient_distance(gradients(nets.net, mine, y[own], graph=True), real), mine)
        yield "images", distance
        if (clock.t + 1) % outer == 0:
            return  # the network is about to be replaced
        with torch.no_grad():
            x, y = nets.images()
        for _ in range(inner):
            for rows in torch.randperm(len(x)).split(self.batch_size):
                yield "net", cross_entropy(outputs(nets.net, {"inputs": x[rows]})["logits"], y[rows])


def gradients(net: nn.Module, x: Tensor, y: Tensor, graph: bool = False) -> Sequence[Tensor]:
    """Gradients of the cross-entropy on (x, y) with respect to the weights; biases and other vectors are left out."""
    loss = cross_entropy(outputs(net, {"inputs": x})["logits"], y)
    return torch.autograd.grad(loss, [p for p in net.parameters() if p.ndim > 1], create_graph=graph)


def gradient_distance(mine: Sequence[Tensor], real: Sequence[Tensor]) -> Tensor:
    """Sum of 1 - cosine over the rows (output units) of every weight, []."""
    total = mine[0].new_zeros(())
    for m, r in zip(mine, real, strict=True):
        m, r = m.flatten(1), r.flatten(1)
        total = total + (1 - (m * r).sum(1) / (m.norm(dim=1) * r.norm(dim=1) + 1e-6)).sum()
    return total


def settle_batch_norm(net: nn.Module, batch: Batch, per_class: int = 16) -> None:
    """Set batch-norm statistics from a few real images of each class and hold them: one class would bend them."""
    norms = [m for m in net.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    if not norms:
        return
    some = torch.cat([rows[:per_class] for rows, _ in by_class(batch["labels"], batch["labels"])])
    momenta = [m.momentum for m in norms]
    for m in norms:
        m.train().momentum = 1.0
    with torch.no_grad():
        outputs(net, {"inputs": batch["inputs"][some]})
    for m, momentum in zip(norms, momenta, strict=True):
        m.eval().momentum = momentum
