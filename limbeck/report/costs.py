"""What a run costs and saves: the few figures beside its verdict, the same for page, terminal and Markdown."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from limbeck.report import numerals, statistics
from limbeck.report.runs import Arm, Run

# What a verb saves first of all: (a size of an arm, its noun); parameters where it has none of these.
SAVED = {
    "condense": (("images", "images"), ("rows", "rows"), ("parameters", "parameters")),
    "shorten": (("steps", "steps"), ("nfe", "network evaluations"), ("parameters", "parameters")),
}


@dataclass(frozen=True)
class Figure:
    """One number in large type with what it means under it."""

    value: str
    meaning: str
    state: str = ""


def mean(values: Sequence[float]) -> float | None:
    """The mean of what is finite; None when nothing is."""
    finite = [v for v in values if math.isfinite(v)]
    return sum(finite) / len(finite) if finite else None


def half_width(values: Sequence[float]) -> float | None:
    """Half the 95 % t interval of the mean, None where no spread is known: one seed, or one value shared by all."""
    middle, _, high = statistics.interval([v for v in values if math.isfinite(v)])
    return high - middle if high > middle + 1e-12 * abs(middle) else None


def quantity(arm: Arm | None, name: str) -> float | None:
    """An arm's parameters, bytes, latency or further size by name."""
    if arm is None:
        return None
    known = {"parameters": arm.parameters, "bytes": arm.bytes, "latency_ms": arm.latency_ms}
    return known.get(name, arm.sizes.get(name))


def gain(run: Run) -> str:
    """'+1.2 points', '14.2 lower', or a dash."""
    return numerals.gained(run.metric, run.gain.mean, run.higher_is_better) if run.gain else numerals.ABSENT


def interval(run: Run) -> str:
    """'+0.4 to +2.0', 'one seed: no interval', or a dash."""
    if run.gain is None:
        return numerals.ABSENT
    if run.gain.n < 2:
        return "one seed: no interval"
    return numerals.between(run.metric, run.gain.low, run.gain.high, run.higher_is_better) or "no interval"


def ratio(run: Run, name: str) -> float | None:
    """Reference over student: above 1 the student is the smaller or faster."""
    ours, theirs = quantity(run.student, name), quantity(run.reference, name)
    if ours is None or theirs is None or not (ours > 0 and theirs > 0):
        return None
    return theirs / ours


def figures(run: Run) -> list[Figure]:
    """Gain, level, what was saved, speed and time: those that the run knows."""
    made: list[Figure] = []
    if run.gain and run.gain.n:
        bounds = interval(run)
        spread = bounds if run.gain.n < 2 or bounds == "no interval" else f"95{numerals.SPACE}% interval {bounds}"
        made.append(Figure(gain(run), f"{numerals.pretty(run.metric)}, against {against(run)}; {spread}", run.state))
    level = mean(run.student.values(run.metric)) if run.student else None
    if level is not None:
        others = [a for a in (run.against, run.reference) if a is not None and mean(a.values(run.metric)) is not None]
        levels = [f"{numerals.pretty(a.key)} {numerals.value(run.metric, mean(a.values(run.metric)))}" for a in others]
        meaning = "; ".join([f"student {numerals.pretty(run.metric)}", *dict.fromkeys(levels)])
        made.append(Figure(numerals.value(run.metric, level), meaning))
    count, times, told = size(run)
    if times:
        made.append(Figure(times, f"{count}; {told}"))
    faster = ratio(run, "latency_ms")
    if faster is not None and not 0.98 < faster < 1.02:
        ours, theirs = quantity(run.student, "latency_ms"), quantity(run.reference, "latency_ms")
        told = f"{numerals.milliseconds(ours)}; {reference_name(run)} {numerals.milliseconds(theirs)}"
        made.append(Figure(numerals.times(faster, "faster", "slower", "same speed"), told))
    if run.seconds is not None:
        seeds = max((len(v) for a in run.arms.values() for v in a.per_seed.values()), default=len(run.seeds))
        parts = ["the whole run", f"{seeds} seed{'s' * (seeds != 1)}" if seeds else "", run.device]
        made.append(Figure(numerals.duration(run.seconds), ", ".join(p for p in parts if p)))
    return made


def size(run: Run) -> tuple[str, str, str]:
    """What the verb makes smaller: ('100 images', '50x fewer images', 'full 5,000'), with '' for what is not known."""
    for name, noun in (*SAVED.get(run.do, ()), ("parameters", "parameters")):
        ours, theirs, factor = quantity(run.student, name), quantity(run.reference, name), ratio(run, name)
        if ours is None or (factor is None and name != "parameters"):
            continue
        count = f"{numerals.parameters(ours)} {noun if ours != 1 else noun.removesuffix('s')}"
        if factor is None:
            return count, "", ""
        words = (f"fewer {noun}", f"more {noun}", f"same {noun}")
        words = ("smaller", "larger", "same size") if name == "parameters" else words
        return count, numerals.times(factor, *words), f"{reference_name(run)} {numerals.parameters(theirs)}"
    return numerals.ABSENT, "", ""


def against(run: Run) -> str:
    """'the control', 'the teacher at one step': what the gain is over."""
    return statistics.opponent(run.gain) if run.gain else ""


def reference_name(run: Run) -> str:
    """'teacher', 'full': what costs are compared with, '' when there is none."""
    return numerals.pretty(run.reference.key) if run.reference else ""


def saved(run: Run) -> str:
    """The student's size with its ratio to the teacher: '12,345 (8.3x smaller)'."""
    count = quantity(run.student, "parameters")
    factor = ratio(run, "parameters")
    text = numerals.parameters(count)
    return text if factor is None else f"{text} ({numerals.times(factor, 'smaller', 'larger', 'same size')})"


def speed(run: Run) -> str:
    """The student's latency with its ratio to the teacher's."""
    text = numerals.milliseconds(quantity(run.student, "latency_ms"))
    factor = ratio(run, "latency_ms")
    return text if factor is None else f"{text} ({numerals.times(factor, 'faster', 'slower', 'same speed')})"
