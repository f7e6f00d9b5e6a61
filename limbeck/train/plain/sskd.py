"""Both networks solve a puzzle, whose turned picture is this?, and the student learns the teacher's answers."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from limbeck.core.card import method, require
from limbeck.core.errors import BadInput
from limbeck.core.loop import Clock, Stage, Turn
from limbeck.core.match import pick
from limbeck.core.maths import upcast
from limbeck.core.nets import Batch, Nets, evaluating
from limbeck.core.reduce import mean
from limbeck.losses.logits.ce import ce
from limbeck.losses.logits.kd import kd

TURNED = 3  # by 90, 180 and 270 degrees


@method(
    paper="Xu et al. 2020, eq. 3-8",
    year=2020,
    arxiv="2006.07114",
    code="xuguodong03/SSKD@661b972:student.py",
    differs="a picture is turned after it was augmented, the code augments each turned copy by itself; of equally bad "
    "mistakes of the teacher the earlier in the batch is kept",
)
@dataclass(frozen=True)
class SSKD:
    """ce_weight CE + kd_weight KD + turned_weight KD of turned pictures + puzzle_weight KD of the puzzle's answers.

    Every picture comes with three turned copies. A two-layer head on each embedding gives z; the answer to "whose copy
    is i?" is softmax over the batch's upright pictures j of cos(z_i, z_j) / T. First the teacher's head learns the
    puzzle by itself, then the student, with a head of its own, learns. Where the teacher is wrong, by the class of a
    turned picture or in the puzzle, only its best-ranked mistakes are kept. KD is T^2 KL(teacher || student); heads are
    dropped.

    ce_weight, kd_weight, turned_weight, puzzle_weight: of the four parts, >= 0.
    temperature: of the classes, > 0. puzzle_temperature: > 0; the teacher's head learns at 1, as in the code.
    turned_ratio, puzzle_ratio: share of the teacher's mistakes that is kept, in [0, 1].
    pretext: length of the first stage in units of the second, > 0; 60 of 240 epochs in the paper.

    *Needs*: square pictures that are not mirrored or turned as a class of their own; embeddings of both networks.
    *Relates to*: use it with few or noisy labels. `crd` contrasts without turned copies, at a quarter of the time.
    """

    ce_weight: float = 0.1
    kd_weight: float = 0.9
    turned_weight: float = 2.7
    puzzle_weight: float = 10.0
    temperature: float = 4.0
    puzzle_temperature: float = 0.5
    turned_ratio: float = 1.0
    puzzle_ratio: float = 0.75
    pretext: float = 0.25

    def __post_init__(self) -> None:
        for name in ("ce_weight", "kd_weight", "turned_weight", "puzzle_weight"):
            require(getattr(self, name) >= 0, name, getattr(self, name), ">= 0")
        for name in ("temperature", "puzzle_temperature", "pretext"):
            require(getattr(self, name) > 0, name, getattr(self, name), "> 0")
        for name in ("turned_ratio", "puzzle_ratio"):
            require(0 <= getattr(self, name) <= 1, name, getattr(self, name), "in [0, 1]")

    def setup(self, nets: Nets, probe: Batch) -> None:
        """A head for each network."""
        shape = probe["inputs"].shape
        if len(shape) != 4 or shape[2] != shape[3]:
            raise BadInput(f"`sskd` turns pictures by 90 degrees, so they must be square, got inputs {tuple(shape)}")
        with torch.no_grad(), evaluating(*nets.modules.values()):
            widths = {who: _told(nets, who, probe)[1].shape[1] for who in ("teacher", "student")}
        nets.puzzlers = nn.ModuleDict({who: _head(width) for who, width in widths.items()})
        nets.companions["student"] = ["puzzlers.student"]

    def stages(self, nets: Nets, steps: int) -> Iterator[Stage]:
        """The teacher's head, then the student."""
        first = max(1, round(self.pretext * steps))
        yield Stage(first, "pretext", until=self.pretext / (1 + self.pretext), validated=False)
        nets.freeze("puzzlers.teacher")
        yield Stage(steps, "student")

    def step(self, nets: Nets, batch: Batch, clock: Clock) -> Iterator[Turn]:
        """One turn of the teacher's head or of the student."""
        views = {**batch, "inputs": turned(batch["inputs"])}
        mask = batch.get("mask")
        real = torch.ones_like(batch["labels"], dtype=torch.bool) if mask is None else mask.bool()
        owner = torch.arange(len(real), device=real.device).repeat_interleave(TURNED)
        logits, emb = _told(nets, "teacher", views)
        answers = puzzle(nets.puzzlers["teacher"](emb), real)
        if clock.stage == 0:
            yield "puzzlers.teacher", mean(ce(answers, owner), real[owner])
            return
        said, own = _told(nets, "student", views)
        guesses = puzzle(nets.puzzlers["student"](own), real)
        (upright, copies), (right, turned_) = _split(said), _split(logits)
        labels = batch["labels"]
        kept = trusted(turned_, labels[owner], self.turned_ratio, real[owner])
        solved = trusted(answers, owner, self.puzzle_ratio, real[owner])
        of_copies = kd(copies, turned_, temperature=self.temperature)
        of_puzzle = kd(guesses, answers, temperature=self.puzzle_temperature)
        yield (
            "student",
            {
                "ce": self.ce_weight * mean(ce(upright, labels), mask),
                "kd": self.kd_weight * mean(kd(upright, right, temperature=self.temperature), mask),
                "turned": self.turned_weight * mean(of_copies, kept),
                "puzzle": self.puzzle_weight * mean(of_puzzle, solved),
            },
        )


def turned(pictures: Tensor) -> Tensor:
    """Each picture and its three turned copies, one after the other: [B, ...] -> [4 B, ...]."""
    return torch.stack([torch.rot90(pictures, k, (2, 3)) for k in range(TURNED + 1)], 1).flatten(0, 1)


def _split(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Those of upright pictures [B, ...] and those of turned ones [3 B, ...]."""
    each = rows.unflatten(0, (-1, TURNED + 1))
    return each[:, 0], each[:, 1:].flatten(0, 1)


def puzzle(z: Tensor, real: Tensor) -> Tensor:
    """Cosine of each turned picture with each upright one [3 B, B]; -inf to those that do not count."""
    upright, copies = (F.normalize(upcast(x)) for x in _split(z))
    return (copies @ upright.mT).masked_fill(~(real | ~real.any()), -torch.inf)


def trusted(logits: Tensor, truth: Tensor, ratio: float, real: Tensor) -> Tensor:
    """True where the teacher is right, and at the share `ratio` of its mistakes where the truth ranks highest."""
    rank = (logits > logits.gather(1, truth.unsqueeze(1))).sum(1)
    rank = torch.where(real, rank, logits.shape[1] + 1)
    wrong = real & (rank > 0)
    place = rank.argsort(stable=True).argsort()
    return real & (place < (real & ~wrong).sum() + (wrong.sum() * ratio).long())


def _told(nets: Nets, who: str, batch: Batch) -> tuple[Tensor, Tensor]:
    """Logits, and embeddings [B, D]."""
    have = {f"{who}_{k}": v for k, v in nets.run(who, batch).items()}
    return have[f"{who}_logits"], pick("sskd", f"{who}_emb", have).flatten(1)


def _head(width: int) -> nn.Module:
    return nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width))
