"""A prompt that is carried to a new task keeps, as far as the two tasks are alike, what it said in the old one."""

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from limbeck.core.bank import everyone
from limbeck.core.card import method, require
from limbeck.core.errors import BadInput
from limbeck.core.loop import Clock, Stage, Turn
from limbeck.core.match import Match
from limbeck.core.maths import pair, upcast
from limbeck.core.nets import Batch, Nets
from limbeck.core.pair import Pair, parse_all
from limbeck.core.policy import Numbers
from limbeck.core.reduce import mean
from limbeck.core.taps import untap
from limbeck.losses.logits.ce import ce


def distance(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """Mean over classes of the squared difference: [B, C] x 2 -> [B]."""
    student, teacher = pair(student_logits, teacher_logits.detach())
    return (student - teacher).square().mean(-1)


@method(
    paper="Zhong et al. 2022, section 3",
    year=2022,
    arxiv="2208.10160",
    code="WHU-ZQH/PANDA@5efc6dc:p-tuning-v2/training/trainer_base.py",
    differs="the code divides the mean squared difference by the batch size B once more and takes a fixed coefficient: "
    "its 0.1 beta is weight = 0.1 beta / B here, with scouting 0; its teacher has dropout on. Layer and token of the "
    "paper's metric are unsaid: the input of the head, over the examples seen so far",
)
@dataclass(frozen=True)
class PandaPrompt:
    """Other losses + weight cos(h_source, h_target) mean_c (z_S - z_T)^2.

    z are logits. The teacher is the network with the source task's prompt and head; the student begins as that, and so
    does a teacher where none is given. h_source is the teacher's embedding [B, D], h_target that of a scout: the
    teacher's network with a prompt and a head that a stage before has trained on the target alone, from scratch. Their
    mean cosine over the examples seen, 0 when negative, says how much the tasks have in common.

    match: other losses; the scout has the cross-entropy with the labels.
    weight: >= 0; at 0 this is prompt transfer without a teacher.
    scouting: steps of the scout as a share of those of the student, >= 0; at 0 the cosine is left out, taken as 1.
    decay: the weight falls along a line from a tenth of the way on, to 0 at the end.

    *Needs*: a student of which only a prompt and a head can be trained, such as `prompted_encoder` or a model with
    adapters, with weights of the source task, whose classes are as many; `emb`, or else the first place of the last of
    `feats`. *Relates to*: `kd` on logits with a network that learns whole; `ce` alone is plain prompt transfer.
    *Differs*: see the card.
    """

    match: tuple[Any, ...] = ("ce",)
    weight: float = 1.0
    scouting: float = 1.0
    decay: bool = False

    def __post_init__(self) -> None:
        for name in ("weight", "scouting"):
            require(getattr(self, name) >= 0, name, getattr(self, name), ">= 0")

    @property
    def scouts(self) -> bool:
        """Whether the likeness of the tasks is asked for."""
        return bool(self.weight and self.scouting)

    @cached_property
    def pair(self) -> Pair:
        """The student and its teacher, with the distance of their logits among the losses."""
        guard = (Match("logits", distance, {}),) if self.weight else ()
        return Pair("student", "teacher", (*parse_all(self.match), *guard))

    def setup(self, nets: Nets, probe: Batch) -> None:
        """Keep the student as it comes as the teacher where there is none, and make the scout."""
        if self.weight and "teacher" not in nets:
            nets.teacher = copy.deepcopy(nets.student)
            untap(nets.teacher)
        self.pair.own(nets, probe)
        if self.scouts:
            scout = copy.deepcopy(nets.teacher).train()
            untap(scout)
            learns = {name for name, p in nets.student.named_parameters() if p.requires_grad}
            found = [p for name, p in scout.named_parameters() if name in learns]
            if not found:
                raise BadInput(
                    "the teacher has none of the parameters that the student learns; give both the same network, or "
                    "say `scouting: 0`"
                )
            for p in found:
                nn.init.normal_(p.requires_grad_(True), std=0.02)
            nets.scout, nets.likeness = scout, Numbers(total=0.0, count=0.0)

    def stages(self, nets: Nets, steps: int) -> Iterator[Stage]:
        """The scout's, then the student's."""
        if self.scouts:
            before = max(1, round(self.scouting * steps))
            yield Stage(before, "scout", until=before / (before + steps), validated=False)
            nets.freeze("scout")
        yield Stage(steps, "transfer")

    def likeness(self, nets: Nets, batch: Batch) -> Tensor:
        """Mean cosine of source and target over the examples of this stage so far, at least 0: []."""
        if not self.scouts:
            return torch.ones(())
        with torch.no_grad():
            source, target = (_embedding(nets.run(player, batch)) for player in ("teacher", "scout"))
            cosine = everyone(F.cosine_similarity(source, target, dim=-1))
            nets.likeness.total += cosine.sum()
            nets.likeness.count += len(cosine)
            mean_cosine: Tensor = nets.likeness.total / nets.likeness.count
        return mean_cosine.clamp_min(0)

    def share(self, progress: float) -> float:
        """What is left of the weight."""
        return min(1.0, (1 - progress) / 0.9) if self.decay else 1.0

    def step(self, nets: Nets, batch: Batch, clock: Clock) -> Iterator[Turn]:
        """One turn of whoever learns in this stage."""
        if self.scouts and clock.stage == 0:
            yield "scout", mean(ce(nets.run("scout", batch)["logits"], batch["labels"]), batch.get("mask"))
            return
        parts = self.pair.parts(nets, batch, clock.progress)
        if self.weight:
            parts["logits"] *= self.weight * self.share(clock.progress) * self.likeness(nets, batch)
        yield "student", parts


def _embedding(out: dict[str, Any]) -> Tensor:
    found = out["emb"] if "emb" in out else out["feats"][-1][:, 0]
    return upcast(found)
