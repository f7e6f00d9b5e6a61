"""`head_loss`: divergences of two language-model heads from hidden states and head weights, without logits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from limbeck.core.headloss.heads import Head, Logits, Sparse, Teacher, Term
from limbeck.core.headloss.tiles import Task, run


def head_loss(
    student: Head,
    teacher: Teacher | None,
    terms: Sequence[Term],
    *,
    labels: Tensor | None = None,
    mask: Tensor | None = None,
    weights: Tensor | None = None,
    words: int | None = None,
    fast: bool = False,
    recompute: bool = False,
    tile: int | None = None,
    fused: bool | None = None,
) -> list[Tensor]:
    """The value of each term at each place, 0 where masked: hidden [..., D] -> [...] each, in fp32 (fp64 for fp64).

    Gradients are exact for any later weighting of the places, and reach the student's hidden states, head, bias and
    adapter. They are formed in the forward pass, for the weighting term.weight * weights, while the logits of a tile
    are there: two products fewer than projecting again. The backward pass scales them when its weighting is the same
    up to one factor, as that of any mean over the mask is, and else does the whole pass again.

    labels [...]: the next words, for cross-entropy and for divergences that ask. mask [...]: True where a place counts;
    the others cost nothing. weights [...]: how the caller is going to weigh the places, up to a factor; None: alike.
    words: how many words, the first of each head, both vocabularies share; needed where the heads' heights differ by
    padding. fast: products of half precision numbers in half precision, where the hardware has units for it; as exact
    as logits in half precision with a softmax in fp32. recompute: form no gradient in the forward pass. tile: rows at a
    time, None to choose. fused: one Triton kernel in the place of torch's many, on a GPU, for what `fused.KINDS` and
    that file's first lines tell; None takes it where it can be had, True asks for it, False goes without, and results
    are the same to rounding. Under autocast on a GPU, hidden states and heads are first rounded to its dtype.
    """
    places = student.hidden.shape[:-1]
    terms = tuple(terms)
    _check(student, teacher, terms, labels, mask, weights, words)
    index = None if mask is None else mask.reshape(-1).nonzero().squeeze(-1)
    if index is not None and len(index) == places.numel():
        index = None
    mine = student.at(index)
    # a tied or shared head is gathered once
    shared = isinstance(teacher, Head) and teacher.weight is student.weight
    its = replace(teacher, weight=mine.weight) if shared and isinstance(teacher, Head) else teacher
    theirs = None if its is None else its.at(index)
    if isinstance(theirs, Head):
        theirs = theirs.detached()
    if (half := autocast(mine.hidden)) is not None:
        mine = mine.rounded(half)
        theirs = theirs.rounded(half) if isinstance(theirs, Head) else theirs
    task = Task(
        factors=tuple(mine.factors()),
        bias=mine.bias,
        scale=mine.scale,
        softcap=mine.softcap,
        teacher=theirs,
        terms=terms,
        labels=_flat(labels, index),
        words=words or len(mine.weight),
        native=fast and half_units(mine.hidden),
        tile=tile,
        fused=fused,
    )
    if task.labels is not None and bool(((task.labels < 0) | (task.labels >= task.words)).any()):
        raise ValueError(f"labels must be in [0, {task.words}) wherever the mask counts a place; mask the others out")
    if isinstance(theirs, Sparse) and bool((theirs.ids >= task.words).any()):
        raise ValueError(
            f"the teacher's ids must be below {task.words}, the words compared; got {int(theirs.ids.max())}"
        )
    expected = None
    if torch.is_grad_enabled() and not recompute:
        share = torch.tensor([t.weight for t in terms], dtype=task.dtype, device=mine.hidden.device)[:, None]
        at = _flat(weights, index)
        expected = share.expand(-1, len(mine.hidden)) if at is None else share * at.detach().to(share.dtype)
    values: Tensor = _HeadLoss.apply(replace(task, factors=(), bias=None), expected, *task.inputs)  # type: ignore[no-untyped-call]
    if index is not None:
        values = values.new_zeros(len(terms), places.numel()).index_copy(1, index, values)
    return [v.view(places) for v in values]


def half_units(x: Tensor) -> bool:
    """Whether the device multiplies numbers of x's dtype at their own width; elsewhere that is slower than fp32."""
    if x.device.type != "cpu" or x.dtype != torch.bfloat16:
        return x.device.type != "cpu"
    cpu: Any = torch.cpu
    return bool(cpu._is_amx_tile_supported() or cpu._is_avx512_bf16_supported())


def autocast(x: Tensor) -> torch.dtype | None:
    """The dtype in which a product of x is asked for by autocast, on a GPU, where fp32 takes many times as long."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if device == "cuda" and torch.is_autocast_enabled(device) else None


class _HeadLoss(torch.autograd.Function):
    """Values [K, N] from (x, w) of each factor and the bias, which are inputs, and all else, which is in the task."""

    @staticmethod
    def forward(ctx: Any, task: Task, expected: Tensor | None, *inputs: Tensor | None) -> Tensor:
        ctx.task, ctx.expected, ctx.needed = task, expected, ctx.needs_input_grad[2:]
        ctx.save_for_backward(*inputs)
        if not any(ctx.needed):
            expected = None
        found = run(_with(task, inputs), expected, ctx.needed)
        ctx.grads = found.grads
        return found.values

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        task = _with(ctx.task, ctx.saved_tensors)
        # taken out of ctx, so that the head's gradient is handed over and not copied; a second backward runs again
        grads, ctx.grads = ctx.grads, []
        factor = _factor(grad, ctx.expected) if grads else None
        if factor is None:
            del grads
            grads = run(task, grad, ctx.needed).grads
        return None, None, *_scaled(grads, factor, task)


def _with(task: Task, inputs: Sequence[Tensor | None]) -> Task:
    pairs: Any = zip(inputs[0:-1:2], inputs[1::2], strict=False)
    return replace(task, factors=tuple(pairs), bias=inputs[-1])


def _factor(grad: Tensor, expected: Tensor) -> Tensor | None:
    """c with grad = c * expected to rounding; None when there is none."""
    if not grad.numel():
        return grad.new_ones(())
    largest = expected.abs().argmax()
    c = grad.flatten()[largest] / expected.flatten()[largest]
    # one factor may have gone through a few roundings on its way
    return c if torch.allclose(grad, c * expected, rtol=8 * torch.finfo(grad.dtype).eps, atol=0) else None


def _scaled(grads: list[Tensor | None], factor: Tensor | None, task: Task) -> list[Tensor | None]:
    """The gradients times the factor, each in the dtype of its input."""
    out: list[Tensor | None] = []
    for i, like in enumerate(task.inputs):
        grad, grads[i] = grads[i], None
        if grad is not None and like is not None and factor is not None:
            grad = torch.mul(grad, factor, out=grad if grad.dtype == like.dtype else torch.empty_like(like))
        out.append(None if grad is None or like is None else grad.to(like.dtype))
    return out


def _flat(x: Tensor | None, index: Tensor | None) -> Tensor | None:
    if x is None:
        return None
    return x.reshape(-1) if index is None else x.reshape(-1).index_select(0, index)


def _check(
    student: Head,
    teacher: Teacher | None,
    terms: tuple[Term, ...],
    labels: Tensor | None,
    mask: Tensor | None,
    weights: Tensor | None,
    words: int | None,
) -> None:
    """One sentence for whatever does not fit."""
    places, heights = tuple(student.hidden.shape[:-1]), [len(student.weight)]
    given = {"labels": labels, "mask": mask, "weights": weights}
    if isinstance(teacher, Head):
        given["the teacher's hidden states"] = teacher.hidden[..., 0]
        heights.append(len(teacher.weight))
    elif isinstance(teacher, Logits):
        given["the teacher's logits"] = teacher.values[..., 0]
        heights.append(teacher.values.shape[-1])
    elif isinstance(teacher, Sparse):
        given["the teacher's ids"] = teacher.ids[..., 0]
    for name, x in given.items():
        if x is not None and tuple(x.shape) != places:
            raise ValueError(f"{name} are for places {tuple(x.shape)}, the student's hidden states for {places}")
    if words is None and len(set(heights)) > 1:
        raise ValueError(
            f"the student's head has {heights[0]} words and the teacher's {heights[1]}; if only padding makes the "
            "difference, say how many words they share: words=len(tokenizer)"
        )
    if words is not None and not 0 < words <= min(heights):
        raise ValueError(f"`words` must be in [1, {min(heights)}], the words that both heads have, got {words}")
    if not terms:
        raise ValueError("there is nothing to compute: `terms` is empty")
    for term in terms:
        if term.against == "labels" and labels is None:
            raise ValueError("a term is against the labels, and none were given")
        if term.against == "teacher" and teacher is None:
            raise ValueError("a term is against the teacher, and there is none")
        if term.against == "teacher" and isinstance(teacher, Sparse) and term.temperature != teacher.temperature:
            raise ValueError(
                f"the teacher's entries were taken at temperature {teacher.temperature:g} and cannot be brought to "
                f"{term.temperature:g}: what the left-out words would weigh there is not known"
            )
