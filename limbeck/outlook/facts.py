"""What is found out about a teacher, a student and their data."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class Side:
    """One network on the data. nll: nats a label; accuracy, ece, confidence in [0, 1]; entropy: nats of what it says;
    dropped: probability on ids that are no words."""

    name: str
    parameters: int
    nll: float
    accuracy: float
    ece: float
    confidence: float
    entropy: float
    dropped: float = 0.0
    bits_per_byte: float | None = None


@dataclass(frozen=True)
class Words:
    """Two vocabularies. same: equal words under equal ids. common: words that both have; rows: of the heads. templates:
    "same", "different", "none", or whose is missing."""

    student: int
    teacher: int
    common: int
    same: bool
    student_rows: int
    teacher_rows: int
    templates: str


@dataclass(frozen=True)
class Cost:
    """Measured on a few steps. memory: peak of the process in bytes (of the GPU where there is one); before: what was
    taken already. seconds: a step; steps: of one arm, None where only time ends it; runs: arms times seeds."""

    memory: int
    before: int
    seconds: float
    batch_size: int
    steps: int | None
    runs: int


@dataclass(frozen=True)
class Outlook:
    """All figures, and the verdict that rests on them.

    fresh: whether the student starts from random weights. guess: nll of the labels' frequencies alone, and guess_noise
    the standard error of the teacher's lead over it. gain: by how much the teacher's nll is lower than the student's,
    in nats a label, or bits a byte with two tokenizers; noise: its standard error. problem: why no step can be taken.
    sure: entropy of the teacher on training examples, as a share of the largest possible. k: of topk,
    the share of first choices in common. likely: None where it cannot be foretold.
    """

    data: str
    part: str
    examples: int
    labels: int
    teacher: Side
    student: Side
    fresh: bool
    guess: float
    guess_noise: float
    gain: float
    noise: float
    sure: float
    forward_kl: float | None = None
    reverse_kl: float | None = None
    top1: float | None = None
    topk: float | None = None
    k: int = 0
    words: Words | None = None
    cost: Cost | None = None
    problem: str = ""
    verdict: str = ""
    likely: bool | None = None
    cautions: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)
