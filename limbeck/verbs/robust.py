"""Corrupted copies of a test table for robustness curves: the same noise for every network that is compared."""

from dataclasses import replace

import torch
from torch import Tensor, nn

from limbeck.core.batches import Table, generator
from limbeck.core.evaluate import logits

SEVERITIES = 4  # besides the clean inputs
NOISE = 0.35  # of the inputs' own deviation, a severity
SWAPPED = 0.08  # share of the tokens, a severity


def stacked(module: nn.Module, table: Table) -> Tensor:
    """Logits [S, N, C] on the clean table and on rising severities of Gaussian noise, or of tokens swapped."""
    return torch.stack([logits(module, corrupted(table, s)) for s in range(SEVERITIES + 1)])


def corrupted(table: Table, severity: int) -> Table:
    """A copy of the table at a severity; 0 is the table itself."""
    if severity == 0:
        return table
    x, draw = table["inputs"], generator("corruption", severity)
    if table.kind == "tokens":
        swap = torch.rand(x.shape, generator=draw) < SWAPPED * severity
        x = torch.where(swap, torch.randint(1, max(2, table.vocab), x.shape, generator=draw), x)
    else:
        x = x + NOISE * severity * x.std() * torch.randn(x.shape, generator=draw)
    return replace(table, columns={**table.columns, "inputs": x})
