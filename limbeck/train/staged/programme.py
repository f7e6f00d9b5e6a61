"""One student goes through several stages, of which each has its teacher, its data, its losses and its open layers."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from limbeck.core.blocks import depths, train_only
from limbeck.core.card import method, require
from limbeck.core.embeddings import inherit_words
from limbeck.core.errors import BadInput, nearest
from limbeck.core.loop import Clock, Stage, Turn
from limbeck.core.nets import Batch, Nets
from limbeck.core.pair import Pair, parse_all
from limbeck.core.pairs import Pairs, own

LATENT = {"tinybert": {"embedding_weight": 0.0}}
KNOWN = ("match", "teacher", "pool", "share", "top")


@method(
    paper="Su et al. 2021, section 3; Mukherjee et al. 2021, section 3",
    year=2021,
    arxiv="2106.02241",
    code="microsoft/xtreme-distil-transformers@708e1e5:run_xtreme_distil.py",
    differs="all stages share the steps, where papers stop each by a validation loss and go back to its best weights; "
    "texts of the task's own training set, labelled or not, take the place of a general corpus",
    row=("ernie_tiny", "xtremedistil"),
)
@dataclass(frozen=True)
class Programme:
    """Stage k minimises its own losses from where stage k - 1 ends, with an optimiser and a schedule of its own.

    Projectors of a loss that comes again go on from where they were left, as TinyBERT's do.

    program: the stages, in order, each {match: losses, teacher: the network they ask ("teacher"), pool: "task" (what
        has a label) or "texts" (all, the default), share: of the steps, against the others' (1), top: how many groups
        of weights are trained, counted from the head, 0 for all: head, last layer ..., first layer, embedding}. The
        default is that of ERNIE-Tiny: general and general-enhanced distillation of inner layers on texts, from
        `teacher_general` and from the task's teacher, then that on the task's texts, then its predictions with labels.
    words: start the student's word embedding from the SVD of the teacher's (XtremeDistil).

    *Needs*: the teachers that are named, `nets: {teacher_general: ...}` beside the teacher; class labels, -100 for none
        (see `labelled` in the data).
    *Relates to*: `stagewise` has two stages with one teacher on one pool; `task_agnostic` hides words in its first.
    *Differs*: see the card.
    """

    program: tuple[Any, ...] = (
        {"teacher": "teacher_general", "match": [LATENT]},
        {"match": [LATENT]},
        {"pool": "task", "match": [LATENT]},
        {"pool": "task", "match": [LATENT, {"kd": {"temperature": 1.0}}, "ce"]},
    )
    words: bool = False

    def __post_init__(self) -> None:
        require(len(self.program) > 0, "stages of `program`", len(self.program), ">= 1")
        for stage in self.program:
            for key in stage if isinstance(stage, Mapping) else ("",):
                if key not in KNOWN:
                    raise BadInput(
                        f"a stage of `program` is {{{', '.join(KNOWN)}}}, found {stage}{nearest(key, KNOWN)}"
                    )
            require(bool(stage.get("match")), "match", stage.get("match"), "the losses of a stage")
            require(stage.get("share", 1) > 0, "share", stage.get("share"), "> 0")
            require(stage.get("top", 0) >= 0, "top", stage.get("top"), ">= 0")
            require(stage.get("pool", "texts") in ("texts", "task"), "pool", stage.get("pool"), "texts or task")

    @cached_property
    def pairs(self) -> Pairs:
        """Who learns what from whom in each stage."""
        return {
            f"stage{k}": Pair("student", stage.get("teacher", "teacher"), parse_all(stage["match"]), f"losses.stage{k}")
            for k, stage in enumerate(self.program)
        }

    def pools(self, labels: Tensor) -> dict[str, Tensor]:
        """The rows that have a label, and all."""
        return {"task": (labels >= 0).nonzero()[:, 0], "texts": torch.arange(len(labels))}

    def setup(self, nets: Nets, probe: Batch) -> None:
        """Check every stage on one batch, build the losses that own weights, and keep all teachers still."""
        if self.words:
            inherit_words(nets.student, nets.teacher)
        own(nets, self.pairs, dict.fromkeys(self.pairs, probe))
        nets.freeze(*{pair.teacher for pair in self.pairs.values() if pair.teacher in nets})
        nets.depths = depths(nets, "student", probe, embedding=True)

    def stages(self, nets: Nets, steps: int) -> Iterator[Stage]:
        """As the programme says; the last one is what validation looks at."""
        ends, whole = [0.0], sum(stage.get("share", 1) for stage in self.program)
        for stage in self.program:
            ends.append(ends[-1] + stage.get("share", 1) / whole)
        for k, (stage, pair) in enumerate(zip(self.program, self.pairs.values(), strict=True)):
            top = stage.get("top", 0)
            train_only(nets.student, [name for group in nets.depths.names[-top:] for name in group])
            if "losses" in nets:
                nets.companions["student"] = [pair.losses]
                for earlier in list(self.pairs.values())[:k]:
                    _go_on(nets, pair, earlier)
            length, last = round(steps * ends[k + 1]) - round(steps * ends[k]), k + 1 == len(self.program)
            yield Stage(length, f"stage{k}", stage.get("pool", "texts"), until=ends[k + 1], validated=last)
        nets.student.requires_grad_(True)

    def step(self, nets: Nets, batch: Batch, clock: Clock) -> Iterator[Turn]:
        """One turn of the student."""
        yield "student", self.pairs[f"stage{clock.stage}"].parts(nets, batch, clock.progress)


def _go_on(nets: Nets, pair: Pair, earlier: Pair) -> None:
    """Projectors of a loss begin as an earlier stage left those of the same loss, where they have the same shapes."""
    for m in pair.matches:
        if m.is_module and any((m.name, m.loss, m.knobs) == (e.name, e.loss, e.knobs) for e in earlier.matches):
            into, learned = ([*nets.find(p.losses)[m.name].parameters()] for p in (pair, earlier))  # type: ignore[index]
            if [w.shape for w in into] == [w.shape for w in learned]:
                for new, old in zip(into, learned, strict=True):
                    new.data.copy_(old.data)
