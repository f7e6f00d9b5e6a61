"""What selections, filters and measures must do exactly, besides the reference numbers in their vectors."""

import json
import math
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from limbeck.core.errors import BadInput
from limbeck.core.find import get

VECTORS = Path(__file__).parent / "vectors"


def rand(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# ---- herding -------------------------------------------------------------------------------------------------------
def gap(points, chosen):
    return (points[chosen].mean(0) - points.mean(0)).norm().item()


def test_herding_starts_at_the_mean_and_goes_on_as_welling_says():
    points = rand(30, 4)
    chosen = get("herding")(points, budget=12).tolist()
    assert chosen[0] == (points - points.mean(0)).norm(dim=1).argmin()
    for t, pick in enumerate(chosen):
        before = points[chosen[:t]].sum(0)
        wish = (t + 1) * points.mean(0) - before
        distance = (wish - points).norm(dim=1)
        distance[chosen[:t]] = math.inf
        assert pick == distance.argmin()


def test_herding_lists_are_nested_with_classes_and_without():
    points, labels = rand(30, 4, seed=1), torch.arange(30) % 3
    for extra in ((), (labels,)):
        longest = get("herding")(points, *extra, budget=30).tolist()
        assert sorted(longest) == list(range(30))
        for k in (1, 4, 11):
            assert get("herding")(points, *extra, budget=k).tolist() == longest[:k]


def test_herding_follows_the_mean_better_than_chance():
    points = rand(200, 5, seed=2)
    torch.manual_seed(0)
    chance = sorted(gap(points, get("random_subset")(points, budget=10)) for _ in range(21))
    assert gap(points, get("herding")(points, budget=10)) < chance[0]


def test_herding_takes_classes_in_turn_each_towards_its_own_mean():
    points, labels = rand(20, 3, seed=3), torch.tensor([0] * 14 + [1] * 4 + [2] * 2)
    chosen = get("herding")(points, labels, budget=12)
    assert labels[chosen].tolist() == [0, 1, 2, 0, 1, 2, 0, 1, 0, 1, 0, 0]
    assert chosen[labels[chosen] == 1].tolist() == (14 + get("herding")(points[14:18], budget=4)).tolist()


def test_herding_can_look_at_directions_only():
    points = rand(20, 3, seed=4)
    stretched = points * torch.linspace(0.1, 10, 20, dtype=torch.float64)[:, None]
    same = [get("herding")(x, budget=6, normalize=True).tolist() for x in (points, stretched)]
    assert same[0] == same[1] != get("herding")(stretched, budget=6).tolist()


# ---- random subset -------------------------------------------------------------------------------------------------
def test_random_subset_draws_every_set_alike():
    torch.manual_seed(0)
    seen = torch.zeros(6)
    for _ in range(600):
        seen[get("random_subset")(rand(6, 1), budget=2)] += 1
    assert (seen / 600 - 2 / 6).abs().max() < 0.06


@pytest.mark.parametrize(
    ("sizes", "budget", "quota"),
    [
        ((40, 40, 20), 10, [4, 4, 2]),
        ((10, 10, 10), 10, [4, 3, 3]),
        ((97, 2, 1), 3, [3, 0, 0]),
        ((5, 3, 2), 5, [3, 1, 1]),
    ],
)
def test_random_subset_keeps_the_share_of_every_class(sizes, budget, quota):
    labels = torch.repeat_interleave(torch.arange(3), torch.tensor(sizes))[torch.randperm(sum(sizes))]
    torch.manual_seed(1)
    chosen = get("random_subset")(labels[:, None], labels, budget=budget)
    assert chosen.unique().numel() == budget and labels[chosen].bincount(minlength=3).tolist() == quota
    torch.manual_seed(1)
    assert torch.equal(chosen, get("random_subset")(labels[:, None], labels, budget=budget))
    others = {tuple(get("random_subset")(labels[:, None], labels, budget=budget).tolist()) for _ in range(20)}
    assert len(others) > 1 or budget == 3


# ---- quality filter ------------------------------------------------------------------------------------------------
VECTOR = json.loads((VECTORS / "quality_filter.json").read_text())
ROWS = VECTOR["inputs"]["rows"]


def filtered(rows, **knobs):
    kept, stream = [], get("quality_filter")(rows, **{**VECTOR["knobs"], **knobs})
    while True:
        try:
            kept.append(next(stream))
        except StopIteration as end:
            return kept, end.value


def test_quality_filter_counts_what_it_drops_by_the_first_rule_broken():
    kept, dropped = filtered(ROWS)
    assert len(kept) + sum(dropped.values()) == len(ROWS)
    rules = [next(iter(filtered([row])[1]), "") for row in ROWS]
    assert rules == [
        "", "too few words", "words too short", "words too long", "hash signs", "ellipses", "bullets", "cut lines",
        "no letters", "no stop words", "", "too few words", "too many words",
    ]  # fmt: skip


STRICTER = {
    "min_words": (0, 5, 10, 20),
    "max_words": (1000, 40, 20, 8),
    "min_word_length": (0, 3, 4, 9),
    "max_word_length": (100, 10, 4, 3),
    "max_symbols": (9, 0.1, 0),
    "max_bullets": (1, 0.5, 0),
    "max_ellipses": (1, 0.3, 0),
    "min_alphabetic": (0, 0.8, 1),
    "min_stop_words": (0, 2, 5, 8),
}


@pytest.mark.parametrize("knob", STRICTER)
def test_a_stricter_rule_never_keeps_more(knob):
    loose = {"min_words": 0, "max_words": 1000} | {k: v[0] for k, v in STRICTER.items() if k != "min_words"}
    kept = [{row["id"] for row in filtered(ROWS, **{**loose, knob: value})[0]} for value in STRICTER[knob]]
    assert all(b <= a for a, b in pairwise(kept)) and len(kept[-1]) < len(kept[0])


def test_quality_filter_twice_keeps_the_same_rows():
    once, _ = filtered(ROWS)
    twice, dropped = filtered(once)
    assert [row["id"] for row in twice] == [row["id"] for row in once] and not dropped
    assert twice[0]["provenance"] == ["by hand", "quality_filter", "quality_filter"]
    assert filtered([{**ROWS[0], "provenance": {"url": "x"}}])[0][0]["provenance"] == [{"url": "x"}, "quality_filter"]


@pytest.mark.parametrize(
    ("rows", "knobs", "message"),
    [
        ([{"txt": "a"}], {}, "no text under 'text'; did you mean `txt`"),
        ([{"text": None}], {}, "no text under 'text'"),
        (ROWS, {"min_words": 41}, r"`min_words` must be in 0\.\.40"),
        (ROWS, {"max_bullets": 1.5}, "`max_bullets` must be"),
        (ROWS, {"min_stop_words": 9}, r"`min_stop_words` must be in 0\.\.8"),
    ],
)
def test_quality_filter_says_what_is_wrong(rows, knobs, message):
    with pytest.raises(ValueError, match=message):
        filtered(rows, **knobs)
    assert issubclass(BadInput, ValueError)


# ---- measures ------------------------------------------------------------------------------------------------------
def test_agreement_is_symmetric_and_divergence_is_not():
    a, b = rand(50, 4, seed=5), rand(50, 4, seed=6)
    here, there = get("agreement")(a, b), get("agreement")(b, a)
    assert here["agreement"] == there["agreement"] and abs(here["kl"] - there["kl"]) > 1e-3
    assert get("agreement")(a + 5, a) == {"agreement": 1.0, "kl": pytest.approx(0, abs=1e-12)}


def test_accuracy_counts_nan_as_a_miss():
    logits, labels = torch.tensor([[0.0, math.nan], [0.0, 1.0], [2.0, 1.0]]), torch.tensor([1, 1, 1])
    assert get("accuracy")(logits, labels) == pytest.approx(1 / 3)
    assert get("accuracy")(logits, labels, top=2) == pytest.approx(2 / 3)
    with pytest.raises(ValueError, match=r"`top` must be in 1\.\.2"):
        get("accuracy")(logits, labels, top=3)
    with pytest.raises(ValueError, match="at least one example"):
        get("accuracy")(logits[:0], labels[:0])


def test_calibration_of_who_knows_and_of_who_says_the_base_rate():
    labels = torch.arange(100) % 2
    sure = 50.0 * torch.nn.functional.one_hot(labels, 2).double()
    assert get("calibration")(sure, labels) == {k: pytest.approx(0, abs=1e-12) for k in ("ece", "nll", "brier")}
    wrong = get("calibration")(-sure, labels)
    assert wrong == {"ece": pytest.approx(1), "nll": pytest.approx(50), "brier": pytest.approx(2)}
    base = get("calibration")(torch.zeros(100, 2), labels)
    assert base == {"ece": pytest.approx(0), "nll": pytest.approx(math.log(2)), "brier": pytest.approx(0.5)}


def test_calibration_bins_are_closed_above():
    p = torch.tensor([[0.5, 0.5], [0.6, 0.4]], dtype=torch.float64)
    one = get("calibration")(p.log(), torch.tensor([1, 0]), bins=2)  # .5 falls into (0, .5], .6 into (.5, 1]
    assert one["ece"] == pytest.approx((0.5 + 0.4) / 2)
    assert get("calibration")(p.log(), torch.tensor([1, 0]), bins=1)["ece"] == pytest.approx(abs(0.5 - 0.55))


def test_corruption_of_a_perfect_student_and_of_one_that_breaks():
    labels = torch.arange(8) % 4
    right = 9 * torch.nn.functional.one_hot(labels, 4).double()
    assert get("corruption")(torch.stack([right] * 3), labels) == {
        "accuracy_0": 1.0, "accuracy_1": 1.0, "accuracy_2": 1.0, "area": 1.0, "corruption_error": 0.0,
        "relative_corruption_error": 0.0,
    }  # fmt: skip
    broken = get("corruption")(torch.stack([right, -right]), labels)
    assert (broken["area"], broken["corruption_error"], broken["relative_corruption_error"]) == (0.5, 1.0, 1.0)
    with pytest.raises(ValueError, match="S >= 2"):
        get("corruption")(right, labels)


def test_frechet_of_shifted_and_scaled_sets_is_known_in_closed_form():
    x = rand(60, 3, seed=7)
    assert get("frechet")(x, x) == pytest.approx(0, abs=1e-9)
    shift = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    assert get("frechet")(x + shift, x) == pytest.approx(shift.square().sum().item())
    centred = x - x.mean(0)
    spread = torch.cov(x.T).trace().item()
    assert get("frechet")(3 * centred, centred) == pytest.approx((3 - 1) ** 2 * spread)
    with pytest.raises(ValueError, match="`student_samples` must be finite"):
        get("frechet")(x * math.nan, x)
    with pytest.raises(ValueError, match="as wide as real_samples, 2"):
        get("frechet")(x, x[:, :2])
