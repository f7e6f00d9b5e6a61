"""`limbeck doctor` of a teacher, a student and data: every figure against one worked out otherwise, and the verdict."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import save_file

from limbeck.core import find
from limbeck.core.batches import Table
from limbeck.core.errors import BadInput
from limbeck.outlook import Cost, Outlook, lines, look, recipe_of
from limbeck.outlook.figures import Sums, figures
from limbeck.outlook.verdict import judged
from limbeck.recipe import load
from limbeck.zoo.nets import build
from tests import tiny
from tests.tiny import limbeck, recipe

TEXT = "the cat sat on the mat and the dog sat on the log while two birds sang in the old elm tree by the mill. " * 60


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def trained(folder: Path, name: str, steps: int = 8, width: int = 16, count: int = 64) -> Path:
    """Weights of an mlp that has learned the tiny pictures."""
    torch.manual_seed(3)
    net = build({"net": "mlp", "width": width}, classes=tiny.CLASSES, channels=1, size=8)
    x, y = (torch.from_numpy(a) for a in tiny.images(count))
    x = (x - x.mean()) / x.std()
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-2)
    for _ in range(steps):
        optimizer.zero_grad()
        out: Any = net(x)
        torch.nn.functional.cross_entropy(out["logits"], y).backward()
        optimizer.step()
    path = folder / f"{name}.safetensors"
    save_file({k: v.contiguous() for k, v in net.state_dict().items()}, path)
    return path


# ---- the figures -----------------------------------------------------------------------------------------------------
def test_the_sums_are_those_of_the_measures() -> None:
    draw = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(300, 7, generator=draw, dtype=torch.float64)
    labels = torch.randint(0, 7, (300,), generator=draw)
    sums, rows = Sums.of(150), torch.arange(300) // 2
    for a, b in ((0, 101), (101, 300)):  # in two stretches
        sums.add(logits[a:b], labels[a:b], rows[a:b])
    assert sums.count.tolist() == [2] * 150
    side = sums.side("x", torch.nn.Linear(2, 3))
    wanted = find.get("calibration")(logits, labels)
    assert side.nll == pytest.approx(wanted["nll"], rel=1e-12) and side.ece == pytest.approx(wanted["ece"], rel=1e-9)
    assert side.accuracy == pytest.approx((logits.argmax(-1) == labels).double().mean().item())
    p = logits.softmax(-1)
    assert side.confidence == pytest.approx(p.max(-1).values.mean().item())
    assert side.entropy == pytest.approx(-(p * p.log()).sum(-1).mean().item())
    assert side.parameters == 9


def test_the_divergences_and_overlaps(monkeypatch: pytest.MonkeyPatch) -> None:
    class Says(torch.nn.Module):
        def __init__(self, table: torch.Tensor) -> None:
            super().__init__()
            self.table = torch.nn.Parameter(table)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.table[x[:, 0].long()]

    draw = torch.Generator().manual_seed(1)
    mine, theirs = torch.randn(40, 6, generator=draw), torch.randn(40, 6, generator=draw)
    table = Table({"inputs": torch.arange(40.0).unsqueeze(1), "labels": torch.arange(40) % 6})
    asked = recipe_of("mlp", "mlp", "digits")
    monkeypatch.setattr("limbeck.outlook.figures.SLICE", 6 * 7)  # seven places at a time
    o = figures(asked, {"student": Says(mine), "teacher": Says(theirs)}, table, table, 3)
    p, q = mine.double().log_softmax(-1), theirs.double().log_softmax(-1)
    assert o.forward_kl == pytest.approx((q.exp() * (q - p)).sum(-1).mean().item(), rel=1e-6)
    assert o.reverse_kl == pytest.approx((p.exp() * (p - q)).sum(-1).mean().item(), rel=1e-6)
    assert o.top1 == pytest.approx((mine.argmax(-1) == theirs.argmax(-1)).double().mean().item())
    shared = [
        len(set(a.topk(3).indices.tolist()) & set(b.topk(3).indices.tolist())) / 3
        for a, b in zip(mine, theirs, strict=True)
    ]
    assert o.topk == pytest.approx(np.mean(shared)) and o.k == 3
    y = torch.arange(40) % 6
    apart = (q - p).gather(1, y[:, None]).squeeze(1)
    assert o.gain == pytest.approx(apart.mean().item(), rel=1e-6)
    assert o.noise == pytest.approx((apart.std(correction=0) / 40**0.5).item(), rel=1e-6)
    counts = torch.bincount(y).double() + 1
    assert o.guess == pytest.approx(-(counts / counts.sum()).log()[y].mean().item())


# ---- the command -----------------------------------------------------------------------------------------------------
def test_a_recipe_is_looked_at_before_it_runs(tmp_path: Path) -> None:
    tiny.data(tmp_path)
    spec = {"net": "mlp", "width": 16, "weights": str(trained(tmp_path, "teacher"))}
    path = recipe(tmp_path, teacher=spec, seeds=3)
    before = sorted(p.name for p in tmp_path.rglob("*"))
    called = limbeck("doctor", path)
    assert called.code == 0, called.err
    for part in ("validation part", "teacher  mlp", "KL(teacher || student)", "same first choice", "peak memory"):
        assert part in called.out, part
    assert "6 steps: about" in called.out and "6 runs with control and seeds" in called.out
    assert called.out.rstrip().splitlines()[-1].startswith("Distillation is likely to pay: the student is untrained")
    assert sorted(p.name for p in tmp_path.rglob("*")) == before  # nothing is written or trained
    again = limbeck("doctor", path)
    keep = [line for line in called.out.splitlines() if "a step of" not in line]
    assert keep == [line for line in again.out.splitlines() if "a step of" not in line]


def test_a_pair_of_networks_by_options(tmp_path: Path) -> None:
    data = tiny.data(tmp_path)
    teacher = yaml.safe_dump(
        {"net": "mlp", "width": 16, "weights": str(trained(tmp_path, "t"))}, default_flow_style=True
    )
    called = limbeck(
        "doctor",
        "--teacher",
        teacher,
        "--student",
        "mlp",
        "--data",
        data,
        "--batch-size",
        "8",
        "--steps",
        "50",
        "--json",
    )
    assert called.code == 0, called.err
    body = json.loads(called.out)
    assert body["cost"]["batch_size"] == 8 and body["cost"]["steps"] == 50 and body["cost"]["seconds"] > 0
    assert body["cost"]["memory"] >= body["cost"]["before"] > 1e6 and body["fresh"] and body["likely"]
    assert body["words"] is None and body["teacher"]["bits_per_byte"] is None


def test_a_teacher_that_knows_nothing_or_no_more_than_the_student(tmp_path: Path) -> None:
    tiny.data(tmp_path)
    ignorant = look(load(recipe(tmp_path, teacher={"net": "mlp", "weights": str(tiny.teacher(tmp_path))})))
    assert ignorant.likely is False and ignorant.guess_noise > 0 and "guessing by frequency" in ignorant.verdict
    good = {"net": "mlp", "width": 16, "weights": str(trained(tmp_path, "good"))}
    twin = look(load(recipe(tmp_path, teacher=good, student=good)))
    assert twin.likely is False and "by more than the noise" in twin.verdict
    assert twin.forward_kl == pytest.approx(0, abs=1e-6) and twin.top1 == 1 and twin.gain == pytest.approx(0, abs=1e-6)


def test_what_a_teacher_must_learn_first_is_kept_for_the_run(tmp_path: Path) -> None:
    tiny.data(tmp_path)
    teacher = {"net": "mlp", "width": 16, "train": {"steps": 20, "batch_size": 16}}
    look(load(recipe(tmp_path, teacher=teacher)))
    (kept,) = (tmp_path / "runs" / ".teachers").iterdir()
    made = (kept / "weights.safetensors").stat().st_mtime_ns
    assert limbeck("run", tmp_path / "tiny.yaml", "--out", "runs/one").code == 0
    assert (kept / "weights.safetensors").stat().st_mtime_ns == made


def test_a_recipe_that_cannot_take_a_step_says_so(tmp_path: Path) -> None:
    path = recipe(
        tmp_path, match=["ce", "fitnets"], teacher={"net": "mlp", "width": 16, "weights": str(trained(tmp_path, "t"))}
    )
    tiny.data(tmp_path)
    tree = yaml.safe_load(path.read_text())
    tree["match"] = ["ce", {"pkt": {"weight": 1}}]
    tree["student"] = {"net": "own.py:Net"}
    path.write_text(yaml.safe_dump(tree))
    Path("own.py").write_text(
        "from torch import nn\n\n\nclass Net(nn.Sequential):\n    def __init__(self, classes):\n"
        "        super().__init__(nn.Flatten(), nn.Linear(64, classes))\n"
    )
    called = limbeck("doctor", path)
    assert called.code == 1 and "caution: the recipe cannot take a step: " in called.out, called


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--teacher", "mlp"), "all three"),
        (("tiny.yaml", "--teacher", "mlp"), "a recipe says its own teacher"),
        (("no.yaml",), "cannot read the recipe no.yaml"),
        (("tiny.yaml", "--examples", "0"), "--examples must be at least 1, got 0"),
        (("--teacher", "mlp", "--student", "mlq", "--data", "tiny.npz"), "no network 'mlq'"),
        (("--teacher", "mlp", "--student", "mlp", "--data", "tiny.npz"), "weights"),
        (("--teacher", "mlp", "--student", "mlp", "--data", "tiny.npy"), "tiny.npy"),
        (("--teacher", "{net: [a]}", "--student", "mlp", "--data", "tiny.npz"), "--teacher is a name, or a mapping"),
    ],
)
def test_bad_input_is_one_sentence(tmp_path: Path, arguments: tuple[str, ...], said: str) -> None:
    recipe(tmp_path)
    called = limbeck("doctor", *arguments)
    assert called.code == 2 and said in called.said, called


def test_only_teaching_in_one_stage_is_looked_at(tmp_path: Path) -> None:
    path = recipe(tmp_path, do="train", teacher=None, match=["ce"])
    with pytest.raises(BadInput, match="a `teach` recipe of one stage"):
        look(load(path))


# ---- language --------------------------------------------------------------------------------------------------------
def tokenizer(folder: Path, size: int, template: str | None = None) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=size, special_tokens=["<pad>", "</s>"], initial_alphabet=alphabet)
    inner.train_from_iterator([TEXT], trainer)
    made = PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", eos_token="</s>")
    made.chat_template = template
    made.save_pretrained(folder)


def model(folder: Path, width: int, words: int, tokens: int, template: str | None = None, steps: int = 0) -> Path:
    """A tiny Llama and its tokenizer on disk, trained a little on the text."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from limbeck.adapters.words import Pretrained

    folder.mkdir()
    tokenizer(folder, tokens, template)
    torch.manual_seed(0)
    sizes = {"hidden_size": width, "intermediate_size": 2 * width, "num_hidden_layers": 1, "num_attention_heads": 2}
    net: Any = LlamaForCausalLM(LlamaConfig(vocab_size=words, max_position_embeddings=64, **sizes))
    ids = torch.tensor(Pretrained(str(folder)).encode(TEXT))
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-2)
    for i in range(steps):
        batch = ids[(i * 32) % 600 :][: 32 * 8].reshape(8, 32)
        optimizer.zero_grad()
        net(batch, labels=batch).loss.backward()
        optimizer.step()
    net.save_pretrained(folder)
    return folder


def looked(teacher: Path, student: Path) -> Outlook:
    Path("text.txt").write_text(TEXT)
    data = "{name: text.txt, kind: language, length: 16}"
    return look(recipe_of(f"hf:{teacher}", f"hf:{student}", data, batch_size=4, steps=10), top_k=5)


CHAT = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}"


def test_two_language_models_of_one_family_with_other_padding(tmp_path: Path) -> None:
    found = looked(
        model(tmp_path / "t", 32, 290, 280, CHAT, steps=40), model(tmp_path / "s", 16, 284, 280, CHAT, steps=3)
    )
    w = found.words
    assert w is not None and w.same and w.templates == "same"
    assert (w.student_rows, w.teacher_rows) == (284, 290) and w.student == w.teacher == w.common <= 280
    assert found.student.dropped > found.teacher.dropped >= 0 and found.forward_kl is not None and found.forward_kl > 0
    assert (
        found.likely
        and not found.fresh
        and found.gain > 0.5
        and "nats a label better than the student" in found.verdict
    )
    assert found.teacher.bits_per_byte is not None and found.student.bits_per_byte is not None
    ratio = found.teacher.nll / found.teacher.bits_per_byte
    assert found.student.nll / found.student.bits_per_byte == pytest.approx(ratio)
    assert found.cost is not None or "290 classes" in found.problem
    assert any("heads of 284 and 290 rows" in line for line in lines(found))


def test_two_language_models_with_two_tokenizers(tmp_path: Path) -> None:
    found = looked(
        model(tmp_path / "t", 32, 300, 300, CHAT, steps=40), model(tmp_path / "s", 16, 262, 262, None, steps=3)
    )
    w = found.words
    assert w is not None and not w.same and w.templates == "only the teacher has one" and 258 <= w.common < w.teacher
    assert found.forward_kl is None and found.topk is None and "bits a byte better" in found.verdict
    assert found.teacher.bits_per_byte is not None and found.student.bits_per_byte is not None
    assert found.gain == pytest.approx(found.student.bits_per_byte - found.teacher.bits_per_byte, rel=1e-3)
    assert any("two tokenizers" in note for note in found.notes)
    assert found.cost is not None, found.problem
    assert any("chat templates" in c for c in found.cautions)
    text = "\n".join(lines(found))
    assert "losses compare by the byte" in text


def test_characters_of_a_text(tmp_path: Path) -> None:
    Path("text.txt").write_text(TEXT)
    teacher = "{net: tiny_lm, width: 16, layers: 1, train: {steps: 30, batch_size: 8, optimizer: {adam: {lr: 0.01}}}}"
    asked = recipe_of(teacher, "{net: tiny_lm, width: 8, layers: 1}", "{name: text.txt, kind: language, length: 16}")
    found = look(asked)
    assert found.likely and found.fresh and found.words is not None and found.words.templates == "none"
    assert found.teacher.nll < found.guess < found.student.nll
    assert found.teacher.bits_per_byte == pytest.approx(found.teacher.nll / math.log(2))  # a character is a byte here


# ---- the verdict -----------------------------------------------------------------------------------------------------
def outlook(tmp_path: Path, **changes: Any) -> Outlook:
    tiny.data(tmp_path)
    good = {"net": "mlp", "width": 16, "weights": str(trained(tmp_path, "good"))}
    weak = {"net": "mlp", "width": 16, "weights": str(trained(tmp_path, "weak", steps=1))}
    return judged(replace(look(load(recipe(tmp_path, teacher=good, student=weak))), **changes))


def test_the_verdict_rests_on_thefigures(tmp_path: Path) -> None:
    base = outlook(tmp_path, sure=0.5)
    assert base.likely and f"{base.gain:.3f} nats a label better than the student" in base.verdict
    assert judged(replace(base, noise=base.gain)).likely is False
    assert judged(replace(base, guess=base.teacher.nll / 2)).likely is False
    assert judged(replace(base, forward_kl=1e-3)).likely is False
    sharp = judged(replace(base, sure=1e-3))
    assert sharp.likely is None and "by heart" in " ".join(sharp.cautions)
    boastful = replace(base.teacher, confidence=0.99, accuracy=0.8, ece=0.19)
    assert "over-confident: 99.0% sure and 80.0% right" in " ".join(judged(replace(base, teacher=boastful)).cautions)
    large = replace(base.teacher, parameters=100 * base.student.parameters)
    assert "100 times the student's parameters" in " ".join(judged(replace(base, teacher=large)).cautions)
    small = replace(base.teacher, parameters=base.student.parameters // 2)
    assert "smaller than the student" in " ".join(judged(replace(base, teacher=small)).cautions)


def test_time_and_memory_are_told_for_the_whole_run(tmp_path: Path) -> None:
    cost = Cost(memory=3 * 2**30, before=2**30, seconds=0.5, batch_size=8, steps=7200, runs=6)
    said = "\n".join(lines(replace(outlook(tmp_path), cost=cost)))
    assert "a step of 8: 500 ms, peak memory 3,072 MiB (1,024 MiB before the first)" in said
    assert "7,200 steps: about 60.0 min, 6 runs with control and seeds at most 6.0 h" in said


def test_conversations_count_what_the_assistant_says(tmp_path: Path) -> None:
    chat = CHAT + "{% if add_generation_prompt %}<assistant>{% endif %}"
    path = model(tmp_path / "m", 16, 280, 280, chat)
    rows = [{"prompt": f"the cat {i}?", "response": "the dog sat on the log"} for i in range(40)]
    Path("chats.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    asked = recipe_of(f"hf:{path}", f"hf:{path}", "{name: chats.jsonl, kind: chat, length: 48}", batch_size=4, steps=10)
    found = look(asked)
    from limbeck.adapters.words import Pretrained

    said = len(Pretrained(str(path)).encode("the dog sat on the log"))
    assert found.examples == 4 and found.labels == 4 * said
    assert found.forward_kl == pytest.approx(0, abs=1e-9) and found.likely is False
