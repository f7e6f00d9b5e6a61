"""The store of teacher signals and the method that replays it: the same pixels, the same labels, nothing stale."""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from limbeck.core import knobs
from limbeck.core.batches import Batch, Batches, Table, epoch
from limbeck.core.errors import BadInput, LimbeckError
from limbeck.core.loop import Plan, fit
from limbeck.core.nets import Nets
from limbeck.core.store import Store, StoredBatches, StoreInfo, capture, data_fingerprint, fingerprint, recover

CLASSES, SIZE, EXAMPLES = 6, 8, 50
CROPS: list[Any] = [{"resized_crop": {"smallest": 0.3}}, "flip"]


class Eye(nn.Module):
    """Pictures [B, 1, 8, 8] to classes; dropout and batch norm show whether it is asked in eval mode."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(1, width, 3, 2, 1), nn.BatchNorm2d(width)
        self.drop, self.head = nn.Dropout(0.5), nn.Linear(width * 16, CLASSES)
        self.asked = 0

    def forward(self, x: Tensor) -> Tensor:
        self.asked += len(x)
        out: Tensor = self.head(self.drop(self.norm(self.conv(x)).relu().flatten(1)))
        return 3 * out


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)
    torch.manual_seed(0)


@pytest.fixture
def table() -> Table:
    g = torch.Generator().manual_seed(1)
    labels = torch.arange(EXAMPLES) % CLASSES
    inputs = 0.3 * torch.randn(EXAMPLES, 1, SIZE, SIZE, generator=g)
    for i, label in enumerate(labels.tolist()):
        inputs[i, 0, label] += 1.5
    return Table({"inputs": inputs, "labels": labels}, "images", mean=(0.2,), std=(0.5,))


@pytest.fixture
def teacher() -> Eye:
    return Eye()


def answers(teacher: Eye, inputs: Tensor) -> Tensor:
    teacher.eval()
    with torch.no_grad():
        return teacher(inputs).log_softmax(-1)


# ---------------------------------------------------------------- what is stored is what the teacher said
@pytest.mark.parametrize("bits,relative", [(32, 1e-6), (16, 0.5 / 2048 + 1e-6), (8, 0.5 / 16 + 1e-3)])
def test_an_entry_is_the_teachers_answer_to_that_very_crop(tmp_path, table, teacher, bits, relative):
    capture(teacher, table, tmp_path / "s", views=3, augment=CROPS, bits=bits, batch_size=17)
    store = Store.open(tmp_path / "s")
    index, view = torch.arange(EXAMPLES).repeat_interleave(3), torch.arange(3).repeat(EXAMPLES)
    found = store.read(index, view)
    pixels = store.augment.apply(table["inputs"][index], found["draw"])
    said = answers(teacher, pixels).gather(-1, found["teacher_ids"])
    close = said > -STEPS_END[bits]  # below that, what is stored is the end of the range
    assert (
        close.any(1).all() and (said.exp() / found["teacher_logprobs"].exp() - 1).abs()[close].max() <= relative * 1.02
    )
    assert found["teacher_logprobs"].diff(dim=-1).max() <= 0  # likeliest first
    assert torch.equal(found["teacher_logits"].gather(-1, found["teacher_ids"]), found["teacher_logprobs"])
    crops = pixels.view(EXAMPLES, 3, -1)
    assert not torch.equal(crops[:, 0], crops[:, 1])  # views differ


STEPS_END = {32: math.inf, 16: 31.0, 8: 15.0}


def test_replaying_gives_the_same_pixels_in_any_batch(tmp_path, table, teacher):
    seen: dict[int, Tensor] = {}

    class Watching(Eye):
        def forward(self, x: Tensor) -> Tensor:
            seen[len(seen)] = x.clone()
            return super().forward(x)

    capture(Watching(), table, tmp_path / "s", views=2, augment=CROPS, batch_size=EXAMPLES)
    shown = [x for x in seen.values() if len(x) == EXAMPLES]  # one call a view, all examples in order
    assert len(shown) == 2
    for size, seed in ((10, 0), (7, 3)):
        stream = StoredBatches(Batches(table, size, seed=seed), Store.open(tmp_path / "s"), seed=5)
        for _ in range(2 * stream.steps_per_epoch):
            epoch_ = stream.epoch
            batch = next(stream)
            views = stream.views(batch["index"], epoch_)[:, 0]
            wanted = torch.stack([shown[v][i] for i, v in zip(batch["index"].tolist(), views.tolist(), strict=True)])
            assert torch.equal(batch["inputs"], wanted)


def test_views_depend_on_example_and_epoch_alone_and_are_used_evenly(tmp_path, table, teacher):
    capture(teacher, table, tmp_path / "s", views=4, augment=CROPS)
    store = Store.open(tmp_path / "s")
    every = torch.arange(EXAMPLES)
    for crops in (1, 3):
        stream = StoredBatches(Batches(table, 10, seed=0), store, crops=crops, seed=2)
        shown = torch.cat([stream.views(every, e) for e in range(4)], 1)  # [N, 4 crops]
        assert all(torch.equal(torch.bincount(row, minlength=4), torch.full((4,), crops)) for row in shown)
        assert len({tuple(row.tolist()) for row in shown}) > EXAMPLES / 4  # orders of their own
        again = StoredBatches(Batches(table, 25, seed=9), store, crops=crops, seed=2).views(every[30:], 3)
        assert torch.equal(again, stream.views(every, 3)[30:])
    both = [next(StoredBatches(Batches(table, 10, seed=0, rank=r, world=2), store, crops=2)) for r in range(2)]
    whole = next(StoredBatches(Batches(table, 10, seed=0), store, crops=2))
    for name in whole:
        assert torch.equal(torch.cat([b[name] for b in both]), whole[name]), name
    assert torch.equal(whole["index"][::2], whole["index"][1::2]) and len(whole["inputs"]) == 20


def test_the_teacher_is_asked_in_eval_mode_and_left_as_it_was(tmp_path, table, teacher):
    teacher.train()
    teacher.norm.eval()
    before = {k: v.clone() for k, v in teacher.state_dict().items()}
    capture(teacher, table, tmp_path / "s")
    assert teacher.training and teacher.drop.training and not teacher.norm.training
    assert all(torch.equal(v, before[k]) for k, v in teacher.state_dict().items())
    assert teacher.asked == EXAMPLES + 1  # and once to learn the number of classes


# ---------------------------------------------------------------- recovery
def test_recovered_labels_sum_to_1_and_keep_the_stored_entries():
    p = torch.softmax(3 * torch.randn(20, 12, dtype=torch.float64), -1)
    kept, ids = p.topk(5, -1)
    smooth, renormalised = (recover(ids, kept.log(), 12, how) for how in ("smooth", "renormalise"))
    assert torch.allclose(smooth.sum(-1), torch.ones(20, dtype=torch.float64), atol=1e-12)
    assert torch.allclose(smooth.gather(-1, ids), kept, rtol=1e-12)
    rest = torch.ones(20, 12, dtype=torch.bool).scatter(-1, ids, False)
    others = smooth[rest].view(20, 7)
    assert torch.allclose(others, (1 - kept.sum(-1, keepdim=True)).expand(20, 7) / 7, rtol=1e-9)
    assert torch.allclose(renormalised.sum(-1), torch.ones(20, dtype=torch.float64), atol=1e-12)
    assert (renormalised[rest] == 0).all()
    for how in ("smooth", "renormalise"):
        everything, places = p.topk(12, -1)
        assert torch.allclose(recover(places, everything.log(), 12, how), p, rtol=1e-12)
    above = recover(ids[:1], torch.full((1, 5), math.log(0.21)), 12)  # rounding can lift the sum above 1
    assert above.sum() == pytest.approx(1, abs=1e-6) and above.min() >= 0


def test_loss_and_labels_are_those_of_the_authors_code():
    wanted = json.loads((Path(__file__).parent / "vectors" / "fkd.json").read_text())["reference"]
    ids = torch.tensor(wanted["inputs"]["teacher_ids"])
    logprobs = torch.tensor(wanted["inputs"]["teacher_logprobs"], dtype=torch.float64)
    for how, case in wanted["cases"].items():
        student = torch.tensor(wanted["inputs"]["student_logits"], dtype=torch.float64, requires_grad=True)
        label = torch.tensor(case["label"], dtype=torch.float64)
        assert torch.allclose(recover(ids, logprobs, student.shape[-1], how), label, rtol=1e-12)
        loss = knobs.make("fkd", {"recovery": how}).loss(student, ids, logprobs).mean()
        assert loss.item() == pytest.approx(case["value"], rel=1e-9)
        (grad,) = torch.autograd.grad(loss, student)
        assert torch.allclose(grad, torch.tensor(case["grad"], dtype=torch.float64), rtol=1e-7, atol=1e-12)


def test_fidelity_says_what_was_lost(tmp_path, table, teacher):
    infos: dict[tuple[int, int], StoreInfo] = {}
    for topk, bits in ((1, 16), (3, 16), (0, 8), (0, 16), (0, 32)):
        infos[topk, bits] = capture(teacher, table, tmp_path / f"{topk}-{bits}", topk=topk, bits=bits)
    full = answers(teacher, table["inputs"])
    for topk in (1, 3):
        kept, ids = full.topk(topk, -1)
        q = recover(ids, (kept * 2048).round() / 2048, CLASSES)
        kl = (full.exp() * (full - q.log())).sum(-1).mean()
        assert infos[topk, 16].mass == pytest.approx(kept.exp().sum(-1).mean().item(), rel=1e-5)
        assert infos[topk, 16].kl == pytest.approx(kl.item(), rel=1e-3)
    assert infos[1, 16].kl > infos[3, 16].kl > infos[0, 16].kl and infos[0, 8].kl > infos[0, 16].kl
    assert infos[0, 32].kl < 1e-9 and infos[0, 16].kl < 1e-6 and infos[0, 32].mass == pytest.approx(1, abs=1e-6)
    size = sum(p.stat().st_size for p in (tmp_path / "1-16").iterdir())
    assert infos[1, 16].bytes == size and infos[1, 16].bytes_per_example == size / EXAMPLES
    assert infos[1, 16].bytes < infos[3, 16].bytes < infos[0, 32].bytes


def test_texts_are_stored_place_by_place(tmp_path):
    class Speaker(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.head = nn.Embedding(300, 4), nn.Linear(4, 300)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = 4 * self.head(self.embed(x))
            return out

    net = Speaker()
    table = Table({"inputs": torch.randint(300, (12, 5)), "mask": torch.rand(12, 5) > 0.5}, "tokens")
    info = capture(net, table, tmp_path / "s", topk=7, bits=32, batch_size=5)
    found = Store.open(tmp_path / "s").read(torch.tensor([11, 0, 4]))
    with torch.no_grad():
        full = net(table["inputs"]).log_softmax(-1)
    kept, ids = full.topk(7, -1)
    assert torch.equal(found["teacher_ids"], ids[[11, 0, 4]])  # ids above 255 need two bytes
    assert torch.allclose(found["teacher_logprobs"], kept[[11, 0, 4]], atol=1e-6)
    mass = torch.stack(
        [kept.exp().sum(-1)[i][m].mean() if m.any() else torch.tensor(0.0) for i, m in enumerate(table["mask"])]
    )
    assert info.mass == pytest.approx(mass.mean().item(), rel=1e-5)
    assert "draw" not in found and "teacher_logits" not in found


# ---------------------------------------------------------------- killed, resumed, refused
class Killed(Exception):
    pass


def files(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir())}


def interrupted(data: Table, size: int, after: int) -> Iterator[Batch]:
    for i, batch in enumerate(epoch(data, size)):
        if i == after:
            raise Killed
        yield batch


def test_a_killed_capture_goes_on_where_it_stopped(tmp_path, table, teacher):
    options: dict[str, Any] = {"views": 2, "augment": CROPS, "topk": 3}
    whole = capture(teacher, table, tmp_path / "whole", batch_size=10, **options)
    with pytest.raises(Killed):
        capture(teacher, interrupted(table, 10, 3), tmp_path / "cut", examples=EXAMPLES, **options)
    with pytest.raises(BadInput, match="holds 30 of 50 examples; run the capture again"):
        Store.open(tmp_path / "cut")
    asked, seen = teacher.asked, []
    # a table also says what black is, which is part of what a capture is: go on from batches, as it was begun
    again = capture(teacher, epoch(table, 10), tmp_path / "cut", examples=EXAMPLES, on_event=seen.append, **options)
    assert teacher.asked - asked == 20 * 2
    assert again.captured == 20 and whole.captured == EXAMPLES
    assert [e["done"] for e in seen] == [30, 30, 30, 40, 50]
    left, right = files(tmp_path / "whole"), files(tmp_path / "cut")
    assert left.keys() == right.keys()
    assert [n for n in left if left[n] != right[n]] in ([], ["store.json"])
    third = capture(teacher, epoch(table, 7), tmp_path / "cut", examples=EXAMPLES, **options)
    assert third.captured == 0 and teacher.asked - asked == 40
    assert third.data == whole.data == data_fingerprint(table)


def test_the_signature_of_data_does_not_depend_on_how_they_come(table):
    whole = data_fingerprint(table)
    mixed = [{k: v[p] for k, v in next(epoch(table, EXAMPLES)).items()} for p in torch.randperm(EXAMPLES).split(9)]
    assert data_fingerprint(mixed, EXAMPLES) == whole
    other = table.select(torch.arange(EXAMPLES))
    other["inputs"][7, 0, 3, 3] += 1e-6
    assert data_fingerprint(other) != whole
    assert data_fingerprint(table.select(torch.arange(EXAMPLES).flip(0))) != whole
    with pytest.raises(BadInput, match="give `examples`"):
        data_fingerprint(mixed)


def test_a_stale_store_is_refused(tmp_path, table, teacher):
    capture(teacher, table, tmp_path / "s", topk=2)
    open_ = lambda **prints: Store.open(tmp_path / "s", **prints)
    assert (
        open_(teacher_fingerprint=fingerprint(teacher), data_fingerprint=data_fingerprint(table)).examples == EXAMPLES
    )
    with pytest.raises(BadInput, match="stale: it was made by another teacher"):
        open_(teacher_fingerprint=fingerprint(Eye()))
    with pytest.raises(BadInput, match="stale: it was made from other data"):
        open_(data_fingerprint=data_fingerprint(table.select(torch.arange(EXAMPLES).flip(0))))
    with pytest.raises(BadInput, match="`teacher` was .* there and is .* now; delete the folder"):
        capture(Eye(), table, tmp_path / "s", topk=2)
    with pytest.raises(BadInput, match="`topk` was 2 there and is 3 now"):
        capture(teacher, table, tmp_path / "s", topk=3)
    changed = table.select(torch.arange(EXAMPLES))
    changed["inputs"][13] += 1
    with pytest.raises(BadInput, match="captured from other data: example 13 has changed"):
        capture(teacher, changed, tmp_path / "s", topk=2)
    store = open_()
    store.check(table, {"topk": 2, "augment": []})
    for data, settings, words in (
        (table, {"topk": 3}, "was captured with `topk` 2, asked for is 3; capture another, or leave `topk` out"),
        (table.select(range(20)), {}, f"stale: it holds {EXAMPLES} examples, and data has 20; capture it again"),
        (changed, {}, f"other data: 1 of {EXAMPLES} examples of data differ, the first of them number 13; capture"),
        (Table({"inputs": table["inputs"] * 2}, "images", mean=(0.1,), std=(0.2,)), {}, "are normalised otherwise;"),
    ):
        with pytest.raises(BadInput, match=words):
            store.check(data, settings)


def test_a_damaged_store_is_refused_in_one_sentence(tmp_path, table, teacher):
    folder = tmp_path / "labels"
    capture(teacher, table, folder, topk=2)
    with pytest.raises(BadInput, match=r"no store.json; did you mean `labels`"):
        Store.open(tmp_path / "lables")
    whole = files(folder)
    for name, content, words in (
        ("ids.npy", whole["ids.npy"][:-40], "ids.npy is missing, truncated or corrupt"),
        ("codes.npy", b"", "codes.npy is missing, truncated or corrupt"),
        ("codes.npy", whole["ids.npy"], r"codes.npy is uint8.*, but store.json says uint16"),
        ("store.json", b"{", "store.json is not valid JSON"),
        ("store.json", b"{}", "has format None, not 1"),
    ):
        (folder / name).write_bytes(content)
        with pytest.raises(BadInput, match=words):
            Store.open(folder)
        (folder / name).write_bytes(whole[name])
    pickled = np.array([{}], dtype=object)
    np.save(folder / "ids.npy", pickled, allow_pickle=True)
    with pytest.raises(BadInput, match="corrupt"):
        Store.open(folder)


def test_bad_requests_get_one_sentence(tmp_path, table, teacher):
    folder = tmp_path / "s"
    for given, words in (
        ({"views": 2}, "without `augment` all views of an example are the same"),
        ({"topk": 7}, "`topk` must be at most 6"),
        ({"bits": 4}, "`bits` must be 8, 16 or 32"),
        ({"augment": [object()]}, "keeps its augmentation by name"),
        ({"augment": ["flop"]}, "no augmentation 'flop'; did you mean `flip`"),
    ):
        with pytest.raises(ValueError, match=words):
            capture(teacher, table, folder, **given)
        assert not folder.exists() and not list(tmp_path.iterdir())
    with pytest.raises(BadInput, match="the data gave 10 different examples, but there should be 50"):
        capture(teacher, list(epoch(table, 10))[:1], folder, examples=EXAMPLES)
    capture(teacher, epoch(table, 10), folder, examples=EXAMPLES)
    store = Store.open(folder)
    with pytest.raises(BadInput, match="holds examples 0 to 49, not 50"):
        store.read(torch.tensor([3, 50]))
    with pytest.raises(BadInput, match="take `augment` off the data"):
        StoredBatches(Batches(table, 10, augment=["flip"]), store)
    with pytest.raises(BadInput, match="holds 50 examples, data has 20"):
        StoredBatches(Batches(table.select(torch.arange(20)), 10), store)
    with pytest.raises(ValueError, match="`crops` must be between 1 and the 1 stored views, got 2"):
        StoredBatches(Batches(table, 10), store, crops=2)
    with pytest.raises(BadInput, match="hold no teacher_ids: `fkd` reads a store"):
        fit(knobs.make("fkd"), Nets(student=Eye()), Batches(table, 10), Plan(1))
    other = tmp_path / "other"
    other.mkdir()
    (other / "notes.txt").write_text("mine")
    with pytest.raises(BadInput, match="holds other files"):
        capture(teacher, table, other)
    assert (other / "notes.txt").read_text() == "mine"


def test_a_full_disk_leaves_nothing_behind(tmp_path, table, teacher, monkeypatch):
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.posix_fallocate", full, raising=False)
    with pytest.raises(LimbeckError, match="could not create the store .*: the disk is full"):
        capture(teacher, table, tmp_path / "s")
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------- training from it
SGD: dict[str, Any] = {"sgd": {"lr": 0.05}}  # Adam would blow up the rounding errors of biases before a batch norm


def trained(tmp_path: Path, table: Table, method: str, given: dict[str, Any], store: str, **options: Any) -> Eye:
    torch.manual_seed(4)
    nets = Nets(student=Eye(4))
    stream = StoredBatches(Batches(table, 10, seed=1), Store.open(tmp_path / store), **options)
    fit(knobs.make(method, given), nets, stream, Plan(20, optimizer=SGD))
    student: Eye = nets.student
    return student


def test_with_all_classes_it_is_what_the_teacher_itself_would_have_taught(tmp_path, table, teacher):
    capture(teacher, table, tmp_path / "s", bits=32, views=2, augment=CROPS)
    offline = trained(tmp_path, table, "fkd", {}, "s")
    same = trained(tmp_path, table, "distill", {"match": ({"kd": {"temperature": 1.0}},)}, "s")
    torch.manual_seed(4)
    nets = Nets(student=Eye(4), teacher=teacher)
    stream = StoredBatches(Batches(table, 10, seed=1), Store.open(tmp_path / "s"))
    live = ({k: v for k, v in batch.items() if not k.startswith("teacher_")} for batch in stream)
    fit(knobs.make("distill", {"match": ({"kd": {"temperature": 1.0}},)}), nets, live, Plan(20, optimizer=SGD))
    for a, b, c in zip(offline.parameters(), same.parameters(), nets.student.parameters(), strict=True):
        assert torch.allclose(a, c, atol=2e-4) and torch.allclose(b, c, atol=2e-4)


def test_it_beats_its_start_with_three_entries_and_resumes_with_the_same_bits(tmp_path, table):
    torch.manual_seed(2)
    taught = Eye()
    fit(
        knobs.make("distill", {"match": ("ce",)}),
        Nets(student=taught),
        Batches(table, 10),
        Plan(60, optimizer={"adam": {"lr": 1e-2}}),
    )
    capture(taught, table, tmp_path / "s", topk=3, views=2, augment=[{"crop": {"pad": 0}}, "flip"])
    student = trained(tmp_path, table, "fkd", {}, "s", crops=2)
    score = lambda net: (answers(net, table["inputs"]).argmax(-1) == table["labels"]).double().mean().item()
    torch.manual_seed(4)
    assert score(student) > max(0.8, score(Eye(4)) + 0.3)

    def stream() -> StoredBatches:
        return StoredBatches(Batches(table, 10, seed=1), Store.open(tmp_path / "s"), crops=2)

    plan = Plan(8, optimizer={"adam": {"lr": 1e-2}}, save_every=3)
    torch.manual_seed(4)
    whole, start = Nets(student=Eye(4)), torch.get_rng_state()
    first = {k: v.clone() for k, v in whole.student.state_dict().items()}
    fit(knobs.make("fkd"), whole, stream(), plan, folder=tmp_path / "run")
    for late in sorted((tmp_path / "run" / "checkpoints").iterdir())[1:]:
        for file in late.iterdir():
            file.unlink()
        late.rmdir()
    torch.set_rng_state(start)
    again = Nets(student=Eye(4))
    again.student.load_state_dict(first)
    fit(knobs.make("fkd"), again, stream(), plan, folder=tmp_path / "run", resume=True)
    assert all(torch.equal(v, again.student.state_dict()[k]) for k, v in whole.student.state_dict().items())


def test_what_remembers_every_example_knows_how_many_a_store_holds(tmp_path, table, teacher):
    capture(teacher, table, tmp_path / "s", topk=2)
    stream = StoredBatches(Batches(table, 10, seed=0), Store.open(tmp_path / "s"))
    nets = Nets(student=Eye())
    fit(knobs.make("distill", {"match": ("ps_kd",)}), nets, stream, Plan(5))  # all 50 examples come
    assert len(nets.losses["ps_kd"].past.rows) == EXAMPLES


def test_another_augmentation_is_another_capture(tmp_path):
    from limbeck.recipe import check
    from limbeck.verbs.build import setting
    from limbeck.verbs.setting import captured

    def told(smallest: float) -> str:
        spec = {"views": 1, "augment": [{"resized_crop": {"smallest": smallest}}]}
        body = {
            "name": "t",
            "do": "teach",
            "teacher": tiny | {"train": {"steps": 1}},
            "student": tiny,
            "data": data,
            "method": "fkd",
            "store": spec,
        }
        return captured(setting(check(body, "test"), tmp_path / "run", None, False)).folder

    tiny, data = {"net": "mlp", "width": 8}, {"name": "digits", "limit": 200}
    first, second = Path(told(0.5)), Path(told(0.8))
    assert first != second and first.parent == second.parent == tmp_path / ".stores"
    assert Path(told(0.5)) == first
