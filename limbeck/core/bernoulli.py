"""Answers of yes and no, one a class, given by logits: their divergence, and labels of several classes at once."""

from __future__ import annotations

import torch
from torch import Tensor

from limbeck.core.errors import BadInput
from limbeck.core.maths import kl, upcast


def bernoulli_kl(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """KL(Bern(sigmoid(teacher)) || Bern(sigmoid(student))) of every single logit: [...] x 2 -> [...].

    A yes of logit z is a softmax over z and 0, so this is `kl` over two classes: stable, and never negative.
    """
    student, teacher = (torch.stack([z, torch.zeros_like(z)], -1) for z in (student_logits, teacher_logits))
    return kl(student, teacher)


def multi_hot(labels: Tensor, logits: Tensor) -> Tensor:
    """Which classes are present, as 0 and 1 [..., C]: of labels in that form already, or of class indices [...]."""
    if labels.shape == logits.shape:
        return labels.to(upcast(logits).dtype)
    if labels.shape == logits.shape[:-1] and not labels.is_floating_point():
        there = labels.unsqueeze(-1) == torch.arange(logits.shape[-1], device=labels.device)
        return there.to(upcast(logits).dtype)
    raise BadInput(
        f"labels of shape {list(labels.shape)} do not fit logits of shape {list(logits.shape)}: give 0 and 1 for every "
        f"class {list(logits.shape)}, or class indices {list(logits.shape[:-1])}"
    )
