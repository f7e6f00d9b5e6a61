"""Several networks that speak as one."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from limbeck.core.errors import BadInput
from limbeck.core.maths import FLOOR, upcast
from limbeck.core.nets import outputs


def mean_logits(logits: Tensor, weights: Tensor | None = None) -> Tensor:
    """Log of the weighted mean of the members' probabilities: [M, ..., C] -> [..., C].

    weights: [M, ...], summing to 1 over the members; all alike when None.
    """
    logp = torch.log_softmax(upcast(logits), -1)
    share = torch.full_like(logp[..., 0], 1 / len(logits)) if weights is None else weights.to(logp)
    return torch.logsumexp(logp + share.log().clamp_min(FLOOR).unsqueeze(-1), 0)


class Ensemble(nn.Module):
    """Gives {"logits"}: the log of the mean of its members' probabilities."""

    def __init__(self, members: Iterable[nn.Module]) -> None:
        super().__init__()
        self.members = nn.ModuleList(members)
        if not self.members:
            raise BadInput("an ensemble needs at least one member, got none")

    def forward(self, inputs: Tensor) -> dict[str, Any]:
        """[B, ...] -> {"logits": [B, ..., C]}, normalised."""
        return {"logits": mean_logits(torch.stack([outputs(m, {"inputs": inputs})["logits"] for m in self.members]))}
