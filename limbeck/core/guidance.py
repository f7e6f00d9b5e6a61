"""Repeated self-distillation of kernel ridge regression in closed form (Borup and Andersen 2021).

Each step fits y_k = a y + (1 - a) f_{k-1}(X), where f_0(X) = y, by kernel ridge regression: f_k = A y_k with
A = K (K + ridge I)^-1 on the training points. It is affine in a, and converges to an ordinary ridge of strength
ridge / a; with a = 0 it fades to 0.
"""

from __future__ import annotations

import torch
from torch import Tensor

from limbeck.core.card import require


def generations(
    kernel: Tensor, targets: Tensor, *, ridge: float, guidance: float, steps: int, cross: Tensor | None = None
) -> Tensor:
    """What each of `steps` fits says: [N, N], [N, ...] -> [steps, N, ...], by one eigendecomposition.

    kernel: K of the training points. targets: y. ridge: > 0. guidance: a in [0, 1]. steps: >= 1. cross: kernel [M, N]
    of other points with the training points, of which the fits are then told, [steps, M, ...].
    """
    require(ridge > 0, "ridge", ridge, "> 0")
    require(0 <= guidance <= 1, "guidance", guidance, "in [0, 1]")
    require(steps >= 1, "steps", steps, ">= 1")
    values, vectors = torch.linalg.eigh(kernel)
    shrink = values / (values + ridge)
    spread = (vectors.mT @ targets.flatten(1) if targets.ndim > 1 else vectors.mT @ targets.unsqueeze(1)).mT  # [P, N]
    factor, told = torch.ones_like(values), []
    for _ in range(steps):
        wanted = guidance + (1 - guidance) * factor  # of y_k, in the eigenbasis
        factor = shrink * wanted
        if cross is None:
            told.append(vectors @ (factor * spread).mT)
        else:
            told.append(cross @ (vectors @ (wanted / (values + ridge) * spread).mT))
    out = torch.stack(told)
    return out.view(steps, out.shape[1], *targets.shape[1:])


def limit(kernel: Tensor, targets: Tensor, *, ridge: float, guidance: float, cross: Tensor | None = None) -> Tensor:
    """What the fits converge to: the ridge ridge / guidance, of `targets` themselves; 0 without guidance."""
    told = kernel if cross is None else cross
    eye = torch.eye(len(kernel), dtype=kernel.dtype, device=kernel.device)
    weights: Tensor = torch.linalg.solve(guidance * kernel + ridge * eye, targets.reshape(len(targets), -1))
    return (guidance * told @ weights).view(len(told), *targets.shape[1:])


def best_guidance(wanted: Tensor, by_labels: Tensor, by_teacher: Tensor) -> Tensor:
    """The a in [0, 1] at which a by_labels + (1 - a) by_teacher is nearest to `wanted`: [...] x 3 -> [].

    wanted: targets of validation examples, such as one-hot labels. by_labels, by_teacher: predictions for them of a
    student that learned from labels alone, and of one that learned from the generation before alone; of networks it is
    an estimate, of ridge regression exact. 1 where the two agree everywhere.
    """
    lead = by_labels - by_teacher
    length = lead.square().sum()
    best = ((wanted - by_teacher) * lead).sum() / length.clamp_min(torch.finfo(length.dtype).tiny)
    return torch.where(length > 0, best.clamp(0, 1), 1.0)
