"""Data by name and path: every kind of source, splits, subsets, scaling, streams, and the sentences for bad input."""

import bz2
import gzip
import hashlib
import io
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.numpy import save_file

from limbeck.adapters import embedded
from limbeck.adapters.files import Source, load, stream
from limbeck.adapters.readers import rows_of
from limbeck.adapters.words import Bytes, Chars, Hashed, Words, blocks, padded
from limbeck.core.batches import Batches, Splits, Table
from limbeck.core.errors import BadInput, MissingExtra

# ---- embedded ------------------------------------------------------------------------------------------------------


def test_fashion_is_balanced_normalised_and_within_its_budget() -> None:
    splits = load("fashion_mnist_small")
    assert [len(part) for part in splits] == [6222, 778, 2500]
    assert splits.train.classes is not None and splits.train.classes[9] == "Ankle boot"
    assert splits.test["labels"].bincount().tolist() == [250] * 10
    for part in splits:
        assert part.kind == "images" and part["inputs"].shape[1:] == (1, 28, 28)
        counts = part["labels"].bincount(minlength=10)
        assert counts.max() - counts.min() <= 1
    assert abs(float(splits.train["inputs"].mean())) < 0.01 and abs(float(splits.train["inputs"].std()) - 1) < 0.01
    assert splits.train.mean == splits.test.mean == tuple(embedded.record()["fashion_mnist_small"]["mean"])
    assert float(splits.train["inputs"].min()) == pytest.approx(splits.train.black[0], abs=1e-5)
    assert sum(f.stat().st_size for f in embedded.FOLDER.iterdir() if f.suffix in (".npz", ".bz2")) <= 4_000_000


def test_fashion_is_upright() -> None:
    """Trousers are taller than wide: the stored pictures are transposed, the loaded ones are not."""
    inputs, labels = embedded.load("fashion_mnist_small").parts["test"]
    assert labels is not None
    lit = inputs[labels == 1] > 30
    assert lit.any(2).sum(1).mean() > 1.5 * lit.any(1).sum(1).mean()


@pytest.mark.parametrize("name", ["fashion_mnist_small", "shakespeare_small"])
def test_embedded_files_are_what_the_record_says(name: str) -> None:
    known = embedded.record()[name]
    body = (embedded.FOLDER / known["file"]).read_bytes()
    assert len(body) == known["bytes"] and hashlib.sha256(body).hexdigest() == known["sha256"]
    assert known["licence"] and known["source"]
    if name == "shakespeare_small":
        assert len(bz2.decompress(body).decode()) == known["counts"]["characters"]
    else:
        assert "MIT License" in known["licence"]
        parts = embedded.load(name).parts
        assert {part: len(pair[0]) for part, pair in parts.items()} == known["counts"]
        assert known["mean"][0] == pytest.approx(float((parts["train"][0] / 255).mean()), abs=1e-5)
        assert known["std"][0] == pytest.approx(float((parts["train"][0] / 255).std()), abs=1e-5)


def test_damaged_embedded_data_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for file in embedded.FOLDER.glob("*.*"):
        (tmp_path / file.name).write_bytes(
            file.read_bytes()[:-1] + b"x" if file.suffix == ".bz2" else file.read_bytes()
        )
    monkeypatch.setattr(embedded, "FOLDER", tmp_path)
    with pytest.raises(BadInput, match=r"shakespeare_small\.txt\.bz2.*checksum"):
        load("shakespeare_small")
    (tmp_path / "fashion_mnist_small.npz").unlink()
    with pytest.raises(BadInput, match="missing from this installation"):
        load("fashion_mnist_small")


def test_digits_blobs_and_shakespeare() -> None:
    digits, blobs, text = load("digits"), load("blobs"), load({"name": "shakespeare_small", "length": 32})
    assert [len(part) for part in digits] == [1438, 180, 179] and digits.train["inputs"].shape[1:] == (1, 8, 8)
    assert digits.train.num_classes == 10
    assert [len(part) for part in blobs] == [720, 90, 90] and blobs.train["inputs"].shape[1:] == (2,)
    train = text.train
    assert train.kind == "tokens" and train["inputs"].shape == (17_500, 32) and train.num_classes == 0
    assert torch.equal(train["inputs"][1:, 0], train["labels"][:-1, -1])  # stretches go on where the last one ended
    assert torch.equal(train["inputs"][:, 1:], train["labels"][:, :-1])
    assert train.tokenizer is not None and train.tokenizer.decode(train["inputs"][0].tolist()).startswith(
        "First Citizen"
    )
    assert 60 <= train.vocab <= 70


def test_the_same_seed_gives_the_same_splits_and_subsets() -> None:
    spec = {"name": "digits", "per_class": 7, "test_limit": 50}
    first, again, other = load(spec), load(spec), load({**spec, "seed": 1})
    for a, b, c in zip(first, again, other, strict=True):
        assert torch.equal(a["inputs"], b["inputs"])
        assert not torch.equal(a["inputs"], c["inputs"])
    assert first.train["labels"].bincount().tolist() == [7] * 10 and len(first.test) == 50
    assert first.train.mean == load("digits").train.mean  # a subset is scaled as the whole is
    limited = load({"name": "digits", "limit": 100}).train
    assert len(limited) == 100 and limited["labels"].bincount().min() >= 8


def test_scaling_can_be_told_and_left_out() -> None:
    plain = load({"name": "fashion_mnist_small", "normalise": False, "limit": 50})
    assert plain.train["inputs"].min() == 0 and plain.train["inputs"].max() == 1 and plain.train.mean == ()
    told = load({"name": "fashion_mnist_small", "mean": 0.5, "std": [0.5], "size": 14, "limit": 50})
    assert told.train["inputs"].shape[1:] == (1, 14, 14)
    assert told.train["inputs"].min() == -1 and told.train["inputs"].max() <= 1
    colour = load({"name": "digits", "channels": 3, "limit": 20}).train
    assert colour["inputs"].shape[1] == 3 and len(colour.mean) == 3


# ---- files ---------------------------------------------------------------------------------------------------------


def picture(path: Path, value: int, size: tuple[int, int] = (6, 6), mode: str = "L") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, value if mode == "L" else (value, 0, 255 - value)).save(path)


def folder(root: Path) -> Path:
    for split, each in (("train", 6), ("test", 3)):
        for c, name in enumerate(("cat", "dog")):
            for i in range(each):
                picture(root / split / name / f"{i}.png", 100 * c + i)
    return root


def write(path: Path, text: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


def jsonl(rows: list[dict[str, Any]]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


REVIEWS = [
    {"text": f"{'good' if i % 2 else 'bad'} film number {i}", "label": "pos" if i % 2 else "neg"} for i in range(40)
]


def test_class_folders(tmp_path: Path) -> None:
    splits = load(str(folder(tmp_path)))
    assert [len(part) for part in splits] == [11, 1, 6]
    assert splits.test.classes == ["cat", "dog"] and splits.test["labels"].tolist() == [0, 0, 0, 1, 1, 1]
    raw = load({"name": str(tmp_path), "normalise": False})
    assert (raw.test["inputs"][:, 0, 0, 0] * 255).round().tolist() == [0, 1, 2, 100, 101, 102]


def test_flat_class_folders_and_colour(tmp_path: Path) -> None:
    for i in range(10):
        picture(tmp_path / ("a" if i % 2 else "b") / f"{i}.png", i, (8, 4), "RGB")
    splits = load({"name": str(tmp_path), "size": 4})
    assert [len(part) for part in splits] == [8, 1, 1] and splits.train["inputs"].shape[1:] == (3, 4, 4)


@pytest.mark.parametrize(
    "keys",
    [
        ("x_train", "y_train", "x_test", "y_test"),
        ("train_images", "train_labels", "test_images", "test_labels"),
    ],
)
def test_npz_with_its_own_splits(tmp_path: Path, keys: tuple[str, ...]) -> None:
    rng = np.random.default_rng(0)
    x, y = rng.integers(0, 256, (30, 5, 5), dtype=np.uint8), np.arange(30) % 3
    np.savez(tmp_path / "set.npz", **dict(zip(keys, (x[:20], y[:20], x[20:], y[20:, None]), strict=True)))
    splits = load(str(tmp_path / "set.npz"))
    assert [len(part) for part in splits] == [18, 2, 10]
    white = x[:20] / 255
    rows = splits.train["inputs"] * splits.train.std[0] + splits.train.mean[0]
    assert all(any(np.allclose(row, w, atol=1e-5) for w in white) for row in rows[:, 0].numpy())
    assert (
        splits.train["inputs"].mean().abs() < 1e-5 and abs(float(splits.train["inputs"].std(correction=0)) - 1) < 1e-4
    )
    assert splits.test["labels"].tolist() == y[20:].tolist()


def test_npz_of_vectors_and_safetensors_of_pictures(tmp_path: Path) -> None:
    x, y = np.random.default_rng(0).normal(5, 3, (50, 4)), np.arange(50) % 5
    np.savez(tmp_path / "v.npz", inputs=x, labels=y)
    splits = load(tmp_path / "v.npz")
    assert splits.train.kind == "vectors" and splits.train["inputs"].mean(0).abs().max() < 1e-5
    save_file({"inputs": x.reshape(50, 1, 2, 2).astype(np.float32), "labels": y}, tmp_path / "set.safetensors")
    condensed = load({"name": str(tmp_path / "set.safetensors"), "normalise": False, "split": [1, 0, 0]})
    assert condensed.train.kind == "images" and np.allclose(condensed.train["inputs"].flatten(1), x)


def test_channels_last_becomes_channels_first(tmp_path: Path) -> None:
    x = np.random.default_rng(0).integers(0, 256, (10, 6, 7, 3), dtype=np.uint8)
    np.savez(tmp_path / "c.npz", x=x, y=np.arange(10) % 2)
    table = load({"name": str(tmp_path / "c.npz"), "normalise": False, "split": [1, 0, 0]}).train
    assert np.allclose(table["inputs"].numpy() * 255, x.transpose(0, 3, 1, 2), atol=1e-3)


@pytest.mark.parametrize("packed", ["", ".gz", ".zst"])
def test_jsonl_texts(tmp_path: Path, packed: str) -> None:
    body = jsonl(REVIEWS).encode()
    if packed == ".gz":
        body = gzip.compress(body)
    if packed == ".zst":
        body = pytest.importorskip("zstandard").ZstdCompressor().compress(body)
    path = write(tmp_path / f"reviews.jsonl{packed}", body)
    splits = load(str(path))
    train = splits.train
    assert [len(part) for part in splits] == [32, 4, 4] and train.kind == "tokens" and train.classes == ["neg", "pos"]
    assert train.rows is not None and train.tokenizer is not None
    for row, ids, mask, label in zip(
        train.rows, train["inputs"], train["attention_mask"], train["labels"], strict=True
    ):
        assert train.tokenizer.decode(ids.tolist()) == row["text"]
        assert int(label) == int(row["label"] == "pos") and mask.sum() == len(row["text"].split())
    seen = {w for row in train.rows for w in row["text"].split()}
    assert train.vocab == 2 + len(seen)  # the vocabulary comes from the training part alone


def test_folder_of_split_files_with_variants(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for variant in ("films", "books"):
        for split, n in (("train", 20), ("dev", 6), ("test", 8)):
            write(tmp_path / "shelf" / f"{variant}_{split}.jsonl", jsonl(REVIEWS[:n]))
    write(tmp_path / "shelf" / "README.md", "nothing")
    monkeypatch.setenv("LIMBECK_DATA", str(tmp_path))
    for spec in ("shelf/films", {"name": "shelf", "variant": "films"}, f"{tmp_path}/shelf"):
        if spec == f"{tmp_path}/shelf":
            with pytest.raises(BadInput, match="books, films.*`variant`"):
                load(spec)
        else:
            assert [len(part) for part in load(spec)] == [20, 6, 8]
    with pytest.raises(BadInput, match="filns.*`films`"):
        load("shelf/filns")


def test_a_split_column_is_obeyed(tmp_path: Path) -> None:
    rows = [{**row, "split": "val" if i < 10 else "train"} for i, row in enumerate(REVIEWS)]
    splits = load(str(write(tmp_path / "r.jsonl", jsonl(rows))))
    assert len(splits.test) == 10  # without a test set of its own, the given validation set is the test
    assert splits.test.rows == rows[:10] and len(splits.train) + len(splits.validation) == 30


def test_csv_of_numbers(tmp_path: Path) -> None:
    lines = ["a,b,label"] + [f"{i},{i * i % 7},{'xyz'[i % 3]}" for i in range(30)]
    splits = load(str(write(tmp_path / "t.csv", "\n".join(lines))))
    assert splits.train.kind == "vectors" and splits.train["inputs"].shape == (24, 2)
    assert splits.train.classes == ["x", "y", "z"]
    one = load({"name": str(tmp_path / "t.csv"), "inputs": ["b"], "normalise": False})
    assert one.train["inputs"].shape == (24, 1) and one.train["inputs"].max() <= 6


def test_tsv_of_text_pairs_and_a_regression(tmp_path: Path) -> None:
    lines = ["s1\ts2\tscore"] + [f"one {i}\ttwo {i}\t{i / 4}" for i in range(20)]
    path = write(tmp_path / "t.tsv", "\n".join(lines))
    train = load({"name": str(path), "inputs": ["s1", "s2"], "labels": "score"}).train
    assert train["labels"].dtype == torch.float32 and train.classes is None
    assert train.tokenizer is not None and train.rows is not None
    for ids, label, row in zip(train["inputs"], train["labels"], train.rows, strict=True):
        assert train.tokenizer.decode(ids.tolist()) == f"{row['s1']} | {row['s2']}"
        assert float(label) == float(row["score"])


@pytest.mark.parametrize("values, classes", [([1, 2, 3], ["1", "2", "3"]), (["0", "2", "10"], ["0", "2", "10"])])
def test_labels_are_numbered_in_order(tmp_path: Path, values: list[Any], classes: list[str]) -> None:
    rows = [{"text": f"w{i}", "label": values[i % 3]} for i in range(30)]
    path = write(tmp_path / "l.jsonl", jsonl(rows))
    table = load(str(path)).train
    assert table.classes == classes and sorted(set(table["labels"].tolist())) == [0, 1, 2]
    if values == [1, 2, 3]:
        kept = load({"name": str(path), "classes": 5}).train
        assert kept.num_classes == 5 and sorted(set(kept["labels"].tolist())) == [1, 2, 3]


def test_parquet_of_encoded_pictures(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    import pyarrow.parquet as parquet

    def png(value: int) -> bytes:
        out = io.BytesIO()
        Image.new("RGB", (4, 4), (value, value, 0)).save(out, "PNG")
        return out.getvalue()

    for split, n in (("train", 10), ("test", 4)):
        table = pyarrow.table(
            {"png": [png(i) for i in range(n)], "label": [i % 2 for i in range(n)], "domain": [1] * n}
        )
        parquet.write_table(table, tmp_path / f"{split}.parquet")
    splits = load({"name": str(tmp_path), "normalise": False})
    assert [len(part) for part in splits] == [9, 1, 4] and splits.test["domain"].tolist() == [1] * 4
    assert (splits.test["inputs"][:, :, 0, 0] * 255).round().tolist() == [[i, i, 0] for i in range(4)]
    structs = [{"image": {"bytes": png(i), "path": None}, "label": i % 2} for i in range(10)]
    parquet.write_table(pyarrow.Table.from_pylist(structs), tmp_path / "hub_style.parquet")
    assert load(str(tmp_path / "hub_style.parquet")).train["inputs"].shape == (8, 3, 4, 4)


def test_plain_text_is_cut_by_place(tmp_path: Path) -> None:
    text = "".join(chr(97 + i % 26) for i in range(1000)) + "!" * 10
    splits = load({"name": str(write(tmp_path / "a.txt", text)), "length": 16})
    train = splits.train
    assert train.tokenizer is not None and train.vocab == 28  # "!" is in the test part only
    line = torch.cat([train["inputs"][0, :1], train["labels"][train["mask"]]])
    assert train.tokenizer.decode(line.tolist()) == text[: round(0.8 * 1010)]
    assert splits.test["labels"][splits.test["mask"]][-1] == 1
    assert next(Batches(train, 4))["mask"].shape == (4, 16)
    words = load({"name": str(tmp_path / "a.txt"), "tokenizer": "bytes", "length": 16})
    assert words.train.vocab == 257


def test_rows_of_text_keep_their_provenance(tmp_path: Path) -> None:
    rows = [{"question": f"q{i}", "answer": f"a{i}", "source": "hand"} for i in range(20)]
    splits = load(str(write(tmp_path / "qa.jsonl", jsonl(rows))))
    assert splits.train.kind == "rows" and splits.train.rows is not None
    kept = [row for part in splits for row in part.rows or ()]
    assert sorted(kept, key=lambda row: int(row["question"][1:])) == rows


def test_a_hub_set_from_a_local_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("datasets")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for split, n in (("train", 30), ("test", 10)):
        write(tmp_path / "set" / f"{split}.jsonl", jsonl(REVIEWS[:n]))
    splits = load({"name": f"hub:{tmp_path}/set", "tokenizer": "hash"})
    assert [len(part) for part in splits] == [27, 3, 10] and splits.train.classes == ["neg", "pos"]
    flowing = stream({"name": f"hub:{tmp_path}/set", "classes": ["neg", "pos"], "length": 8}, 4)
    assert next(flowing)["labels"].tolist() == [0, 1, 0, 1]
    with pytest.raises(BadInput, match="the hub gave no data set"):
        load(f"hub:{tmp_path}/nothing")


# ---- streams -------------------------------------------------------------------------------------------------------


def test_streamed_texts_resume_anywhere(tmp_path: Path) -> None:
    path = write(tmp_path / "r.jsonl", jsonl(REVIEWS))
    spec = {"name": str(path), "classes": ["neg", "pos"], "length": 6}
    whole = [next(flow) for flow in [stream(spec, 6)] for _ in range(15)]
    assert whole[0]["inputs"].shape == (6, 6) and whole[0]["labels"].tolist() == [0, 1, 0, 1, 0, 1]
    for position in (0, 1, 6, 7, 13):
        flow = stream(spec, 6)
        flow.load_state_dict({"position": position})
        again = next(flow)
        assert all(torch.equal(again[k], whole[position][k]) for k in again)


def test_streamed_language_is_the_whole_text(tmp_path: Path) -> None:
    text = "\n".join(f"line number {i}" for i in range(300)) + "\n"
    flow = stream({"name": str(write(tmp_path / "a.txt", text)), "kind": "language", "length": 20}, 1)
    seen = [next(flow)["inputs"][0] for _ in range((len(text) - 1) // 20)]
    assert Bytes().decode(torch.cat(seen).tolist()) == text[: 20 * len(seen)]


def test_streamed_pictures_need_their_scale(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    import pyarrow.parquet as parquet

    out = io.BytesIO()
    Image.new("L", (4, 4), 51).save(out, "PNG")
    parquet.write_table(pyarrow.table({"image": [out.getvalue()] * 6, "label": [0, 1] * 3}), tmp_path / "p.parquet")
    batch = next(stream({"name": str(tmp_path / "p.parquet"), "mean": [0.1], "std": [0.5]}, 3))
    assert batch["inputs"].shape == (3, 1, 4, 4) and torch.allclose(batch["inputs"], torch.tensor(0.2))
    with pytest.raises(BadInput, match="`mean` and `std`"):
        next(stream(str(tmp_path / "p.parquet"), 3))


# ---- tokenizers ----------------------------------------------------------------------------------------------------


def test_tokenizers() -> None:
    texts = ["The cat, the dog.", "a cat"]
    assert Chars(texts).decode(Chars(texts).encode("cat")) == "cat" and Chars(texts).encode("Z") == [1]
    words = Words(texts, 6)
    assert words.symbols[2:4] == ["cat", "the"] and words.size == 6 and words.encode("the zebra") == [3, 1]
    assert Words(texts).symbols == Words(reversed(texts)).symbols
    hashed = Hashed(50)
    assert hashed.encode("The CAT") == hashed.encode("the cat") and all(
        0 < i < 50 for i in hashed.encode("a b c d e f")
    )
    assert Bytes().decode(Bytes().encode("häß 中")) == "häß 中"
    short = padded(words, ["cat", "", "the cat the cat"], 3)
    assert short["inputs"].tolist()[:2] == [[2, 0, 0], [1, 0, 0]] and short["attention_mask"].sum(1).tolist() == [
        1,
        1,
        3,
    ]


@pytest.mark.parametrize("n", [0, 1, 2, 8, 9, 10, 17])
def test_every_token_but_the_first_is_a_label_once(n: int) -> None:
    made = blocks(list(range(5, 5 + n)), 4)
    labels, inputs = made["labels"][made["mask"]].tolist(), made["inputs"][made["mask"]].tolist()
    assert labels == list(range(6, 5 + n)) and inputs == list(range(5, 4 + n))
    assert made["labels"][~made["mask"]].eq(0).all()


# ---- bad input -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bad(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Any, list[str]]]:
    """What is wrong -> (spec, words of the sentence)."""
    root = tmp_path_factory.mktemp("bad")
    nan = np.ones((20, 3, 3), dtype=np.float32)
    nan[13, 1, 1] = np.nan
    np.savez(root / "nan.npz", x=nan, y=np.arange(20) % 2)
    np.savez(root / "keys.npz", foo=nan)
    np.savez(root / "length.npz", x=nan, y=np.arange(19))
    np.savez(root / "none.npz", x=nan[:0], y=np.arange(0))
    np.savez(root / "objects.npz", x=np.array([{}, 1], dtype=object))
    write(root / "torn.npz", (root / "nan.npz").read_bytes()[:-90])
    write(root / "torn.gz" / "a.jsonl.gz", gzip.compress(jsonl(REVIEWS).encode())[:-20])
    write(root / "wild.jsonl", '{"text": "a", "label": 1}\n{"text": \n')
    write(root / "list.jsonl", "[1, 2]\n")
    write(root / "latin.csv", "text,label\ncaf\xe9,1\n".encode("latin1"))
    write(root / "cells.csv", "a,label\n1,2\n1,2,3\n")
    write(root / "gap.csv", "a,b,label\n1,2,x\n3,,y\n")
    write(root / "city.csv", "a,city,label\n1,2,x\n3,Paris,y\n")
    write(root / "unlabelled.jsonl", jsonl([*REVIEWS[:3], {"text": "x", "label": None}]))
    write(root / "empty.jsonl", "")
    write(root / "strange.xyz", "")
    write(root / "reviews.jsonl", jsonl(REVIEWS))
    for i, size in enumerate([(5, 5), (5, 5), (6, 5)]):
        picture(root / "sizes" / "a" / f"{i}.png", 1, size)
    write(root / "broken" / "a" / "0.png", b"no picture")
    (root / "hollow").mkdir()
    at = str(root) + "/"
    return {
        "nan": (at + "nan.npz", ["`inputs`", "nan", "index 13"]),
        "keys": (at + "keys.npz", ["keys.npz", "train_x", "foo"]),
        "length": (at + "length.npz", ["20 inputs", "19 labels"]),
        "none": (at + "none.npz", ["empty", "0 examples"]),
        "objects": (at + "objects.npz", ["objects.npz", "pickled"]),
        "torn_npz": (at + "torn.npz", ["torn.npz"]),
        "torn_gz": (at + "torn.gz/a.jsonl.gz", ["torn", "gzip"]),
        "json": (at + "wild.jsonl", ["wild.jsonl:2", "JSON"]),
        "object": (at + "list.jsonl", ["list.jsonl:1", "object"]),
        "latin": (at + "latin.csv", ["latin.csv", "UTF-8"]),
        "cells": (at + "cells.csv", ["cells.csv:3", "more cells"]),
        "gap": (at + "gap.csv", ["'b'", "row 1"]),
        "city": (at + "city.csv", ["'city'", "'Paris'", "row 1", "`inputs`"]),
        "unlabelled": (at + "unlabelled.jsonl", ["row 3", "'label'"]),
        "empty": (at + "empty.jsonl", ["empty", "0 examples"]),
        "format": (at + "strange.xyz", ["strange.xyz", ".npz", ".csv"]),
        "sizes": (at + "sizes", ["5x5", "5x6", "`size`"]),
        "broken": (at + "broken", ["0.png", "picture"]),
        "hollow": (at + "hollow", ["hollow", "class folders"]),
        "missing": (at + "nann.npz", ["no file or folder", "nann.npz", "`nan.npz`"]),
        "name": ("fashion_mnist_smal", ["fashion_mnist_smal", "did you mean `fashion_mnist_small`", "hub:NAME"]),
        "option": ({"name": "digits", "limt": 3}, ["'limt'", "`limit`"]),
        "no_name": ({"limit": 3}, ["`name`"]),
        "type": ({"name": "digits", "limit": "many"}, ["`limit`", "integer", "'many'"]),
        "zero": ({"name": "digits", "per_class": 0}, ["`per_class`", "0"]),
        "kind": ({"name": "digits", "kind": "image"}, ["`kind`", "'image'"]),
        "fractions": ({"name": "digits", "split": [0.5, 0.5, 0.5]}, ["sum to 1"]),
        "per_class": ({"name": "digits", "per_class": 1000}, ["per_class 1000", "digits"]),
        "mean": ({"name": "digits", "mean": [0.1, 0.2], "std": [1, 1]}, ["mean", "one number a channel (1)"]),
        "column": ({"name": at + "reviews.jsonl", "inputs": "txt"}, ["'txt'", "`text`"]),
        "label_column": ({"name": at + "reviews.jsonl", "labels": "labl"}, ["'labl'", "`label`"]),
        "classes": ({"name": "digits", "classes": 5}, ["0 to 9", "5 classes"]),
        "tokenizer": ({"name": at + "reviews.jsonl", "tokenizer": "word"}, ["'word'", "words"]),
    }


CASES = (
    "nan keys length none objects torn_npz torn_gz json object latin cells gap city unlabelled empty format sizes "
    "broken hollow missing name option no_name type zero kind fractions per_class mean column label_column classes "
    "tokenizer"
).split()


@pytest.mark.parametrize("case", CASES)
def test_bad_input_gets_one_clear_sentence(
    case: str, bad: dict[str, tuple[Any, list[str]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("LIMBECK_DATA", raising=False)
    assert set(bad) == set(CASES)
    spec, words = bad[case]
    with pytest.raises(BadInput) as caught:
        load(spec)
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message, message


def test_a_batch_larger_than_the_data_says_both_numbers() -> None:
    with pytest.raises(BadInput, match="5000 is larger than digits, which has 1438"):
        Batches(load("digits").train, 5000)


@pytest.mark.parametrize(
    "library, name, make",
    [
        ("zstandard", "a.jsonl.zst", lambda path: load(str(path))),
        ("pyarrow", "a.parquet", lambda path: load(str(path))),
        ("datasets", "a.txt", lambda path: load("hub:anything")),
    ],
)
def test_a_missing_library_is_asked_for_by_its_extra(
    library: str, name: str, make: Callable[[Path], Splits], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in [m for m in sys.modules if m.split(".")[0] == library]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, library, None)  # type: ignore[arg-type]
    with pytest.raises(MissingExtra, match=rf"'{library}'.*limbeck\[text\]"):
        make(write(tmp_path / name, b"x"))


def test_limbeck_data_must_be_a_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("LIMBECK_DATA", str(tmp_path / "nowhere"))
    with pytest.raises(BadInput, match="LIMBECK_DATA.*no folder"):
        load("something")
    assert len(load("blobs").train) == 720


def test_rows_are_read_one_by_one(tmp_path: Path) -> None:
    path = write(tmp_path / "r.jsonl", jsonl(REVIEWS) + "no json")
    rows = rows_of(path)
    assert [next(rows) for _ in range(40)] == REVIEWS
    with pytest.raises(BadInput, match=r"r\.jsonl:41"):
        next(rows)


def test_a_source_can_be_given_as_an_object() -> None:
    splits = load(Source("blobs", limit=30))
    assert isinstance(splits.train, Table) and len(splits.train) == 30
