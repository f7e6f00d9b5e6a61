"""When one Triton kernel takes the place of `tiles.compare`, which writes each step of a formula to memory.

It does for tensors on a CUDA device where Triton can be imported, as it can beside torch for CUDA, for terms with a
kernel: at most one of `KINDS` against a teacher whose logits are there, at most one cross-entropy with the labels, in
fp32. All else (stored words, fp64, other divergences, several at once) goes through torch, with the same results. The
environment variable LIMBECK_TRITON=0 turns it off. Tested in Triton's interpreter and on CUDA.
"""

from __future__ import annotations

import os
import warnings
from dataclasses import dataclass
from functools import cache, partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from limbeck.core.headloss import divergences as d
from limbeck.core.headloss.divergences import Divergence
from limbeck.core.headloss.heads import Sparse

if TYPE_CHECKING:
    from limbeck.core.headloss.tiles import Task

KINDS: tuple[Divergence, ...] = (
    d.cross_entropy,
    d.forward_kl,
    d.reverse_kl,
    d.js,
    d.skew_kl,
    d.skew_reverse_kl,
    d.total_variation,
)
AT_ZERO = {"skew_kl": "forward_kl", "skew_reverse_kl": "reverse_kl"}
# Their slopes sum to -1.
SUMMED = ("cross_entropy", "forward_kl")
# Words that a program reads at a time, and its warps: of those tried, from 1024 to 16384 and from 4 to 32, the fastest
# on an H200 for forward KL and JS together (rows of 128,256 words, fp32).
BLOCK, WARPS = 2048, 16


@dataclass(frozen=True)
class Plan:
    """kind, knob: of the term against the teacher, "" for none; teacher, labels: the terms' places, None for none."""

    kind: str = ""
    knob: float = 0.0
    teacher: int | None = None
    labels: int | None = None
    asked: bool = False


def plan(task: Task) -> Plan | None:
    """How the kernel does this task; None where torch does it. Where it was asked for and cannot, one sentence."""
    on_cuda = task.factors[0][0].device.type == "cuda"
    if task.fused is False or (task.fused is None and not (on_cuda and os.environ.get("LIMBECK_TRITON") != "0")):
        return None
    found = _planned(task)
    if not task.fused:
        return found if found is not None and _kernels() is not None else None
    if not on_cuda and os.environ.get("TRITON_INTERPRET") != "1":
        raise ValueError(
            "fused=True asks for tensors on a CUDA device; on a CPU only Triton's interpreter can take them"
        )
    if found is None:
        names = ", ".join(kind.__name__ for kind in KINDS)
        raise ValueError(
            f"fused=True has no kernel for these terms: in fp32, it knows one of {names} against a teacher's logits, "
            "and one cross-entropy with labels; fused=None takes it where it can"
        )
    if _kernels() is None:
        raise ImportError("fused=True needs Triton, which cannot be imported: pip install triton")
    return found


@cache
def _kernels() -> Any:
    """The module of kernels, None where Triton cannot be imported."""
    try:
        from limbeck.core.headloss import kernels
    except ImportError:
        return None
    return kernels


def compare(how: Plan, z: Tensor, t: Tensor | None, rows: slice, task: Task, weights: Tensor | None) -> Tensor | None:
    """As `tiles.compare`; None, with a warning, where Triton fails before it has written anything."""
    try:
        return _launched(how, z, t, rows, task, weights)
    except Exception as error:  # no C compiler, a device too old, ...: each of its own kind
        if how.asked:
            raise
        warnings.warn(
            f"the vocabulary loss goes on without its Triton kernel, more slowly: {error}; to go without from the "
            "start, set LIMBECK_TRITON=0",
            RuntimeWarning,
            stacklevel=2,
        )
        return None


def _launched(how: Plan, z: Tensor, t: Tensor | None, rows: slice, task: Task, weights: Tensor | None) -> Tensor:
    n, words = z.shape
    values = z.new_empty(len(task.terms), n)
    t = z if t is None else t if t.stride(1) == 1 else t.contiguous()

    def side(at: int | None) -> tuple[Tensor, Tensor, float]:
        """Values, weights and rate of a term; anything, which nobody reads, where there is none."""
        if at is None:
            return values[0], values[0], 1.0
        rate = 1 / task.terms[at].temperature
        return values[at], values[at] if weights is None else (weights[at] * rate).contiguous(), rate

    (to_teacher, of_teacher, rate), (to_labels, of_labels, label_rate) = side(how.teacher), side(how.labels)
    with torch.cuda.device(z.device if z.device.type == "cuda" else -1):  # Triton launches on the current one
        _kernels().compare[(n,)](
            z,
            t,
            z.stride(0),
            t.stride(0),
            words,
            z if how.labels is None or task.labels is None else task.labels[rows].contiguous(),
            to_teacher,
            to_labels,
            of_teacher,
            of_labels,
            rate,
            label_rate,
            how.knob,
            task.scale,
            task.softcap or 1.0,
            KIND=how.kind,
            LABELS=how.labels is not None,
            SUM=weights is None or how.kind not in SUMMED,
            GRADIENT=weights is not None,
            CAPPED=task.softcap is not None,
            BLOCK=min(BLOCK, 1 << (words - 1).bit_length()),
            num_warps=WARPS,
        )
    return values


def _planned(task: Task) -> Plan | None:
    """How, were it not for the device; None where there is no kernel."""
    theirs = [k for k, term in enumerate(task.terms) if term.against == "teacher"]
    labels = [k for k, term in enumerate(task.terms) if term.against == "labels"]
    if task.dtype is not torch.float32 or len(theirs) > 1 or len(labels) > 1:
        return None
    if (theirs and isinstance(task.teacher, Sparse)) or any(
        task.terms[k].divergence is not d.cross_entropy for k in labels
    ):
        return None
    found = Plan(labels=labels[0] if labels else None, asked=bool(task.fused))
    if not theirs:
        return found
    known = _known(task.terms[theirs[0]].divergence)
    return known and Plan(*known, theirs[0], found.labels, found.asked)


def _known(divergence: Divergence) -> tuple[str, float] | None:
    """Name and knob of a divergence with a kernel; None also where the knob is not allowed: torch says what is."""
    told: dict[str, Any] = {}
    if isinstance(divergence, partial) and not divergence.args:
        told, divergence = divergence.keywords, divergence.func
    if not any(divergence is kind for kind in KINDS):
        return None
    name, knobs = str(divergence.__name__), getattr(divergence, "__kwdefaults__", None) or {}
    if not told.keys() <= knobs.keys():
        return None
    (knob,) = {**knobs, **told}.values() or (0.0,)
    if not isinstance(knob, (int, float)) or not 0 <= knob <= 1:
        return None
    if knob == 0 and name in AT_ZERO:
        return AT_ZERO[name], 0.0
    return None if name == "js" and knob in (0, 1) else (name, float(knob))
