"""The streams of batches: order, resume at any position, ranks, classes, splits, and the sentences for bad input."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from limbeck.core.batches import Batches, Stream, Table, epoch, generator, split
from limbeck.core.errors import BadInput


def table(n: int = 50, classes: int = 5) -> Table:
    images = torch.randn(n, 1, 8, 8, generator=generator(0, "test"))
    return Table({"inputs": images, "labels": torch.arange(n) % classes}, kind="images", mean=(0.5,), std=(0.25,))


def take(source: Iterator[dict[str, Tensor]], n: int) -> list[dict[str, Tensor]]:
    return [next(source) for _ in range(n)]


def same(a: list[dict[str, Tensor]], b: list[dict[str, Tensor]]) -> bool:
    return len(a) == len(b) and all(
        x.keys() == y.keys() and all(torch.equal(x[k], y[k]) for k in x) for x, y in zip(a, b, strict=True)
    )


@pytest.mark.parametrize("options", [{}, {"drop_last": False}, {"per_class": 2}, {"shuffle": False}], ids=str)
@pytest.mark.parametrize("position", [0, 1, 5, 6, 7, 13])
def test_resumes_at_any_position(options: dict[str, Any], position: int) -> None:
    size = None if "per_class" in options else 8

    def fresh() -> Batches:
        return Batches(table(), size, seed=3, augment=["crop", "flip"], **options)

    whole = take(fresh(), position + 9)
    first = fresh()
    take(first, position)
    state = first.state_dict()
    assert state == {"position": position}
    torch.rand(7)  # the global random state must not matter
    resumed = fresh()
    resumed.load_state_dict(state)
    assert same(take(resumed, 9), whole[position:])


def test_an_epoch_visits_every_row_once_in_an_order_of_its_own() -> None:
    batches = Batches(table(), 10, seed=1)
    assert batches.steps_per_epoch == 5
    first, second = (torch.cat([b["index"] for b in take(batches, 5)]) for _ in range(2))
    assert batches.epoch == 2
    assert first.sort().values.tolist() == second.sort().values.tolist() == list(range(50))
    assert not torch.equal(first, second)
    assert not torch.equal(first, torch.cat([b["index"] for b in take(Batches(table(), 10, seed=2), 5)]))
    assert torch.equal(first, torch.cat([b["index"] for b in take(Batches(table(), 10, seed=1), 5)]))


def test_columns_belong_to_their_index() -> None:
    data = table()
    for batch in take(Batches(data, 7), 20):
        assert torch.equal(batch["inputs"], data["inputs"][batch["index"]])
        assert torch.equal(batch["labels"], data["labels"][batch["index"]])


def test_drop_last_is_a_choice() -> None:
    assert [len(b["index"]) for b in take(Batches(table(), 16), 4)] == [16] * 4
    kept = Batches(table(), 16, drop_last=False)
    assert kept.steps_per_epoch == 4
    assert [len(b["index"]) for b in take(kept, 5)] == [16, 16, 16, 2, 16]


@pytest.mark.parametrize("options", [{}, {"per_class": 4}], ids=str)
def test_ranks_take_disjoint_slices_of_the_same_batch(options: dict[str, Any]) -> None:
    size = None if options else 8
    one = take(Batches(table(), size, augment=["crop", "flip"], **options), 9)
    parts = [take(Batches(table(), size, augment=["crop", "flip"], rank=r, world=2, **options), 9) for r in (0, 1)]
    for whole, a, b in zip(one, *parts, strict=True):
        place = {int(row): i for i, row in enumerate(whole["index"])}
        assert len(a["index"]) == len(b["index"]) == len(whole["index"]) // 2
        assert sorted([*a["index"].tolist(), *b["index"].tolist()]) == sorted(place)
        for part in (a, b):
            rows = [place[int(row)] for row in part["index"]]
            assert torch.equal(part["inputs"], whole["inputs"][rows])  # the augmentation does not depend on the world


def test_ranks_of_balanced_batches_stay_balanced() -> None:
    batch = next(Batches(table(), per_class=4, rank=1, world=2))
    assert batch["labels"].tolist() == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]


def test_balanced_batches_come_in_class_order_and_walk_through_each_class() -> None:
    labels = torch.tensor([0] * 9 + [1] * 4 + [2] * 6)
    data = Table({"inputs": torch.randn(19, 3), "labels": labels})
    batches = take(Batches(data, per_class=2), 4)
    assert all(b["labels"].tolist() == [0, 0, 1, 1, 2, 2] for b in batches)
    smallest = torch.cat([b["index"][2:4] for b in batches])
    assert smallest[:4].sort().values.tolist() == smallest[4:].sort().values.tolist() == [9, 10, 11, 12]
    assert len(set(torch.cat([b["index"][:2] for b in batches]).tolist())) == 8


def test_a_pass_is_as_long_as_that_of_its_slowest_group() -> None:
    labels = torch.where(torch.arange(50) < 14, torch.arange(50) % 5, -100)
    data = Table({"inputs": torch.randn(50, 2), "labels": labels})
    assert Batches(data, 8).steps_per_pass == 6 and Batches(data, 8, drop_last=False).steps_per_pass == 7
    assert [Batches(data, 8, labelled=n).steps_per_pass for n in (1, 6)] == [14, 18]


def test_augmentation_differs_from_batch_to_batch_and_is_replayable() -> None:
    data = table()
    batches = Batches(data, 25, augment=[{"crop": {"pad": 2}}, "flip"])
    first, second = take(batches, 2)
    assert first["draw"].shape == (25, 3)
    assert not torch.equal(first["draw"], second["draw"])
    assert batches.augment is not None
    assert torch.equal(batches.augment.apply(data["inputs"][first["index"]], first["draw"]), first["inputs"])


def test_evaluation_pass_keeps_the_order_and_the_rest() -> None:
    batches = list(epoch(table(), 16))
    assert [len(b["index"]) for b in batches] == [16, 16, 16, 2]
    assert torch.cat([b["index"] for b in batches]).tolist() == list(range(50))
    assert len(list(epoch(table(), 1000))) == 1


def test_split_is_stratified_exact_and_deterministic() -> None:
    data = Table({"inputs": torch.arange(1000.0)[:, None], "labels": (torch.arange(1000) % 10 == 0).long()})
    cut = split(data, (0.7, 0.1, 0.2), seed=5)
    assert [len(part) for part in cut] == [700, 100, 200]
    assert [int(part["labels"].sum()) for part in cut] == [70, 10, 20]
    rows = torch.cat([part["inputs"][:, 0] for part in cut])
    assert rows.sort().values.tolist() == list(range(1000))
    torch.rand(3)
    again, other = split(data, (0.7, 0.1, 0.2), seed=5), split(data, (0.7, 0.1, 0.2), seed=6)
    assert torch.equal(again.test["inputs"], cut.test["inputs"])
    assert not torch.equal(other.test["inputs"], cut.test["inputs"])
    stretch = split(data, (0.5, 0.25, 0.25), shuffle=False)
    assert stretch.validation["inputs"][:, 0].tolist() == list(range(500, 750))
    assert [len(part) for part in split(data, (0.9, 0.1, 0.0))] == [900, 100, 0]


def test_select_keeps_order_rows_and_names() -> None:
    data = Table({"inputs": torch.arange(4.0)}, kind="rows", rows=[{"text": c} for c in "abcd"], classes=["x", "y"])
    chosen = data.select([3, 1])
    assert chosen["inputs"].tolist() == [3, 1]
    assert chosen.rows == [{"text": "d"}, {"text": "b"}]
    assert chosen.classes == ["x", "y"] and len(chosen) == 2


def with_value(value: float) -> Table:
    data = table(60)
    data["inputs"][41, 0, 3, 3] = value
    data["inputs"][55, 0, 0, 0] = value
    return data


BAD = {
    "larger": (lambda: Batches(table(), 51), ["51", "50 examples"]),
    "empty": (lambda: Batches(table(0), 1), ["empty", "0 examples"]),
    "empty pass": (lambda: next(epoch(table(0), 1)), ["empty"]),
    "nan": (lambda: Batches(with_value(float("nan")), 4), ["`inputs`", "nan", "index 41"]),
    "inf": (lambda: Batches(with_value(float("inf")), 4), ["`inputs`", "inf", "index 41"]),
    "late nan": (lambda: Batches(Table({"inputs": torch.tensor([1.0] * 4999 + [torch.nan])}), 4), ["4999"]),
    "no size": (lambda: Batches(table(), 0), ["batch_size", ">= 1", "0"]),
    "both sizes": (lambda: Batches(table(), 11, per_class=2), ["11", "10"]),
    "per_class": (lambda: Batches(table(), per_class=11), ["per_class", "[1, 10]", "11"]),
    "no classes": (lambda: Batches(Table({"inputs": torch.ones(4, 2)}), per_class=1), ["labels"]),
    "rank": (lambda: Batches(table(), 8, rank=2, world=2), ["rank", "[0, 2)", "2"]),
    "world": (lambda: Batches(table(), 9, world=2), ["2 processes", "9"]),
    "lengths": (lambda: Table({"inputs": torch.ones(3), "labels": torch.ones(2)}), ["'inputs': 3", "'labels': 2"]),
    "no columns": (lambda: Table({}), ["no columns"]),
    "reserved": (lambda: Table({"inputs": torch.ones(3), "index": torch.ones(3)}), ["index", "reserved"]),
    "column": (lambda: table()["label"], ["'label'", "inputs, labels"]),
    "fractions": (lambda: split(table(), (0.5, 0.1, 0.1)), ["sum to 1", "0.5"]),
    "augment": (lambda: Batches(table(), 4, augment=["flop"]), ["flop", "did you mean", "`flip`"]),
    "augment knob": (lambda: Batches(table(), 4, augment=[{"crop": {"padd": 2}}]), ["padd", "`pad`"]),
    "augment what": (lambda: Batches(Table({"inputs": torch.ones(4, 2)}), 2, augment=["flip"]), ["images", "vectors"]),
    "once": (lambda: Stream(iter([1, 2])), ["only once"]),
    "empty stream": (lambda: next(Stream([])), ["empty"]),
    "short stream": (lambda: next(Stream([torch.ones(2)], 2)), ["empty", "2"]),
    "odd stream": (lambda: next(Stream(["text"])), ["str"]),
    "nan stream": (lambda: take(Stream([torch.ones(2), torch.tensor([1, float("nan")])]), 2), ["`inputs`", "batch 1"]),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_input_gets_one_clear_sentence(case: str) -> None:
    call, words = BAD[case]
    with pytest.raises(BadInput) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message, message


class Shards(IterableDataset):  # type: ignore[type-arg]
    """A streaming source whose order depends on the epoch that it is told."""

    def __init__(self) -> None:
        self.number = 0

    def set_epoch(self, number: int) -> None:
        self.number = number

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for row in torch.randperm(10, generator=generator(9, self.number)).tolist():
            yield {"inputs": torch.full((2,), float(row)), "labels": row}


def shuffled() -> Stream:
    data = TensorDataset(torch.arange(20.0)[:, None], torch.arange(20))
    return Stream(DataLoader(data, batch_size=4, shuffle=True), seed=1)


@pytest.mark.parametrize("position", [0, 1, 4, 5, 6, 11])
@pytest.mark.parametrize("make", [shuffled, lambda: Stream(Shards(), 3), lambda: Stream(lambda: iter(Shards()), 2)])
def test_a_stream_resumes_by_skipping(make: Any, position: int) -> None:
    whole = take(make(), position + 7)
    resumed = make()
    before = torch.get_rng_state()
    resumed.load_state_dict({"position": position})
    assert torch.equal(torch.get_rng_state(), before)
    assert same(take(resumed, 7), whole[position:])


def test_a_stream_goes_on_epoch_after_epoch() -> None:
    stream = shuffled()
    assert stream.steps_per_epoch == 5
    first, second = (torch.cat([b["labels"] for b in take(stream, 5)]) for _ in range(2))
    assert first.sort().values.tolist() == second.sort().values.tolist() == list(range(20))
    assert not torch.equal(first, second)
    other = Stream([torch.ones(2)] * 11, 2)  # the last one is left out
    for made, steps in ((shuffled(), 5), (other, 5), (Batches(table(), 10), 5)):
        assert [(made.epoch, len(take(made, 1)))[0] for _ in range(11)] == [i // steps for i in range(11)]
        assert made.epoch == 2
    resumed = shuffled()
    resumed.load_state_dict({"position": 5})
    assert resumed.epoch == 1  # that of the next batch
    assert Stream(Shards(), 3).steps_per_epoch is None
    assert next(Stream(Shards(), 3))["inputs"].shape == (3, 2)
