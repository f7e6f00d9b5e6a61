"""First the student learns a language from a teacher that knows no task, then a task from labels alone."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from limbeck.core.card import method, require
from limbeck.core.cloze import Cloze, telling_words
from limbeck.core.loop import Clock, Stage, Turn
from limbeck.core.nets import Batch, Nets
from limbeck.core.pair import Pair, parse_all
from limbeck.core.taps import unwrap


@method(
    paper="Udagawa et al. 2023, section 3",
    year=2023,
    arxiv="2310.08797",
    differs="both stages share the steps and the optimiser, each with its run of the schedule; the texts of the task's "
    "own training set, labelled or not, take the place of a general corpus",
    row="task_agnostic_lm_comparison",
)
@dataclass(frozen=True)
class TaskAgnostic:
    """Stage 1 minimises `first` on texts with hidden words, stage 2 `match` on those that have a label.

    In stage 1 both networks read texts of which a share of the tokens is hidden, drawn in every batch; logits are of
    the words, labels are the words that are hidden, and losses count there or, where they say so, at every token. In
    stage 2 the student, with a head for the classes, sees whole texts, and nobody need teach it.

    first: losses of stage 1: {forward_kl: ...} for the words' distributions (OD), {bert_emd: ...} for hidden states
        (HS), {minilm_v2: ...} for relations of queries, keys and values (MHA); ce alone trains a masked language model.
    match: losses of stage 2.
    share: of all steps that stage 1 takes, in (0, 1]; 1 leaves the task out, as for a teacher.
    hidden: share of the tokens that are hidden, in (0, 1); the paper's is 0.15.

    *Needs*: networks of texts that also say words, {net: text_encoder, masked: true}; class labels, -100 for none (see
        `labelled` in the data). nets.teacher where a loss asks for it.
    *Relates to*: `stagewise` has both stages on one task; `distill` with data that are `masked: true` is stage 1 alone.
    *Differs*: see the card.
    """

    first: tuple[Any, ...] = ("minilm_v2",)
    match: tuple[Any, ...] = ("ce",)
    share: float = 0.6
    hidden: float = 0.15

    def __post_init__(self) -> None:
        require(0 < self.share <= 1, "share", self.share, "in (0, 1]")
        require(0 < self.hidden < 1, "hidden", self.hidden, "in (0, 1)")

    @cached_property
    def pairs(self) -> tuple[Pair, Pair]:
        """Who learns what from whom in either stage."""
        first, second = (
            Pair("student", "teacher", parse_all(specs), f"losses.stage{k}")
            for k, specs in enumerate((self.first, self.match))
        )
        return first, second

    def pools(self, labels: Tensor) -> dict[str, Tensor]:
        """The rows of both stages: those with a label, and all."""
        return {"task": (labels >= 0).nonzero()[:, 0], "texts": torch.arange(len(labels))}

    def setup(self, nets: Nets, probe: Batch) -> None:
        """Check both stages on one batch, and build the losses that own weights."""
        with telling_words(*self._readers(nets)):
            owned = {"stage0": self.pairs[0].build(nets, self._cloze(nets, probe))}
        if self.share < 1:
            owned["stage1"] = self.pairs[1].build(nets, probe)
        if any(owned.values()):
            nets.losses = nn.ModuleDict(owned)

    def stages(self, nets: Nets, steps: int) -> Iterator[Stage]:
        """Words, then the task; only the second has anything to say about it."""
        before = steps if self.share == 1 else min(steps - 1, max(1, round(self.share * steps)))
        for k, (length, end) in enumerate(((before, self.share), (steps - before, 1.0))):
            if length:
                if "losses" in nets:
                    nets.companions["student"] = [self.pairs[k].losses]
                yield Stage(length, ("words", "task")[k], ("texts", "task")[k], until=end, validated=k == 1)

    def step(self, nets: Nets, batch: Batch, clock: Clock) -> Iterator[Turn]:
        """One turn of the student."""
        if clock.stage:
            yield "student", self.pairs[1].parts(nets, batch, clock.progress)
            return
        with telling_words(*self._readers(nets)):
            parts = self.pairs[0].parts(nets, self._cloze(nets, batch), clock.progress)
        yield "student", parts

    def _readers(self, nets: Nets) -> list[Any]:
        """The networks that say words in stage 1."""
        return [unwrap(nets.find(role)) for role in ("student", *(["teacher"] if self.pairs[0].uses_teacher else []))]

    def _cloze(self, nets: Nets, batch: Batch) -> Batch:
        """The batch with tokens hidden."""
        mask = int(self._readers(nets)[0].mask)
        cloze = Cloze(mask, mask, self.hidden)
        return cloze.apply(batch, cloze.draw(None, *batch["inputs"].shape))
