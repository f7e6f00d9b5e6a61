"""What keeps a student from learning a backdoor of its teacher: shuffled copies that betray it, and retrospection."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from limbeck.core.errors import BadInput
from limbeck.core.imagine import carrying, run_with
from limbeck.core.maths import kl
from limbeck.core.nets import Nets
from limbeck.core.reduce import Part, mean


class Shuffled(nn.Module):
    """Copies of a network in which the last convolutions read their channels in another order.

    Nothing is copied: the orders are the state, and the network's own weights are reordered whenever it is asked. A
    short cut, such as one from a trigger to a class, outlives that better than what the network knows of pictures.

    layers: how many of the last convolutions; all when there are fewer. copies: whose logits are averaged.
    """

    active: Tensor
    tested: Tensor

    def __init__(self, net: nn.Module, layers: int, copies: int) -> None:
        super().__init__()
        found = [(f"{name}.weight", m.weight) for name, m in net.named_modules() if isinstance(m, _ConvNd)]
        if not found:
            raise BadInput(f"{type(net).__name__} has no convolutions to shuffle")
        chosen = found[len(found) - min(layers, len(found)) :]
        self.copies, self.names = copies, [name for name, _ in chosen]
        for i, (_, weight) in enumerate(chosen):
            order = torch.arange(weight.shape[1], device=weight.device)
            self.register_buffer(f"order{i}", order.repeat(copies, 1))
        self.register_buffer("active", torch.ones((), dtype=torch.bool))
        self.register_buffer("tested", torch.zeros((), dtype=torch.bool))
        self.shuffle()

    @torch.no_grad()
    def shuffle(self) -> None:
        """Other orders, from the global generator."""
        for i in range(len(self.names)):
            orders = self.get_buffer(f"order{i}")
            for copy in orders:
                copy.copy_(torch.randperm(len(copy)))

    def weights(self, net: nn.Module, copy: int) -> dict[str, Tensor]:
        """The reordered weights of one copy, by name."""
        own = dict(net.named_parameters())
        return {name: own[name].detach()[:, self.get_buffer(f"order{i}")[copy]] for i, name in enumerate(self.names)}

    def logits(self, nets: Nets, player: str, inputs: Tensor) -> Tensor:
        """The mean over the copies of a player's logits; the gradient flows through to the inputs."""
        net, shown = nets.find(player), {"inputs": inputs}
        told = [run_with(nets, player, self.weights(net, c), shown)["logits"] for c in range(self.copies)]
        return torch.stack(told).mean(0)

    def suspicion(self, nets: Nets, player: str, inputs: Tensor, logits: Tensor) -> Part:
        """E[KL(p || p_sh)] over the inputs [B, ...] on which the copies still name the class that a player does, p of
        its logits [B, C]; gradient through both."""
        shuffled = self.logits(nets, player, inputs)
        return mean(kl(shuffled, logits), shuffled.argmax(-1) == logits.argmax(-1))

    @torch.no_grad()
    def select(self, nets: Nets, player: str, inputs: Tensor, least: float = 0.02, trials: int = 8) -> None:
        """Be active with the first orders of which the `tail` on these inputs is above `least`, or not at all."""
        told = nets.run(player, {"inputs": inputs})["logits"]
        self.active.fill_(False)
        self.tested.fill_(True)
        for trial in range(trials):
            if trial:
                self.shuffle()
            if tail(kl(self.logits(nets, player, inputs), told)) > least:
                self.active.fill_(True)
                return


def tail(divergences: Tensor) -> float:
    """Share of values [N] whose logarithm is more than three deviations below the mean: what only a trigger makes."""
    logs = divergences.clamp_min(torch.finfo(divergences.dtype).tiny).log10()
    return float((logs < logs.mean() - 3 * logs.std(unbiased=False)).float().mean())


@contextmanager
def shown_to(maker: nn.Module, learner: nn.Module) -> Iterator[dict[str, tuple[Tensor, Any]]]:
    """Inside, what two networks are first given and then return is noted: {"maker", "learner": (inputs, outputs)}.

    Of the maker only what has a gradient counts, for it flows back to whoever makes the inputs.
    """
    noted: dict[str, tuple[Tensor, Any]] = {}

    def note(role: str, given: tuple[Any, ...], out: Any) -> None:
        if given and role not in noted and (role == "learner" or given[0].requires_grad):
            noted[role] = given[0], out

    roles = {"maker": maker, "learner": learner}
    hooks = [
        net.register_forward_hook(lambda _, given, out, r=role: note(r, given, out)) for role, net in roles.items()
    ]
    try:
        yield noted
    finally:
        for hook in hooks:
            hook.remove()


Reads = Callable[[Tensor, Mapping[str, Tensor]], Tensor]  # logits on inputs with some weights replaced


def perturbation(reads: Reads, inputs: Tensor, rate: float, steps: int, penalty: float) -> Tensor:
    """One d [1, ...] for all inputs that moves the logits most: maximises KL(z(x) || z(x + d)) - penalty |d|^2 by Adam.

    It begins as faint noise: at 0 the divergence has no slope.
    """
    with torch.no_grad():
        plain = reads(inputs, {})
    d = (1e-3 * torch.randn_like(inputs[:1])).requires_grad_()
    adam = torch.optim.Adam([d], lr=rate)
    for _ in range(steps):
        moved = -kl(reads(inputs + d, {}), plain).mean() + penalty * d.square().sum()
        (d.grad,) = torch.autograd.grad(moved, d)
        adam.step()
    return d.detach()


def retrospection(
    reads: Reads,
    weights: Mapping[str, Tensor],
    inputs: Tensor,
    d: Tensor,
    rows: Tensor,
    *,
    rate: float = 0.1,
    iterations: int = 5,
    penalty: float = 1e-3,
) -> tuple[Tensor, list[Tensor]]:
    """F = KL(z(x) || z(x + d on some rows)) [] and its gradient to the weights, where d itself answers to them.

    d is a fixed point of d <- d - rate dI/dd with I = -KL(z(x) || z(x + d)) + penalty |d|^2; the gradient through it is
    a Neumann series of `iterations` terms. z(x) is constant in both. rows: which inputs F perturbs.
    """
    theta = {name: w.detach().requires_grad_() for name, w in weights.items()}
    d = d.detach().requires_grad_()
    with torch.no_grad():
        plain = reads(inputs, theta)
    patch = torch.zeros_like(inputs).index_fill(0, rows, 1.0)
    outer = kl(reads(inputs + patch * d, theta), plain).mean()
    to_d, *direct = _gradients(outer, [d, *theta.values()])
    inner = -kl(reads(inputs + d, theta), plain).mean() + penalty * d.square().sum()
    (slope,) = torch.autograd.grad(inner, d, create_graph=True)
    stepped = d - rate * slope
    v = torch.zeros_like(d)
    for _ in range(iterations):
        (through,) = torch.autograd.grad(stepped, d, v, retain_graph=True)
        v = through + to_d
    indirect = torch.autograd.grad(stepped, list(theta.values()), v, allow_unused=True)
    return outer.detach(), [g if i is None else g + i for g, i in zip(direct, indirect, strict=True)]


def lookback(nets: Nets, player: str, inputs: Tensor, rate: float, steps: int, share: float) -> Tensor:
    """`retrospection` [] of a player on inputs [B, ...] with a `perturbation` put on a share of them; its batch-norm
    statistics are left alone."""
    own = {name: p for name, p in nets.find(player).named_parameters() if p.requires_grad}

    def reads(inputs: Tensor, weights: Mapping[str, Tensor]) -> Tensor:
        logits: Tensor = run_with(nets, player, weights, {"inputs": inputs})["logits"]
        return logits

    inputs = inputs.detach()
    rows = torch.randperm(len(inputs))[: max(1, int(len(inputs) * share))].to(inputs.device)
    value, gradients = retrospection(reads, own, inputs, perturbation(reads, inputs, rate, steps, 1e-3), rows)
    return carrying(value, list(own.values()), gradients)


def _gradients(value: Tensor, tensors: Sequence[Tensor]) -> list[Tensor]:
    found = torch.autograd.grad(value, tensors, allow_unused=True)
    return [torch.zeros_like(t) if g is None else g for t, g in zip(tensors, found, strict=True)]
