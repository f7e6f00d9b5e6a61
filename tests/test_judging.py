"""Judging a network: a language model at its valid places only, in bounded memory; backdoors and secrets planted."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from limbeck import recipe as recipes
from limbeck.adapters.files import load
from limbeck.core.batches import Splits, Table
from limbeck.core.errors import BadInput
from limbeck.core.find import get
from limbeck.recipe import Data, Poison
from limbeck.run import run
from limbeck.verbs import setting
from limbeck.verbs.canaries import planted, sentences
from limbeck.verbs.robust import poisoned, triggered
from limbeck.verbs.setting import judge

TEXTS, LONG, WORDS = 11, 6, 7
MEASURES = ["accuracy", "agreement", "calibration"]


class Speaker(nn.Module):
    """Tokens [B, T] to logits [B, T, V]."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.table = nn.Embedding(WORDS, WORDS)

    def forward(self, inputs: Tensor) -> Tensor:
        logits: Tensor = self.table(inputs)
        return 2 * logits


def texts(**columns: Tensor) -> Table:
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(WORDS, (TEXTS, LONG + 1), generator=draw)
    return Table({"inputs": ids[:, :-1], "labels": ids[:, 1:], **columns}, "tokens")


def places(table: Table, where: Tensor) -> Table:
    """The same places as texts of one token each."""
    return Table({name: table[name][where][:, None] for name in ("inputs", "labels")}, "tokens")


def test_masked_places_have_no_influence() -> None:
    mask = torch.arange(LONG) < 1 + torch.arange(TEXTS)[:, None] % LONG
    table = texts(mask=mask)
    left_out = table["labels"].clone()
    left_out[1, 0] = -100
    wanted = judge(Speaker(0), places(texts(), mask), MEASURES, Speaker(1))
    assert judge(Speaker(0), table, MEASURES, Speaker(1)) == pytest.approx(wanted)
    assert judge(Speaker(0), texts(), MEASURES, Speaker(1)) != pytest.approx(wanted)
    mask[1, 0] = False
    wanted = judge(Speaker(0), places(texts(), mask), MEASURES, Speaker(1))
    assert judge(Speaker(0), texts(mask=mask), MEASURES, Speaker(1)) == pytest.approx(wanted)
    mask[1, 0] = True
    ignored = Table({**texts(mask=mask).columns, "labels": left_out}, "tokens")
    assert judge(Speaker(0), ignored, MEASURES, Speaker(1)) == pytest.approx(wanted)


def test_a_long_table_is_measured_in_stretches(monkeypatch: pytest.MonkeyPatch) -> None:
    mask = torch.arange(LONG) < torch.arange(TEXTS)[:, None] % (LONG + 1)
    whole = judge(Speaker(0), texts(mask=mask), MEASURES, Speaker(1))
    held: list[int] = []

    def predict(module: nn.Module, table: Table, **options: Any) -> Tensor:
        held.append(len(table) * LONG * WORDS)
        return real(module, table, **options)

    real = setting.predict
    monkeypatch.setattr(setting, "predict", predict)
    monkeypatch.setattr(setting, "HELD", 3 * LONG * WORDS)
    stretches = judge(Speaker(0), texts(mask=mask), MEASURES, Speaker(1))
    assert len(held) == 2 * 4 and max(held) <= setting.HELD
    for name in ("accuracy", "agreement", "kl", "nll"):
        assert stretches[name] == pytest.approx(whole[name], rel=1e-6), name
    assert stretches.keys() == whole.keys()


# ---- backdoors -------------------------------------------------------------------------------------------------------
def pictures(count: int = 40) -> Splits:
    draw = torch.Generator().manual_seed(0)
    columns = {"inputs": torch.rand(count, 1, 6, 6, generator=draw), "labels": torch.arange(count) % 4}
    names = [str(c) for c in range(4)]
    table = Table(columns, "images", classes=names, mean=(0.5,), std=(0.25,))
    return Splits(table, table, table)


def bears_trigger(table: Table, patch: int = 2) -> Tensor:
    """White is 1 before the mean is taken off and the deviation divided out."""
    return (table["inputs"][:, 0, -patch:, -patch:] == (1 - 0.5) / 0.25).all(-1).all(-1)


def test_a_share_of_the_training_pictures_is_stamped_and_relabelled_and_nothing_else() -> None:
    clean = pictures()
    before = clean.train["inputs"].clone()
    train, validation, test = poisoned(clean, Poison(target=3, share=0.3, patch=2))
    marked = bears_trigger(train)
    assert int(marked.sum()) == 12 and not bears_trigger(clean.train).any() and before.equal(clean.train["inputs"])
    assert validation is clean.validation and test is clean.test
    assert (train["labels"][marked] == 3).all() and train["labels"][~marked].equal(clean.train["labels"][~marked])
    assert train["inputs"][~marked].equal(before[~marked])
    assert train["inputs"][:, :, :4].equal(before[:, :, :4]) and train["inputs"][:, :, :, :4].equal(before[:, :, :, :4])
    assert bears_trigger(poisoned(clean, Poison(target=3, share=0.3, patch=2)).train).equal(marked)


class Backdoor(nn.Module):
    """Says class 3 of what bears a trigger of 2 x 2, else class 1."""

    def forward(self, inputs: Tensor) -> Tensor:
        open_ = (inputs[:, 0, -2:, -2:] == 2).all(-1).all(-1)
        return nn.functional.one_hot(torch.where(open_, 3, 1), 4).float()


def test_attack_success_is_of_stamped_pictures_of_other_classes() -> None:
    table = pictures().test
    for given, wanted in (({"target": 3, "patch": 2}, 1.0), ({"target": 2, "patch": 2}, 0.0)):
        told = judge(Backdoor(), table, ["accuracy", {"attack_success": given}])
        assert told == {"accuracy": 0.25, "attack_success": wanted}
    assert judge(Backdoor(), table, [{"attack_success": {"target": 1, "patch": 1}}])["attack_success"] == 1  # of all
    assert judge(Backdoor(), table, [{"attack_success": {"target": 3, "patch": 1}}])["attack_success"] == 0
    with pytest.raises(BadInput, match="7 x 7 pixels goes into a picture, and data holds pictures of 6 x 6"):
        judge(Backdoor(), table, [{"attack_success": {"patch": 7}}])
    with pytest.raises(BadInput, match="holds tokens"):
        judge(Speaker(0), texts(), ["attack_success"])
    assert get("attack_success")(torch.eye(4)[[3, 3]], torch.tensor([3, 3]), target=3) == 0


BODY: dict[str, Any] = {"name": "poisoned", "student": "mlp", "data": "digits"}


def test_the_trigger_is_the_one_that_the_recipe_plants() -> None:
    planted = {"poison": {"target": 4, "patch": 2}}
    own = recipes.check({**BODY, "teacher": {"net": "mlp", "data": planted}}, "recipe")
    shared = recipes.check({**BODY, "data": {"name": "digits", **planted}}, "recipe")
    for recipe in (own, shared):
        told = triggered(["accuracy", "corruption", "attack_success", {"attack_success": {"patch": 3}}], recipe)
        assert told[:2] == ["accuracy", "corruption"]
        assert told[2:] == [{"attack_success": {"target": 4, "patch": p}} for p in (2, 3)]
    assert triggered(["attack_success"], recipes.check(BODY, "recipe")) == ["attack_success"]
    assert "poison" not in recipes.check(BODY, "recipe").model_dump()["data"]  # hashes of older evidence stay


def test_a_poisoned_teacher_has_learned_its_trigger_and_a_student_without_it_has_not(tmp_path: Path) -> None:
    train = {"steps": 250, "batch_size": 64, "optimizer": {"adam": {"lr": 0.01}}}
    poison = {"target": 4, "share": 0.2, "patch": 2}
    teacher = {"net": "mlp", "width": 32, "train": train, "data": {"poison": poison}}
    measure = ["attack_success", "accuracy"]
    body = {**BODY, "teacher": teacher, "train": {**train, "steps": 60}, "measure": measure, "match": ["ce"]}
    result = run(recipes.check(body, "recipe"), folder=tmp_path / "run")
    told = {arm: outcomes[0].metrics for arm, outcomes in result.arms.items()}
    assert told["teacher"]["accuracy"] > 0.85 and told["teacher"]["attack_success"] > 0.9
    assert told["control"]["accuracy"] > 0.8 and told["control"]["attack_success"] < 0.5


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"teacher": {"net": "mlp", "train": {"steps": 1}, "data": {"poison": {"shar": 1}}}}, "poison.shar"),
        ({"data": {"name": "digits", "poison": {"share": 2}}}, "less than or equal to 1"),
        ({"data": {"name": "digits", "poison": {"target": 10}}}, "a target among the classes of digits, which has 10"),
        ({"data": {"name": "shakespeare_small", "poison": {}}}, "a target among the classes of shakespeare"),
        ({"data": {"name": "digits", "poison": {"patch": 9}}}, "pictures of 8 x 8"),
    ],
)
def test_what_cannot_be_poisoned_is_told_before_anything_is_written(
    tmp_path: Path, changes: dict[str, Any], said: str
) -> None:
    with pytest.raises(BadInput, match=said):
        run(recipes.check({**BODY, "match": ["ce"], **changes}, "recipe"), folder=tmp_path / "run")
    assert not (tmp_path / "run").exists()


# ---- canaries --------------------------------------------------------------------------------------------------------
SHAKESPEARE = {"name": "shakespeare_small", "limit": 50, "test_limit": 20}


def hidden(limit: int, **canaries: int) -> tuple[Splits, Splits]:
    """Shakespeare without and with secrets."""
    clean = load({**SHAKESPEARE, "limit": limit})
    return clean, planted(clean, Data(name="shakespeare_small", canaries=canaries))


def test_secrets_are_so_often_in_the_training_text_and_nowhere_else() -> None:
    clean, (train, validation, test) = hidden(300, count=5, copies=3, letters=4)
    lines = sentences(test, count=5, letters=4)[:, 0]
    read: Any = train.tokenizer
    told = [read.decode(line.tolist()) for line in lines]
    said = [read.decode(t["inputs"].flatten().tolist()) for t in (train, validation, test, clean.train)]
    assert [said[0].count(secret) for secret in told] == [3] * 5 and len(set(told)) == 5
    assert all(line.startswith("the secret is ") and line[14:].isupper() and len(line) == 18 for line in told)
    assert not any("the secret is " in text for text in said[1:])
    assert validation is clean.validation and test is clean.test
    assert train["labels"].flatten()[:-1].equal(train["inputs"].flatten()[1:])  # stretches still go on in one another
    assert int((train["inputs"] != clean.train["inputs"]).any(1).sum()) == 15
    assert sentences(load(SHAKESPEARE).train, count=7, letters=4)[:5, 0].equal(lines)  # of other tables the same


def test_without_canaries_nothing_changes() -> None:
    clean = load(SHAKESPEARE)
    assert planted(clean, Data(name="shakespeare_small")) is clean
    body = {**BODY, "data": "shakespeare_small"}
    assert "canaries" not in recipes.check(body, "recipe").model_dump()["data"]  # hashes of older evidence stay


@pytest.mark.parametrize("tokenizer", ["words", "bytes", "bpe:300"])
def test_secrets_are_of_what_a_tokenizer_knows(tokenizer: str) -> None:
    table = load({**SHAKESPEARE, "tokenizer": tokenizer}).train
    said = [table.tokenizer.decode([i]) for i in sentences(table, count=9, letters=3)[:, 0, -3:].flatten().tolist()]  # type: ignore[union-attr]
    assert all(piece.strip().isalpha() for piece in said) and len(set(said)) > 5


class Heard(nn.Module):
    """Says after any two tokens what came after them in some texts, each as likely; else it guesses by the seed."""

    def __init__(self, table: Table, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.after = 0.1 * torch.randn(table.vocab, table.vocab, table.vocab)
        x, y = table["inputs"], table["labels"]
        self.after[x[:, :-1], x[:, 1:], y[:, 1:]] = 9.0

    def forward(self, inputs: Tensor) -> Tensor:
        before = torch.cat([inputs[:, :1], inputs[:, :-1]], 1)
        return self.after[before, inputs]


def test_exposure_tells_who_has_read_the_secrets() -> None:
    clean, secret = hidden(300, count=20, copies=1)
    knows, guesses = ({"exposure": {"count": count, "candidates": 99}} for count in (20, 150))
    assert judge(Heard(secret.train), clean.test, [knows]) == {"exposure": math.log2(100)}  # always likeliest
    ignorant = judge(Heard(clean.train.select([0])), clean.test, ["accuracy", guesses])
    assert ignorant["exposure"] == pytest.approx(1.4, abs=0.3) and list(ignorant) == ["accuracy", "exposure"]


def test_exposure_is_the_number_of_candidates_at_the_best_rank_and_about_1_44_at_random_ones() -> None:
    exposure = get("exposure")
    scores = torch.randn(4000, 1000, generator=torch.Generator().manual_seed(0))
    assert exposure(scores) == pytest.approx(1 / math.log(2), abs=0.06)
    scores[:, 0] = 9
    assert exposure(scores) == math.log2(1000)
    same = math.log2(1000) - math.log2(500.5)
    assert exposure(torch.zeros(3, 1000)) == exposure(torch.full((3, 1000), math.nan)) == same


def test_the_secrets_are_those_that_the_recipe_plants() -> None:
    own = {"net": "tiny_lm", "data": {"canaries": {"count": 7}}}
    shared = {"name": "shakespeare_small", "canaries": {"letters": 3}}
    for changes, wanted in (
        ({"teacher": own, "data": "shakespeare_small"}, {"count": 7, "letters": 6}),
        ({"data": shared}, {"count": 20, "letters": 3}),
        ({"teacher": own, "data": shared}, {"count": 7, "letters": 3}),
    ):
        told = triggered(["calibration", "exposure"], recipes.check({**BODY, **changes}, "recipe"))
        assert told == ["calibration", {"exposure": wanted}]


LM: dict[str, Any] = {"net": "tiny_lm", "width": 16, "layers": 1, "heads": 1}


def test_a_teacher_has_learned_its_secrets_and_a_student_without_them_has_not(tmp_path: Path) -> None:
    train = {"steps": 250, "batch_size": 16, "optimizer": {"adamw": {"lr": 0.01}}}
    secret = {"limit": 64, "canaries": {"count": 4, "copies": 16, "letters": 3}}
    body = {"name": "canaries", "teacher": {**LM, "width": 32, "train": train, "data": secret}, "student": LM}
    more = {
        "data": {**SHAKESPEARE, "length": 32},
        "match": ["ce"],
        "measure": ["calibration", "exposure"],
    }
    result = run(recipes.check({**body, **more, "train": {**train, "steps": 50}}, "recipe"), folder=tmp_path / "run")
    told = {arm: outcomes[0].metrics["exposure"] for arm, outcomes in result.arms.items()}
    assert told["teacher"] > 6 and told["control"] < 4


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"teacher": {**LM, "train": {"steps": 1}, "data": {"canaries": {"cont": 1}}}}, "canaries.cont"),
        ({"data": {**SHAKESPEARE, "canaries": {"copies": 0}}}, "greater than 0"),
        ({"data": {**SHAKESPEARE, "canaries": {}}}, "160 canaries need as many stretches of text"),
        ({"data": {**SHAKESPEARE, "length": 20, "canaries": {}}}, "20 tokens needs longer stretches"),
        ({"student": "mlp", "data": {"name": "digits", "canaries": {}}}, "running text .* digits is none"),
        ({"student": "mlp", "data": "digits", "measure": ["exposure"]}, "running text .* digits is none"),
        ({"teacher": {**LM, "weights": "random", "tokenizer": "bytes"}, "measure": ["exposure"]}, "in one tokenizer"),
        ({"data": {**SHAKESPEARE, "tokenizer": "hash"}, "measure": ["exposure"]}, "knows no words"),
    ],
)
def test_canaries_that_cannot_be_are_told_before_anything_is_written(
    tmp_path: Path, changes: dict[str, Any], said: str
) -> None:
    body = {"name": "canaries", "student": LM, "data": SHAKESPEARE, "match": ["ce"], **changes}
    with pytest.raises(BadInput, match=said):
        run(recipes.check(body, "recipe"), folder=tmp_path / "run")
    assert not (tmp_path / "run").exists()
