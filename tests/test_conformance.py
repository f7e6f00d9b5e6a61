"""Every rule of the house for every method that is found; no method is named here."""

import os
import shutil

import pytest
import torch

from limbeck import conformance
from limbeck.conformance import suite, vectors
from limbeck.conformance.stubs import folders
from limbeck.core import find
from limbeck.core.errors import BadInput
from tests import faults

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


@method(paper="Ba and Caruana 2014, section 2.2", year=2013, arxiv="1312.6184", zero_at_match=True)
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


@pytest.fixture(scope="module")
def house():
    """A copy of the package, to add methods to."""
    with faults.copied() as root:
        yield root


def check_in(root, name, source, vector, folder="losses/logits", only=()):
    """Put the two files of a method into the copy, and see what the suite there says; then take them out."""
    files = {root / "limbeck" / folder / f"{name}.py": source, root / "tests" / "vectors" / f"{name}.json": vector}
    for file, text in files.items():
        file.write_text(text)
    try:
        found = faults.check(root, (name,), only=only)
    finally:
        for file in files:
            file.unlink()
    assert found is not None
    return found[name]


needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="looks at the copy of the package in a fork")


@needs_fork
def test_a_method_in_one_file_is_covered(house):
    outcomes = check_in(house, "logit_mse", WORKED_EXAMPLE, WORKED_VECTOR)
    assert set(outcomes.values()) == {""}, outcomes
    assert {"reference", "gradcheck", "zero at match", "mask", "leading dimensions", "in training"} <= set(outcomes)


@needs_fork
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
def test_what_is_wrong_with_it_is_found(house, right, wrong, check):
    broken = WORKED_EXAMPLE.replace(right, wrong)
    if "probs" in wrong:
        broken = broken.replace("teacher_logits", "teacher_probs")
    assert broken != WORKED_EXAMPLE
    assert check_in(house, "logit_mse", broken, WORKED_VECTOR, only=(check,))[check]


@needs_fork
@pytest.mark.parametrize(
    ("right", "wrong", "message"),
    [
        ("from torch import Tensor", "from torch import Tenser", "cannot import name"),
        ("@method(", "kept = method(", "must hold exactly one @method, found 0"),
        ("return scale *", "return scal *", "NameError"),
    ],
)
def test_a_method_that_does_not_work_is_told_from_the_rest(house, right, wrong, message):
    outcomes = check_in(house, "logit_mse", WORKED_EXAMPLE.replace(right, wrong), WORKED_VECTOR)
    assert any(message in said for said in outcomes.values()), outcomes


@needs_fork
@pytest.mark.parametrize("folder", folders())
def test_a_stub_is_a_method_that_fails_honestly(house, folder):
    source, vector = conformance.stub("brand_new", folder)
    outcomes = check_in(
        house, "brand_new", source, vector, folder, ("vector", "card", "knobs", "names", "file", "docstring")
    )
    assert outcomes.pop("vector") and outcomes.pop("card")
    assert set(outcomes.values()) == {""}, outcomes


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
