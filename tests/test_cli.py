"""Every command as a stranger types it: what it prints, what it leaves behind, and its exit code."""

import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from safetensors.torch import load_file

from tests import tiny
from tests.tiny import command, environment, limbeck, recipe

COMMANDS = "demo run list show new check catalogue verify tune compare label report export plan doctor schema".split()


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def result(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "result.json").read_text())
    return found


# ---- help ------------------------------------------------------------------------------------------------------------
def test_help_names_every_command_without_torch() -> None:
    source = (
        "import sys; from limbeck.cli import main\ntry: main()\nfinally: assert 'torch' not in sys.modules, 'torch'"
    )
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [sys.executable, "-c", source, "--help"], env=environment(), capture_output=True, text=True, timeout=60
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 0, done.stderr
    listed = re.findall(r"^  (\w+)  ", done.stdout.partition("Commands:")[2], re.MULTILINE)
    assert listed == COMMANDS
    spent = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    assert spent < 0.35, f"--help took {spent:.2f} s of processor time"


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_explains_itself(name: str) -> None:
    called = limbeck(name, "--help")
    assert called.code == 0 and f"limbeck {name}" in called.out.replace("\n", " ")


def test_the_package_itself_is_a_command() -> None:
    source = "import runpy, sys\ntry: runpy.run_module('limbeck', run_name='__main__', alter_sys=True)\n"
    source += "finally: assert 'torch' not in sys.modules, 'torch'"
    for call in (["-c", source], ["-m", "limbeck"]):
        done = subprocess.run(
            [sys.executable, *call, "--help"], env=environment(), capture_output=True, text=True, timeout=60
        )
        assert done.returncode == 0 and "Commands:" in done.stdout, done.stderr


def test_a_wrong_command_or_option_is_bad_input() -> None:
    assert limbeck("tech").code == 2
    assert limbeck("list", "--famly", "losses").code == 2


# ---- run -------------------------------------------------------------------------------------------------------------
def test_teach_leaves_a_run_with_its_control_and_a_report(tmp_path: Path) -> None:
    called = limbeck("run", recipe(tmp_path, seeds=2), "--out", "there")
    assert called.code == 0, called.err
    assert "report: there/report.html" in called.out and "the control" in called.out
    assert "mlp, ce + kd, taught by mlp, seed 1" in called.err and "mlp, ce, no teacher, seed 1" in called.err
    body = result(Path("there"))
    assert list(body["arms"]) == ["student", "control", "teacher"]
    assert body["seeds"] == [0, 1] and len(body["arms"]["control"]["per_seed"]) == 2
    assert "<html" in Path("there/report.html").read_text()
    for seed in (0, 1):
        for arm in ("", "control"):
            where = Path("there") / f"seed-{seed}" / arm
            assert {p.name for p in where.glob("*.*")} >= {"weights.safetensors", "log.jsonl", "outcome.json"}
    assert (
        Path("there/seed-0/weights.safetensors").read_bytes() != Path("there/seed-1/weights.safetensors").read_bytes()
    )


def test_a_run_names_its_folder_itself(tmp_path: Path) -> None:
    called = limbeck("run", recipe(tmp_path, train={"steps": 1, "batch_size": 16}))
    assert called.code == 0, called.err
    (folder,) = Path("runs").iterdir()
    assert re.fullmatch(r"tiny-\d{8}-\d{6}", folder.name) and str(folder) in called.out


def test_overrides_change_the_recipe_of_record(tmp_path: Path) -> None:
    changes = ["train.steps=2", "match.kd.temperature=3e0", "seeds=[4]", "student.width=2"]
    assert limbeck("run", recipe(tmp_path), *changes, "--out", "there").code == 0
    written = yaml.safe_load(Path("there/recipe.yaml").read_text())
    assert written["train"]["steps"] == 2 and written["match"][1] == {"kd": {"temperature": 3.0}}
    assert result(Path("there"))["seeds"] == [4]
    assert load_file("there/seed-4/weights.safetensors")["head.weight"].shape == (tiny.CLASSES, 2)
    lines = [json.loads(line) for line in Path("there/seed-4/log.jsonl").read_text().splitlines()]
    assert max(line["t"] for line in lines if "parts" in line) == 1


def test_check_prints_the_recipe_and_writes_nothing(tmp_path: Path) -> None:
    path = recipe(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    called = limbeck("run", path, "--check", "train.epochs=3")
    assert called.code == 0 and called.err == ""
    assert yaml.safe_load(called.out)["train"]["epochs"] == 3
    assert sorted(tmp_path.rglob("*")) == before


def test_condense(tmp_path: Path) -> None:
    judge = {"net": {"net": "mlp", "width": 8}, "train": {"epochs": 2, "batch_size": 8}}
    path = recipe(tmp_path, do="condense", teacher=None, student=None, match=None, method="dm", ipc=2, judge=judge)
    called = limbeck("run", path, "train.steps=3", "train.batch_size=16", "--out", "there")
    assert called.code == 0, called.err
    made = load_file("there/seed-0/set.safetensors")
    assert made["inputs"].shape == (4, 1, 8, 8) and made["labels"].tolist() == [0, 0, 1, 1]
    assert result(Path("there"))["arms"]["control"]["images"] == 4
    assert Path("there/pictures/sets.png").exists()
    refused = limbeck("export", "there").said
    assert "condensed a set" in refused and "set.safetensors" in refused


def test_shorten_and_train_of_its_teacher(tmp_path: Path) -> None:
    draw = np.random.default_rng(0)
    np.savez("blobs.npz", inputs=draw.normal(0, 1, (80, 2)).astype(np.float32), labels=np.arange(80) % 2)
    teacher = {"net": "denoiser_mlp", "width": 8, "train": {"steps": 4, "batch_size": 16}}
    tree = {"do": "shorten", "teacher": teacher, "data": "blobs.npz", "train": {"steps": 3, "batch_size": 16}}
    Path("short.yaml").write_text(yaml.safe_dump({**tree, "teacher_steps": 3}))
    called = limbeck("run", "short.yaml", "--out", "there")
    assert called.code == 0, called.err
    body = result(Path("there"))
    assert body["name"] == "short" and not body["higher_is_better"]
    assert (
        body["arms"]["teacher"]["steps"] == 3
        and body["arms"]["control"]["steps"] == body["arms"]["student"]["steps"] == 1
    )
    (kept,) = Path(".teachers").iterdir()
    assert (kept / "weights.safetensors").exists() and not (kept / "checkpoints").exists()


def test_shape(tmp_path: Path) -> None:
    method = {"channel_pruning": {"ratio": 0.5}}
    path = recipe(tmp_path, do="shape", teacher={"net": "resnet8", "width": 4}, student=None, method=method)
    called = limbeck("run", path, f"teacher.weights={tiny.teacher(tmp_path, 'resnet8', width=4)}", "--out", "there")
    assert called.code == 0, called.err
    arms = result(Path("there"))["arms"]
    assert list(arms) == ["student", "control", "removal", "teacher"]
    assert arms["student"]["parameters"] < arms["teacher"]["parameters"]


def test_stages_share_what_they_make(tmp_path: Path) -> None:
    tiny.data(tmp_path)
    teacher, student = {"net": "mlp", "width": 16}, {"net": "mlp", "width": 4}
    train = {"steps": 4, "batch_size": 16}
    stages = [
        {"name": "first", "do": "train", "student": teacher, "data": "tiny.npz", "match": ["ce"], "train": train},
        {
            "name": "second",
            "do": "teach",
            "teacher": {**teacher, "weights": "stage:first"},
            "student": student,
            "data": "tiny.npz",
            "train": train,
        },
    ]
    Path("two.yaml").write_text(yaml.safe_dump({"stages": stages}))
    called = limbeck("run", "two.yaml", "stages.second.seeds=2", "--out", "there")
    assert called.code == 0, called.err
    assert result(Path("there"))["seeds"] == [0, 1]
    assert Path("there/report.html").exists() and Path("there/second/seed-1/control/outcome.json").exists()
    shutil.rmtree("there/second")  # as if it had been killed between the stages
    trained = Path("there/first/weights.safetensors").stat()
    assert limbeck("run", "--resume", "there").code == 0
    assert Path("there/first/weights.safetensors").stat().st_mtime_ns == trained.st_mtime_ns
    assert result(Path("there"))["seeds"] == [0, 1]


SLOW = """
import time
from pathlib import Path
from torch import nn

class Net(nn.Module):
    def __init__(self, classes, channels, size):
        super().__init__()
        wide = channels * size * size
        self.layer = nn.Sequential(nn.Flatten(), nn.Linear(wide, 8), nn.Dropout(0.3), nn.Linear(8, classes))

    def forward(self, inputs):
        if Path("slow").exists():
            time.sleep(0.05)
        return self.layer(inputs)
"""


def test_sigterm_then_the_printed_command_gives_the_same_bits(tmp_path: Path) -> None:
    Path("own.py").write_text(SLOW)
    student = {"net": "own.py:Net"}
    path = recipe(tmp_path, student=student, train={"steps": 40, "batch_size": 16, "ema": 0.9, "log_every": 1}, seeds=2)
    assert limbeck("run", path, "--out", "whole").code == 0

    Path("slow").touch()
    folder = Path("cut in two")  # a name that a shell would split
    process = subprocess.Popen(
        command("run", path, "--out", folder),
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    log = folder / "seed-0" / "log.jsonl"
    for _ in range(3000):
        if process.poll() is not None or (log.exists() and log.read_text().count("\n") > 4):
            break
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=300)
    Path("slow").unlink()
    assert process.returncode == 130, said
    assert "Traceback" not in said
    again = re.search(r"go on with: limbeck (run --resume '([^']+)')$", said.strip())
    assert again and again[2] == str(folder), said
    assert list((folder / "seed-0" / "checkpoints").glob("step-*")) and not (folder / "result.json").exists()

    assert limbeck("run", "--resume", again[2]).code == 0
    for arm in ("seed-0", "seed-0/control", "seed-1", "seed-1/control"):
        whole, cut = (load_file(Path(f) / arm / "weights.safetensors") for f in ("whole", folder))
        assert all(whole[k].equal(cut[k]) for k in whole), arm
        logs = [_log(Path(f) / arm / "log.jsonl") for f in ("whole", folder)]
        assert logs[0] == logs[1], arm
    whole_result, cut_result = result(Path("whole")), result(folder)
    for key in ("gain", "verdict", "seeds", "recipe_hash"):
        assert whole_result[key] == cut_result[key]
    assert [a["per_seed"] for a in whole_result["arms"].values()] == [
        a["per_seed"] for a in cut_result["arms"].values()
    ]


def _log(path: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return [{k: v for k, v in line.items() if k != "seconds"} for line in lines]


@contextmanager
def interrupted_at(monkeypatch: pytest.MonkeyPatch, arm: int) -> Iterator[None]:
    """SIGTERM to this process in the second step of the arm of that number."""
    arms = [0]

    @contextmanager
    def live(*, quiet: bool = False) -> Iterator[Any]:
        def show(event: dict[str, Any]) -> None:
            arms[0] += "arm" in event
            if arms[0] == arm and event.get("t") == 1:
                os.kill(os.getpid(), signal.SIGTERM)

        yield show

    with monkeypatch.context() as patch:
        patch.setattr("limbeck.progress.live", live)
        yield


def test_resume_does_not_repeat_what_is_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = recipe(tmp_path, train={"steps": 6, "batch_size": 16, "log_every": 1})
    with interrupted_at(monkeypatch, arm=2):
        assert limbeck("run", path, "--out", "there").code == 130
    done = Path("there/seed-0/weights.safetensors").stat().st_mtime_ns
    assert not Path("there/seed-0/control/outcome.json").exists()
    outcome = json.loads(Path("there/seed-0/outcome.json").read_text())
    assert outcome["spent"] >= outcome["seconds"] > 0
    Path("there/seed-0/outcome.json").write_text(json.dumps({**outcome, "spent": 1000.0}))
    assert limbeck("run", "--resume", "there").code == 0
    assert Path("there/seed-0/weights.safetensors").stat().st_mtime_ns == done
    assert json.loads(Path("there/result.json").read_text())["seconds"] > 1000  # of the run, not of its last process


def test_a_student_that_is_trained_first_is_where_every_arm_starts(tmp_path: Path) -> None:
    student = {"net": "mlp", "train": {"steps": 6, "batch_size": 16}}
    path = recipe(tmp_path, student=student, train={"steps": 1, "batch_size": 16, "optimizer": {"sgd": {"lr": 0.0}}})
    called = limbeck("run", path, "--out", "there")
    assert called.code == 0, called.err
    (place,) = Path(".students").iterdir()
    start = load_file(place / "weights.safetensors")
    for arm in ("", "control/"):
        arrived = load_file(Path("there/seed-0") / arm / "weights.safetensors")
        assert all(arrived[k].equal(start[k]) for k in start)


def test_an_interrupted_teacher_goes_on_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    teacher = {"net": "mlp", "train": {"steps": 6, "batch_size": 16, "log_every": 1}}
    path = recipe(tmp_path, teacher=teacher)
    with interrupted_at(monkeypatch, arm=1):
        called = limbeck("run", path, "--out", "there")
    assert called.code == 130 and "run the same command again" in called.err and not Path("there").exists()
    (place,) = Path(".teachers").iterdir()
    assert [p.name for p in (place / "checkpoints").glob("step-*")] == ["step-00000002"]
    assert limbeck("run", path, "--out", "there").code == 0
    cut = load_file(place / "weights.safetensors")
    shutil.rmtree(".teachers")
    assert limbeck("run", path, "--out", "whole").code == 0
    whole = load_file(place / "weights.safetensors")
    assert all(whole[k].equal(cut[k]) for k in whole)


# ---- list, show, catalogue, new, check -------------------------------------------------------------------------------
def test_list_finds_by_family_by_what_is_at_hand_and_by_word() -> None:
    found = json.loads(limbeck("list", "--json").out)
    assert {"kd", "dml", "dm", "layer_choice", "herding", "accuracy"} <= {m["name"] for m in found}
    assert {m["folder"] for m in json.loads(limbeck("list", "--json", "--family", "train/online").out)} == {
        "train/online"
    }
    have = json.loads(limbeck("list", "--json", "--family", "losses", "--has", "student_logits, labels").out)
    assert "ce" in {m["name"] for m in have} and "kd" not in {m["name"] for m in have}
    assert all(set(m["asks"]) <= {"student_logits", "labels"} for m in have)
    words = limbeck("list", "--search", "temperature hinton").out
    assert re.search(r"^kd +losses/logits +\S", words, re.MULTILINE) and "dml" not in words
    assert limbeck("list", "--search", "nowheretobefound").out.strip() == "0 methods"


def test_show_says_everything_of_a_method() -> None:
    page = limbeck("show", "kd").out
    for part in (
        "T^2 KL",
        "asks for",
        "student_logits",
        "temperature",
        "4.0",
        "Hinton",
        "1503.02531",
        "row",
        "numbers",
    ):
        assert part in page, part
    body = json.loads(limbeck("show", "dml", "--json").out)
    assert body["name"] == "dml" and "weight" in body["knobs"] and body["levels"]
    assert body["head_form"] is False and json.loads(limbeck("show", "akl", "--json").out)["head_form"] is True
    assert "needs no logits" in limbeck("show", "akl").out


def test_new_and_check_in_a_copy_of_the_package(tmp_path: Path) -> None:
    shutil.copytree(tiny.ROOT / "limbeck", "limbeck", ignore=shutil.ignore_patterns("__pycache__", "*.npz", "*.bz2"))
    shutil.copytree(tiny.ROOT / "catalogue", "catalogue")
    Path("tests/vectors").mkdir(parents=True)
    shutil.copy(tiny.ROOT / "tests/vectors/kd.json", "tests/vectors")
    script = """
import json, sys
from unittest import mock
import contextlib, io
from limbeck.cli import main
from limbeck import catalogue
from limbeck.core import find
out = []
for line in json.load(sys.stdin):
    said = io.StringIO()
    with mock.patch.object(sys, "argv", ["limbeck", *line]), contextlib.redirect_stdout(said):
        with contextlib.redirect_stderr(said):
            try: main(); code = 0
            except SystemExit as stop: code = stop.code
    out.append([code, said.getvalue()])
    find.names.cache_clear()  # as a new process would see it
    catalogue.implemented.cache_clear()
print(json.dumps(out))
"""
    calls = [
        ["new", "my_loss", "--in", "losses/logits"],
        ["list", "--family", "losses/logits"],
        ["show", "my_loss"],
        ["catalogue"],
        ["check", "my_loss"],
        ["check", "kd", "--json"],
        ["new", "my_loss", "--in", "losses/features"],
        ["new", "other", "--in", "losses/logit"],
        ["new", "Other", "--in", "losses/logits"],
    ]
    done = subprocess.run(
        [sys.executable, "-c", script],
        env=environment(tmp_path),
        input=json.dumps(calls),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    made, listed, shown, rows, checked, kd, twice, folder, name = json.loads(done.stdout)
    assert made[0] == 0 and Path("limbeck/losses/logits/my_loss.py").exists()
    assert json.loads(Path("tests/vectors/my_loss.json").read_text())["value"] is None
    assert "my_loss" in listed[1] and "my_loss  (losses/logits)" in shown[1]
    assert rows[0] == 0 and re.search(r"^my_loss +none +my_loss ", rows[1], re.MULTILINE), rows[1]
    assert checked[0] == 1 and "FAILED    vector" in checked[1] and "passed    gradcheck" in checked[1]
    assert "FAILED    reference: the vector is not filled in: `inputs.student_logits` is still null" in checked[1]
    assert "Error" not in checked[1]
    assert kd[0] == 0 and all(o["passed"] for o in json.loads(kd[1]))
    assert twice[0] == 2 and "exists already" in twice[1]
    assert folder[0] == 2 and "did you mean `losses/logits`" in folder[1]
    assert name[0] == 2
    assert sorted(p.name for p in Path("tests/vectors").iterdir()) == ["kd.json", "my_loss.json"]


# ---- label, report, doctor, schema -----------------------------------------------------------------------------------
def test_label_then_teach_from_the_store(tmp_path: Path) -> None:
    store = {"folder": "signals", "bits": 32}
    labelled = limbeck("label", recipe(tmp_path, store=store), "--out", "labels")
    assert labelled.code == 0 and "51 examples in signals" in labelled.out, labelled.err
    assert Path("labels/store.json").exists()
    online = limbeck("run", recipe(tmp_path), "--out", "online")
    offline = limbeck("run", recipe(tmp_path, store=store, teacher=None), "--out", "offline")
    assert online.code == offline.code == 0, offline.err
    a, b = (load_file(f"{f}/seed-0/weights.safetensors") for f in ("online", "offline"))
    assert all(a[k].allclose(b[k], atol=1e-5) for k in a)
    assert list(result(Path("offline"))["arms"]) == ["student", "control"]
    again = limbeck("label", recipe(tmp_path, store=store), "--out", "labels")
    assert again.code == 0, again.err


def test_report_for_one_run_and_for_several(tmp_path: Path) -> None:
    for name in ("one", "two"):
        assert (
            limbeck("run", recipe(tmp_path, name=name, train={"steps": 2, "batch_size": 16}), "--out", name).code == 0
        )
    assert limbeck("report", "one").out.strip() == "one/report.html"
    both = limbeck("report", "one", "two", "--out", "new/both.html")
    assert both.code == 0, both.err
    page = Path("new/both.html").read_text()
    assert page.count("<html") == 1 and "one" in page and "two" in page
    table = limbeck("report", "one", "two", "--markdown").out
    assert table.startswith("| run |") and "| one |" in table and "| two |" in table
    assert "nowhere" in limbeck("report", "nowhere").said


def test_doctor_examines_and_tests_itself() -> None:
    called = limbeck("doctor")
    assert called.code == 0, called.out
    for part in ("limbeck 0", "core: ", "torch 2", "devices: cpu", "threads: ", "extra text: ", "self-test: passed"):
        assert part in called.out, part


def test_doctor_fails_with_its_self_test(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("limbeck.doctor.self_test", lambda: ["the sums are wrong"])
    called = limbeck("doctor")
    assert called.code == 1 and "the sums are wrong" in called.out and "FAILED" in called.out


def test_schema_accepts_what_the_reader_accepts(tmp_path: Path) -> None:
    schema = json.loads(limbeck("schema").out)
    assert schema["$schema"].startswith("https://json-schema.org/")
    good = [
        tiny.body(tmp_path),
        *(yaml.safe_load(p.read_text()) for p in sorted(tiny.ROOT.glob("limbeck/demo/*.yaml"))),
    ]
    good += [
        {"teacher": "resnet20", "student": "resnet8", "data": "digits", "seeds": 3, "train": {"schedule": "cosine"}}
    ]
    good += [{"stages": [{"name": "a", "do": "train", "data": {"name": "digits", "limit": 3}}]}]
    for tree in good:
        assert problems(tree, schema, schema) == [], tree
    bad = [{"teacherr": 3}, {"train": {"epochs": "x"}}, {"do": "tech"}, {"seeds": []}, {"teacher": {"width": 3}}]
    bad += [{"train": {"precision": "fp64"}}, {"stages": [{"name": "a", "match": "kd"}]}, {"name": "a b"}, {"ipc": 0}]
    for tree in bad:
        assert problems(tree, schema, schema) != [], tree


def problems(value: Any, schema: dict[str, Any], top: dict[str, Any], path: str = "") -> list[str]:
    """What a JSON value breaks of a schema: the part of the standard that pydantic uses, and no keyword unheeded."""
    out: list[str] = []
    kinds: dict[str, Any] = {
        "object": dict,
        "array": list,
        "string": str,
        "boolean": bool,
        "null": type(None),
        "integer": int,
    }
    kinds["number"] = (int, float)
    for key, rule in schema.items():
        if key == "$ref":
            out += problems(value, top["$defs"][rule.removeprefix("#/$defs/")], top, path)
        elif key == "anyOf":
            tried = [problems(value, one, top, path) for one in rule]
            out += [] if [] in tried else min(tried, key=len)
        elif key == "type":
            ok = isinstance(value, kinds[rule]) and not (isinstance(value, bool) and rule in ("integer", "number"))
            out += [] if ok else [f"{path}: {value!r} is no {rule}"]
        elif key == "properties" and isinstance(value, dict):
            out += [p for k, one in rule.items() if k in value for p in problems(value[k], one, top, f"{path}.{k}")]
        elif key == "additionalProperties" and isinstance(value, dict):
            rest = [k for k in value if k not in schema.get("properties", {})]
            if isinstance(rule, bool):
                out += [] if rule else [f"{path}.{k}: unknown" for k in rest]
            else:
                out += [p for k in rest for p in problems(value[k], rule, top, f"{path}.{k}")]
        elif key == "required" and isinstance(value, dict):
            out += [f"{path}.{k}: missing" for k in rule if k not in value]
        elif key == "items" and isinstance(value, list):
            out += [p for i, one in enumerate(value) for p in problems(one, rule, top, f"{path}.{i}")]
        elif key == "enum":
            out += [] if value in rule else [f"{path}: {value!r} is none of {rule}"]
        elif key == "minItems" and isinstance(value, list):
            out += [] if len(value) >= rule else [f"{path}: too short"]
        elif key == "pattern" and isinstance(value, str):
            out += [] if re.search(rule, value) else [f"{path}: {value!r} does not match"]
        elif key in ("minimum", "exclusiveMinimum", "exclusiveMaximum") and isinstance(value, (int, float)):
            ok = {"minimum": value >= rule, "exclusiveMinimum": value > rule, "exclusiveMaximum": value < rule}[key]
            out += [] if ok else [f"{path}: {value} breaks {key} {rule}"]
        else:
            known = {"$defs", "$schema", "title", "description", "default", "properties", "additionalProperties"}
            known |= {"required", "items", "minItems", "pattern", "minimum", "exclusiveMinimum", "exclusiveMaximum"}
            assert key in known, f"the test does not know the keyword {key!r}"
    return out
