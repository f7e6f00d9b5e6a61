"""Pre-training goes on with the task's own inputs, twice from the same start: the first result teaches the second."""

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from limbeck.core.card import method, require
from limbeck.core.cloze import Cloze, telling_words
from limbeck.core.features import tokens
from limbeck.core.loop import Clock, Stage, Turn
from limbeck.core.masked import check_decoder
from limbeck.core.maths import pair
from limbeck.core.nets import Batch, Nets
from limbeck.core.pretext import SEEN, TASK, pools, teller, told_wrong
from limbeck.core.reduce import Part, labelled, mean
from limbeck.core.taps import untap, unwrap
from limbeck.losses.logits.ce import ce


@method(
    paper="Lee et al. 2022, section 3",
    year=2022,
    arxiv="2210.02871",
    code="seanie12/self-distillation@4f6436f:trainer.py",
    differs="the distance is the mean over all tokens of the last feature, as in the paper; the code's, of the vector "
    "that the head reads alone, is `compare: emb`. All stages together take the steps of a control; the decoder starts "
    "anew with the network, as no decoder comes with its weights",
)
@dataclass(frozen=True)
class SelfDistFurtherPretrain:
    """Round k: masked(theta; x) + weight |f_theta(x) - f_phi(x)|^2 from theta_0; phi is what round k - 1 ended with.

    Round 0 has no distance. `masked` hides a share of x: of a text's tokens, and says which words they were; of a
    picture's patches, and a small decoder tells their pixels, each patch of zero mean and unit variance. f is the
    network's feature of all of x; phi is frozen. At last the network learns the task from those that have a label.

    weight: of the distance, >= 0; squares are summed over a vector, so it falls with the width.
    rounds: how often the network starts again and learns from the one before, >= 0; 0 is plain further pre-training.
    share: of all steps that comes before the task, in [0, 1], the same for each round; 1 leaves the task out.
    hidden: share that is hidden, in (0, 1); None is 0.15 of tokens and 0.75 of patches.
    compare: "tokens", the last of the features, or "emb", which the head reads.
    decoder_width, decoder_depth, decoder_heads: for pictures, >= 1. entry: path of the first block, for pictures.

    *Needs*: a student with weights from elsewhere, {weights: ...}: a transformer of texts that also says words
        ({net: text_encoder, masked: true}) or of pictures; labels -100 for none (see `labelled` in the data).
    *Relates to*: compare with `rounds: 0`, which spends the same steps in one go. `task_agnostic` has another teacher,
        `ban` starts from random weights. *Differs*: see the card.
    """

    weight: float = 1.0
    rounds: int = 1
    share: float = 0.6
    hidden: float | None = None
    compare: Literal["tokens", "emb"] = "tokens"
    decoder_width: int = 64
    decoder_depth: int = 1
    decoder_heads: int = 4
    entry: str = "blocks.0"

    def __post_init__(self) -> None:
        require(self.weight >= 0, "weight", self.weight, ">= 0")
        require(self.rounds >= 0, "rounds", self.rounds, ">= 0")
        require(0 <= self.share <= 1, "share", self.share, "in [0, 1]")
        require(self.hidden is None or 0 < self.hidden < 1, "hidden", self.hidden, "in (0, 1)")
        require(self.compare in ("tokens", "emb"), "compare", self.compare, '"tokens" or "emb"')
        check_decoder(self.decoder_width, self.decoder_depth, self.decoder_heads)

    def pools(self, labels: Tensor) -> dict[str, Tensor]:
        """The rows of both kinds of stages."""
        return pools(labels)

    def setup(self, nets: Nets, probe: Batch) -> None:
        """Check that the network can tell what is hidden; for pictures, build what tells it."""
        if reads_words(probe):
            with telling_words(unwrap(nets.student)):
                return
        sizes = {"inner": self.decoder_width, "depth": self.decoder_depth, "heads": self.decoder_heads}
        nets.pretext = teller(nets, self.entry, probe, **sizes)

    def stages(self, nets: Nets, steps: int) -> Iterator[Stage]:
        """The rounds, each from where the first began, then the task."""
        count, least = self.rounds + 1, int(self.share > 0)
        before = min(steps - (self.share < 1), max(least, round(self.share * steps)))  # the task gets a step, too
        learners = [name for name in ("student", "pretext") if name in nets]
        begin = {name: copy.deepcopy(nets.find(name).state_dict()) for name in learners}
        nets.companions["student"] = learners[1:]
        for k in range(count if self.share else 0):
            if k:
                nets.teacher_before = copy.deepcopy(nets.student)
                untap(nets.teacher_before)
                for name in learners:
                    nets.find(name).load_state_dict(begin[name])
            length = before * (k + 1) // count - before * k // count
            yield Stage(length, f"round {k}", SEEN, until=self.share * (k + 1) / count, validated=before == steps)
        nets.companions["student"] = []
        if before < steps:
            yield Stage(steps - before, "task", TASK)

    def step(self, nets: Nets, batch: Batch, clock: Clock) -> Iterator[Turn]:
        """One turn of the student."""
        if clock.stage == self.rounds + 1 or not self.share:
            yield "student", {"ce": mean(ce(nets.run("student", batch)["logits"], batch["labels"]), labelled(batch))}
            return
        parts = {"masked": (self.words if reads_words(batch) else self.patches)(nets, batch)}
        if clock.stage and self.weight:
            aim = self.feature(nets, "teacher_before", batch)
            error = apart(self.feature(nets, "student", batch), aim, self.real(batch))
            parts["distance"] = self.weight * mean(error, batch.get("mask"))
        yield "student", parts

    def feature(self, nets: Nets, player: str, batch: Batch) -> Tensor:
        """What a network feels of the whole input: [B, T, D] or [B, D]."""
        told = nets.run(player, batch)
        feature: Tensor = told["emb"] if self.compare == "emb" else told["feats"][-1]
        return feature

    def real(self, batch: Batch) -> Tensor | None:
        """Which tokens are no padding, where they are compared one by one."""
        return batch.get("attention_mask") if self.compare == "tokens" else None

    def words(self, nets: Nets, batch: Batch) -> Part:
        """Cross-entropy of words that are hidden."""
        reader: Any = unwrap(nets.student)
        cloze = Cloze(int(reader.mask), int(reader.mask), self.hidden or 0.15)
        shown = cloze.apply(batch, cloze.draw(None, *batch["inputs"].shape))
        with telling_words(reader):
            told = nets.run("student", shown)["logits"]
        return mean(ce(told, shown["labels"]), shown["mask"])

    def patches(self, nets: Nets, batch: Batch) -> Part:
        """Squared error of the pixels of patches that are hidden."""
        wrong = told_wrong(nets, nets.pretext, self.entry, batch, self.hidden or 0.75)
        return mean(wrong, batch.get("mask"))


def reads_words(batch: Batch) -> bool:
    """Whether inputs are token ids."""
    return not batch["inputs"].is_floating_point()


def apart(student: Tensor, teacher: Tensor, real: Tensor | None = None) -> Tensor:
    """Squared distance of features, its mean over the tokens that are real [B, T]: [B, T, D] or [B, D] x 2 -> [B]."""
    mine, aim = pair(tokens(student), tokens(teacher.detach()))
    error = (mine - aim).square().sum(2)
    counts = torch.ones_like(error) if real is None else real.to(error)
    return (error * counts).sum(1) / counts.sum(1).clamp_min(1)
