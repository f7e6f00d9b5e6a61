"""What the student has before its last stage must be good enough for the last stage of the teacher itself."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from limbeck.core.card import method, require
from limbeck.core.errors import BadInput
from limbeck.core.features import tokens
from limbeck.core.loop import Clock, Turn
from limbeck.core.match import Match
from limbeck.core.nets import Batch, Nets, evaluating
from limbeck.core.pair import Pair, parse_all, shape
from limbeck.core.reduce import mean
from limbeck.core.taps import find_layer
from limbeck.losses.features.dual_view import DualView


@method(
    paper="Fan et al. 2024, eq. 4-6",
    year=2024,
    arxiv="2411.06786",
    code="deep-optimization/ScaleKD@478a7db:mmcls/models/classifiers/distiller.py",
    differs="the stages are whatever the last two tapped layers of each network end; see also the loss `dual_view`",
)
@dataclass(frozen=True)
class ScaleKD:
    """The losses of `match`, and `dual_view` twice: of the last features, and of what the teacher makes of the student.

    The student's feature before the last, projected to the teacher's form, goes through the teacher's own frozen last
    stage, and what comes out is compared with the teacher's last feature. The same output asks, as queries, what the
    student's last feature has to tell. Projectors train with the student and are dropped.

    match: losses beside; the paper's are cross-entropy and the teacher's soft one, half and half, at temperature 1.
    stage: paths of the teacher's layers that in a row make its last feature from the one before, such as
        ("blocks.2", "blocks.3"); () leaves that part out.
    spatial_weight, alternative_weight: of the two views, >= 0.
    heads: of the projectors' attention, >= 1. sharpness: factor on its scores, > 0.

    *Needs*: the last two features of each network, the teacher's a sequence or map; a teacher at hand, not a store.
    *Relates to*: for strong transformer teachers of any student. `dual_view` alone goes with any other losses; `ofa_kd`
        needs nothing but the teacher's logits.
    """

    match: tuple[Any, ...] = ({"ce": 0.5}, {"kd": {"weight": 0.5, "temperature": 1.0}})
    stage: tuple[str, ...] = ()
    spatial_weight: float = 0.08
    alternative_weight: float = 0.06
    heads: int = 16
    sharpness: float = 5.0

    def __post_init__(self) -> None:
        require(self.spatial_weight >= 0, "spatial_weight", self.spatial_weight, ">= 0")
        require(self.alternative_weight >= 0, "alternative_weight", self.alternative_weight, ">= 0")
        require(self.heads >= 1, "heads", self.heads, ">= 1")
        require(self.sharpness > 0, "sharpness", self.sharpness, "> 0")

    @cached_property
    def pair(self) -> Pair:
        """The student, its teacher, the losses beside, and the views of their last features."""
        knobs = {n: getattr(self, n) for n in ("spatial_weight", "alternative_weight", "heads", "sharpness")}
        return Pair("student", "teacher", (*parse_all(self.match), Match("last", DualView, knobs)))

    def setup(self, nets: Nets, probe: Batch) -> None:
        """Build the projectors from one batch, and check that the named layers are the teacher's last stage."""
        self.pair.own(nets, probe)
        if not self.stage:
            return
        with torch.no_grad(), evaluating(*nets.modules.values()):
            have = self.pair.gather(nets, probe)
            student, teacher = have["student_feats"], have["teacher_feats"]
            made = self._last_stage(nets, teacher[-2])
        if made.shape != teacher[-1].shape or not torch.allclose(made, teacher[-1], rtol=1e-3, atol=1e-4):
            raise BadInput(
                f"`stage`: {' and '.join(self.stage)} of the teacher do not make its last feature from the one before; "
                "name the layers between its last two taps, in order"
            )
        nets.losses["before"] = DualView(shape(student), shape(teacher), layer=-2, **self.pair.matches[-1].knobs)
        for projector in (nets.losses["last"].spatial, nets.losses["last"].alternative):
            projector.queries = None  # the teacher's stage asks

    def _last_stage(self, nets: Nets, feature: Tensor) -> Tensor:
        for path in self.stage:
            out = find_layer(nets.teacher, path)(feature)
            feature = out[0] if isinstance(out, (tuple, list)) else out
        return feature

    def step(self, nets: Nets, batch: Batch, clock: Clock) -> Iterator[Turn]:
        """One turn of the student."""
        have = {**self.pair.gather(nets, batch), "progress": clock.progress}
        beside = self.pair.matches[:-1] if self.stage else self.pair.matches
        owned = nets.losses
        parts = {m.name: m.part(have, clock.progress, owned[m.name] if m.is_module else None) for m in beside}
        if self.stage:
            (*_, earlier, latest), (*_, form, wanted) = have["student_feats"], have["teacher_feats"]
            views = [
                self._last_stage(nets, _like(p(earlier), form))
                for p in (owned.before.spatial, owned.before.alternative)
            ]
            parts["before"] = mean(owned.before.compare(*views, wanted), batch.get("mask"))
            last = (owned.last.spatial(latest, tokens(views[0])), owned.last.alternative(latest, tokens(views[1])))
            parts["last"] = mean(owned.last.compare(*last, wanted), batch.get("mask"))
        yield "student", parts


def _like(sequence: Tensor, form: Tensor) -> Tensor:
    """A sequence [B, T, D] in the form of another feature: a map, tokens or a vector."""
    if form.ndim == 4:
        picture: Tensor = sequence.mT.unflatten(2, form.shape[2:])
        return picture
    return sequence if form.ndim == 3 else sequence.squeeze(1)
