"""The teacher-signal store on a real teacher: bytes a token of every kind, codings side by side, speed, fidelity.

`python benchmarks/signals.py --teacher FOLDER --text FILE` prints tables and writes benchmarks/results/signals.json.
FOLDER holds a transformers model with its tokenizer, FILE plain text, or lines of JSON whose values are joined.

Codings: the same sampled ids and counts in fixed widths; sorted ranks with Rice-coded gaps, the best parameter a place;
in Elias-Fano form over 16 stretches of about equal frequency, counts in Elias-gamma; as `core/signals/coding.py` writes
them; and the entropy of its symbols, below which no prefix code can go. Speed: processor time, the median of many
reads. Step: forward and backward of a student with half the teacher's layers by cross-entropy on labels, and the same
by `sampled_kl` with its targets read from the store; they take turns, and each pair gives a ratio.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from limbeck.core.checkpoint import fingerprint
from limbeck.core.signals.coding import Entries, symbols
from limbeck.core.signals.keys import Document, tokenizer_fingerprint
from limbeck.core.signals.reading import SignalStore
from limbeck.core.signals.writing import capture
from limbeck.losses.tokens.sampled_kl import sampled_kl

ROOT = Path(__file__).resolve().parent.parent
GOALS = {"bytes_a_token": 40.0, "step_ratio": 1.10}
KINDS: dict[str, Any] = {
    "sampled": "sampled",
    "sampled, systematic": {"sampled": {"systematic": True}},
    "sampled, tau 0.7": {"sampled": {"tau": 0.7}},
    "topk 20": {"topk": {"k": 20}},
    "topk 64": {"topk": {"k": 64}},
}


def documents(tokenizer: Any, text: str, count: int, length: int) -> list[Document]:
    """Texts of up to `length` tokens: a JSON line each, or stretches of plain text."""
    if text.lstrip().startswith("{"):
        parts = ["\n".join(str(v) for v in json.loads(line).values()) for line in text.splitlines()]
    else:
        parts = [text[i : i + 8 * length] for i in range(0, len(text), 8 * length)]
    found = []
    for part in parts[:count]:
        ids = tokenizer.encode(part, add_special_tokens=False)[:length]
        found.append(Document(len(found), torch.tensor(ids), text=part))
    return [d for d in found if d.places]


class Seen:
    """A teacher that has read everything once: its last hidden states, and its head."""

    vocab, alone = 0, True

    def __init__(self, teacher: Any, docs: list[Document]) -> None:
        self.fingerprint, self.head = fingerprint(teacher), teacher.get_output_embeddings()
        self.hidden: dict[int, Tensor] = {}
        with torch.no_grad():
            for d in docs:
                self.hidden[d.id] = teacher.model(d.tokens[None]).last_hidden_state[0][torch.from_numpy(d.asked)]

    def ask(self, documents: Sequence[Document], kind: Any) -> Iterator[Tensor]:
        """Logits of each document."""
        with torch.no_grad():
            yield from (self.head(self.hidden[d.id]) for d in documents)


def codings(store: SignalStore, docs: list[Document]) -> dict[str, float]:
    """Bytes a token of ids and counts in several codings."""
    order, layout, rounds = store.coder.layout.order, store.coder.layout, store.kind.rounds  # type: ignore[union-attr]
    ranks, vocab = np.argsort(order), len(order)
    read = [store.read_documents(torch.tensor([d.id])) for d in docs]
    weights = [r["teacher_weights"][0].numpy() for r in read]
    sizes = np.concatenate([(w > 0).sum(1) for w in weights])
    ids = np.concatenate([r["teacher_ids"][0].numpy()[w > 0] for r, w in zip(read, weights, strict=True)])
    counts = np.concatenate([np.rint(w[w > 0] * rounds).astype(np.int64) for w in weights])
    n, nothing = len(sizes), np.zeros_like(sizes)
    place = np.repeat(np.arange(n), sizes)
    rank = ranks[ids]
    rank = rank[np.lexsort((rank, place))]
    first = np.concatenate([[True], place[1:] != place[:-1]])
    gaps = np.where(first, rank, rank - np.concatenate([[0], rank[:-1]]) - 1)
    header = rounds.bit_length()  # how many there are
    gamma = float((2 * np.floor(np.log2(counts)) + 1).sum())
    best = np.full(n, np.inf)
    for k in range(vocab.bit_length()):
        best = np.minimum(best, np.bincount(place, (gaps >> k) + 1 + k, n))
    frequency = np.zeros(vocab)
    for d in docs:
        np.add.at(frequency, ranks[d.tokens.numpy()], 1)
    cumulative = np.cumsum(frequency + 0.3) / (frequency + 0.3).sum()
    edges, widths = [0], []
    while edges[-1] < vocab:
        begin, width = edges[-1], 0
        before = cumulative[begin - 1] if begin else 0.0
        while begin + 2 ** (width + 1) <= vocab and cumulative[begin + 2 ** (width + 1) - 1] - before <= 1 / 16:
            width += 1
        widths.append(width)
        edges.append(begin + 2**width)
    stretch = np.searchsorted(edges[:-1], rank, side="right") - 1
    fano = len(rank) + n * len(widths) + np.array(widths)[stretch].sum()
    seen = symbols(Entries(sizes, ids, counts, np.zeros_like(ids), nothing), layout, ranks)
    share = seen / np.maximum(1, seen.sum(1, keepdims=True))
    entropy = float(-(seen * np.log2(np.where(share > 0, share, 1))).sum())
    parts = store.info().fidelity.bytes
    return {
        "fixed widths": (len(ids) * ((vocab - 1).bit_length() + header) + n * header) / 8 / n,
        "Rice gaps, gamma counts": (best.sum() + 4 * n + gamma + n * header) / 8 / n,
        "Elias-Fano, gamma counts": (fano + gamma) / 8 / n,
        "limbeck": sum(parts.values()),
        "entropy of its symbols, and digits": entropy / 8 / n + parts["ids"] + parts["values"],
    }


def decode_ms(store: SignalStore, docs: list[Document], tokens: int, repeats: int = 25) -> dict[str, float]:
    """Processor time of reading so many tokens as a batch of whole or cut documents."""
    line = [(d.id, t) for d in docs for t in range(d.places)][:tokens]
    document, place = (torch.tensor([p[i] for p in line]).view(-1, min(256, len(line))) for i in (0, 1))
    store.read(document, place)
    times = []
    for _ in range(repeats):
        began = time.process_time()
        store.read(document, place)
        times.append(1000 * (time.process_time() - began))
    return {"tokens": len(line), "median": statistics.median(times), "best": min(times)}


def steps(store: SignalStore, docs: list[Document], config: Any, pairs: int, width: int) -> dict[str, Any]:
    """Forward and backward on 2 rows of `width` tokens, by labels and by stored targets, in turn."""
    from torch.nn.functional import cross_entropy
    from transformers import AutoModelForCausalLM

    config.num_hidden_layers = max(1, config.num_hidden_layers // 2)
    student = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    chosen = [d for d in docs if d.places >= width][:2]
    tokens = torch.stack([d.tokens[: width + 1] for d in chosen])
    document = torch.tensor([[d.id] for d in chosen]).expand(-1, width)
    place = torch.arange(width).expand(len(chosen), -1)

    def step(way: str) -> float:
        student.zero_grad(set_to_none=True)
        began = time.process_time()
        read = store.read(document, place) if way == "stored" else {}
        logits: Tensor = student(tokens[:, :-1]).logits
        if way == "stored":
            loss = sampled_kl(logits, read["teacher_ids"], read["teacher_weights"]).mean()
        else:
            loss = cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        loss.backward()  # type: ignore[no-untyped-call]
        return time.process_time() - began

    step("labels"), step("stored")
    found: dict[str, list[float]] = {"labels": [], "stored": []}
    for pair in range(pairs):
        for way in ("labels", "stored") if pair % 2 else ("stored", "labels"):
            found[way].append(step(way))
    ratios = [b / a for a, b in zip(found["labels"], found["stored"], strict=True)]
    return {
        "tokens": tokens[:, 1:].numel(),
        "seconds": {way: statistics.median(times) for way, times in found.items()},
        "ratio": statistics.median(ratios),
        "ratios": ratios,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--teacher", type=Path, required=True)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--documents", type=int, default=16)
    parser.add_argument("--length", type=int, default=384)
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/signals.json")
    args = parser.parse_args()
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.set_num_threads(1)
    tokenizer = AutoTokenizer.from_pretrained(args.teacher)
    teacher = AutoModelForCausalLM.from_pretrained(args.teacher, dtype=torch.float32).eval()
    docs = documents(tokenizer, args.text.read_text(), args.documents, args.length)
    key = tokenizer_fingerprint(tokenizer)
    seen = Seen(teacher, docs)
    result: dict[str, Any] = {"vocabulary": teacher.config.vocab_size, "kinds": {}}
    with tempfile.TemporaryDirectory() as place:
        for name, kind in KINDS.items():
            began = time.process_time()
            store = SignalStore.open(capture(seen, docs, Path(place) / name, kind=kind, tokenizer=key, batch_size=2))
            seconds, f = time.process_time() - began, store.info().fidelity
            result["kinds"][name] = {**asdict(f), "bytes_a_token": f.bytes_per_token, "capture_seconds": seconds}
            print(f"{name:22}{f}", flush=True)
        store = SignalStore.open(Path(place) / "sampled", tokenizer=key, documents=docs)
        result["codings"] = codings(store, docs)
        for name, size in result["codings"].items():
            print(f"{name:36}{size:7.1f} bytes a token", flush=True)
        result["decode_ms"] = [decode_ms(store, docs, n) for n in (512, 1024, 2048)]
        print(*result["decode_ms"], sep="\n", flush=True)
        result["step"] = steps(store, docs, teacher.config, args.pairs, args.width)
    s = result["step"]
    print(f"step on {s['tokens']} tokens: {s['ratio']:.3f}x of cross-entropy, {s['seconds']}")
    tokens = sum(d.places for d in docs)
    result |= {"tokens": tokens, "torch": torch.__version__, "python": platform.python_version(), "goals": GOALS}
    args.out.parent.mkdir(exist_ok=True)
    args.out.write_text(json.dumps(result, indent=1))
    kept = result["kinds"]["sampled"]["bytes_a_token"]
    return int(kept > GOALS["bytes_a_token"] or s["ratio"] > GOALS["step_ratio"])


if __name__ == "__main__":
    sys.exit(main())
