"""Distil or train? Published scaling laws, or the user's own, asked before any compute is spent."""

from __future__ import annotations

import csv
import math
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import numpy as np

from limbeck.core import capacity
from limbeck.core.errors import BadInput, nearest
from limbeck.core.laws import CHINCHILLA, TESTED, Laws, Runs, fit, stacked

__all__ = ["Question", "answer", "number", "read_runs"]

Pay = Literal["nothing", "inference", "training", "both"]
CLOSE = 0.01  # the paper's extrapolation error: predicted losses nearer than this share are not told apart
COLUMNS = ("student_params", "tokens", "loss", "teacher_loss", "teacher_params", "teacher_tokens")
UNITS = {"": 1.0, "k": 1e3, "m": 1e6, "b": 1e9, "g": 1e9, "t": 1e12}
HORIZON = 6.0  # decades of compute, up and down, in which the turning point is looked for


@dataclass(frozen=True)
class Question:
    """What is asked.

    student: parameters. flops: of the whole budget. teacher_loss: nats a token on the student's text, in its tokens;
    else teacher and teacher_tokens: the parameters and training tokens that it is predicted from; without any of them
    the best teacher is sought. pay: what of the teacher the budget pays for; "" is inference of a teacher that is
    there, and all of one that is not. students: that share the teacher's training. unique: tokens of text (or of the
    teacher's answers) at hand, 0 when there is no lack.
    """

    student: float
    flops: float
    teacher_loss: float | None = None
    teacher: float | None = None
    teacher_tokens: float | None = None
    pay: str = ""
    students: int = 1
    unique: float = 0.0

    def __post_init__(self) -> None:
        for name in ("student", "flops", "teacher_loss", "teacher", "teacher_tokens"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise BadInput(f"{name.replace('_', ' ')} must be a number > 0, got {value:g}")
        if self.students < 1:
            raise BadInput(f"students must be at least 1, got {self.students}")
        if self.pay and self.pay not in get_args(Pay):
            raise BadInput(f"no way to pay {self.pay!r}{nearest(self.pay, get_args(Pay))}")
        if self.teacher_loss is None and (self.teacher is None) != (self.teacher_tokens is None):
            raise BadInput("a teacher is told by its loss, or by both its parameters and its training tokens")
        if self.pay in ("training", "both") and self.known and None in (self.teacher, self.teacher_tokens):
            raise BadInput("to pay for the teacher's training its parameters and its training tokens must be told")
        if self.pay in ("inference", "both") and self.known and self.teacher is None:
            raise BadInput("to pay for the teacher's inference its parameters must be told")

    @property
    def known(self) -> bool:
        """Whether a teacher is told at all."""
        return self.teacher_loss is not None or self.teacher is not None

    @property
    def bill(self) -> tuple[bool, bool]:
        """Whether the teacher's inference and its training are paid for."""
        default = "both" if not self.known else "inference" if self.teacher else "nothing"
        pay = self.pay or default
        return pay in ("inference", "both"), pay in ("training", "both")


class Teacher(NamedTuple):
    """A teacher: its loss, and where known its parameters and training tokens."""

    loss: float
    parameters: float | None = None
    tokens: float | None = None


@dataclass(frozen=True)
class Answer:
    """What the laws say. decision: distil, train, close (too close to call) or unknown.

    Losses in nats a token; tokens: that each way affords. interval: of distilled loss less trained loss, 90 %, from
    resampled runs. turn: FLOPs beyond which training alone is better, None where neither overtakes the other.
    best_teacher_loss: that would teach this student best. passes: over the text at hand.
    """

    decision: str
    trained_loss: float
    trained_tokens: float
    distilled_loss: float | None = None
    distilled_tokens: float | None = None
    interval: tuple[float, float] | None = None
    teacher: Teacher | None = None
    best_teacher_loss: float | None = None
    turn: float | None = None
    passes: float = 0.0
    source: str = ""
    error: float | None = None
    reasons: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {**asdict(self), "teacher": self.teacher._asdict() if self.teacher else None}


# ---- the plan --------------------------------------------------------------------------------------------------------
def tokens_for(flops: float, student: float, teacher: Teacher | None, bill: tuple[bool, bool], students: int) -> float:
    """Tokens that a budget affords, <= 0 when the teacher alone costs more: eq. 9 of the paper with 2 N FLOPs forward.

    FLOPs = 6 N_S D_S + 2 N_T D_S (inference) + 6 N_T D_T / students (training).
    """
    inference, training = bill
    each, before = 6 * student, 0.0
    if teacher is not None and teacher.parameters is not None:
        each += 2 * teacher.parameters * inference
        if training and teacher.tokens is not None:
            before = 6 * teacher.parameters * teacher.tokens / students
    return (flops - before) / each


def answer(question: Question, laws: Laws = CHINCHILLA) -> Answer:
    """Whether to distil or to train, how many tokens, and what losses to expect."""
    q = question
    trained_tokens = tokens_for(q.flops, q.student, None, (False, False), 1)
    trained = float(laws.alone(q.student, trained_tokens))
    teacher = _teacher(q, laws)
    tokens = tokens_for(q.flops, q.student, teacher, q.bill, q.students)
    if tokens <= 0:
        reason = "the teacher's training alone costs more than the whole budget"
        return _told(q, laws, teacher, "train", trained, trained_tokens, reasons=[reason])
    if teacher is None or laws.distilled is None:
        return _without_law(q, laws, teacher, trained, trained_tokens, tokens if teacher else None)
    taught = float(laws.taught(q.student, tokens, teacher.loss))
    gain = trained - taught
    interval = laws.interval(lambda law: _difference(law, q, teacher, tokens, trained_tokens))
    if interval is not None:
        decision = "distil" if interval[1] < 0 else "train" if interval[0] > 0 else "close"
    else:
        decision = "close" if abs(gain) < CLOSE * trained else "distil" if gain > 0 else "train"
    best = _best_loss(laws, q.student, tokens)
    reasons = [f"distilled it reaches {taught:.3f}, trained alone {trained:.3f} nats a token, for the same compute"]
    if teacher.loss < best * 0.98:
        reasons.append(
            f"a teacher of {best:.3f} would teach this student best; one of {teacher.loss:.3f} is too good for it"
        )
    elif teacher.loss > best * 1.02:
        reasons.append(f"a better teacher would teach more, down to a loss of {best:.3f}")
    return _told(
        q,
        laws,
        teacher,
        decision,
        trained,
        trained_tokens,
        reasons=reasons,
        distilled_loss=taught,
        distilled_tokens=tokens,
        interval=interval,
        best_teacher_loss=best,
        turn=_turn(q, laws, teacher),
    )


def _difference(law: Laws, q: Question, teacher: Teacher, tokens: float, trained_tokens: float) -> float:
    """Distilled less trained loss, the teacher's loss predicted anew where it was not told."""
    loss = teacher.loss
    if q.teacher_loss is None and teacher.parameters and teacher.tokens:
        loss = float(law.alone(teacher.parameters, teacher.tokens))
    return float(law.taught(q.student, tokens, loss) - law.alone(q.student, trained_tokens))


def _teacher(q: Question, laws: Laws) -> Teacher | None:
    """The teacher that is told, or the best one; None when only a distillation law could choose it."""
    if q.teacher_loss is not None:
        return Teacher(q.teacher_loss, q.teacher, q.teacher_tokens)
    if q.teacher is not None and q.teacher_tokens is not None:
        return Teacher(float(laws.alone(q.teacher, q.teacher_tokens)), q.teacher, q.teacher_tokens)
    return None if laws.distilled is None else _best_teacher(q, laws)


def _best_teacher(q: Question, laws: Laws) -> Teacher:
    """The parameters and tokens of the teacher that leave the student the lowest loss within the budget: by a grid over
    what the laws are known for, or two decades about the student and the budget, refined twice."""
    known = laws.valid
    sizes = known.parameters or (q.student / 100, q.student * 100)
    lengths = known.tokens or (q.flops / (600 * q.student), q.flops / (0.06 * q.student))
    ends = np.log([[max(sizes[0], 1.0), sizes[1]], [max(lengths[0], 1.0), lengths[1]]])
    limits = ends.copy()
    best = (math.inf, ends[:, 0])
    inference, training = q.bill
    for _ in range(3):
        n, d = np.meshgrid(*[np.linspace(float(low), float(high), 60) for low, high in ends])
        size, length = np.exp(n), np.exp(d)
        before = 6 * size * length / q.students if training else np.zeros_like(size)
        tokens = (q.flops - before) / (6 * q.student + (2 * size if inference else 0))
        loss = np.full_like(tokens, np.inf)
        ok = tokens > 0
        loss[ok] = laws.taught(q.student, tokens[ok], laws.alone(size[ok], length[ok]))
        at = np.unravel_index(int(np.argmin(loss)), loss.shape)
        if loss[at] < best[0]:
            best = (float(loss[at]), np.array([n[at], d[at]]))
        width = (ends[:, 1] - ends[:, 0]) / 20
        ends = np.stack([best[1] - width, best[1] + width], 1).clip(limits[:, :1], limits[:, 1:])
    if not math.isfinite(best[0]):
        raise BadInput(
            f"no teacher within what the laws are known for can be trained and asked with {q.flops:.3g} FLOPs"
        )
    chosen, after = (float(value) for value in np.exp(best[1]))
    return Teacher(float(laws.alone(chosen, after)), chosen, after)


def _best_loss(laws: Laws, student: float, tokens: float) -> float:
    """The teacher's loss that gives this student the lowest one."""
    alone = float(laws.alone(student, tokens))
    losses = np.linspace(max(laws.supervised.E, alone / 4), alone * 1.5, 4000)
    return float(losses[int(np.argmin(laws.taught(student, tokens, losses)))])


def _turn(q: Question, laws: Laws, teacher: Teacher) -> float | None:
    """The least budget from which training alone is better on, within six decades of the one asked about."""

    def gain(flops: float) -> float:
        tokens = tokens_for(flops, q.student, teacher, q.bill, q.students)
        if tokens <= 0:
            return -1.0
        mine = tokens_for(flops, q.student, None, (False, False), 1)
        return float(laws.alone(q.student, mine) - laws.taught(q.student, tokens, teacher.loss))

    budgets = q.flops * np.logspace(-HORIZON, HORIZON, 241)
    gains = [gain(float(b)) for b in budgets]
    if gains[-1] > 0 or max(gains) <= 0:
        return None
    last = max(i for i, value in enumerate(gains) if value > 0)
    return _crossing(gain, float(budgets[last]), float(budgets[last + 1]))


def _crossing(gain: Callable[[float], float], low: float, high: float) -> float:
    for _ in range(60):
        middle = math.sqrt(low * high)
        low, high = (middle, high) if gain(middle) > 0 else (low, middle)
    return math.sqrt(low * high)


def _without_law(
    q: Question, laws: Laws, teacher: Teacher | None, trained: float, tokens: float, distilled_tokens: float | None
) -> Answer:
    """What can be said without coefficients: a distilled student is no better than its teacher, and what the law's
    authors found in general."""
    if teacher is not None and teacher.loss >= trained:
        why = f"alone it reaches {trained:.3f}, and the law lets no student below its teacher's {teacher.loss:.3f}"
        return _told(q, laws, teacher, "train", trained, tokens, reasons=[why], distilled_tokens=distilled_tokens)
    wasted = q.bill[1] and q.students == 1
    found = (
        "where the teacher is trained for this student alone, training without one was generally better"
        if wasted
        else "where the teacher is there or shared, distilling was better up to a compute that grows with the student"
    )
    reasons = [
        f"the distillation law's authors found that {found} (arXiv 2502.08606)",
        "no coefficients of the distillation law are shipped, and its authors' would be of their models and text: give "
        "runs of your own with --fit, or coefficients with --laws",
    ]
    if teacher is not None:
        bound = f"at best a distilled student reaches {teacher.loss:.3f}, its teacher's; trained alone {trained:.3f}"
        reasons.insert(0, bound)
    decision = "train" if wasted else "unknown"
    return _told(q, laws, teacher, decision, trained, tokens, reasons=reasons, distilled_tokens=distilled_tokens)


def _told(
    q: Question,
    laws: Laws,
    teacher: Teacher | None,
    decision: str,
    trained: float,
    trained_tokens: float,
    *,
    reasons: list[str],
    distilled_loss: float | None = None,
    distilled_tokens: float | None = None,
    interval: tuple[float, float] | None = None,
    best_teacher_loss: float | None = None,
    turn: float | None = None,
) -> Answer:
    """The answer with what to be careful about."""
    tokens = distilled_tokens if decision == "distil" and distilled_tokens else trained_tokens
    passes = tokens / q.unique if q.unique else 0.0
    return Answer(
        decision,
        trained,
        trained_tokens,
        distilled_loss,
        distilled_tokens,
        interval,
        teacher,
        best_teacher_loss,
        turn,
        passes,
        laws.source,
        laws.error,
        [*reasons, *_gap(q, teacher)],
        _warnings(q, laws, teacher, tokens, passes),
    )


def _gap(q: Question, teacher: Teacher | None) -> list[str]:
    """What the capacity-gap law says of the teacher's size."""
    best = capacity.RATIO * q.student
    said = f"by the capacity-gap law (arXiv 2311.07052) a teacher of about {short(best)} parameters teaches it best"
    if teacher is not None and teacher.parameters is not None:
        said += f"; this one has {teacher.parameters / q.student:.2g} times the student's, against {capacity.RATIO}"
    return [said]


def _warnings(q: Question, laws: Laws, teacher: Teacher | None, tokens: float, passes: float) -> list[str]:
    found = []
    where = "the law's stated range" if laws is CHINCHILLA else "the runs that the law was fitted to"
    checks = [("parameters", q.student, "the student's "), ("tokens", tokens, "")]
    if teacher is not None:
        checks.append(("teacher_loss", teacher.loss, "a "))
        if q.teacher_loss is None and teacher.parameters and teacher.tokens:
            checks += [
                ("parameters", teacher.parameters, "the teacher's "),
                ("tokens", teacher.tokens, "the teacher's "),
            ]
    for what, value, whose in checks:
        if said := laws.valid.outside(what, value):
            found.append(f"{whose}{said}, {where}: this is extrapolation")
    for what, value, _ in checks[:2] if laws.distilled is not None else []:
        if said := TESTED.outside(what, value):
            found.append(f"{said}, where the distillation law's form was tested (arXiv 2502.08606)")
    if not capacity.TEACHERS[0] <= capacity.RATIO * q.student <= capacity.TEACHERS[1]:
        ends = " to ".join(map(short, capacity.TEACHERS))
        found.append(f"the capacity-gap law was seen with teachers of {ends} parameters only")
    if passes > 1:
        found.append(
            f"{short(tokens)} tokens are {passes:.1f} passes over the {short(q.unique)} at hand, and laws know only "
            "fresh text; over many passes of a teacher's stored answers students also take over its mistakes (teacher "
            "hacking, arXiv 2502.02671): make fresh answers, or use more prompts"
        )
    if laws is CHINCHILLA and q.teacher_loss is not None:
        found.append("losses compare only on the same text in the same tokens, and the law's are those of its authors'")
    return found


# ---- words -----------------------------------------------------------------------------------------------------------
def short(value: float) -> str:
    """12345678 -> '12.3M'."""
    for unit, size in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= size:
            return f"{value / size:.3g}{unit}" if value < 1e15 else f"{value:.3g}"
    return f"{value:.3g}"


def lines(a: Answer, q: Question) -> list[str]:
    """The answer in plain words, most important first."""
    title = {
        "distil": "Distil.",
        "train": "Train the student from text, without a teacher.",
        "close": "Too close to call: the laws do not tell the two apart here.",
        "unknown": "Distilling may pay; the laws at hand cannot say by how much.",
    }
    out = [title[a.decision], ""]
    if a.teacher is not None:
        size = f", {short(a.teacher.parameters)} parameters" if a.teacher.parameters else ""
        after = f" after {short(a.teacher.tokens)} tokens" if a.teacher.tokens else ""
        chosen = "teacher" if q.known else "best teacher"
        out.append(f"{chosen:<14}{a.teacher.loss:.3f} nats a token{size}{after}")
    out.append(f"{'train':<14}{a.trained_loss:.3f} nats a token after {_tokens(a.trained_tokens, q)}")
    if a.distilled_loss is not None and a.distilled_tokens is not None:
        out.append(f"{'distil':<14}{a.distilled_loss:.3f} nats a token after {_tokens(a.distilled_tokens, q)}")
        difference = f"{'difference':<14}{a.distilled_loss - a.trained_loss:+.3f}"
        if a.interval is not None:
            difference += f" (90 % interval {a.interval[0]:+.3f} to {a.interval[1]:+.3f})"
        out.append(difference)
    elif a.distilled_tokens is not None:
        out.append(f"{'distil':<14}? nats a token after {_tokens(a.distilled_tokens, q)}")
    if a.turn is not None:
        out.append(f"{'turning point':<14}training alone is better from {a.turn:.2g} FLOPs on (asked: {q.flops:.2g})")
    elif a.distilled_loss is not None:
        out.append(f"{'turning point':<14}none within six decades of this budget")
    error = "" if a.error is None else f"; {a.error:.2%} off on the largest runs, which it was not fitted to"
    out += ["", f"law: {a.source}{error}"]
    out += [f"- {reason}" for reason in a.reasons]
    return out + [f"warning: {warning}" for warning in a.warnings]


def _tokens(tokens: float, q: Question) -> str:
    return f"{short(tokens)} tokens ({tokens / q.student:.3g} a parameter)"


# ---- what the user writes --------------------------------------------------------------------------------------------
def number(text: str | None, name: str) -> float | None:
    """1.5e9, 1_500_000_000, 1.5B or 300M as a number; None stays None."""
    if text is None:
        return None
    found = re.fullmatch(r"([-+]?[0-9][0-9_,]*\.?[0-9]*(?:[eE][-+]?[0-9]+)?)\s*([a-zA-Z]?)", text.strip())
    if found is None or found[2].lower() not in UNITS:
        raise BadInput(f"{name} must be a number such as 3e20 or 1.5B (k, M, B, T), got {text!r}")
    return float(found[1].replace("_", "").replace(",", "")) * UNITS[found[2].lower()]


def read_runs(path: Path) -> Runs:
    """A csv with student_params, tokens, loss, and for students of a teacher its loss in teacher_loss. Where that is
    not there, teacher_params and teacher_tokens name a run without a teacher in the same file, whose loss is taken."""
    try:
        with path.open(newline="") as file:
            table = csv.DictReader(file)
            head, rows = list(table.fieldnames or ()), list(table)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise BadInput(f"cannot read the runs {path}: {getattr(error, 'strerror', None) or error}") from None
    for name in COLUMNS[:3]:
        if name not in head:
            raise BadInput(f"{path} has no column {name!r}; it needs {', '.join(COLUMNS[:3])}, found {', '.join(head)}")
    numbers = [{name: _cell(row.get(name), name, f"{path}:{i}") for name in COLUMNS} for i, row in enumerate(rows, 2)]
    trained = {(r["student_params"], r["tokens"]): r["loss"] for r in numbers if _alone(r)}
    out = []
    for i, r in enumerate(numbers, 2):
        lacking = next((name for name in COLUMNS[:3] if math.isnan(r[name])), None)
        if lacking:
            raise BadInput(f"{path}:{i}: {lacking!r} is empty")
        teacher = r["teacher_loss"]
        if math.isnan(teacher) and not _alone(r):
            key = (r["teacher_params"], r["teacher_tokens"])
            if key not in trained:
                raise BadInput(f"{path}:{i}: no run without a teacher has {key[0]:g} parameters and {key[1]:g} tokens")
            teacher = trained[key]
        out.append((r["student_params"], r["tokens"], r["loss"], teacher))
    return stacked(out)


def _alone(row: dict[str, float]) -> bool:
    return all(math.isnan(row[name]) for name in COLUMNS[3:])


def _cell(text: str | None, name: str, where: str) -> float:
    if text is None or not text.strip():
        return math.nan
    value = number(text, f"{where}: {name}")
    if value is None or not 0 < value < math.inf:
        raise BadInput(f"{where}: {name} must be > 0, got {text!r}")
    return value


def laws_of(runs: Path | None, written: Path | None, resamples: int) -> Laws:
    """The laws fitted to a csv of runs, or read from a file of coefficients; else the published supervised one."""
    if runs is not None and written is not None:
        raise BadInput("give runs to fit or laws that are fitted, not both")
    if written is not None:
        return Laws.load(written)
    if runs is None:
        return CHINCHILLA
    found = read_runs(runs)
    taught = int(found.taught.sum())
    source = f"fitted to {runs}: {len(found) - taught} runs without a teacher and {taught} with one"
    return fit(found, source=source, resamples=resamples)
