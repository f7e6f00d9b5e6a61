"""Further views of a batch, drawn while training: each as likely as another, and the same again after a resume."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from limbeck.core import augment as augmentation


def another(inputs: Tensor, augment: Sequence[object]) -> Tensor:
    """Pictures [B, C, H, W] augmented once more, with parameters from torch's generator; anything else as it is.

    augment: as in a recipe's `data: augment`.
    """
    change = augmentation.build(augment, inputs.shape[-1]) if inputs.ndim == 4 and augment else None
    if change is None:
        return inputs
    return change.apply(inputs, change.draw(torch.default_generator, len(inputs)))
