"""The catalogue computes what it says, and `verify` writes the evidence it says it from."""

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from limbeck import catalogue
from limbeck.core import find
from limbeck.core.errors import BadInput
from limbeck.recipe import check
from limbeck.run import _shared_key, methods_of, source_digest
from limbeck.verbs.build import setting
from limbeck.verbs.check import VERBS
from limbeck.verify import code_digest, recipe_of, used, verify, with_seeds
from tests import tiny
from tests.test_cli import interrupted_at
from tests.tiny import limbeck

KEYS = ("kd", "dkd", "dml", "born_again")


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A home of our own: four rows, one tiny recipe, the vectors of its methods, no evidence."""
    monkeypatch.chdir(tmp_path)
    place = tmp_path / "home"
    for folder in ("catalogue", "recipes", "tests/vectors"):
        (place / folder).mkdir(parents=True)
    rows = [json.loads(line) for line in (tiny.ROOT / "catalogue" / "papers.jsonl").read_text().splitlines()]
    chosen = [{**r, "methods": [], "recipe": ""} for r in rows if r["key"] in KEYS]
    (place / "catalogue" / "papers.jsonl").write_text("".join(json.dumps(r) + "\n" for r in chosen))
    for name in ("kd", "ce"):
        shutil.copy(tiny.ROOT / "tests" / "vectors" / f"{name}.json", place / "tests" / "vectors")
    tiny.recipe(tmp_path)
    write(place, expect={"metric": "accuracy", "seeds": 2})
    monkeypatch.setattr(catalogue, "home", lambda: place)
    catalogue.recipes_by_row.cache_clear()
    yield place
    catalogue.recipes_by_row.cache_clear()


def write(home: Path, **changes: Any) -> None:
    """The recipe of the row kd."""
    tree = tiny.body(home.parent, name="kd", row="kd", train={"steps": 4, "batch_size": 16, "log_every": 1}, **changes)
    (home / "recipes" / "kd.yaml").write_text(yaml.safe_dump(tree))


def state(home: Path, **changes: Any) -> None:
    """Evidence that says what the test wants it to say."""
    path = home / "evidence" / "kd.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


# ---- verify ----------------------------------------------------------------------------------------------------------
def test_verify_writes_evidence_and_the_level_follows(home: Path) -> None:
    assert catalogue.level("kd") == "none"
    called = limbeck("verify", "kd", "--seeds", 2)
    assert called.code == 0, called.err
    assert re.match(r"kd: exact\. \S", called.out), called.out
    body = json.loads((home / "evidence" / "kd.json").read_text())
    assert body["seeds"] == [0, 1] and body["gain"]["n"] == 2 and body["metric"] == "accuracy"
    for arm in ("student", "control", "teacher"):
        assert len(body["arms"][arm]["per_seed"]) == len(body["arms"][arm]["seconds"]) == 2
    assert (
        body["recipe_hash"] == recipe_of("kd")[1].digest and body["versions"]["torch"] and body["recipe"] == "kd.yaml"
    )
    assert set(body["conformance"]) == {"ce", "kd"} and not any(c["failed"] for c in body["conformance"].values())
    assert not list(Path("runs").rglob("checkpoints")) and not (home / "evidence" / ".kd.json").exists()

    # a second call repeats nothing; one over more seeds adds those that are missing
    times = {p: p.stat().st_mtime_ns for p in Path("runs").rglob("weights.safetensors")}
    machine = json.loads(limbeck("verify", "kd", "--seeds", 3, "--json").out)
    assert machine[0]["seeds"] == [0, 1, 2]
    after = {p: p.stat().st_mtime_ns for p in Path("runs").rglob("weights.safetensors")}
    assert all(after[p] == t for p, t in times.items()) and len(after) > len(times)


def test_evidence_of_one_seed_is_json_too(home: Path) -> None:
    called = limbeck("verify", "kd", "--seeds", 1, "--json")
    assert called.code == 0, called.err

    def no_constant(name: str) -> None:
        raise AssertionError(f"{name} is no JSON")

    (body,) = json.loads(called.out, parse_constant=no_constant)
    assert body["gain"]["low"] is None and body["gain"]["n"] == 1
    json.loads((home / "evidence" / "kd.json").read_text(), parse_constant=no_constant)
    assert catalogue.level("kd") == "exact" and "one seed" in catalogue.gain_text("kd")
    assert limbeck("catalogue").code == 0


def test_an_interrupted_verify_goes_on(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with interrupted_at(monkeypatch, arm=5):  # the control of the second seed
        called = limbeck("verify", "kd", "--seeds", 2)
    assert called.code == 130
    assert called.err.endswith("go on with: limbeck verify kd --seeds=2\n"), called.err
    assert not (home / "evidence").exists()
    (folder,) = Path("runs/verify").glob("kd-*")
    done = {p: p.stat().st_mtime_ns for p in folder.glob("seed-*/weights.safetensors")}
    assert len(done) == 2 and list(folder.glob("seed-1/control/checkpoints/step-*"))
    assert limbeck("verify", "kd", "--seeds=2").code == 0
    assert {p: p.stat().st_mtime_ns for p in folder.glob("seed-*/weights.safetensors")} == done
    cut = json.loads((home / "evidence" / "kd.json").read_text())
    shutil.rmtree("runs")
    assert limbeck("verify", "kd", "--seeds=2").code == 0
    whole = json.loads((home / "evidence" / "kd.json").read_text())
    assert [a["per_seed"] for a in cut["arms"].values()] == [a["per_seed"] for a in whole["arms"].values()]


def test_names_are_checked_before_the_first_long_run(home: Path) -> None:
    called = limbeck("verify", "kd", "dkdd")
    assert called.code == 2 and "no recipe for 'dkdd'" in called.said
    assert not Path("runs").exists()
    write(home, expect={"metric": "accuracy", "seeds": 2}, match=["kdd"])
    called = limbeck("verify", "kd")
    assert called.code == 2 and "kd.yaml:" in called.said and "no method 'kdd'" in called.said
    assert not Path("runs").exists() and not (home / "evidence").exists()


def test_a_recipe_is_found_by_row_by_method_and_by_file(home: Path, tmp_path: Path) -> None:
    assert recipe_of("kd")[0] == recipe_of("distill")[0] == "kd"
    assert recipe_of(str(tiny.recipe(tmp_path)))[0] == "tiny"
    with pytest.raises(BadInput, match="there is no recipe for 'gone'"):
        recipe_of("gone")


def test_seeds_of_stages_are_those_of_the_last(home: Path, tmp_path: Path) -> None:
    one = {k: v for k, v in tiny.body(tmp_path).items() if k != "name"}
    train = {"name": "first", "do": "train", "student": one["student"], "data": one["data"], "train": one["train"]}
    last = {"name": "last", **one, "student": {**one["student"], "weights": "stage:first"}}
    tree = {"name": "two", "row": "kd", "expect": {"metric": "accuracy", "seeds": 2}, "stages": [train, last]}
    (home / "recipes" / "kd.yaml").write_text(yaml.safe_dump(tree))
    bound = with_seeds(recipe_of("kd")[1], 3)
    assert bound.stages[0].seeds == [0] and bound.stages[1].seeds == [0, 1, 2]
    body = verify("kd")
    assert body["seeds"] == [0, 1] and body["gain"]["n"] == 2 and set(body["conformance"]) == {"ce", "kd"}
    assert catalogue.level("kd") == "exact"
    assert len(list(Path("runs/verify/shared").iterdir())) == 4, "control and teacher of both seeds"
    (folder,) = Path("runs/verify").glob("kd-*")
    again = limbeck("run", "--resume", folder)  # what is written down there is a recipe that can be read
    assert again.code == 0, again.err


def test_evidence_needs_a_control(home: Path) -> None:
    tree = tiny.body(home.parent, do="train", teacher=None, match=["ce"])
    (home / "recipes" / "kd.yaml").write_text(yaml.safe_dump({**tree, "row": "kd"}))
    called = limbeck("verify", "kd")
    assert called.code == 2 and "`train` has no control" in called.said


def test_other_code_is_other_evidence(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = recipe_of("kd")[1]
    before = code_digest(recipe)
    assert code_digest(recipe) == before
    monkeypatch.setattr("limbeck.verify.source_digest", lambda methods: "other")
    assert code_digest(recipe) != before
    monkeypatch.undo()
    other = recipe.with_changes({"match": ["ce", "dkd"]})
    assert code_digest(other) != code_digest(recipe), "the methods' own files count"


def test_the_code_of_all_stages_counts() -> None:
    first = {"name": "a", "do": "train", "method": "dml"}
    last = {"name": "b", "match": ["rkd"], "teacher": {"net": "mlp", "train": {"epochs": 1}}}
    staged = check({"name": "both", "stages": [first, last]}, "test")
    assert used(staged) == {"dml", "rkd", "ce", "denoising"}
    assert used(staged.stages[0]) == {"dml"} and methods_of(staged) == ["dml", "rkd"]
    chain = check({"name": "c", "method": {"takd": {"match": ["dkd"]}}}, "test")
    assert used(chain) == {"takd", "dkd", "ce"}, "what the method is given to match, not what stands beside it"


def test_a_new_loss_leaves_controls_as_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for part in ("core", "losses", "measure", "adapters", "train"):
        shutil.copytree(find.ROOT / part, tmp_path / "limbeck" / part)
    monkeypatch.setattr(find, "ROOT", tmp_path / "limbeck")
    digest = source_digest.__wrapped__
    before = digest(("ce",))
    (tmp_path / "limbeck/losses/logits/brand_new.py").write_text("# a loss that no control reads")
    assert digest(("ce",)) == before
    for file in ("losses/logits/ce.py", "measure/agree/accuracy.py", "adapters/files.py", "train/plain/distill.py"):
        with (tmp_path / "limbeck" / file).open("a") as out:
            out.write("# changed")
        now = digest(("ce",))
        assert now != before, file
        before = now


def test_controls_are_shared_where_all_that_decides_them_is_the_same(home: Path, tmp_path: Path) -> None:
    def key(arm: str = "control", **changes: Any) -> str:
        made = setting(check(tiny.body(tmp_path, **changes), "test"), tmp_path / "there", None, False)
        return _shared_key(made, VERBS[made.recipe.do], arm, 0)

    assert key() == key(match=["ce", "dkd"]) and key(name="other") == key()
    assert key() != key(train={"steps": 7, "batch_size": 16}) and key() != key(split="validation")
    assert key("teacher") == key("teacher", match=["dkd"], train={"steps": 7, "batch_size": 16}) != key()
    before = key()
    tiny.teacher(tmp_path, width=16, seed=2)  # the same file holds another teacher
    assert key() != before
    before = key()
    tiny.data(tmp_path, 72)
    assert key() != before
    shaped = {"do": "shape", "student": None, "teacher": {"net": "resnet8", "width": 4, "weights": "random"}}
    cut, other = ({"channel_pruning": {"ratio": ratio}} for ratio in (0.5, 0.25))
    assert key("removal", **shaped, method=cut) != key("removal", **shaped, method=other)
    assert key("teacher", **shaped, method=cut) == key("teacher", **shaped, method=other)


# ---- levels ----------------------------------------------------------------------------------------------------------
def test_every_level_is_earned(home: Path) -> None:
    verify("kd", seeds=1)
    seeds = {"n": 5, "against": "control"}
    assert catalogue.level("kd") == "exact"
    state(home, gain={"mean": 0.1, "low": 0.05, "high": 0.15, **seeds})
    assert catalogue.level("kd") == "gains"
    state(home, gain={"mean": 0.1, "low": -0.05, "high": 0.25, **seeds})
    assert catalogue.level("kd") == "exact", "an interval that holds zero is no gain"
    state(home, gain={"mean": 0.1, "low": 0.05, "high": 0.15, **seeds, "n": 4})
    assert catalogue.level("kd") == "exact", "four seeds are too few"
    state(home, gain={"mean": 0.1, "low": 0.05, "high": 0.15, **seeds}, published={"reproduced": True})
    assert catalogue.level("kd") == "paper"
    conformance = json.loads((home / "evidence" / "kd.json").read_text())["conformance"]
    state(home, conformance={**conformance, "kd": {**conformance["kd"], "failed": ["gradient"]}})
    assert catalogue.level("kd") == "runs", "a check that fails"
    state(home, conformance=conformance)
    vector = home / "tests" / "vectors" / "kd.json"
    text = vector.read_text()
    vector.write_text(text + "\n")
    assert catalogue.level("kd") == "runs", "a vector that changed since"
    vector.write_text(text)
    assert catalogue.level("kd") == "paper"
    write(home, expect={"metric": "accuracy", "seeds": 9})
    assert catalogue.level("kd") == "paper", "what is expected does not decide the result"
    write(home, match=["kd"])
    assert catalogue.level("kd") == "none", "evidence of another recipe"


# ---- what is printed -------------------------------------------------------------------------------------------------
def test_the_catalogue_in_three_forms(home: Path) -> None:
    verify("kd", seeds=2)
    rows = {r["key"]: r for r in json.loads(limbeck("catalogue", "--json").out)}
    assert {k for k, r in rows.items() if r["tier"]} == set(KEYS) & set(rows)
    assert rows["kd"]["level"] == "exact" and rows["kd"]["recipe"] == "kd.yaml"
    assert "kd" in rows["kd"]["methods"] and rows["dkd"]["methods"] == ["dkd"] and rows["dkd"]["level"] == "none"
    plain = limbeck("catalogue").out
    assert re.search(r"^kd +exact +\S*kd", plain, re.MULTILINE) and f"{len(rows)} rows: " in plain
    table = limbeck("catalogue", "--markdown").out
    assert "| `kd` | [Distilling the Knowledge" in table and "2 seeds |" in table
    family = rows["dml"]["family"]
    few = json.loads(limbeck("catalogue", "--json", "--family", family).out)
    assert "dml" in {r["key"] for r in few} and {r["family"] for r in few} == {family}
    shown = limbeck("show", "kd").out
    assert "row      kd: exact" in shown and "evidence " in shown and "recipe   recipes/kd.yaml" in shown


def test_every_row_of_the_real_catalogue_can_be_printed() -> None:
    rows = json.loads(limbeck("catalogue", "--json").out)
    stored = (tiny.ROOT / "catalogue" / "papers.jsonl").read_text().splitlines()
    assert len(rows) == len({r["key"] for r in rows}) and sum(r["tier"] > 0 for r in rows) == len(stored)
    assert {r["level"] for r in rows} <= set(catalogue.LEVELS)
    assert limbeck("catalogue", "--markdown").out.count("\n| `") == len(rows)


def test_a_method_without_a_row_stands_by_its_card(home: Path) -> None:
    card = find.get("rkd").card  # the catalogue of this home does not know it
    row = next(r for r in json.loads(limbeck("catalogue", "--json").out) if r["key"] == "rkd")
    assert (row["title"], row["year"], row["arxiv"]) == (card.paper, card.year, card.arxiv)
    assert row["family"] == "losses/relations" and row["tier"] == 0 and row["methods"] == ["rkd"]
    few = json.loads(limbeck("catalogue", "--json", "--family", "losses/relations").out)
    assert "rkd" in {r["key"] for r in few} and {r["family"] for r in few} == {"losses/relations"}
    assert re.search(r"^rkd +none +rkd ", limbeck("catalogue").out, re.MULTILINE)
    assert "### losses/relations" in (table := limbeck("catalogue", "--markdown").out) and "| `rkd` |" in table
    assert "rkd" not in (home / "catalogue" / "papers.jsonl").read_text()


def test_rows_that_methods_and_recipes_name_exist() -> None:
    keys = {json.loads(line)["key"] for line in (tiny.ROOT / "catalogue" / "papers.jsonl").read_text().splitlines()}
    named = {f"method {n}": find.get(n).card.row for n in find.names()}
    for path in (tiny.ROOT / "recipes").rglob("*.yaml"):
        row = yaml.safe_load(path.read_text()).get("row")
        named[f"recipe {path.name}"] = (row,) if row else ()
    assert {who: rows for who, rows in named.items() if not set(rows) <= keys} == {}


def test_rows_that_do_not_exist_are_found(home: Path) -> None:
    (home / "recipes" / "odd.yaml").write_text("name: odd\nrow: nowhere\n")
    catalogue.recipes_by_row.cache_clear()
    assert "odd.yaml: row 'nowhere'" in catalogue.unknown_rows()


def test_a_row_may_have_several_recipes_and_each_has_its_own_evidence(home: Path) -> None:
    body = {"metric": "accuracy", "higher_is_better": True, "beside": {}}
    (home / "evidence").mkdir(exist_ok=True)
    for stem, mean in (("a_variant", 0.01), ("kd", 0.02), ("z_variant", 0.03)):
        (home / "recipes" / f"{stem}.yaml").write_text(f"name: {stem}\nrow: kd\n")
        gain = {"mean": mean, "low": 0.0, "high": 0.1, "n": 5}
        (home / "evidence" / f"{stem}.json").write_text(json.dumps({**body, "gain": gain}))
    catalogue.recipes_by_row.cache_clear()
    assert list(catalogue.of_row("kd")) == ["kd", "a_variant", "z_variant"], "the one named after the row leads"
    said = catalogue.gain_text("kd").split("; ")
    assert [part.split("\xa0points")[0] for part in said] == ["kd: +2.0", "a_variant: +1.0", "z_variant: +3.0"]


def test_generated_files_are_written_and_checked(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    readme = home / "README.md"
    readme.write_text(f"before\n{catalogue.BEGIN}\nold\n{catalogue.END}\nafter\n")
    assert catalogue.main(["--check"]) == 1
    assert "README.md is not up to date" in capsys.readouterr().out
    assert catalogue.main(["--write"]) == 0 and catalogue.main(["--check"]) == 0
    text = readme.read_text()
    assert text.startswith("before\n") and text.endswith("\nafter\n") and "| family | rows |" in text
    stored = [json.loads(line) for line in (home / "catalogue" / "papers.jsonl").read_text().splitlines()]
    assert {r["key"]: r["recipe"] for r in stored}["kd"] == "kd.yaml"
    readme.write_text("no marks")
    with pytest.raises(BadInput, match=r"README\.md lacks the marks"):
        catalogue.generated()


def test_every_method_says_which_row_it_is() -> None:
    keys = set(catalogue.implemented())
    for name in find.names():
        assert set(find.get(name).card.row or (name,)) <= keys
