"""Synthetic training sets: what data-set distillation learns, and the pieces that its methods share."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from limbeck.core.augment import Siamese
from limbeck.core.batches import generator
from limbeck.core.errors import BadInput
from limbeck.core.nets import Nets

__all__ = ["SynSet", "Trajectories", "by_class", "hard", "pick", "renew", "seal", "siamese"]


def hard(labels: Tensor) -> Tensor:
    """Class indices [N] of labels that are classes [N] or soft [N, C]."""
    return labels if labels.ndim == 1 else labels.argmax(1)


def pick(labels: Tensor, per_class: int, *, seed: int = 0) -> Tensor:
    """Rows [classes * per_class] of random examples, class by class, of labels [N]; the seed alone decides."""
    if per_class < 1:
        raise BadInput(f"`per_class` must be >= 1, got {per_class}")
    rows, labels = [], labels.cpu()
    for c in labels.unique().tolist():
        members = (labels == c).nonzero()[:, 0]
        if len(members) < per_class:
            raise BadInput(f"class {c} has {len(members)} examples, fewer than the {per_class} a class asked for")
        rows.append(members[torch.randperm(len(members), generator=generator(seed, "pick", c))[:per_class]])
    return torch.cat(rows)


class SynSet(nn.Module):
    """A learnable training set: `forward() -> (inputs [N, ...], labels [N] or [N, C])`.

    codes: starting values [M, ...] of what is learned: the inputs themselves, or what `decode` makes them from.
    labels: of each code, classes long [M] or soft float [M, C]. decode: maps codes [M, ...] to inputs [k M, ...], the k
    of one code after another, and is learned too where it has parameters; None for codes that are the inputs.
    learn_labels: whether soft labels are learned.
    """

    codes: nn.Parameter
    labels: Tensor
    unit: Tensor

    def __init__(
        self, codes: Tensor, labels: Tensor, *, decode: nn.Module | None = None, learn_labels: bool = False
    ) -> None:
        super().__init__()
        if len(codes) != len(labels) or not len(codes):
            raise BadInput(f"a synthetic set needs one label a code, got {len(codes)} codes and {len(labels)} labels")
        if learn_labels and not labels.is_floating_point():
            raise BadInput("only soft labels [N, C] can be learned, got class indices; make them soft first")
        self.codes = nn.Parameter(codes.detach().clone())
        self.decode = decode
        self._set_labels(labels, learn_labels)

    @classmethod
    def real(cls, inputs: Tensor, labels: Tensor, ipc: int, *, seed: int = 0) -> SynSet:
        """Start from `ipc` random real examples of each class; they equal `pick(labels, ipc, seed=seed)`."""
        rows = pick(labels, ipc, seed=seed)
        return cls(inputs[rows], labels[rows])

    @classmethod
    def noise(cls, shape: tuple[int, ...], classes: int, ipc: int, *, seed: int = 0) -> SynSet:
        """Start from standard normal noise: `ipc` inputs of `shape` for each class."""
        codes = torch.randn(classes * ipc, *shape, generator=generator(seed, "noise"))
        return cls(codes, torch.arange(classes).repeat_interleave(ipc))

    def forward(self) -> tuple[Tensor, Tensor]:
        inputs = self.codes if self.decode is None else self.decode(self.codes)
        return inputs, self.labels.repeat_interleave(len(inputs) // len(self.labels), 0)

    def _set_labels(self, labels: Tensor, learn: bool) -> None:
        labels = labels.detach().clone()
        if learn:
            self.labels = nn.Parameter(labels)
        else:
            self.register_buffer("labels", labels)

    def soften(self, classes: int, *, learn: bool, centred: bool = False) -> None:
        """Make class labels soft [N, classes]: one-hot, less 1/classes when `centred`. Soft ones keep their values."""
        labels = self.labels
        if labels.ndim == 1:
            labels = F.one_hot(labels, classes).to(self.codes.dtype) - (1 / classes if centred else 0)
        del self.labels
        self._set_labels(labels, learn)

    def learn_rate(self, rate: float, unit: float) -> None:
        """Own a step size that is learned with the inputs. It is stored in multiples of `unit`: beside inputs that SGD
        moves at rate r, it moves as under an SGD of its own at rate r * unit**2."""
        self.register_buffer("unit", self.codes.new_tensor(unit))
        self.units = nn.Parameter(self.codes.new_tensor(rate / unit))

    @property
    def rate(self) -> Tensor | None:
        """The learned step size [], with gradient; None without one."""
        return self.units * self.unit if "units" in self._parameters else None

    def export(self) -> tuple[Tensor, Tensor]:
        """Plain tensors (inputs, labels) on the CPU, detached from everything."""
        with torch.no_grad():
            inputs, labels = (t.detach().cpu().contiguous().clone() for t in self())
        return inputs, labels

    def bytes(self) -> dict[str, int]:
        """Bytes to store the set: inputs (codes and decoder), labels (1 or 2 bytes a class index), total."""
        parts = [self.codes, *(() if self.decode is None else self.decode.state_dict().values())]
        inputs = sum(p.numel() * p.element_size() for p in parts)
        wide = self.labels.element_size() if self.labels.is_floating_point() else 1 + int(self.labels.max() > 255)
        labels = self.labels.numel() * wide
        return {"inputs": inputs, "labels": labels, "total": inputs + labels}


class Trajectories(nn.Module):
    """Weights of networks as they were trained: flat vectors [experts, points, P] in order of time, as state.

    weights: given ones, or room for those that a method trains. todo: how many it is to train; 0 for given ones.
    every: training steps from one point to the next.
    """

    weights: Tensor

    def __init__(self, weights: Tensor, todo: int = 0, every: int = 1) -> None:
        super().__init__()
        if weights.ndim != 3:
            raise BadInput(f"trajectories are [experts, points, parameters], got shape {tuple(weights.shape)}")
        self.todo, self.every = todo, every
        self.register_buffer("weights", weights)

    @torch.no_grad()
    def put(self, expert: int, point: int, w: Tensor) -> None:
        """Record a flat weight vector w [P]."""
        self.weights[expert, point] = w


def by_class(real: Tensor, synthetic: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Rows of a real batch and of the synthetic set, a pair for each class of the set, whatever the order of labels."""
    real, synthetic = hard(real), hard(synthetic)
    for c in synthetic.unique().tolist():
        rows = (real == c).nonzero()[:, 0]
        if not len(rows):
            raise BadInput(f"the batch holds no example of class {c}; use batches with some of each class (per_class)")
        yield rows, (synthetic == c).nonzero()[:, 0]


def siamese(augment: Siamese, *batches: Tensor, alike: bool = True) -> list[Tensor]:
    """Batches of pictures under one draw of `augment` from the global generator; other inputs as they are.

    alike: every picture of every batch gets the same transform; else each gets its own values of the one operation.
    """
    if not augment.ops or any(b.ndim != 4 for b in batches):
        return list(batches)
    draw = augment.draw(torch.default_generator, 1 if alike else max(len(b) for b in batches))
    return [augment.apply(b, draw if alike else draw[: len(b)]) for b in batches]


def renew(nets: Nets, player: str) -> None:
    """Give a trained network fresh random weights in place, the same on every process; its optimiser stays valid."""
    state = nets.fresh(player).state_dict()
    if dist.is_available() and dist.is_initialized():
        for tensor in state.values():
            dist.broadcast(tensor, 0)
    nets.find(player).load_state_dict(state)


def seal(loss: Tensor, inputs: Tensor) -> Tensor:
    """The same scalar, whose backward reaches `inputs` alone: the gradient is taken now, and the graph is set free.

    A sum over classes then holds the graph of one class at a time, and no work goes into gradients of the network.
    """
    (gradient,) = torch.autograd.grad(loss, inputs)
    sealed: Tensor = _Sealed.apply(loss.detach(), inputs, gradient)  # type: ignore[no-untyped-call]
    return sealed


class _Sealed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, loss: Tensor, inputs: Tensor, gradient: Tensor) -> Tensor:
        ctx.save_for_backward(gradient)
        return loss.clone()

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> tuple[None, Tensor, None]:
        (gradient,) = ctx.saved_tensors  # type: ignore[attr-defined]
        return None, grad * gradient, None
