"""The teacher-signal store for language: the same signals whatever befell the capture and however they are read."""

import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from limbeck.core.batches import Batches, Table
from limbeck.core.errors import BadInput
from limbeck.core.maths import FLOOR, kl, log_probs
from limbeck.core.signals.coding import BLOCK, Codebook, Entries, Layout, decode, encode, symbols
from limbeck.core.signals.draws import draw, rounded, weight_of
from limbeck.core.signals.feeding import SignalBatches
from limbeck.core.signals.files import ENTRY, Index
from limbeck.core.signals.keys import Document, documents_of, tokenizer_fingerprint
from limbeck.core.signals.kinds import Sampled, TopK, kind_of
from limbeck.core.signals.reading import SignalStore
from limbeck.core.signals.writing import capture
from limbeck.losses.logits.forward_kl import forward_kl
from limbeck.losses.tokens.sampled_kl import sampled_kl
from limbeck.losses.tokens.top_k_kd import top_k_kd

ROOT = Path(__file__).parent.parent
VOCAB = 97
KINDS = {
    "sampled": "sampled",
    "tempered": {"sampled": {"rounds": 20, "tau": 0.7}},
    "systematic": {"sampled": {"systematic": True}},
    "topk": {"topk": {"k": 8, "bits": 6}},
    "exact topk": {"topk": {"k": 8, "bits": 32, "tail": False}},
    "full": {"full": {"bits": 32}},
    "hidden": {"hidden": {"dtype": "float32"}},
}


class Tiny(nn.Module):
    """A causal language model: the mean of all embeddings so far, and the last one, through a head."""

    def __init__(self, vocab: int = VOCAB, width: int = 16, seed: int = 0, sharp: float = 3.0) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.embed, self.head = nn.Embedding(vocab, width), nn.Linear(width, vocab)
        self.sharp, self.asked = sharp, 0

    def forward(self, inputs: Tensor) -> dict[str, Tensor]:
        self.asked += len(inputs)
        x = self.embed(inputs)
        hidden = self.sharp * (x + x.cumsum(1) / torch.arange(1, x.shape[1] + 1)[:, None])
        return {"logits": self.head(hidden), "hidden": hidden, "emb": hidden[:, -1]}


def texts(count: int = 23, vocab: int = VOCAB, longest: int = 200, seed: int = 1) -> list[Document]:
    """Documents of any length, some with a mask; their ids are no row numbers."""
    g = torch.Generator().manual_seed(seed)
    out = []
    for i in range(count):
        length = int(torch.randint(1, longest, (), generator=g))
        tokens = (torch.rand(length, generator=g) ** 3 * vocab).long()
        mask = torch.rand(max(0, length - 1), generator=g) > 0.4 if i % 3 == 2 else None
        out.append(Document(7 * i + 3, tokens, mask, text=" ".join(map(str, tokens.tolist()))))
    return out


def content(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir())}


def whole(store: SignalStore, document: Document) -> dict[str, Tensor]:
    """A document's signals by name, [P, ...]."""
    return {k: v[0] for k, v in store.read_documents(torch.tensor([document.id])).items()}


def same(a: Tensor, b: Tensor) -> bool:
    """Equal but for how far the entries are padded."""
    if a.ndim > 1 and a.shape[-1] != b.shape[-1]:
        k = min(a.shape[-1], b.shape[-1])
        a, b = a[..., :k], b[..., :k]
    return torch.equal(a, b)


# ---- coding ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("vocab", [2, 300, 49152, 2**18 + 5])
@pytest.mark.parametrize(("classes", "bits", "tail"), [(6, 0, False), (1, 8, True), (1, 32, False)])
def test_entries_come_back_from_their_bits(vocab: int, classes: int, bits: int, tail: bool) -> None:
    g = np.random.default_rng(vocab + bits)
    places = 3 * BLOCK + 11
    sizes = g.integers(0, min(vocab, 40) + 1, places) * (g.random(places) > 0.2)
    sizes[:BLOCK] = 0  # a block without any entry
    order = g.permutation(vocab)
    ids = np.concatenate([order[np.sort(g.choice(vocab, n, replace=False))] for n in sizes])
    counts = g.integers(1, 2**classes, len(ids)) if classes > 1 else np.ones_like(ids)
    entries = Entries(sizes, ids, counts, g.integers(0, 2**bits, len(ids)), g.integers(0, 2**16, places) * tail)
    layout, ranks = Layout(classes, bits, tail, order), np.argsort(order)
    book = Codebook.of(symbols(entries.rows(0, 2 * BLOCK), layout, ranks))  # of a part: all must be writable
    blocks, spent = encode(entries, layout, ranks, book)
    assert sum(spent.values()) == 8 * sum(map(len, blocks)) and len(blocks) == 4
    for chosen in ([0, 1, 2, 3], [3, 1], [2], [0], [1, 0, 3]):
        data = np.frombuffer(b"".join(blocks[i] for i in chosen), np.uint8)
        starts = np.cumsum([0, *[len(blocks[i]) for i in chosen]])[:-1]
        stretches = [(BLOCK * i, min(BLOCK * i + BLOCK, places)) for i in chosen]
        found = decode(data, starts, np.array([b - a for a, b in stretches]), layout, book)
        wanted = [entries.rows(*s) for s in stretches]
        assert np.array_equal(found.sizes, np.concatenate([w.sizes for w in wanted]))
        for key in ("ids", "counts", "values", "tails"):
            assert np.array_equal(getattr(found, key), np.concatenate([getattr(w, key) for w in wanted])), key


# ---- draws -----------------------------------------------------------------------------------------------------------
def test_draws_depend_on_seed_document_and_place_alone() -> None:
    logits = torch.randn(40, VOCAB, generator=torch.Generator().manual_seed(0)) * 2
    kind, places = Sampled(rounds=30, tau=0.8), np.arange(40) * 3
    all_at_once = kind.entries(logits, 5, 11, places)
    for start, stop in ((0, 7), (7, 8), (8, 40)):
        part = kind.entries(logits[start:stop], 5, 11, places[start:stop])
        wanted = all_at_once.rows(start, stop)
        assert all(np.array_equal(getattr(part, k), getattr(wanted, k)) for k in ("sizes", "ids", "counts", "values"))
    for other in (
        kind.entries(logits, 6, 11, places),
        kind.entries(logits, 5, 12, places),
        kind.entries(logits, 5, 11, places + 1),
    ):
        assert not np.array_equal(other.ids, all_at_once.ids)


@pytest.mark.parametrize(("tau", "systematic"), [(1.0, False), (1.0, True), (0.6, False), (1.5, False)])
def test_weights_are_unbiased(tau: float, systematic: bool) -> None:
    p = torch.tensor([0.5, 0.0, 0.3, 0.15, 0.04, 0.01, 0.0])
    times, kind = 20000, Sampled(rounds=10, tau=tau, systematic=systematic)
    entries = kind.entries(p.log().expand(times, -1), 3, 0, np.arange(times))
    w = np.zeros((times, len(p)))
    w[np.repeat(np.arange(times), entries.sizes), entries.ids] = kind.values(entries)
    error = w.std(0) / times**0.5
    assert (np.abs(w.mean(0) - p.numpy()) <= 4 * error + 1e-7).all(), (w.mean(0), p, error)
    assert w[:, 1].max() == 0 == w[:, 6].max(), "what the teacher rules out is never drawn"
    if tau == 1:
        assert np.allclose(w.sum(1), 1)
        independent = (p * (1 - p) / 10).numpy()
        if systematic:
            assert w.var(0).sum() < 0.3 * independent.sum() and (w.var(0) <= independent).all()
        else:
            assert np.allclose(w.var(0), independent, rtol=0.1, atol=1e-6)


def test_rounding_keeps_the_expectation() -> None:
    weights = np.array([1e-8, 3e-4, 0.02, 0.777, 1.0, 40.0])
    codes = np.stack([rounded(weights, 0, 1, np.stack([np.full(6, t), np.arange(6)])) for t in range(4000)])
    assert codes.min() >= 0 and codes.max() < 256 and (codes.max(0) - codes.min(0) <= 1).all()
    read = weight_of(codes)
    assert (np.abs(read.mean(0) - weights) <= 4 * read.std(0) / 4000**0.5 + 1e-12 * weights).all()


def test_a_document_of_the_last_id_only() -> None:
    """Rounding at the end of the cumulative sum does not lead to an id that cannot be drawn."""
    logits = torch.full((1, 5), -torch.inf)
    logits[0, 2] = 0.0
    sizes, ids, counts, _ = draw(log_probs(logits), 0, 0, np.arange(1), rounds=50, tau=1.0, systematic=False)
    assert sizes.tolist() == [1] and ids.tolist() == [2] and counts.tolist() == [50]


@pytest.mark.parametrize(
    "spec", ["sampled", {"sampled": {"rounds": 20, "tau": 0.7}}, {"sampled": {"systematic": True}}]
)
def test_the_expected_gradient_is_that_of_the_whole_distribution(tmp_path: Path, spec) -> None:
    """Over the store: 600 documents of one text are 600 independent draws of the same teacher."""
    teacher, tokens, times = Tiny(), torch.randint(VOCAB, (9,), generator=torch.Generator().manual_seed(4)), 600
    documents = [Document(i, tokens) for i in range(times)]
    store = SignalStore.open(capture(teacher, documents, tmp_path / "s", kind=spec, batch_size=200))
    teacher_logits = teacher(tokens[None, :-1])["logits"].detach()
    student_logits = torch.randn(1, 8, VOCAB, generator=torch.Generator().manual_seed(5))
    z = student_logits.clone().requires_grad_()
    forward_kl(z, teacher_logits).sum().backward()
    assert z.grad is not None
    read = store.read_documents(torch.arange(times))
    z_all = student_logits.expand(times, -1, -1).clone().requires_grad_()
    values = sampled_kl(z_all, read["teacher_ids"], read["teacher_weights"])
    values.sum().backward()
    assert z_all.grad is not None
    mean = z_all.grad.mean(0)
    error = (z_all.grad.std(0) / times**0.5).clamp_min(1 / 20 / times)  # what is never drawn has no deviation
    far = (mean - z.grad[0]).abs() / error
    assert far.max() < 5 and (far > 2).double().mean() < 0.08, (far.max(), (far > 2).double().mean())
    # and so is the value, the cross-entropy
    full = -(teacher_logits.softmax(-1) * student_logits.log_softmax(-1)).sum(-1)[0]
    assert ((values.mean(0) - full).abs() <= 4.5 * values.std(0) / times**0.5).all()
    # the same test finds the bias of renormalised top-k
    p = teacher_logits.softmax(-1)
    kept = torch.zeros_like(p).scatter(-1, p.topk(8).indices, p.topk(8).values)
    biased = student_logits.softmax(-1) - kept / kept.sum(-1, keepdim=True)
    assert ((biased[0] - z.grad[0]).abs() / error).max() > 5


# ---- the store -------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> dict[str, SignalStore]:
    folder = tmp_path_factory.mktemp("stores")
    return {k: SignalStore.open(capture(Tiny(), texts(), folder / k, kind=v, batch_size=5)) for k, v in KINDS.items()}


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_read_is_what_the_teacher_said(stores: dict[str, SignalStore], kind: str) -> None:
    store, teacher = stores[kind], Tiny()
    for document in texts():
        if not document.places:
            continue
        read, out = whole(store, document), teacher(document.tokens[None, :-1])
        logits = out["logits"][0].detach()
        assert read["mask"].nonzero()[:, 0].tolist() == document.asked.tolist()
        at = read["mask"]
        if not at.any():
            continue
        if kind == "hidden":
            assert torch.allclose(read["teacher_hidden"][at], out["hidden"][0][at], atol=1e-5)
            again = F.linear(read["teacher_hidden"], store.head()["teacher_head"], store.head()["teacher_head_bias"])
            assert torch.allclose(again[at], logits[at], atol=1e-4)
        elif kind == "full":
            assert torch.allclose(read["teacher_logits"][at], logits.log_softmax(-1)[at], atol=1e-4)
        elif "topk" in kind:
            assert read["teacher_ids"][at].sort(-1).values.equal(logits.topk(8).indices[at].sort(-1).values)
            exact = logits.log_softmax(-1).gather(-1, read["teacher_ids"])[at]
            far = (read["teacher_logprobs"][at].exp() - exact.exp()).abs().max()
            assert far < (1e-5 if kind == "exact topk" else 0.13)
            if kind == "topk":
                mass = read["teacher_logprobs"].exp().sum(-1) + read["teacher_tail"]
                assert torch.allclose(mass[at], torch.ones(int(at.sum())), atol=1e-5)
                assert torch.allclose(read["teacher_tail"][at], 1 - exact.exp().sum(-1), atol=1e-3)
        else:
            method = kind_of(KINDS[kind])
            wanted = method.entries(logits[at], 0, document.id, document.asked)
            w = torch.zeros(len(logits), VOCAB, dtype=torch.double)
            w[np.repeat(document.asked, wanted.sizes), wanted.ids] = torch.from_numpy(method.values(wanted))
            found = torch.zeros_like(w).scatter_add(-1, read["teacher_ids"], read["teacher_weights"].double())
            assert (found - w).abs().max() < 1e-4
            assert (read["teacher_weights"] > 0).sum() == len(wanted.ids)


@pytest.mark.parametrize("kind", KINDS)
def test_reads_agree_for_any_batch_size_order_packing_and_cut(stores: dict[str, SignalStore], kind: str) -> None:
    store, documents = stores[kind], [d for d in texts() if d.places]
    alone = {d.id: whole(store, d) for d in documents}
    g = random.Random(0)
    for size in (1, 4, len(documents)):
        order = g.sample(documents, len(documents))
        for start in range(0, len(order), size):
            group = order[start : start + size]
            read = store.read_documents(torch.tensor([d.id for d in group]))
            for row, d in enumerate(group):
                for name, values in read.items():
                    assert same(values[row, : d.places], alone[d.id][name]), (name, d.id)
                    assert not read["mask"][row, d.places :].any()
    for width in (1, 37, 300):  # packed: pieces of documents one after the other in rows of any width, shuffled
        line = [(d.id, t) for d in g.sample(documents, len(documents)) for t in range(d.places)]
        pieces = [line[i : i + 41] for i in range(0, len(line), 41)]
        g.shuffle(pieces)
        line = [p for piece in pieces for p in piece][: 5 * width if width < 37 else None]
        line += [(-1, 0)] * (-len(line) % width)
        document, place = (torch.tensor([p[i] for p in line]).view(-1, width) for i in (0, 1))
        read = store.read(document, place)
        for row, column in ((r, c) for r in range(document.shape[0]) for c in range(0, width, 5)):
            d, t = int(document[row, column]), int(place[row, column])
            assert bool(read["mask"][row, column]) == (d >= 0 and bool(alone[d]["mask"][t]))
            for name in read if read["mask"][row, column] else ():
                one, two = read[name][row, column], alone[d][name][t]
                k = min(one.shape[-1], two.shape[-1]) if one.ndim else None
                assert torch.equal(one[:k] if k else one, two[:k] if k else two), (name, d, t)


def test_batches_agree_for_any_order_and_rank(tmp_path: Path) -> None:
    g = torch.Generator().manual_seed(0)
    tokens, lengths = torch.randint(VOCAB, (12, 31), generator=g), torch.randint(5, 31, (12,), generator=g)
    mask = torch.arange(30) < lengths[:, None]
    table = Table({"inputs": tokens[:, :-1], "labels": tokens[:, 1:], "mask": mask}, "language")
    documents = documents_of(table["inputs"], table["labels"], table["mask"])
    assert [d.places for d in documents] == lengths.tolist()
    store = SignalStore.open(capture(Tiny(), documents, tmp_path / "s"), documents=documents)
    seen: dict[int, set[bytes]] = {}
    settings = [
        (12, 0, 1, False),
        (4, 0, 1, True),
        (2, 1, 2, True),
        (2, 0, 2, True),
        (6, 0, 3, True),
        (6, 1, 3, True),
        (6, 2, 3, True),
    ]
    for size, rank, world, shuffle in settings:
        batches = SignalBatches(Batches(table, size, shuffle=shuffle, rank=rank, world=world), store)
        for _ in range(batches.steps_per_epoch):
            batch = next(batches)
            assert torch.equal(batch["mask"], mask[batch["index"]])
            assert batch["teacher_ids"].shape[:2] == batch["labels"].shape
            for i, ids, w in zip(batch["index"].tolist(), batch["teacher_ids"], batch["teacher_weights"], strict=True):
                target = torch.zeros(30, VOCAB).scatter_add(-1, ids, w)
                seen.setdefault(i, set()).add(target.numpy().tobytes())
    assert sorted(seen) == list(range(12)) and all(len(variants) == 1 for variants in seen.values())
    resumed = SignalBatches(Batches(table, 4), store)
    next(resumed)
    other = SignalBatches(Batches(table, 4), store)
    other.load_state_dict(resumed.state_dict())
    assert torch.equal(next(resumed)["teacher_weights"], next(other)["teacher_weights"])


def test_one_vector_a_document(tmp_path: Path) -> None:
    documents = [d for d in texts() if len(d.tokens) == len(texts()[1].tokens)] + texts()[3:4]
    store = SignalStore.open(
        capture(Tiny(), documents, tmp_path / "s", kind={"embedding": {"dtype": "float32"}}, batch_size=1)
    )
    for d in documents:
        wanted = Tiny()(d.tokens[None])["emb"][0]
        assert torch.allclose(store.read_documents(torch.tensor([d.id]))["teacher_emb"][0], wanted, atol=1e-6)
    with pytest.raises(BadInput, match="one vector a document"):
        store.read(torch.tensor([[documents[0].id]]), torch.tensor([[0]]))


@pytest.mark.parametrize("spec", ["sampled", {"topk": {"k": 20}}])
def test_vocabularies_above_two_to_the_seventeen(tmp_path: Path, spec) -> None:
    vocab = 2**17 + 2**16
    teacher = Tiny(vocab, width=4)
    documents = [Document(i, torch.tensor([vocab - 1, 5, 2**17 + i, 70000])) for i in range(3)]
    store = SignalStore.open(capture(teacher, documents, tmp_path / "s", kind=spec))
    read = store.read_documents(torch.tensor([2]))
    assert read["teacher_ids"].max() >= 2**17
    logits = teacher(documents[2].tokens[None, :-1])["logits"]
    if spec == "sampled":
        wanted = Sampled().entries(logits[0].detach(), 0, 2, np.arange(3))
        assert set(wanted.ids.tolist()) == set(read["teacher_ids"].flatten().tolist())
    else:
        assert logits.topk(20).indices.sort(-1).values.equal(read["teacher_ids"].sort(-1).values)


# ---- kills -----------------------------------------------------------------------------------------------------------
KILLS = """
import os, random, signal, sys, torch
sys.path.insert(0, {tests!r})
torch.set_num_threads(1)
from pathlib import Path
from test_signals import Tiny, texts, capture
from limbeck.core.signals import files
settle = files._settle
def settle_or_die(file):  # at the chosen write, with nothing, something or all of it on disk
    global left
    left -= 1
    if left < 0:
        if how > 0:
            file.flush()
        if how > 1:
            settle(file)
        os.kill(os.getpid(), signal.SIGKILL)
    settle(file)
files._settle = settle_or_die
folder, g, kills = Path(sys.argv[1]), random.Random({seed}), 0
teacher, documents = Tiny(), texts()
for attempt in range(20):
    left, how = g.randrange(4) if attempt < 15 else 1000, g.randrange(3)
    child = os.fork()
    if not child:
        capture(teacher, documents, folder, kind={kind!r}, batch_size=2)
        os._exit(0)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    kills += code == -signal.SIGKILL
    if not code:
        break
    assert code == -signal.SIGKILL, code
    part = folder / g.choice(["index-000.bin", "signals-000.bin"])
    if g.random() < 0.5 and part.exists():  # what a disk that lost power may leave on top of it
        with part.open("ab") as file:
            file.write(g.randbytes(g.randrange(1, 300)))
print(kills)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("kind", ["sampled", {"topk": {"k": 8}}, "hidden"], ids=str)
def test_a_capture_killed_at_any_moment_leaves_the_same_bytes(tmp_path: Path, kind) -> None:
    """Killed by SIGKILL again and again in the middle of a write, each time going on where it was."""
    undisturbed = content(capture(Tiny(), texts(), tmp_path / "a", kind=kind, batch_size=2))
    script, folder = KILLS.format(tests=str(ROOT / "tests"), kind=kind, seed=len(str(kind))), tmp_path / "b"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", script, folder], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert content(folder) == undisturbed
    assert int(done.stdout) >= 5, "too few were killed to show anything"


def test_a_write_torn_anywhere_is_mended(tmp_path: Path) -> None:
    documents = texts(9)
    undisturbed = content(capture(Tiny(), documents, tmp_path / "a", batch_size=4))
    index, signals = len(undisturbed["index-000.bin"]), len(undisturbed["signals-000.bin"])
    for name, size in [
        ("index", n) for n in (0, 1, ENTRY.itemsize - 1, ENTRY.itemsize, 5 * ENTRY.itemsize + 3, index - 1)
    ] + [("signals", n) for n in (0, 17, signals // 2, signals - 1)]:
        folder = tmp_path / f"{name}{size}"
        capture(Tiny(), documents, folder, batch_size=4)
        with (folder / f"{name}-000.bin").open("r+b") as file:
            file.truncate(size)
        with pytest.raises(BadInput, match="damaged|not finished"):
            SignalStore.open(folder)
        teacher = Tiny()
        capture(teacher, documents, folder, batch_size=4)
        assert content(folder) == undisturbed, (name, size)


def test_a_second_capture_asks_nothing_and_more_documents_are_added(tmp_path: Path) -> None:
    first, teacher = capture(Tiny(), texts(8), tmp_path / "s", batch_size=4), Tiny()
    before = content(first)
    capture(teacher, texts(8), tmp_path / "s", batch_size=4)
    assert teacher.asked == 0 and content(first) == before
    capture(teacher, texts(12), tmp_path / "s", batch_size=4)
    assert teacher.asked == 4
    store = SignalStore.open(first, documents=texts(12))
    assert len(store.index.entries) == 12


def test_several_processes_write_one_store(tmp_path: Path) -> None:
    alone = SignalStore.open(capture(Tiny(), texts(), tmp_path / "a", batch_size=4))
    for rank in (1, 0):
        folder = capture(Tiny(), texts(), tmp_path / "b", batch_size=4, rank=rank, world=3)
    with pytest.raises(BadInput, match="not finished"):
        SignalStore.open(folder)
    capture(Tiny(), texts(), folder, batch_size=4)  # one process goes on where three were
    together = SignalStore.open(folder)
    assert sorted(p.name for p in folder.glob("index-*")) == ["index-000.bin", "index-001.bin"]
    for d in texts():
        if d.places:
            one, two = whole(alone, d), whole(together, d)
            assert all(torch.equal(one[name], two[name]) for name in one)


def test_two_writers_of_one_part_are_kept_apart(tmp_path: Path) -> None:
    from limbeck.core.signals.files import Log

    folder = capture(Tiny(), texts(4), tmp_path / "s")
    with Log(folder, 0), pytest.raises(BadInput, match="another process is writing part 0"):
        capture(Tiny(), texts(8), folder)


# ---- refusals --------------------------------------------------------------------------------------------------------
def test_foreign_and_stale_stores_are_refused_with_what_differs(tmp_path: Path) -> None:
    documents, told = texts(6), {"tokenizer": "a" * 64, "template": "{prompt}"}
    folder = capture(Tiny(), documents, tmp_path / "s", **told)
    for key, change in {
        "teacher": lambda: capture(Tiny(seed=1), documents, folder, **told),
        "tokenizer": lambda: capture(Tiny(), documents, folder, tokenizer="b" * 64, template="{prompt}"),
        "template": lambda: capture(Tiny(), documents, folder, tokenizer="a" * 64, template="[{prompt}]"),
        "kind": lambda: capture(Tiny(), documents, folder, kind={"sampled": {"rounds": 60}}, **told),
        "seed": lambda: capture(Tiny(), documents, folder, seed=1, **told),
    }.items():
        with pytest.raises(BadInput, match=f"holds another capture: `{key}` was .* there and is .* now"):
            change()
    SignalStore.open(folder, template="{prompt}", tokenizer="a" * 64, documents=documents[2:4])
    for key, value in (("teacher", "c" * 64), ("tokenizer", "b" * 64), ("template", "[{prompt}]")):
        with pytest.raises(BadInput, match=f"is stale: `{key}` was"):
            SignalStore.open(folder, **{key: value})
    d = documents[3]
    for other, why in (
        (Document(d.id, d.tokens + 1, d.mask, d.text), "tokenizer or template changed"),
        (Document(d.id, d.tokens + 1, d.mask, "another text"), "its text is another"),
        (Document(d.id, d.tokens.flip(0), d.mask), "not those that the teacher read"),
    ):
        with pytest.raises(BadInput, match=f"document {d.id} has changed .*{why}"):
            capture(Tiny(), [*documents[:3], other], folder, **told)
        with pytest.raises(BadInput, match=f"1 of 2 documents differ, the first of them number {d.id} .*{why}"):
            SignalStore.open(folder, documents=[documents[0], other])
    with pytest.raises(BadInput, match="lacks 1 of 1 documents, the first of them 999"):
        SignalStore.open(folder, documents=[Document(999, d.tokens)])
    with pytest.raises(BadInput, match="but not number 999"):
        SignalStore.open(folder).read_documents(torch.tensor([999]))
    with pytest.raises(BadInput, match=rf"document {d.id} has the places 0 to {d.places - 1}, asked for is {d.places}"):
        SignalStore.open(folder).read(torch.tensor([[d.id]]), torch.tensor([[d.places]]))
    with pytest.raises(BadInput, match="two documents have the same id"):
        capture(Tiny(), [*documents, documents[0]], folder, **told)
    with pytest.raises(BadInput, match="no kind of signal 'sample'.*`sampled`"):
        capture(Tiny(), documents, tmp_path / "t", kind="sample")
    with pytest.raises(BadInput, match="needs a folder of its own"):
        capture(Tiny(), documents, tmp_path)
    with pytest.raises(BadInput, match="no store of teacher signals"):
        SignalStore.open(tmp_path)
    assert not (tmp_path / "t").exists()


def test_damage_is_found_when_it_is_read(tmp_path: Path) -> None:
    folder = capture(Tiny(), texts(6), tmp_path / "s")
    entry = Index(folder).entries[2]
    with (folder / "signals-000.bin").open("r+b") as file:
        file.seek(int(entry["offset"]) + int(entry["size"]) // 2)
        byte = file.read(1)
        file.seek(-1, 1)
        file.write(bytes([byte[0] ^ 4]))
    store = SignalStore.open(folder)
    whole(store, texts(6)[1])
    with pytest.raises(BadInput, match=f"signals of document {int(entry['document'])} .* damaged"):
        store.read_documents(torch.tensor([int(entry["document"])]))


def test_tokenizers_are_told_apart() -> None:
    from limbeck.adapters.words import Bytes, Chars

    assert tokenizer_fingerprint(Chars(["abc"])) == tokenizer_fingerprint(Chars(["cba"]))
    assert len({tokenizer_fingerprint(t) for t in (Chars(["abc"]), Chars(["abd"]), Bytes())}) == 3


def test_hidden_states_go_with_their_head_alone(tmp_path: Path) -> None:
    class Scaled(Tiny):
        def forward(self, inputs: Tensor) -> dict[str, Tensor]:
            out = super().forward(inputs)
            return {**out, "logits": 2 * out["logits"]}

    with pytest.raises(BadInput, match="do not give its logits"):
        capture(Scaled(), texts(4), tmp_path / "a", kind="hidden")
    folder = capture(Tiny(), texts(4), tmp_path / "b", kind="hidden")
    other = capture(Tiny(seed=1), texts(4), tmp_path / "c", kind="hidden")
    (folder / "head.safetensors").write_bytes((other / "head.safetensors").read_bytes())
    with pytest.raises(BadInput, match="is not the head that the hidden states were captured with"):
        SignalStore.open(folder).head()


# ---- fidelity --------------------------------------------------------------------------------------------------------
def test_the_report_says_what_was_lost_and_where_the_bytes_are(tmp_path: Path) -> None:
    documents = [d for d in texts(40) if d.mask is None and d.places]
    logits = torch.cat([Tiny()(d.tokens[None, :-1])["logits"][0].detach() for d in documents])
    p = logits.double().softmax(-1)
    reports = {}
    for name, spec in {
        "sampled": "sampled",
        "topk": {"topk": {"k": 8, "bits": 32}},
        "full": {"full": {"bits": 8}},
    }.items():
        info = SignalStore.open(capture(Tiny(), documents, tmp_path / name, kind=spec)).info()
        f = reports[name] = info.fidelity
        assert f.places == info.places == len(logits) and len(str(f)) > 40
        assert f.bytes_per_token * f.places == pytest.approx(info.bytes - info.fixed)
        assert min(f.bytes.values()) >= 0
    sampled, topk = reports["sampled"], reports["topk"]
    assert abs(sampled.bias) < 3 * sampled.bias_error and sampled.bias_error < 0.02
    assert sampled.spread == pytest.approx(float((1 - p.square().sum(-1)).mean()) / 50, rel=0.1)
    assert sampled.bytes_per_token == pytest.approx(sum(sampled.bytes.values()))
    kept = torch.zeros_like(p).scatter(-1, p.topk(8).indices, p.topk(8).values)
    even = torch.where(kept > 0, kept, (1 - kept.sum(-1, keepdim=True)) / (VOCAB - 8))
    assert topk.mass == pytest.approx(float(kept.sum(-1).mean()), abs=1e-6)
    assert topk.kl == pytest.approx(float((p * (p.log() - even.log())).sum(-1).mean()), rel=1e-3)
    assert topk.bias == pytest.approx(float(((even - p) * p.log()).sum(-1).mean()), rel=1e-3)
    assert topk.spread == pytest.approx(float((even - p).square().sum(-1).mean()), rel=1e-3)
    assert abs(topk.bias) > 10 * topk.bias_error, "what top-k loses is no noise"
    assert 0 < reports["full"].kl < 1e-2


@pytest.mark.parametrize("spec", ["sampled", {"topk": {"k": 8}}, {"topk": {"k": 38}}, "full"], ids=str)
def test_words_that_a_teacher_forbids_are_no_part_of_the_bias(spec: object, tmp_path: Path) -> None:
    class Forbids:
        fingerprint, vocab, alone = "forbids", 40, True

        def ask(self, documents, kind):
            for d in documents:
                z = 2 * torch.randn(len(d.asked), 40, generator=torch.Generator().manual_seed(d.id))
                yield torch.cat([z[:, :-3], torch.full_like(z[:, :3], -torch.inf)], -1)

    documents = [Document(i, torch.arange(10)) for i in range(4)]
    f = SignalStore.open(capture(Forbids(), documents, tmp_path / "s", kind=spec)).info().fidelity
    assert abs(f.bias) < 0.5 and f.bias_error < 0.1, f


def test_sampled_targets_of_a_49k_vocabulary_take_less_than_40_bytes(tmp_path: Path) -> None:
    """Zipf's law at about 12 distinct ids of 50 draws."""
    vocab, g = 49152, torch.Generator().manual_seed(0)
    logits = -1.5 * torch.log(torch.arange(1, vocab + 1.0)) + 2.8 * torch.randn(150, vocab, generator=g)

    class Fixed:
        fingerprint, alone = "fixed", True

        def __init__(self) -> None:
            self.vocab = vocab

        def ask(self, documents, kind):
            yield from (logits[50 * d.id : 50 * d.id + 50] for d in documents)

    tokens = [torch.multinomial(logits[i * 50 : i * 50 + 50].softmax(-1), 1, generator=g)[:, 0] for i in range(3)]
    documents = [Document(i, torch.cat([t, t[:1]])) for i, t in enumerate(tokens)]
    f = SignalStore.open(capture(Fixed(), documents, tmp_path / "s")).info().fidelity
    assert 8 < f.ids < 18 and f.bytes_per_token < 40, f


# ---- losses ----------------------------------------------------------------------------------------------------------
def logits(seed: int, *shape: int, scale: float = 2.0) -> Tensor:
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_top_k_of_the_whole_vocabulary_is_the_divergence() -> None:
    z, t = logits(0, 5, 11), logits(1, 5, 11)
    kept, ids = t.log_softmax(-1).sort(-1, descending=True)
    for tail in (None, torch.zeros(5, dtype=torch.float64)):
        assert torch.allclose(top_k_kd(z, ids, kept, tail), kl(z, t), atol=1e-9)


def test_top_k_is_a_lower_bound_and_zero_where_the_kept_agree() -> None:
    z, t = logits(0, 200, 11).requires_grad_(), logits(1, 200, 11)
    kept, ids = t.log_softmax(-1).topk(4)
    bound = top_k_kd(z, ids, kept)
    assert (bound <= kl(z, t) + 1e-12).all() and (bound >= 0).all() and (bound < kl(z, t) - 1e-4).any()
    # a student that has the kept probabilities and spreads the rest in any way
    rest = logits(2, 200, 11).softmax(-1).scatter(-1, ids, 0.0)
    agrees = (rest / rest.sum(-1, keepdim=True) * (1 - kept.exp().sum(-1, keepdim=True))).scatter(-1, ids, kept.exp())
    z = agrees.log().requires_grad_()
    at_best = top_k_kd(z, ids, kept)
    at_best.sum().backward()
    assert z.grad is not None and at_best.abs().max() < 1e-12 and z.grad.abs().max() < 1e-9
    # equality where q / p is constant over the tail
    shifted = t.clone().scatter_add(-1, ids, logits(3, 200, 4)).double()
    assert torch.allclose(top_k_kd(shifted, ids, kept), kl(shifted, t), atol=1e-9)


def test_repeated_ids_pad_without_a_trace() -> None:
    z, t = logits(0, 6, 11), logits(1, 6, 11)
    kept, ids = t.log_softmax(-1).topk(4)
    padded_ids = torch.cat([ids, ids[:, :1].expand(-1, 3)], -1)
    padded = torch.cat([kept, torch.full((6, 3), FLOOR, dtype=torch.float64)], -1)
    assert torch.allclose(top_k_kd(z, padded_ids, padded), top_k_kd(z, ids, kept), atol=1e-12)
    assert torch.allclose(
        top_k_kd(z, padded_ids, padded.masked_fill(padded == FLOOR, -torch.inf)), top_k_kd(z, ids, kept)
    )


def test_sampled_targets_with_all_weights_are_the_cross_entropy() -> None:
    z, t = logits(0, 3, 5, 11), logits(1, 3, 5, 11)
    ids = torch.arange(11).expand(3, 5, 11)
    entropy = -(t.softmax(-1) * t.log_softmax(-1)).sum(-1)
    assert torch.allclose(sampled_kl(z, ids, t.softmax(-1)) - entropy, kl(z, t), atol=1e-12)


def test_kinds_refuse_what_is_out_of_range() -> None:
    for spec, match in (
        ({"sampled": {"rounds": 0}}, "`rounds` must be >= 1"),
        ({"sampled": {"tau": 0}}, "`tau` must be > 0"),
        ({"topk": {"k": 0}}, "`k` must be >= 1"),
        ({"topk": {"bits": 3}}, "`bits` must be 4 to 16, or 32"),
        ({"full": {"bits": 5}}, "`bits` must be"),
        ({"hidden": {"dtype": "int8"}}, "`dtype` must be"),
        ({"topk": {"kk": 3}}, "topk has no option 'kk'.*`k`"),
    ):
        with pytest.raises(ValueError, match=match):
            kind_of(spec)
    assert kind_of(TopK(k=3)) == kind_of({"topk": {"k": 3}})
