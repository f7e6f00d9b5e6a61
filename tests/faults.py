"""Plants faults in a copy of the package and shows that the suite catches every one: `python -m tests.faults [NAME]`.

A fault is a textual replacement that must apply exactly once. The methods concerned are checked in the copy, first as
they are and then with the fault; it is caught when a check fails that passed before. A suite that cannot fail is none.
"""

import json
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
Found = dict[str, dict[str, str]]  # who was checked -> check -> what is wrong, '' for nothing
LOOP = "the loop"


@dataclass(frozen=True)
class Fault:
    """What is planted where, and who has to notice.

    file: below limbeck/. right: the text that is replaced, found exactly once. wrong: by what. by: the methods whose
    checks must catch it, LOOP for the checks of the loop, or a file of tests.
    """

    name: str
    file: str
    right: str
    wrong: str
    by: tuple[str, ...]

    def apply(self, source: str) -> str:
        """The source with the fault in it."""
        count = source.count(self.right)
        if count != 1:
            raise ValueError(f"fault {self.name!r}: {self.right!r} is found {count} times in {self.file}, not once")
        return source.replace(self.right, self.wrong)


def _fault(name: str, file: str, right: str, wrong: str, *by: str) -> Fault:
    return Fault(name, file, right, wrong, by or (Path(file).stem,))


LOGITS, CORE = "losses/logits", "core"
FAULTS: list[Fault] = []


# ---- the copy, and a process for each look at it ---------------------------------------------------------------------
@contextmanager
def copied() -> Iterator[Path]:
    """A copy of the package with its tests and vectors, to be altered at will."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        for part in ("limbeck", "tests"):
            shutil.copytree(ROOT / part, root / part, ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(ROOT / "pyproject.toml", root)
        yield root


def apart(root: Path, work: Callable[[], Any], limit: float = 300.0) -> Any:
    """What `work` returns, as JSON, in a process of its own that imports limbeck from `root`; None if it hangs or dies.

    A fork, since starting anew and importing torch would take longer than the work.
    """
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.close(reader)
            for module in [m for m in sys.modules if m.split(".")[0] in ("limbeck", "tests")]:
                del sys.modules[module]
            sys.dont_write_bytecode = True  # a cached file of the same size and second would hide a fault
            sys.path.insert(0, str(root))
            os.chdir(root)
            os.setpgid(0, 0)
            with os.fdopen(writer, "w") as out:
                json.dump(work(), out)
            os._exit(0)
        except BaseException:
            import traceback

            traceback.print_exc()
            os._exit(1)
    os.close(writer)
    timer = _Alarm(child, limit)
    with os.fdopen(reader) as answer, timer:
        text = answer.read()
    os.waitpid(child, 0)
    return json.loads(text) if text else None


class _Alarm:
    """Ends a child that takes too long."""

    def __init__(self, child: int, limit: float) -> None:
        import threading

        self.timer = threading.Timer(limit, lambda: os.kill(child, signal.SIGKILL))

    def __enter__(self) -> None:
        self.timer.start()

    def __exit__(self, *_: object) -> None:
        self.timer.cancel()


def check(root: Path, by: tuple[str, ...], *, known: Found | None = None, only: tuple[str, ...] = ()) -> Found | None:
    """Outcomes in the copy. known: what passes there without a fault; then the first new failure is enough."""

    def work() -> Found:
        import torch

        torch.set_num_threads(1)
        found: Found = {}
        for one in by:
            for key, message in _outcomes(one, only):
                found.setdefault(one, {})[key] = message
                if known is not None and message and known[one].get(key) == "":
                    return found
        return found

    return apart(root, work)


def _outcomes(one: str, only: tuple[str, ...]) -> Iterator[tuple[str, str]]:
    if one.endswith(".py"):
        yield one, _tests(one)
        return
    try:
        from limbeck import conformance

        if one == LOOP:
            for outcome in conformance.self_test():
                yield outcome.check, "" if outcome.passed else outcome.message
            return
        for key in conformance.checks(one):
            if not only or key in only:
                (outcome,) = conformance.run(one, only=key)
                yield key, "" if outcome.passed else outcome.message
    except ImportError as error:  # the fault broke an import: that is noticed at once
        yield "import", f"{type(error).__name__}: {error}"


def _tests(file: str) -> str:
    """What pytest says of a file of tests, '' when all pass."""
    import io
    from contextlib import redirect_stderr, redirect_stdout

    import pytest

    with redirect_stdout(io.StringIO()) as said, redirect_stderr(io.StringIO()):
        code = pytest.main([file, "-x", "-q", "-p", "no:cacheprovider", "--no-header", "--tb=line"])
    lines = [line for line in said.getvalue().splitlines() if line.startswith(("FAILED", "ERROR"))]
    return "" if code == 0 else (lines or [f"pytest ends with {code}"])[0]


@dataclass(frozen=True)
class Verdict:
    """Whether a fault was caught, by which check, and what that check said."""

    fault: Fault
    caught: bool
    by: str
    message: str
    seconds: float


def judge(root: Path, fault: Fault, known: Found) -> Verdict:
    """Plant one fault in the copy, look, and take it out again."""
    file, began = root / "limbeck" / fault.file, time.monotonic()
    source = file.read_text(encoding="utf-8")
    file.write_text(fault.apply(source), encoding="utf-8")
    try:
        found = check(root, fault.by, known=known)
    finally:
        file.write_text(source, encoding="utf-8")
    seconds = time.monotonic() - began
    if found is None:
        return Verdict(fault, True, "a process of its own", "it hangs or dies", seconds)
    for one, outcomes in found.items():
        for key, message in outcomes.items():
            if message and known[one].get(key, "") == "":
                return Verdict(fault, True, f"{one}: {key}", message, seconds)
    return Verdict(fault, False, "", "", seconds)


def main(names: list[str]) -> int:
    """Plant the faults whose name or file contains one of `names` (all without any); 1 if one survives."""
    import accelerate  # noqa: F401  loaded once, before the forks
    import sklearn  # noqa: F401
    import torch

    torch.set_num_threads(1)
    chosen = [f for f in FAULTS if not names or any(n in f.name or n in f.file or n in f.by for n in names)]
    if not chosen:
        print(f"no fault matches {' '.join(names)}; there are {len(FAULTS)}")
        return 2
    survived = []
    with copied() as root:
        known: Found = {}
        for one in dict.fromkeys(b for f in chosen for b in f.by):
            known |= check(root, (one,)) or {one: {}}
            broken = [k for k, message in known[one].items() if message]
            if broken or not known[one]:
                print(f"note: without any fault {one} fails {', '.join(broken) or 'altogether'}; that counts for nothing")
        for number, fault in enumerate(chosen, 1):
            verdict = judge(root, fault, known)
            survived += [] if verdict.caught else [fault.name]
            state = f"caught by {verdict.by}" if verdict.caught else "SURVIVES"
            print(f"{number:3}/{len(chosen)} {fault.name:48} {verdict.seconds:5.1f} s  {state}", flush=True)
            if verdict.caught and len(names) > 0:
                print(f"        {verdict.message[:200]}")
    print(f"{len(chosen) - len(survived)} of {len(chosen)} faults are caught" + "".join(f"\n  survives: {s}" for s in survived))
    return int(bool(survived))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
