"""Few labels among many examples, some of them of classes that are not asked about."""

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from limbeck.adapters.files import load
from limbeck.adapters.tasks import UNLABELLED
from limbeck.core.batches import Batches
from limbeck.core.errors import BadInput
from limbeck.core.match import parse
from tests import tiny

SPEC: dict[str, Any] = {"name": "digits", "labelled": 7, "known": [8, "1", 3]}


def test_so_many_of_each_known_class_are_labelled_and_none_is_lost() -> None:
    plain, splits = load("digits"), load(SPEC)
    labels = splits.train["labels"]
    assert len(labels) == len(plain.train) and splits.train.classes == ["8", "1", "3"]
    known = labels >= 0
    assert labels[known].bincount().tolist() == [7, 7, 7] and set(labels[~known].tolist()) == {UNLABELLED}
    truth = plain.train["labels"]
    assert torch.equal(truth[known], torch.tensor([8, 1, 3])[labels[known]])
    assert set(truth[~known].tolist()) == set(range(10))  # the known classes are among the unlabelled too
    assert torch.equal(splits.train["inputs"], plain.train["inputs"])


def test_others_are_left_out_of_validation_and_test() -> None:
    plain, splits = load("digits"), load(SPEC)
    for before, after in ((plain.validation, splits.validation), (plain.test, splits.test)):
        kept = torch.isin(before["labels"], torch.tensor([8, 1, 3]))
        assert torch.equal(torch.tensor([8, 1, 3])[after["labels"]], before["labels"][kept])
        assert torch.equal(after["inputs"], before["inputs"][kept])


def test_which_are_labelled_depends_on_the_seed_alone() -> None:
    assert torch.equal(load(SPEC).train["labels"], load(SPEC).train["labels"])
    few, more = (load({"name": "digits", "labelled": n}).train["labels"] for n in (3, 5))
    assert (few >= 0).sum() == 30 and torch.equal(few[few >= 0], more[few >= 0])
    other = load({"name": "digits", "labelled": 3, "seed": 1}).train
    assert not torch.equal(other["labels"], few)


def test_label_noise_makes_so_many_training_labels_wrong_and_no_others() -> None:
    plain, noisy = load("digits"), load({"name": "digits", "label_noise": 0.4})
    wrong = plain.train["labels"] != noisy.train["labels"]
    assert int(wrong.sum()) == round(0.4 * len(wrong))
    away = (noisy.train["labels"] - plain.train["labels"])[wrong] % 10
    assert away.bincount(minlength=10)[1:].min() > 0.5 * len(away) / 9  # each of the other classes
    assert torch.equal(plain.validation["labels"], noisy.validation["labels"])
    assert torch.equal(plain.test["labels"], noisy.test["labels"])
    few, spoiled = load(SPEC).train["labels"], load({**SPEC, "label_noise": 1}).train["labels"]
    assert torch.equal(few < 0, spoiled < 0) and not (few == spoiled)[few >= 0].any()


def test_labels_alone_are_batches_a_class() -> None:
    batches = Batches(load(SPEC).train, per_class=2)
    seen = torch.cat([next(batches)["labels"] for _ in range(9)])
    assert seen.bincount().tolist() == [18, 18, 18]


def test_a_batch_holds_as_many_labelled_examples_as_asked_for_in_any_world_and_after_a_resume():
    data = load(SPEC).train  # a few of three classes have labels
    known = int((data["labels"] >= 0).sum())
    options = {"labelled": 4, "seed": 3, "augment": ["flip"]}
    batches = Batches(data, 16, **options)
    seen = [next(batches) for _ in range(2 * known // 4)]
    assert all((b["labels"][:4] >= 0).all() and (b["labels"][4:] < 0).all() and len(b["labels"]) == 16 for b in seen)
    rows = torch.cat([b["index"][:4] for b in seen])
    assert rows.bincount().max() == 2 and len(rows.unique()) >= known - 3  # whole passes over them
    assert len(torch.cat([b["index"][4:] for b in seen]).unique()) > 12
    resumed = Batches(data, 16, **options)
    resumed.load_state_dict({"position": 2})
    assert torch.equal(next(resumed)["inputs"], seen[2]["inputs"])
    ranks = [next(Batches(data, 16, rank=rank, world=2, **options)) for rank in range(2)]
    assert all((b["labels"] >= 0).tolist() == [True] * 2 + [False] * 6 for b in ranks)
    assert {int(i) for b in ranks for i in b["index"]} == {int(i) for i in seen[0]["index"]}


@pytest.mark.parametrize(
    "options, said",
    [
        ({"labelled": 16}, "makes batches of 16 with 0 unlabelled examples"),
        ({"labelled": 22}, "makes batches of 16 with 22 labelled examples"),
        ({"labelled": 4, "per_class": 2}, "both say what a batch is made of"),
        ({"labelled": 3, "world": 2}, "2 processes cannot share batches of 3"),
    ],
)
def test_batches_that_cannot_be_made_of_labelled_examples(options, said):
    size = None if "per_class" in options else 16
    with pytest.raises(BadInput, match=said):
        Batches(load(SPEC).train, size, **options)


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"known": [1, "ten"]}, "class 'ten', which digits lacks"),
        ({"known": [1, 10]}, "class 10, which digits lacks"),
        ({"known": [1]}, "at least two classes"),
        ({"known": [1, "1"]}, "none twice"),
        ({"label_noise": 1.5}, "label_noise"),
        ({"labelled": 1000}, "labelled 1000 is more than class 0 of digits has"),
        ({"name": "shakespeare_small", "limit": 9, "known": []}, "`labelled` needs one class label an example"),
    ],
)
def test_what_cannot_be(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(BadInput, match=said):
        load({**SPEC, **changes})


RECIPE = {
    "name": "few",
    "do": "teach",
    "teacher": {"net": "resnet8", "width": 2, "weights": "random"},
    "student": {"net": "resnet8", "width": 2},
    "data": {**SPEC, "test_limit": 40},
    "match": ["wad"],
    "control": {"train": {"per_class": 4}},
    "train": {"steps": 3, "batch_size": 16},
}


def test_a_student_learns_from_labelled_and_unlabelled(tmp_path: Path) -> None:
    path = tmp_path / "few.yaml"
    path.write_text(yaml.safe_dump(RECIPE))
    called = tiny.limbeck("run", path, "--out", tmp_path / "run")
    assert called.code == 0, called.err


@pytest.mark.parametrize(
    "name", ["churn_distill", "dkd", "nkd", "sd_gt_guidance", "tfkd", "wsld", "atkd", "self_evolution_kd"]
)
def test_who_has_no_label_costs_nothing_and_changes_nobody(name: str) -> None:
    match, draw = parse(name), torch.Generator().manual_seed(0)
    labels = torch.tensor([1, -100, 3, 2, -100, 0])
    z, t = (torch.randn(6, 9, generator=draw, dtype=torch.float64) for _ in range(2))
    z.requires_grad_()
    known = labels >= 0

    def value(rows: torch.Tensor) -> torch.Tensor:
        have = {"student_logits": z[rows], "teacher_logits": t[rows], "labels": labels[rows]}
        found: torch.Tensor = match.loss(*[have[n] for n in match.needs])
        return found

    everyone, alone = value(torch.ones_like(known)), value(known)
    assert torch.equal(everyone[known], alone) and not everyone[~known].any()
    (mine,), (its,) = (torch.autograd.grad(v.sum(), z) for v in (everyone, alone))
    torch.testing.assert_close(mine, its)
