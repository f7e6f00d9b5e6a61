"""Several methods in one setting: one control for all, their own weights, honest refusals; arms beside the control."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from limbeck import catalogue
from limbeck.compare import compare, in_setting, lines
from limbeck.core.errors import BadInput
from limbeck.recipe import load
from limbeck.run import run
from limbeck.verbs.teach import arm_recipe, control_recipe
from tests import tiny
from tests.tiny import limbeck


@pytest.fixture
def setting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    tiny.teacher(tmp_path, width=16)
    return tiny.recipe(tmp_path, train={"steps": 4, "batch_size": 16}, seeds=2, measure=["accuracy", "calibration"])


def test_methods_share_data_seeds_and_control(setting: Path, tmp_path: Path) -> None:
    found = compare(["kd", "dkd"], setting, folder=tmp_path / "out")
    assert [row.key for row in found.rows] == ["kd", "dkd"] and found.first == "kd"
    bodies = [json.loads((tmp_path / "out" / key / "result.json").read_text()) for key in ("kd", "dkd")]
    assert bodies[0]["arms"]["control"] == bodies[1]["arms"]["control"]
    assert bodies[0]["arms"]["student"]["per_seed"] != bodies[1]["arms"]["student"]["per_seed"]
    kd, dkd = found.rows
    assert kd.over is None and dkd.over is not None and dkd.gain is not None
    assert dkd.over.mean == pytest.approx(sum(dkd.values) / 2 - sum(kd.values) / 2)
    assert found.report.exists()
    written = json.loads((tmp_path / "out" / "compare.json").read_text())
    assert [row["values"] for row in written["rows"]] == [list(kd.values), list(dkd.values)]
    weights = tmp_path / "out" / "dkd" / "seed-1" / "weights.safetensors"
    before = weights.stat().st_mtime_ns
    again = compare(["kd", "dkd"], setting, folder=tmp_path / "out")
    assert again.rows[1].values == dkd.values and weights.stat().st_mtime_ns == before  # nothing is run twice


def test_a_row_brings_its_losses_with_their_weights_and_nothing_else(setting: Path) -> None:
    base = load(setting)
    own = load(catalogue.recipes()["dkd"])
    made = in_setting("dkd", base)
    assert made.match == own.match and made.method == own.method
    for key in ("teacher", "student", "data", "train", "seeds", "measure"):
        assert getattr(made, key) == getattr(base, key)
    assert in_setting("dml", base).method == load(catalogue.recipes()["dml"]).method


def test_what_cannot_run_is_listed_with_the_reason(setting: Path, tmp_path: Path) -> None:
    found = compare(["kd", "at", "cwtm"], setting, seeds=1, folder=tmp_path / "out")
    kd, at, cwtm = found.rows
    assert kd.values and cwtm.values and not at.values
    assert "at compares places, and a vector has none" in at.why
    assert f"at: not run here: {at.why}" in lines(found)
    text = (tmp_path / "out" / "compare.json").read_text()
    assert json.loads(text, parse_constant=pytest.fail)["rows"][0]["gain"]["low"] is None  # one seed: no interval
    with pytest.raises(BadInput, match="none of the methods can run in this setting"):
        compare(["at"], setting, seeds=1, folder=tmp_path / "none")


@pytest.mark.parametrize(
    "keys, part",
    [
        (["kdd"], "no row or method 'kdd'; did you mean"),
        (["kd", "kd"], "named twice"),
        (["dm"], "the recipe of 'dm' is not one stage of `teach`"),
        (["calibration"], "compare takes losses and training methods"),
    ],
)
def test_names_are_checked_before_anything_runs(setting: Path, keys: list[str], part: str) -> None:
    called = limbeck("compare", *keys, "--recipe", setting)
    assert called.code == 2 and part in called.said
    assert not Path("runs").exists()


def test_the_command_prints_a_table(setting: Path) -> None:
    called = limbeck("compare", "kd", "dkd", "--recipe", setting, "--seeds", 2)
    assert called.code == 0, called.err
    head, kd, dkd, report = called.out.strip().splitlines()
    assert head.split("  ")[0] == "method" and "over kd" in head
    assert kd.startswith("kd") and dkd.startswith("dkd") and "[" in dkd
    assert Path(report.removeprefix("report: ")).exists()


# ---- arms beside the control -----------------------------------------------------------------------------------------
def beside(setting: Path, arms: dict[str, Any]) -> Path:
    body = yaml.safe_load(setting.read_text()) | {"match": ["ce", "dkd"], "beside": arms}
    path = setting.with_name("beside.yaml")
    path.write_text(yaml.safe_dump(body))
    return path


def test_an_arm_beside_the_control_is_trained_and_compared(setting: Path, tmp_path: Path) -> None:
    recipe = load(beside(setting, {"kd": {"match": [{"ce": 0.1}, {"kd": 0.9}]}}))
    assert arm_recipe(recipe, "kd").match == [{"ce": 0.1}, {"kd": 0.9}] and not control_recipe(recipe).beside
    run(recipe, folder=tmp_path / "out", shared=tmp_path / "shared")
    body = json.loads((tmp_path / "out" / "result.json").read_text())
    assert list(body["arms"]) == ["student", "control", "kd", "teacher"]
    student, kd = ([m["accuracy"] for m in body["arms"][arm]["per_seed"]] for arm in ("student", "kd"))
    assert body["beside"]["kd"]["differences"] == [a - b for a, b in zip(student, kd, strict=True)]
    plain = load(setting).with_changes({"match": [{"ce": 0.1}, {"kd": 0.9}]})
    run(plain, folder=tmp_path / "plain", shared=tmp_path / "shared")
    alone = json.loads((tmp_path / "plain" / "result.json").read_text())["arms"]["student"]["per_seed"]
    assert alone == body["arms"]["kd"]["per_seed"]


def test_taps_of_the_student_are_not_the_controls(setting: Path) -> None:
    recipe = load(setting)
    tapped = recipe.with_changes({"student": {"taps": {"inner": "blocks.0"}}})
    assert control_recipe(tapped) == control_recipe(recipe)


@pytest.mark.parametrize(
    "arms, part",
    [
        ({"kd": {"match": ["kdd"]}}, "`beside.kd`: "),
        ({"control": {}}, "there is an arm 'control' already"),
    ],
)
def test_a_wrong_arm_is_refused(setting: Path, arms: dict[str, Any], part: str) -> None:
    with pytest.raises(BadInput, match=part):
        run(load(beside(setting, arms)), folder=Path("out"))


# ---- layers to match -------------------------------------------------------------------------------------------------
def test_proposed_taps_can_be_pasted_into_the_recipe(setting: Path, tmp_path: Path) -> None:
    called = limbeck("show", "--taps", setting)
    assert called.code == 0, called.err
    taps = yaml.safe_load(called.out.partition("write into the recipe:")[2])
    pairs = json.loads(limbeck("show", "--taps", setting, "--json").out)
    assert taps["student"]["taps"]["feats"] == [pair["student"] for pair in pairs]
    changed = load(setting).with_changes({**taps, "match": ["ce", {"fitnets": {"layer": -1}}], "seeds": 1})
    run(changed, folder=tmp_path / "tapped")
    assert not Path("runs").exists()


def test_taps_need_two_networks(setting: Path) -> None:
    body = yaml.safe_load(setting.read_text())
    del body["teacher"]
    setting.write_text(yaml.safe_dump({**body, "match": ["ce"]}))
    called = limbeck("show", "--taps", setting)
    assert called.code == 2 and "between a `teacher` and a `student`" in called.said
