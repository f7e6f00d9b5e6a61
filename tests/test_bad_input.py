"""Bad input: one sentence, the right exit code, nothing half-written, and nothing lost."""

import errno
import json
import os
import resource
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file

from limbeck.core import checkpoint
from limbeck.core.errors import LimbeckError
from limbeck.verbs.setting import save_tensors
from tests import tiny
from tests.tiny import limbeck, outside, recipe

Change = dict[str, Any]


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("LIMBECK_DATA", raising=False)


def refused(folder: Path, *overrides: str, **changes: Any) -> str:
    """The sentence with which `limbeck run` refuses a recipe, exit code 2; nothing is left behind."""
    path = recipe(folder, **changes)
    before = sorted(folder.rglob("*"))
    called = limbeck("run", path, *overrides, "--out", "there")
    assert called.code == 2, (called.code, called.err)
    assert sorted(folder.rglob("*")) == before
    return called.said.replace(f"{path}:", "FILE:")


def line_of(folder: Path, key: str) -> int:
    """The line of the last key of that name in the recipe that was refused."""
    lines = (folder / "tiny.yaml").read_text().splitlines()
    return max(i for i, line in enumerate(lines, 1) if line.strip().removeprefix("- ").startswith(f"{key}:"))


# ---- what a recipe says ----------------------------------------------------------------------------------------------
TRAIN = {"steps": 3, "batch_size": 16}
REFUSALS: list[tuple[str, Change, str, tuple[str, ...]]] = [
    # what is wrong, the change that makes it, the key it is put down to, parts of the sentence
    ("key", {"teachr": 3}, "teachr", ("unknown key `teachr`", "did you mean `teacher`")),
    ("inner key", {"train": {**TRAIN, "stepss": 3}}, "stepss", ("`train.stepss`", "did you mean `steps`")),
    ("type", {"train": {**TRAIN, "steps": "many"}}, "steps", ("valid integer", "'many'")),
    ("method", {"method": "dmll"}, "method", ("no method 'dmll'", "did you mean `dml`")),
    ("loss", {"match": [{"kdd": {}}]}, "kdd", ("no method 'kdd'", "`kd`")),
    ("no loss", {"match": [{"dml": {}}]}, "dml", ("'dml' is a method of train/online, not a loss",)),
    ("measure", {"measure": [{"acuracy": {}}]}, "acuracy", ("no method 'acuracy'", "did you mean `accuracy`")),
    ("no measure", {"measure": [{"kd": {}}]}, "kd", ("not a measure",)),
    ("net", {"student": {"net": "mpl"}}, "net", ("no network 'mpl'", "did you mean `mlp`")),
    ("net knob", {"student": {"net": "mlp", "widht": 3}}, "widht", ("no knob 'widht'", "did you mean `width`")),
    ("role", {"nets": {"assistant": {"net": "resnet21"}}}, "net", ("no network 'resnet21'", "resnet20")),
    ("optimizer", {"train": {**TRAIN, "optimizer": {"sgdd": {}}}}, "optimizer", ("no optimizer 'sgdd'", "`sgd`")),
    ("option", {"train": {**TRAIN, "optimizer": {"sgd": {"momentun": 1}}}}, "optimizer", ("'momentun'", "`momentum`")),
    ("rate", {"train": {**TRAIN, "optimizer": {"sgd": {"lr": -1}}}}, "optimizer", ("refuses", "Invalid learning rate")),
    ("word", {"train": {**TRAIN, "optimizer": {"sgd": {"lr": "fast"}}}}, "optimizer", ("refuses {'lr': 'fast'}",)),
    ("two", {"train": {**TRAIN, "optimizer": {"sgd": {}, "lr": 1}}}, "optimizer", ("is written `name` or",)),
    ("none", {"train": {**TRAIN, "optimizer": {}}}, "optimizer", ("is written `name` or",)),
    ("schedule", {"train": {**TRAIN, "schedule": "cosin"}}, "schedule", ("'cosin'", "did you mean `cosine`")),
    ("warmup", {"train": {**TRAIN, "schedule": {"cosine": {"warmup": "x"}}}}, "schedule", ("refuses {'warmup': 'x'}",)),
    ("knob", {"match": [{"kd": {"temprature": 4}}]}, "kd", ("no knob 'temprature'", "temperature")),
    ("knob type", {"match": [{"kd": {"temperature": "hot"}}]}, "kd", ("must be float, got 'hot'",)),
    ("range", {"match": ["ce", {"kd": {"temperature": -1}}]}, "kd", ("`match.1`", "`temperature` must be > 0, got -1")),
    ("method range", {"method": {"dml": {"peers": 0}}}, "method", ("`peers` must be >= 1, got 0",)),
    ("measure range", {"measure": [{"calibration": {"bins": 0}}]}, "calibration", ("`bins` must be >= 1",)),
    ("metric", {"metric": "f1"}, "metric", ("'f1' is not measured", "accuracy")),
    ("expected", {"expect": {"metric": "ece"}}, "metric", ("'ece' is not measured", "accuracy")),
    ("opponent", {"expect": {"metric": "accuracy", "beats": "contrl"}}, "beats", ("did you mean `control`",)),
    ("select", {"train": {**TRAIN, "select": "f9"}}, "select", ("no measure gives 'f9'",)),
    ("control", {"control": {"trian": {}}}, "control", ("unknown key `trian`", "did you mean `train`")),
    ("control's loss", {"control": {"match": ["cee"]}}, "control", ("no method 'cee'", "`ce`")),
    ("control's data", {"control": {"data": {"limit": 3}}}, "limit", ("all arms share the data", "augment alone")),
    ("arm's student", {"beside": {"wide": {"student": {"width": 9}}}}, "width", ("all arms share the student",)),
    ("arm's networks", {"beside": {"two": {"nets": {"peer": "mlp"}}}}, "peer", ("write peer into `nets`",)),
    ("verb", {"method": "layer_choice"}, "method", ("'layer_choice' is a method of shape/layers",)),
    ("data option", {"data": {"name": "tiny.npz", "limt": 3}}, "limt", ("no option 'limt'", "did you mean `limit`")),
    ("augment", {"data": {"name": "tiny.npz", "augment": ["cropp"]}}, "augment", ("'cropp'", "did you mean `crop`")),
    ("data", {"data": {"name": "tinny.npz"}}, "data", ("no file or folder 'tinny.npz'", "did you mean `tiny.npz`")),
    ("data name", {"data": {"name": "digit"}}, "data", ("no data called 'digit'", "did you mean `digits`")),
    ("no student", {"student": None}, "do", ("teach needs a `student`",)),
    ("no data", {"data": None}, "do", ("names no data",)),
    ("no length", {"train": {"batch_size": 16}}, "train", ("needs epochs, steps or minutes",)),
    ("no teacher", {"teacher": None}, "kd", ("neither a teacher nor a store",)),
    ("random teacher", {"teacher": {"net": "mlp"}}, "teacher", ("random weights", "`weights: random`")),
    ("no weights", {"teacher": {"net": "mlp", "weights": "gone"}}, "teacher", ("there are no weights 'gone'",)),
    ("misfit", {"teacher": {"net": "mlp", "weights": "teacher.safetensors"}}, "teacher", ("do not fit MLP",)),
    ("student's", {"student": {"net": "mlp", "weights": "teacher.safetensors"}}, "student", ("do not fit MLP",)),
    ("batch", {"train": {"steps": 3, "batch_size": 1000}}, "batch_size", ("1000 is larger than", "51 examples")),
    ("classes", {"teacher": {"net": "mlp", "classes": 5, "weights": "random"}}, "kd", ("has 2", "has 5")),
    ("too few", {"student": {"net": "mlp", "classes": 1}, "match": ["ce"]}, "student", ("tells 1 classes", "has 2")),
    ("layer", {"student": {"net": "mlp", "taps": {"feats": "block.9"}}}, "taps", ("no layer 'block.9'", "blocks.0")),
    ("layers", {"student": {"net": "mlp", "taps": {"feats": "qqq"}}}, "taps", ("known: blocks, ", "head")),
    ("shape", {"do": "shape", "method": "layer_choic"}, "method", ("did you mean `layer_choice`",)),
    ("shape's teacher", {"do": "shape", "teacher": None}, "do", ("shape needs a `teacher`",)),
    ("condense", {"do": "condense", "method": "kd"}, "method", ("'kd' is a method of losses/logits",)),
    ("ipc", {"do": "condense", "ipc": 100}, "ipc", ("class 0 has", "fewer than the 100")),
    ("judge", {"do": "condense", "judge": {"net": {"net": "convnett"}}}, "net", ("did you mean `convnet`",)),
    ("denoiser", {"do": "shorten"}, "teacher", ("starts from a Denoiser, and the teacher is a MLP",)),
    ("label", {"do": "label", "teacher": None}, "do", ("label needs a `teacher`",)),
    ("store", {"teacher": None, "store": {"folder": "gone"}}, "store", ("gone",)),
    ("top-k store", {"store": {"topk": 1}}, "kd", ("asks for teacher_logits", "the 1 likeliest of 2", "`method: fkd`")),
    ("store's layers", {"store": {}, "match": ["ce", {"fitnets": {}}]}, "fitnets", ("keeps logits only",)),
    ("trained role", {"nets": {"assistant": {"net": "mlp", "train": TRAIN}}}, "train", ("only a teacher, and",)),
    ("role's data", {"nets": {"peer": {"net": "mlp", "data": {"limit": 3}}}}, "data", ("`nets.peer.data`: only",)),
    ("stage", {"stages": [{"name": "a"}]}, "teacher", ("beside `stages`",)),
]  # fmt: skip


@pytest.mark.parametrize("changes, key, parts", [r[1:] for r in REFUSALS], ids=[r[0] for r in REFUSALS])
def test_a_recipe_is_refused_at_its_line(tmp_path: Path, changes: Change, key: str, parts: tuple[str, ...]) -> None:
    said = refused(tmp_path, **changes)
    for part in parts:
        assert part in said, said
    assert said.startswith(f"FILE:{line_of(tmp_path, key)}: "), said
    assert len(said) < 400, said


def test_duplicate_keys_and_broken_yaml(tmp_path: Path) -> None:
    path = recipe(tmp_path)
    text = path.read_text()
    path.write_text(text + "name: again\n")
    assert f"tiny.yaml:{text.count(chr(10)) + 1}: the key 'name' is already on line 1" in limbeck("run", path).said
    path.write_text(text + "  train: {\n")
    called = limbeck("run", path)
    assert called.code == 2 and "not valid YAML" in called.said


def test_every_stage_is_checked_before_the_first_runs(tmp_path: Path) -> None:
    stage = {k: v for k, v in tiny.body(tmp_path).items() if k != "name"}
    stages = [{"name": "a", **stage}, {"name": "b", **stage, "match": ["kdd"]}]
    path = recipe(tmp_path)
    path.write_text(json.dumps({"stages": stages}))
    called = limbeck("run", path, "--out", "there")
    assert called.code == 2 and "`stages.1.match.0`" not in called.said and "no method 'kdd'" in called.said
    assert not Path("there").exists()


@pytest.mark.parametrize(
    "arguments, part",
    [
        (("run", "gone.yaml"), "cannot read the recipe gone.yaml: No such file"),
        (("run",), "give a recipe file"),
        (("run", "tiny.yaml", "--resume", "x"), "not both"),
        (("run", "--resume", "."), "is no run folder"),
        (("run", "--resume", "gone"), "is no run folder"),
        (("run", "tiny.yaml", "train.steps"), "key.key=value"),
        (("run", "tiny.yaml", "--out", "tiny.npz"), "tiny.npz is a file"),
        (("run", "tiny.yaml", "--out", "tiny.npz/there"), "tiny.npz is a file"),
        (("run", "tiny.yaml", "--out", "taken"), "taken holds a run already"),
        (("show", "kdd"), "no method 'kdd'; did you mean `kd`"),
        (("check", "kdd"), "no method 'kdd'; did you mean `kd`"),
        (("list", "--family", "loses"), "no family 'loses'; did you mean `losses`"),
        (("list", "--has", "student_logit"), "did you mean `student_logits`"),
        (("catalogue", "--family", "respones"), "no family 'respones'"),
        (("verify", "kdd"), "no recipe for 'kdd'"),
        (("report", "gone"), "gone"),
        (("export", "taken", "--to", "onyx"), "no export format 'onyx'; did you mean `onnx`"),
        (("export", "gone"), "holds no trained network"),
        (("label", "gone.yaml"), "cannot read the recipe gone.yaml"),
        (("new", "kd", "--in", "losses/logits"), "exists already"),
        (("new", "x", "--in", "losses"), "no folder 'losses'"),
    ],
)  # fmt: skip
def test_other_commands_refuse_in_one_sentence(tmp_path: Path, arguments: tuple[str, ...], part: str) -> None:
    path = recipe(tmp_path)
    Path("taken").mkdir()
    shutil.copy(path, "taken/recipe.yaml")
    before = sorted(tmp_path.rglob("*"))
    called = limbeck(*arguments)
    assert called.code == 2 and part in called.said
    assert sorted(tmp_path.rglob("*")) == before


# ---- what is missing -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "library, extra, change",
    [
        ("timm", "vision", {"student": {"net": "timm:resnet18"}}),
        ("transformers", "text", {"student": {"net": "hf:bert"}}),
        ("datasets", "text", {"data": "hub:nobody/nothing"}),
        ("pyarrow", "text", {"data": "tiny.parquet"}),
    ],
)
def test_a_missing_extra_is_asked_for_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, library: str, extra: str, change: Change
) -> None:
    monkeypatch.setitem(sys.modules, library, None)
    monkeypatch.setitem(sys.modules, f"{library}.parquet", None)
    (tmp_path / "tiny.parquet").write_bytes(b"PAR1")
    assert f"'{library}' is not installed; it comes with the extra: pip install 'limbeck[{extra}]'" in refused(
        tmp_path, **change
    )


# ---- what the data are -----------------------------------------------------------------------------------------------
def _empty() -> None:
    np.savez("bad.npz", inputs=np.zeros((0, 1, 8, 8), np.float32), labels=np.zeros(0, np.int64))


def _nan() -> None:
    x, y = tiny.images()
    x[7, 0, 3, 3] = np.nan
    np.savez("bad.npz", inputs=x, labels=y)


def _torn() -> None:
    path = tiny.data(Path())
    Path("bad.npz").write_bytes(path.read_bytes()[:2000])


def _unlabelled() -> None:
    np.savez("bad.npz", inputs=tiny.images()[0], labels=np.arange(63))


def _foreign() -> None:
    Path("bad.npz").write_text("this is no archive")


@pytest.mark.parametrize(
    "write, part", [(_empty, "empty"), (_nan, "nan"), (_torn, "bad.npz"), (_unlabelled, "63"), (_foreign, "bad.npz")]
)
def test_data_that_cannot_be_used(tmp_path: Path, write: Callable[[], None], part: str) -> None:
    write()
    assert part in refused(tmp_path, data={"name": "bad.npz"})


# ---- torn files ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("cut", [0, 1, 100, -1])
def test_truncated_weights_are_refused(tmp_path: Path, cut: int) -> None:
    recipe(tmp_path)
    whole = (tmp_path / "teacher.safetensors").read_bytes()
    (tmp_path / "teacher.safetensors").write_bytes(whole[:cut])
    assert "teacher.safetensors is not a whole safetensors file" in refused(tmp_path)


def stopped(folder: Path, monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """A run that was interrupted after a step, with a checkpoint every second step."""
    real, count = checkpoint.save, [0]

    def save(*arguments: Any, **options: Any) -> Path:
        path = real(*arguments, **options)
        count[0] += 1
        if count[0] == step // 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return path

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save", save)
        path = recipe(folder, train={"steps": 12, "batch_size": 16, "save_every": 2})
        assert limbeck("run", path, "--out", "there").code == 130


def test_a_torn_checkpoint_is_noticed_and_the_one_before_is_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stopped(tmp_path, monkeypatch, 6)
    shutil.copytree("there", "spoilt")
    first, *_, last = sorted(Path("there/seed-0/checkpoints").iterdir())
    torn = last / "tensors.safetensors"
    torn.write_bytes(torn.read_bytes()[:-7])
    assert limbeck("run", "--resume", "there").code == 0
    assert limbeck("run", tmp_path / "tiny.yaml", "--out", "whole").code == 0
    a, b = (load_file(f"{f}/seed-0/weights.safetensors") for f in ("there", "whole"))
    assert all(a[k].equal(b[k]) for k in a)

    for place in (first, last):
        spoilt = Path("spoilt") / place.relative_to("there") / "state.json"
        spoilt.write_text(spoilt.read_text().replace("0", "1", 1))
    called = limbeck("run", "--resume", "spoilt")
    assert called.code == 1 and "corrupt or truncated" in called.err and "Traceback" not in called.err
    assert called.err.count("limbeck: ") == 1 and Path("spoilt/seed-0/checkpoints").exists()


def test_a_checkpoint_of_another_teacher_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stopped(tmp_path, monkeypatch, 4)
    tiny.teacher(tmp_path, width=16, seed=7)
    called = limbeck("run", "--resume", "there")
    assert called.code == 1 and "another 'teacher' network" in called.err


# ---- a full disk -----------------------------------------------------------------------------------------------------
def test_a_limit_on_files_ends_a_run_with_one_sentence(tmp_path: Path) -> None:
    """A real refusal by the system: no file may grow beyond 40 kB, and the student's weights are larger."""
    path = recipe(tmp_path, student={"net": "mlp", "width": 256})

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, 40_000))

    called = outside("run", path, "train.save_every=2", "--out", "there", cwd=tmp_path, preexec_fn=limit)
    last = called.err.strip().splitlines()[-1]
    assert called.code == 1, called.err
    assert last.startswith("limbeck: could not save the checkpoint there/seed-0/checkpoints/step-00000002"), called.err
    assert "Traceback" not in called.err
    assert list(Path("there/seed-0/checkpoints").iterdir()) == []


def full(*_: Any, **__: Any) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_full_disk_leaves_the_checkpoint_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, count = checkpoint.save_file, [0]

    def save(*arguments: Any) -> None:
        count[0] += 1
        full() if count[0] == 2 else real(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save_file", save)
        path = recipe(tmp_path, train={"steps": 6, "batch_size": 16, "save_every": 2})
        called = limbeck("run", path, "--out", "there")
    assert called.code == 1 and "the disk is full; earlier checkpoints are intact" in called.err
    assert [p.name for p in Path("there/seed-0/checkpoints").iterdir()] == ["step-00000002"]
    assert limbeck("run", "--resume", "there").code == 0


def test_weights_are_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = load_file(tiny.teacher(tmp_path))
    path = tmp_path / "weights.safetensors"
    save_tensors(tensors, path)
    before = path.read_bytes()
    monkeypatch.setattr("limbeck.verbs.setting.save_file", full)
    with pytest.raises(LimbeckError, match=r"could not save .*weights\.safetensors: the disk is full"):
        save_tensors(tensors, path)
    assert path.read_bytes() == before and sorted(p.name for p in tmp_path.iterdir()) == [
        "teacher.safetensors",
        "weights.safetensors",
    ]


def test_a_full_disk_at_any_other_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = recipe(tmp_path)
    monkeypatch.setattr(sys.modules["limbeck.run"], "_write", full)
    called = limbeck("run", path, "--out", "there")
    assert called.code == 1 and called.err.endswith("limbeck: the disk is full\n")
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    assert limbeck("run", "--resume", "there").code == 0


def test_ctrl_c_outside_the_loop_is_an_interruption(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: Any, **__: Any) -> None:
        os.kill(os.getpid(), signal.SIGTERM)

    path = recipe(tmp_path)
    monkeypatch.setattr("limbeck.verbs.teach.judge", interrupt)
    called = limbeck("run", path, "--out", "there")
    assert called.code == 130 and called.err.endswith("go on with: limbeck run --resume there\n")
    monkeypatch.setattr("limbeck.verbs.label.captured", interrupt)
    labelled = limbeck("label", path, "--out", "labels")
    assert labelled.code == 130 and "run the same command again" in labelled.err
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
