"""What methods share in which one network makes pictures and another judges whether they are real."""

import torch
from torch import Tensor

from limbeck.core.errors import BadInput
from limbeck.core.features import per_example
from limbeck.core.maths import upcast
from limbeck.core.nets import Batch, Nets, evaluating


def hinge(scores: Tensor) -> Tensor:
    """Mean of max(0, 1 - score): [B, ...] -> [B]."""
    return per_example((1 - scores).clamp_min(0))


def shown(inputs: Tensor, picture: Tensor, paired: bool) -> Tensor:
    """What the discriminator gets: the picture, and before it the input where that is `paired` with it."""
    return torch.cat([inputs, picture], 1) if paired else picture


def verdict(nets: Nets, inputs: Tensor, picture: Tensor, paired: bool) -> Tensor:
    """How real the discriminator takes each place of a picture to be: [B, ...]."""
    return upcast(nets.run("discriminator", {"inputs": shown(inputs, picture, paired)})["logits"])


def check_pictures(nets: Nets, painter: str, probe: Batch) -> None:
    """Raise BadInput unless labels are pictures, and a network makes pictures of their size."""
    labels = probe["labels"]
    if labels.ndim != 4:
        raise BadInput(f"labels must be pictures [B, C, H, W], as `degrade` makes them, got {list(labels.shape)}")
    with torch.no_grad(), evaluating(*nets.modules.values()):
        made = nets.run(painter, probe)["logits"].shape
    if made != labels.shape:
        raise BadInput(
            f"the {painter} makes {list(made[1:])} of an input, the labels are pictures {list(labels.shape[1:])}"
        )
