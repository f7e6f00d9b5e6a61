"""Networks of one start and one shape are merged into one by their weights, tensor by tensor, without training."""

from collections.abc import Callable, Mapping, Sequence
from functools import reduce

import torch
from torch import Tensor

from limbeck.core.errors import BadInput

State = Mapping[str, Tensor]


def average(start: State, branches: Sequence[State]) -> dict[str, Tensor]:
    """The mean of the branches (a uniform soup)."""
    return _each(branches[-1], lambda key, _: torch.stack([b[key].double() for b in branches]).mean(0))


def task_arithmetic(start: State, branches: Sequence[State], *, scale: float = 1.0) -> dict[str, Tensor]:
    """W = W_start + scale sum_k (W_k - W_start)."""
    tasks = [_task(start, b) for b in branches]
    return _each(branches[-1], lambda key, _: start[key].double() + scale * sum(t[key] for t in tasks))


def ties(start: State, branches: Sequence[State], *, scale: float = 1.0, keep: float = 0.2) -> dict[str, Tensor]:
    """W = W_start + scale times the mean of those trimmed differences whose sign is that of their sum.

    keep: in (0, 1], the part of each branch's differences, over all of its tensors, that is left: the largest.
    """
    tasks = [_trimmed(_task(start, b), keep) for b in branches]

    def merged(key: str, _: Tensor) -> Tensor:
        moves = torch.stack([t[key] for t in tasks])
        agree = (moves.sign() == moves.sum(0).sign()) & (moves != 0)
        return start[key].double() + scale * (moves * agree).sum(0) / agree.sum(0).clamp_min(1)

    return _each(branches[-1], merged)


def arcee_fusion(start: State, branches: Sequence[State]) -> dict[str, Tensor]:
    """The first branch is fused into the second, the result into the third, and so on: most is kept of the last."""
    first, *others = branches
    return reduce(lambda other, base: _each(base, lambda key, w: fused(w, other[key])), others, dict(first))


def fused(base: Tensor, other: Tensor) -> Tensor:
    """`other` where its importance is at least the median + 1.5 (Q3 - Q1) of the tensor's, else `base`; any shape."""
    score = importance(base, other)
    low, middle, high = (_quantile(score, q) for q in (0.25, 0.5, 0.75))
    return torch.where(score >= middle + 1.5 * (high - low), other, base)


def importance(base: Tensor, other: Tensor) -> Tensor:
    """|other - base| KL(p || q) of each entry, p and q the softmax of its row in `other` and `base`, plus 1e-8."""
    w0, w1 = base.double(), other.double()
    p, q = (w.softmax(-1) + 1e-8 for w in (w1, w0))
    kl = (p * (p / q).log()).sum(-1, keepdim=True)
    return (w1 - w0).abs() * torch.where((w1 == w0).all(-1, keepdim=True), 0.0, kl)


def check(start: State, branches: Sequence[State]) -> None:
    """Raise BadInput unless all have the same tensors of the same shapes."""
    for k, branch in enumerate(branches):
        for key in {*start, *branch}:
            here, there = (tuple(s[key].shape) if key in s else "no such tensor" for s in (start, branch))
            if here != there:
                raise BadInput(f"networks of one shape can be merged: {key!r} is {here} at the start, {there} in {k}")


MERGES: dict[str, Callable[..., dict[str, Tensor]]] = {
    f.__name__: f for f in (arcee_fusion, average, task_arithmetic, ties)
}


def _each(base: State, make: Callable[[str, Tensor], Tensor]) -> dict[str, Tensor]:
    """`make` of every tensor of numbers in the type of `base`'s; counters and the like are `base`'s."""
    return {k: make(k, w).to(w.dtype) if w.is_floating_point() else w.clone() for k, w in base.items()}


def _task(start: State, branch: State) -> dict[str, Tensor]:
    """What training has changed, in fp64."""
    return {k: branch[k].double() - w.double() for k, w in start.items() if w.is_floating_point()}


def _trimmed(task: Mapping[str, Tensor], keep: float) -> dict[str, Tensor]:
    sizes = torch.cat([delta.abs().flatten() for delta in task.values()])
    limit = sizes.kthvalue(len(sizes) - max(1, round(keep * len(sizes))) + 1).values
    return {key: torch.where(delta.abs() >= limit, delta, 0.0) for key, delta in task.items()}


def _quantile(values: Tensor, q: float) -> Tensor:
    """The entry at place floor(q (n - 1)) in rising order."""
    return values.flatten().kthvalue(int(q * (values.numel() - 1)) + 1).values
