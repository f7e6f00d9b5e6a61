"""A teacher behind a real HTTP server: a tiny language model that answers as vLLM, as OpenAI, and as llama.cpp do."""

import json
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from test_signals import Tiny, content, texts

from limbeck.adapters.remote import Cost, Remote, until_failure
from limbeck.core.errors import BadInput, LimbeckError
from limbeck.core.signals.keys import Document
from limbeck.core.signals.reading import SignalStore
from limbeck.core.signals.writing import capture
from limbeck.losses.tokens.top_k_kd import top_k_kd

VOCAB, CAP = 97, 6
KIND = {"topk": {"k": CAP, "bits": 32}}


class Server:
    """Serves Tiny at /v1/completions. faults: what to answer first, in turn: a status, "drop", "junk" or "slow"."""

    def __init__(self) -> None:
        self.model, self.faults, self.seen, self.lock = Tiny(), [], [], threading.Lock()
        self.style, self.retry_after, self.times = "vllm", "", []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with outer.lock:
                    fault = outer.faults.pop(0) if outer.faults else None
                    outer.times.append(time.monotonic())
                    if fault is None:
                        outer.seen.append({**body, "path": self.path, "key": self.headers.get("Authorization")})
                if fault == "drop":
                    self.connection.close()
                    return
                if fault == "slow":
                    time.sleep(1.0)
                raw = b"{not json" if fault == "junk" else json.dumps(outer.answer(body)).encode()
                status = fault if isinstance(fault, int) else 200
                if status != 200:
                    raw = json.dumps(
                        {"error": {"message": "rate limit reached" if status == 429 else "no such model"}}
                    ).encode()
                try:
                    self.send_response(status)
                    if status == 429 and outer.retry_after:
                        self.send_header("Retry-After", outer.retry_after)
                    self.end_headers()
                    self.wfile.write(raw)
                except OSError:  # the client has given up
                    pass

            def log_message(self, *_: Any) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.http.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self.http.server_port}/v1"

    def answer(self, body: dict[str, Any]) -> dict[str, Any]:
        tokens = torch.tensor(body["prompt"])
        with torch.no_grad():
            logprobs = self.model(tokens[None])["logits"][0].log_softmax(-1)
        cap = min(int(body.get("prompt_logprobs") or body.get("logprobs") or 0), CAP)
        top = [
            dict(zip(row.topk(cap).indices.tolist(), row.topk(cap).values.tolist(), strict=True)) for row in logprobs
        ]
        choice: dict[str, Any] = {"text": "", "index": 0}
        if self.style == "deaf":
            pass
        elif "prompt_logprobs" in body:  # the token of the text comes beside the likeliest, in no special order
            rows = [
                {**{int(tokens[t + 1]): float(logprobs[t, tokens[t + 1]])}, **top[t]} for t in range(len(tokens) - 1)
            ]
            choice["prompt_logprobs"] = [
                None,
                *({str(i): {"logprob": p, "rank": 1} for i, p in r.items()} for r in rows),
            ]
        elif body.get("echo"):
            name = "token_id:{}" if self.style == "vllm" else "<{}>"
            choice["logprobs"] = {
                "top_logprobs": [None, *({name.format(i): p for i, p in r.items()} for r in top[:-1])]
            }
        elif self.style == "llama.cpp":
            items = [{"id": i, "token": f"<{i}>", "logprob": p} for i, p in top[-1].items()]
            choice["logprobs"] = {"content": [{"top_logprobs": items}]}
        else:
            choice["logprobs"] = {"top_logprobs": [{f"<{i}>": p for i, p in top[-1].items()}]}
        return {
            "choices": [choice],
            "usage": {"prompt_tokens": len(tokens), "completion_tokens": int(body["max_tokens"])},
        }


@pytest.fixture
def server() -> Iterator[Server]:
    made = Server()
    yield made
    made.http.shutdown()
    made.http.server_close()


def documents() -> list[Document]:
    return [d for d in texts(6, longest=25) if d.places]


def by_text(token: str) -> int | None:
    return int(token[1:-1]) if token.startswith("<") else None


def remote(server: Server, **options: Any) -> Remote:
    return Remote(server.url, "tiny", VOCAB, **{"backoff": 0.01, "key_env": "", **options})


@pytest.mark.parametrize(
    ("style", "options"),
    [
        ("vllm", {"way": "prompt_logprobs"}),
        ("vllm", {"way": "echo"}),
        ("openai", {"way": "echo", "token_id": by_text}),
        ("openai", {"way": "steps", "token_id": by_text}),
        ("llama.cpp", {"way": "steps"}),
    ],
)
def test_what_a_server_says_is_what_the_network_says(tmp_path: Path, server: Server, style: str, options: dict) -> None:
    server.style = style
    here = SignalStore.open(capture(Tiny(), documents(), tmp_path / "here", kind=KIND, batch_size=2))
    there = capture(remote(server, **options), documents(), tmp_path / "there", kind=KIND, batch_size=2)
    store = SignalStore.open(there, documents=documents())
    for d in documents():
        one, two = (s.read_documents(torch.tensor([d.id])) for s in (here, store))
        at = one["mask"]
        assert torch.equal(at, two["mask"]) and torch.equal(one["teacher_ids"][at], two["teacher_ids"][at])
        assert torch.allclose(one["teacher_logprobs"][at], two["teacher_logprobs"][at], atol=1e-5)
        assert torch.allclose(one["teacher_tail"][at], two["teacher_tail"][at], atol=1e-3)
        z = torch.randn(*at.shape, VOCAB, generator=torch.Generator().manual_seed(0))
        losses = [top_k_kd(z, s["teacher_ids"], s["teacher_logprobs"], s["teacher_tail"])[at] for s in (one, two)]
        assert torch.allclose(*losses, atol=1e-4)
    assert torch.isnan(torch.tensor(store.info().fidelity.kl)), "nobody saw the whole distribution"
    assert store.info().fidelity.bytes_per_token > 0


def test_failures_are_tried_again_and_what_it_cost_is_counted(tmp_path: Path, server: Server) -> None:
    server.faults = [429, "drop", 503, "junk", "slow", 500]
    source = remote(server, concurrency=2, timeout=0.5, input_price=1.0, output_price=2.0)
    folder = capture(source, documents(), tmp_path / "s", kind=KIND)
    tokens = sum(len(d.tokens) for d in documents())
    assert source.cost.requests == len(documents()) and source.cost.retries == 6
    assert source.cost.input_tokens == tokens and source.cost.output_tokens == len(documents())
    assert source.cost.price == pytest.approx((tokens + 2 * len(documents())) / 1e6)
    assert content(folder) == content(capture(remote(server), documents(), tmp_path / "t", kind=KIND))


def test_the_server_says_how_long_to_wait(tmp_path: Path, server: Server) -> None:
    server.faults, server.retry_after = [429], "0.4"
    capture(remote(server, concurrency=1), documents()[:1], tmp_path / "s", kind=KIND)
    assert server.times[1] - server.times[0] >= 0.4


def test_rate_limits_are_kept(tmp_path: Path, server: Server) -> None:
    began = time.monotonic()
    source = remote(server, requests_per_minute=1200, concurrency=8)
    for limit in source.limits:
        limit.free_at = began + 0.1  # an empty bucket
    capture(source, documents(), tmp_path / "s", kind=KIND)
    gaps = [b - a for a, b in zip(sorted(server.times), sorted(server.times)[1:], strict=False)]
    assert server.times and max(server.times) - began >= 0.1 + 0.05 * (len(documents()) - 1) - 0.01, gaps


def test_a_capture_that_gave_up_goes_on_and_pays_only_for_the_rest(tmp_path: Path, server: Server) -> None:
    cost = tmp_path / "cost.json"
    first = remote(server, retries=0, concurrency=1, cost_file=cost)
    send, sent = first._send, []

    def dies(body: bytes) -> Any:
        sent.append(body)
        if len(sent) > 3:
            raise ConnectionError("connection refused")
        return send(body)

    first._send = dies  # type: ignore[method-assign]
    with pytest.raises(LimbeckError, match=r"did not answer after 1 tries \(connection refused\).*run it again"):
        capture(first, documents(), tmp_path / "s", kind=KIND, batch_size=1)
    with pytest.raises(BadInput, match="not finished"):
        SignalStore.open(tmp_path / "s")
    asked = len(server.seen)
    second = remote(server, cost_file=cost)
    folder = capture(second, documents(), tmp_path / "s", kind=KIND, batch_size=1)
    assert asked == 3 and len(server.seen) == len(documents()), "no document was asked about twice"
    assert second.cost.requests == len(documents()) and Cost(**json.loads(cost.read_text())) == second.cost
    assert content(folder) == content(capture(remote(server), documents(), tmp_path / "t", kind=KIND, batch_size=1))
    with pytest.raises(BadInput, match="`teacher` was"):
        capture(remote(server, revision="2"), documents(), folder, kind=KIND, batch_size=1)


def test_what_cannot_work_is_said_at_once(tmp_path: Path, server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    server.faults = [404]
    with pytest.raises(BadInput, match="refuses the request: 404 no such model"):
        capture(remote(server), documents(), tmp_path / "s", kind=KIND)
    with pytest.raises(BadInput, match="likeliest tokens only: keep `topk`, not `sampled`"):
        capture(remote(server), documents(), tmp_path / "s")
    server.style = "deaf"
    with pytest.raises(BadInput, match="log-probabilities of 0 of .*does not support `way` 'prompt_logprobs'.*steps"):
        capture(remote(server), documents(), tmp_path / "s", kind=KIND)
    server.style = "openai"
    source = remote(server, way="echo")
    with pytest.raises(BadInput, match="names tokens by their text, give `token_id`"):
        capture(source, documents(), tmp_path / "s", kind=KIND)
    assert source.cost.unknown > 0
    with pytest.raises(BadInput, match="`url` must be"):
        Remote("localhost:8000", "tiny", VOCAB)
    with pytest.raises(ValueError, match="`way` must be"):
        remote(server, way="telepathy")
    assert not (tmp_path / "s").exists(), "nothing is half-written"
    monkeypatch.setenv("TINY_KEY", "abc")
    server.style, server.seen = "vllm", []
    capture(remote(server, key_env="TINY_KEY"), documents(), tmp_path / "s", kind=KIND)
    assert {(r["key"], r["path"], r["model"]) for r in server.seen} == {("Bearer abc", "/v1/completions", "tiny")}


def test_what_comes_after_a_failure_in_the_queue_is_not_begun():
    begun = []

    def work(item: int) -> int:
        begun.append(item)
        if item == 2:
            raise OSError("no answer")
        return item

    careful = until_failure(work)
    assert [careful(0), careful(1)] == [0, 1]
    for item in (2, 3, 4):
        with pytest.raises(OSError, match="no answer"):
            careful(item)
    assert begun == [0, 1, 2]
