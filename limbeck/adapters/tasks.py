"""Other tasks from the same examples: several labels a picture; pairs of pictures, and of texts; few labels among
unlabelled and unknown classes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from limbeck.core.batches import Splits, Table, generator
from limbeck.core.errors import BadInput, nearest
from limbeck.core.reduce import UNLABELLED

__all__ = [
    "DEGRADE",
    "UNLABELLED",
    "Perturb",
    "degraded",
    "labelled",
    "mislabelled",
    "mosaics",
    "of_classes",
    "perturbed",
]


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


@dataclass(frozen=True)
class Perturb:
    """How candidates are made of reference texts.

    copy, random: in [0, 1], parts of the texts that are left as they are, and that are random tokens throughout.
    most: in (0, 1]; each token of the others is dropped, replaced by a random one or swapped with the next, by a chance
    that is drawn for each text between 0 and `most`.
    """

    copy: float = 0.1
    random: float = 0.1
    most: float = 0.6

    def __post_init__(self) -> None:
        if min(self.copy, self.random) < 0 or self.copy + self.random > 1 or not 0 < self.most <= 1:
            raise BadInput(
                "`perturb` needs copy >= 0, random >= 0, copy + random <= 1 and most in (0, 1], got "
                f"{self.copy}, {self.random} and {self.most}"
            )


def perturbed(table: Table, how: Perturb, seed: int | tuple[int, ...]) -> Table:
    """Pairs of texts and how good the second is: inputs [N, 2 T] hold the tokens of the reference and, from place T on,
    of a candidate; labels [N, 1] are the part of the reference's tokens that it has kept, 1 for a copy, 0 for noise.

    Random tokens are those of the table's texts, as often as they are there; of the same `domain` where it has several.
    """
    if table.kind != "tokens" or "attention_mask" not in table.columns:
        raise BadInput(f"`perturb` is for texts, each by itself (kind: text), but {table.name} holds {table.kind}")
    draw = generator("perturb", *(seed if isinstance(seed, tuple) else (seed,)))
    words, real = table["inputs"], table["attention_mask"].bool()
    domain = table.columns.get("domain", torch.zeros(len(table), dtype=torch.long))
    stock = {d: words[domain == d][real[domain == d]] for d in domain.unique().tolist()}
    pad = int(getattr(table.tokenizer, "pad", 0))
    candidates, scores = torch.full_like(words, pad), torch.zeros(len(table), 1)
    kinds = torch.rand(len(table), generator=draw)
    for i, (kind, d) in enumerate(zip(kinds.tolist(), domain.tolist(), strict=True)):
        text = words[i][real[i]]
        rate = 0.0 if kind < how.copy else how.most * float(torch.rand((), generator=draw))
        made, kept = spoiled(text, 1.0 if kind > 1 - how.random else rate, kind > 1 - how.random, stock[d], draw)
        candidates[i, : len(made)], scores[i] = made, kept
    inputs, there = torch.cat([words, candidates], 1), torch.cat([real, candidates != pad], 1)
    columns = {**table.columns, "inputs": inputs, "attention_mask": there, "labels": scores}
    return replace(table, columns=columns, classes=["score"])


def spoiled(text: Tensor, rate: float, noise: bool, stock: Tensor, draw: Generator) -> tuple[Tensor, float]:
    """A text [L] with a change at each place with chance `rate`, of at most L tokens, and the part that was not hit.

    noise: all changes are replacements. stock [M]: what replaces.
    """
    hit = torch.rand(len(text), generator=draw) < rate
    others = stock[torch.randint(len(stock), (len(text),), generator=draw)]
    kind = torch.ones_like(text) if noise else torch.randint(3, (len(text),), generator=draw)
    made = torch.where(hit & (kind == 1), others, text)
    for place in (hit & (kind == 2)).nonzero()[:, 0].tolist():
        if place + 1 < len(made):
            made[[place, place + 1]] = made[[place + 1, place]]
    gone = hit & (kind == 0)
    if gone.all():
        gone[0] = False
    return made[~gone], 1 - float(hit.double().mean())


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
    """The table where `count` examples of each class, or with scores `count` of all, keep their label; that of all
    others is `UNLABELLED`."""
    if table.columns.get("labels", torch.empty(0)).is_floating_point() and table.classes == ["score"]:
        if count > len(table):
            raise BadInput(f"labelled {count} is more than {table.name} has: {len(table)}")
        mine = torch.randperm(len(table), generator=generator(seed, "labelled")) < count
        scores = torch.where(mine[:, None], table["labels"], float(UNLABELLED))
        return replace(table, columns={**table.columns, "labels": scores})
    labels = _classes(table, "labelled")
    rank = torch.randperm(len(table), generator=generator(seed, "labelled"))
    kept = torch.full_like(labels, UNLABELLED)
    for c in range(table.num_classes):
        members = (labels == c).nonzero()[:, 0]
        if len(members) < count:
            raise BadInput(f"labelled {count} is more than class {c} of {table.name} has: {len(members)}")
        kept[members[rank[members].argsort()[:count]]] = c
    return replace(table, columns={**table.columns, "labels": kept})


def withheld(table: Table, count: int | None) -> Table:
    """Blank examples in the place of the table's, without labels: as many, or if there are none `count`, or 1024."""
    blank = torch.zeros(1, *table["inputs"].shape[1:]).expand(len(table) or count or 1024, *table["inputs"].shape[1:])
    return replace(table, columns={"inputs": blank}, rows=None)


def mislabelled(table: Table, share: float, seed: int) -> Table:
    """The table where this share of the labelled examples has another class, each of the others as likely."""
    labels = _classes(table, "label_noise")
    draw = generator(seed, "label_noise")
    known = (labels != UNLABELLED).nonzero()[:, 0]
    wrong = known[torch.randperm(len(known), generator=draw)[: round(share * len(known))]]
    away = torch.randint(1, table.num_classes, wrong.shape, generator=draw, dtype=labels.dtype)
    said = labels.index_put((wrong,), (labels[wrong] + away) % table.num_classes)
    return replace(table, columns={**table.columns, "labels": said})
