"""The list of planted faults stays usable: enough of them, each fits the source as it is, and the harness can tell.

Planting all of them takes minutes and is no part of the tests: `python -m tests.faults`.
"""

import ast
import os
from pathlib import Path

import pytest

from limbeck.core import find
from tests import faults

PACKAGE = Path(__file__).parent.parent / "limbeck"


def test_there_are_enough_faults_and_each_has_a_name_of_its_own():
    names = [fault.name for fault in faults.FAULTS]
    assert len(names) >= 40
    assert len(set(names)) == len(names), [n for n in names if names.count(n) > 1]


@pytest.mark.parametrize("fault", faults.FAULTS, ids=lambda fault: fault.name)
def test_the_fault_can_be_planted(fault):
    source = (PACKAGE / fault.file).read_text(encoding="utf-8")
    assert ast.dump(ast.parse(fault.apply(source))) != ast.dump(ast.parse(source))
    for one in fault.by:
        assert one == faults.LOOP or one in find.names() or (PACKAGE.parent / one).is_file(), (
            f"nobody is called {one!r}"
        )


def test_a_replacement_must_apply_exactly_once():
    fault = faults.Fault("x", "core/x.py", "a", "b", ())
    assert fault.apply("a = 1") == "b = 1"
    for source in ("c = 1", "a = a"):
        with pytest.raises(ValueError, match="not once"):
            fault.apply(source)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the harness looks at each fault in a fork")
def test_the_harness_tells_a_fault_from_none():
    real = next(f for f in faults.FAULTS if f.name == "T**2 dropped")
    harmless = faults.Fault("harmless", real.file, "temperature**2 * kl(", "(temperature * temperature) * kl(", real.by)
    with faults.copied() as root:
        before = (root / "limbeck" / real.file).read_text()
        known = faults.check(root, real.by)
        assert known is not None and not any(known[real.by[0]].values()), known
        assert faults.judge(root, real, known).caught
        assert not faults.judge(root, harmless, known).caught
        assert (root / "limbeck" / real.file).read_text() == before
