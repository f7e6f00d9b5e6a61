"""Masked language models: hidden words, networks that see both sides, and what is distilled with them."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from limbeck.adapters import files
from limbeck.adapters.words import Chars
from limbeck.core import find
from limbeck.core.batches import Batches, Table, epoch
from limbeck.core.cloze import Cloze, rarer, telling_words
from limbeck.core.errors import BadInput
from limbeck.core.nets import Nets, outputs
from limbeck.losses.features.bert_emd import BertEMD, one_to_one, transport
from limbeck.losses.logits.ce import ce
from limbeck.recipe import check
from limbeck.run import run
from limbeck.train.pretrain.task_agnostic import TaskAgnostic
from limbeck.zoo.nets import build

TEXT = "the quick brown fox jumps over the lazy dog while 17 wizards vex a big grumpy judge. " * 40


@pytest.fixture
def text(tmp_path: Path) -> Path:
    """A text in a file."""
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return path


def masked(path: Path, **options: Any) -> Any:
    """Its masked tables."""
    told = {"name": str(path), "kind": "language", "length": 32, "masked": True}
    return files.load({**told, **options})


# ---------------------------------------------------------------- what is hidden


def test_berts_rule() -> None:
    tokens = torch.randint(2, 50, (4000, 40), generator=torch.Generator().manual_seed(0))
    real = torch.arange(40) < torch.randint(1, 41, (4000, 1), generator=torch.Generator().manual_seed(1))
    cloze = Cloze(mask=50, words=50)
    shown, hidden = cloze.hide(tokens, real, cloze.draw(torch.Generator().manual_seed(2), 4000, 40))
    assert not hidden[~real].any() and torch.equal(shown[~hidden], tokens[~hidden])
    assert torch.equal(hidden.sum(1), (0.15 * real.sum(1)).round().clamp_min(1).long())
    as_mask = (shown == 50)[hidden].double().mean()
    same = (shown == tokens)[hidden].double().mean()
    assert abs(as_mask - 0.8) < 0.01
    assert abs(same - (0.1 + 0.1 / 48)) < 0.01  # a random token may be the right one
    assert shown[hidden & (shown != 50)].min() >= 2


def test_rare_words_are_hidden_more_often() -> None:
    tokens = torch.where(torch.arange(4000 * 20).view(4000, 20) % 10 == 0, 2, 3)  # one in ten is rare
    even = Cloze(mask=4, words=4)
    smooth = Cloze(mask=4, words=4, odds=rarer(tokens, 5, 0.7))
    shares = []
    for cloze in (even, smooth):
        draws = cloze.draw(torch.Generator().manual_seed(0), 4000, 20)
        _, hidden = cloze.hide(tokens, torch.ones_like(tokens).bool(), draws)
        shares.append(float((tokens == 2)[hidden].double().mean()))
    assert abs(shares[0] - 0.1) < 0.01
    assert shares[1] > 0.25  # 9 ** 0.7 = 4.7 times as likely while none is taken


def test_each_epoch_hides_others_and_a_resumed_stream_the_same(text: Path) -> None:
    train = masked(text).train
    batches = Batches(train, len(train), shuffle=False, seed=5)
    first, second = next(batches), next(batches)
    assert torch.equal(first["labels"], second["labels"]) and torch.equal(first["labels"], train["inputs"])
    assert not torch.equal(first["mask"], second["mask"])
    again = Batches(train, len(train), shuffle=False, seed=5)
    again.load_state_dict({"position": 1})
    assert all(torch.equal(second[name], value) for name, value in next(again).items())


def test_processes_hide_what_one_would(text: Path) -> None:
    train = masked(text).train
    whole = next(Batches(train, 8, seed=1))
    parts = [next(Batches(train, 8, seed=1, rank=r, world=2)) for r in range(2)]
    for name in ("inputs", "mask", "labels"):
        assert torch.equal(torch.cat([part[name] for part in parts]), whole[name])


def test_validation_and_test_are_fixed_and_nothing_is_shifted(text: Path) -> None:
    one, two = masked(text), masked(text)
    for a, b in zip(one[1:], two[1:], strict=True):
        assert torch.equal(a["inputs"], b["inputs"]) and torch.equal(a["mask"], b["mask"])
        kept = ~a["mask"] & a["attention_mask"]
        assert torch.equal(a["inputs"][kept], a["labels"][kept])
        assert 0.1 < float(a["mask"][a["attention_mask"]].double().mean()) < 0.2
    train = one.train
    told = next(iter(epoch(train, 4)))
    assert torch.equal(told["inputs"], next(iter(epoch(train, 4)))["inputs"])
    assert (told["inputs"] == train.tokenizer.mask).any()
    letters = Chars([TEXT[: round(0.8 * len(TEXT))]])
    assert train.vocab == letters.size + 1 and train.tokenizer.mask == letters.size
    assert train.tokenizer.decode(train["labels"][0].tolist()) == TEXT[:32]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"masked": {"share": 1.5}}, "`share` must be in"),
        ({"masked": {"shore": 0.1}}, "takes no 'shore'"),
        ({"kind": "text", "inputs": "text"}, "`masked` is of texts of one source"),
    ],
)
def test_wrong_options_are_refused(text: Path, options: dict[str, Any], said: str) -> None:
    with pytest.raises(BadInput, match=said):
        masked(text, **options)


# ---------------------------------------------------------------- networks that see both sides


def tiny(**knobs: Any) -> Any:
    """A language model over 20 tokens."""
    torch.manual_seed(0)
    return build({"net": "tiny_lm", "width": 16, "heads": 2, "layers": 2, **knobs}, vocab=20).eval()


@pytest.mark.parametrize("attn", [False, True])
def test_one_that_is_not_causal_sees_what_follows_but_no_padding(attn: bool) -> None:
    tokens = torch.tensor([[2, 3, 4, 5, 6, 0, 0]])
    later, padded = tokens.clone(), tokens.clone()
    later[0, 4] = 9
    for causal in (True, False):
        model = tiny(causal=causal, attn=attn)
        moved = (model(tokens)["logits"] - model(later)["logits"]).abs().amax(-1)[0]
        assert (moved[:4] > 1e-6).all() != causal
        longer = model(torch.cat([padded, torch.zeros(1, 3, dtype=torch.long)], 1))["logits"][:, :5]
        torch.testing.assert_close(longer, model(tokens)["logits"][:, :5], atol=1e-5, rtol=1e-5)


def test_a_text_encoder_says_words_and_classes_by_turns() -> None:
    encoder = build({"net": "text_encoder", "masked": True, "width": 16}, vocab=20, classes=3).eval()
    tokens = torch.tensor([[2, 3, 20, 0]])  # 20 stands for a hidden word
    with telling_words(encoder):
        told = encoder(tokens)
        assert told["logits"].shape == (1, 4, 20)
        torch.testing.assert_close(told["logits"], told["hidden"] @ told["head"].mT)
    assert encoder(tokens)["logits"].shape == (1, 3)
    with pytest.raises(BadInput, match="masked: true"), telling_words(encoder, tiny()):
        pass
    assert encoder.tells_words is False


def test_a_model_that_would_see_its_labels_is_refused(text: Path) -> None:
    recipe = {
        "name": "leak",
        "student": {"net": "tiny_lm", "width": 16, "heads": 2, "layers": 1, "causal": False},
        "match": ["ce"],
        "data": {"name": str(text), "kind": "language", "length": 16},
        "train": {"steps": 2, "batch_size": 4},
    }
    with pytest.raises(BadInput, match="sees the next tokens that it is asked for"):
        run(check(recipe, "test"), folder=text.parent / "run")


def test_a_transformers_model_learns_hidden_words(text: Path) -> None:
    transformers = pytest.importorskip("transformers")
    folder = text.parent / "bert"
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    config = transformers.BertConfig(vocab_size=80, max_position_embeddings=32, **sizes)
    transformers.BertForMaskedLM(config).save_pretrained(folder)
    recipe = {
        "name": "bert",
        "teacher": {"net": f"hf:{folder}"},
        "student": {"net": f"hf:{folder}", "keep": [0]},
        "match": [{"ce": 2}, {"kd": {"temperature": 2, "weight": 5}}, "hidden_cosine"],
        "data": {"name": str(text), "kind": "language", "length": 16, "masked": True, "tokenizer": "chars"},
        "train": {"steps": 4, "batch_size": 4},
    }
    result = run(check(recipe, "test"), folder=text.parent / "run")
    assert type(result.artefact).__name__ == "BertForMaskedLM"
    assert result.artefact.config.num_hidden_layers == 1
    assert result.metrics["nll"] < 10


# ---------------------------------------------------------------- layers by transport


def layers(count: int, width: int, seed: int, scale: float = 1.0) -> list[Tensor]:
    """Hidden states [4, 5, width] of so many layers."""
    g = torch.Generator().manual_seed(seed)
    return [scale * torch.randn(4, 5, width, generator=g, dtype=torch.float64) for _ in range(count)]


def emd(student: list[Tensor], teacher: list[Tensor], mapping: str = "emd") -> BertEMD:
    """The loss for these layers."""
    torch.manual_seed(0)
    loss = find.get("bert_emd")([tuple(s.shape) for s in student], [tuple(t.shape) for t in teacher], mapping=mapping)
    return loss.double()  # type: ignore[no-any-return]


@pytest.mark.parametrize(("s", "n"), [(2, 4), (3, 4), (2, 3), (4, 4)])
def test_the_plan_is_that_of_least_cost(s: int, n: int) -> None:
    from scipy.optimize import linprog

    cost = torch.rand(s, n, generator=torch.Generator().manual_seed(s + n), dtype=torch.float64)
    plan = transport(cost)
    torch.testing.assert_close(plan.sum(1), torch.full((s,), 1 / s, dtype=torch.float64))
    torch.testing.assert_close(plan.sum(0), torch.full((n,), 1 / n, dtype=torch.float64))
    rows = [[float(k // n == i) for k in range(s * n)] for i in range(s)]
    columns = [[float(k % n == j) for k in range(s * n)] for j in range(n)]
    best = linprog(cost.flatten().numpy(), A_eq=rows + columns, b_eq=[1 / s] * s + [1 / n] * n)
    assert abs(float((plan * cost).sum()) - best.fun) < 1e-9


@pytest.mark.parametrize("mapping", ["emd", "uniform", "last"])
def test_hidden_states_are_0_for_a_student_equal_to_the_teacher(mapping: str) -> None:
    states = layers(3, 6, 0)
    loss = emd(states, states, mapping)
    assert not list(loss.parameters())  # identity maps
    assert loss(states, states).abs().max() == 0
    assert loss(layers(3, 6, 1), states).min() > 0.1


def test_a_forced_one_to_one_plan_is_the_uniform_mapping() -> None:
    teacher = [t + 10 * i for i, t in enumerate(layers(3, 6, 0))]  # only its own layer is near
    student = [t + 0.1 * torch.randn_like(t) for t in teacher]
    torch.testing.assert_close(
        emd(student, teacher)(student, teacher), emd(student, teacher, "uniform")(student, teacher)
    )
    crossed = [student[1], student[0], student[2]]
    by_emd, fixed = (emd(crossed, teacher, m)(crossed, teacher) for m in ("emd", "uniform"))
    assert (by_emd < 0.1).all() and (fixed > 10).all()


def test_the_fixed_mappings() -> None:
    assert one_to_one(2, 4, "uniform") == [(0, 1), (1, 3)]
    assert one_to_one(6, 12, "uniform")[-1] == (5, 11)
    assert one_to_one(2, 4, "last") == [(1, 3)]


def test_relations_take_any_width_and_heads() -> None:
    loss = find.get("minilm_v2")
    value = loss(*[layers(k, w, 3 * i + k) for i in range(3) for k, w in ((2, 6), (4, 15))], relation_heads=12)
    assert value.shape == (4,) and (value > 0).all()
    same = [layers(2, 6, i) for i in range(3) for _ in range(2)]
    assert loss(*same).abs().max() < 1e-12


# ---------------------------------------------------------------- words first, then a task


def world() -> tuple[Nets, dict[str, Tensor]]:
    """Two encoders, and texts of which the last has no label."""
    torch.manual_seed(0)
    facts = {"vocab": 20, "classes": 2}
    spec = {"net": "text_encoder", "masked": True, "width": 16, "layers": 2, "dropout": 0.0, "attn": True}
    nets = Nets(teacher=build({**spec, "layers": 4}, **facts), student=build(spec, **facts))
    tokens = torch.randint(2, 20, (6, 10))
    return nets, {"inputs": tokens, "labels": torch.tensor([0, 1, 0, 1, 0, -100]), "attention_mask": tokens > 0}


class At:
    """A moment of training."""

    def __init__(self, stage: int) -> None:
        self.stage, self.progress = stage, 0.0


def test_stage_1_is_on_hidden_words_and_stage_2_on_labels() -> None:
    nets, batch = world()
    method = TaskAgnostic(first=("ce", "kd"), share=0.5)
    method.setup(nets, batch)
    assert [(s.steps, s.pool, s.validated) for s in method.stages(nets, 10)] == [(5, "texts", False), (5, "task", True)]
    assert {k: v.tolist() for k, v in method.pools(batch["labels"]).items()} == {
        "task": [0, 1, 2, 3, 4],
        "texts": [0, 1, 2, 3, 4, 5],
    }
    torch.manual_seed(3)
    ((player, parts),) = list(method.step(nets, batch, At(0)))  # type: ignore[arg-type]
    torch.manual_seed(3)
    cloze = Cloze(20, 20)
    hidden = cloze.apply(batch, cloze.draw(None, 6, 10))
    with telling_words(nets.student):
        logits = outputs(nets.student, hidden)["logits"]
    wanted = ce(logits, batch["inputs"])[hidden["mask"]].mean()
    assert player == "student" and set(parts) == {"ce", "kd"}
    torch.testing.assert_close(parts["ce"].value, wanted)  # type: ignore[index, union-attr]
    known = {k: v[:5] for k, v in batch.items()}
    ((_, parts),) = list(method.step(nets, known, At(1)))  # type: ignore[arg-type]
    wanted = ce(nets.student(known["inputs"])["logits"], known["labels"]).mean()
    torch.testing.assert_close(parts["ce"].value, wanted)  # type: ignore[index, union-attr]


def test_every_way_is_0_for_a_student_equal_to_the_teacher() -> None:
    nets, batch = world()
    nets.student = build(
        {"net": "text_encoder", "masked": True, "width": 16, "layers": 4, "dropout": 0.0, "attn": True},
        vocab=20,
        classes=2,
    )
    nets.student.load_state_dict(nets.teacher.state_dict())
    ways = [
        "forward_kl",
        "bert_emd",
        {"bert_emd": {"mapping": "last"}},
        {"bert_emd": {"mapping": "uniform"}},
        "minilm_v2",
    ]
    for way in ways:
        method = TaskAgnostic(first=(way,))
        method.setup(nets, batch)
        ((_, parts),) = list(method.step(nets, batch, At(0)))  # type: ignore[arg-type]
        for part in parts.values():  # type: ignore[union-attr]
            assert abs(float(part)) < 1e-6


def test_share_1_leaves_the_task_out() -> None:
    nets, batch = world()
    method = TaskAgnostic(first=("ce",), share=1.0)
    method.setup(nets, batch)
    assert [s.name for s in method.stages(nets, 7)] == ["words"]
    with pytest.raises(ValueError, match="share"):
        TaskAgnostic(share=0.0)


def test_a_table_of_words_keeps_its_cloze_when_rows_are_chosen(text: Path) -> None:
    train: Table = masked(text, limit=8).train
    assert len(train) == 8 and train.cloze is not None
