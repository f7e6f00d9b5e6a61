"""Every rule of the house for every method that is found; no method is named here."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from limbeck import conformance
from limbeck.conformance import suite, vectors
from limbeck.conformance.stubs import folders
from limbeck.core import find
from limbeck.core.errors import BadInput

ROOT = Path(__file__).parent.parent
CASES = [(name, check) for name in find.names() for check in conformance.checks(name)]


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize(("name", "check"), CASES, ids=[f"{name}-{check.replace(' ', '_')}" for name, check in CASES])
def test_method(name, check):
    (outcome,) = conformance.run(name, only=check)
    assert outcome.passed, outcome.message


@pytest.mark.parametrize("check", suite.loop_checks(), ids=lambda check: check.replace(" ", "_"))
def test_loop(check):
    (outcome,) = conformance.self_test(only=check)
    assert outcome.passed, outcome.message


def test_every_vector_belongs_to_a_method():
    left = sorted({file.stem for file in vectors.folder().glob("*.json")} - set(find.names()))
    assert not left, f"vectors without a method: {left}"


def test_every_family_is_covered():
    assert set(suite.FAMILIES) == set(find.FAMILIES)
    assert {find.family(name) for name in find.names()} == set(find.FAMILIES), "a family has no method"


# ---- the suite itself ------------------------------------------------------------------------------------------------
WORKED_EXAMPLE = '''"""The student says the same numbers as the teacher."""

from torch import Tensor

from limbeck.core.card import method, require
from limbeck.core.maths import pair


@method(paper="Ba and Caruana 2014, eq. 2", year=2013, arxiv="1312.6184", zero_at_match=True)
def logit_mse(student_logits: Tensor, teacher_logits: Tensor, *, scale: float = 1.0) -> Tensor:
    """scale mean_c (student_c - teacher_c)^2.  [..., C] x 2 -> [...]

    scale: factor, > 0.
    """
    require(scale > 0, "scale", scale, "> 0")
    student, teacher = pair(student_logits, teacher_logits.detach())
    return scale * (student - teacher).square().mean(-1)
'''
WORKED_VECTOR = """{"source": "by hand: the mean of (1, 4, 9) and of (0, 0, 1)", "knobs": {"scale": 3.0},
"inputs": {"student_logits": [[1, 2, 3], [1, 1, 0]], "teacher_logits": [[0, 0, 0], [1, 1, 1]]}, "reduce": "mean",
"value": 7.5, "grad": {"student_logits": [[1, 2, 3], [0, 0, -1]]}}
"""
CHECK = """
import json, sys
from limbeck import conformance
from limbeck.core import find
out = conformance.run(sys.argv[1])
print(json.dumps([find.folder(sys.argv[1]), {o.check: o.passed or o.message for o in out}]))
"""


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    """A package of one's own, to add methods to."""
    root = tmp_path_factory.mktemp("house")
    shutil.copytree(ROOT / "limbeck", root / "limbeck", ignore=shutil.ignore_patterns("__pycache__", "zoo"))
    shutil.copytree(ROOT / "tests" / "vectors", root / "tests" / "vectors")
    return root


def check_in(root, name, source, vector, folder="losses/logits"):
    import json

    (root / "limbeck" / folder / f"{name}.py").write_text(source)
    (root / "tests" / "vectors" / f"{name}.json").write_text(vector)
    done = subprocess.run([sys.executable, "-c", CHECK, name], cwd=root, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_a_method_in_one_file_is_covered(copy):
    where, outcomes = check_in(copy, "logit_mse", WORKED_EXAMPLE, WORKED_VECTOR)
    assert where == "losses/logits"
    assert set(outcomes.values()) == {True}, outcomes
    assert {"reference", "gradcheck", "zero at match", "mask", "leading dimensions", "in training"} <= set(outcomes)


@pytest.mark.parametrize(
    ("right", "wrong", "check"),
    [
        ("teacher_logits.detach()", "teacher_logits", "gradient"),
        (".mean(-1)", ".sum(-1)", "reference"),
        (".mean(-1)", ".mean()", "shape of value"),
        ("scale: factor, > 0.", "A factor.", "knobs"),
        ("1312.6184", "1312-6184", "card"),
        ("zero_at_match=True", 'exceptions={"mask": "there is no need for one"}', "mask"),
        ("zero_at_match=True", 'exceptions={"batch size": "there is no such check"}', "exceptions"),
        ("teacher_logits: Tensor, *", "teacher_probs: Tensor, *", "names"),
    ],
)
def test_what_is_wrong_with_it_is_found(copy, right, wrong, check):
    broken = WORKED_EXAMPLE.replace(right, wrong)
    if "probs" in wrong:
        broken = broken.replace("teacher_logits", "teacher_probs")
    assert broken != WORKED_EXAMPLE
    _, outcomes = check_in(copy, "logit_mse", broken, WORKED_VECTOR)
    assert outcomes[check] is not True, outcomes


@pytest.mark.parametrize("folder", folders())
def test_a_stub_is_a_method_that_fails_honestly(copy, folder):
    source, vector = conformance.stub("brand_new", folder)
    where, outcomes = check_in(copy, "brand_new", source, vector, folder)
    (copy / "limbeck" / folder / "brand_new.py").unlink()
    assert where == folder
    assert outcomes["vector"] is not True and outcomes["card"] is not True
    assert outcomes["knobs"] is True and outcomes["names"] is True and outcomes["file"] is True


@pytest.mark.parametrize(
    ("name", "folder", "message"),
    [
        ("kd", "losses/logits", "there is a method"),
        ("Top-K", "losses/logits", "cannot be a method's name"),
        ("topk", "losses/logit", "did you mean `losses/logits`"),
    ],
)
def test_a_stub_is_refused_with_the_cure(name, folder, message):
    with pytest.raises(BadInput, match=message):
        conformance.stub(name, folder)


def test_a_missing_method_is_named_with_its_nearest():
    with pytest.raises(BadInput, match="did you mean"):
        conformance.run(next(iter(find.names())) + "x")


def test_vectors_are_found_beside_the_work(tmp_path, monkeypatch):
    name = next(n for n in find.names() if find.family(n) == "measure")
    shutil.copy(vectors.folder() / f"{name}.json", tmp_path)
    assert all(o.passed for o in conformance.run(name, folder=tmp_path))
    (tmp_path / f"{name}.json").unlink()
    assert "has no reference vector" in conformance.run(name, folder=tmp_path, only="vector")[0].message
