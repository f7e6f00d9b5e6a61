"""Did distillation help: the mean paired difference over seeds, its 95 % t interval, and the sentence it allows."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from scipy.special import stdtrit

from limbeck.report import numerals

State = Literal["helped", "did not help", "cannot tell"]
# How the arms that a gain may be over are called in a sentence; any other is called by its name.
OPPONENTS = {
    "control": "the control",
    "teacher": "the teacher",
    "teacher_one_step": "the teacher at one step",
    "random": "the random subset",
    "removal": "removal alone",
    "scratch": "training from scratch",
    "labels": "training on labels alone",
}
SUBJECTS = {
    "teach": "Distillation",
    "condense": "Condensing",
    "shorten": "Distilling the sampler",
    "shape": "Distillation after shaping",
}


@dataclass(frozen=True)
class Gain:
    """How much better than `against`: positive is always better, whatever the metric's own direction.

    mean, low, high: in the metric's unit; the bounds are nan with fewer than two seeds. n: pairs of seeds.
    differences: the gain of each seed, empty when only the summary is known.
    """

    mean: float
    low: float
    high: float
    n: int
    against: str = "control"
    differences: tuple[float, ...] = field(default=())


def interval(differences: Sequence[float], *, level: float = 0.95) -> tuple[float, float, float]:
    """(mean, low, high): the mean of paired differences and its two-sided Student t interval.

    level: coverage in (0, 1). One difference has no interval: its bounds are nan; none at all gives three nan.
    """
    values = np.asarray(differences, dtype=np.float64)
    if values.size == 0:
        return float("nan"), float("nan"), float("nan")
    mean = float(values.mean())
    if values.size == 1 or not np.isfinite(values).all():
        return mean, float("nan"), float("nan")
    half = float(stdtrit(values.size - 1, 0.5 + level / 2) * values.std(ddof=1) / np.sqrt(values.size))
    return mean, mean - half, mean + half


def gain(
    student: Sequence[float], control: Sequence[float], *, higher_is_better: bool = True, against: str = "control"
) -> Gain:
    """The gain of student over control, paired seed by seed; a seed without a finite value on both sides is left out.

    student, control: the metric of each seed, in the same order of seeds.
    """
    way = 1.0 if higher_is_better else -1.0
    pairs = [(s, c) for s, c in zip(student, control, strict=False) if np.isfinite(s) and np.isfinite(c)]
    differences = tuple(way * (s - c) for s, c in pairs)
    mean, low, high = interval(differences)
    return Gain(mean, low, high, len(differences), against, differences)


def identical(gain: Gain) -> bool:
    """True when every seed gave the same difference: the spread is then unknown, not nil."""
    return gain.n > 1 and gain.high - gain.low <= 1e-9 * max(1e-3, abs(gain.mean))


def state(gain: Gain) -> State:
    """'helped' when the whole interval is above zero, 'did not help' when it is below, else 'cannot tell'."""
    if gain.n < 2 or identical(gain) or not (np.isfinite(gain.low) and np.isfinite(gain.high)):
        return "cannot tell"
    if gain.low > 0:
        return "helped"
    return "did not help" if gain.high < 0 else "cannot tell"


def opponent(gain: Gain) -> str:
    """What the gain is over, in words: 'the control', 'training from scratch'."""
    return OPPONENTS.get(gain.against, f"the {numerals.pretty(gain.against)}")


def verdict(gain: Gain, metric: str, *, higher_is_better: bool = True, do: str = "teach") -> str:
    """One plain sentence: helped, did not help, or cannot tell with these seeds, by how much, with the interval.

    metric: its name, e.g. 'accuracy'. do: the verb of the recipe, which names the subject.
    """
    subject, name, against = SUBJECTS.get(do, "Distillation"), numerals.pretty(metric) or "the metric", opponent(gain)
    if gain.n == 0 or not np.isfinite(gain.mean):
        return f"Cannot tell: no seed has a finite {name} for both the student and {against}."
    better = gain.mean if higher_is_better else -gain.mean
    if numerals.amount(metric, gain.mean) == numerals.amount(metric, 0.0):
        compared = f"{name} equals that of {against}"
    else:
        way = "above" if better > 0 else "below"
        compared = f"{name} is {numerals.amount(metric, gain.mean)} {way} {against}"
    if gain.n == 1:
        return f"Cannot tell with one seed: {compared}; an interval needs at least two."
    if not (np.isfinite(gain.low) and np.isfinite(gain.high)):
        return f"Cannot tell: {compared} over {gain.n} seeds, but no interval is known."
    if identical(gain):
        return (
            f"Cannot tell with these seeds: {compared}, by the same amount in all {gain.n}, so the spread is unknown."
        )
    spread = numerals.between(metric, gain.low, gain.high, higher_is_better)
    seeds = f"95{numerals.SPACE}% interval {spread}, {gain.n} seeds"
    words: dict[State, str] = {
        "helped": f"{subject} helped: {compared} ({seeds}).",
        "did not help": f"{subject} did not help: {compared} ({seeds}).",
        "cannot tell": f"Cannot tell with these seeds: {compared}, but the interval includes zero ({seeds}).",
    }
    return words[state(gain)]
