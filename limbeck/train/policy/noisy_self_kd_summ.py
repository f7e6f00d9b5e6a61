"""A frozen twin teaches the writer of summaries by what it says with dropout on, while the writer reads noisy texts."""

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

from limbeck.core.card import method, require
from limbeck.core.loop import Clock, Turn
from limbeck.core.nets import Batch, Nets
from limbeck.core.noise import WordNoise, dropping, put_back
from limbeck.core.policy import completions
from limbeck.core.ranges import at_least
from limbeck.core.reduce import Part, mean
from limbeck.losses.logits.ce import ce
from limbeck.losses.logits.kd import kd


@method(
    paper="Liu et al. 2020, section 3",
    year=2020,
    arxiv="2009.07032",
    code="nlpyang/NoisySumm@8d5f715:src/s2s_ft/modeling.py and src/s2s_ft/utils.py",
    differs="for a language model that reads source and summary as one text. The code shuffles only sources of more "
    "than five sentences, adds their places to words before it asks for neighbours, and smooths its references by 0.1, "
    "a knob here. How often words are replaced, and by how many, could not be looked up",
)
@dataclass(frozen=True)
class NoisySelfKDSumm:
    """(1 - w) -log p_S(y_t | x', y_<t) + w KL(p_T(. | x, y_<t) || p_S(. | x', y_<t)), a mean over summary tokens.

    p_T is what the teacher, a network like the student that has learned the task, says with dropout on: each time
    another draw. x' is the source with words dropped, sentences moved and words replaced by neighbours of theirs.

    weight: w in [0, 1]; 0 is plain training, without a teacher and without noise.
    teacher_dropout: in [0, 1), of the teacher's dropout layers, or of its embeddings and what its layers add where it
        has none; 0 lets it speak in eval mode.
    drop: chance that a word is lost, in [0, 1). shuffle: places that a sentence may move, >= 0.
    replace: chance, in [0, 1], that a word becomes another that is near to it by the teacher's embedding.
    neighbours: how many words are that near, >= 1.
    noisy_teacher: whether the teacher reads a source with noise of its own in the place of x.
    label_smoothing: of the references, in [0, 1).
    ends: ids that end a sentence; without any, none moves. special: ids that are no words, such as marks of turns.
    prompt: tokens at the start of each text that are source, >= 1; more where the batch's mask begins later. The last
        of them stays.

    *Needs*: nets.teacher and nets.student over one vocabulary; `embedding` of the teacher to replace words. *Relates
    to*: `ban` has no noise; `seqkd` where the teacher is larger; compare with label smoothing. *Differs*: see the card.
    """

    weight: float = 0.6
    teacher_dropout: float = 0.15
    drop: float = 0.1
    shuffle: int = 2
    replace: float = 0.1
    neighbours: int = 10
    noisy_teacher: bool = False
    label_smoothing: float = 0.0
    ends: tuple[int, ...] = ()
    special: tuple[int, ...] = ()
    prompt: int = 1

    def __post_init__(self) -> None:
        for name in ("weight", "replace"):
            require(0 <= getattr(self, name) <= 1, name, getattr(self, name), "in [0, 1]")
        for name in ("teacher_dropout", "drop", "label_smoothing"):
            require(0 <= getattr(self, name) < 1, name, getattr(self, name), "in [0, 1)")
        at_least(0, shuffle=self.shuffle)
        at_least(1, neighbours=self.neighbours, prompt=self.prompt)

    @property
    def noise(self) -> WordNoise:
        """Of sources."""
        return WordNoise(self.drop, self.shuffle, self.replace, self.neighbours, self.ends, self.special)

    def read(self, nets: Nets, player: str, batch: Batch, noisy: bool) -> Tensor:
        """What a network says at every place, reading the sources as they are or with noise: [B, T, V]."""
        if not noisy:
            plain: Tensor = nets.run(player, batch)["logits"]
            return plain
        first = {"inputs": batch["inputs"][:1, :1]}  # any text will do to be told the embedding
        embedding = nets.run("teacher", first).get("embedding") if self.replace else None
        seen, moved = self.noise.on(batch, embedding, self.prompt)
        return put_back(nets.run(player, seen)["logits"], moved)

    def step(self, nets: Nets, batch: Batch, clock: Clock) -> Iterator[Turn]:
        """One turn of the student."""
        counts = completions(batch, self.prompt)
        parts: dict[str, Part] = {}
        if self.weight:
            with dropping(nets.teacher, self.teacher_dropout):
                told = self.read(nets, "teacher", batch, self.noisy_teacher)
        said = self.read(nets, "student", batch, noisy=self.weight > 0)
        if self.weight:
            parts["kl"] = self.weight * mean(kd(said, told, temperature=1.0), counts)
        if self.weight < 1:
            labels = ce(said, batch["labels"], label_smoothing=self.label_smoothing)
            parts["ce"] = (1 - self.weight) * mean(labels, counts)
        yield "student", parts
