"""How well each network does on the data, and how far one is from the other."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from limbeck.adapters.pieces import lengths
from limbeck.core.batches import Table
from limbeck.core.errors import BadInput
from limbeck.core.evaluate import logits as predict
from limbeck.core.maths import kl
from limbeck.core.vocabularies import real_words
from limbeck.outlook.facts import Outlook, Side
from limbeck.recipe import Net, Recipe
from limbeck.verbs.setting import HELD
from limbeck.zoo.nets import is_transformers

BINS = 15  # of confidence, for the calibration error
SLICE = 2**22  # logits worked on at once, 32 MB in double precision


@dataclass
class Sums:
    """What is added up over places. nll, count: by row [N]; gap: confidence less accuracy, by bin of confidence."""

    nll: Tensor
    count: Tensor
    right: float = 0.0
    confidence: float = 0.0
    entropy: float = 0.0
    dropped: float = 0.0
    gap: Tensor = field(default_factory=lambda: torch.zeros(BINS, dtype=torch.float64))

    @staticmethod
    def of(rows: int) -> Sums:
        """For so many rows, nothing added yet."""
        return Sums(torch.zeros(rows, dtype=torch.float64), torch.zeros(rows, dtype=torch.float64))

    def add(self, logits: Tensor, labels: Tensor, rows: Tensor) -> None:
        """logits [M, C], labels [M], and of which row each is, [M]."""
        log_p = logits.double().log_softmax(-1)
        confidence, choice = log_p.exp().max(-1)
        right = (choice == labels).double()
        self.nll.index_add_(0, rows, -log_p.gather(-1, labels.unsqueeze(-1)).squeeze(-1))
        self.count += torch.bincount(rows, minlength=len(self.count))
        self.right += float(right.sum())
        self.confidence += float(confidence.sum())
        self.entropy += float(-(log_p.exp() * log_p).nan_to_num(0.0).sum())
        self.gap.index_add_(0, (confidence * BINS).ceil().long().clamp(1, BINS) - 1, confidence - right)

    def side(self, name: str, module: nn.Module) -> Side:
        total = float(self.count.sum())
        return Side(
            name,
            sum(p.numel() for p in module.parameters()),
            float(self.nll.sum()) / total,
            self.right / total,
            float(self.gap.abs().sum()) / total,
            self.confidence / total,
            self.entropy / total,
            self.dropped / total,
        )


def _stretches(table: Table) -> Iterator[tuple[int, Table]]:
    """The table in stretches of rows whose logits are held at once, and the number of the first row of each."""
    labels = table.columns.get("labels")
    if labels is None or labels.is_floating_point() or labels.ndim > 2:
        raise BadInput(f"doctor compares networks on class labels or on text, and {table.name} has neither")
    places = labels.shape[1] if labels.ndim == 2 else 1
    rows = max(1, HELD // 4 // max(1, places * (table.num_classes or table.vocab)))
    for start in range(0, len(table), rows):
        yield start, table.select(range(start, min(start + rows, len(table))))


def _slices(logits: Tensor) -> Iterator[slice]:
    """Stretches of places [M, C] that are small enough to be worked on in double precision."""
    size = max(1, SLICE // logits.shape[-1])
    yield from (slice(at, at + size) for at in range(0, len(logits), size))


def _places(table: Table) -> Tensor:
    """Which labels count, in the shape of the labels."""
    labels = table["labels"]
    valid = labels >= 0
    return valid & table.columns["mask"].bool() if "mask" in table.columns and labels.ndim == 2 else valid


def _told(module: nn.Module, table: Table) -> tuple[Tensor, Tensor, Tensor]:
    """Logits [M, C] and labels [M] at the places that count, and the row of each."""
    valid = _places(table)
    said = predict(module, table)
    if said.shape[:-1] != valid.shape:
        raise BadInput(f"a network gives logits {tuple(said.shape)} for labels {tuple(valid.shape)} of {table.name}")
    return said[valid], table["labels"][valid], valid.nonzero()[:, 0]


def figures(recipe: Recipe, networks: Mapping[str, nn.Module], table: Table, train: Table, top_k: int) -> Outlook:
    """All that is told of `table`; networks: student and teacher; train: rows of the training part."""
    two = table.teacher_tokenizer is not None
    sums = {role: Sums.of(len(table)) for role in networks}
    between: dict[str, float] = dict.fromkeys(("forward", "reverse", "top1", "topk"), 0.0)
    k = top_k
    for first, part in _stretches(table):
        told = {"student": _told(networks["student"], part), "teacher": _told(networks["teacher"], part.retold())}
        if not two:
            k = _compare(told, part, sums, between, top_k)
        for role, (logits, labels, rows) in told.items():
            for some in _slices(logits):
                sums[role].add(logits[some], labels[some], rows[some] + first)
    count = float(sums["student"].count.sum())
    if not count:
        raise BadInput(f"{table.name} has no labels to look at")
    sides = {role: sums[role].side(_title(recipe, role), net) for role, net in networks.items()}
    size, scale = sums["student"].count, {"student": 1.0, "teacher": 1.0}
    if table.kind == "tokens" and table["labels"].ndim == 2 and (sizes := _bytes(table)) is not None:
        other = _bytes(table.retold()) if two else sizes
        for role, length in (("student", sizes), ("teacher", other)):
            assert length is not None
            bits = float(sums[role].nll.sum()) / math.log(2) / float(length.sum())
            sides[role] = replace(sides[role], bits_per_byte=bits)
            scale[role] = float(sizes.sum() / length.sum()) / math.log(2) if two else 1.0
        size = sizes if two else size
    gain, noise = _mean(sums["student"].nll * scale["student"] - sums["teacher"].nll * scale["teacher"], size)
    guesses, places = _guesses(train.retold(), table.retold()), sums["teacher"].count
    _, guess_noise = _mean(guesses - sums["teacher"].nll, places)
    share = {name: value / count for name, value in between.items()}
    return Outlook(
        table.name,
        "",
        len(table),
        int(count),
        sides["teacher"],
        sides["student"],
        _is_fresh(recipe.student),
        float(guesses.sum() / places.sum()),
        guess_noise,
        gain,
        noise,
        _sharpness(networks["teacher"], train),
        None if two else share["forward"],
        None if two else share["reverse"],
        None if two else share["top1"],
        None if two else share["topk"],
        k,
    )


def _compare(
    told: dict[str, tuple[Tensor, Tensor, Tensor]],
    part: Table,
    sums: Mapping[str, Sums],
    between: dict[str, float],
    top_k: int,
) -> int:
    """Add up divergences and overlaps of the first k choices; returns k. Leaves the logits of real words in `told`."""
    mine, theirs = told["student"][0], told["teacher"][0]
    text = part.kind == "tokens" and part["labels"].ndim == 2
    if not text and mine.shape[-1] != theirs.shape[-1]:
        counts = f"the student tells {mine.shape[-1]} classes apart and the teacher {theirs.shape[-1]}"
        raise BadInput(f"{counts}: both must know the same classes in the same order")
    words = min(part.vocab if text else mine.shape[-1], mine.shape[-1], theirs.shape[-1])
    k = min(top_k, max(1, words // 2))  # all of them would always agree
    for some in _slices(mine):
        student, teacher, lost, lost_too = real_words(mine[some].double(), theirs[some].double(), words)
        sums["student"].dropped += float(lost.sum())
        sums["teacher"].dropped += float(lost_too.sum())
        between["forward"] += float(kl(student, teacher).sum())
        between["reverse"] += float(kl(teacher, student).sum())
        ours, others = student.topk(k, -1).indices, teacher.topk(k, -1).indices
        between["top1"] += float((ours[:, 0] == others[:, 0]).double().sum())
        between["topk"] += float((ours.unsqueeze(-1) == others.unsqueeze(-2)).any(-1).double().mean(-1).sum())
    for role in told:
        told[role] = (told[role][0][:, :words], *told[role][1:])
    return k


def _title(recipe: Recipe, role: str) -> str:
    spec: Net | None = getattr(recipe, role)
    assert spec is not None
    return spec.title


def _is_fresh(spec: Net | None) -> bool:
    """Whether a student starts from random weights, so that its loss says nothing of what it will reach."""
    assert spec is not None
    return spec.weights in (None, "random") and not is_transformers(spec.net) and not spec.options.get("pretrained")


def _bytes(table: Table) -> Tensor | None:
    """Bytes of text that the counted labels of each row stand for; None where the tokenizer does not say."""
    size = lengths(table.tokenizer, table["labels"])
    told = None if size is None else (size * _places(table)).sum(1).double()
    return told if told is not None and float(told.sum()) > 0 else None


def _guesses(train: Table, table: Table) -> Tensor:
    """Nats of the labels of each row, for one who knows how often each comes in training, and looks at nothing: [N]."""
    seen, valid = train["labels"][_places(train)], _places(table)
    asked, rows = table["labels"][valid], valid.nonzero()[:, 0]
    size = max(train.num_classes or train.vocab, int(seen.max()) + 1, int(asked.max()) + 1)
    often = torch.bincount(seen, minlength=size).double() + 1
    nll = -(often / often.sum()).log()[asked]
    return torch.zeros(len(table), dtype=torch.float64).index_add_(0, rows, nll)


def _mean(sums: Tensor, sizes: Tensor) -> tuple[float, float]:
    """The mean of rows of different sizes, and its standard error: rows are drawn, not labels."""
    mean = float(sums.sum() / sizes.sum())
    return mean, float((sums - mean * sizes).square().sum().sqrt() / sizes.sum())


def _sharpness(teacher: nn.Module, train: Table) -> float:
    """Entropy of what the teacher says of training examples, as a share of the largest possible."""
    total, count, classes = 0.0, 0, 2
    for _, part in _stretches(train):
        said, _, _ = _told(teacher, part.retold())
        for some in _slices(said):
            log_p = said[some].double().log_softmax(-1)
            total += float(-(log_p.exp() * log_p).nan_to_num(0.0).sum())
        count, classes = count + len(said), max(2, said.shape[-1])
    return total / max(1, count) / math.log(classes)
