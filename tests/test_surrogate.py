"""A student that is fitted and not trained: what it is shown, its control, and what can be done with it afterwards."""

import importlib.util
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from limbeck.adapters.files import load as load_data
from limbeck.core.find import get
from limbeck.core.nets import outputs
from limbeck.recipe import load
from limbeck.run import run as carry_out
from limbeck.verbs import build, shape
from tests import tiny
from tests.tiny import limbeck, recipe

ONNX = importlib.util.find_spec("onnxruntime") is not None and importlib.util.find_spec("onnxscript") is not None
NODES = "feature", "threshold", "left", "right", "value", "importance"


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def grown(folder: Path, **changes: Any) -> Path:
    """A recipe that grows a tree out of the tiny teacher."""
    tree = {"do": "shape", "student": None, "match": None, "method": {"decision_tree": {"depth": 3}}}
    return recipe(folder, **tree | changes)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    called = limbeck("run", grown(tmp_path), "seeds=2", "--out", "there")
    assert called.code == 0, called.err
    return Path("there")


def saved(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "weights.safetensors")


def test_a_tree_is_fitted_and_neither_trained_nor_recovered(run: Path) -> None:
    result = json.loads((run / "result.json").read_text())
    assert list(result["arms"]) == ["student", "control", "teacher"]
    assert result["methods"] == ["decision_tree"]
    assert result["arms"]["student"]["nodes"] == 2 * result["arms"]["student"]["leaves"] - 1
    assert result["arms"]["control"]["label"] == "decision_tree, no teacher"
    assert not list(run.rglob("checkpoints")) and (run / "report.html").stat().st_size > 1000


def test_its_control_is_the_same_tree_on_labels(run: Path) -> None:
    splits = load_data("tiny.npz")
    told = build.setting(load(run / "recipe.yaml"), run, None, True)
    assert told.teacher is not None
    batches = list(shape.everything(told.recipe, splits.train, 0))
    for place, soft in ((run / "seed-0", 1.0), (run / "seed-0" / "control", 0.0)):
        expected = get("decision_tree")(told.teacher, batches, depth=3, soft=soft).state_dict()
        assert all(expected[name].equal(value) for name, value in saved(place).items())
    assert not torch.equal(saved(run / "seed-0")["value"], saved(run / "seed-0" / "control")["value"])


def test_the_control_may_be_told_otherwise(tmp_path: Path) -> None:
    path = grown(tmp_path, control={"method": {"decision_tree": {"depth": 1, "soft": 0.0}}})
    assert limbeck("run", path, "--out", "there").code == 0
    assert len(saved(Path("there/seed-0/control"))["value"]) == 3 < len(saved(Path("there/seed-0"))["value"])


def test_arms_beside_it_change_its_knobs(tmp_path: Path) -> None:
    path = grown(tmp_path, beside={"stump": {"method": {"decision_tree": {"depth": 1}}}})
    assert limbeck("run", path, "--out", "there").code == 0
    assert len(saved(Path("there/seed-0/stump"))["value"]) == 3 < len(saved(Path("there/seed-0"))["value"])


def test_it_is_shown_every_example_once(tmp_path: Path) -> None:
    table = load_data("tiny.npz").train if grown(tmp_path) else None
    assert table is not None
    batches = list(shape.everything(load(tmp_path / "tiny.yaml"), table, 0))
    assert torch.cat([batch["index"] for batch in batches]).tolist() == list(range(len(table)))
    assert len(table) % 16 and torch.cat([batch["inputs"] for batch in batches]).equal(table["inputs"])


def test_augmented_examples_come_as_often_as_training_would_show_them(tmp_path: Path) -> None:
    path = grown(tmp_path, data={"name": "tiny.npz", "augment": ["flip"]}, train={"epochs": 3, "batch_size": 16})
    table = load_data("tiny.npz").train
    first, second = (list(shape.everything(load(path), table, seed)) for seed in (0, 1))
    shown = torch.cat([batch["index"] for batch in first])
    assert shown.bincount().tolist() == [3] * len(table)
    inputs = torch.cat([batch["inputs"] for batch in first])
    same = (inputs == table["inputs"][shown]).flatten(1).all(1)
    assert same.any() and (~same).any()
    assert torch.equal(inputs[~same], table["inputs"][shown[~same]].flip(-1))
    assert not torch.equal(torch.cat([batch["inputs"] for batch in second]), inputs)


def test_how_often_must_be_told(tmp_path: Path) -> None:
    path = grown(tmp_path, data={"name": "tiny.npz", "augment": ["flip"]}, train={"minutes": 1, "batch_size": 16})
    said = limbeck("run", path, "--out", "there").said
    assert said.startswith(f"{path}:") and "`epochs` or `steps`" in said, said
    assert not Path("there").exists()


def test_losses_for_it_are_refused(tmp_path: Path) -> None:
    said = limbeck("run", grown(tmp_path, match=["ce"]), "--out", "there").said
    assert "`decision_tree` is fitted and not trained" in said and said.startswith(f"{tmp_path}/tiny.yaml:"), said
    assert not Path("there").exists()


def test_what_is_read_back_says_the_same(run: Path) -> None:
    fresh = carry_out(load(run / "recipe.yaml"), folder=Path("again")).artefact
    told = build.setting(load(run / "recipe.yaml"), run, None, True)
    again = shape.artefact(told, run / "seed-0")
    x = torch.from_numpy(tiny.images(9, seed=5)[0])
    assert again(x)["logits"].equal(fresh(x)["logits"])


def tree(leaves: int) -> nn.Module:
    """A tree of that many leaves on the first of two numbers, with a threshold at 0, 1, ..."""
    x = torch.arange(leaves).float().unsqueeze(1).repeat(1, 2)
    told = nn.Identity()
    batches = [{"inputs": x, "labels": torch.arange(leaves) % 2}]
    made: nn.Module = get("decision_tree")(told, batches, soft=0.0, depth=leaves)
    return made


def test_weights_of_a_larger_tree_fit() -> None:
    large, small = tree(6), tree(2)
    assert len(small.state_dict()["value"]) < len(large.state_dict()["value"])
    small.load_state_dict(large.state_dict())
    assert set(small.state_dict()) == set(NODES)
    x = torch.arange(6).float().unsqueeze(1).repeat(1, 2)
    setattr(small, "depth", 6)  # noqa: B010
    assert small(x)["logits"].argmax(1).tolist() == (torch.arange(6) % 2).tolist()
    with pytest.raises(RuntimeError, match="value"):
        small.load_state_dict({k: v for k, v in large.state_dict().items() if k != "value"})


def test_export(run: Path) -> None:
    assert limbeck("export", run).code == 0
    assert set(load_file(run / "export/model.safetensors")) == set(NODES)
    assert limbeck("export", run, "--to", "torch").code == 0
    assert set(torch.load(run / "export/model.pt", weights_only=True)) == set(NODES)
    assert "Tree is no transformers model" in limbeck("export", run, "--to", "hf").said


@pytest.mark.skipif(not ONNX, reason="the extra `export` is not installed")
def test_onnx_decides_as_the_tree_does(run: Path) -> None:
    import onnxruntime

    called = limbeck("export", run, "--to", "onnx")
    assert called.code == 0, called.err
    session = onnxruntime.InferenceSession(str(run / "export/model.onnx"), providers=["CPUExecutionProvider"])
    net = shape.artefact(build.setting(load(run / "recipe.yaml"), run, None, True), run / "seed-0")
    x = torch.from_numpy(tiny.images(9, seed=5)[0])
    (found,) = session.run(None, {"inputs": x.numpy()})
    np.testing.assert_allclose(found, outputs(net, {"inputs": x})["logits"].numpy(), atol=1e-4)
