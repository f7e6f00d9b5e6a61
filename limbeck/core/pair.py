"""One learner, its teacher, and what is matched between the two: what schemes with several such pairs share."""

import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from limbeck.core.errors import BadInput
from limbeck.core.headloss import route
from limbeck.core.match import Match, parse
from limbeck.core.nets import RETOLD, Batch, Nets, evaluating
from limbeck.core.reduce import Part
from limbeck.core.vocabularies import of_words, real_words, shared_words


@dataclass(frozen=True)
class Pair:
    """What a learner is trained on.

    learner: the player. teacher: another player, '' for nobody; "teacher" may also be a store, whose signals the
    batches bring. matches: the losses; to them the learner is the student. losses: where the losses that own weights
    live, once `build` has made them.
    """

    learner: str
    teacher: str
    matches: tuple[Match, ...]
    losses: str = "losses"

    @property
    def uses_teacher(self) -> bool:
        """Whether any loss asks for what only a teacher can say."""
        return any(name.startswith("teacher_") for m in self.matches for name in m.needs)

    @cached_property
    def _headed(self) -> bool:
        return route.has_head_form(self.matches)

    def without_logits(self, nets: Nets, batch: Batch) -> bool:
        """Whether the losses are computed from hidden states and heads: `build` has found that it can be done."""
        if self.learner not in nets.logit_free or not self._headed:
            return False
        return not self.uses_teacher or self.teacher in nets.logit_free or self._stored(batch) != set()

    def _stored(self, batch: Batch) -> set[str]:
        """What the batch says for the teacher."""
        said = {k for k in batch if k.startswith("teacher_") and k.removeprefix("teacher_") not in RETOLD}
        return said if self.teacher == "teacher" else set()

    def gather(
        self, nets: Nets, batch: Batch, *, logits: bool = True, said: Mapping[str, Any] | None = None
    ) -> dict[str, Any]:
        """Everything that losses may ask for, by name; the teacher speaks in eval mode and without gradient.

        logits: False spares a vocabulary's logits, where a network can do without. said: what the learner says of the
        batch, as `nets.run` gives it, where it has been asked already.
        """
        stored = bool(self._stored(batch))
        have = {k: v for k, v in batch.items() if stored or not k.startswith("teacher_") or k[8:] in RETOLD}
        if self.uses_teacher and not stored:  # first: later its activations would come on top of the student's graph
            if not self.teacher or self.teacher.split(".")[0] not in nets:
                raise BadInput("a loss asks for the teacher, but there is neither a teacher nor a store of its signals")
            with torch.no_grad():
                have |= {f"teacher_{k}": v for k, v in nets.run(self.teacher, batch, logits=logits).items()}
        said = nets.run(self.learner, batch, logits=logits) if said is None else said
        have |= {f"student_{k}": v for k, v in said.items()}
        return comparable(have)

    def build(self, nets: Nets, probe: Batch) -> nn.ModuleDict:
        """Check on one batch that every loss finds what it asks for; the losses that own weights, freshly made."""
        with torch.no_grad(), evaluating(*nets.modules.values()):  # so that no statistics move
            self._report_padding(nets, probe)
            if self._headed:
                heights = {p: route.height(nets, p, probe) for p in (self.learner, self.teacher)}
                if len({*heights.values()} - {0}) == 1 or "words" in probe:
                    nets.logit_free |= {p for p, rows in heights.items() if rows}
            if self.without_logits(nets, probe):
                self.parts(nets, probe, 0.0)
                return nn.ModuleDict()
            have = self.gather(nets, probe)
            shapes = {name: shape(value) for name, value in have.items()}
            if "index" in probe:
                shapes["index"] = (int(probe.get("examples") or probe["index"].max() + 1),)
            for m in self.matches:
                same_classes(m, shapes)
                if not m.is_module:
                    m.part(have, 0.0)
        return nn.ModuleDict({m.name: m.build(shapes) for m in self.matches if m.is_module})

    def own(self, nets: Nets, probe: Batch) -> None:
        """`build`, and put the losses that own weights where they train with the learner."""
        owned = self.build(nets, probe)
        if owned:
            setattr(nets, self.losses, owned)
            nets.companions[self.learner] = [self.losses]

    def _report_padding(self, nets: Nets, probe: Batch) -> None:
        """Warn of the probability that is dropped with ids that are no words, looked at on a few places."""
        if not self.uses_teacher or self._stored(probe) or "words" not in probe or "teacher_inputs" in probe:
            return
        have: dict[str, Any] = {"words": probe["words"]}
        for side, player in (("student", self.learner), ("teacher", self.teacher)):
            there = player.split(".")[0] in nets
            have[f"{side}_logits"] = nets.run(player, route.few(probe)).get("logits") if there else None
        if words := padded(have):
            student, teacher = have["student_logits"], have["teacher_logits"]
            _, _, mine, its = real_words(student, teacher, words)
            warnings.warn(
                f"the heads of student and teacher have {student.shape[-1]:,} and {teacher.shape[-1]:,} rows for "
                f"{words:,} words; what they put on the other rows is dropped: {float(mine.mean()):.2g} and "
                f"{float(its.mean()):.2g} of their probability",
                stacklevel=2,
            )

    def parts(
        self, nets: Nets, batch: Batch, progress: float, *, said: Mapping[str, Any] | None = None
    ) -> dict[str, Part]:
        """The weighted mean of every loss, by name; said: as in `gather`."""
        if self.without_logits(nets, batch):
            return route.parts(self.matches, self.gather(nets, batch, logits=False, said=said), progress)
        return self.weighed(nets, self.gather(nets, batch, said=said), progress)

    def weighed(self, nets: Nets, have: Mapping[str, Any], progress: float) -> dict[str, Part]:
        """The same of what is at hand already, by the names that losses ask for."""
        seen = {**have, "progress": progress}
        owned: Any = nets.find(self.losses) if any(m.is_module for m in self.matches) else {}
        return {m.name: m.part(seen, progress, owned[m.name] if m.is_module else None) for m in self.matches}


def parse_all(specs: Iterable[Any]) -> tuple[Match, ...]:
    """Parse losses; the second of a name is called name_2, so that none hides another."""
    out: list[Match] = []
    for match in map(parse, specs):
        times = 1 + sum(m.loss is match.loss for m in out)
        out.append(match if times == 1 else replace(match, name=f"{match.name}_{times}"))
    return tuple(out)


def comparable(have: dict[str, Any]) -> dict[str, Any]:
    """What both say, of real words alone where heads differ, and by the name that losses for two vocabularies ask."""
    if words := padded(have):
        have = cut(have, words)
    two = "teacher_inputs" in have
    told = dict(have)
    for side, count in (("student", "words"), ("teacher", "teacher_words")):
        if f"{side}_logits" in have:
            logits = have[f"{side}_logits"]
            told[f"{side}_vocab_logits"] = of_words(logits, have.get(count)) if two else logits
    return told


def cut(have: dict[str, Any], words: int) -> dict[str, Any]:
    """With the logits of real words alone, where student and teacher of one tokenizer have heads of other heights."""
    return have | {name: have[name][..., :words] for name in ("student_logits", "teacher_logits")}


def padded(have: Mapping[str, Any]) -> int:
    """How many real words there are, where heads of one tokenizer are padded to different heights; 0 elsewhere."""
    student, teacher = have.get("student_logits"), have.get("teacher_logits")
    if student is None or teacher is None or "teacher_inputs" in have:
        return 0
    return shared_words(student.shape[-1], teacher.shape[-1], have.get("words")) or 0


def same_classes(match: Match, shapes: Mapping[str, Any]) -> None:
    """Refuse a loss that compares class by class where student and teacher know different numbers of classes."""
    asked = {n: shapes[n][-1] for n in match.needs if n.endswith("_logits") and n in shapes}
    if "vocab" not in "".join(asked):
        agree(match.name, {n.split("_")[0]: c for n, c in asked.items()})


def classes(nets: Nets, probe: Batch, who: str, players: Sequence[str] = ("student", "teacher")) -> int:
    """How many classes the players know, whom the method `who` compares class by class."""
    with torch.no_grad(), evaluating(*map(nets.find, players)):
        known = {player: int(nets.run(player, probe)["logits"].shape[-1]) for player in players}
    agree(who, known)
    return known[players[0]]


def agree(who: str, known: Mapping[str, int]) -> None:
    """Refuse players who know different numbers of classes, for `who` compares them class by class."""
    if len(set(known.values())) > 1:
        counts = " and ".join(f"{'' if '.' in one else 'the '}{one} has {c} classes" for one, c in known.items())
        raise BadInput(f"`{who}` compares classes one by one, but {counts}")


def shape(value: Any) -> Any:
    """The shape of a tensor, or those of a list of tensors; () for anything else."""
    if isinstance(value, (list, tuple)):
        return [shape(v) for v in value]
    return tuple(value.shape) if isinstance(value, Tensor) else ()


def without_teacher(matches: Iterable[Match]) -> tuple[Match, ...]:
    """The losses that ask for no teacher; plain cross-entropy with the labels when there is none."""
    return tuple(m for m in matches if not any(n.startswith("teacher_") for n in m.needs)) or (parse("ce"),)
