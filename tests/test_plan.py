"""The scaling laws, their fitter, the planner and `limbeck plan`: what the laws must obey, and what a user reads."""

import json
import math
from dataclasses import replace
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch

from limbeck.core import find
from limbeck.core.capacity import RATIO, ladder, width_sparsity
from limbeck.core.errors import BadInput
from limbeck.core.laws import CHINCHILLA, Distilled, Laws, Range, Runs, Supervised, fit, stacked
from limbeck.plan import Question, answer, lines, number, read_runs, tokens_for
from tests.tiny import limbeck

SUPERVISED = Supervised(E=1.2, A=3000, B=18000, alpha=0.4, beta=0.43, gamma=0.45)
DISTILLED = Distilled(c0=2.5, c1=400, f1=0.1, d1=1.3, A=2200, B=24000, alpha=0.32, beta=0.63, gamma=0.76)
MADE_UP = Laws(SUPERVISED, DISTILLED, "made up for tests")  # the shape of the published law, with round coefficients
SIZES, LENGTHS, TEACHERS = (1.5e8, 5e8, 2e9), (4e9, 3e10, 2.5e11), (1.8, 2.0, 2.2, 2.5, 2.9)


def runs(noise: float = 5e-4) -> Runs:
    """Runs of the made-up laws with a little noise: 12 alone, 45 taught."""
    draw = np.random.default_rng(1)
    rows = [(n, d, MADE_UP.alone(n, d), math.nan) for n, d in product((1.5e8, 4e8, 1e9, 3e9), LENGTHS)]
    rows += [(n, d, MADE_UP.taught(n, d, t), t) for n, d, t in product(SIZES, LENGTHS, TEACHERS)]
    return stacked([(n, d, loss * math.exp(draw.normal(0, noise)), t) for n, d, loss, t in rows])


@pytest.fixture(scope="module")
def fitted() -> Laws:
    return fit(runs(), resamples=8)


# ---- the laws --------------------------------------------------------------------------------------------------------
def test_the_law_is_the_papers_equation() -> None:
    n, d, t = 3e8, 2e10, 2.1
    alone = 1.2 + (3000 / n**0.4 + 18000 / d**0.43) ** 0.45
    bend = (1 + (t / (alone * 1.3)) ** (1 / 0.1)) ** (-400 * 0.1)
    wanted = t + t**-2.5 * bend * (2200 / n**0.32 + 24000 / d**0.63) ** 0.76
    assert MADE_UP.taught(n, d, t) == pytest.approx(wanted, rel=1e-12)
    assert MADE_UP.alone(n, d) == pytest.approx(alone, rel=1e-12)


def test_the_student_tends_to_its_teacher_and_never_falls_below() -> None:
    for t in TEACHERS:
        far = [float(MADE_UP.taught(10.0**k, 10.0**k, t)) for k in (8, 12, 16, 24, 40)]
        assert far == sorted(far, reverse=True) and min(far) >= t
        assert far[-1] == pytest.approx(t, abs=1e-9)


def test_more_parameters_or_tokens_never_hurt_at_a_fixed_teacher() -> None:
    for n, d, t in product(np.logspace(6, 11, 11), np.logspace(7, 13, 13), (1.3, *TEACHERS)):
        here = MADE_UP.taught(n, d, t)
        assert MADE_UP.taught(2 * n, d, t) <= here and MADE_UP.taught(n, 2 * d, t) <= here


def test_a_teacher_may_be_too_good() -> None:
    losses = np.linspace(1.2, 3.5, 200)
    taught = MADE_UP.taught(1.5e8, 1.6e10, losses)
    low = int(taught.argmin())
    assert 0 < low < 199 and taught[0] > taught[low] + 0.01  # a U, as the capacity gap has it


def test_the_published_supervised_law() -> None:
    assert CHINCHILLA.alone(70e9, 1.4e12) == pytest.approx(1.937, abs=1e-3)  # Chinchilla itself, by its own law
    with pytest.raises(BadInput, match="no distillation law"):
        CHINCHILLA.taught(1e9, 1e10, 2.0)


# ---- the fitter ------------------------------------------------------------------------------------------------------
def test_the_fit_recovers_what_the_law_says(fitted: Laws) -> None:
    n, d, t = np.array([3e8, 1e9, 7e9]), np.array([1e10, 1e11, 5e11]), np.array([2.1, 2.0, 1.9])  # none was run
    assert fitted.alone(n, d) == pytest.approx(MADE_UP.alone(n, d), rel=2e-3)
    assert fitted.taught(n, d, t) == pytest.approx(MADE_UP.taught(n, d, t), rel=2e-3)
    assert fitted.error is not None and fitted.error < 2e-3
    low = fitted.interval(lambda law: float(law.taught(1e9, 1e11, 2.0)))
    assert low is not None and 0 < low[1] - low[0] < 0.01
    assert low[0] - 0.002 < MADE_UP.taught(1e9, 1e11, 2.0) < low[1] + 0.002
    assert fitted.valid == Range((1.5e8, 3e9), (4e9, 2.5e11), (1.8, 2.9))


def test_an_outlier_moves_the_fit_little() -> None:
    clean = runs(noise=1e-4)
    spoilt = stacked(list(zip(clean.parameters, clean.tokens, clean.loss, clean.teacher_loss, strict=True)))
    spoilt.loss[5] *= 1.3  # a run that diverged
    alone = fit(spoilt.at(~spoilt.taught))
    assert float(alone.alone(8e8, 5e10)) == pytest.approx(float(MADE_UP.alone(8e8, 5e10)), rel=5e-3)


def test_a_fit_needs_runs() -> None:
    few = runs().at(np.arange(5))
    with pytest.raises(BadInput, match="at least 8 runs without a teacher, found 5"):
        fit(few)
    with pytest.raises(BadInput, match="at least 12 runs with a teacher, found 3"):
        fit(runs().at(np.arange(15)))


def test_laws_are_written_and_read(tmp_path: Path, fitted: Laws) -> None:
    fitted.save(tmp_path / "laws.json")
    assert Laws.load(tmp_path / "laws.json") == fitted
    (tmp_path / "half.json").write_text(json.dumps({"supervised": {"E": 1.7}}))
    with pytest.raises(BadInput, match="needs E, A, B, alpha, beta, gamma, found E"):
        Laws.load(tmp_path / "half.json")
    (tmp_path / "torn.json").write_text("{")
    with pytest.raises(BadInput, match="cannot read the laws"):
        Laws.load(tmp_path / "torn.json")


# ---- the planner -----------------------------------------------------------------------------------------------------
def test_compute_is_counted_as_the_paper_counts_it() -> None:
    from limbeck.plan import Teacher

    teacher = Teacher(2.0, 1e9, 2e10)
    for bill, students in product(product((False, True), repeat=2), (1, 4)):
        tokens = tokens_for(5e20, 3e8, teacher, bill, students)
        spent = 6 * 3e8 * tokens + 2 * 1e9 * tokens * bill[0] + 6 * 1e9 * 2e10 * bill[1] / students
        assert spent == pytest.approx(5e20)


def test_distil_with_little_compute_and_train_with_much() -> None:
    asked = Question(student=3e8, flops=1e19, teacher_loss=2.3)
    poor = answer(asked, MADE_UP)
    assert poor.decision == "distil" and poor.turn is not None and poor.turn > asked.flops
    rich = answer(replace(asked, flops=poor.turn * 100), MADE_UP)
    assert rich.decision == "train" and rich.turn == pytest.approx(poor.turn, rel=1e-6)
    at = answer(replace(asked, flops=poor.turn), MADE_UP)
    assert at.decision == "close" and at.distilled_loss == pytest.approx(at.trained_loss, rel=1e-6)


def test_never_train_a_teacher_for_one_student() -> None:
    one = Question(student=3e8, flops=3e19)
    assert answer(one, MADE_UP).decision in ("train", "close")
    assert (answer(one, MADE_UP).distilled_loss or 0) > answer(one, MADE_UP).trained_loss
    many = answer(replace(one, students=10_000), MADE_UP)
    assert many.decision == "distil" and many.teacher is not None
    assert many.teacher.loss < (answer(one, MADE_UP).teacher or many.teacher).loss  # shared, it may cost more


def test_the_best_teacher_is_no_worse_than_others() -> None:
    q = Question(student=3e8, flops=1e20, students=50)
    best = answer(q, MADE_UP)
    for size, tokens in product((3e8, 1e9, 3e9), (1e10, 5e10, 2e11)):
        other = answer(replace(q, teacher=size, teacher_tokens=tokens, pay="both"), MADE_UP)
        assert other.distilled_loss is None or best.distilled_loss <= other.distilled_loss + 1e-4


def test_without_the_law_only_its_bound_is_told() -> None:
    bad = answer(Question(student=3e8, flops=3e20, teacher_loss=2.6))
    assert bad.decision == "train" and "below its teacher" in bad.reasons[0]
    good = answer(Question(student=3e8, flops=3e20, teacher_loss=2.0))
    assert good.decision == "unknown" and good.distilled_loss is None and "--fit" in " ".join(good.reasons)


def test_without_the_law_its_authors_findings_and_the_tokens_are_told() -> None:
    there = Question(student=3e8, flops=3e19, teacher=1e9, teacher_tokens=1e11)
    found = answer(there)
    assert found.decision == "unknown" and "up to a compute that grows" in " ".join(found.reasons)
    assert found.distilled_tokens == pytest.approx(3e19 / (6 * 3e8 + 2 * 1e9))
    assert any(line.startswith("distil ") and "? nats" in line for line in lines(found, there))
    own = answer(replace(there, flops=1e21, pay="both"))
    assert own.decision == "train" and "for this student alone" in " ".join(own.reasons)
    assert own.distilled_tokens == pytest.approx((1e21 - 6 * 1e9 * 1e11) / (6 * 3e8 + 2 * 1e9))
    shared = answer(replace(there, flops=1e21, pay="both", students=50))
    assert shared.decision == "unknown" and shared.distilled_tokens > own.distilled_tokens
    dear = answer(replace(there, pay="both"))
    assert dear.decision == "train" and "costs more than the whole budget" in dear.reasons[0]
    assert answer(Question(student=3e8, flops=3e19)).decision == "train"  # any teacher would have to be trained for it


def test_outside_the_range_it_warns(fitted: Laws) -> None:
    inside = answer(Question(student=5e8, flops=6 * 5e8 * 1e10, teacher_loss=2.0), fitted)
    assert inside.warnings == [] and inside.interval is not None
    outside = answer(Question(student=5e9, flops=6 * 5e9 * 1e13, teacher_loss=1.5, unique=1e12), fitted)
    text = " ".join(outside.warnings)
    for part in ("parameters of 5e+09", "tokens of 1e+13", "teacher loss of 1.5", "form was tested", "10.0 passes"):
        assert part in text, part
    assert "teacher hacking" in text


# ---- the capacity gap and teacher hacking ----------------------------------------------------------------------------
def test_the_ladder_finds_the_ratio() -> None:
    rows = [
        (s, t, 3 - math.log10(s) / 10 + 0.02 * math.log(t / (RATIO * s)) ** 2)
        for s in (1e7, 3e7, 1e8)
        for t in s * np.array([1.2, 1.8, 3.0, 5.0, 9.0])
    ]
    found = ladder(rows)
    assert found.ratio == pytest.approx(RATIO, rel=1e-6) and len(found.best) == 3
    with pytest.raises(BadInput, match="widen the ladder"):
        ladder(rows[:2])


def test_width_and_depth_are_cut_so_that_the_whole_is() -> None:
    for sparsity in (0.0, 0.3, 0.57, 0.9):
        assert 1 - (1 - width_sparsity(sparsity)) ** 2 == pytest.approx(sparsity)
    with pytest.raises(BadInput):
        width_sparsity(0.95)


def test_half_ce_and_half_soft_ce_is_ce_when_the_teacher_says_the_label() -> None:
    torch.manual_seed(0)
    student, labels = torch.randn(6, 5, dtype=torch.float64), torch.tensor([0, 1, 2, 3, 4, 0])
    teacher = 1e4 * torch.nn.functional.one_hot(labels, 5).double()
    ce = find.get("ce")(student, labels)
    both = 0.5 * ce + 0.5 * find.get("forward_kl")(student, teacher)  # soft CE less the teacher's entropy, which is 0
    assert torch.allclose(both, ce)


def test_teacher_hacking_is_zero_for_twins_and_its_curves_meet_when_the_oracle_is_the_teacher() -> None:
    hacking = find.get("teacher_hacking")
    draw = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(1, 7, generator=draw, dtype=torch.float64).expand(200_000, 7) for _ in range(2))
    labels = torch.multinomial(teacher[0].softmax(-1), 200_000, replacement=True, generator=draw)
    same = hacking(teacher, teacher, labels)
    assert same["proxy"] == pytest.approx(0, abs=1e-12) and same["golden"] == pytest.approx(0, abs=1e-12)
    both = hacking(student, teacher, labels)
    assert both["golden"] == pytest.approx(both["proxy"], rel=0.02) and both["proxy"] > 0.1


# ---- the command -----------------------------------------------------------------------------------------------------
BASE = ("plan", "--student-params", "300M", "--flops", "3e19")


def written(folder: Path) -> Path:
    path = folder / "laws.json"
    MADE_UP.save(path)
    return path


def test_the_command_says_what_to_do(tmp_path: Path) -> None:
    called = limbeck(*BASE, "--teacher-params", "1B", "--teacher-tokens", "100B", "--laws", written(tmp_path))
    assert called.code == 0 and called.out.startswith("Distil."), called
    for part in ("2.239 nats", "7.89B tokens", "turning point", "law: made up", "capacity-gap law"):
        assert part in called.out, part
    body = json.loads(limbeck(*BASE, "--teacher-loss", "3", "--laws", written(tmp_path), "--json").out)
    assert body["decision"] == "train" and body["teacher"]["loss"] == 3


def test_the_command_fits_runs_of_a_csv(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("limbeck.core.laws.FOLLOWED", 3)  # how well it fits is tested above
    monkeypatch.setattr("limbeck.core.laws.FINISHED", 1)
    found = runs()
    lines = ["student_params,tokens,loss,teacher_loss,teacher_params,teacher_tokens"]
    lines += [
        f"{n},{d},{loss},{'' if math.isnan(t) else t},,"
        for n, d, loss, t in zip(found.parameters, found.tokens, found.loss, found.teacher_loss, strict=True)
    ]
    lines.append(f"150M,4B,2.7,,{4e8:g},30B")  # its teacher is a run of the file
    path = tmp_path / "runs.csv"
    path.write_text("\n".join(lines))
    read = read_runs(path)
    assert len(read) == 58 and read.teacher_loss[-1] == pytest.approx(MADE_UP.alone(4e8, 3e10), rel=2e-3)
    path.write_text("\n".join(lines[:-1]))
    saved = tmp_path / "new.json"
    called = limbeck(*BASE, "--teacher-loss", "2.1", "--fit", path, "--resamples", "3", "--save", saved)
    assert called.code == 0 and "90 % interval" in called.out and "12 runs without a teacher and 45" in called.out, (
        called
    )
    assert "off on the largest runs" in called.out
    again = limbeck(*BASE, "--teacher-loss", "2.1", "--laws", saved)
    assert again.out == called.out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--teacher-params", "1B"), "by its loss, or by both"),
        (("--teacher-loss", "much"), "--teacher-loss must be a number"),
        (("--teacher-loss", "-1"), "teacher loss must be a number > 0, got -1"),
        (("--pay", "al"), "no way to pay 'al'"),
        (("--teacher-loss", "2", "--pay", "both"), "its parameters and its training tokens must be told"),
        (("--teacher-loss", "2", "--pay", "inference"), "its parameters must be told"),
        (("--students", "0"), "students must be at least 1"),
        (("--laws", "no.json"), "cannot read the laws no.json"),
        (("--fit", "no.csv"), "cannot read the runs no.csv"),
        (("--fit", "bad.csv"), "has no column 'loss'"),
        (("--fit", "odd.csv"), "odd.csv:2: loss must be a number"),
        (("--fit", "odd.csv", "--laws", "no.json"), "not both"),
    ],
)
def test_bad_input_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments, said) -> None:
    monkeypatch.chdir(tmp_path)
    Path("bad.csv").write_text("student_params,tokens\n1,2\n")
    Path("odd.csv").write_text("student_params,tokens,loss\n1M,2B,x\n")
    called = limbeck(*BASE, *arguments)
    assert called.code == 2 and said in called.said, called


def test_numbers_as_people_write_them() -> None:
    assert [number(x, "x") for x in ("1.5B", "300m", "2T", "1e9", "1_000", "12,000", "7")] == [
        1.5e9,
        3e8,
        2e12,
        1e9,
        1000,
        12000,
        7,
    ]
