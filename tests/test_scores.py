"""Scores in the place of classes: spoiled pairs of texts, losses and a measure of them, students for some languages."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from limbeck.adapters import tasks
from limbeck.adapters.files import load
from limbeck.core.batches import Splits, Table
from limbeck.core.errors import BadInput
from limbeck.losses.logits.bleurt_distill import bleurt_distill
from limbeck.losses.logits.squared_error import squared_error
from limbeck.measure.agree.score_correlation import score_correlation
from limbeck.recipe import Recipe
from limbeck.verbs import teach
from limbeck.verbs.build import setting
from limbeck.zoo.nets import build
from limbeck.zoo.routed import Routed, routed_encoder

ENGLISH, GERMAN = "a dog runs over the green grass today".split(), "ein hund rennt heute auf dem gras".split()


def sentences(words: list[str], count: int, seed: int) -> list[str]:
    g = torch.Generator().manual_seed(seed)
    return [" ".join(words[i] for i in torch.randperm(len(words), generator=g).tolist()) for _ in range(count)]


@pytest.fixture
def spec(tmp_path: Path) -> dict[str, Any]:
    path = tmp_path / "captions.jsonl"
    pairs = zip(sentences(ENGLISH, 200, 0), sentences(GERMAN, 200, 1), strict=True)
    path.write_text("".join(json.dumps({"en": en, "de": de}) + "\n" for en, de in pairs))
    return {"name": str(path), "kind": "text", "inputs": "en", "domains": [{"inputs": "de"}], "perturb": True}


def pairs(table: Table) -> list[tuple[str, str, float, int]]:
    """Reference, candidate, score and language of each example."""
    assert table.tokenizer is not None
    half = table["inputs"].shape[1] // 2
    read = [[table.tokenizer.decode(part.tolist()) for part in row.split(half)] for row in table["inputs"]]
    said = zip(table["labels"][:, 0].tolist(), table["domain"].tolist(), strict=True)
    return [(reference, candidate, *rest) for (reference, candidate), rest in zip(read, said, strict=True)]


def test_a_copy_is_perfect_noise_is_worth_nothing_and_the_rest_lies_between(spec: dict[str, Any]):
    found = pairs(load(spec).train)
    scores = [score for _, _, score, _ in found]
    assert 0.05 < scores.count(0.0) / len(scores) < 0.2
    for reference, candidate, score, _ in found:
        assert 0 <= score <= 1
        if score == 1:
            assert candidate == reference
        if candidate != reference:
            assert score < 1
    between = [s for s in scores if 0 < s < 1]
    assert len(between) > len(scores) / 2
    assert len(set(between)) > 4


def test_random_tokens_are_of_the_texts_own_language(spec: dict[str, Any]):
    for _, candidate, _, language in pairs(load(spec).train):
        assert set(candidate.split()) <= set((ENGLISH, GERMAN)[language])


def test_each_way_of_spoiling_does_what_it_says():
    text, stock, g = torch.arange(10, 30), torch.tensor([99]), torch.Generator().manual_seed(0)
    noise, kept = tasks.spoiled(text, 1.0, True, stock, g)
    assert noise.tolist() == [99] * 20
    assert kept == 0
    same, kept = tasks.spoiled(text, 0.0, False, stock, g)
    assert same.tolist() == text.tolist()
    assert kept == 1
    made, kept = tasks.spoiled(text, 0.5, False, stock, g)
    dropped, replaced = 20 - len(made), int((made == 99).sum())
    places = [i for i in made.tolist() if i != 99]
    assert dropped > 0
    assert replaced > 0
    assert places != sorted(places)
    assert kept < 1 - (dropped + replaced) / 20


def test_pairs_are_the_same_each_time_and_others_under_another_seed(spec: dict[str, Any]):
    first, again, other = (load({**spec, "seed": seed}).test["inputs"] for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_few_scores_are_known_and_the_others_do_not_count(spec: dict[str, Any]):
    splits = load({**spec, "labelled": 20})
    known = splits.train["labels"] != tasks.UNLABELLED
    assert int(known.sum()) == 20
    assert not (splits.test["labels"] == tasks.UNLABELLED).any()
    scores = torch.randn(len(known), 1, requires_grad=True)
    squared_error(scores, splits.train["labels"]).sum().backward()
    assert scores.grad is not None
    assert torch.equal(scores.grad != 0, known)


def test_numbers_that_cannot_be_are_refused(spec: dict[str, Any]):
    with pytest.raises(BadInput, match="copy"):
        load({**spec, "perturb": {"copy": 0.7, "random": 0.6}})
    with pytest.raises(BadInput, match="kind: text"):
        load({**spec, "kind": "language"})


def test_the_loss_is_nothing_when_student_and_teacher_agree():
    scores = torch.randn(6, 1)
    assert not bleurt_distill(scores, scores).any()
    torch.testing.assert_close(bleurt_distill(scores + 0.5, scores), torch.full((6,), 0.25))


def test_correlations_are_of_the_whole_order():
    truth = torch.tensor([[0.1], [0.4], [0.4], [0.9]])
    assert score_correlation(2 * truth - 3, truth) == {"kendall": pytest.approx(1), "pearson": pytest.approx(1)}
    assert score_correlation(-truth, truth) == {"kendall": pytest.approx(-1), "pearson": pytest.approx(-1)}
    assert score_correlation(truth.exp(), truth)["kendall"] == pytest.approx(1)
    assert score_correlation(torch.ones(4, 1), truth) == {"kendall": 0.0, "pearson": 0.0}


def test_every_language_has_exactly_one_student():
    net = routed_encoder(classes=1, vocab=20, groups=[[2], [0, 1]], width=8, layers=1, length=8).eval()
    assert net.route.tolist() == [1, 1, 0]
    inputs, domain = torch.randint(1, 20, (9, 8)), torch.tensor([0, 1, 2, 2, 1, 0, 1, 2, 0])
    found = net(inputs, domain)
    for k, member in enumerate(net.members):
        mine = net.route[domain] == k
        torch.testing.assert_close(found["logits"][mine], member(inputs[mine])["logits"])
        torch.testing.assert_close(found["emb"][mine], member(inputs[mine])["emb"])
    only = net(inputs[:2], torch.tensor([2, 2]))
    torch.testing.assert_close(only["logits"], net.members[0](inputs[:2])["logits"])


@pytest.mark.parametrize("groups", [[[0], [0, 1]], [[0], [2]], [[0, 1], []], [[1]]])
def test_a_language_that_has_none_or_two_is_refused(groups: list[list[int]]):
    with pytest.raises(BadInput, match="exactly once"):
        build({"net": "routed_encoder", "groups": groups, "width": 8, "layers": 1}, classes=1, vocab=20)


def test_a_language_that_nobody_knows_is_refused():
    net = Routed([torch.nn.Identity()], [[0]])
    with pytest.raises(BadInput, match=r"must be in \[0, 1\)"):
        net(torch.ones(1, 2, dtype=torch.long), torch.tensor([1]))


def test_a_recipe_trains_its_teacher_on_scores_and_the_student_on_the_teachers(spec: dict[str, Any], tmp_path: Path):
    small = {"train": {"steps": 3, "batch_size": 16}}
    told = {
        "name": "scores",
        "do": "teach",
        "teacher": {"net": "text_encoder", "width": 8, "layers": 1, "data": {"labelled": None}, **small},
        "student": {"net": "routed_encoder", "groups": [[0], [1]], "width": 8, "layers": 1},
        "data": {**spec, "labelled": 10},
        "match": ["squared_error", {"bleurt_distill": 1.0}],
        "control": {"match": ["squared_error"]},
        **small,
    }
    made = setting(Recipe.model_validate(told), tmp_path / "runs" / "scores", None, False)
    assert any((tmp_path / "runs" / ".teachers").iterdir())
    for arm in ("student", "control", "teacher"):
        outcome, _ = teach.run(made, arm, 0, tmp_path / arm)
        assert set(outcome.metrics) == {"kendall", "pearson"}


def test_the_parts_are_splits(spec: dict[str, Any]):
    splits = load(spec)
    assert isinstance(splits, Splits)
    assert splits.train.classes == ["score"]
    assert splits.train.num_classes == 1
