"""condense: selections by features, and methods that keep rows of text."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import limbeck as package
from limbeck.adapters.files import load
from limbeck.core.batches import Splits, Table
from limbeck.recipe import Recipe
from limbeck.verbs import condense, rows
from tests.tiny import limbeck, recipe

GOOD = "the cat and the dog of the house have to be with that man"
BAD = "### qx 93 zzk ... ### wvv 11 ###"
TRAIN = {"steps": 3, "batch_size": 4}


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def text_rows(count: int, **more: Any) -> list[dict[str, Any]]:
    """Good and bad rows by turns, each with its number in it."""
    return [{"text": f"{GOOD if i % 2 else BAD} {i}", "id": i, **more} for i in range(count)]


def lines(path: Path, found: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in found))
    return path


def text_recipe(folder: Path, **changes: Any) -> Path:
    """A recipe that filters rows for a tiny language model."""
    body = {
        "name": "tiny",
        "do": "condense",
        "data": {"name": str(lines(folder / "web.jsonl", text_rows(200))), "kind": "rows", "length": 16},
        "method": {"quality_filter": {"min_words": 5, "min_stop_words": 1}},
        "judge": {"net": {"net": "tiny_lm", "width": 8, "layers": 1, "heads": 1}, "train": TRAIN},
    } | changes
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump(body))
    return path


def written(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / rows.ROWS).read_text().splitlines()]


def outcome(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "outcome.json").read_text()))


# ---- selection by features -------------------------------------------------------------------------------------------
def test_a_selection_takes_its_budget_from_ipc(tmp_path: Path) -> None:
    path = recipe(tmp_path, do="condense", teacher=None, student=None, match=None, method={"herding": {"budget": 3}})
    called = limbeck("run", path, "--out", "there")
    assert called.code == 2 and "`method`: how many `herding` picks is told by the recipe's `ipc`" in called.said
    assert not Path("there").exists()


# ---- rows of text ----------------------------------------------------------------------------------------------------
def test_what_is_kept_is_judged_against_as_many_random_tokens(tmp_path: Path) -> None:
    called = limbeck("run", text_recipe(tmp_path), "seeds=2", "--out", "there")
    assert called.code == 0, called.err
    folder = Path("there/seed-1")
    kept, drawn = written(folder), written(folder / "control")
    assert kept and all(GOOD in row["text"] and row["provenance"] == ["quality_filter"] for row in kept)
    assert any(BAD in row["text"] for row in drawn) and not any("provenance" in row for row in drawn)
    mine, control = outcome(folder), outcome(folder / "control")
    tokens = sum(len(row["text"]) + 1 for row in kept)
    assert mine["sizes"] == {"rows": len(kept), "tokens": tokens}
    assert control["sizes"] == {"rows": len(drawn), "tokens": tokens}
    assert set(mine["metrics"]) == set(control["metrics"]) == {"nll"}
    other = {row["id"] for row in written(Path("there/seed-0/control"))}
    assert other != {row["id"] for row in drawn}  # another seed draws others
    assert {row["id"] for row in written(Path("there/seed-0"))} == {row["id"] for row in kept}  # and keeps the same
    splits = load({"name": str(tmp_path / "web.jsonl"), "kind": "rows"})
    train, test = ({row["id"] for row in table.rows or ()} for table in (splits.train, splits.test))
    assert {row["id"] for row in kept + drawn} <= train and not {row["id"] for row in drawn} & test


def test_a_filter_that_keeps_the_tested_kind_beats_random_rows(tmp_path: Path) -> None:
    (tmp_path / "clean.txt").write_text("\n".join(f"{GOOD} {i}" for i in range(200)))
    net = {"net": "tiny_lm", "width": 16, "layers": 1, "heads": 1}
    net["data"] = {"name": str(tmp_path / "clean.txt"), "kind": "language"}
    train = {"steps": 60, "batch_size": 8, "optimizer": {"adamw": {"lr": 0.01}}}
    called = limbeck("run", text_recipe(tmp_path, judge={"net": net, "train": train}), "--out", "there")
    assert called.code == 0, called.err
    mine, control = (outcome(Path("there/seed-0") / arm)["metrics"]["nll"] for arm in ("", "control"))
    assert mine < control - 0.1
    called = limbeck("run", tmp_path / "tiny.yaml", "split=validation", "--out", "validated")
    assert called.code == 0 and outcome(Path("validated/seed-0"))["metrics"]["nll"] != mine


def test_the_lines_of_a_text_are_its_rows(tmp_path: Path) -> None:
    (tmp_path / "web.txt").write_text("\n".join(row["text"] for row in text_rows(300)))
    data = {"name": str(tmp_path / "web.txt"), "length": 16}
    called = limbeck("run", text_recipe(tmp_path, data=data), "--out", "there")
    assert called.code == 0, called.err
    kept = written(Path("there/seed-0"))
    assert 100 < len(kept) < 130 and all(GOOD in row["text"] for row in kept)
    assert limbeck("run", tmp_path / "tiny.yaml", "data.tokenizer=words", "--out", "words").code == 0
    (tmp_path / "web.txt").write_text(" ".join(row["text"] for row in text_rows(300)))
    called = limbeck("run", tmp_path / "tiny.yaml", "--out", "line")
    assert called.code == 2 and "is one line; take its rows (`kind: rows`)" in called.said


def test_texts_with_classes_train_a_classifier(tmp_path: Path) -> None:
    found = [{**row, "label": i % 3} for i, row in enumerate(text_rows(120))]
    data, judge = {"name": str(lines(tmp_path / "told.jsonl", found))}, {"net": {"net": "bag", "width": 4}}
    path = text_recipe(tmp_path, data=data, judge={**judge, "train": TRAIN}, control={"whole": True})
    called = limbeck("run", path, "--out", "there")
    assert called.code == 0, called.err
    arms = {arm: outcome(Path("there/seed-0") / arm) for arm in ("", "control", "whole")}
    assert all(set(arm["metrics"]) == {"accuracy"} for arm in arms.values())
    assert arms[""]["sizes"]["tokens"] <= arms["control"]["sizes"]["tokens"] < arms["whole"]["sizes"]["tokens"]
    assert arms["whole"]["sizes"]["rows"] == 96


def test_written_rows_hold_any_character(tmp_path: Path) -> None:
    held = [{"text": "one\u2028two\n\u0085three", "day": "\x00\ud83d"}, {"text": "four"}]
    size = rows.save_rows(held, tmp_path / rows.ROWS)
    assert size == (tmp_path / rows.ROWS).stat().st_size
    assert [json.loads(line) for line in (tmp_path / rows.ROWS).read_text().split("\n") if line] == held
    assert [p.name for p in tmp_path.iterdir()] == [rows.ROWS]


def test_random_rows_are_the_fewest_that_hold_enough() -> None:
    sizes = torch.randint(1, 9, (50,), generator=torch.Generator().manual_seed(0))
    for tokens in (1, 40, int(sizes.sum())):
        places = rows.at_random(sizes, tokens, 3)
        assert places.tolist() == sorted(set(places.tolist())) == rows.at_random(sizes, tokens, 3).tolist()
        assert sizes[places].sum() >= tokens > sizes[places].sum() - 8
    assert len(rows.at_random(sizes, 10_000, 0)) == 50


def test_the_control_of_other_knobs_is_another(tmp_path: Path) -> None:
    """How many tokens are drawn depends on the method: runs may share a control only where that is alike."""
    path = text_recipe(tmp_path)
    a, b = (condense.control_recipe(Recipe.load(path, [f"method.quality_filter.min_words={n}"])) for n in (5, 6))
    assert a.digest != b.digest
    assert condense.methods(condense.control_recipe(Recipe.load(path, ["method=herding"]))) == ["random_subset"]


def test_rows_from_python_and_what_was_kept() -> None:
    train, held_out = (Table({}, "rows", rows=text_rows(count)) for count in (100, 20))
    judge, method = {"train": TRAIN}, {"quality_filter": {"min_words": 5, "min_stop_words": 1}}
    net = {"net": "tiny_lm", "width": 8, "layers": 1, "heads": 1}
    settings: dict[str, Any] = {"method": method, "net": net, "judge": judge, "folder": "there"}
    made = package.condense(Splits(train, held_out, held_out), **settings)
    assert set(made.metrics) == {"nll"}
    text = made.artefact.tokenizer.decode(made.artefact["inputs"].flatten().tolist())
    assert GOOD in text and BAD not in text
    (Path("there") / "result.json").unlink()
    again = package.condense(Splits(train, held_out, held_out), **settings, resume=True)
    assert again.metrics == made.metrics and torch.equal(again.artefact["inputs"], made.artefact["inputs"])


REFUSALS: list[tuple[dict[str, Any], str, str]] = [
    ({"method": {"quality_filter": {"min_words": 900}}}, "method", "keeps none of the 160 rows"),
    ({"method": {"quality_filter": {"max_bullets": 2}}}, "method", "`max_bullets` must be"),
    ({"method": {"quality_filter": {"field": "txt"}}}, "method", "no text under 'txt'"),
    ({"data": {"name": "digits"}}, "method", "digits holds images"),
    ({"metric": "accuracy"}, "metric", "'accuracy' is not measured"),
    ({"judge": {"net": "tiny_lm", "train": {"steps": 3, "batch_size": 9000}}}, "judge.train", "larger than what"),
    ({"judge": {"net": "tiny_lm", "train": {"batch_size": 4}}}, "judge.train", "needs epochs, steps or minutes"),
    ({"judge": {"net": "bag", "train": TRAIN}}, "judge.net", "classes"),
    ({"judge": {"net": {"net": "tiny_lm", "data": {"name": "gone"}}, "train": TRAIN}}, "judge.net.data", "'gone'"),
]


@pytest.mark.parametrize("changes, key, part", REFUSALS, ids=[r[2] for r in REFUSALS])
def test_rows_that_cannot_be_judged_are_refused(tmp_path: Path, changes: dict[str, Any], key: str, part: str) -> None:
    called = limbeck("run", text_recipe(tmp_path, **changes), "--out", "there")
    assert called.code == 2, called.err
    assert f"`{key}`: " in called.said and part in called.said
    assert not Path("there").exists()


def test_only_a_judge_of_rows_may_be_tested_elsewhere(tmp_path: Path) -> None:
    judge = {"net": {"net": "mlp", "data": {"name": "digits"}}}
    path = recipe(tmp_path, do="condense", teacher=None, student=None, match=None, method="herding", judge=judge)
    called = limbeck("run", path, "--out", "there")
    assert called.code == 2 and "`judge.net.data`: only a teacher" in called.said
