"""Scaling laws of language models, trained from data or by a teacher: their losses, fitted to runs, with intervals.

    L(N, D)           = E + (A / N^alpha + B / D^beta)^gamma
    L_S(N, D, L_T)    = L_T + L_T^(-c0) (1 + (L_T / (L(N, D) d1))^(1/f1))^(-c1 f1) (A' / N^alpha' + B' / D^beta')^gamma'

The second is eq. 8 of Busbridge et al. 2025 (arXiv 2502.08606): a student of N parameters that reads D tokens of a
teacher with cross-entropy L_T. It cannot fall below L_T, and bends where L_T is d1 times what the student would reach
alone: beyond that a better teacher teaches worse. All losses are mean cross-entropies in nats a token of held-out text.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from scipy.optimize import least_squares

from limbeck.core.errors import BadInput

__all__ = ["CHINCHILLA", "Distilled", "Laws", "Range", "Runs", "Supervised", "fit"]

Numbers = Any  # a float, or an array of them
Array = np.ndarray
DELTA = 1e-3  # of the Huber loss on log losses: residuals beyond a tenth of a percent count linearly
STARTS, FOLLOWED, FINISHED = 2048, 12, 3  # starts looked at; of these the best followed a little; of these to the end
WITHIN = {  # exponents beyond these belong to no language model, and a fit finds them where the runs say nothing
    "alpha": (0.02, 1.5),
    "beta": (0.02, 1.5),
    "gamma": (0.1, 2.0),
    "c0": (0.01, 20.0),
    "f1": (0.01, 5.0),
    "d1": (0.2, 5.0),
}


@dataclass(frozen=True)
class Supervised:
    """Loss of a model of N parameters after D tokens of text; every coefficient > 0."""

    E: float
    A: float
    B: float
    alpha: float
    beta: float
    gamma: float = 1.0

    def loss(self, parameters: Numbers, tokens: Numbers) -> Numbers:
        """Nats a token."""
        return self.E + _limit(self.A, self.alpha, parameters, self.B, self.beta, tokens) ** self.gamma


@dataclass(frozen=True)
class Distilled:
    """Loss of a student of N parameters after D tokens of a teacher's; every coefficient > 0."""

    c0: float
    c1: float
    f1: float
    d1: float
    A: float
    B: float
    alpha: float
    beta: float
    gamma: float

    def loss(self, parameters: Numbers, tokens: Numbers, teacher_loss: Numbers, alone: Numbers) -> Numbers:
        """Nats a token. alone: what the supervised law says of the same student and tokens."""
        bend = np.logaddexp(0.0, np.log(teacher_loss / (alone * self.d1)) / self.f1)
        share = np.exp(-self.c0 * np.log(teacher_loss) - self.c1 * self.f1 * bend)
        return teacher_loss + share * _limit(self.A, self.alpha, parameters, self.B, self.beta, tokens) ** self.gamma


def _limit(a: Numbers, alpha: Numbers, parameters: Numbers, b: Numbers, beta: Numbers, tokens: Numbers) -> Numbers:
    """A / N^alpha + B / D^beta: what too few parameters and too few tokens cost."""
    return np.exp(np.log(a) - alpha * np.log(parameters)) + np.exp(np.log(b) - beta * np.log(tokens))


@dataclass(frozen=True)
class Range:
    """Where a law was seen to hold: from the least to the largest of each; None where nobody said."""

    parameters: tuple[float, float] | None = None
    tokens: tuple[float, float] | None = None
    teacher_loss: tuple[float, float] | None = None

    def outside(self, what: str, value: float) -> str:
        """A sentence where the value is outside, else ''."""
        known = getattr(self, what)
        if known is None or known[0] * (1 - 1e-9) <= value <= known[1] * (1 + 1e-9):
            return ""
        return f"{what.replace('_', ' ')} of {value:.4g} is outside {known[0]:.4g} to {known[1]:.4g}"


@dataclass(frozen=True)
class Laws:
    """Both laws with where they come from and where they hold.

    distilled: None where only the supervised law is known. error: relative error of the distilled (else the supervised)
    law on runs that it was not fitted to. resampled: the laws of resampled runs, for intervals.
    """

    supervised: Supervised
    distilled: Distilled | None = None
    source: str = ""
    valid: Range = field(default_factory=Range)
    error: float | None = None
    resampled: tuple[Laws, ...] = field(default=(), repr=False)

    def alone(self, parameters: Numbers, tokens: Numbers) -> Numbers:
        """Loss of a model trained from text."""
        return self.supervised.loss(parameters, tokens)

    def taught(self, parameters: Numbers, tokens: Numbers, teacher_loss: Numbers) -> Numbers:
        """Loss of a student trained by a teacher of that loss."""
        if self.distilled is None:
            raise BadInput("the laws at hand hold no distillation law; fit one to runs of your own")
        return self.distilled.loss(parameters, tokens, teacher_loss, self.alone(parameters, tokens))

    def interval(self, figure: Callable[[Laws], float], level: float = 0.9) -> tuple[float, float] | None:
        """Where a figure lies in that share of the resampled laws; None without any."""
        if not self.resampled:
            return None
        found = [figure(law) for law in self.resampled]
        low, high = np.quantile(found, [(1 - level) / 2, (1 + level) / 2])
        return float(low), float(high)

    def save(self, path: Path) -> None:
        """Write them down, JSON."""
        path.write_text(json.dumps(asdict(self), indent=1) + "\n")

    @staticmethod
    def load(path: Path) -> Laws:
        """What `save` wrote, or the same written by hand."""
        try:
            body = json.loads(path.read_text())
        except (OSError, ValueError) as error:
            raise BadInput(f"cannot read the laws {path}: {getattr(error, 'strerror', None) or error}") from None
        return _laws(body, str(path))


def _laws(body: Any, where: str) -> Laws:
    if not isinstance(body, Mapping) or "supervised" not in body:
        raise BadInput(f"{where} holds no `supervised` law: E, A, B, alpha, beta and gamma")
    distilled = body.get("distilled")
    valid = {k: tuple(v) if v else None for k, v in dict(body.get("valid") or {}).items()}
    try:
        return Laws(
            _coefficients(Supervised, body["supervised"], f"{where}: `supervised`"),
            None if distilled is None else _coefficients(Distilled, distilled, f"{where}: `distilled`"),
            str(body.get("source", where)),
            Range(**valid),
            body.get("error"),
            tuple(_laws(one, where) for one in body.get("resampled") or ()),
        )
    except TypeError as error:
        raise BadInput(f"{where}: {error}") from None


T = TypeVar("T", Supervised, Distilled)


def _coefficients(kind: type[T], body: Any, where: str) -> T:
    names = [f.name for f in fields(kind)]
    if not isinstance(body, Mapping) or set(body) - set(names) or not set(names) - {"gamma"} <= set(body):
        found = ", ".join(map(str, body)) if isinstance(body, Mapping) else repr(body)
        raise BadInput(f"{where} needs {', '.join(names)}, found {found}")
    for name, value in body.items():
        if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 < value < float("inf"):
            raise BadInput(f"{where}: {name} must be a number > 0, got {value!r}")
    return kind(**{name: float(value) for name, value in body.items()})


CHINCHILLA = Laws(
    Supervised(E=1.69, A=406.4, B=410.7, alpha=0.34, beta=0.28),
    source="Hoffmann et al. 2022, arXiv 2203.15556, eq. 10 (supervised law only, gamma = 1)",
    valid=Range(parameters=(70e6, 16e9), tokens=(5e9, 500e9)),
)

TESTED = Range(
    parameters=(143e6, 12.6e9), tokens=(0.0, 512e9)
)  # where Busbridge et al. saw their form hold, within 1 %


# ---- fitting ---------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Runs:
    """Finished runs, one an entry [R]: parameters and tokens of the model that learned, its loss, and the loss of its
    teacher, nan where it had none."""

    parameters: Array
    tokens: Array
    loss: Array
    teacher_loss: Array

    def __len__(self) -> int:
        return len(self.loss)

    def at(self, rows: Array) -> Runs:
        """Those runs alone."""
        return Runs(*(getattr(self, f.name)[rows] for f in fields(self)))

    @property
    def taught(self) -> Array:
        """Which had a teacher."""
        return np.asarray(~np.isnan(self.teacher_loss))


def fit(runs: Runs, *, source: str = "fitted", resamples: int = 0, seed: int = 0) -> Laws:
    """Both laws from runs with and without teachers; the supervised one alone where no run had a teacher.

    Huber loss on log losses, from many random starts. resamples: bootstrap fits, each from runs drawn with replacement
    and started at the fit to all. The error is that of the fifth of the runs with the most compute, predicted by a fit
    to the others.
    """
    alone, taught = runs.at(~runs.taught), runs.at(runs.taught)
    for name, some, least in (("without", alone, 8), ("with", taught, 12)):
        if len(some) < least and (name == "without" or len(some)):
            raise BadInput(f"{source}: a fit needs at least {least} runs {name} a teacher, found {len(some)}")
    random = np.random.default_rng(seed)
    found = _fit(alone, taught, random)
    others = []
    for _ in range(resamples):
        own, theirs = (some.at(random.integers(0, len(some), len(some))) for some in (alone, taught))
        others.append(_fit(own, theirs, random, start=found))
    told = taught if len(taught) else alone
    valid = Range(
        (float(runs.parameters.min()), float(runs.parameters.max())),
        (float(runs.tokens.min()), float(runs.tokens.max())),
        (float(taught.teacher_loss.min()), float(taught.teacher_loss.max())) if len(taught) else None,
    )
    return replace(
        found, source=source, valid=valid, error=_unseen(alone, taught, told, random), resampled=tuple(others)
    )


def _unseen(alone: Runs, taught: Runs, told: Runs, random: np.random.Generator) -> float | None:
    """Mean relative error on the largest fifth of the runs, of a fit to the others; None with too few of them."""
    order = np.argsort(told.parameters * told.tokens, kind="stable")
    kept, unseen = order[: len(told) - max(1, len(told) // 5)], order[len(told) - max(1, len(told) // 5) :]
    if len(kept) < (12 if told is taught else 8):
        return None
    law = _fit(alone, told.at(kept), random) if told is taught else _fit(told.at(kept), taught, random)
    test = told.at(unseen)
    if law.distilled is not None and told is taught:
        predicted = law.taught(test.parameters, test.tokens, test.teacher_loss)
    else:
        predicted = law.alone(test.parameters, test.tokens)
    return float(np.abs(predicted / test.loss - 1).mean())


def _fit(alone: Runs, taught: Runs, random: np.random.Generator, start: Laws | None = None) -> Laws:
    supervised = Supervised(*_least(Supervised, *_supervised_problem(alone, random, start)))
    if not len(taught):
        return Laws(supervised)
    return Laws(supervised, Distilled(*_least(Distilled, *_distilled_problem(taught, supervised, random, start))))


Problem = tuple[Callable[[Array], Array], Array]  # log coefficients [..., K] -> residuals [..., R]; starts [S, K]


def _supervised_problem(runs: Runs, random: np.random.Generator, start: Laws | None) -> Problem:
    n, d, loss = runs.parameters, runs.tokens, np.log(runs.loss)

    def residuals(x: Array) -> Array:
        known = Supervised(*np.moveaxis(np.exp(x)[..., None], -2, 0))
        return np.asarray(np.log(known.loss(n, d)) - loss)

    if start is not None:
        return residuals, np.log([list(asdict(start.supervised).values())])
    alpha, beta, gamma = (random.uniform(*ends, STARTS) for ends in ((0.1, 0.8), (0.1, 0.8), (0.3, 1.3)))
    e = runs.loss.min() * random.uniform(0.2, 0.99, STARTS)
    above = np.median(runs.loss) * np.exp(random.uniform(-3, 0, (2, STARTS)))
    a = above[0] ** (1 / gamma) * np.median(n) ** alpha
    b = above[1] ** (1 / gamma) * np.median(d) ** beta
    return residuals, np.log(np.stack([e, a, b, alpha, beta, gamma], 1))


def _distilled_problem(runs: Runs, law: Supervised, random: np.random.Generator, start: Laws | None) -> Problem:
    n, d, loss, teacher = runs.parameters, runs.tokens, np.log(runs.loss), runs.teacher_loss
    alone = law.loss(n, d)

    def residuals(x: Array) -> Array:
        known = Distilled(*np.moveaxis(np.exp(x)[..., None], -2, 0))
        return np.asarray(np.log(known.loss(n, d, teacher, alone)) - loss)

    if start is not None and start.distilled is not None:
        return residuals, np.log([list(asdict(start.distilled).values())])
    f1, c0 = np.exp(random.uniform(np.log([[0.02], [0.2]]), np.log([[1.0], [6.0]]), (2, STARTS)))
    strength = np.exp(random.uniform(np.log(0.3), np.log(100), STARTS))  # c1 f1, the power beyond the knee
    d1 = random.uniform(0.5, 1.8, STARTS)
    alpha, beta, gamma = (random.uniform(*ends, STARTS) for ends in ((0.1, 0.8), (0.1, 0.8), (0.3, 1.3)))
    size = np.exp(random.uniform(-2, 2, (2, STARTS))) * np.median(teacher) ** (c0 / gamma)
    a, b = size[0] * np.median(n) ** alpha, size[1] * np.median(d) ** beta
    return residuals, np.log(np.stack([c0, strength / f1, f1, d1, a, b, alpha, beta, gamma], 1))


def _least(kind: type[T], residuals: Callable[[Array], Array], starts: Array) -> list[float]:
    """Coefficients of the least Huber loss found from any of the starts, within sense."""
    ends = np.log([WITHIN.get(f.name, (1e-30, 1e30)) for f in fields(kind)]).T
    settings: dict[str, Any] = {"loss": "huber", "f_scale": DELTA, "x_scale": "jac", "bounds": ends}

    def down(at: Array, most: int) -> Any:
        return least_squares(_finite(residuals), at.clip(ends[0] + 1e-9, ends[1] - 1e-9), max_nfev=most, **settings)

    with np.errstate(all="ignore"):
        apart = np.abs(residuals(starts))
        first = np.where(np.isfinite(apart), apart, 1e3).mean(-1)
        near = [down(at, 30) for at in starts[np.argsort(first, kind="stable")[:FOLLOWED]]]
        near.sort(key=lambda found: float(found.cost))
        best = min((down(found.x, 300) for found in near[:FINISHED]), key=lambda found: float(found.cost))
    return [float(value) for value in np.exp(best.x)]


def _finite(residuals: Callable[[Array], Array]) -> Callable[[Array], Array]:
    return lambda x: np.nan_to_num(residuals(x), nan=1e3, posinf=1e3, neginf=-1e3)


def stacked(rows: Sequence[Sequence[float]]) -> Runs:
    """Runs from rows of (parameters, tokens, loss, teacher_loss or nan)."""
    columns = np.asarray(rows, dtype=np.float64).reshape(-1, 4).T
    return Runs(*columns)
