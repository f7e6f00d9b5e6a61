"""Other tasks from the same examples: several labels a picture; pairs of pictures; few labels among unlabelled and
unknown classes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from limbeck.core.batches import Splits, Table, generator
from limbeck.core.errors import BadInput, nearest

__all__ = ["DEGRADE", "UNLABELLED", "degraded", "labelled", "mosaics", "of_classes"]

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


def _blur(x: Tensor, deviation: float, _: Generator) -> Tensor:
    reach = max(1, round(3 * deviation))
    bell = torch.exp(-torch.arange(-reach, reach + 1).square() / (2 * deviation**2))
    bell = (bell / bell.sum()).expand(x.shape[1], 1, -1)
    x = F.pad(x, [reach] * 4, mode="replicate")
    return F.conv2d(F.conv2d(x, bell[..., None], groups=x.shape[1]), bell[:, :, None], groups=x.shape[1])


def _downsample(x: Tensor, factor: float, _: Generator) -> Tensor:
    small = F.interpolate(x, [max(1, round(side / factor)) for side in x.shape[-2:]], mode="area")
    return F.interpolate(small, x.shape[-2:], mode="nearest")


def _noise(x: Tensor, deviation: float, draw: Generator) -> Tensor:
    return x + deviation * torch.randn(x.shape, generator=draw)


def _grey(x: Tensor, share: float, _: Generator) -> Tensor:
    if x.shape[1] == 1:
        raise BadInput("`degrade` by grey is for pictures in colour; these have one channel")
    return x.lerp(x.mean(1, keepdim=True).expand_as(x), share)


def _edges(x: Tensor, steepness: float, _: Generator) -> Tensor:
    padded = F.pad(x, [1] * 4, mode="replicate")
    across = (padded[..., 1:-1, 2:] - padded[..., 1:-1, :-2]) / 2
    down = (padded[..., 2:, 1:-1] - padded[..., :-2, 1:-1]) / 2
    return (across.square() + down.square() > steepness**2).to(x.dtype)


# How to make a picture [N, C, H, W] worse, whose white is 1, and the usual number: deviation in pixels; how many times
# smaller; deviation of what is added; share of the colour that goes; steepness a pixel from which on there is an edge.
DEGRADE: dict[str, tuple[Callable[[Tensor, float, Generator], Tensor], float]] = {
    "blur": (_blur, 1.5),
    "downsample": (_downsample, 4.0),
    "noise": (_noise, 0.3),
    "grey": (_grey, 1.0),
    "edges": (_edges, 0.15),
}


def degraded(table: Table, spec: str | Mapping[str, float], seed: int | tuple[int, ...]) -> Table:
    """Pairs of pictures: inputs [N, C, H, W] are what `spec` makes of the pictures, labels the pictures themselves."""
    if table.kind != "images":
        raise BadInput(f"`degrade` is for pictures, but {table.name} holds {table.kind}")
    told = {spec: None} if isinstance(spec, str) else dict(spec)
    if len(told) != 1:
        raise BadInput(f"`degrade` takes one of {', '.join(DEGRADE)}, got {spec!r}")
    ((name, given),) = told.items()
    if name not in DEGRADE:
        raise BadInput(f"`degrade` knows no {name!r}{nearest(name, DEGRADE)}; it takes one of {', '.join(DEGRADE)}")
    function, usual = DEGRADE[name]
    number = usual if given is None else given
    if not number > 0:
        raise BadInput(f"`degrade` by {name} must have a number > 0, got {number}")
    x = table["inputs"]
    clean = x.float() / 255 if x.dtype == torch.uint8 else x.float()
    pieces = clean.split(4096)
    draw = generator("degrade", *(seed if isinstance(seed, tuple) else (seed,)))
    inputs = torch.cat([function(piece, number, draw) for piece in pieces]).contiguous()
    return replace(table, columns={**table.columns, "inputs": inputs, "labels": clean}, classes=None)


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
