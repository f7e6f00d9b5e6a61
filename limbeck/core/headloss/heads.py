"""Who speaks: a head over hidden states, logits at hand, or a few stored entries a token; and what is asked of them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from limbeck.core.card import require
from limbeck.core.headloss.divergences import Divergence, cross_entropy
from limbeck.core.maths import FLOOR

# Less tail than this is rounding of what was stored, not mass.
NO_MASS = 1e-6


@dataclass(frozen=True)
class Head:
    """Logits = cap(scale * (hidden @ (weight + s B A).T + bias)) over V words, cap(x) = softcap * tanh(x / softcap).

    hidden [..., D] and weight [V, D]: the embedding's own weight when the two are tied. bias [V]. scale: factor on the
    logits. softcap: > 0, None for none. lora: (A [r, D], B [V, r], s), the adapter of the head.
    """

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None
    lora: tuple[Tensor, Tensor, float] | None = None

    def __post_init__(self) -> None:
        if self.hidden.shape[-1] != self.weight.shape[-1]:
            raise ValueError(
                f"hidden states {tuple(self.hidden.shape)} do not fit a head {tuple(self.weight.shape)}: the last "
                "dimensions must agree"
            )
        require(self.softcap is None or self.softcap > 0, "softcap", self.softcap, "> 0 or None")

    def at(self, index: Tensor | None) -> Head:
        """With the hidden states as rows [N, D], those of `index` only, and no parameter in shards."""
        adapter = self.lora and (whole(self.lora[0]), whole(self.lora[1]), self.lora[2])
        return replace(
            self,
            hidden=rows(self.hidden, index),
            weight=whole(self.weight),
            bias=None if self.bias is None else whole(self.bias),
            lora=adapter,
        )

    def detached(self) -> Head:
        """Without gradient."""
        a_b_s = self.lora and (self.lora[0].detach(), self.lora[1].detach(), self.lora[2])
        bias = None if self.bias is None else self.bias.detach()
        return replace(self, hidden=self.hidden.detach(), weight=self.weight.detach(), bias=bias, lora=a_b_s)

    def rounded(self, dtype: torch.dtype) -> Head:
        """Hidden states and weight in another dtype, as autocast would multiply them; with an adapter, as they are."""
        if self.lora is not None:
            return self
        return replace(self, hidden=self.hidden.to(dtype), weight=self.weight.to(dtype))

    def logits(self) -> Tensor:
        """[..., V], built whole: for a few places."""
        out: Tensor = sum(x @ w.to(x.dtype).T for x, w in self.factors())  # type: ignore[assignment]
        out = self.scale * (out if self.bias is None else out + self.bias)
        return out if self.softcap is None else self.softcap * torch.tanh(out / self.softcap)

    def factors(self) -> list[tuple[Tensor, Tensor]]:
        """(x [N, k], w [V, k]) whose x @ w.T add up to the product of hidden states and adapted head."""
        if self.lora is None:
            return [(self.hidden, self.weight)]
        a, b, s = self.lora
        # upcast, so that the two gradients to half precision hidden states are summed before they are rounded
        hidden = self.hidden.to(torch.promote_types(self.hidden.dtype, torch.float32))
        return [(hidden, self.weight), (s * (hidden @ a.to(hidden.dtype).T), b)]


@dataclass(frozen=True)
class Logits:
    """A teacher whose logits or log-probabilities [..., V] are at hand, such as from a store that keeps them all."""

    values: Tensor

    def at(self, index: Tensor | None) -> Logits:
        """As rows [N, V], those of `index` only."""
        return Logits(rows(self.values, index).detach())


@dataclass(frozen=True)
class Sparse:
    """A teacher known at K words a token: distinct ids [..., K], -1 where there are fewer, and log-probabilities.

    tail: "bucket" puts the mass that the entries leave out into one class for all other words: a proper divergence, a
    lower bound of the full one. "none": the entries are all there is, made to sum to 1, as sampled targets do, whose
    forward KL has the full one's gradient in expectation. temperature: that the log-probabilities were taken at; they
    cannot be brought to another.
    """

    ids: Tensor
    logprobs: Tensor
    tail: Literal["bucket", "none"] = "bucket"
    temperature: float = 1.0

    def __post_init__(self) -> None:
        if self.ids.shape != self.logprobs.shape:
            raise ValueError(f"ids {tuple(self.ids.shape)} and logprobs {tuple(self.logprobs.shape)} must be alike")
        require(self.tail in ("bucket", "none"), "tail", self.tail, "'bucket' or 'none'")

    @staticmethod
    def counts(ids: Tensor, counts: Tensor, *, temperature: float = 1.0) -> Sparse:
        """How often each word was drawn [..., K], or any weights >= 0: sampled targets, without a tail."""
        return Sparse(ids, counts.to(torch.promote_types(counts.dtype, torch.float32)).log(), "none", temperature)

    def at(self, index: Tensor | None) -> Sparse:
        """As rows [N, K], those of `index` only."""
        return replace(self, ids=rows(self.ids, index), logprobs=rows(self.logprobs, index).detach())

    def log_p(self, part: slice, dtype: torch.dtype) -> Tensor:
        """Log-probabilities [n, K + 1] of the entries and of all other words together."""
        known = self.logprobs[part].to(dtype).masked_fill(self.ids[part] < 0, -torch.inf)
        if self.tail == "none":
            rest = torch.full_like(known[:, :1], -torch.inf)
        else:
            mass = 1 - known.exp().sum(-1, keepdim=True)
            rest = torch.where(mass > NO_MASS, mass, 0.0).log()
        # what was stored in few digits does not sum to 1 exactly
        return torch.log_softmax(torch.cat([known, rest], -1).clamp_min_(FLOOR), -1).clamp_min_(FLOOR)


Teacher = Head | Logits | Sparse


@dataclass(frozen=True)
class Term:
    """One thing to compute in the pass.

    divergence: a function of rows; give knobs by functools.partial(js, beta=0.3). temperature: T > 0 of both sides.
    against: the teacher, or the labels as a distribution without doubt. weight: the factor that the caller will put on
    this term, relative to the others and T**2 included; it changes no value, only what is ready before the backward
    pass.
    """

    divergence: Divergence
    temperature: float = 1.0
    weight: float = 1.0
    against: Literal["teacher", "labels"] = "teacher"

    def __post_init__(self) -> None:
        require(self.temperature > 0, "temperature", self.temperature, "> 0")


def ce(weight: float = 1.0) -> Term:
    """Plain cross-entropy with the labels."""
    return Term(cross_entropy, weight=weight, against="labels")


def rows(x: Tensor, index: Tensor | None) -> Tensor:
    """[..., D] -> [N, D], those of `index` only."""
    flat = x.reshape(-1, x.shape[-1])
    return flat if index is None else flat.index_select(0, index)


def whole(weight: Tensor) -> Tensor:
    """A parameter with its shards gathered. Its gradient goes back to the shards as the mean over the processes, the
    convention of FSDP2, whose other parameters it stands among."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return weight
    from torch.distributed.tensor import DTensor, Partial  # loads slowly, and few need it

    if not isinstance(weight, DTensor):
        return weight
    partial: Any = [Partial("avg")] * weight.device_mesh.ndim
    return weight.full_tensor(grad_placements=partial)
