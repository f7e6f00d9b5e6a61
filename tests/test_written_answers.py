"""Measures of what a student writes: BLEU and ROUGE-L against other libraries' numbers, and how answers are made."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import limbeck
from limbeck.adapters.files import load
from limbeck.adapters.words import Words
from limbeck.core.batches import Table
from limbeck.core.errors import BadInput
from limbeck.core.ngrams import bleu, common, overlap, sentence_bleu
from limbeck.verbs.answers import answers, asked, words
from limbeck.verbs.setting import judge


def numbered(line: str) -> list[int]:
    return [ord(letter) for letter in line.split()]


# ---------------------------------------------------------------- the numbers


@pytest.mark.parametrize(
    "found, wanted, value",  # as sacrebleu 2.6.0 has them, words given apart
    [
        ("a b c d e", "a c b e d", 15.97357760615681),
        ("a b", "a b", 0.0),
        ("a b c d e f", "a b c d", 50.81327481546149),
        ("a b c d", "a b c d e f", 60.653065971263366),
        ("a b c d", "e f g h", 0.0),
        ("", "a b c d", 0.0),
    ],
)
def test_bleu_of_small_sets(found: str, wanted: str, value: float):
    assert 100 * bleu(overlap([(numbered(found), numbered(wanted))])) == pytest.approx(value, abs=1e-9)


def test_bleu_of_one_text_is_smoothed():
    assert 100 * sentence_bleu(numbered("a b c d e"), numbered("a c b e d")) == pytest.approx(15.97357760615681)
    assert sentence_bleu(numbered("a b"), numbered("a b")) == pytest.approx(1.0)
    # unigrams 2 of 3, no bigram of 2 (half a one), no trigram of 1 (a quarter), no fourgram at all; one word is missing
    assert sentence_bleu([1, 9, 3], [1, 2, 3, 4]) == pytest.approx(
        (2 / 3 * 0.5 / 2 * 0.25) ** 0.25 * 2.718281828 ** (-1 / 3)
    )
    assert sentence_bleu([], [1]) == 0 and sentence_bleu([1, 1, 1, 1], [1, 2, 3, 4], order=1) == pytest.approx(1 / 4)


def test_the_longest_common_subsequence_is_that_of_the_usual_table():
    g = torch.Generator().manual_seed(0)
    for _ in range(40):
        a, b = (torch.randint(4, (int(torch.randint(0, 90, (1,), generator=g)),), generator=g).tolist() for _ in "ab")
        best = [[0] * (len(b) + 1) for _ in range(len(a) + 1)]
        for i, x in enumerate(a):
            for j, y in enumerate(b):
                best[i + 1][j + 1] = best[i][j] + 1 if x == y else max(best[i][j + 1], best[i + 1][j])
        assert common(a, b) == best[-1][-1]


def test_words_are_those_of_the_usual_tokenizer():
    said = "It's 3,000.5 km-long (a 'test'), said A.B. in 1-2 lines: 5. &amp; \"so\"\nDas heißt\u2026"
    wanted = "It's 3,000.5 km-long ( a 'test' ) , said A . B . in 1 - 2 lines : 5 . & \" so \" Das heißt\u2026"
    assert words(said) == wanted.split() and words(" ") == []


# ---------------------------------------------------------------- answers


class Parrot(nn.Module):
    """After the first end of line it says the prompt's tokens again; `late` says them one too late."""

    def __init__(self, size: int, end: int, late: int = 0) -> None:
        super().__init__()
        self.size, self.end, self.late = size, end, late

    def forward(self, tokens: Tensor) -> Tensor:
        out = torch.zeros(*tokens.shape, self.size)
        for b, row in enumerate(tokens.tolist()):
            for place in range(len(row)):
                line = row[: place + 1]
                if self.end in line:
                    prompt = line.index(self.end)
                    said = place - prompt - self.late
                    out[b, place, row[said] if 0 <= said <= prompt else self.end] = 9.0
        return out


def chats(folder: Path, rows: list[tuple[str, str]], **more: Any) -> Table:
    lines = [json.dumps({"question": q, "answer": a}) for q, a in rows]
    for part in ("train", "validation", "test"):
        (folder / f"{part}.jsonl").write_text("\n".join(lines) + "\n")
    given = {"name": str(folder), "kind": "chat", "tokenizer": "bpe:300", "length": 40, **more}
    return load(given).test


ROWS = [("the cat sat on it", "the cat sat on it"), ("one two", "one two"), ("a dog", "a big dog")]


@pytest.mark.parametrize("pack", [False, True])
def test_answers_are_written_up_to_the_end_and_compared_in_words(pack: bool, tmp_path: Path):
    table = chats(tmp_path, ROWS, pack=pack, length=80 if pack else 40)
    told = asked(table)
    assert told.end == 11 and len(told.answers) == 3  # the end of a line among bytes counted from 1
    assert len(table) == (1 if pack else 3)
    read: Any = table.tokenizer
    prompts = [read.decode(p[:n].tolist()) for p, n in zip(told.prompts, told.lengths.tolist(), strict=True)]
    assert prompts == [f"{q}\n" for q, _ in ROWS]
    net = Parrot(read.size, 11)
    found = answers(net, table, batch_size=2)
    mine, its = (found[name] for name in ("student_answers", "real_answers"))
    assert torch.equal(mine[:2], its[:2, : mine.shape[1]]) and (mine >= 0).sum(1).tolist() == [5, 2, 2]
    assert (its >= 0).sum(1).tolist() == [5, 2, 3]
    figures = judge(net, table, ["rouge_l", "bleu", "accuracy"] if not pack else ["rouge_l", "bleu"])
    assert list(figures)[:2] == ["rouge_l", "bleu"]
    assert figures["rouge_l"] == pytest.approx(100 * (1 + 1 + 4 / 5) / 3) and 0 < figures["bleu"] < 100
    late = judge(Parrot(read.size, 11, late=1), table, ["rouge_l"])["rouge_l"]
    assert late < figures["rouge_l"]


def test_each_answer_of_a_conversation_is_asked_for_after_all_that_was_said(tmp_path: Path):
    turns = [("user", "a"), ("assistant", "b c"), ("user", "d"), ("assistant", "e")]
    line = json.dumps({"messages": [{"role": r, "content": c} for r, c in turns]})
    (tmp_path / "test.jsonl").write_text(line + "\n" + line + "\n")
    (tmp_path / "train.jsonl").write_text(line + "\n")
    table = load({"name": str(tmp_path), "kind": "chat", "tokenizer": "bytes", "length": 40}).test
    told = asked(table)
    decoded = [table.tokenizer.decode(p[:n].tolist()) for p, n in zip(told.prompts, told.lengths, strict=True)]  # type: ignore[union-attr]
    assert decoded == ["a\n", "a\nb c\nd\n"] * 2
    assert [table.tokenizer.decode(a) for a in told.answers] == ["b c\n", "e\n"] * 2  # type: ignore[union-attr]


def test_what_a_tokenizer_cannot_say_equals_nothing():
    class Unknowing(nn.Module):
        def forward(self, tokens: Tensor) -> Tensor:
            out = torch.zeros(*tokens.shape, read.size)
            out[..., 1] = 1.0
            return out

    read = Words(["a b\n"], lines=True)
    assert read.symbols[2] == "\n" and read.decode(read.encode("a b\nz")) == "a b \n \ufffd"
    line = read.encode("a\nz z\n")
    columns = {"inputs": torch.tensor([line[:-1]]), "labels": torch.tensor([line[1:]])}
    columns["mask"] = torch.tensor([[False, True, True, True]])
    found = answers(Unknowing(), Table(columns, "tokens", tokenizer=read))
    assert found["student_answers"].tolist() == [[0, 0, 0]] and found["real_answers"].tolist() == [[1, 1]]


def test_data_without_prompts_is_refused_before_anything_runs(tmp_path: Path):
    recipe = {"student": {"net": "tiny_lm", "width": 8, "layers": 1, "heads": 1}, "match": ["ce"], "steps": 2}
    (tmp_path / "text.txt").write_text("to be or not to be " * 60)
    data = {"name": str(tmp_path / "text.txt"), "length": 16}
    with pytest.raises(BadInput, match=r"has no prompts: every token counts.*kind: chat"):
        limbeck.teach(None, recipe["student"], data, match=["ce"], steps=2, measure=["bleu"], folder=tmp_path / "run")
    with pytest.raises(BadInput, match="need prompts and answers in tokens, which dots has not"):
        asked(Table({"inputs": torch.zeros(2, 3), "labels": torch.zeros(2).long()}, name="dots"))


def test_long_conversations_are_left_out_whole(tmp_path: Path):
    table = chats(tmp_path, [*ROWS, ("x " * 30, "y " * 30)], whole=True, tokenizer="bytes", length=60)
    assert len(table) == 3 and len(chats(tmp_path, [*ROWS, ("x " * 10, "y " * 30)], tokenizer="bytes", length=60)) == 4
