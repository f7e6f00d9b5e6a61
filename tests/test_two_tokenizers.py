"""Two tokenizers: which bytes tokens are, how two tokenisations are aligned, and what losses make of it."""

import json
import math
import os
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from limbeck.adapters import words
from limbeck.adapters.likeness import distance, nearest_words, projection
from limbeck.adapters.pairing import retell, same_words
from limbeck.adapters.pieces import pieces_of, placed
from limbeck.core import knobs, maths
from limbeck.core.batches import Batches, Table
from limbeck.core.errors import BadInput
from limbeck.core.loop import Clock
from limbeck.core.nets import Nets
from limbeck.core.policy import rollout, starts, text, told_anew
from limbeck.core.reduce import mean
from limbeck.core.spans import align, counted, edges, joined, spread, sums
from limbeck.core.vocabularies import chained, ranked_distance, real_words
from limbeck.losses.logits.forward_kl import forward_kl
from limbeck.losses.tokens.alm import alm
from limbeck.losses.tokens.cot2align import CoT2Align
from limbeck.losses.tokens.dskd import DSKD
from limbeck.losses.tokens.gold import gold
from limbeck.losses.tokens.mined import mined
from limbeck.losses.tokens.uld import uld
from limbeck.losses.tokens.xtoken import xtoken
from limbeck.recipe import Net, Recipe
from limbeck.zoo.transformer import tiny_lm

LATIN = "the cat sat on the mat, then the other cats sat there. naïve café, Ångström; \t\ttabs and   spaces\n\n  end "
OTHER = "日本語のテキスト 한국어 Привет 😀👩‍👩‍👧 e\u0301 ½ ﬁ 12345\r\n 🇩🇪 שלום"
TEXT = (LATIN + OTHER + "\n") * 3


def _byte_level(folder: Path) -> words.Pretrained:
    """A GPT-2-like tokenizer of 300 ids or so, with a special token; it was never shown the other scripts."""
    tokenizers, transformers = pytest.importorskip("tokenizers"), pytest.importorskip("transformers")
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<|end|>"], initial_alphabet=alphabet, show_progress=False
    )
    made.train_from_iterator([LATIN] * 4, trainer)
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<|end|>", pad_token="<|end|>")
    fast.save_pretrained(folder)
    return words.Pretrained(str(folder))


def _fallback(folder: Path) -> words.Pretrained:
    """A sentencepiece-like tokenizer that writes what it does not know byte by byte, and begins texts with <bos>."""
    tokenizers, transformers = pytest.importorskip("tokenizers"), pytest.importorskip("transformers")
    seen = tokenizers.Tokenizer(tokenizers.models.BPE(unk_token="<unk>", fuse_unk=True))
    seen.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace(prepend_scheme="never")
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=120, special_tokens=["<unk>"], show_progress=False)
    seen.train_from_iterator([LATIN] * 4, trainer)
    model = json.loads(seen.to_str())["model"]
    special = ["<pad>", "<bos>", "<eos>", "<unk>"]
    names = [*special, *(f"<0x{b:02X}>" for b in range(256)), *(w for w in model["vocab"] if w != "<unk>")]
    merges = [tuple(m) if isinstance(m, list) else tuple(m.split(" ")) for m in model["merges"]]
    made = tokenizers.Tokenizer(
        tokenizers.models.BPE(
            {w: i for i, w in enumerate(names)}, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True
        )
    )
    made.normalizer = tokenizers.normalizers.Replace(" ", "\u2581")
    decoders = tokenizers.decoders
    made.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    made.post_processor = tokenizers.processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 1)])
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>", unk_token="<unk>"
    )
    fast.save_pretrained(folder)
    return words.Pretrained(str(folder))


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, object]:
    folder = tmp_path_factory.mktemp("tokenizers")
    return {
        "byte level": _byte_level(folder / "a"),
        "fallback": _fallback(folder / "b"),
        "chars": words.Chars([TEXT]),
        "bytes": words.Bytes(),
        "bpe": words.Merges([TEXT], 290),
    }


KINDS = ["byte level", "fallback", "chars", "bytes", "bpe"]


def _table(tokenizer: object, text: str = TEXT, length: int = 24) -> Table:
    columns = words.blocks(tokenizer.encode(text), length, getattr(tokenizer, "pad", 0))
    return Table(columns, "tokens", name="a text", tokenizer=tokenizer)


def _text(pieces: list[bytes], labels: Tensor, spans: Tensor, number: int) -> bytes:
    return b"".join(pieces[i] for i in labels[spans == number].tolist())


# ---- which bytes tokens are ------------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", KINDS)
def test_the_pieces_of_a_text_are_its_bytes(tokenizers: dict[str, object], kind: str) -> None:
    tokenizer = tokenizers[kind]
    pieces = pieces_of(tokenizer).words
    assert b"".join(pieces[i] for i in tokenizer.encode(TEXT)) == TEXT.encode()


def test_a_character_may_be_split_over_tokens(tokenizers: dict[str, object]) -> None:
    pieces = pieces_of(tokenizers["byte level"])
    smile = pieces.encode("😀")
    assert len(smile) > 1 and b"".join(pieces.words[i] for i in smile) == "😀".encode()
    assert all(len(pieces.words[i]) < 4 for i in smile)


def test_special_tokens_stand_for_nothing(tokenizers: dict[str, object]) -> None:
    pieces = pieces_of(tokenizers["fallback"])
    assert [pieces.words[i] for i in range(4)] == [b""] * 4
    assert pieces.start == 1 and pieces.end == 2 and len(pieces.spare) == 256
    assert pieces.ids()[b"a"] not in pieces.spare  # the letter, not the byte that stands in for it


def test_a_space_put_before_the_text_is_taken_off() -> None:
    assert placed([b" the", b" cat"], b"the cat") == [(0, 3), (3, 7)]
    assert placed([b" ", b"the"], b"the") == [(0, 0), (0, 3)]
    assert placed([b"a", b"", b"b"], "aéb".encode()) == [(0, 1), (1, 1), (3, 4)]  # an unknown character spoils itself


def test_words_cannot_be_aligned_and_say_so() -> None:
    with pytest.raises(BadInput, match=r"`words` keeps neither spaces nor capitals"):
        retell(_table(words.Chars([TEXT])), words.Words([TEXT]))


# ---- alignment -------------------------------------------------------------------------------------------------------
def test_stretches_by_hand() -> None:
    # student: ab|cd|e|f   teacher: a|bc|d|ef|g
    mine, theirs, counts = align([(0, 2), (2, 4), (4, 5), (5, 6)], [(0, 1), (1, 3), (3, 4), (4, 6), (6, 7)])
    assert mine == [0, 0, 1, 1] and theirs == [0, 0, 0, 1, -1]
    assert (counts.stretches, counts.single, counts.merged, counts.size, counts.aligned_size) == (2, 0, 2, 6, 6)
    assert (counts.student_aligned, counts.teacher_aligned, counts.teacher_tokens) == (4, 4, 5)


def test_gaps_and_tokens_without_text_are_left_out() -> None:
    mine, theirs, counts = align([(0, 1), (1, 1), (1, 2), (3, 4)], [(0, 1), (2, 4)])
    assert mine == [0, -1, -1, -1] and theirs == [0, -1]
    assert counts.single == 1 and counts.aligned_size == 1


@pytest.mark.parametrize("teacher", KINDS)
@pytest.mark.parametrize("student", KINDS)
def test_equal_numbers_cover_the_same_bytes(tokenizers: dict[str, object], student: str, teacher: str) -> None:
    table, report = retell(_table(tokenizers[student]), tokenizers[teacher])
    mine, theirs = pieces_of(tokenizers[student]).words, pieces_of(tokenizers[teacher]).words
    stretches = 0
    for row in range(len(table)):
        spans, others = table["student_spans"][row], table["teacher_spans"][row]
        assert set(spans.tolist()) - {-1} == set(others.tolist()) - {-1}
        for line in (spans, others):  # in order
            there = [n for n in line.tolist() if n >= 0]
            assert all(b - a in (0, 1) for a, b in pairwise(there))
        for number in range(int(spans.max()) + 1):
            stretches += 1
            text = _text(mine, table["labels"][row], spans, number)
            assert text and text == _text(theirs, table["teacher_labels"][row], others, number)
    assert stretches == report.counts.stretches
    assert not table["teacher_mask"][table["teacher_spans"] < 0].any() or report.counts.teacher_aligned > 0
    assert report.counts.aligned_size > 0.7 * report.counts.size
    if student == teacher and pieces_of(tokenizers[teacher]).start is None:
        assert report.counts.merged == 0 and report.counts.student_aligned == report.counts.student_tokens
        assert torch.equal(table["teacher_labels"][table["teacher_mask"]], table["labels"][table["mask"]])


def test_rows_of_one_text_are_read_together(tokenizers: dict[str, object]) -> None:
    """Cut from the whole text, the teacher's tokens are those of the whole text."""
    table, _ = retell(_table(tokenizers["chars"]), tokenizers["bpe"])
    whole = tokenizers["bpe"].encode(TEXT)
    row = table["teacher_labels"][2][table["teacher_mask"][2]].tolist()
    assert any(whole[i : i + len(row)] == row for i in range(len(whole)))


def test_prompts_special_tokens_and_the_start_of_a_text(tokenizers: dict[str, object]) -> None:
    tokenizer = tokenizers["byte level"]
    end = tokenizer.inner.eos_token_id
    rows, masks = [], []
    for prompt, answer in (("2+2? ", "four é"), ("the cat ", "sat")):
        ids = [end, *tokenizer.encode(prompt), *tokenizer.encode(answer), end]
        rows.append(ids)
        masks.append([False] * len(tokenizer.encode(prompt)) + [True] * (len(tokenizer.encode(answer)) + 1))
    width = max(map(len, rows))
    line = torch.tensor([r + [end] * (width - len(r)) for r in rows])
    mask = torch.tensor([m + [False] * (width - 1 - len(m)) for m in masks])
    real = torch.arange(width - 1) < torch.tensor([len(r) - 1 for r in rows])[:, None]
    columns = {"inputs": line[:, :-1], "labels": line[:, 1:], "mask": mask, "attention_mask": real}
    table, report = retell(Table(columns, "tokens", tokenizer=tokenizer), tokenizers["fallback"])
    other = pieces_of(tokenizers["fallback"])
    assert (table["teacher_inputs"][:, 0] == other.start).all()
    said = [other.words[i] for i in table["teacher_labels"][0][table["teacher_mask"][0]].tolist()]
    assert b"".join(said).decode() == "four é"  # the answer alone is predicted, and then the end
    assert table["teacher_labels"][0][table["teacher_mask"][0]][-1] == other.end
    assert report.unread == 0
    hidden = {"inputs": line[:, :-1], "labels": torch.where(mask, line[:, 1:], -100), "mask": mask}
    other_way, _ = retell(Table(hidden, "tokens", tokenizer=tokenizer), tokenizers["fallback"])
    for name in ("teacher_inputs", "teacher_labels", "teacher_mask", "student_spans"):
        assert torch.equal(other_way[name], table[name])


def test_an_unknown_character_is_left_out_and_counted(tokenizers: dict[str, object]) -> None:
    poor = words.Chars([LATIN])
    _, report = retell(_table(tokenizers["bytes"], "naïve 日 café"), poor)
    assert report.unread == 1 and report.counts.student_tokens - report.counts.student_aligned == 3
    assert "1 teacher tokens that are not in the text" in str(report)


def test_constants_come_with_every_batch(tokenizers: dict[str, object]) -> None:
    table, _ = retell(_table(tokenizers["chars"]), tokenizers["bpe"])
    batch = next(Batches(table, 4))
    assert torch.equal(batch["same_words"], table.constants["same_words"]) and batch["teacher_inputs"].shape[0] == 4
    told = table.retold()
    assert torch.equal(told["labels"], table["teacher_labels"]) and told.vocab == 290 and not told.constants
    with pytest.raises(BadInput, match="column and a constant called `inputs`"):
        Table(table.columns, constants={"inputs": torch.zeros(1)})


@pytest.mark.parametrize("teacher", ["fallback", "bpe"])
def test_new_texts_are_read_as_the_table_was(tokenizers: dict[str, object], teacher: str) -> None:
    """Rows that do not follow one another are texts of their own, as those are that a student writes."""
    plain = _table(tokenizers["byte level"]).select([5, 0, 7, 2])
    table, _ = retell(plain, tokenizers[teacher])
    assert table.retell is not None and table.retold().retell is None
    told = table.retell(plain["inputs"], plain["labels"], plain["mask"])
    for name, column in told.items():
        assert torch.equal(column, {**table.constants, **table.columns}[name]), name
    late = plain["mask"] & (torch.arange(plain["mask"].shape[1]) >= 9)
    part = table.retell(plain["inputs"], plain["labels"], late)
    assert torch.equal(part["teacher_labels"], told["teacher_labels"])  # the prompt is read, but does not count
    assert 0 < part["teacher_mask"].sum() < told["teacher_mask"].sum()
    words_of = pieces_of(tokenizers[teacher]).words
    for row in range(4):
        said = b"".join(words_of[i] for i in part["teacher_labels"][row][part["teacher_mask"][row]].tolist())
        asked = plain["labels"][row][late[row]].tolist()
        assert said and said in b"".join(pieces_of(tokenizers["byte level"]).words[i] for i in asked)


def test_two_tokenizers_meet_on_what_the_student_writes(tokenizers: dict[str, object]) -> None:
    table, _ = retell(_table(tokenizers["byte level"]), tokenizers["bpe"])
    torch.manual_seed(0)
    nets = Nets(
        student=tiny_lm(vocab=table.vocab, width=16, layers=1),
        teacher=tiny_lm(vocab=290, width=16, layers=1),
    )
    batch = {**next(Batches(table, 4)), "progress": 0.0}
    spec = knobs.make("distillspec", {"match": ({"gold": {"weight": 2.0}},), "prompt": 5})
    new = spec.texts(nets, batch)
    assert torch.equal(new["inputs"][:, :5], batch["inputs"][:, :5]) and not torch.equal(new["labels"], batch["labels"])
    mine, theirs = pieces_of(tokenizers["byte level"]).words, pieces_of(tokenizers["bpe"]).words
    for row in range(4):
        spans, others = new["student_spans"][row], new["teacher_spans"][row]
        assert int(spans.max()) > 3
        for number in range(int(spans.max()) + 1):
            text = _text(mine, new["labels"][row], spans, number)
            assert text and text == _text(theirs, new["teacher_labels"][row], others, number)
    spec.setup(nets, batch)
    torch.manual_seed(1)
    (player, parts), *rest = spec.step(nets, batch, Clock(0, 10))
    assert player == "student" and not rest
    torch.manual_seed(1)
    same = spec.texts(nets, batch)
    outs = nets.run("student", same)["logits"], nets.run("teacher", same)["logits"]
    told = [same[n] for n in ("labels", "teacher_labels", "student_spans", "teacher_spans", "same_words")]
    value = mean(gold(*outs, *told, same["mask"], same["teacher_mask"]), same["mask"])
    assert float(parts["gold"]) == pytest.approx(2 * float(value), rel=1e-5)
    parts["gold"].value.backward()
    assert all(p.grad is None for p in nets.teacher.parameters())
    assert any(p.grad.abs().sum() > 0 for p in nets.student.parameters())
    with pytest.raises(BadInput, match="`target` must be 0"):
        knobs.make("distillspec", {"match": ("gold",), "draft": 0.5, "target": 0.5}).setup(nets, batch)
    with pytest.raises(BadInput, match="only `distillspec` reads what the student writes"):
        knobs.make("gkd", {}).setup(nets, batch)
    with pytest.raises(BadInput, match="only `distillspec` reads what the student writes"):
        rollout(batch, lambda p, n, **_: torch.ones(4, p.shape[1] + n, dtype=torch.long))


def test_prompts_are_left_out_on_both_sides_of_a_text_that_is_given(tokenizers: dict[str, object]) -> None:
    table, _ = retell(_table(tokenizers["byte level"]).select([5, 0, 7, 2]), tokenizers["bpe"])
    batch = next(Batches(table, 4))
    given = knobs.make("distillspec", {"match": ("gold",), "draft": 0.0, "prompt": 9}).texts({}, batch)
    anew = told_anew(batch, text(batch), starts(batch, 9), retell=True)
    assert given.keys() == anew.keys()
    assert all(torch.equal(given[name], anew[name]) for name in given if isinstance(given[name], Tensor))
    assert 0 < given["teacher_mask"].sum() < batch["teacher_mask"].sum()
    whole = knobs.make("distillspec", {"match": ("gold",), "draft": 0.0}).texts({}, batch)
    assert torch.equal(whole["teacher_mask"], batch["teacher_mask"])


def _filled_up(net: nn.Module, vocab: int) -> nn.Module:
    """The same network with a head and embedding of more rows, which it is surest of."""
    wide = tiny_lm(vocab=vocab, width=16, layers=1)
    old, new = net.state_dict(), wide.state_dict()
    for name, value in old.items():
        new[name] = torch.cat([value, 9 * torch.ones_like(new[name][len(value) :])]) if name in new else value
    wide.load_state_dict(new)
    return wide


@pytest.mark.parametrize(
    "loss", ["uld", "gold", "alm", {"alm": {"certainty": 0.1}}, "mined", "xtoken", "dskd", "cot2align"], ids=str
)
def test_rows_that_fill_up_a_head_are_no_words(tokenizers: dict[str, object], loss: object) -> None:
    constants = ("same_words", "nearest_words", "word_starts", "projection")
    table, _ = retell(_table(tokenizers["byte level"]), tokenizers["bpe"], constants=constants)
    batch = {**next(Batches(table, 4)), "words": torch.tensor([table.vocab])}
    torch.manual_seed(0)
    nets = {name: tiny_lm(vocab=n, width=16, layers=1) for name, n in (("student", table.vocab), ("teacher", 290))}
    found = []
    for more in (0, 6):
        rows = {"student": table.vocab + more, "teacher": 290 + more}
        filled = Nets(**{name: _filled_up(net, rows[name]) for name, net in nets.items()})
        spec = knobs.make("distillspec", {"match": (loss,), "draft": 0.0})
        torch.manual_seed(1)
        spec.setup(filled, batch)
        (part,) = spec.pair.parts(filled, batch, 0.0).values()
        found.append(float(part))
    assert found[1] == pytest.approx(found[0], rel=1e-5) and found[0] > 0


# ---- vocabularies ----------------------------------------------------------------------------------------------------
def test_same_words_are_the_same_bytes(tokenizers: dict[str, object]) -> None:
    mine, theirs = pieces_of(tokenizers["byte level"]), pieces_of(tokenizers["fallback"])
    pairs = same_words(mine, theirs).tolist()
    assert len(pairs) > 200 and len({i for i, _ in pairs}) == len(pairs)
    assert all(mine.words[i] == theirs.words[j] for i, j in pairs)


def test_nearest_words_are_nearest(tokenizers: dict[str, object]) -> None:
    mine, theirs = pieces_of(tokenizers["fallback"]), pieces_of(tokenizers["bpe"])
    found = nearest_words(mine, theirs).tolist()
    for j, i in enumerate(found):
        piece = theirs.words[j]
        if piece in mine.ids():
            assert mine.words[i] == piece
        elif i >= 0 and (core := piece.strip(b" ")):
            alike = [w for w in mine.ids() if w.strip(b" ")[:3] == core[:3]]
            assert not alike or distance(core, mine.words[i].strip(b" ")) == min(
                distance(core, w.strip(b" ")) for w in alike
            )
    assert distance(b"kitten", b"sitting") == 3 and distance(b"", b"ab") == 2


def test_rows_of_the_projection(tokenizers: dict[str, object]) -> None:
    mine, theirs = pieces_of(tokenizers["bpe"]), pieces_of(tokenizers["chars"])
    made = projection(mine, theirs)
    ids, weights = made["projection"], made["projection_weights"]
    rows = torch.zeros(290, len(theirs.words)).index_put(tuple(ids.T), weights)
    assert (weights >= 0).all() and int((rows > 0).sum(1).max()) <= 4
    there = rows.sum(1) > 0
    assert torch.allclose(rows.sum(1)[there], torch.ones(int(there.sum())))
    i, j = mine.ids()[b"t"], theirs.ids()[b"t"]
    assert rows[i, j] == 1  # the same word is itself
    same = projection(mine, mine)
    assert torch.equal(same["projection"][:, 0], same["projection"][:, 1])


def test_heads_of_one_family_that_are_padded_differently() -> None:
    draw = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(4, 12, generator=draw), torch.randn(4, 16, generator=draw)
    mine, theirs, dropped, lost = real_words(student, teacher, 10)
    assert mine.shape == theirs.shape == (4, 10)
    assert torch.allclose(dropped, student.softmax(-1)[:, 10:].sum(-1))
    assert torch.allclose(lost, teacher.softmax(-1)[:, 10:].sum(-1))
    with pytest.raises(ValueError, match=r"`words` must be in \[1, 12\]"):
        real_words(student, teacher, 13)


# ---- stretches as tensors --------------------------------------------------------------------------------------------
def test_stretches_with_a_masked_place_do_not_count() -> None:
    mine, theirs = torch.tensor([[0, 1, 1, 2, -1]]), torch.tensor([[0, 0, 1, 2]])
    mask = torch.tensor([[True, True, False, True, True]])
    assert counted(mine, theirs).tolist() == [[True, True, True, False, False]]
    assert counted(mine, theirs, mask).tolist() == [[True, False, True, False, False]]
    assert (
        counted(mine, theirs, mask, torch.tensor([[True, False, True, True]])).tolist()[0]
        == [False, False, True] + [False] * 2
    )
    values = torch.tensor([[1.0, 2.0, 4.0, 8.0]])
    assert sums(values, theirs, 3).tolist() == [[3.0, 4.0, 8.0]]
    assert [e.tolist() for e in edges(theirs, 3)] == [[[0, 2, 3]], [[1, 2, 3]]]
    assert spread(torch.tensor([[5.0, 6.0, 7.0]]), mine).tolist() == [[5.0, 3.0, 3.0, 7.0, 0.0]]


# ---- losses ----------------------------------------------------------------------------------------------------------
B, T, V = 3, 4, 6
ONE = torch.arange(T).expand(B, T)


def _logits(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


LABELS = torch.arange(B * T).view(B, T) % V


def test_alm_is_least_where_the_likelihoods_are_equal() -> None:
    student, teacher = _logits(B, T, V).requires_grad_(), _logits(B, T, V)
    same = alm(student, teacher, LABELS, LABELS, ONE, ONE, temperature=1.0)
    same.sum().backward()
    assert student.grad is not None and student.grad.abs().max() < 1e-5
    p = teacher.softmax(-1).gather(-1, LABELS.unsqueeze(-1)).squeeze(-1)
    assert torch.allclose(same, -(p * p.log() + (1 - p) * (1 - p).log()), atol=1e-4)
    other = alm(_logits(B, T, V, seed=1), teacher, LABELS, LABELS, ONE, ONE, temperature=1.0)
    assert (other > same).all()


def test_alm_joins_stretches_that_end_within_a_word() -> None:
    spans, starts = ONE[:1], torch.tensor([True] + [False] * (V - 1))
    teacher = torch.zeros(1, T, V, dtype=torch.float64)
    teacher[0, 1, 1:] = -20.0  # after the first label a word surely begins, after the second and third surely not
    teacher[0, 2:, 0] = -20.0
    student, labels = _logits(1, T, V, seed=6), LABELS[:1]
    value = alm(student, teacher, labels, labels, spans, spans, None, None, starts, certainty=0.1)
    merged = torch.tensor([[0, 1, 1, 1]])
    assert torch.allclose(value, alm(student, teacher, labels, labels, merged, merged))
    assert joined(torch.tensor([[0, 1, -1, 2]]), torch.tensor([[False, True, True]])).tolist() == [[0, 0, -1, 1]]


def test_uld_sees_ranks_alone() -> None:
    teacher = _logits(B, T, V)
    assert uld(teacher[..., torch.randperm(V)], teacher).abs().max() < 1e-12
    padded = torch.cat([teacher, torch.full((B, T, 3), -1e4, dtype=torch.float64)], -1)
    other = _logits(B, T, V, seed=2)
    assert torch.allclose(uld(other, padded), uld(other, teacher))
    far = uld(100 * other, 0 * teacher)
    assert (far > 0).all() and (far <= 2).all()
    assert ranked_distance(torch.tensor([1.0, 0.0]), torch.full((4,), 0.25)) == pytest.approx(1.5)


def test_gold_of_one_tokenizer_matches_every_word() -> None:
    student, teacher = _logits(B, T, V, seed=3), _logits(B, T, V)
    every = torch.arange(V).repeat(2, 1).T
    value = gold(student, teacher, LABELS, LABELS, ONE, ONE, every)
    assert torch.allclose(value, maths.js(student, teacher, 0.5))


def test_gold_follows_the_chain_rule() -> None:
    logits, spans = _logits(B, T, V), torch.tensor([[0, 0, 0, 1]]).expand(B, T)
    said = logits.log_softmax(-1).gather(-1, LABELS.unsqueeze(-1)).squeeze(-1)
    merged = chained(logits, LABELS, spans, 2)
    assert torch.allclose(merged[:, 0].gather(1, LABELS[:, 2:3])[:, 0], said[:, :3].sum(1).exp())
    assert torch.allclose(merged[:, 1], logits[:, 3].softmax(-1))


def test_mined_of_one_tokenizer_is_forward_kl_and_else_cross_entropy() -> None:
    student, teacher, near = _logits(B, T, V, seed=4), _logits(B, T, V), torch.arange(V)
    assert torch.allclose(mined(student, teacher, LABELS, ONE, ONE, near), forward_kl(student, teacher))
    none = torch.full((B, T), -1)
    ce = -student.log_softmax(-1).gather(-1, LABELS.unsqueeze(-1)).squeeze(-1)
    assert torch.allclose(mined(student, teacher, LABELS, none, none, near), ce)


def test_xtoken_of_one_tokenizer_is_forward_kl() -> None:
    student, teacher = _logits(B, T, V, seed=5), _logits(B, T, V)
    every, ones = torch.arange(V).repeat(2, 1).T, torch.ones(V, dtype=torch.float64)
    value = xtoken(student, teacher, ONE, ONE, every, ones)
    assert torch.allclose(value, forward_kl(student, teacher), atol=1e-7)
    few = teacher.flatten(0, 1).amax(0).topk(4).indices.sort().values  # columns cut before the product, or after it
    p = student.softmax(-1)[..., few]
    cut = maths.kl_logprobs(teacher[..., few].log_softmax(-1), (p / p.sum(-1, keepdim=True)).log())
    assert torch.allclose(xtoken(student, teacher, ONE, ONE, every, ones, top=4), cut, atol=1e-7)


def test_words_at_masked_places_crowd_out_none_of_xtokens() -> None:
    student, teacher = _logits(B, T, V, seed=5), _logits(B, T, V)
    every, ones = torch.arange(V).repeat(2, 1).T, torch.ones(V, dtype=torch.float64)
    padding = 9 + _logits(B, 2, V)
    spans, mask = torch.cat([ONE, torch.full((B, 2), -1)], 1), torch.arange(T + 2).expand(B, -1) < T
    padded = xtoken(student, torch.cat([teacher, padding], 1), ONE, spans, every, ones, None, mask, top=4)
    assert torch.equal(padded, xtoken(student, teacher, ONE, ONE, every, ones, top=4))


def test_dskd_stops_where_it_says() -> None:
    torch.manual_seed(0)
    loss = DSKD((B, T, 4), (B, T + 1, 6))
    floats = {
        "student_hidden": (B, T, 4), "teacher_hidden": (B, T + 1, 6), "student_vocab_logits": (B, T, V),
        "teacher_vocab_logits": (B, T + 1, 9), "student_head": (V, 4), "teacher_head": (9, 6),
        "student_embedding": (V, 4), "teacher_embedding": (9, 6),
    }  # fmt: skip
    have = {name: _logits(*shape).float().requires_grad_() for name, shape in floats.items()}
    ids = torch.zeros(B, T + 1, dtype=torch.long)
    loss(**have, inputs=LABELS, labels=LABELS, teacher_inputs=ids, teacher_labels=ids).sum().backward()
    learns = {name for name, x in have.items() if x.grad is not None and x.grad.any()}
    assert learns <= {"student_hidden", "student_vocab_logits"} and "student_hidden" in learns
    assert all(p.grad is not None and p.grad.any() for p in loss.parameters())


def test_cot2align_of_equal_sequences_is_nothing_and_of_single_tokens_their_cost() -> None:
    states = _logits(B, T, 5).float()
    loss = CoT2Align((B, T, 5), (B, T, 5), (B, T, 5), (B, T, 5), epsilon=0.005, iterations=300)
    with torch.no_grad():
        loss.of_tokens.weight.copy_(torch.eye(5))
        loss.of_hidden.weight.copy_(torch.eye(5))
    order = torch.randperm(T)
    assert loss(states, states[:, order], states, states[:, order]).abs().max() < 1e-3
    one, other = states[:, :1], states[:, 1:2]
    cost = 1 - torch.cosine_similarity(one[:, 0], other[:, 0])
    assert torch.allclose(loss(one, other, one, other), 2 * cost, atol=1e-5)


# ---- recipes ---------------------------------------------------------------------------------------------------------
def _recipe(**changes: object) -> Recipe:
    body = {
        "name": "two",
        "teacher": {
            "net": "tiny_lm", "width": 16, "layers": 1, "tokenizer": "bpe:270", "train": {"steps": 2, "batch_size": 8}
        },
        "student": {"net": "tiny_lm", "width": 16, "layers": 1},
        "data": {"name": "shakespeare_small", "length": 32, "limit": 16, "test_limit": 8},
        "match": ["ce", "alm", "mined"],
        "train": {"steps": 2, "batch_size": 8},
        "measure": ["calibration"],
        "metric": "nll",
    }  # fmt: skip
    return Recipe.model_validate({**body, **changes})


def test_a_recipe_names_the_tokenizer_of_its_teacher(tmp_path: Path) -> None:
    from limbeck.verbs import teach
    from limbeck.verbs.build import setting

    notes: list[str] = []
    made = setting(_recipe(), tmp_path / "run", lambda e: notes.append(str(e.get("note", ""))), False)
    assert made.teacher is not None and made.teacher.vocab == 270  # trained in its own tokens
    assert made.build("student").vocab == made.splits.train.vocab != 270
    assert {"same_words", "nearest_words", "word_starts", "words", "teacher_words"} == set(made.splits.train.constants)
    assert any("stretches" in note and "left out" in note for note in notes)
    outcome, _ = teach.run(made, "teacher", 0, tmp_path / "teacher")
    size = sum(map(len, (pieces_of(made.splits.test.teacher_tokenizer).words[i] for i in made.splits.test[
        "teacher_labels"][made.splits.test["teacher_mask"]].tolist())))  # fmt: skip
    bits = outcome.metrics["nll"] * int(made.splits.test["teacher_mask"].sum()) / math.log(2) / size
    assert outcome.metrics["bits_per_byte"] == pytest.approx(bits)
    student, _ = teach.run(made, "student", 0, tmp_path / "student")
    assert 0 < student.metrics["bits_per_byte"] < 10


def test_the_key_does_not_change_what_other_recipes_are() -> None:
    assert "tokenizer" not in Net(net="tiny_lm").model_dump()
    assert Net(net="tiny_lm", tokenizer="bytes").model_dump()["tokenizer"] == "bytes"


def test_only_a_teacher_that_is_asked_has_a_tokenizer_of_its_own() -> None:
    from limbeck.verbs.check import check_names

    with pytest.raises(BadInput, match="only a teacher that is asked while a student learns"):
        check_names(_recipe(student={"net": "tiny_lm", "tokenizer": "bytes"}))


# ---- real vocabularies -----------------------------------------------------------------------------------------------
@pytest.mark.skipif(
    not os.environ.get("LIMBECK_TWO_TOKENIZERS"), reason="LIMBECK_TWO_TOKENIZERS names no two folders, a colon between"
)
def test_real_vocabularies() -> None:
    """Such as those of SmolLM2 and Gemma 3: every stretch is the same bytes, and all but the edges is aligned."""
    first, second = map(words.Pretrained, os.environ["LIMBECK_TWO_TOKENIZERS"].split(":"))
    table, report = retell(_table(first, TEXT * 5, 128), second)
    mine, theirs = pieces_of(first).words, pieces_of(second).words
    for row in range(len(table)):
        spans, others = table["student_spans"][row], table["teacher_spans"][row]
        for number in range(int(spans.max()) + 1):
            text = _text(mine, table["labels"][row], spans, number)
            assert text and text == _text(theirs, table["teacher_labels"][row], others, number)
    assert report.unread == 0 and report.counts.aligned_size > 0.97 * report.counts.size
