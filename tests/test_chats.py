"""Conversations: which tokens count, what a template says, how texts share a row."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from limbeck.adapters import chats
from limbeck.adapters.files import load
from limbeck.adapters.words import Bytes, Pretrained
from limbeck.core.batches import Batches
from limbeck.core.errors import BadInput
from limbeck.core.nets import outputs
from limbeck.zoo.nets import build


def talk(*turns: str) -> list[chats.Message]:
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(turns)]


def test_what_the_assistant_says_counts_with_the_mark_that_ends_its_turn(pretrained: Path) -> None:
    tokenizer = Pretrained(str(pretrained))
    ids, said = chats.encoded(tokenizer, talk("two?", "four", "é?", "🙂 ok"))
    inner: Any = tokenizer.inner
    heard = [inner.decode([i for i, yes in zip(ids, said, strict=True) if yes is want]) for want in (True, False)]
    assert heard[0] == "four</s>🙂 ok</s>"
    assert heard[1] == "<s>system\nBe brief.</s>\n<s>user\ntwo?</s>\n<s>assistant\n\n<s>user\né?</s>\n<s>assistant\n\n"
    prompt = inner.apply_chat_template(talk("two?"), tokenize=True, add_generation_prompt=True)
    prompt = prompt["input_ids"] if not isinstance(prompt, list) else prompt
    assert ids[: len(prompt)] == prompt, "training must see the prompt in the tokens that a server will send"


def test_without_a_template_prompt_and_answer_stand_on_lines_of_their_own() -> None:
    tokenizer = Bytes()
    ids, said = chats.encoded(tokenizer, talk("2+2", "4"))
    assert tokenizer.decode(ids) == "2+2\n4\n"
    assert said == [False] * 4 + [True] * 2


def test_rows_are_read_by_their_usual_names() -> None:
    for row in (
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
        {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
        {"prompt": "a", "completion": "b"},
        {"question": "a", "answer": "b"},
        {"instruction": "a", "input": "", "output": "b"},
    ):
        assert chats.dialogues([row], "rows") == [talk("a", "b")], row
    alpaca = {"instruction": "a", "input": "c", "output": "b", "system": "s"}
    assert [m["content"] for m in chats.dialogues([alpaca], "rows")[0]] == ["s", "a\n\nc", "b"]
    assert chats.dialogues([{"q": "a", "r": "b"}], "rows", "q", "r") == [talk("a", "b")]
    with pytest.raises(BadInput, match=r"rows has no conversations: .* found q, r"):
        chats.dialogues([{"q": "a", "r": "b"}], "rows")
    with pytest.raises(BadInput, match="no text of system, user or assistant"):
        chats.dialogues([{"messages": [{"role": "tool", "content": "x"}]}], "rows")


def test_labels_are_the_next_tokens_and_long_texts_are_cut_or_counted() -> None:
    tokenizer = Bytes()
    coded = [chats.encoded(tokenizer, talk(*t)) for t in (("ab", "cd"), ("a long question", "x"), ("a", "long answer"))]
    table, first, lost = chats.columns(coded, 8)
    assert (first, lost) == ([0, 2], 1)
    assert table["inputs"].shape == table["attention_mask"].shape == (2, 8)
    text, nexts = tokenizer.decode(table["inputs"][0].tolist()), tokenizer.decode(table["labels"][0].tolist())
    assert (text, nexts) == ("ab\ncd", "b\ncd\n")
    assert table["mask"].tolist()[0] == [False, False, True, True, True, False, False, False]
    assert tokenizer.decode(table["labels"][1][table["mask"][1]].tolist()) == "long ans"[:7]


def test_packing_loses_nothing_and_keeps_texts_apart() -> None:
    tokenizer, draw = Bytes(), torch.Generator().manual_seed(0)
    sizes = torch.randint(1, 9, (40,), generator=draw).tolist()
    coded = [chats.encoded(tokenizer, talk("q" * n, "a" * (n % 4 + 1))) for n in sizes]
    alone, _, _ = chats.columns(coded, 24)
    packed, _, lost = chats.columns(coded, 24, pack=True)
    assert lost == 0 and packed["inputs"].shape[1] == 24 and len(packed["inputs"]) < len(alone["inputs"])
    assert packed["mask"].sum() == alone["mask"].sum()
    found = sorted(
        tuple(row[at == k].tolist())
        for row, at in zip(packed["labels"], packed["segments"], strict=True)
        for k in range(int(at.max()) + 1)
    )
    wanted = sorted(tuple(r[a].tolist()) for r, a in zip(alone["labels"], alone["attention_mask"], strict=True))
    assert found == wanted


def llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    model: nn.Module = LlamaForCausalLM(LlamaConfig(vocab_size=300, max_position_embeddings=64, **sizes))
    return model.eval()


@torch.no_grad()
def test_a_text_in_a_packed_row_is_read_as_if_it_were_alone() -> None:
    model, tokenizer = llama(), Bytes()
    coded = [chats.encoded(tokenizer, talk(*t)) for t in (("ab", "cde"), ("f", "g"), ("hij", "kl"))]
    alone, _, _ = chats.columns(coded, 24)
    packed, _, _ = chats.columns(coded, 24, pack=True)
    assert len(packed["inputs"]) == 1
    one, many = outputs(model, packed)["logits"][0], outputs(model, alone)["logits"]
    for k in range(3):
        expected = many[k][alone["attention_mask"][k]]
        torch.testing.assert_close(one[packed["segments"][0] == k], expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(BadInput, match="LanguageModel cannot keep texts that share a row apart; leave `pack` out"):
        outputs(build({"net": "tiny_lm", "width": 16, "layers": 1, "heads": 1}, vocab=300), packed)


def test_a_file_of_conversations_becomes_tables(tmp_path: Path, pretrained: Path) -> None:
    rows = [{"question": f"what is {n}?", "answer": f"{n} " * (1 + n % 3)} for n in range(40)]
    rows.append({"question": "long " * 90, "answer": "never reached"})
    path = tmp_path / "talks.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    told: list[str] = []
    spec = {"name": str(path), "kind": "chat", "tokenizer": str(pretrained), "length": 80}
    splits = load(spec, note=told.append)
    assert sum(map(len, splits)) == 40 and told == ["1 of 41 conversations say nothing within 80 tokens: left out"]
    table = splits.train
    batch = next(Batches(table, 4))
    assert batch["mask"].any(1).all() and table.kind == "tokens" and 256 < table.vocab <= 300
    assert table.rows is not None and table.rows[0]["messages"][0]["role"] == "user"
    said = table["labels"][0][table["mask"][0]].tolist()
    assert Pretrained(str(pretrained)).decode(said).strip() == table.rows[0]["messages"][1]["content"].strip()
    packed = load({**spec, "pack": True, "length": 160}).train
    assert len(packed) < len(table) and "segments" in packed.columns and "attention_mask" not in packed.columns
    with pytest.raises(BadInput, match="has no conversations"):
        load({**spec, "name": str(_other(tmp_path))})


def _other(folder: Path) -> Path:
    path = folder / "other.jsonl"
    path.write_text("\n".join(json.dumps({"a": 1, "b": n}) for n in range(20)))
    return path
