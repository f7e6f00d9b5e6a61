"""Other tasks from the same examples: several labels a picture; few labels among unlabelled and unknown classes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from limbeck.core.batches import Splits, Table, generator
from limbeck.core.errors import BadInput, nearest

__all__ = ["UNLABELLED", "labelled", "mosaics", "of_classes"]

UNLABELLED = -100  # what losses on labels leave out


def _classes(table: Table, option: str) -> Tensor:
    """The class labels [N] of a table. Raises BadInput when it has none."""
    labels = table.columns.get("labels")
    if labels is None or labels.ndim != 1 or not table.num_classes:
        raise BadInput(f"`{option}` needs one class label an example, and {table.name} has none")
    return labels


def mosaics(table: Table, side: int, seed: int) -> Table:
    """As many pictures [N, C, side H, side W] as there were, each put together from side x side of them.

    Labels say 0 or 1 of every class, float [N, classes]. A picture comes once in each place.
    """
    labels = _classes(table, "mosaic")
    if table.kind != "images":
        raise BadInput(f"`mosaic` is for pictures, but {table.name} holds {table.kind}")
    if (labels < 0).any():
        raise BadInput(f"`mosaic` needs a label for every picture of {table.name}; leave `known` out")
    if not len(table):
        return replace(table, columns={**table.columns, "labels": labels.new_zeros(0, table.num_classes).float()})
    draw = generator(seed, "mosaic")
    order = torch.stack([torch.randperm(len(table), generator=draw) for _ in range(side * side)], 1)
    x = table["inputs"][order].unflatten(1, (side, side))  # [N, row, column, C, H, W]
    inputs = x.permute(0, 3, 1, 4, 2, 5).flatten(4).flatten(2, 3).contiguous()
    present = F.one_hot(labels[order], table.num_classes).amax(1).float()
    return replace(table, columns={"inputs": inputs, "labels": present}, rows=None)


def of_classes(splits: Splits, wanted: Sequence[int | str]) -> Splits:
    """The task of telling the wanted classes apart, numbered anew in that order.

    Training examples of the others stay, unlabelled; validation and test hold none of them.
    """
    labels, names = (
        _classes(splits.train, "known"),
        splits.train.classes or list(map(str, range(splits.train.num_classes))),
    )
    chosen = []
    for c in wanted:
        if c not in names and not (isinstance(c, int) and 0 <= c < len(names)):
            raise BadInput(f"`known` names the class {c!r}, which {splits.train.name} lacks{nearest(str(c), names)}")
        chosen.append(names.index(c) if c in names else int(c))
    if len(set(chosen)) < max(2, len(chosen)):
        raise BadInput(f"`known` needs at least two classes, and none twice, got {list(wanted)}")
    number = torch.full((len(names),), UNLABELLED, dtype=labels.dtype)
    number[chosen] = torch.arange(len(chosen), dtype=labels.dtype)
    said = [names[c] for c in chosen]

    def renamed(table: Table, keep: bool) -> Table:
        mine = number[table["labels"]]
        told = replace(table, columns={**table.columns, "labels": mine}, classes=said)
        return told if keep else told.select((mine != UNLABELLED).nonzero()[:, 0])

    return Splits(*(renamed(table, table is splits.train) for table in splits))


def labelled(table: Table, count: int, seed: int) -> Table:
    """The table where `count` examples of each class keep their label; that of all others is `UNLABELLED`."""
    labels = _classes(table, "labelled")
    rank = torch.randperm(len(table), generator=generator(seed, "labelled"))
    kept = torch.full_like(labels, UNLABELLED)
    for c in range(table.num_classes):
        members = (labels == c).nonzero()[:, 0]
        if len(members) < count:
            raise BadInput(f"labelled {count} is more than class {c} of {table.name} has: {len(members)}")
        kept[members[rank[members].argsort()[:count]]] = c
    return replace(table, columns={**table.columns, "labels": kept})
