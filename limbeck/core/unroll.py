"""Inner optimisation that can be differentiated: exact replay, implicit gradients, kernel ridge in closed form.

Conventions: w [P] is one flat vector of network parameters (`Functional` makes a module a function of it), `outer` are
the tensors that the outer problem trains (synthetic images, their labels, ...), and an inner loss is
`loss(step, w, *outer) -> []`. What the outer problem differentiates must come in through w0, lr or outer.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from limbeck.core.maths import pair

InnerLoss = Callable[..., Tensor]


class Functional:
    """A module as a function of one flat parameter vector: `f(w, x)`; the module itself is never changed by calls.

    Buffers are taken from the module, as copies: batch norm in train mode works, and leaves no trace.
    """

    def __init__(self, net: nn.Module) -> None:
        self.net = net
        self.shapes = {name: p.shape for name, p in net.named_parameters()}

    def flat(self) -> Tensor:
        """The module's parameters now, as one new vector [P] without gradient."""
        return torch.cat([p.detach().reshape(-1) for p in self.net.parameters()])

    def unflatten(self, w: Tensor) -> dict[str, Tensor]:
        """Views of w [P], named and shaped as the module's parameters."""
        sizes = [shape.numel() for shape in self.shapes.values()]
        if w.shape != (sum(sizes),):
            raise ValueError(f"the network has {sum(sizes)} parameters, got a vector of shape {tuple(w.shape)}")
        parts = torch.split(w, sizes)
        return {name: part.view(shape) for (name, shape), part in zip(self.shapes.items(), parts, strict=True)}

    def __call__(self, w: Tensor, *inputs: Tensor) -> Any:
        """What the module returns for `inputs` with its parameters set to w [P]."""
        buffers = {name: b.clone() for name, b in self.net.named_buffers()}
        return torch.func.functional_call(self.net, {**self.unflatten(w), **buffers}, inputs)

    @torch.no_grad()
    def load(self, w: Tensor) -> None:
        """Write w [P] into the module's parameters."""
        for p, part in zip(self.net.parameters(), self.unflatten(w).values(), strict=True):
            p.copy_(part)


def unroll(loss: InnerLoss, w0: Tensor, outer: Sequence[Tensor] = (), *, steps: int, lr: float | Tensor) -> Tensor:
    """w after `steps` of gradient descent w <- w - lr dloss/dw from w0 [P]; differentiable in w0, lr and outer.

    The gradient is that of back-propagation through all steps, to rounding. Only the vectors w_0 .. w_{steps-1} are
    kept: backward replays each step from its vector and takes one vector-Jacobian product, v <- v - lr H v, so that
    the graph of one step lives at a time.

    loss: `loss(step, w, *outer) -> []`; called twice a step. Random numbers that it draws from torch's generators are
    the same in both calls, as is autocast. lr: a number, a scalar tensor, or a tensor [steps].
    """
    if steps < 1:
        raise ValueError(f"`steps` must be >= 1, got {steps!r}")
    rate = lr if isinstance(lr, Tensor) else w0.new_tensor(lr)
    if rate.ndim and rate.shape != (steps,):
        raise ValueError(f"`lr` must be a number, a scalar or a tensor of {steps} steps, got shape {tuple(rate.shape)}")
    w: Tensor = _Replay.apply(loss, steps, w0, rate, *outer)  # type: ignore[no-untyped-call]
    return w


class _Replay(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, loss: InnerLoss, steps: int, w0: Tensor, lr: Tensor, *outer: Tensor) -> Tensor:
        ctx.loss, ctx.steps, ctx.autocast = loss, steps, _autocast_now(w0.device)
        ctx.devices = {t.device for t in (w0, *outer) if t.device.type == "cuda"}
        ctx.random, path, w = [], [], w0
        fixed = tuple(o.detach() for o in outer)
        for k in range(steps):
            path.append(w)
            ctx.random.append(_random_now(ctx.devices))
            _, g = _gradient(loss, k, w, fixed, check=k == 0)
            w = w - _at(lr, k) * g
        ctx.save_for_backward(lr, *outer, *path)
        return w

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, v: Tensor) -> tuple[Tensor | None, ...]:
        lr, *tensors = ctx.saved_tensors
        outer, path = tensors[: -ctx.steps], tensors[-ctx.steps :]
        wants_lr, wants = ctx.needs_input_grad[3], ctx.needs_input_grad[4:]
        to_lr = torch.zeros_like(lr)
        to_outer = [torch.zeros_like(o) if want else None for o, want in zip(outer, wants, strict=True)]
        for k in reversed(range(ctx.steps)):
            o = tuple(t.detach().requires_grad_(want) for t, want in zip(outer, wants, strict=True))
            with _random_as(ctx.random[k], ctx.devices), ctx.autocast():
                w, g = _gradient(ctx.loss, k, path[k], o, create_graph=True)
            if wants_lr:
                to_lr[k if lr.ndim else ...] -= (g.detach() * v).sum()
            into = [w, *(t for t in o if t.requires_grad)]
            hv, *mixed = _vjp(g, into, v)
            rate = _at(lr, k)
            for total, m in zip((t for t in to_outer if t is not None), mixed, strict=True):
                if m is not None:
                    total -= rate * m
            if hv is not None:
                v = v - rate * hv
        return None, None, v, to_lr if wants_lr else None, *to_outer


def implicit(
    loss: Callable[..., Tensor],
    w: Tensor,
    outer: Sequence[Tensor],
    *,
    damping: float = 0.0,
    iterations: int = 100,
    tolerance: float = 1e-10,
) -> Tensor:
    """w [P], a minimum of `loss(w, *outer)` found in any way, made a differentiable function of outer.

    Implicit function theorem: a gradient v at w becomes -d/d outer <dloss/dw, u> with (H + damping) u = v, solved by
    conjugate gradients. No gradient goes to w itself. Exact where dloss/dw = 0 and H is positive definite.

    damping: >= 0, for flat directions. iterations: at most. tolerance: residual of the solve relative to v.
    """
    w_of_outer: Tensor = _Implicit.apply(loss, damping, iterations, tolerance, w.detach(), *outer)  # type: ignore[no-untyped-call]
    return w_of_outer


class _Implicit(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, loss: InnerLoss, damping: float, iterations: int, tolerance: float, w: Tensor, *outer: Tensor
    ) -> Tensor:
        ctx.loss, ctx.solve, ctx.autocast = loss, (damping, iterations, tolerance), _autocast_now(w.device)
        ctx.save_for_backward(w, *outer)
        return w.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, v: Tensor) -> tuple[Tensor | None, ...]:
        w, *outer = ctx.saved_tensors
        damping: float = ctx.solve[0]
        iterations, tolerance = ctx.solve[1:]
        wants = ctx.needs_input_grad[5:]
        o = tuple(t.detach().requires_grad_(want) for t, want in zip(outer, wants, strict=True))
        with ctx.autocast():
            w, g = _gradient(lambda _, w, *o: ctx.loss(w, *o), 0, w, o, create_graph=True)

        def hessian(u: Tensor) -> Tensor:
            (hu,) = _vjp(g, [w], u, retain=True)
            return u * damping if hu is None else hu + u * damping

        u = cg(hessian, v, iterations=iterations, tolerance=tolerance)
        mixed = iter(_vjp(g, [t for t in o if t.requires_grad], u))
        grads = [next(mixed) if want else None for want in wants]
        return None, None, None, None, None, *(None if m is None else -m for m in grads)


def cg(matvec: Callable[[Tensor], Tensor], b: Tensor, *, iterations: int = 100, tolerance: float = 1e-10) -> Tensor:
    """x with matvec(x) = b for a symmetric positive definite map, by conjugate gradients; b of any shape.

    tolerance: on |residual| / |b|. Stops early where the map is not positive along the search direction.
    """
    x, r = torch.zeros_like(b), b.clone()
    p, rr = r, (r * r).sum()
    goal = tolerance**2 * rr
    for _ in range(iterations):
        if rr <= goal:
            break
        ap = matvec(p)
        curvature = (p * ap).sum()
        if curvature <= 0:
            break
        alpha = rr / curvature
        x, r = x + alpha * p, r - alpha * ap
        rr, before = (r * r).sum(), rr
        p = r + (rr / before) * p
    return x


# ---------------------------------------------------------------- kernel ridge


def krr(k_ss: Tensor, k_ts: Tensor, y_s: Tensor, ridge: float = 1e-6) -> Tensor:
    """Kernel ridge prediction K_ts (K_ss + ridge tr(K_ss) / S I)^-1 y_s [T, C]; differentiable in all tensors.

    k_ss [S, S], k_ts [T, S], y_s [S, C]. ridge: >= 0, in units of the mean diagonal, so that it has no scale.
    """
    with torch.autocast(k_ss.device.type, enabled=False):
        prediction: Tensor = k_ts @ torch.cholesky_solve(y_s, _cholesky(k_ss, ridge))
    return prediction


def label_solve(k_ss: Tensor, k_ts: Tensor, y_t: Tensor, ridge: float = 1e-6) -> Tensor:
    """The labels y_s [S, C] whose `krr` prediction fits y_t [T, C] best in squared error, least norm among equals."""
    predictor = torch.cholesky_solve(k_ts.mT, _cholesky(k_ss, ridge)).mT
    labels: Tensor = torch.linalg.pinv(predictor) @ y_t
    return labels


def _cholesky(k: Tensor, ridge: float) -> Tensor:
    if ridge < 0:
        raise ValueError(f"`ridge` must be >= 0, got {ridge!r}")
    root: Tensor
    root, failed = torch.linalg.cholesky_ex(k + ridge * k.diagonal().mean() * torch.eye(len(k)).to(k))
    if bool(failed):
        raise ValueError(f"the kernel of {len(k)} support points is not positive definite; raise `ridge` ({ridge!r})")
    return root


def relu_kernels(
    x: Tensor, y: Tensor | None = None, *, depth: int = 3, weight_std: float = math.sqrt(2), bias_std: float = 0.1
) -> tuple[Tensor, Tensor]:
    """(NNGP, NTK) [N, M] of an infinitely wide ReLU network with `depth` hidden layers, NTK parametrisation.

    x [N, ...], y [M, ...] (x itself when None). A layer is h = weight_std W x / sqrt(fan_in) + bias_std b with
    standard normal W and b. Arc-cosine kernels (Cho and Saul 2009); recursion of Jacot et al. 2018.
    """
    if depth < 0:
        raise ValueError(f"`depth` must be >= 0, got {depth!r}")
    x, y = pair(x.flatten(1), x.flatten(1) if y is None else y.flatten(1))
    a, b = weight_std**2 / x.shape[1], bias_std**2
    with torch.autocast(x.device.type, enabled=False):
        k = a * x @ y.mT + b
    kx, ky = a * x.square().sum(1) + b, a * y.square().sum(1) + b
    theta = k
    for _ in range(depth):
        scale = (kx[:, None] * ky[None, :]).sqrt()
        positive, derivative = _arc_cosine(k / scale)
        k = weight_std**2 * scale * positive + b
        theta = k + weight_std**2 * derivative * theta
        kx, ky = weight_std**2 * kx / 2 + b, weight_std**2 * ky / 2 + b
    return k, theta


def _arc_cosine(c: Tensor) -> tuple[Tensor, Tensor]:
    """E[relu(u) relu(v)] and E[relu'(u) relu'(v)] of standard normals with correlation c; gradient finite at +-1."""
    c = c.clamp(-1, 1)
    inside = c.abs() < 1 - 4 * torch.finfo(c.dtype).eps  # x against itself: rounding must not pass for an angle
    safe = torch.where(inside, c, 0.0)
    sine = torch.where(inside, (1 - safe * safe).sqrt(), 0.0)
    turn = torch.where(inside, torch.atan2(sine, safe), math.pi * (c < 0).to(c.dtype))
    derivative = (math.pi - turn) / (2 * math.pi)
    return sine / (2 * math.pi) + derivative * c, derivative


# ---------------------------------------------------------------- details of replaying


def _gradient(
    loss: InnerLoss, k: int, w: Tensor, outer: Sequence[Tensor], *, create_graph: bool = False, check: bool = False
) -> tuple[Tensor, Tensor]:
    """A leaf at the value of w, and dloss/dw there."""
    with torch.enable_grad():
        w = w.detach().requires_grad_()
        value = loss(k, w, *outer)
        if value.ndim:
            raise ValueError(f"the inner loss must be a scalar, got shape {tuple(value.shape)}")
        if check:
            _refuse_captured(value, w)
        (g,) = torch.autograd.grad(value, w, create_graph=create_graph)
    return w, g


def _vjp(g: Tensor, into: Sequence[Tensor], v: Tensor, retain: bool = False) -> Sequence[Tensor | None]:
    """d<g, v>/d into; None where g does not depend on it."""
    if not g.requires_grad or not into:
        return [None] * len(into)
    return torch.autograd.grad(g, into, v, retain_graph=retain, allow_unused=True)


def _refuse_captured(value: Tensor, w: Tensor) -> None:
    """A tensor that the loss has from elsewhere would silently get no gradient: say so instead."""
    todo, seen = [value.grad_fn], set()
    while todo:
        node = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        leaf = getattr(node, "variable", None)
        if leaf is not None and leaf is not w:
            raise ValueError(
                f"the inner loss uses a tensor of shape {tuple(leaf.shape)} that requires grad but is not in `outer`; "
                "pass it through `outer`, or detach it if it is a constant"
            )
        todo.extend(n for n, _ in node.next_functions)


def _at(lr: Tensor, k: int) -> Tensor:
    return lr[k] if lr.ndim else lr


def _autocast_now(device: torch.device) -> Callable[[], AbstractContextManager[Any]]:
    kind = device.type
    enabled, dtype = torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)
    return lambda: torch.autocast(kind, dtype=dtype, enabled=enabled)


def _random_now(devices: set[torch.device]) -> tuple[Tensor, list[Tensor]]:
    return torch.get_rng_state(), [torch.cuda.get_rng_state(d) for d in devices]


@contextmanager
def _random_as(state: tuple[Tensor, list[Tensor]], devices: set[torch.device]) -> Iterator[None]:
    """Torch's generators as they were; put back afterwards."""
    with torch.random.fork_rng(list(devices)):
        torch.set_rng_state(state[0])
        for d, s in zip(devices, state[1], strict=True):
            torch.cuda.set_rng_state(s, d)
        yield
