"""Recipes: what is read, what overrides change, what is written down, and the line of every complaint."""

import re
from pathlib import Path

import pytest
import yaml

from limbeck.core.errors import BadInput
from limbeck.recipe import Recipe, check, dump, load, merge
from tests import tiny


def read(folder: Path, text: str, *overrides: str) -> Recipe:
    path = folder / "some recipe.yaml"
    path.write_text(text)
    return load(path, overrides)


def complaint(folder: Path, text: str, *overrides: str) -> str:
    """The sentence, without the folder of the file."""
    with pytest.raises(BadInput) as caught:
        read(folder, text, *overrides)
    sentence = str(caught.value)
    assert "\n" not in sentence
    return sentence.replace(f"{folder}/some recipe.yaml", "FILE")


# ---- reading ---------------------------------------------------------------------------------------------------------
def test_short_forms_and_defaults(tmp_path: Path) -> None:
    recipe = read(tmp_path, "teacher: resnet20\nstudent: {net: resnet8, width: 8}\ndata: digits\nseeds: 3\n")
    assert recipe.name == "some-recipe" and recipe.do == "teach" and recipe.seeds == [0, 1, 2]
    assert recipe.teacher is not None and recipe.teacher.net == "resnet20"
    assert recipe.student is not None and recipe.student.options == {"width": 8}
    assert recipe.data is not None and recipe.data.name == "digits"
    assert recipe.match == ["ce", "kd"] and recipe.train.epochs == 10


@pytest.mark.parametrize("text, value", [("1e-3", 1e-3), ("2E+2", 200.0), ("-1e1", -10.0), ("1.e-2", 0.01), ("3", 3)])
def test_numbers_are_what_they_look_like(tmp_path: Path, text: str, value: float) -> None:
    recipe = read(tmp_path, f"train: {{optimizer: {{sgd: {{lr: {text}}}}}}}")
    assert recipe.train.optimizer == {"sgd": {"lr": value}}
    assert read(tmp_path, "name: x", f"train.optimizer.sgd.lr={text}").train.optimizer == {"sgd": {"lr": value}}


def test_anchors_and_merges_are_plain_yaml(tmp_path: Path) -> None:
    text = "teacher: &net {net: mlp, width: 8}\nstudent:\n  <<: *net\n  width: 4\n"
    recipe = read(tmp_path, text)
    assert recipe.student is not None and recipe.student.options == {"width": 4}


@pytest.mark.parametrize(
    "override, path, value",
    [
        ("train.epochs=3", ("train", "epochs"), 3),
        ("train.optimizer={sgd: {lr: 0.1}}", ("train", "optimizer"), {"sgd": {"lr": 0.1}}),
        ("match.dkd.beta=4", ("match", 1), {"dkd": {"beta": 4}}),
        ("match.0=kd", ("match", 0), "kd"),
        ("match.ce.smoothing=0.1", ("match", 0), {"ce": {"smoothing": 0.1}}),
        ("teacher.width=4", ("teacher", "width"), 4),
        ("data.limit=9", ("data", "limit"), 9),
        ("method.dml.peers=3", ("method",), {"dml": {"peers": 3}}),
        ("seeds=2", ("seeds",), [0, 1]),
        ("judge.train.epochs=5", ("judge", "train", "epochs"), 5),
    ],
)
def test_overrides(tmp_path: Path, override: str, path: tuple[str | int, ...], value: object) -> None:
    recipe = read(tmp_path, "teacher: mlp\ndata: digits\nmethod: dml\nmatch: [ce, dkd]\n", override)
    at: object = recipe.model_dump()
    for part in path:
        at = at[part]  # type: ignore[index]
    assert at == value


def test_an_override_of_a_loss_that_is_there_by_default(tmp_path: Path) -> None:
    assert read(tmp_path, "name: x", "match.kd.temperature=2").match == ["ce", {"kd": {"temperature": 2}}]


def test_an_override_by_null_goes_back_to_the_default(tmp_path: Path) -> None:
    recipe = read(
        tmp_path, "match: [ce]\ntrain: {steps: 3}\nteacher: mlp\n", "match=null", "train.steps=null", "teacher="
    )
    assert recipe.match == ["ce", "kd"] and recipe.train.steps is None and recipe.teacher is None


def test_overrides_reach_stages_by_name_and_by_number(tmp_path: Path) -> None:
    text = "stages:\n- {name: a, do: train}\n- {name: b}\n"
    recipe = read(tmp_path, text, "stages.b.train.epochs=2", "stages.0.data=digits", "stages.a.seeds=2")
    assert recipe.stages[1].train.epochs == 2 and recipe.stages[0].seeds == [0, 1]
    assert recipe.stages[0].data is not None


# ---- writing ---------------------------------------------------------------------------------------------------------
def test_what_is_written_down_reads_back_as_the_same_recipe(tmp_path: Path) -> None:
    # at its default, but said: that decides what `do: train` and `judge` do, and must survive
    tree = tiny.body(tmp_path, match=["ce", "kd"], judge={"train": {"optimizer": {"adam": {"lr": 0.001}}}}, seeds=2)
    first = check(tree, "test")
    (tmp_path / "again.yaml").write_text(dump(first))
    again = load(tmp_path / "again.yaml")
    assert again.model_dump() == first.model_dump() and again.digest == first.digest
    assert again.model_fields_set == first.model_fields_set
    assert again.judge.train.model_fields_set == {"optimizer"}
    assert dump(again) == dump(first)


def test_stages_read_back(tmp_path: Path) -> None:
    first = read(tmp_path, "stages:\n- {name: a, do: train, data: digits}\n- {name: b, teacher: {net: mlp}}\n")
    assert read(tmp_path, dump(first)).model_dump() == first.model_dump()


def test_the_digest_knows_what_decides_the_result() -> None:
    base = {"name": "a", "train": {"epochs": 3}}
    digest = check(base, "test").digest
    assert check({**base, "name": "b", "row": "kd", "expect": {"metric": "accuracy"}}, "test").digest == digest
    for change in ({"train": {"epochs": 4}}, {"match": ["kd"]}, {"seeds": [1]}, {"data": "digits"}):
        assert check({**base, **change}, "test").digest != digest


def test_changes_are_laid_over_and_choices_are_swapped() -> None:
    base = {"train": {"epochs": 3, "optimizer": {"sgd": {"lr": 1, "momentum": 0.9}}}, "match": ["ce"], "metric": "x"}
    assert merge(base, {"train": {"optimizer": {"sgd": {"lr": 2}}}})["train"]["optimizer"]["sgd"]["momentum"] == 0.9
    assert merge(base, {"train": {"optimizer": {"adam": {"lr": 2}}}})["train"]["optimizer"] == {"adam": {"lr": 2}}
    assert "metric" not in merge(base, {"metric": None}) and merge(base, {"match": ["kd"]})["match"] == ["kd"]


# ---- complaints ------------------------------------------------------------------------------------------------------
LINES = """\
name: x
teacher:
  net: mlp
  width: 3
nets:
  assistant:
    - net: mlp
    - train:
        epochs: 3
match:
  - ce
  - 7
"""


@pytest.mark.parametrize(
    "text, sentence",
    [
        ("do: tech", r"FILE:1: `do` should be 'teach', .* or 'evaluate', got 'tech'"),
        ("name: x\nteachr: y", r"FILE:2: unknown key `teachr`; did you mean `teacher`.*"),
        ("name: x\ntrain:\n  epochs: 3\n  schedul: linear", r"FILE:4: unknown key `train.schedul`; did you mean .*"),
        ("name: x\nepochs: 3", r"FILE:2: unknown key `epochs`; it belongs in `train`"),
        ("train:\n  epochs: long", r"FILE:2: `train.epochs` should be a valid number, got 'long'"),
        ("train:\n\n  steps: 0", r"FILE:3: `train.steps` should be greater than 0, got 0"),
        ("train: 3", r"FILE:1: `train` should be a mapping of keys, got 3"),
        ("store:\n  bits: 7", r"FILE:2: `store.bits` should be 8, 16 or 32, got 7"),
        ("name: a b", r"FILE:1: `name` should match pattern .*, got 'a b'"),
        ("seeds: 0", r"FILE:1: `seeds`: give at least one seed, and none twice"),
        ("seeds: [1, 1]", r"FILE:1: `seeds`: give at least one seed, and none twice"),
        ("name: x\ntrain:\n  clip: 1\n  ema: 1\n  clip: 2", r"FILE:5: the key 'clip' is already on line 3"),
        ("a: [1, 2", r"FILE:1: not valid YAML: .*"),
        ("a: !!python/object/apply:os.system [x]", r"FILE:1: not valid YAML: could not determine a constructor .*"),
        ("name: x\n---\nname: y", r"FILE:2: not valid YAML: .*another document"),
        ("name: x\non: 3", r"FILE:2: a key must be a word, found 'on', which YAML reads as True"),
        ("? [a, b]\n: 3", r"FILE:1: a key must be a plain word, found a sequence"),
        ("data: &x {name: *x}", r"FILE:1: an alias may not contain itself"),
        ("", r"FILE: a recipe is a mapping of keys such as name, do, data; found nothing"),
        ("- a", r"FILE: a recipe is a mapping of keys such as name, do, data; found a list"),
        ("just words", r"FILE: a recipe is a mapping of keys such as name, do, data; found a str"),
        (LINES, r"FILE:8: the key `nets.assistant.1.net` is missing"),
        (LINES.replace("train:\n        epochs: 3", "net: mlp"), r"FILE:11: `match.1` should be a valid string, got 7"),
        ("stages:\n  - name: a\n    train:\n      epochs: x", r"FILE:4: `stages.0.train.epochs` should .*, got 'x'"),
        ("stages:\n  - name: a\n  - name: b\n    teacheer: 3", r"FILE:4: unknown key `stages.1.teacheer`; did.*"),
        ("stages:\n  - do: train", r"FILE:2: the key `stages.0.name` is missing"),
        ("stages:\n  - name: a\n  - name: a", r"FILE:3: `stages.1.name`: two stages are called 'a'"),
        ("data: digits\nstages:\n  - name: a", r"FILE:1: `data`: no stage reads what stands beside `stages`; .*"),
    ],
)  # fmt: skip
def test_complaints_name_line_and_key(tmp_path: Path, text: str, sentence: str) -> None:
    found = complaint(tmp_path, text)
    assert re.fullmatch(sentence, found), found


@pytest.mark.parametrize(
    "override, sentence",
    [
        ("train.epochs=x", r"override 'train.epochs=x': `train.epochs` should be a valid number, got 'x'"),
        ("trian.epochs=3", r"override 'trian.epochs=3': unknown key `trian`; did you mean `train`.*"),
        ("train.epochs", r"an override is written key.key=value, got 'train.epochs'"),
        ("train.epochs=[1", r"override 'train.epochs=\[1':1: not valid YAML: .*"),
        ("match.dkd.beta=3", r"the override 'match.dkd.beta=3': 'dkd' is not in the list; did you mean `kd`\?"),
        ("seeds.x.y=3", r"the override 'seeds.x.y=3' goes below a plain value"),
        ("stages.b.data=x", r"the override 'stages.b.data=x': .*"),
    ],
)
def test_complaints_about_overrides_quote_them(tmp_path: Path, override: str, sentence: str) -> None:
    found = complaint(tmp_path, "name: x\nseeds: 3\ntrain: {epochs: 2}\nstages: []\n", override)
    assert re.fullmatch(sentence, found), found


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "kd_fashion.yaml").write_text("name: x")
    with pytest.raises(
        BadInput, match=r"cannot read the recipe .*: No such file or directory; did you mean `kd_fashion"
    ):
        load(tmp_path / "kd_fashoin.yaml")
    with pytest.raises(BadInput, match="Is a directory"):
        load(tmp_path)
    (tmp_path / "kd_fashion.yaml").write_bytes(b"\xff\xfe\x00\x00")
    with pytest.raises(BadInput, match="it is no text file"):
        load(tmp_path / "kd_fashion.yaml")


def test_names_are_checked_at_their_lines(tmp_path: Path) -> None:
    from limbeck.verbs.check import check_names

    text = """\
stages:
  - name: a
    do: train
    student: mlp
  - name: b
    match:
      - ce
      - dkdd
"""
    recipe = read(tmp_path, text)
    with pytest.raises(BadInput, match=r"some recipe\.yaml:8: `match\.1`: no method 'dkdd'; did you mean `dkd`"):
        check_names(recipe)
    path = tmp_path / "other.yaml"
    path.write_text(yaml.safe_dump(tiny.body(tmp_path)))
    with pytest.raises(BadInput, match=r"^override 'train\.optimizer=adamm': `train\.optimizer`: no optimizer 'adamm'"):
        check_names(load(path, ["train.optimizer=adamm"]))
