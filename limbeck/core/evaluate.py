"""How good a network is on a table, and how good a training set is: fresh networks are trained on it and tested.

A condensed set, a random subset and a herded one are judged alike: the same seeds give the same initial weights and
the same order of batches, for the same budget. Nothing here looks at test data before the end.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from math import ceil
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from limbeck.core import optim, schedule
from limbeck.core.augment import build
from limbeck.core.batches import Table, epoch, generator
from limbeck.core.errors import BadInput
from limbeck.core.nets import device_of, outputs
from limbeck.core.unroll import krr, relu_kernels

__all__ = ["Budget", "accuracy", "hits", "improvement", "judge", "kernel_logits", "logits", "train"]

Factory = Callable[[], nn.Module]


# ---------------------------------------------------------------- a network on a table


@torch.no_grad()
def logits(module: nn.Module, table: Table, *, batch_size: int = 512, precision: str = "fp32") -> Tensor:
    """Logits [N, ..., C] of every row of `table`, in fp32 on the CPU; eval mode, which is put back afterwards."""
    device, training = device_of(module), module.training
    module.eval()
    try:
        pieces = []
        for batch in epoch(table, batch_size):
            with _autocast(device, precision):
                out = outputs(module, {name: column.to(device) for name, column in batch.items()})
            pieces.append(out["logits"].float().cpu())
        return torch.cat(pieces)
    finally:
        module.train(training)


def accuracy(module: nn.Module, table: Table, *, batch_size: int = 512, precision: str = "fp32") -> float:
    """Share in [0, 1] of labels that get the largest logit; where the table has a `mask`, over its valid places."""
    return hits(logits(module, table, batch_size=batch_size, precision=precision), table)


def hits(scores: Tensor, table: Table) -> float:
    """Accuracy in [0, 1] of logits [N, ..., C] on the labels of `table`."""
    right = (scores.argmax(-1) == table["labels"].cpu()).double()
    mask = table.columns.get("mask")
    return float(right.mean() if mask is None else right[mask.cpu().bool()].mean())


# ---------------------------------------------------------------- a training set


@dataclass(frozen=True)
class Budget:
    """How a fresh network is trained on a small set; the defaults are the protocol of the condensation papers.

    epochs: passes over the set, >= 1 (300; 1000 with augmentation). batch_size: >= 1, at most the set is taken.
    optimizer, schedule: as for the loop. augment: a recipe's list, pictures only. precision: "fp32" or "bf16".
    loss: "ce" takes class or soft labels; "mse" takes soft labels of any kind, such as centred ones.
    """

    epochs: int = 300
    batch_size: int = 256
    optimizer: Any = field(default_factory=lambda: {"sgd": {"lr": 0.01, "momentum": 0.9, "weight_decay": 5e-4}})
    schedule: Any = field(default_factory=lambda: {"step": {"at": [0.5], "factor": 0.1}})
    augment: tuple[Any, ...] = ()
    precision: str = "fp32"
    loss: Literal["ce", "mse"] = "ce"

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size"):
            if getattr(self, name) < 1:
                raise BadInput(f"`{name}` must be >= 1, got {getattr(self, name)}")
        optim.check(self.optimizer)


def train(
    net: nn.Module,
    inputs: Tensor,
    labels: Tensor,
    budget: Budget,
    *,
    seed: int = 0,
    black: tuple[float, ...] = (0.0,),
    validation: Table | None = None,
    check_every: int = 0,
) -> nn.Module:
    """The network, trained in place on inputs [N, ...] with labels [N] or [N, C]. Leaves all global state alone.

    This is no second training loop: a judge has one network, no turns and no checkpoints, and must not disturb the
    run that asks for it. black: padding value of `budget.augment`. validation: keep the weights that are best there,
    looked at after every `check_every` epochs (0: the last weights are taken).
    """
    device, order, n = device_of(net), generator(seed, "judge"), len(inputs)
    inputs, labels = inputs.to(device), labels.to(device)
    transform = build(budget.augment, inputs.shape[-1], black) if budget.augment else None
    optimizer = optim.build(budget.optimizer, [p for p in net.parameters() if p.requires_grad])
    steps, t = budget.epochs * ceil(n / budget.batch_size), 0
    best: tuple[float, dict[str, Tensor]] | None = None
    net.train()
    for done in range(1, budget.epochs + 1):
        for rows in torch.randperm(n, generator=order).split(budget.batch_size):
            x, y = inputs[rows], labels[rows]
            if transform is not None:
                x = transform.apply(x, transform.draw(order, len(x)))
            with _autocast(device, budget.precision):
                out = outputs(net, {"inputs": x})["logits"]
            for group in optimizer.param_groups:
                group["lr"] = group["initial_lr"] * schedule.rate(budget.schedule, t / max(1, steps - 1))
            optimizer.zero_grad(set_to_none=True)
            _loss(budget.loss, out.float(), y).backward()
            optimizer.step()
            t += 1
        if validation is not None and check_every and done % check_every == 0:
            score = accuracy(net, validation, precision=budget.precision)
            if best is None or score > best[0]:
                best = (score, {k: v.detach().clone() for k, v in net.state_dict().items()})
    if best is not None:
        net.load_state_dict(best[1])
    return net.eval()


def judge(
    factories: Factory | Mapping[str, Factory],
    inputs: Tensor,
    labels: Tensor,
    test: Table,
    budget: Budget | None = None,
    *,
    seeds: Sequence[int] = (0, 1, 2),
    device: torch.device | str = "cpu",
    validation: Table | None = None,
    check_every: int = 0,
) -> dict[str, list[float]]:
    """Test accuracy in [0, 1] of fresh networks trained on (inputs, labels), by architecture, one number a seed.

    factories: how to build each architecture, or the only one (called "net"). A seed fixes initial weights and order.
    """
    named = factories if isinstance(factories, Mapping) else {"net": factories}
    budget = budget or Budget()
    scores: dict[str, list[float]] = {name: [] for name in named}
    for name, factory in named.items():
        for seed in seeds:
            with torch.random.fork_rng():
                torch.manual_seed(seed)
                net = factory().to(device)
                train(
                    net,
                    inputs,
                    labels,
                    budget,
                    seed=seed,
                    black=test.black,
                    validation=validation,
                    check_every=check_every,
                )
            scores[name].append(accuracy(net, test, precision=budget.precision))
    return scores


def improvement(scores: Mapping[str, Sequence[float]], baseline: Mapping[str, Sequence[float]]) -> float:
    """Improvement over random: mean difference of accuracies, seed by seed and architecture by architecture."""
    pairs = [(a, b) for name in scores for a, b in zip(scores[name], baseline[name], strict=True)]
    return sum(a - b for a, b in pairs) / len(pairs)


@torch.no_grad()
def kernel_logits(
    inputs: Tensor,
    labels: Tensor,
    table: Table,
    *,
    depth: int = 1,
    weight_std: float = 2**0.5,
    bias_std: float = 0.1,
    ridge: float = 1e-6,
    batch_size: int = 2048,
) -> Tensor:
    """What the infinitely wide ReLU network trained on (inputs, labels) says of `table`, [N, C]: kernel ridge.

    labels: soft [S, C], or classes [S], which become one-hot less 1 / classes. The knobs are those of `relu_kernels`.
    """
    if labels.ndim == 1:
        classes = max(table.num_classes, int(labels.max()) + 1)
        labels = F.one_hot(labels, classes) - 1 / classes
    x = inputs.double()
    k_ss = relu_kernels(x, depth=depth, weight_std=weight_std, bias_std=bias_std)[1]
    pieces = []
    for batch in epoch(table, batch_size):
        rows = batch["inputs"].to(x)
        k_ts = relu_kernels(rows, x, depth=depth, weight_std=weight_std, bias_std=bias_std)[1]
        pieces.append(krr(k_ss, k_ts, labels.to(x), ridge).float().cpu())
    return torch.cat(pieces)


def _loss(kind: str, out: Tensor, labels: Tensor) -> Tensor:
    if kind == "ce":
        return F.cross_entropy(out, labels)
    if labels.ndim == 1:
        raise BadInput("a budget with the loss 'mse' needs soft labels [N, C], got class indices; use 'ce'")
    return 0.5 * (out - labels).square().sum(1).mean()


def _autocast(device: torch.device, precision: str) -> AbstractContextManager[Any]:
    if precision == "fp32":
        return nullcontext()
    return torch.autocast(device.type, torch.bfloat16)
