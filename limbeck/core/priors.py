"""What one may suppose of any picture, before a network is asked: neighbours are alike, and values are small."""

import torch
from torch import Tensor

from limbeck.core.maths import upcast


def total_variation(images: Tensor) -> Tensor:
    """Sum over the four directions of the length of all differences of neighbours: [B, C, H, W] -> [].

    Directions are right, down and the two diagonals; the length is Euclidean over the whole batch, as in DeepInversion.
    """
    x = upcast(images)
    right, down = x[..., :, :-1] - x[..., :, 1:], x[..., :-1, :] - x[..., 1:, :]
    rising, falling = x[..., 1:, :-1] - x[..., :-1, 1:], x[..., :-1, :-1] - x[..., 1:, 1:]
    return sum((torch.linalg.vector_norm(d) for d in (right, down, rising, falling)), x.new_zeros(()))


def magnitude(images: Tensor) -> Tensor:
    """Mean over the batch of the Euclidean length of a picture: [B, ...] -> []."""
    length: Tensor = torch.linalg.vector_norm(upcast(images).flatten(1), dim=1)
    return length.mean()
