"""A training set shared out among tasks and clients, as pure functions of labels and row numbers."""

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.distributions import Dirichlet

from limbeck.core.errors import BadInput
from limbeck.core.names import NAMES
from limbeck.core.nets import evaluating


def by_class(labels: Tensor, tasks: int) -> dict[str, Tensor]:
    """Rows of task0, task1, ...: the classes in order, as evenly shared out as their number allows.

    labels: [N] class indices.
    """
    classes = labels.unique()
    if tasks > len(classes):
        raise BadInput(f"{len(classes)} classes cannot be shared out over {tasks} tasks; give at most {len(classes)}")
    groups = classes.tensor_split(tasks)
    return {f"task{k}": torch.isin(labels, group).nonzero()[:, 0] for k, group in enumerate(groups)}


def by_client(index: Tensor, labels: Tensor, shares: Tensor) -> Tensor:
    """The client of each example, in [0, K): always the same for the same example.

    index: [B] row numbers. labels: [B] classes. shares: [C, K], each class's distribution over the clients.
    """
    place = mixed(0, index.cpu().numpy()).astype(np.float64) / 2.0**64
    limits = shares.double().cpu().cumsum(1)[labels.cpu()]
    client = (torch.from_numpy(place)[:, None] >= limits).sum(1).clamp_max(shares.shape[1] - 1)
    return client.to(labels.device)


def rows(batch: Mapping[str, Any], index: Tensor) -> dict[str, Any]:
    """Some examples of a batch, or some several times over. index: [K], positions in the batch."""
    size = len(batch["inputs"])
    return {k: v[index] if _of_examples(k, v) and len(v) == size else v for k, v in batch.items()}


def only(batch: Mapping[str, Any], mine: Tensor) -> dict[str, Any]:
    """The examples that `mine` [B] names; where it names none, one that does not count, so that turns stay the same."""
    some = bool(mine.any())
    own = rows(batch, mine.nonzero()[:, 0] if some else torch.zeros_like(mine[:1], dtype=torch.long))
    if not some:
        own["mask"] = torch.zeros_like(own.get("labels", mine[:1]), dtype=torch.bool)
    return own


def quiet(network: nn.Module, batch: Mapping[str, Any]) -> AbstractContextManager[None]:
    """Eval mode for a single row, which may be another's and not count: the statistics of no layer may learn it."""
    return evaluating(network) if len(batch["inputs"]) < 2 else nullcontext()


def _of_examples(name: str, column: Any) -> bool:
    """Whether what goes by a name has a row an example; names that nobody knows are taken to have."""
    return isinstance(column, Tensor) and column.ndim > 0 and NAMES.get(name, "B")[0].startswith(("B", "..."))


class Clients(nn.Module):
    """Who has which examples, and how many of each class everyone has trained on; all a server learns of the data.

    clients: K. classes: C. alpha: where the data do not say whose they are, each class is shared out over the clients
    by a draw from Dirichlet(alpha), by torch's global generator.
    """

    counts: Tensor
    shares: Tensor

    def __init__(self, clients: int, classes: int, alpha: float) -> None:
        super().__init__()
        self.register_buffer("counts", torch.zeros(clients, classes))
        self.register_buffer("shares", Dirichlet(torch.full((clients,), alpha)).sample((classes,)))

    @torch.no_grad()
    def meet(self, batch: Mapping[str, Tensor]) -> Tensor:
        """The client [B] of each example of a batch, whose labels are counted."""
        labels = batch["labels"]
        whose = batch["domain"] if "domain" in batch else by_client(batch["index"], labels, self.shares)
        self.counts.index_put_((whose, labels), torch.ones_like(labels, dtype=self.counts.dtype), accumulate=True)
        return whose

    @property
    def weights(self) -> Tensor:
        """Each client's part of all examples: [K], sum 1."""
        return self.counts.sum(1) / self.counts.sum()

    @property
    def knowledge(self) -> Tensor:
        """Each client's part of a class: [K, C], sum 1 over the clients for every class that has come."""
        return self.counts / self.counts.sum(0).clamp_min(1)


def mixed(*parts: Any) -> NDArray[np.uint64]:
    """A pseudo-random 64-bit number for every combination of whole numbers or arrays of them (splitmix64)."""
    with np.errstate(over="ignore"):
        x = np.zeros((), np.uint64)
        for part in parts:
            x = (x ^ np.asarray(part).astype(np.uint64)) + np.uint64(0x9E3779B97F4A7C15)
            x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            x = x ^ (x >> np.uint64(31))
    return np.asarray(x)
