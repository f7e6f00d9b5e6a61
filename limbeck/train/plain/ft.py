"""A paraphraser first learns to put the teacher's feature into few words; the student then learns to say the same."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from limbeck.core.card import method, require
from limbeck.core.features import Shape, as_map, per_example, pick, same_places, width
from limbeck.core.loop import Clock, Stage, Turn
from limbeck.core.match import Match
from limbeck.core.maths import pair
from limbeck.core.nets import Batch, Nets
from limbeck.core.pair import Pair, parse_all
from limbeck.core.reduce import mean


@method(
    paper="Kim et al. 2018, section 3",
    year=2018,
    arxiv="1802.04977",
    code="Jangho-Kim/Factor-Transfer-pytorch@19cce26:train_student.py",
    differs="as the code, the mean over the elements of the difference, so that the paper's p-norm is this times their "
    "number. The paraphraser minimises the squared error as in the paper; the code for CIFAR takes the absolute one. "
    "RepDistiller compares attention maps of the factors, which neither does. Where maps differ in size the larger "
    "factor is average-pooled",
    exact_accumulation=True,
)
@dataclass(frozen=True)
class FT:
    """Stage 1: |f_t - D(E(f_t))|^2. Stage 2: other losses + weight mean |T(f_s) / |T(f_s)| - E(f_t) / |E(f_t)||.

    E and D are the paraphraser, three 3x3 convolutions down to rate x channels and three back; E(f_t), the teacher's
    factor, is fixed in stage 2. The translator T, three 3x3 convolutions, trains with the student. Each is followed by
    a leaky ReLU of slope 0.1; lengths are over a whole example. All three are dropped afterwards.

    match: other losses of the second stage.
    weight: of the factors, >= 0; the paper's beta.
    rate: channels of a factor a channel of the teacher, > 0; the paper takes 0.5 to 4.
    pretraining: steps of the first stage, as a share of those of the second, in (0, 1]. The student has no part in it.
    layer: which of the paired features, counted from shallow (0) or from deep (-1).

    *Needs*: nets.student and nets.teacher with maps in `feats` (tokens: a square number); the paper takes the last.
    *Relates to*: `fitnets` is one stage and compares features themselves; use this where they are of different kinds.
    """

    match: tuple[Any, ...] = ("ce",)
    weight: float = 500.0
    rate: float = 0.5
    pretraining: float = 0.1
    layer: int = -1

    def __post_init__(self) -> None:
        require(self.weight >= 0, "weight", self.weight, ">= 0")
        require(self.rate > 0, "rate", self.rate, "> 0")
        require(0 < self.pretraining <= 1, "pretraining", self.pretraining, "in (0, 1]")

    @cached_property
    def pair(self) -> Pair:
        """The student and its teacher, with the factors among their losses."""
        factors = Match("factors", Factors, {"rate": self.rate, "layer": self.layer}, self.weight)
        return Pair("student", "teacher", (*parse_all(self.match), factors))

    def setup(self, nets: Nets, probe: Batch) -> None:
        """Check the losses on one batch, and build paraphraser and translator for its features."""
        self.pair.own(nets, probe)

    def stages(self, nets: Nets, steps: int) -> Iterator[Stage]:
        """The paraphraser's, then the student's."""
        before = max(1, round(self.pretraining * steps))
        yield Stage(before, "paraphraser", until=before / (before + steps), validated=False)
        nets.freeze(PARAPHRASER)
        yield Stage(steps, "student")

    def step(self, nets: Nets, batch: Batch, clock: Clock) -> Iterator[Turn]:
        """One turn of whoever learns in this stage."""
        if clock.stage == 0:
            feats = nets.run("teacher", batch)["feats"]
            yield PARAPHRASER, mean(nets.losses["factors"].reconstruction(feats), batch.get("mask"))
        else:
            yield "student", self.pair.parts(nets, batch, clock.progress)


PARAPHRASER = "losses.factors.paraphraser"


class Factors(nn.Module):
    """Paraphraser and translator: the distance of two factors, and how well the teacher's is understood."""

    def __init__(self, student_feats: list[Shape], teacher_feats: list[Shape], *, rate: float, layer: int) -> None:
        super().__init__()
        self.rate, self.layer = rate, layer
        s = width(student_feats[pick("layer", student_feats, layer, "student")])
        t = width(teacher_feats[pick("layer", teacher_feats, layer, "teacher")])
        factor = max(1, round(rate * t))
        self.translator = _chain(nn.Conv2d, [s, s, factor, factor])
        encoder = _chain(nn.Conv2d, [t, t, factor, factor])
        decoder = _chain(nn.ConvTranspose2d, [factor, factor, t, t])
        self.paraphraser = nn.ModuleDict({"encoder": encoder, "decoder": decoder})

    def forward(self, student_feats: list[Tensor], teacher_feats: list[Tensor]) -> Tensor:
        """Mean absolute difference of the factors as unit vectors: [B]."""
        with torch.no_grad():
            teacher = self._through(self.paraphraser["encoder"], teacher_feats)
        student, teacher = same_places(self._through(self.translator, student_feats), teacher)
        student, teacher = (F.normalize(x.flatten(1)) for x in pair(student, teacher))
        return per_example((student - teacher).abs())

    def reconstruction(self, teacher_feats: list[Tensor]) -> Tensor:
        """Mean squared error of the paraphraser: [B]."""
        factor = self._through(self.paraphraser["encoder"], teacher_feats)
        restored, feature = pair(self.paraphraser["decoder"](factor), as_map(teacher_feats[self.layer]))
        return per_example((restored - feature).square())

    def _through(self, net: nn.Module, feats: list[Tensor]) -> Tensor:
        out: Tensor = net(as_map(feats[self.layer]).to(next(net.parameters()).dtype))
        return out


def _chain(layer: type[nn.Conv2d] | type[nn.ConvTranspose2d], widths: list[int]) -> nn.Sequential:
    steps = [(layer(a, b, 3, padding=1), nn.LeakyReLU(0.1)) for a, b in pairwise(widths)]
    return nn.Sequential(*(part for step in steps for part in step))
