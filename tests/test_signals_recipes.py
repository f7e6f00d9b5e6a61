"""Teacher signals of texts through recipes: `label` writes a store of every kind, `teach` learns from it."""

import csv
import json
import os
import random
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from test_remote import Server
from test_signals import Tiny, content

from limbeck.core.batches import Batches, Table
from limbeck.core.headloss import route
from limbeck.core.signals import files
from limbeck.core.signals.feeding import SignalBatches, documents_in
from limbeck.core.signals.kinds import kind_of
from limbeck.core.signals.reading import SignalStore
from limbeck.core.signals.writing import capture
from limbeck.losses.logits.forward_kl import forward_kl
from limbeck.losses.tokens.hidden_state_shipping import hidden_state_shipping
from limbeck.zoo.nets import build
from tests.tiny import data as images
from tests.tiny import limbeck

LETTERS = "abcdefgh .\n"
TEACHER = {"net": "tiny_lm", "width": 16, "layers": 1}
KINDS: dict[str, tuple[Any, str]] = {  # a store, and the loss that reads it
    "sampled": ("sampled", "sampled_kl"),
    "tempered": ({"sampled": {"rounds": 20, "tau": 0.7}}, "sampled_kl"),
    "topk": ({"topk": {"k": 4}}, "top_k_kd"),
    "full": ({"full": {"bits": 32}}, "forward_kl"),
    "hidden": ({"hidden": {"dtype": "float32"}}, "hidden_state_shipping"),
}


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    draw = random.Random(0)
    Path("text.txt").write_text(LETTERS + "".join(draw.choice(LETTERS) for _ in range(1500)))
    save_teacher(0)


def save_teacher(seed: int) -> None:
    torch.manual_seed(seed)
    state = build(TEACHER, vocab=len(LETTERS) + 2).state_dict()
    save_file({k: 5 * v if v.ndim > 1 else v.clone() for k, v in state.items()}, "teacher.safetensors")


def recipe(name: str = "recipe", **changes: Any) -> Path:
    """A tiny language recipe; None leaves a key out."""
    body: dict[str, Any] = {
        "name": name, "teacher": {**TEACHER, "weights": "teacher.safetensors"},
        "student": {"net": "tiny_lm", "width": 8, "layers": 1, "heads": 2},
        "data": {"name": "text.txt", "length": 24}, "train": {"steps": 4, "batch_size": 8}, **changes,
    }  # fmt: skip
    path = Path(f"{name}.yaml")
    path.write_text(yaml.safe_dump({k: v for k, v in body.items() if v is not None}))
    return path


def label(name: str = "label", **changes: Any) -> str:
    """Run `limbeck label`; what it said."""
    called = limbeck("label", recipe(name, student=None, **changes), "--out", f"runs/{name}")
    assert called.code == 0, called.err
    return called.out


def weights(name: str) -> dict[str, torch.Tensor]:
    return load_file(f"runs/{name}/seed-0/weights.safetensors")


def teach(name: str, **changes: Any) -> dict[str, torch.Tensor]:
    """Run a recipe of `teach`; the student's weights."""
    called = limbeck("run", recipe(name, **changes), "--out", f"runs/{name}")
    assert called.code == 0, called.err
    return weights(name)


def refused(name: str = "bad", **changes: Any) -> str:
    """The one sentence that a recipe is refused with."""
    called = limbeck("run", recipe(name, **changes), "--out", f"runs/{name}")
    assert called.code == 2, called
    return called.said


def table(length: int = 24, rows: int = 30) -> Table:
    g = torch.Generator().manual_seed(3)
    tokens = torch.randint(2, 13, (rows, length + 1), generator=g)
    mask = torch.ones(rows, length, dtype=torch.bool)
    mask[::3, length - 5 :], mask[1::3, :4] = False, False  # padding, and prompts
    return Table({"inputs": tokens[:, :-1], "labels": tokens[:, 1:], "mask": mask}, "tokens")


# ---- label, then teach -----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", KINDS)
def test_label_then_teach_is_teach_with_the_teacher_beside_it(kind: str) -> None:
    spec, loss = KINDS[kind]
    said = label(store={"folder": "signals", "kind": spec})
    assert "documents in signals: " in said and "KL " in said and "bytes a token" in said and "bias " in said
    told = json.loads(Path("runs/label/store.json").read_text())
    assert told["documents"] == 51 and told["bytes_per_token"] > 0 and told["fidelity"]["mass"] > 0.3
    match = ["ce", loss]
    offline = teach("offline", teacher=None, match=match, store={"folder": "signals"})
    both = teach("both", match=match, store={"kind": spec})  # the teacher is asked now, into a folder of its own
    assert all(torch.equal(offline[k], both[k]) for k in offline)
    stores = list(Path("runs/.stores").iterdir())
    assert len(stores) == 1 and content(stores[0]) == content(Path("signals"))
    alone = teach("alone", teacher=None, match=["ce"], store=None)
    assert any(not torch.equal(offline[k], alone[k]) for k in offline), "the teacher's signals change nothing"
    student = build({"net": "tiny_lm", "width": 8, "layers": 1, "heads": 2}, vocab=len(LETTERS) + 2)
    assert set(offline) == set(student.state_dict()), "what leaves is the student alone"
    if kind in ("full", "hidden"):
        online = teach("online", match=match)
        assert all(torch.allclose(offline[k], online[k], atol=1e-5) for k in online)


def test_one_vector_a_text() -> None:
    with open("texts.csv", "w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["text", "label"])
        rows.writerows([[f"{'good' if i % 2 else 'bad'} thing number {i % 7}", "yn"[i % 2]] for i in range(60)])
    net = {"net": "text_encoder", "width": 8, "layers": 1, "heads": 2}
    both = {"data": {"name": "texts.csv"}, "teacher": {**net, "weights": "random"}}
    said = label(**both, store={"folder": "vectors", "kind": "embedding"})
    assert "documents in vectors: embedding (dtype float16)" in said and "a document" in said
    told = {**both, "student": net, "match": ["ce", "rkd"], "store": {"folder": "vectors"}, "teacher": None}
    teach("emb", **told)
    assert "holds teacher_emb" in refused(**{**told, "match": ["ce", "kd"]})


def gemma(width: int) -> Any:
    from transformers import Gemma2Config, Gemma2ForCausalLM

    sizes = {"hidden_size": width, "intermediate_size": width, "num_hidden_layers": 1, "num_attention_heads": 2}
    more = {"num_key_value_heads": 2, "head_dim": 8, "final_logit_softcapping": 0.05}
    return Gemma2ForCausalLM(Gemma2Config(vocab_size=13, **sizes, **more)).eval()


def granite(width: int) -> Any:
    from transformers import GraniteConfig, GraniteForCausalLM

    sizes = {"hidden_size": width, "intermediate_size": width, "num_hidden_layers": 1, "num_attention_heads": 2}
    return GraniteForCausalLM(GraniteConfig(vocab_size=13, num_key_value_heads=2, logits_scaling=4.0, **sizes)).eval()


@pytest.mark.parametrize("model", [gemma, granite])
def test_a_head_is_kept_with_its_cap_and_its_scale(tmp_path: Path, model: Any) -> None:
    torch.manual_seed(0)
    teacher, data, kind = model(16), table(rows=10), {"hidden": {"dtype": "float32"}}
    documents = documents_in(data, kind_of(kind))
    store = SignalStore.open(capture(teacher, documents, tmp_path / "s", kind=kind), documents=documents)
    assert store.info().fidelity.kl < 1e-6 and store.info().fidelity.mass > 0.999
    batch = next(SignalBatches(Batches(data, 10, seed=0), store))
    with torch.no_grad():
        said = teacher(batch["inputs"]).logits
    hidden, head = torch.randn(*batch["inputs"].shape, 8, requires_grad=True), torch.randn(13, 8)
    theirs = {k: v for k, v in batch.items() if k.startswith("teacher_")}
    found = hidden_state_shipping(hidden, head, mask=batch["mask"], temperature=0.1, **theirs)
    wanted = forward_kl(hidden @ head.T, said, temperature=0.1) * batch["mask"]
    assert torch.allclose(found, wanted, atol=1e-5) and found.abs().max() > 1e-3
    one, two = (torch.autograd.grad(value.sum(), hidden)[0] for value in (found, wanted))
    assert torch.allclose(one, two, atol=1e-5)


def test_hidden_states_serve_every_loss_with_a_head_form_where_logits_are_large(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(route, "WORTH", 4)
    label(store={"folder": "signals", "kind": {"hidden": {"dtype": "float32"}}})
    online = teach("online", match=["ce", "forward_kl"])
    offline = teach("offline", teacher=None, match=["ce", "forward_kl"], store={"folder": "signals"})
    assert all(torch.allclose(offline[k], online[k], atol=1e-5) for k in online)
    monkeypatch.setattr(route, "WORTH", 4096)
    assert "`forward_kl` asks for teacher_logits" in refused(
        teacher=None, match=["forward_kl"], store={"folder": "signals"}
    )


# ---- killed, and read otherwise --------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", ["sampled", "hidden"])
def test_a_label_that_was_killed_goes_on_to_the_same_store(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    label("whole", store={"folder": "whole", "kind": kind})
    child = os.fork()
    if not child:
        calls, settle = [0], files._settle

        def die(file: Any) -> None:
            calls[0] += 1
            if calls[0] == 6:
                os.kill(os.getpid(), signal.SIGKILL)
            settle(file)

        monkeypatch.setattr(files, "_settle", die)
        label("killed", store={"folder": "killed", "kind": kind})
        os._exit(0)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
    assert "not finished (16 documents so far)" in refused(
        teacher=None, match=[KINDS[kind][1]], store={"folder": "killed"}
    )
    label("again", store={"folder": "killed", "kind": kind})
    assert content(Path("killed")) == content(Path("whole"))


@pytest.mark.parametrize("kind", ["sampled", {"topk": {"k": 3}}, {"full": {"bits": 32}}, {"hidden": {}}])
def test_any_batch_size_order_and_reading_ahead_brings_the_same_signals(tmp_path: Path, kind: Any) -> None:
    data, teacher = table(), build(TEACHER, vocab=13)
    documents = documents_in(data, kind_of(kind))
    store = SignalStore.open(capture(teacher, documents, tmp_path / "s", kind=kind), documents=documents)
    seen: dict[int, dict[str, torch.Tensor]] = {}
    for size, seed, ahead, room in ((7, 0, 0, 0), (10, 5, 2, 2000), (30, 9, 1, 2**22), (7, 3, 0, 2**22)):
        store.room = room  # entries that may stay decoded
        stream = SignalBatches(Batches(data, size, seed=seed, drop_last=False), store, ahead=ahead)
        for _ in range(stream.steps_per_epoch):
            batch = next(stream)
            for row, i in enumerate(batch["index"].tolist()):
                mine = {k: batch[k][row] for k in store.read(torch.tensor([[0]]), torch.tensor([[0]])) if k in batch}
                assert torch.equal(mine["mask"], data["mask"][i])
                mine = {k: v[mine["mask"]] for k, v in mine.items() if k != "mask"}
                for name, value in seen.setdefault(i, mine).items():
                    wide = min(value.shape[-1], mine[name].shape[-1]) if value.ndim > 1 else None
                    assert torch.equal(value[..., :wide], mine[name][..., :wide]), name
    assert len(seen) == len(data)


def test_texts_that_share_a_row_are_kept_as_if_each_were_alone(tmp_path: Path) -> None:
    teacher, draw = build({**TEACHER, "length": None}, vocab=13), torch.Generator().manual_seed(0)
    texts = [torch.randint(2, 13, (int(size),), generator=draw) for size in (9, 6, 14, 4, 11, 5)]
    columns = {k: torch.zeros(3, 24, dtype=torch.long) for k in ("inputs", "labels")} | {
        "segments": -torch.ones(3, 24).long()
    }
    at = {}
    for row in range(3):
        start = 0
        for number in range(2):
            text = texts[2 * row + number]
            part = slice(start, start + len(text) - 1)
            columns["inputs"][row, part], columns["labels"][row, part] = text[:-1], text[1:]
            columns["segments"][row, part] = number
            at[2 * row + number], start = (row, part), part.stop
    data = Table({**columns, "mask": columns["segments"] >= 0}, "tokens")
    kind = kind_of({"full": {"bits": 32}})
    documents = documents_in(data, kind)
    assert len(documents) == 6
    store = SignalStore.open(capture(teacher, documents, tmp_path / "s", kind=kind), documents=documents)
    batch = next(SignalBatches(Batches(data, 3, seed=4), store))
    rows = batch["index"].tolist()
    for i, (row, part) in at.items():
        with torch.no_grad():
            said = teacher(texts[i][None, :-1])["logits"][0].log_softmax(-1)
        assert torch.allclose(batch["teacher_logits"][rows.index(row), part], said, atol=1e-5)


def test_what_was_read_ahead_is_not_skipped_on_resuming(tmp_path: Path) -> None:
    data = table()
    documents = documents_in(data, kind_of("sampled"))
    store = SignalStore.open(capture(build(TEACHER, vocab=13), documents, tmp_path / "s"), documents=documents)
    plain = SignalBatches(Batches(data, 8, seed=1), store, ahead=0)
    wanted = [next(plain) for _ in range(9)]
    first = SignalBatches(Batches(data, 8, seed=1), store, ahead=3)
    for i in range(5):
        assert first.state_dict() == {"position": i} and first.epoch == i // 3
        batch = next(first)
        assert all(torch.equal(batch[k], wanted[i][k]) for k in wanted[i])
    second = SignalBatches(Batches(data, 8, seed=1), store, ahead=3)
    next(second)  # as the loop peeks
    second.load_state_dict(first.state_dict())
    for i in range(5, 9):
        batch = next(second)
        assert all(torch.equal(batch[k], wanted[i][k]) for k in wanted[i])


# ---- what is refused -------------------------------------------------------------------------------------------------
def test_stale_and_foreign_stores_are_refused() -> None:
    label(store={"folder": "signals", "kind": "sampled"})
    told: dict[str, Any] = {"teacher": None, "match": ["sampled_kl"], "store": {"folder": "signals"}}
    assert "is of kind sampled (" in refused(
        **{**told, "store": {"folder": "signals", "kind": {"sampled": {"rounds": 9}}}}
    )
    shorter = refused(**told, data={"name": "text.txt", "length": 20})
    assert "lacks" in shorter or "documents differ" in shorter
    Path("text.txt").write_text("zzz" + Path("text.txt").read_text())
    assert "is stale: `tokenizer` was" in refused(**told)
    Path("text.txt").write_text(Path("text.txt").read_text()[3:])
    save_teacher(1)
    assert "holds another capture: `teacher` was" in refused(match=["sampled_kl"], store={"folder": "signals"})


PICTURES = {"student": "resnet8", "teacher": {"net": "resnet8", "weights": "random"}}


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"store": {"kind": "sampeld"}}, ("bad.yaml:", "`store.kind`", "did you mean `sampled`")),
        ({"store": {"kind": {"topk": {"size": 3}}}}, ("topk has no option 'size'",)),
        ({"store": {"kind": {"topk": {"k": 0}}}}, ("`k` must be >= 1",)),
        ({"store": {"kind": "topk", "bits": 8}}, ("`bits` is of stores without a `kind`", "{topk: {knob: value}}")),
        ({"store": {"kind": "sampled"}, "match": ["kd"]}, ("`kd` asks for teacher_logits", "`kind: full`")),
        ({"store": {"kind": "full"}, "match": ["sampled_kl"]}, ("asks for teacher_ids", "kind: sampled or topk")),
        ({"store": {"kind": "embedding"}, "match": ["rkd"]}, ("returns 'emb'",)),
        ({"store": {"folder": "gone"}, "teacher": None}, ("gone",)),
        ({"store": {"kind": "sampled"}, "teacher": None}, ("or the folder of a store",)),
        ({"store": {"kind": "topk"}, "data": "tiny.npz", **PICTURES}, ("is of texts", "holds images")),
        ({"teacher": {"url": "http://localhost:1/v1", "model": "m"}}, ("`teach` with a `store`",)),
        ({"teacher": {"url": "http://localhost:1/v1"}, "store": {}}, ("needs `model`",)),
        ({"teacher": {"url": "localhost", "model": "m"}, "store": {}}, ("must be that of an API",)),
        ({"teacher": {"url": "http://h/v1", "model": "m", "tpo": 3}, "store": {}}, ("did you mean `top`",)),
        ({"teacher": {"url": "http://h/v1", "model": "m"}, "store": {"kind": "full"}}, ("keep `topk`, not `full`",)),
        ({"student": {"url": "http://h/v1", "model": "m"}}, ("only a teacher may be behind a server",)),
    ],
)  # fmt: skip
def test_bad_input_gets_one_sentence(changes: dict[str, Any], parts: tuple[str, ...]) -> None:
    images(Path())
    said = refused(**{"match": ["sampled_kl"], **changes})
    assert all(part in said for part in parts), said
    assert not Path("runs/.stores").exists()


# ---- a teacher behind a server ---------------------------------------------------------------------------------------
@pytest.fixture
def server() -> Iterator[Server]:
    made = Server()
    made.model = Tiny(vocab=len(LETTERS) + 2)
    yield made
    made.http.shutdown()
    made.http.server_close()


def served(server: Server, **options: Any) -> dict[str, Any]:
    return {"url": server.url, "model": "tiny", "top": 5, "backoff": 0.01, "key_env": "", **options}


def test_a_server_teaches_through_a_store(server: Server) -> None:
    server.faults = [429, "junk", "drop"]
    teacher = served(server, input_price=1000.0)
    said = label(teacher=teacher, store={"folder": "remote"})
    assert "51 documents in remote: topk (k 5, tail True, bits 8)" in said and "nan" not in said
    assert "51 requests, 3 of them again" in said and "price 1.2" in said, said
    told = json.loads(Path("runs/label/store.json").read_text())
    assert told["cost"]["requests"] == 51 and told["fidelity"]["kl"] is None
    asked = len(server.seen)
    offline = teach("offline", teacher=None, match=["ce", "top_k_kd"], store={"folder": "remote"})
    again = teach("again", teacher=teacher, match=["ce", "top_k_kd"], store={"folder": "remote"})
    assert len(server.seen) == asked, "what is kept is not asked for again"
    assert all(torch.equal(offline[k], again[k]) for k in offline)
    arms = json.loads(Path("runs/again/result.json").read_text())["arms"]
    assert set(arms) == {"student", "control"} and "taught by tiny" in arms["student"]["label"]


def test_a_server_that_fails_midway_is_asked_for_the_rest_only(server: Server) -> None:
    teacher = served(server, retries=0, concurrency=1)
    label("whole", teacher=teacher, store={"folder": "whole"})
    server.seen.clear()
    server.faults = [None] * 20 + [500]  # type: ignore[list-item]
    body = recipe("stopped", student=None, teacher=teacher, store={"folder": "stopped"})
    called = limbeck("label", body, "--out", "runs/stopped")
    assert called.code != 0 and "run it again to go on" in called.err, called
    first = len(server.seen)
    said = label("again", teacher=teacher, store={"folder": "stopped"})
    assert first in (20, 21) and len(server.seen) - first == 51 - 16, "whole groups of 8 were kept"
    assert f"{first + 51 - 16} requests" in said
    assert content(Path("stopped")) == content(Path("whole"))
