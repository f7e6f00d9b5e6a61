"""The report: the numbers are right, the page is whole and inert, and nothing that is missing or hostile breaks it."""

import base64
import copy
import html.parser
import json
import math
import os
import random
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from limbeck.core.errors import BadInput, LimbeckError
from limbeck.report import cite, costs, numerals, page, runs, svg
from limbeck.report.grid import grid
from limbeck.report.logs import average, logs
from limbeck.report.page import html as write_html
from limbeck.report.runs import Citation
from limbeck.report.statistics import Gain, gain, interval, state, verdict
from limbeck.report.tables import markdown, terminal

NAN = float("nan")


# --- fake run folders -------------------------------------------------------------------------------------------------
def arm(label: str, metric: str, values: list[float], seed: int = 0, **further: Any) -> dict[str, Any]:
    """An arm whose other metrics follow from the first, so that the page has something to show."""
    dice = random.Random(label + str(seed))
    per_seed = [{metric: v} for v in values]
    if metric == "accuracy":
        for one in per_seed:
            one |= {
                "agreement": min(0.99, one["accuracy"] + 0.05 + dice.gauss(0, 0.004)),
                "ece": abs(dice.gauss(0.03, 0.01)),
            }
    return {
        "label": label,
        "per_seed": per_seed,
        "seconds": [round(20 + dice.random() * 3, 2) for _ in values],
        **further,
    }


RESULTS: dict[str, dict[str, Any]] = {
    "teach": {
        "name": "teach-fashion",
        "do": "teach",
        "metric": "accuracy",
        "higher_is_better": True,
        "arms": {
            "student": arm(
                "resnet8, taught by resnet20 (ce + dkd)",
                "accuracy",
                [0.8812, 0.8840, 0.8795],
                parameters=12345,
                bytes=49380,
                latency_ms=1.21,
                latency_p95_ms=1.5,
            ),
            "control": arm(
                "resnet8, labels only",
                "accuracy",
                [0.8698, 0.8702, 0.8689],
                parameters=12345,
                bytes=49380,
                latency_ms=1.22,
                latency_p95_ms=1.51,
            ),
            "teacher": arm(
                "resnet20 wide, zoo",
                "accuracy",
                [0.9123] * 3,
                parameters=274042,
                bytes=1096168,
                latency_ms=5.3,
                latency_p95_ms=6.2,
            ),
        },
        "methods": ["dkd"],
        "citations": [{"paper": "Zhao et al. 2022, eq. 7", "arxiv": "2203.08679"}],
        "seconds": 73.2,
    },
    "condense": {
        "name": "condense-fashion",
        "do": "condense",
        "metric": "accuracy",
        "higher_is_better": True,
        "arms": {
            "student": arm(
                "10 images a class by distribution matching",
                "accuracy",
                [0.741, 0.752, 0.748],
                parameters=21034,
                latency_ms=0.8,
                images=100,
            ),
            "control": arm(
                "10 random images a class",
                "accuracy",
                [0.694, 0.701, 0.688],
                parameters=21034,
                latency_ms=0.8,
                images=100,
            ),
            "full": arm(
                "all training images", "accuracy", [0.884, 0.886, 0.885], parameters=21034, latency_ms=0.8, images=5000
            ),
        },
        "methods": ["dm"],
        "citations": [{"paper": "Zhao and Bilen 2023", "arxiv": "2110.04181"}],
        "seconds": 48.0,
    },
    "shorten": {
        "name": "shorten-digits",
        "do": "shorten",
        "metric": "frechet",
        "higher_is_better": False,
        "arms": {
            "student": arm(
                "one step, consistency distillation",
                "frechet",
                [11.92, 13.4, 12.71],
                parameters=310122,
                bytes=1240488,
                latency_ms=2.1,
                steps=1,
            ),
            "teacher_one_step": arm(
                "the teacher at one step",
                "frechet",
                [97.2, 95.9, 99.0],
                parameters=310122,
                bytes=1240488,
                latency_ms=2.1,
                steps=1,
            ),
            "teacher": arm(
                "flow, 50 Euler steps",
                "frechet",
                [6.31, 6.02, 6.4],
                parameters=310122,
                bytes=1240488,
                latency_ms=104.0,
                steps=50,
            ),
        },
        "against": "teacher_one_step",
        "methods": ["consistency_distillation"],
        "citations": [{"paper": "Song et al. 2023, alg. 2", "arxiv": "2303.01469"}],
        "seconds": 61.8,
    },
    "shape": {
        "name": "shape-fashion",
        "do": "shape",
        "metric": "accuracy",
        "higher_is_better": True,
        "arms": {
            "student": arm(
                "half the blocks, recovered by distillation",
                "accuracy",
                [0.9011, 0.8975, 0.9023],
                parameters=139000,
                bytes=556000,
                latency_ms=2.9,
            ),
            "scratch": arm(
                "the same network from scratch",
                "accuracy",
                [0.8994, 0.9003, 0.8981],
                parameters=139000,
                bytes=556000,
                latency_ms=2.9,
            ),
            "removal": arm(
                "half the blocks, removed",
                "accuracy",
                [0.412, 0.412, 0.412],
                parameters=139000,
                bytes=556000,
                latency_ms=2.9,
            ),
            "teacher": arm("resnet20 wide", "accuracy", [0.9123] * 3, parameters=274042, bytes=1096168, latency_ms=5.3),
        },
        "against": "scratch",
        "methods": ["layer_choice", "kd"],
        "citations": [{"paper": "Hinton et al. 2015, eq. 4", "arxiv": "1503.02531"}],
        "seconds": 66.1,
    },
}
RECIPE = """name: {name}
do: {do}
teacher: {{net: resnet20, weights: zoo/fashion_resnet20}}
student: {{net: resnet8}}
match: [ce, {{dkd: {{beta: 8, temperature: 4}}}}]
"""


def fake(root: Path, kind: str, **changes: Any) -> Path:
    """A finished run folder of one verb, as `limbeck run` leaves it."""
    result = copy.deepcopy(RESULTS[kind]) | {
        "seeds": [0, 1, 2],
        "device": "cpu",
        "commit": "3f9c1ab",
        "recipe_hash": "9d41e0c7",
    }
    result["versions"] = {"limbeck": "0.1.0", "torch": "2.13.0", "numpy": "2.4.6", "python": "3.12.4"}
    against, metric = result.pop("against", "control"), result["metric"]
    ours, theirs = ([one[metric] for one in result["arms"][key]["per_seed"]] for key in ("student", against))
    found = gain(ours, theirs, higher_is_better=result["higher_is_better"], against=against)
    result["gain"] = {"mean": found.mean, "low": found.low, "high": found.high, "n": found.n, "against": against}
    folder = root / f"{result['name']}-20261125-214203"
    folder.mkdir(parents=True)
    if kind in ("condense", "shorten"):
        dice = np.random.default_rng(0)
        y, x = np.mgrid[:14, :14] / 13.0
        images = np.stack([np.exp(-((x - a) ** 2 + (y - b) ** 2) * 12) for a, b in dice.random((30, 2))])[:, None]
        titles = {
            "shorten": ("teacher, 50 steps", "student, 1 step", "teacher, 1 step"),
            "condense": ("distribution matching", "random images"),
        }
        noise = (0.02, 0.08, 0.4)
        panels = {t: images + n * dice.standard_normal(images.shape) for t, n in zip(titles[kind], noise, strict=False)}
        grid(panels, folder / "pictures" / "grid.png", columns=5)
        caption = "Drawn from the same noise." if kind == "shorten" else "The first three images of each class."
        result["pictures"] = [{"title": "Samples side by side", "file": "pictures/grid.png", "caption": caption}]
    for name, thing in changes.items():
        result[name] = thing
    (folder / "result.json").write_text(json.dumps(result))
    (folder / "recipe.yaml").write_text(RECIPE.format(name=result["name"], do=kind))
    for seed in range(3):
        for who in ("student", "control"):
            log = folder / f"seed-{seed}" / ("" if who == "student" else who) / "log.jsonl"
            log.parent.mkdir(parents=True, exist_ok=True)
            log.write_text("\n".join(json.dumps(line) for line in training(kind, who, seed)) + "\n")
    return folder


def training(kind: str, who: str, seed: int) -> list[dict[str, Any]]:
    """A log whose losses fall and whose validation rises, with two players for the sampler."""
    dice = random.Random(f"{kind}{who}{seed}")
    lines: list[dict[str, Any]] = []
    for t in range(0, 600, 4):
        fall = math.exp(-t / 130)
        ce, kd = 0.35 + 1.9 * fall + dice.gauss(0, 0.04), 0.2 + 4.2 * fall + dice.gauss(0, 0.07)
        parts = {"ce": ce, "dkd": kd} if who == "student" else {"ce": ce}
        lines.append(
            {
                "t": t,
                "stage": 0,
                "player": "student",
                "loss": sum(parts.values()),
                "parts": parts,
                "lr": 0.1,
                "seconds": t / 30,
            }
        )
        if kind == "shorten" and who == "student":
            lines.append(
                {"t": t, "stage": 0, "player": "fake", "loss": 200 * math.exp(-t / 60) + 0.3 + abs(dice.gauss(0, 0.05))}
            )
        if t % 40 == 36:
            top = 0.885 if who == "student" else 0.872
            value = top - 0.35 * math.exp(-t / 110) + dice.gauss(0, 0.006)
            metric = {"frechet": 12 + 80 * fall + dice.gauss(0, 1)} if kind == "shorten" else {"accuracy": value}
            lines.append({"t": t, "stage": 0, "validation": metric})
    return lines


def demo(root: Path) -> list[Path]:
    return [fake(root, kind) for kind in ("teach", "condense", "shorten", "shape")]


class Reader(html.parser.HTMLParser):
    """What a browser would see: tags with attributes, and the text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "link", "img"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open[-1] == tag, f"</{tag}> closes {self.open[-3:]}"
        self.open.pop()

    def handle_data(self, data: str) -> None:
        self.text += data

    def named(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


def rendered(folders: list[Path], out: Path, title: str = "") -> tuple[str, Reader]:
    text = write_html(folders, out, title=title).read_text("utf-8")
    reader = Reader(text)
    assert not reader.open, f"left open: {reader.open}"
    return text, reader


def said(text: str) -> str:
    """Text with its hard spaces made plain, for comparison."""
    return text.replace(numerals.SPACE, " ")


def as_text(table: Any, width: int = 80) -> str:
    console = Console(width=width, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    console.print(table)
    return said(console.export_text())


# --- statistics -------------------------------------------------------------------------------------------------------
def test_interval_is_the_paired_t_interval() -> None:
    # By hand: mean 2, deviation 1, t(0.975, 2 degrees) = 4.302653 from a printed table.
    mean, low, high = interval([1.0, 2.0, 3.0])
    assert mean == pytest.approx(2.0)
    assert (high - mean) == pytest.approx(4.302653 / math.sqrt(3), rel=1e-6)
    assert (mean - low) == pytest.approx(high - mean)


def test_interval_covers_the_truth_in_95_of_100() -> None:
    dice = np.random.default_rng(0)
    draws = dice.normal(0.3, 2.0, (4000, 5))
    inside = sum(low <= 0.3 <= high for _, low, high in map(interval, draws.tolist()))
    assert inside / 4000 == pytest.approx(0.95, abs=0.01)


def test_interval_of_one_or_none_has_no_bounds() -> None:
    mean, low, high = interval([0.5])
    assert mean == 0.5
    assert math.isnan(low)
    assert math.isnan(high)
    assert all(map(math.isnan, interval([])))


def test_gain_is_positive_when_better_whatever_the_direction() -> None:
    assert gain([0.9, 0.8], [0.8, 0.75]).differences == pytest.approx((0.1, 0.05))
    assert gain([10.0, 12.0], [30.0, 33.0], higher_is_better=False).differences == pytest.approx((20.0, 21.0))


def test_gain_leaves_out_seeds_without_a_pair() -> None:
    found = gain([0.9, NAN, 0.8, 0.7], [0.8, 0.5, math.inf])
    assert found.n == 1
    assert found.mean == pytest.approx(0.1)


@pytest.mark.parametrize(
    ("differences", "expected"),
    [
        ([0.01, 0.012, 0.011], "helped"),
        ([-0.01, -0.012, -0.011], "did not help"),
        ([0.01, -0.012, 0.004], "cannot tell"),
        ([0.01], "cannot tell"),
        ([], "cannot tell"),
        # Equal differences say that the spread is unknown, not that it is nil.
        ([0.01, 0.01, 0.01], "cannot tell"),
        ([0.3 - 0.2, 0.2 - 0.1], "cannot tell"),
    ],
)
def test_state(differences: list[float], expected: str) -> None:
    assert state(gain(differences, [0.0] * len(differences))) == expected


def test_verdict_sentences() -> None:
    # By hand: differences 1.2, 1.0, 1.3 points: mean 1.167, half width 4.3027 * 0.1528 / sqrt(3) = 0.379.
    helped = gain([0.812, 0.815, 0.819], [0.8, 0.805, 0.806])
    assert said(verdict(helped, "accuracy")) == (
        "Distillation helped: accuracy is 1.2 points above the control (95 % interval +0.8 to +1.5, 3 seeds)."
    )
    hurt = gain([14.0, 15.0, 14.2], [10.0, 10.5, 10.1], higher_is_better=False, against="teacher_one_step")
    # 4.0, 4.5, 4.1: mean 4.2, half width 4.3027 * 0.2646 / sqrt(3) = 0.657.
    assert said(verdict(hurt, "frechet", higher_is_better=False, do="shorten")) == (
        "Distilling the sampler did not help: Fréchet distance is 4.20 above the teacher at one step "
        "(95 % interval 3.54 to 4.86 higher, 3 seeds)."
    )
    one = said(verdict(gain([0.82], [0.8]), "accuracy"))
    assert one == "Cannot tell with one seed: accuracy is 2.0 points above the control; an interval needs at least two."
    unsure = said(verdict(gain([0.82, 0.79, 0.8], [0.8, 0.8, 0.8], against="scratch"), "accuracy"))
    assert unsure.startswith(
        "Cannot tell with these seeds: accuracy is 0.3 points above training from scratch, but the interval includes"
    )
    assert "no seed has a finite accuracy" in verdict(gain([], []), "accuracy")
    assert "no interval is known" in verdict(Gain(0.1, NAN, NAN, 3), "accuracy")


def test_verdict_never_claims_help_that_the_interval_does_not_show() -> None:
    dice = np.random.default_rng(1)
    for differences in dice.normal(0.0, 1.0, (300, 3)):
        found = gain(differences.tolist(), [0.0] * 3)
        assert (" helped" in verdict(found, "loss")) == (found.low > 0)


# --- numbers ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("shown", "expected"),
    [
        (numerals.value("accuracy", 0.8127), "81.3 %"),
        (numerals.value("frechet", 14.23), "14.2"),
        (numerals.value("latency_ms", 1.204), "1.20 ms"),
        (numerals.gained("accuracy", 0.012, True), "+1.2 points"),
        (numerals.gained("accuracy", -0.012, True), "−1.2 points"),
        (numerals.gained("accuracy", 0.0, True), "0.0 points"),
        (numerals.gained("accuracy", 0.0004, True), "+0.04 points"),
        (numerals.gained("frechet", 14.23, False), "14.2 lower"),
        (numerals.gained("frechet", -0.5, False), "0.500 higher"),
        (numerals.between("accuracy", 0.004, 0.02, True), "+0.4 to +2.0"),
        (numerals.between("frechet", 10.12, 18.31, False), "10.1 to 18.3 lower"),
        (numerals.between("frechet", -18.31, -10.12, False), "10.1 to 18.3 higher"),
        (numerals.between("frechet", -2.25, 3.5, False), "2.25 higher to 3.50 lower"),
        (numerals.between("accuracy", NAN, NAN, True), ""),
        (numerals.plain(12345), "12,345"),
        (numerals.plain(-0.1234), "−0.123"),
        (numerals.plain(1.2e-5), "1.2e-05"),
        (numerals.plain(NAN), "NaN"),
        (numerals.plain(-math.inf), "−infinite"),
        (numerals.plain(None), "–"),
        (numerals.parameters(12345), "12,345"),
        (numerals.parameters(1_234_567), "1.23 M"),
        (numerals.size(49380), "49.4 kB"),
        (numerals.milliseconds(0.34), "340 µs"),
        (numerals.milliseconds(2100), "2.1 s"),
        (numerals.duration(73.2), "73 s"),
        (numerals.duration(160), "2 min 40 s"),
        (numerals.duration(3 * 3600 + 5 * 60), "3 h 05 min"),
        (numerals.duration(3599.9), "1 h 00 min"),
        (numerals.times(8.31, "smaller", "larger", "same size"), "8.3× smaller"),
        (numerals.times(0.5, "smaller", "larger", "same size"), "2× larger"),
        (numerals.times(1.0, "smaller", "larger", "same size"), "same size"),
        (numerals.half("frechet", 6.24, 0.4934), "0.49"),
        (numerals.half("accuracy", 0.81, 0.004), "0.4"),
    ],
)
def test_numbers(shown: str, expected: str) -> None:
    assert said(shown) == expected


@pytest.mark.parametrize(("low", "high"), [(0.0, 1.0), (86.6, 91.5), (-3.0, 4e6), (1e-7, 3e-7), (0.1, 0.1)])
def test_ticks_are_few_round_and_inside(low: float, high: float) -> None:
    places = svg.ticks(low, high)
    assert 1 <= len(places) <= 5
    assert all(low - 1e-9 * abs(low) <= p <= high + 1e-9 * abs(high) for p in places)
    assert len(places) == len({svg.tick_text(p, places[1] - places[0] if len(places) > 1 else 1.0) for p in places})


# --- logs -------------------------------------------------------------------------------------------------------------
def logged(folder: Path, lines: list[str]) -> Path:
    (folder / "seed-0").mkdir(parents=True)
    (folder / "seed-0" / "log.jsonl").write_text("\n".join(lines))
    return folder


def loss(t: int, value: float, stage: int = 0) -> str:
    return json.dumps({"t": t, "stage": stage, "player": "student", "loss": value})


def test_a_resumed_log_supersedes_what_it_repeats(tmp_path: Path) -> None:
    lines = [loss(t, 1.0) for t in range(0, 10)] + [loss(t, 2.0) for t in range(6, 12)]
    (found,) = logs(logged(tmp_path, lines))
    assert found.losses["student"]["loss"] == [(t, 1.0) for t in range(6)] + [(t, 2.0) for t in range(6, 12)]


def test_stages_that_start_at_zero_are_laid_end_to_end(tmp_path: Path) -> None:
    lines = [loss(t, 1.0) for t in (0, 5, 10)] + [loss(t, 2.0, stage=1) for t in (0, 5, 10)]
    (found,) = logs(logged(tmp_path, lines))
    assert [t for t, _ in found.losses["student"]["loss"]] == [0, 5, 10, 10, 15, 20]
    assert found.stages == [10]


def test_torn_and_foreign_lines_are_counted_not_fatal(tmp_path: Path) -> None:
    lines = [loss(0, 1.0), "[1, 2]", '{"t": null}', '{"player": "student"}', loss(1, NAN), loss(2, 3.0)[:-4]]
    (found,) = logs(logged(tmp_path, lines))
    assert found.losses["student"]["loss"] == [(0, 1.0)]
    assert (found.unreadable, found.not_finite, found.logged) == (4, 1, 2)


def test_logs_of_all_seeds_and_arms_in_order(tmp_path: Path) -> None:
    for place in ("seed-10", "seed-2", "seed-2/control"):
        (tmp_path / place).mkdir(parents=True)
        (tmp_path / place / "log.jsonl").write_text(loss(0, 1.0))
    assert [(log.seed, log.arm) for log in logs(tmp_path)] == [("2", "control"), ("2", "student"), ("10", "student")]


def test_average_is_over_seeds_and_keeps_the_mean_when_it_thins() -> None:
    assert average([[(0, 1.0), (1, 3.0)], [(0, 3.0), (1, 5.0)]]) == [(0, 2.0), (1, 4.0)]
    long = average([[(t, float(t)) for t in range(12_000)]], bins=100)
    assert len(long) == 100
    assert np.mean([v for _, v in long]) == pytest.approx(5999.5)


# --- reading a run ----------------------------------------------------------------------------------------------------
def test_the_gain_is_computed_from_the_seeds(tmp_path: Path) -> None:
    run = runs.read(fake(tmp_path, "teach"))
    assert run.gain
    assert run.gain.differences == pytest.approx((0.0114, 0.0138, 0.0106))
    assert not run.notes


def test_a_stated_gain_that_disagrees_with_its_seeds_is_told(tmp_path: Path) -> None:
    wrong_sign = {"mean": -84.7, "low": -90, "high": -80, "n": 3, "against": "teacher_one_step"}
    run = runs.read(fake(tmp_path, "shorten", gain=wrong_sign))
    assert run.gain
    assert run.gain.mean > 80
    assert run.state == "helped"
    assert "84.7 higher" in said(run.notes[0])


def test_a_stated_gain_is_used_when_seeds_are_absent(tmp_path: Path) -> None:
    stated = {"mean": 0.012, "low": 0.004, "high": 0.02, "n": 3, "against": "control"}
    run = runs.read(fake(tmp_path, "teach", gain=stated, arms={}))
    assert run.gain == Gain(0.012, 0.004, 0.02, 3)
    assert run.state == "helped"


def test_direction_is_taken_from_the_name_when_it_is_not_said(tmp_path: Path) -> None:
    assert not runs.read(fake(tmp_path, "shorten", higher_is_better=None)).higher_is_better
    assert runs.read(fake(tmp_path, "teach", higher_is_better=None)).higher_is_better


def test_pictures_come_only_from_inside_the_folder_and_only_as_pictures(tmp_path: Path) -> None:
    (tmp_path / "secret.png").write_bytes(b"\x89PNG\r\n\x1a\n secret")
    folder = fake(
        tmp_path / "runs",
        "teach",
        pictures=[
            {"title": "up", "file": "../../secret.png"},
            {"title": "absolute", "file": str(tmp_path / "secret.png")},
            {"title": "link", "file": "link.png"},
            {"title": "no picture", "file": "recipe.yaml"},
            {"title": "missing", "file": "pictures/none.png"},
            {"title": "no file"},
        ],
    )
    (folder / "link.png").symlink_to(tmp_path / "secret.png")
    run = runs.read(folder)
    assert [p.data for p in run.pictures] == [None] * 6
    assert len(run.notes) == 6
    text, _ = rendered([folder], tmp_path / "report.html")
    assert base64.b64encode(b"secret").decode()[:6] not in text


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ('{"name": "x", "arms": {', "line 1, column"),
        ("", "line 1, column 1"),
        ("[1, 2]", "expected an object"),
        ("[" * 100_000, "not readable as JSON"),
        (b"\xff\xfe\x00{", "not readable as JSON"),
    ],
)
def test_a_torn_result_is_one_sentence(tmp_path: Path, content: str | bytes, says: str) -> None:
    (tmp_path / "result.json").write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(BadInput, match=re.escape(says)) as caught:
        write_html([tmp_path], tmp_path / "report.html")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "report.html").exists()


def test_a_missing_result_says_what_is_there_instead(tmp_path: Path) -> None:
    fake(tmp_path / "runs", "teach")
    with pytest.raises(BadInput, match="it holds the run folders teach-fashion-20261125-214203"):
        runs.read(tmp_path / "runs")
    with pytest.raises(BadInput, match="no such folder"):
        runs.read(tmp_path / "absent")
    (tmp_path / "unfinished").mkdir()
    with pytest.raises(BadInput, match="the run has not ended"):
        runs.read(tmp_path / "unfinished")
    with pytest.raises(BadInput, match="at least one run folder"):
        write_html([], tmp_path / "report.html")


def test_only_numbers_are_numbers() -> None:
    assert [runs.number(thing) for thing in (1, 2.5, True, "3", None, [1])] == [1.0, 2.5, None, None, None, None]
    assert runs.number(-(10**400)) == -math.inf


def test_nil_stands_for_not_measured(tmp_path: Path) -> None:
    arms = {key: a | {"parameters": 0, "bytes": 0, "latency_ms": 0.0} for key, a in RESULTS["teach"]["arms"].items()}
    folder = fake(tmp_path, "teach", arms=arms)
    _, reader = rendered([folder], tmp_path / "report.html")
    assert "faster" not in reader.text
    assert "0 ms" not in said(reader.text)
    assert "| – | – |" in markdown([folder])


def test_the_result_file_itself_may_be_given(tmp_path: Path) -> None:
    folder = fake(tmp_path, "teach")
    assert runs.read(folder / "result.json").folder == folder


# --- nothing that is missing or of a wrong type breaks the page -------------------------------------------------------
JUNK: list[Any] = [None, [], {}, "", "text", -1, 3.5, NAN, True, [None], [[]], {"x": None}, ["a", {"b": [1]}], 10**400]


def places(thing: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Every place in a nested result."""
    found = [path] if path else []
    items = thing.items() if isinstance(thing, dict) else enumerate(thing) if isinstance(thing, list) else ()
    for key, inner in items:
        found += places(inner, (*path, key))
    return found


def changed(result: Any, path: tuple[Any, ...], junk: Any) -> Any:
    """The result with one place removed (junk is Ellipsis) or replaced."""
    made = copy.deepcopy(result)
    inner = made
    for key in path[:-1]:
        inner = inner[key]
    if junk is ...:
        del inner[path[-1]]
    else:
        inner[path[-1]] = junk
    return made


def test_every_field_may_be_missing_or_wrong(tmp_path: Path) -> None:
    folder = fake(
        tmp_path,
        "shorten",
        tables=[{"title": "Steps", "columns": ["steps", "distance"], "rows": [[1, 12.5], ["two", None, 3]]}],
    )
    whole = json.loads((folder / "result.json").read_text())
    # The logs are the same for all; without them the many pages are quick.
    for path in folder.glob("seed-*/**/log.jsonl"):
        path.unlink()
    dice = random.Random(0)
    tried = 0
    whole["versions"] = {"torch": "2.13.0"}
    for path in places(whole):
        for junk in [..., dice.choice(JUNK)] if len(path) > 1 else [..., *JUNK]:
            (folder / "result.json").write_text(json.dumps(changed(whole, path, junk)))
            Reader(page.render(runs.read_all([folder])))
            markdown([folder])
            tried += 1
    assert tried > 300


def test_an_empty_result_is_still_a_page(tmp_path: Path) -> None:
    (tmp_path / "result.json").write_text("{}")
    _, reader = rendered([tmp_path], tmp_path / "report.html")
    assert "compares nothing" in reader.text
    assert as_text(terminal([tmp_path]))


# --- the page ---------------------------------------------------------------------------------------------------------
def test_one_run_shows_verdict_arms_plots_recipe_and_sources(tmp_path: Path) -> None:
    text, reader = rendered([fake(tmp_path, "teach")], tmp_path / "report.html")
    seen = said(reader.text)
    assert (
        "Distillation helped: accuracy is 1.2 points above the control (95 % interval +0.8 to +1.6, 3 seeds)." in seen
    )
    for expected in (
        "+1.2 points",
        "22× smaller",
        "4.4× faster",
        "73 s",
        "88.2",
        "87.0",
        "91.2",
        "12,345",
        "49.4 kB",
        "p95 1.5 ms",
        "resnet8, taught by resnet20 (ce + dkd)",
        "Loss of student",
        "Validation accuracy",
        "beta: 8",
        "torch 2.13.0",
        "3f9c1ab",
        "9d41e0c7",
        "25 November 2026, 21:42",
        "@misc{zhao2022,",
        "Zhao and others",
        "2203.08679",
    ):
        assert expected in seen, expected
    assert len(reader.named("article")) == 1
    assert "summary" not in re.findall(r'<section class="(\w+)"', text)
    # A dot for each seed of each of the three arms, and three lines that pair student and control.
    seeds = re.search(r"<svg class=\"plot\"[^>]*of each seed.*?</svg>", text, re.DOTALL)
    assert seeds
    assert seeds.group().count("<circle") == 9
    assert seeds.group().count('class="pair"') == 3


def test_the_page_asks_nothing_of_any_network_and_runs_no_script(tmp_path: Path) -> None:
    text, reader = rendered(demo(tmp_path), tmp_path / "report.html", "The demo")
    assert not reader.named("script")
    for tag, attributes in reader.tags:
        assert not any(name.startswith("on") for name in attributes), tag
        for name in ("src", "srcset", "poster", "data", "action", "background"):
            assert (attributes.get(name) or "data:").startswith("data:"), (tag, attributes)
        if tag == "link":
            assert attributes["href"] == "data:,"
        if "href" in attributes and tag == "a":
            assert re.match(r"#run-\d+$|https://arxiv\.org/abs/", attributes["href"] or "")
    assert "@import" not in text
    assert not re.findall(r"url\((?!data:)", text)
    policy = next(m for m in reader.named("meta") if m.get("http-equiv") == "Content-Security-Policy")["content"]
    assert policy == "default-src 'none'; style-src 'unsafe-inline'; img-src data:"


def test_several_runs_have_a_summary_and_a_section_each(tmp_path: Path) -> None:
    _, reader = rendered(demo(tmp_path), tmp_path / "report.html", "The demo")
    seen = said(reader.text)
    assert "Distillation helped in 3 of 4 comparisons; 1 cannot be told with these seeds." in seen
    assert len(reader.named("article")) == 4
    assert [a["href"] for a in reader.named("a")][:4] == ["#run-1", "#run-2", "#run-3", "#run-4"]
    assert {a.get("id") for a in reader.named("article")} == {"run-1", "run-2", "run-3", "run-4"}
    for expected in (
        "84.7 lower",
        "79.8 to 89.6 lower",
        "50× fewer images",
        "50× fewer steps",
        "cannot tell",
        "Loss of fake",
    ):
        assert expected in seen, expected
    assert len(reader.named("img")) == 2
    assert seen.count("@misc{") == 4
    assert seen.count("torch 2.13.0") == 1  # the same versions stand once


def test_pictures_are_embedded_whole(tmp_path: Path) -> None:
    folder = fake(tmp_path, "shorten")
    _, reader = rendered([folder], tmp_path / "report.html")
    (image,) = reader.named("img")
    head, _, data = str(image["src"]).partition(",")
    assert head == "data:image/png;base64"
    assert base64.b64decode(data) == (folder / "pictures" / "grid.png").read_bytes()


HOSTILE = (
    "<script>alert(1)</script>\"'><img src=x onerror=alert(1)> {{ 7*7 }} [red]x[/red] | `x` </style></title></pre>"
)


def test_everything_from_a_run_is_inert(tmp_path: Path) -> None:
    folder = fake(
        tmp_path, "teach",
        name=HOSTILE, do=HOSTILE, verdict=HOSTILE, device=HOSTILE, commit=HOSTILE, recipe_hash=HOSTILE, metric=HOSTILE,
        methods=[HOSTILE], versions={HOSTILE: HOSTILE}, seeds=[HOSTILE] * 3,
        arms={key: {"label": HOSTILE, "per_seed": [{HOSTILE: x, "b" + HOSTILE: x} for x in (1.0, 2.5, 3.0)], HOSTILE: 3}
              for key in ("student", "control", HOSTILE)},
        gain={"against": HOSTILE},
        citations=[{"paper": HOSTILE + " 2020", "arxiv": "javascript:alert(1)"}, {"paper": "a", "arxiv": HOSTILE}],
        tables=[{"title": HOSTILE, "columns": [HOSTILE], "rows": [[HOSTILE]]}],
        pictures=[{"title": HOSTILE, "caption": HOSTILE, "file": "p.png"}, {"title": "x", "file": HOSTILE}],
    )  # fmt: skip
    (folder / "p.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    (folder / "recipe.yaml").write_text(HOSTILE)
    line = {"t": 1, "player": HOSTILE, "loss": 1.0, "parts": {HOSTILE: 1.0, "b": 2.0}}
    check = {"t": 1, "validation": {HOSTILE: 0.5}}
    for log in (folder / "seed-0", folder / "seed-0" / "<img src=x onerror=alert(1)>"):
        log.mkdir(exist_ok=True)
        (log / "log.jsonl").write_text(f"{json.dumps(line)}\n{json.dumps(check)}\n{json.dumps(line | {'t': 2})}\n")
    for folders in ([folder], [folder, folder]):
        text, reader = rendered(folders, tmp_path / "report.html", title=HOSTILE)
        assert not reader.named("script")
        assert all("onerror" not in attributes for _, attributes in reader.tags)
        assert all(str(image["src"]).startswith("data:image/") for image in reader.named("img"))
        assert len(reader.named("style")) == 1
        assert not any("javascript" in (a["href"] or "") for a in reader.named("a"))
        assert HOSTILE in reader.text  # shown as it stands
        assert "alert(1)</script>" not in text
    assert "[red]x[/red]" in as_text(terminal([folder]), 400)
    shown = markdown([folder])
    assert "<script" not in shown
    assert len({len(re.findall(r"(?<!\\)\|", row)) for row in shown.splitlines()[:3]}) == 1


def test_the_template_is_not_a_way_in(tmp_path: Path) -> None:
    _, reader = rendered([fake(tmp_path, "teach", name="{{ 7*7 }}{% raw %}")], tmp_path / "report.html")
    assert "{{ 7*7 }}{% raw %}" in reader.text


def test_one_seed_says_that_it_has_no_interval(tmp_path: Path) -> None:
    arms = {key: a | {"per_seed": a["per_seed"][:1]} for key, a in RESULTS["teach"]["arms"].items()}
    folder = fake(tmp_path, "teach", arms=arms, seeds=[0], gain={"mean": 0.0114, "low": None, "high": None, "n": 1})
    _, reader = rendered([folder], tmp_path / "report.html")
    assert "one seed: no interval" in reader.text
    assert "Cannot tell with one seed" in reader.text
    assert "nan" not in reader.text.lower().replace("finance", "")
    assert "one seed: no interval" in said(markdown([folder]))
    assert "one seed: no" in as_text(terminal([folder]))


def test_a_seed_without_the_metric_is_left_out_and_told(tmp_path: Path) -> None:
    arms = copy.deepcopy(RESULTS["teach"]["arms"])
    del arms["control"]["per_seed"][1]["accuracy"]
    arms["student"]["per_seed"][2]["accuracy"] = NAN
    folder = fake(tmp_path, "teach")
    result = json.loads((folder / "result.json").read_text()) | {"arms": arms}
    (folder / "result.json").write_text(json.dumps(result))
    text, reader = rendered([folder], tmp_path / "report.html")
    assert "1 of 3 seeds have both sides of the comparison." in reader.text
    assert text.count('class="pair"') == 1
    assert not re.search(r'="[^"]*\bnan\b[^"]*"', text)


def test_a_diverged_seed_is_told(tmp_path: Path) -> None:
    folder = fake(tmp_path, "teach")
    with (folder / "seed-1" / "log.jsonl").open("a") as file:
        file.writelines(json.dumps({"t": 600 + t, "player": "student", "loss": NAN}) + "\n" for t in range(5))
    _, reader = rendered([folder], tmp_path / "report.html")
    assert re.search(r"Seed 1, student: 5 of \d+ logged losses are not finite", reader.text)


def test_writing_is_whole_or_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = fake(tmp_path, "teach")
    out = tmp_path / "new" / "report.html"
    assert write_html([folder], out) == out
    assert write_html([folder], tmp_path / "new") == out
    before = out.read_bytes()

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(LimbeckError, match="No space left on device"):
        write_html([folder], out, title="another")
    assert out.read_bytes() == before
    assert [p.name for p in out.parent.iterdir()] == ["report.html"]


def test_the_page_is_the_same_twice(tmp_path: Path) -> None:
    folders = demo(tmp_path)
    assert (
        write_html(folders, tmp_path / "a.html").read_bytes() == write_html(folders, tmp_path / "b.html").read_bytes()
    )


def test_a_long_log_stays_a_small_page(tmp_path: Path) -> None:
    folder = fake(tmp_path, "teach")
    lines = [json.dumps({"t": t, "player": "student", "loss": 1.0, "parts": {"a": t, "b": 1}}) for t in range(30_000)]
    (folder / "seed-0" / "log.jsonl").write_text("\n".join(lines))
    assert write_html([folder], tmp_path / "report.html").stat().st_size < 100_000


def test_the_report_does_not_import_torch() -> None:
    program = (
        "import sys, limbeck.report.page, limbeck.report.tables, limbeck.report.grid; sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


# --- terminal and Markdown --------------------------------------------------------------------------------------------
def test_the_terminal_table_fits_80_letters_and_says_it_all(tmp_path: Path) -> None:
    shown = as_text(terminal(demo(tmp_path)))
    assert all(len(line) <= 80 for line in shown.splitlines())
    for expected in (
        "gain",
        "95 % interval",
        "parameters",
        "latency",
        "seconds",
        "+1.2 points",
        "+0.8 to +1.6",
        "12,345",
        "22× smaller",
        "1.21 ms",
        "4.4× faster",
        "73.2",
        "84.7 lower",
        "helped",
        "cannot tell",
    ):
        assert expected in shown, expected


def test_markdown(tmp_path: Path) -> None:
    shown = said(markdown(demo(tmp_path)))
    first = (
        "| teach-fashion | +1.2 points, accuracy (helped) | +0.8 to +1.6 | 12,345, 22× smaller | 1.21 ms, 4.4× faster |"
    )
    assert first in shown
    assert "- **shorten-digits**: Distilling the sampler helped" in shown


def test_costs_are_against_the_teacher(tmp_path: Path) -> None:
    run = runs.read(fake(tmp_path, "shape"))
    assert said(costs.saved(run)) == "139,000 (2× smaller)"
    assert costs.size(runs.read(fake(tmp_path, "condense")))[1] == "50× fewer images"


# --- citations --------------------------------------------------------------------------------------------------------
def test_bibtex_keys_are_distinct_and_fields_are_clean() -> None:
    papers = [
        Citation("Zhao et al. 2022, eq. 7", "2203.08679"),
        Citation("Zhao and Li (2022)", ""),
        Citation("no year", "x{y}"),
    ]
    text = cite.bibtex(papers)
    assert re.findall(r"@misc\{(\w+),", text) == ["zhao2022", "zhao2022a", "no"]
    assert "author        = {Zhao and others}" in text
    assert "note          = {eq. 7}" in text
    assert text.count("{") == text.count("}")


def test_a_paper_is_cited_once_and_linked_only_by_a_real_identifier() -> None:
    papers = cite.unique([Citation("A 2020", "2001.00001"), Citation("A 2020, eq. 2", "2001.00001"), Citation("", "")])
    assert len(papers) == 1
    assert cite.link(papers[0]) == "https://arxiv.org/abs/2001.00001"
    assert cite.link(Citation("x", "2001.00001/../../evil")) == ""
    assert cite.link(Citation("x", "cs.LG/0501001")) == "https://arxiv.org/abs/cs.LG/0501001"


# --- picture grids ----------------------------------------------------------------------------------------------------
def pixels(path: Path) -> np.ndarray[Any, Any]:
    from matplotlib.image import imread

    return np.asarray(imread(path))[..., :3]


def test_grid_draws_every_pixel_of_every_panel(tmp_path: Path) -> None:
    images = np.linspace(0, 1, 6 * 4 * 4).reshape(6, 1, 4, 4)
    drawn = pixels(
        grid({"left": images, "right": images[::-1]}, tmp_path / "g.png", columns=3, scale=8, low=0.0, high=1.0)
    )
    # The layout by hand: margin 12, title 34, images 32 wide with a gap of 2, 28 between the panels.
    assert drawn.shape == (2 * 12 + 34 + 2 * 34 - 2, 2 * 12 + 2 * (3 * 34 - 2) + 28, 3)
    for panel, those in enumerate((images, images[::-1])):
        for i, image in enumerate(those):
            x, y = 12 + panel * (100 + 28) + (i % 3) * 34, 12 + 34 + (i // 3) * 34
            block = drawn[y : y + 32, x : x + 32, 0].reshape(4, 8, 4, 8)
            np.testing.assert_allclose(block.mean((1, 3)), image[0], atol=0.0021)  # half of one of 256 levels
            assert block.std((1, 3)).max() < 1e-6


def test_grid_takes_tensors_colours_and_labels(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    images = torch.zeros(4, 3, 5, 5, dtype=torch.bfloat16, requires_grad=True)
    with torch.no_grad():
        images[:, 0] = 1
    drawn = pixels(grid({"": images}, tmp_path / "g.png", columns=2, labels=["shirt", "$\\frac$"], scale=4))
    assert (drawn == np.array([1.0, 0.0, 0.0])).all(-1).sum() == 4 * 20 * 20
    tall = pixels(grid({"": images}, tmp_path / "h.png", columns=2, labels=["a", "b", "c", "d"], scale=4))
    assert tall.shape[0] > drawn.shape[0]


def test_grid_draws_panels_on_the_scale_of_the_first_and_marks_what_is_broken(tmp_path: Path) -> None:
    dark, light = np.zeros((1, 1, 2, 2)), np.full((1, 1, 2, 2), 4.0)
    light[0, 0, 0, 0] = NAN
    dark[0, 0, 1, 1] = 2.0
    drawn = pixels(grid({"a": dark, "b": light}, tmp_path / "g.png", scale=10))
    assert (drawn[46:56, 12:32] == 0).all()
    assert (drawn[56:66, 22:32] == 1).all()
    assert (drawn[46:56, 70:80] == 1).all()
    np.testing.assert_allclose(drawn[50, 62], (0.85, 0.2, 0.2), atol=0.003)


@pytest.mark.parametrize(
    ("panels", "knobs", "says"),
    [
        ({}, {}, "at least one panel"),
        (
            {"x": np.zeros((2, 2, 4, 4))},
            {},
            r"panel 'x': expected images \[N, C, H, W\] with C 1 or 3, found shape \[2, 2, 4, 4\]",
        ),
        ({"x": np.zeros((0, 1, 4, 4))}, {}, "found shape"),
        ({"x": np.zeros((4, 1, 4, 4))}, {"columns": 0}, "columns must be >= 1"),
        (
            {"x": np.zeros((4, 1, 4, 4))},
            {"columns": 2, "labels": ["a"] * 3},
            r"each image \(4\) or each row \(2\), found 3 labels",
        ),
    ],
)
def test_grid_refuses_in_one_sentence(tmp_path: Path, panels: Any, knobs: Any, says: str) -> None:
    with pytest.raises(BadInput, match=says):
        grid(panels, tmp_path / "g.png", **knobs)
    assert not list(tmp_path.iterdir())


def test_grid_leaves_the_global_state_of_matplotlib_alone(tmp_path: Path) -> None:
    program = (
        "import sys, numpy as np, pathlib; from limbeck.report.grid import grid;"
        f"grid({{'x': np.zeros((1, 1, 2, 2))}}, pathlib.Path({str(tmp_path / 'g.png')!r}));"
        "sys.exit('matplotlib.pyplot' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
