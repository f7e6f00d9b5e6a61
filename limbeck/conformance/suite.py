"""Finds the checks that concern a method, runs them, and says what came out."""

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from limbeck.conformance import cards, loop, losses, measuring, selecting, shaping, training, vectors
from limbeck.conformance.expect import Broken, Check
from limbeck.core import find
from limbeck.core.errors import LimbeckError

FAMILIES: Mapping[str, ModuleType] = {
    "losses": losses,
    "train": training,
    "shape": shaping,
    "data": selecting,
    "measure": measuring,
}
FIRM = ("vector", "card", "exceptions")  # no card can declare an exception to these


@dataclass(frozen=True)
class Outcome:
    """What came of one check of one method.

    check: its name, such as "batch order". passed: whether the rule is kept, or its declared exception is needed.
    exception: the reason that the card gives for not keeping it, '' when it claims to. message: what is wrong.
    """

    check: str
    passed: bool
    message: str = ""
    exception: str = ""
    seconds: float = 0.0


def checks(name: str) -> dict[str, Check]:
    """Every check that concerns the method called `name`, by its name, cheapest first."""
    try:
        method = find.get(name)
    except Exception as error:
        if name not in find.names():
            raise
        return {"import": _fails(f"{type(error).__name__}: {error}")}
    found = {**_checks_in(cards), **_checks_in(FAMILIES[find.family(name)])}
    return {key: check for key, check in found.items() if _concerned(check, method)}


def _concerned(check: Check, method: Any) -> bool:
    try:
        return bool(getattr(check, "concerns", lambda _: True)(method))
    except Exception:  # a method too broken to tell: the check will say how
        return True


def _fails(message: str) -> Check:
    def check(name: str) -> None:
        raise Broken(message)

    return check


def _checks_in(module: ModuleType) -> dict[str, Check]:
    return {
        key.removeprefix("check_").replace("_", " "): check
        for key, check in vars(module).items()
        if key.startswith("check_") and check.__module__ == module.__name__
    }


def run(name: str, *, folder: Path | None = None, only: str = "", until_failure: bool = False) -> list[Outcome]:
    """Check the method called `name`; raises BadInput when there is none.

    folder: of the reference vectors, the repository's by default. only: a check to run alone. until_failure: stop at
    the first rule that is broken.
    """
    vectors.use(folder)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the toys are so small that more threads only wait for each other
    fixed, torch.backends.cudnn.deterministic = torch.backends.cudnn.deterministic, True
    outcomes: list[Outcome] = []
    try:
        wanted = {key: check for key, check in checks(name).items() if only in ("", key)}
        declared = {} if "import" in wanted else find.get(name).card.exceptions
        excused = {key.replace("_", " "): reason for key, reason in declared.items()}
        for key, check in wanted.items():
            outcomes.append(judge(name, key, check, "" if key in FIRM else excused.get(key, "")))
            if until_failure and not outcomes[-1].passed:
                break
    finally:
        torch.set_num_threads(threads)
        torch.backends.cudnn.deterministic = fixed
        vectors.use(None)
    return outcomes


def judge(name: str, key: str, check: Check, excuse: str = "") -> Outcome:
    """Run one check of one method; with `excuse` it has to fail, else the exception is not needed."""
    began = time.perf_counter()
    message = ""
    with torch.random.fork_rng():
        try:
            check(name)
        except (Broken, LimbeckError) as error:
            message = str(error)
        except Exception as error:  # whatever a method raises is a finding about that method
            message = f"{type(error).__name__}: {error}"
    seconds = time.perf_counter() - began
    if excuse and not message:
        return Outcome(
            key, False, f"the card declares an exception to {key!r}, but the check passes: take it out", excuse, seconds
        )
    return Outcome(key, bool(excuse) or not message, message, excuse, seconds)


def loop_checks() -> dict[str, Check]:
    """What the loop promises whatever the method, by name."""
    return _checks_in(loop)


def self_test(*, only: str = "") -> list[Outcome]:
    """Check what the loop promises: a few seconds, for `limbeck doctor` and for the tests."""
    return [judge("", key, check) for key, check in loop_checks().items() if only in ("", key)]
