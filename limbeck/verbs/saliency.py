"""Where a network looks: the class maps that some measures ask for, made from what the network itself shows."""

import torch
from torch import Tensor, nn

from limbeck.core.batches import Table, epoch
from limbeck.core.errors import BadInput
from limbeck.core.nets import device_of, evaluating, outputs
from limbeck.core.places import grad_cam
from limbeck.core.taps import unwrap


def maps(module: nn.Module, table: Table, *, batch_size: int = 256) -> Tensor:
    """Grad-CAM of every row and class, [N, C, H, W] on the CPU, at the network's last feature that has places."""
    if table.kind != "images":
        raise BadInput(f"saliency maps are of pictures, but {table.name} holds {table.kind}")
    device, pieces = device_of(module), []
    with evaluating(module), torch.enable_grad():
        for batch in epoch(table, batch_size):
            x = batch["inputs"].to(device).requires_grad_()  # the weights may be frozen
            out = outputs(module, {**{k: v.to(device) for k, v in batch.items()}, "inputs": x})
            pieces.append(grad_cam(out["logits"], _places(out.get("feats", ()), module)).float().cpu())
    return torch.cat(pieces)


def _places(feats: list[Tensor], module: nn.Module) -> Tensor:
    """The deepest map [B, D, H, W], or the deepest tokens [B, T, D] of a network without maps."""
    for dims in (4, 3):
        for feature in reversed(feats):
            if feature.ndim == dims:
                return feature
    raise BadInput(
        f"saliency maps need a network that returns `feats` with places, maps or tokens; "
        f"{type(unwrap(module)).__name__} returns none"
    )
