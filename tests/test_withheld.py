"""A teacher that comes without its data: what stands in the place of training pictures, and who may do without them."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from limbeck.adapters.files import load
from limbeck.core import knobs
from limbeck.core.errors import BadInput
from limbeck.recipe import Recipe
from limbeck.run import run

SCALE = {"mean": 0.3, "std": 0.4}
UNTRAINED = {"dafl": {"onehot": 0, "activation": 0, "entropy": 0, "latent": 8}}
RECIPE: dict[str, Any] = {
    "name": "nothing",
    "do": "teach",
    "teacher": {"net": "resnet8", "width": 2, "train": {"steps": 4, "batch_size": 16}},
    "student": {"net": "convnet", "width": 2, "depth": 2},
    "nets": {"generator": {"net": "generator", "latent": 8, "width": 2}},
    "data": "digits",
    "method": {"dafl": {"latent": 8}},
    "train": {"steps": 3, "batch_size": 16},
    "control": {"method": UNTRAINED},
}


def recipe(**changes: Any) -> Recipe:
    return Recipe.model_validate({**RECIPE, **changes})


@pytest.fixture
def only_test(tmp_path: Path) -> str:
    """A folder that holds test pictures and nothing else."""
    place = tmp_path / "mine"
    place.mkdir()
    np.savez(place / "test.npz", x=np.random.default_rng(0).random((40, 8, 8), np.float32), y=np.arange(40) % 10)
    return str(place)


def test_blanks_without_labels_take_the_place_of_training_pictures_and_of_no_others() -> None:
    plain, blank = load("digits"), load({"name": "digits", "withheld": True})
    assert list(blank.train.columns) == ["inputs"] and len(blank.train) == len(plain.train)
    assert blank.train["inputs"].shape == plain.train["inputs"].shape and not blank.train["inputs"].any()
    assert blank.train.num_classes == 10 and blank.train.mean == plain.train.mean
    for mine, theirs in zip(blank[1:], plain[1:], strict=True):
        assert all(torch.equal(mine[name], theirs[name]) for name in theirs.columns)


def test_a_set_of_test_pictures_will_do(only_test: str) -> None:
    splits = load({"name": only_test, "withheld": True, "limit": 64, **SCALE})
    assert [len(table) for table in splits] == [64, 20, 20]
    with pytest.raises(BadInput, match="give `mean` and `std`, those of the teacher's own data, or `normalise: false`"):
        load({"name": only_test, "withheld": True})
    assert len(load({"name": only_test, "withheld": True, "normalise": False}).train) == 1024


def test_the_run_is_the_same_bit_for_bit_and_the_teacher_alone_sees_the_pictures(tmp_path: Path) -> None:
    withheld = {"name": "digits", "withheld": True}
    for name, data in (("plain", "digits"), ("withheld", withheld)):
        run(recipe(data=data), folder=tmp_path / name / "run")
    for file in ("weights.safetensors", "control/weights.safetensors"):
        mine, theirs = (load_file(tmp_path / name / "run" / "seed-0" / file) for name in ("withheld", "plain"))
        assert all(torch.equal(mine[k], theirs[k]) for k in theirs)


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"control": {}}, "the control learns by losses on training data, and training data is withheld"),
        ({"method": None, "nets": {}, "match": ["kd"]}, "the student learns by losses on training data"),
        ({"beside": {"kd": {"match": ["kd"]}}}, "the kd learns by losses on training data"),
        ({"method": {"mekd": {"latent": 8}}}, "the student learns by mekd"),
        ({"student": {**RECIPE["student"], "train": {"steps": 1}}}, "the student cannot learn from it first"),
        ({"do": "train", "teacher": None, "control": {}}, "only teach does without training data, this is train"),
        ({"data": {"name": "shakespeare_small", "withheld": True}}, "`withheld` is of pictures and vectors"),
    ],
)
def test_nobody_learns_from_blanks(changes: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=said):
        run(recipe(**{"data": {"name": "digits", "withheld": True}, **changes}), folder=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_guard_does_without_data_where_its_host_does() -> None:
    assert knobs.make("abd", {"host": "zskt"}).dataless
    assert not knobs.make("abd", {"host": {"mekd": {}}}).dataless
