"""The record of who was trained when, by what and for how long, and what methods themselves tell of a run."""

import json
import math
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from limbeck import recipe as recipes
from limbeck.core.batches import Batches, Table
from limbeck.core.ensemble import Ensemble
from limbeck.core.errors import Interrupted
from limbeck.core.loop import Clock, Plan, Stage, Turn, fit
from limbeck.core.nets import Batch, Nets
from limbeck.core.turns import TurnRecord
from limbeck.run import mean_of
from limbeck.verbs import build
from tests.tiny import limbeck, recipe

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@dataclass(frozen=True)
class TwoStages:
    """The student alone, then peers every step and the student, with a part more, every other one."""

    def stages(self, nets: Nets, steps: int) -> Iterator[int | Stage]:
        yield Stage(4, "alone")
        yield Stage(steps, "together")

    def optimizers(self) -> dict[str, dict[str, Any]]:
        return {"peers": {"sgd": {"lr": 0.25}}}

    def step(self, nets: Nets, batch: Batch, clock: Clock) -> Iterator[Turn]:
        x = batch["inputs"]
        if clock.stage:
            for k in range(2):
                yield f"peers.{k}", nets.peers[k](x).square().mean()
        if not clock.stage or clock.t % 2:
            loss = nets.student(x).square().mean()
            yield "student", {"fit": loss, "late": 2 * loss} if clock.stage else {"fit": loss}


def go(folder: Path | None = None, **options: Any) -> Any:
    torch.manual_seed(0)
    nets = Nets(student=nn.Linear(3, 1), peers=nn.ModuleList([nn.Linear(3, 1), nn.Linear(3, 1)]))
    data = Batches(Table({"inputs": torch.randn(32, 3)}), 8, seed=1)
    plan = Plan(9, optimizer={"adam": {"lr": 0.5}}, schedule="cosine", save_every=2, log_every=1)
    return fit(TwoStages(), nets, data, plan, folder=folder, **options)


def counted(folder: Path) -> list[Any]:
    """turns.json without what a watch says."""
    stages = json.loads((folder / "turns.json").read_text())
    for stage in stages:
        assert stage.pop("began") >= 0 and 0 < stage["seconds"] < 600
        assert 0 < sum(p.pop("seconds") for p in stage["players"].values()) <= stage.pop("seconds")
    return stages


def turns(count: int, first: int, last: int, parts: list[str], optimizer: str, lr: float) -> dict[str, Any]:
    return {"turns": count, "first": first, "last": last, "parts": parts, "optimizer": optimizer, "lr": lr}


def test_turns_are_counted_by_stage_and_player(tmp_path: Path) -> None:
    fitted = go(tmp_path)
    peer = turns(9, 0, 8, ["loss"], "sgd", 0.25)
    assert counted(tmp_path) == [
        {"name": "alone", "steps": 4, "players": {"student": turns(4, 0, 3, ["fit"], "adam", 0.5)}},
        {
            "name": "together",
            "steps": 9,
            "players": {"peers.0": peer, "peers.1": peer, "student": turns(4, 1, 7, ["fit", "late"], "adam", 0.5)},
        },
    ]
    assert fitted.trained[1].began == pytest.approx(fitted.trained[0].began + fitted.trained[0].seconds, abs=0.5)
    assert sum(stage.seconds for stage in fitted.trained) <= fitted.seconds


@pytest.mark.parametrize("where", [(0, 1), (0, 3), (1, 4), (1, 8)])
@pytest.mark.parametrize("how", ["signal", "crash"])
def test_no_turn_is_counted_twice_or_lost_when_a_run_stops(tmp_path: Path, where: tuple[int, int], how: str) -> None:
    go(tmp_path / "whole")

    stopped: list[str] = []

    def stop(event: dict[str, Any]) -> None:
        if (event["stage"], event["t"]) == where and not stopped:
            stopped.append(how)
            if how == "crash":
                raise RuntimeError("killed")  # no chance to save: what came after the last checkpoint is done again
            signal.raise_signal(signal.SIGTERM)

    with pytest.raises((Interrupted, RuntimeError)):
        go(tmp_path / "cut", on_event=stop)
    if how == "signal":
        stages = json.loads((tmp_path / "cut" / "turns.json").read_text())
        assert len(stages) == where[0] + 1  # it can be read before the run goes on
    go(tmp_path / "cut", resume=True)
    assert counted(tmp_path / "cut") == counted(tmp_path / "whole")


def test_a_new_run_in_an_old_folder_does_not_keep_its_record(tmp_path: Path) -> None:
    go(tmp_path)

    def stop(event: dict[str, Any]) -> None:
        raise RuntimeError

    with pytest.raises(RuntimeError):
        go(tmp_path, on_event=stop)
    assert not (tmp_path / "turns.json").exists()


def test_the_record_costs_next_to_nothing() -> None:
    record, optimizer = TurnRecord(), torch.optim.SGD(nn.Linear(1, 1).parameters(), lr=0.1)
    optimizer.param_groups[0]["initial_lr"] = 0.1
    record.stage("", 1000, 0.0)
    began = time.process_time()
    for t in range(1000):
        record.step()
        record.turn("student", {"ce": None, "kd": None, "hint": None}, t, optimizer)
    assert time.process_time() - began < 0.05  # 50 microseconds a turn, ten times what it takes


# ---- limbeck show ----------------------------------------------------------------------------------------------------
def columns(out: str) -> list[list[str]]:
    return [line.split() for line in out.splitlines()]


def test_show_tells_arms_seeds_and_who_was_trained_first(tmp_path: Path) -> None:
    beside = {"late": {"train": {"steps": 3}}}
    teacher = {"net": "mlp", "width": 8, "train": {"steps": 5, "batch_size": 16}}
    path = recipe(tmp_path, teacher=teacher, seeds=2, beside=beside)
    assert limbeck("run", path, "--out", "runs/here").code == 0
    called = limbeck("show", "runs/here", "--turns")
    assert called.code == 0, called.err
    head, first, *rest = columns(called.out)
    assert head == ["arm", "seed", "player", "steps", "turns", "loss", "optimizer", "seconds"]
    assert first[:-1] == ["teacher,", "before", "teacher", "0-4", "5", "ce", "adam", "0.001"]
    told = [[*line[:3], line[3], line[4], " ".join(line[5:-3])] for line in rest]
    assert told == [
        [arm, seed, "student", steps, n, loss]
        for seed in "01"
        for arm, steps, n, loss in (
            ("student", "0-5", "6", "ce + kd"),
            ("control", "0-5", "6", "ce"),
            ("late", "0-2", "3", "ce"),
        )
    ]
    lines = json.loads(limbeck("show", "runs/here", "--turns", "--json").out)
    assert [line["turns"] for line in lines] == [5, 6, 6, 3, 6, 6, 3] and lines[1]["loss"] == ["ce", "kd"]


def test_show_tells_the_stages_of_a_recipe_in_their_order(tmp_path: Path) -> None:
    net, train = {"net": "mlp", "width": 16}, {"steps": 4, "batch_size": 16}
    data = {"name": str(tmp_path / "tiny.npz")}
    recipe(tmp_path)
    second = {
        "name": "a_second",
        "do": "teach",
        "teacher": {**net, "weights": "stage:z_first"},
        "student": {"net": "mlp", "width": 4},
        "data": data,
        "method": {"pate": {"voters": 3, "queries": 8, "scale": 0.5}},
        "train": train,
    }
    stages = [{"name": "z_first", "do": "train", "student": net, "data": data, "train": train}, second]
    path = recipe(
        tmp_path,
        **dict.fromkeys(("teacher", "student", "data", "match", "train"), None),
        do="teach",
        stages=stages,
    )
    assert limbeck("run", path, "--out", "there").code == 0
    head, *lines = columns(limbeck("show", "there", "--turns").out)
    assert head[:6] == ["part", "arm", "seed", "stage", "player", "steps"]
    assert lines[0][:4] == ["z_first", "student", "0-3", "4"]
    assert lines[1][:8] == ["a_second", "student", "0", "voters", "voters", "(3)", "0-3", "12"]
    assert lines[2][:4] == ["student", "student", "0-3", "4"]
    assert lines[3][:5] == ["control", "0", "student", "0-3", "4"]

    called = limbeck("show", "there/a_second")
    figures = {line.split("  ")[0]: line.split() for line in called.out.splitlines()}
    known = json.loads(Path("there/a_second/result.json").read_text())["arms"]["student"]
    assert called.code == 0 and figures["labels voted"][2:] == [str(int(known["labels_voted"])), "–", "–"]
    assert (
        0 < known["labels_voted"] <= 8
        and 0 < known["epsilon"] < math.inf
        and "epsilon" in figures
        and "epsilon" in Path("there/report.html").read_text()
    )


def test_show_refuses_what_is_no_run(tmp_path: Path) -> None:
    assert limbeck("show", "kd", "--turns").said == "kd is no run folder: it holds no recipe.yaml"
    recipe(tmp_path).rename("recipe.yaml")
    said = limbeck("show", tmp_path, "--turns").said
    assert said == f"{tmp_path} records no turns: nothing was trained in it yet, or it is older than this record"


def test_figures_are_means_over_seeds() -> None:
    assert mean_of([{"a": 1.0, "n": 3}, {"a": 2.0, "n": 3, "b": math.inf}]) == {"a": 1.5, "n": 3, "b": math.inf}


# ---- an ensemble as the teacher --------------------------------------------------------------------------------------
def test_an_ensemble_teaches_plain_losses_by_the_mean_of_its_probabilities(tmp_path: Path) -> None:
    recipe(tmp_path)
    members = [{"net": "mlp", "width": 16, "weights": str(tmp_path / "teacher.safetensors")} for _ in range(2)]
    members[1] = {"net": "mlp", "width": 8, "weights": "random"}
    path = recipe(tmp_path, teacher={"ensemble": members})
    setting = build.setting(recipes.load(path), tmp_path / "none", None, False)
    assert isinstance(setting.teacher, Ensemble) and not any(p.requires_grad for p in setting.teacher.parameters())
    x = setting.splits.test["inputs"]
    with torch.no_grad():
        said = torch.stack([m(x)["logits"].softmax(-1) for m in setting.teacher.members]).mean(0)
        assert torch.allclose(setting.teacher(x)["logits"].softmax(-1), said, atol=1e-6)
    assert not torch.allclose(said, setting.teacher.members[0](x)["logits"].softmax(-1), atol=1e-3)

    assert limbeck("run", path, "--out", "there").code == 0
    arms = json.loads(Path("there/result.json").read_text())["arms"]
    assert arms["student"]["label"] == "mlp, ce + kd, taught by mlp and mlp"
    assert arms["teacher"]["parameters"] == sum(p.numel() for p in setting.teacher.parameters())
    written = recipes.load(Path("there/recipe.yaml"))
    assert written.digest == recipes.load(path).digest


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"student": {"ensemble": ["mlp"]}}, "only a teacher may be an ensemble"),
        ({"teacher": {"ensemble": []}}, "`teacher.members` List should have at least 1 item"),
        ({"teacher": {"ensemble": ["mlp"], "weights": "x"}}, "an ensemble has no `weights` of its own"),
        ({"teacher": {"ensemble": ["mlp"], "width": 3}}, "an ensemble has no `width` of its own"),
        ({"teacher": {"ensemble": ["mpl"]}}, "did you mean `mlp`"),
        ({"teacher": {"ensemble": ["mlp"]}}, "mlp would teach with random weights; give it `weights`"),
        ({"teacher": {"ensemble": [{"net": "mlp", "train": {"steps": 1}}]}}, "only a teacher, and the student of"),
        ({"teacher": {"net": "mlp", "members": ["mlp"]}}, "only an ensemble has members"),
    ],
)
def test_what_is_no_ensemble_is_told_in_one_sentence(tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    path = recipe(tmp_path, **changes)
    assert said in limbeck("run", path, "--out", "there").said
    assert not Path("there").exists()
