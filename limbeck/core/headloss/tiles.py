"""The work on tiles of logits: project, compare, carry the gradient back. Nothing of size [N, V] exists.

All is done in fp32 (fp64 when anything is fp64). Where half precision numbers can be multiplied as they are and added
up in fp32, as on CUDA, they are, and the gradient to the logits is carried back as a sum of two of them. A tile holds a
block of rows over the whole vocabulary, so that a divergence sees whole distributions and every product is made once:
two projections, and two products for the gradients. `compare` is all that depends on the divergence; on a GPU the
kernel of `fused` may take its place.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from limbeck.core.headloss import fused
from limbeck.core.headloss.divergences import Divergence, Pair, Rows
from limbeck.core.headloss.heads import Head, Logits, Sparse, Teacher, Term
from limbeck.core.maths import FLOOR

# For a CPU. Rows of a tile: with fewer, reading the head and its gradient from memory takes longer than the products.
TILE = 128
# Rows of the teacher's logits at a time: half the memory for a product that is hardly slower.
TEACHER = 64
# Numbers in one tensor of `compare`: its dozen operations then run in the cache.
CACHE = 2**18
# Words of a half precision head that are in fp32 at a time.
PIECE = 4096


@dataclass(frozen=True)
class Task:
    """One pass. factors: (x [N, k], w [V, k]) of the student, whose products add up to its logits before bias, scale
    and cap; words: of the vocabulary, the first that both share; native: whether products of half precision numbers
    are made in half precision; tile: rows of a tile, None to choose; fused: whether a kernel compares, None to choose.
    """

    factors: tuple[tuple[Tensor, Tensor], ...]
    bias: Tensor | None
    scale: float
    softcap: float | None
    teacher: Teacher | None
    terms: tuple[Term, ...]
    labels: Tensor | None
    words: int
    native: bool = False
    tile: int | None = None
    fused: bool | None = None

    @property
    def inputs(self) -> list[Tensor | None]:
        """What gradients are taken to: x and w of each factor, and the bias."""
        return [*(t for factor in self.factors for t in factor), self.bias]

    @property
    def dtype(self) -> torch.dtype:
        """What all is computed in."""
        dtype = torch.float32
        for t in self.inputs:
            dtype = dtype if t is None else torch.promote_types(dtype, t.dtype)
        return dtype


@dataclass
class Found:
    """values [K, N] of the terms; grads: of sum(weights * values) to each input, None where nobody needs one."""

    values: Tensor
    grads: list[Tensor | None] = field(default_factory=list)


@torch.no_grad()
def run(task: Task, weights: Tensor | None, needed: Sequence[bool]) -> Found:
    """The values, and for weights [K, N] the gradients to the `needed` among the inputs."""
    x, w = task.factors[0]
    n, dtype, device = len(x), task.dtype, x.device
    size = task.tile or _rows(n, x, w, device)
    found = Found(torch.empty(len(task.terms), n, dtype=dtype, device=device))
    if weights is not None:
        asked = zip(task.inputs, needed, strict=True)
        found.grads = [_room(t, i, task, size) if t is not None and yes else None for i, (t, yes) in enumerate(asked)]
    logits = torch.empty(min(size, n), task.words, dtype=dtype, device=device)
    how = fused.plan(task)
    with torch.autocast(device.type, enabled=False):
        for part in _parts(0, n, size):
            z = logits[: part.stop - part.start]
            factors = [(a[part], b) for a, b in task.factors]
            project(z, factors, task.bias, task.scale, task.softcap, task.native)
            for rows, t in _teacher(task, part, dtype):
                mine = None if weights is None else weights[:, rows]
                at = slice(rows.start - part.start, rows.stop - part.start)
                values = None if how is None else fused.compare(how, z[at], t, rows, task, mine)
                if values is None:
                    how, values = None, compare(z[at], t, rows, task, mine)
                found.values[:, rows] = values
            if weights is not None:
                back(z, factors, part, found.grads, task.native)
    return found


# ---------------------------------------------------------------- products


def project(
    out: Tensor,
    factors: Sequence[tuple[Tensor, Tensor]],
    bias: Tensor | None,
    scale: float,
    softcap: float | None,
    native: bool,
) -> None:
    """out [n, words] = cap(scale * (sum of x @ w.T + bias))."""
    for i, (x, w) in enumerate(factors):
        x = x.to(w.dtype if native or in_halves(x, w, out.dtype) else out.dtype)
        for v in _pieces(out, w, copied=not in_halves(x, w, out.dtype)):
            _product(out[:, v], x, w[v].T, add=i > 0)
    if bias is not None:
        out += bias[: out.shape[1]]
    if softcap is not None:
        out.mul_(scale / softcap).tanh_().mul_(softcap)
    elif scale != 1:
        out *= scale


def back(
    grad: Tensor, factors: Sequence[tuple[Tensor, Tensor]], part: slice, grads: Sequence[Tensor | None], native: bool
) -> None:
    """Carry the gradient [n, words] to the sum of products on to x, w and bias; those of w and bias add up.

    What `grad` holds afterwards is of no use.
    """
    add, to_bias = part.start > 0, grads[-1]
    if to_bias is not None:
        to_bias[: grad.shape[1]] += grad.sum(0)
    for i, ((x, w), to_x, to_w) in enumerate(zip(factors, grads[0::2], grads[1::2], strict=False)):
        parts = [grad.to(w.dtype)] if native else [grad]
        if not native and in_halves(x, w, grad.dtype) and w.dtype is torch.bfloat16:  # fp16 would lose what is small
            rest = torch.sub(grad, high := grad.to(w.dtype), out=grad if i == len(factors) - 1 else None)
            parts = [high, rest.to(w.dtype)]  # what the first has rounded away is in the second
        x = x.to(parts[0].dtype)
        for k, g in enumerate(parts):
            for v in _pieces(grad, w, copied=g.dtype != w.dtype or not in_halves(g, w, grad.dtype)):
                if to_x is not None:
                    _product(to_x[part], g[:, v], w[v], add=v.start > 0 or k > 0)
                if to_w is not None:
                    _product(to_w[v], g[:, v].T, x, add=add or k > 0)


def in_halves(x: Tensor, w: Tensor, dtype: torch.dtype) -> bool:
    """Whether x and w are multiplied in half precision, as they are, and added up in `dtype`: nothing is lost."""
    return x.device.type == "cuda" and x.dtype == w.dtype and w.element_size() == 2 and dtype == torch.float32


def _product(out: Tensor, a: Tensor, b: Tensor, *, add: bool) -> None:
    """out (+)= a @ b in the wider dtype of a and b, where that is half of `out`'s added up in `out`'s."""
    dtype = torch.promote_types(a.dtype, b.dtype)
    a, b = a.to(dtype), b.to(dtype)
    if in_halves(a, b, out.dtype):
        wide_product(out, a, b, add=add)
    elif out.dtype == dtype:
        out.addmm_(a, b, beta=float(add))
    elif add:
        out += a @ b
    else:
        out.copy_(a @ b)


def wide_product(out: Tensor, a: Tensor, b: Tensor, *, add: bool) -> None:
    """out (+)= a @ b of half precision numbers in fp32, which torch has on CUDA alone."""
    torch.addmm(out, a, b, torch.float32, beta=float(add), out=out)


def _pieces(logits: Tensor, w: Tensor, *, copied: bool) -> Iterator[slice]:
    """The words, all at once where no product needs a copy in another dtype."""
    words = logits.shape[1]
    return _parts(0, words, PIECE if copied and w.dtype != logits.dtype else words)


def _parts(start: int, stop: int, size: int) -> Iterator[slice]:
    for low in range(start, stop, max(1, size)):
        yield slice(low, min(low + size, stop))


def _room(t: Tensor, i: int, task: Task, size: int) -> Tensor:
    """Where the gradient to input i adds up: in full precision, but for a head to which one tile of all rows is all
    that is added."""
    n, of_head = len(task.factors[0][0]), i % 2 == 1
    once = of_head and size >= n and (task.native or not in_halves(t, t, task.dtype))  # else `back` adds two halves
    room = torch.empty_like(t, dtype=t.dtype if once else task.dtype)
    if n == 0 or t.ndim == 1:
        return room.zero_()
    room[task.words if of_head else n :].zero_()  # the rest is written before it is added to
    return room


def _rows(n: int, x: Tensor, w: Tensor, device: torch.device) -> int:
    """Rows of a tile."""
    if device.type != "cpu":  # enough for the units to be busy, in a quarter of the memory that is left
        free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else 2**32
        return min(2048, max(128, free // (48 * len(w)) // 128 * 128))
    # a tile of all rows is less than a full precision copy of the head's gradient
    return n if n <= x.shape[1] and w.element_size() < 4 else TILE


# ---------------------------------------------------------------- comparison


def _teacher(task: Task, part: slice, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor | None]]:
    """A few rows at a time, and the teacher's logits there if it has any; the next overwrite them."""
    teacher, cpu = task.teacher, task.factors[0][0].device.type == "cpu"
    few = max(1, CACHE // task.words) if cpu else part.stop - part.start
    many = max(few, TEACHER) if cpu else few
    if not isinstance(teacher, Head):
        for rows in _parts(part.start, part.stop, few):
            yield rows, teacher.values[rows, : task.words].to(dtype) if isinstance(teacher, Logits) else None
        return
    room = torch.empty(min(many, part.stop - part.start), task.words, dtype=dtype, device=teacher.hidden.device)
    for block in _parts(part.start, part.stop, many):
        t = room[: block.stop - block.start]
        factors = replace(teacher, hidden=teacher.hidden[block]).factors()
        project(t, factors, teacher.bias, teacher.scale, teacher.softcap, task.native)
        for rows in _parts(block.start, block.stop, few):
            yield rows, t[rows.start - block.start : rows.stop - block.start]


def compare(z: Tensor, t: Tensor | None, rows: slice, task: Task, weights: Tensor | None) -> Tensor:
    """Values [K, n] of the terms for logits z and t [n, words] at `rows`.

    With weights [K, n], z becomes the gradient of sum(weights * values) to the student's sum of products.
    """
    labels = None if task.labels is None else task.labels[rows]
    sides: dict[float, Rows] = {}
    values, total = [], None
    for k, term in enumerate(task.terms):
        if term.temperature not in sides:
            log_q = _log_softmax(z, term.temperature)
            # nobody reads the teacher's where there is none
            log_p = log_q if t is None else _log_softmax(t, term.temperature)
            sides[term.temperature] = Rows(log_q, log_p, labels)
        side = sides[term.temperature]
        if term.against == "labels":
            sure = torch.tensor([0.0, FLOOR], dtype=z.dtype, device=z.device).expand(len(z), 2)
            value, grad = _by_class(term.divergence, side, side.labels[:, None], sure)
        elif isinstance(task.teacher, Sparse):
            log_p = task.teacher.log_p(rows, z.dtype)
            value, grad = _by_class(term.divergence, side, task.teacher.ids[rows], log_p)
        else:
            value, slope = term.divergence(side)
            grad = torch.addcmul(slope, side.q, slope.sum(-1, keepdim=True), value=-1)
        values.append(value)
        if weights is not None:
            grad *= (weights[k] / term.temperature)[:, None]
            total = grad if total is None else total.add_(grad)
    if total is not None:
        if task.softcap is not None:
            total.addcmul_(total, (z / task.softcap).square_(), value=-1)
        torch.mul(total, task.scale, out=z)
    return torch.stack(values)


def _by_class(divergence: Divergence, full: Rows, ids: Tensor, log_p: Tensor) -> Pair:
    """Value [n] and gradient to the logits [n, V] where words other than `ids` [n, K] are one class, the last of log_p
    [n, K + 1]. -1 is no word."""
    real, at = ids >= 0, ids.clamp_min(0)
    of_ids = full.q.gather(-1, at) * real
    gone = torch.where(real, FLOOR, torch.inf).to(full.log_q)
    others = full.log_q.scatter_reduce(-1, at, gone, "amin")
    rest = others.logsumexp(-1, keepdim=True).clamp_min_(FLOOR / 2)  # in logarithms: it may be below what a float holds
    shares = others.sub_(rest).exp_()
    log_q = torch.cat([full.log_q.gather(-1, at).masked_fill(~real, FLOOR), rest], -1)
    # where every word is kept there is no tail, and what rounding leaves of it must not count
    log_p = torch.cat([log_p[:, :-1], torch.where(rest > FLOOR / 2, log_p[:, -1:], FLOOR)], -1)
    label = full.label
    if label is not None:
        same = ids == label[:, None]
        label = torch.where(same.any(-1), same.int().argmax(-1), ids.shape[-1])
    value, slope = divergence(Rows(log_q, log_p, label))
    total = slope.sum(-1, keepdim=True)
    grad = shares.mul_(slope[:, -1:] - rest.exp() * total)
    return value, grad.scatter_add_(-1, at, (slope[:, :-1] - of_ids * total) * real)


def _log_softmax(logits: Tensor, temperature: float) -> Tensor:
    softened = logits if temperature == 1 else logits / temperature
    return torch.log_softmax(softened, -1).clamp_min_(FLOOR)
