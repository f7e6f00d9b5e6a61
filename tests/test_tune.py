"""Choosing settings: every combination, on the validation split alone, with its own control, and nothing twice."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from limbeck.core.errors import BadInput, Diverged
from limbeck.recipe import load
from limbeck.run import run
from limbeck.tune import FIRST_SEED, combinations, tune
from tests import tiny
from tests.test_cli import interrupted_at
from tests.tiny import limbeck

GRID = ["match.kd.weight=0.1,5", "train.steps=4,8"]


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def recipe(folder: Path, tests: int = 0, **changes: Any) -> Path:
    """A recipe on data with splits of their own. tests: which test part they get."""
    x, y = tiny.images(120)
    other, wrong = tiny.images(40, seed=1 + tests)
    parts = {"train_x": x[:80], "train_y": y[:80], "validation_x": x[80:], "validation_y": y[80:]}
    np.savez(folder / "tiny.npz", **parts, test_x=other, test_y=wrong if not tests else 1 - wrong)
    if not (folder / "teacher.safetensors").exists():
        tiny.teacher(folder, width=16)
    return tiny.recipe(folder, **{"train": {"steps": 4, "batch_size": 16}, **changes})


# ---- the grid --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "grid, wanted",
    [
        (["a=1,2", "b=3"], [("a=1", "b=3"), ("a=2", "b=3")]),
        (["a.b=[1,2],{c: 1, d: 2}"], [("a.b=[1,2]",), ("a.b={c: 1, d: 2}",)]),
        (["a=x=1,y"], [("a=x=1",), ("a=y",)]),
        ([], [()]),
    ],
)
def test_combinations(grid: list[str], wanted: list[tuple[str, ...]]) -> None:
    assert combinations(grid) == wanted


@pytest.mark.parametrize(
    "grid, part",
    [
        (["match.kd.weight"], "what is tried is written key.key=value,value, got 'match.kd.weight'"),
        (["match.kd.weight="], "what is tried is written"),
        (["=1"], "what is tried is written"),
        (["train.step=1,2"], "override 'train.step=1': unknown key `train.step`; did you mean `steps`"),
        (["match.kd.temperature=1,-1"], "`match.1`: `temperature` must be > 0, got -1"),
        (["train.steps=[4,8"], "not valid YAML"),
        (["do=train,teach"], "`train` has no control, so it cannot be tuned"),
    ],
)
def test_a_grid_that_is_none_is_refused_before_anything_runs(tmp_path: Path, grid: list[str], part: str) -> None:
    called = limbeck("tune", recipe(tmp_path), *grid)
    assert called.code == 2 and part in called.said
    assert not Path("runs").exists()


def test_data_without_a_validation_part_cannot_choose(tmp_path: Path) -> None:
    path = recipe(tmp_path, data={"name": "tiny.npz", "split": [0.8, 0.0, 0.2]})
    x, y = tiny.images()
    np.savez(tmp_path / "tiny.npz", inputs=x, labels=y)
    with pytest.raises(BadInput, match="tiny.npz has no validation part"):
        tune(path, ["train.steps=4"])


# ---- what is compared ------------------------------------------------------------------------------------------------
def test_figures_are_those_of_the_validation_split(tmp_path: Path) -> None:
    path = recipe(tmp_path)
    found = tune(path, GRID, seeds=2)
    assert found.metric == "accuracy" and [t.overrides for t in found.trials] == combinations(GRID)
    assert found.best.mean == max(t.mean for t in found.trials)
    for trial in (found.trials[0], found.trials[3]):  # the control is given the same number of steps
        seeds = f"seeds=[{FIRST_SEED}, {FIRST_SEED + 1}]"
        alone = run(load(path, [*trial.overrides, "split=validation", seeds]), folder=tmp_path / trial.overrides[0])
        for arm, figures in (("student", trial.student), ("control", trial.control)):
            assert tuple(o.metrics["accuracy"] for o in alone.arms[arm]) == figures
    assert found.trials[0].control == found.trials[2].control, "what only the student reads"
    assert found.trials[0].control != found.trials[1].control or found.trials[0].student != found.trials[1].student
    logs = [p for p in Path("runs/tune").rglob("log.jsonl") if p.parent.name == "control"]
    assert len(logs) == 4, "a control for each number of steps and each seed, and none twice"
    assert {p.parents[1].name for p in logs} == {f"seed-{FIRST_SEED}", f"seed-{FIRST_SEED + 1}"}


def test_the_test_split_is_not_seen(tmp_path: Path) -> None:
    first = tune(recipe(tmp_path), GRID[:1], seeds=1, root=tmp_path / "one")
    assert tune(recipe(tmp_path, tests=1), GRID[:1], seeds=1, root=tmp_path / "other") == first


def test_of_several_stages_the_last_is_tuned_on_what_the_others_made_once(tmp_path: Path) -> None:
    one = yaml.safe_load(recipe(tmp_path).read_text())
    first = {"name": "first", "do": "train", **{key: one[key] for key in ("student", "data", "train")}}
    last = {**one, "name": "last", "teacher": {**one["student"], "weights": "first"}}
    path = tmp_path / "stages.yaml"
    path.write_text(yaml.safe_dump({"name": "both", "stages": [first, last]}))
    found = tune(path, ["stages.1.match.kd.weight=0.1,5"], seeds=2)
    assert len(found.trials) == 2 and found.trials[0].student != found.trials[1].student
    assert found.trials[0].control == found.trials[1].control
    made = list(Path("runs/tune").glob("both-before-*"))
    assert len(made) == 1 and (made[0] / "first/weights.safetensors").exists()
    assert tune(path, ["stages.1.match.kd.weight=0.1,5"], seeds=2) == found
    again = tune(path, ["stages.0.train.steps=4,5"], seeds=1)
    assert len(list(Path("runs/tune").glob("both-before-*"))) == 2 and len(again.trials) == 2


def test_nothing_is_run_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = recipe(tmp_path, train={"steps": 6, "batch_size": 16, "log_every": 1})
    with interrupted_at(monkeypatch, arm=3):  # the student of the second seed
        called = limbeck("tune", path, GRID[0], "--seeds", 2)
    assert called.code == 130 and "run the same command again to go on" in called.err
    done = {p: p.stat().st_mtime_ns for p in Path("runs/tune").rglob("outcome.json")}
    assert len(done) == 3 and list(Path("runs/tune").rglob("checkpoints/step-*"))  # two arms, and the shared control
    assert limbeck("tune", path, GRID[0], "--seeds", 2).code == 0
    assert {p: p.stat().st_mtime_ns for p in done} == done
    started: list[Any] = []
    found = tune(path, GRID[:1], seeds=2, on_event=started.append)
    assert started == [] and len(found.trials) == 2
    tune(path, GRID[:1], seeds=3, on_event=started.append)  # more seeds go on in the same folders
    assert {e["seed"] for e in started if "arm" in e} == {FIRST_SEED + 2}


def test_a_combination_that_diverges_does_not_stop_the_others(tmp_path: Path) -> None:
    path = recipe(tmp_path, train={"steps": 6, "batch_size": 16, "log_every": 1})
    called = limbeck("tune", path, "train.optimizer={sgd: {lr: 0.1}},{sgd: {lr: 1e30}}", "--seeds", 1)
    assert called.code == 0, called.err
    first, second = called.out.splitlines()[1:3]
    assert first.endswith("best") and second.endswith("diverged")
    body = json.loads(limbeck("tune", path, "train.optimizer.sgd.lr=0.1,1e30", "--seeds", 1, "--json").out)
    assert body["trials"][1]["student"] == [None]
    with pytest.raises(Diverged, match="became"):
        tune(path, ["train.optimizer={sgd: {lr: 1e30}}"], seeds=1)


# ---- what is printed -------------------------------------------------------------------------------------------------
def test_the_table_names_what_was_tried(tmp_path: Path) -> None:
    called = limbeck("tune", recipe(tmp_path), *GRID, "--seeds", 2)
    assert called.code == 0, called.err
    head, *rows, last = called.out.splitlines()
    assert re.split(r"  +", head) == ["match.kd.weight", "train.steps", "accuracy", "gain over the control"]
    assert [row.split()[:2] for row in rows] == [["0.1", "4"], ["0.1", "8"], ["5", "4"], ["5", "8"]]
    assert sum(row.endswith("  best") for row in rows) == 1
    place = head.index("accuracy")
    assert all(row[place - 1] == " " and row[place] != " " for row in rows)
    assert "validation" in last and "2 seeds" in last and "test split" in last
    body = json.loads(limbeck("tune", "tiny.yaml", *GRID, "--seeds", 2, "--json").out)
    assert body["metric"] == "accuracy" and len(body["trials"]) == 4
    assert body["best"] in [t["overrides"] for t in body["trials"]]
