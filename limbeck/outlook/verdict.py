"""The sentence on whether distillation is likely to pay, from the figures alone, and all of them in plain words."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from limbeck.core.capacity import RATIO
from limbeck.outlook.facts import Cost, Outlook
from limbeck.report.tables import aligned

NOISE = 2.0  # standard errors that count as more than noise
ALIKE = 0.01  # nats of KL below which two networks say the same
SURE = 0.05  # by how much a teacher may be more confident than right
SHARP = 0.02  # share of the largest possible entropy below which a teacher says little more than the labels
WIDE = 10.0  # teacher's parameters over the student's from which the gap is told


def judged(o: Outlook) -> Outlook:
    """The sentence, from the figures alone."""
    unit = "bits a byte" if o.forward_kl is None else "nats a label"
    cautions = _cautions(o)
    over_guess = o.guess - o.teacher.nll
    if over_guess <= NOISE * o.guess_noise:
        likely: bool | None = False
        why = (
            f"the teacher's loss of {o.teacher.nll:.3f} nats a label is not better than that of guessing by frequency, "
            f"{o.guess:.3f}, by more than the noise: it does not fit this data (check classes, size, normalisation, "
            "tokenizer and template)"
        )
    elif o.fresh:
        likely = True
        why = (
            f"the student is untrained, so its loss says nothing yet, and the teacher is {over_guess:.3f} nats a label "
            f"better than guessing by frequency ({o.teacher.nll:.3f} against {o.guess:.3f})"
        )
    elif o.gain <= NOISE * o.noise:
        likely = False
        why = (
            f"the teacher is not better than the student on this data by more than the noise ({o.gain:+.4f} {unit}, "
            f"standard error {o.noise:.4f})"
        )
    elif o.forward_kl is not None and o.forward_kl < ALIKE:
        likely, why = False, f"both say the same already (KL {o.forward_kl:.4f} nats), so there is little left to learn"
    else:
        likely, why = True, f"the teacher is {o.gain:.3f} {unit} better than the student (standard error {o.noise:.4f})"
    if likely and o.sure < SHARP:
        likely = None
        why += ", but of training examples it says little more than their labels"
    word = {True: "is likely to pay", False: "is unlikely to pay", None: "cannot be foretold to pay"}[likely]
    return replace(o, verdict=f"Distillation {word}: {why}.", likely=likely, cautions=cautions)


def _cautions(o: Outlook) -> list[str]:
    found = [f"the recipe cannot take a step: {o.problem}"] if o.problem else []
    t = o.teacher
    if t.confidence - t.accuracy > SURE:
        found.append(
            f"the teacher is over-confident: {t.confidence:.1%} sure and {t.accuracy:.1%} right (ece {t.ece:.3f}); "
            "raise the temperature, or give the labels more weight"
        )
    if o.sure < SHARP:
        found.append(
            f"of training examples the teacher's entropy is {o.sure:.2%} of the largest possible: it knows them by "
            "heart or is sure of everything; raise the temperature, or distil on text or pictures that it has not seen"
        )
    ratio = t.parameters / max(1, o.student.parameters)
    if ratio > WIDE:
        law = f"; the best teacher of a language model has about {RATIO} times (limbeck plan)" if o.words else ""
        found.append(
            f"the teacher has {ratio:.0f} times the student's parameters{law}: try an assistant in between (takd), too"
        )
    elif ratio < 1:
        found.append(f"the teacher is smaller than the student ({ratio:.2f} of its parameters)")
    if max(t.dropped, o.student.dropped) > 0.01:
        found.append(f"probability on ids that are no words: teacher {t.dropped:.1%}, student {o.student.dropped:.1%}")
    if o.words is not None and o.words.templates not in ("same", "none"):
        found.append(f"chat templates: {o.words.templates}; the student must be asked as it was taught")
    return found


def lines(o: Outlook) -> list[str]:
    """The figures and the verdict, for a terminal."""
    out = [f"{o.data}, {o.part} part: {o.labels:,} labels of {o.examples:,} examples", ""]
    out += _table(o)
    if o.forward_kl is not None and o.reverse_kl is not None and o.top1 is not None and o.topk is not None:
        out += [
            "",
            f"KL(teacher || student) {o.forward_kl:.4f}, KL(student || teacher) {o.reverse_kl:.4f} nats a label",
            f"same first choice {o.top1:.1%}" + (f", of the first {o.k} {o.topk:.1%} in common" if o.k > 1 else ""),
        ]
    else:
        out += ["", "two tokenizers: losses compare by the byte, and there is no divergence token by token"]
    if o.words is not None:
        w = o.words
        ids = "the same ids" if w.same else "different ids"
        out.append(
            f"vocabularies: {w.student:,} and {w.teacher:,} (teacher) words, {w.common:,} in common, {ids}; heads of "
            f"{w.student_rows:,} and {w.teacher_rows:,} rows; chat templates: {w.templates}"
        )
    out += o.notes
    if o.cost is not None:
        out.append(_cost(o.cost))
    return [*out, *(f"caution: {c}" for c in o.cautions), "", o.verdict]


def _table(o: Outlook) -> Sequence[str]:
    text = o.teacher.bits_per_byte is not None
    head = ["", "network", "parameters", "nll", *(["bits/byte"] if text else []), "accuracy", "ece", "confidence"]
    rows = [tuple(head)]
    for role, side in (("teacher", o.teacher), ("student", o.student)):
        bits = [f"{side.bits_per_byte:.4f}"] if side.bits_per_byte is not None else []
        shares = (f"{side.accuracy:.1%}", f"{side.ece:.3f}", f"{side.confidence:.1%}")
        rows.append((role, side.name, f"{side.parameters:,}", f"{side.nll:.4f}", *bits, *shares))
    rows.append(("guess", "by frequency", "", f"{o.guess:.4f}", *([""] if text else []), "", "", ""))
    return aligned(rows)


def _cost(c: Cost) -> str:
    said = f"a step of {c.batch_size}: {_time(c.seconds)}, peak memory {c.memory / 2**20:,.0f} MiB"
    said += f" ({c.before / 2**20:,.0f} MiB before the first)"
    if c.steps is None:
        return said
    one = c.seconds * c.steps
    whole = f"{c.runs} runs with control and seeds at most {_time(one * c.runs)}"
    return f"{said}; {c.steps:,} steps: about {_time(one)}, {whole}"


def _time(seconds: float) -> str:
    for unit, size, least in (("h", 3600.0, 5400.0), ("min", 60.0, 90.0), ("s", 1.0, 1.0)):
        if seconds >= least:
            return f"{seconds / size:.1f} {unit}"
    return f"{1000 * seconds:.0f} ms"
