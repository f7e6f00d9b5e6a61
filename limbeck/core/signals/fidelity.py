"""What a store lost of the teacher, measured while the teacher's answer was still at hand, and where its bytes go."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from limbeck.core.maths import FLOOR, kl_logprobs, log_probs
from limbeck.core.signals.coding import Entries
from limbeck.core.signals.kinds import Sampled, TopK, tensors

__all__ = ["PARTS", "SUMS", "Fidelity", "of_dense", "of_sparse"]

SUMS = ("mass", "kl", "bias", "bias2", "spread")  # over the places of a document, in its index entry
PARTS = ("frame", "symbols", "ids", "values", "tails")  # bits


@dataclass(frozen=True)
class Fidelity:
    """How true a store is; means over the places that were asked for.

    places: how many. ids: kept a place. mass: teacher probability of the kept ids, in [0, 1].
    kl: nats lost. topk, full: KL(teacher || what is known of it), the tail spread evenly. sampled: KL(draw || teacher),
    how far one draw lies from the teacher; this averages out over places, and is no bias.
    bias: of the cross-entropy to the teacher itself, sum w log p + H(teacher), in nats, with the standard error
    bias_error: within two of them of 0 for an unbiased store.
    spread: sum over the vocabulary of (w - p)^2, the squared error of the logits' gradient: variance for sampled (where
    it is close to (1 - sum p^2) / rounds), squared bias for topk.
    bytes: a place, by part: frame (lengths, offsets, index), symbols (classes of gaps and counts), ids, values, tails.
    Figures are nan where the teacher's whole distribution was never seen, as behind a server.
    """

    places: int
    ids: float
    mass: float
    kl: float
    bias: float
    bias_error: float
    spread: float
    bytes: dict[str, float]

    @property
    def bytes_per_token(self) -> float:
        """All parts together."""
        return sum(self.bytes.values())

    def __str__(self) -> str:
        parts = ", ".join(f"{part} {size:.1f}" for part, size in self.bytes.items() if size)
        error = f"bias {self.bias:+.2g} +- {self.bias_error:.1g} nats, spread {self.spread:.2g}"
        return (
            f"{self.places} places, {self.ids:.1f} ids each: mass {self.mass:.4f}, KL {self.kl:.2g} nats, {error}; "
            f"{self.bytes_per_token:.1f} bytes a token ({parts})"
        )


def of_sparse(kind: Sampled | TopK, entries: Entries, logits: Tensor) -> dict[str, float]:
    """Sums over the places of logits [P, V] of what fidelity is made of."""
    log_p = log_probs(logits.float()).double()
    known = {k: v.to(log_p.device) for k, v in tensors(kind, entries).items()}
    ids = known["teacher_ids"]
    inside = torch.arange(ids.shape[-1]) < torch.from_numpy(entries.sizes)[:, None]
    inside = inside.to(ids.device)
    kept, p = log_p.gather(-1, ids).masked_fill(~inside, FLOOR), log_p.exp()
    entropy, square = -(p * log_p).sum(-1), p.square().sum(-1)
    of_ids = kept.exp()
    mass, of_kept = of_ids.sum(-1), of_ids.square().sum(-1)
    if isinstance(kind, Sampled):
        w = known["teacher_weights"].double()
        kl = torch.where(w > 0, w * (w.log() - kept), 0.0).sum(-1) + 1 - w.sum(-1)
        rest, count = torch.zeros_like(mass), torch.ones_like(mass)
    else:
        w = known["teacher_logprobs"].double().exp()
        told = log_p > FLOOR / 2  # a word that the teacher forbids is none: its logarithm says nothing of the gradient
        count = (told.sum(-1) - (inside & (kept > FLOOR / 2)).sum(-1)).double()
        rest = torch.where(count > 0, (1 - w.sum(-1)).clamp_min(0), 0.0)
        even = (rest / count.clamp_min(1)).clamp_min(1e-12)
        outside = (p.sum(-1) - mass).clamp_min(0)
        entropy_out = entropy + (kept.exp() * kept).sum(-1)  # - sum p log p outside the kept
        kl = (kept.exp() * (kept - w.clamp_min(1e-30).log())).masked_fill(~inside, 0).sum(-1)
        kl = (kl - entropy_out - outside * even.log()).clamp_min(0)
    kept = kept.masked_fill(kept < FLOOR / 2, 0)
    outside_logs = log_p.masked_fill(log_p < FLOOR / 2, 0).sum(-1) - kept.masked_fill(~inside, 0).sum(-1)
    bias = (w * kept).masked_fill(~inside, 0).sum(-1) + rest / count.clamp_min(1) * outside_logs + entropy
    near = (w - of_ids).masked_fill(~inside, 0).square().sum(-1)
    far = square - of_kept - 2 * rest / count.clamp_min(1) * (p.sum(-1) - mass) + rest.square() / count.clamp_min(1)
    return _sums(mass, kl, bias, near + far)


def of_dense(logits: Tensor, again: Tensor) -> dict[str, float]:
    """The same from logits [P, V] and the log-probabilities that will be read back."""
    log_p, log_w = log_probs(logits.float()).double(), again.to(logits.device).double()
    p, w = log_p.exp(), log_w.exp()
    bias = ((w - p) * log_p.masked_fill(log_p < FLOOR / 2, 0)).sum(-1)
    return _sums(p.sum(-1), kl_logprobs(log_p, log_w), bias, (w - p).square().sum(-1))


def _sums(mass: Tensor, kl: Tensor, bias: Tensor, spread: Tensor) -> dict[str, float]:
    told = {"mass": mass, "kl": kl, "bias": bias, "bias2": bias.square(), "spread": spread}
    return {key: float(value.sum()) for key, value in told.items()}


def report(index: "np.ndarray[tuple[int], np.dtype[np.void]]", beside: int) -> Fidelity:
    """Means over all documents of an index. beside: bytes of an index entry."""
    places = int(index["asked"].sum())
    n = max(1, places)
    sums: Mapping[str, float] = {key: float(index[key].astype(np.float64).sum()) / n for key in SUMS}
    parts = {part: float(index[part].astype(np.float64).sum()) / 8 / n for part in PARTS}
    parts["frame"] += (beside * len(index) + float(index["size"].sum())) / n - sum(parts.values())
    error = math.sqrt(max(0.0, sums["bias2"] - sums["bias"] ** 2) / n)
    ids = float(index["kept"].sum()) / n
    return Fidelity(places, ids, sums["mass"], sums["kl"], sums["bias"], error, sums["spread"], parts)
