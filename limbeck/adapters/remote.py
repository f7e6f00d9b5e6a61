"""Teachers behind an OpenAI-compatible server (vLLM, SGLang, llama.cpp ...) as a source for the teacher-signal store.

Only the standard library's http. A server gives the log-probabilities of its likeliest tokens up to a cap, so what can
be kept is `topk`; all that the server did not say is the tail.
"""

import hashlib
import http.client
import json
import math
import os
import random
import threading
import time
import urllib.parse
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np

from limbeck.core import knobs
from limbeck.core.batches import Tokenizer
from limbeck.core.card import require
from limbeck.core.errors import BadInput, LimbeckError, nearest
from limbeck.core.signals.coding import Entries
from limbeck.core.signals.keys import Document
from limbeck.core.signals.kinds import Kind, TopK

__all__ = ["Cost", "Remote"]

Way = Literal["prompt_logprobs", "echo", "steps"]
AGAIN = (408, 409, 425, 429, 500, 502, 503, 504, 529)  # answers that another try may mend
Place = dict[int, float]  # token id -> log-probability
A = TypeVar("A")
R = TypeVar("R")


@dataclass
class Cost:
    """What was asked for so far. price: of all tokens, in the currency of `input_price` and `output_price`.

    unknown: tokens that the server named and `token_id` did not know; their probability counts as tail.
    """

    requests: int = 0
    retries: int = 0
    input_tokens: int = 0
    output_tokens: int = 0
    unknown: int = 0
    price: float = 0.0

    def __str__(self) -> str:
        tokens = f"{self.input_tokens:,} tokens read and {self.output_tokens:,} written"
        more = f", {self.unknown:,} tokens that no id is known of" if self.unknown else ""
        price = f", price {self.price:.4g}" if self.price else ""
        return f"{self.requests:,} requests, {self.retries:,} of them again, {tokens}{more}{price}"


class Remote:
    """A model behind a server, as a `Source` of `core.signals.capture` with kind `topk`.

    url: of the API, such as http://localhost:8000/v1. model: its name there; it stands in the store's fingerprint, with
    `revision`, for the weights cannot be seen: change `revision` when they change. vocab: number of token ids.
    way: how log-probabilities of a given text are asked for. "prompt_logprobs": vLLM's own option, with token ids.
    "echo": completions with echo, whose tokens are named `token_id:N` or told apart by `token_id`. "steps": one request
    a place for its next token, which every server understands and which costs most.
    token_id: the id of a token as the server writes it, or None; needed where it gives no ids.
    key_env: environment variable with the key, sent as a bearer token; none is sent when it is empty.
    concurrency: requests under way at once, >= 1. requests_per_minute, tokens_per_minute: limits kept, 0 for none.
    retries: further tries of a request, waiting `backoff` seconds, then twice as long each time up to 60, with jitter,
    or as long as the server says. timeout: seconds. input_price, output_price: of a million tokens.
    cost_file: where the cost is kept, so that a capture that goes on adds to it.
    """

    alone = True

    @staticmethod
    def of(
        spec: Mapping[str, Any], vocab: int, *, tokenizer: Tokenizer | None = None, cost_file: Path | None = None
    ) -> "Remote":
        """The teacher that a recipe describes: url, model and the options above, without `top`. tokenizer: gives the
        ids of tokens that a server names by their text."""
        given = {key: value for key, value in spec.items() if key not in ("url", "model")}
        for key in ("url", "model"):
            if not isinstance(spec.get(key), str):
                raise BadInput(f"a teacher behind a server needs `{key}`, got {spec.get(key)!r}")
        known = {k: v for k, v in knobs.annotations(Remote).items() if k not in ("token_id", "cost_file")}
        for key in given:
            if key not in known:
                raise BadInput(f"a teacher behind a server has no option {key!r}{nearest(key, [*known, 'top'])}")
        checked = knobs.check("server", Remote, given)

        def token_id(text: str) -> int | None:
            ids = [] if tokenizer is None else tokenizer.encode(text)
            return ids[0] if len(ids) == 1 else None

        return Remote(spec["url"], spec["model"], vocab, token_id=token_id, cost_file=cost_file, **checked)

    def __init__(
        self,
        url: str,
        model: str,
        vocab: int,
        *,
        way: Way = "prompt_logprobs",
        revision: str = "",
        token_id: Callable[[str], int | None] | None = None,
        key_env: str = "OPENAI_API_KEY",
        concurrency: int = 4,
        requests_per_minute: float = 0,
        tokens_per_minute: float = 0,
        retries: int = 6,
        backoff: float = 0.5,
        timeout: float = 120,
        input_price: float = 0.0,
        output_price: float = 0.0,
        cost_file: str | Path | None = None,
    ) -> None:
        parts = urllib.parse.urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise BadInput(f"`url` must be that of an API, such as http://localhost:8000/v1, got {url!r}")
        require(way in ("prompt_logprobs", "echo", "steps"), "way", way, "prompt_logprobs, echo or steps")
        require(concurrency >= 1, "concurrency", concurrency, ">= 1")
        require(vocab >= 2, "vocab", vocab, ">= 2")
        self.parts, self.model, self.vocab, self.way, self.token_id = parts, model, vocab, way, token_id
        self.key_env, self.concurrency, self.retries, self.backoff = key_env, concurrency, retries, backoff
        self.timeout, self.prices = timeout, (input_price, output_price)
        self.limits = (_Limit(requests_per_minute), _Limit(tokens_per_minute))
        self.fingerprint = "remote:" + hashlib.sha256(f"{model}\n{revision}".encode()).hexdigest()
        self.cost_file = None if cost_file is None else Path(cost_file)
        self.cost = Cost()
        if self.cost_file is not None and self.cost_file.exists():
            self.cost = Cost(**json.loads(self.cost_file.read_text()))
        self._lock = threading.Lock()

    # ---- as a source -------------------------------------------------------------------------------------------------
    def ask(self, documents: Sequence[Document], kind: Kind) -> Iterator[Entries]:
        """Entries of the asked places of each document, in their order."""
        if not isinstance(kind, TopK):
            raise BadInput(f"a server gives its likeliest tokens only: keep `topk`, not `{kind.name}`")
        pool = ThreadPoolExecutor(self.concurrency)
        try:
            if self.way == "steps":
                places = [(d, int(t)) for d in documents for t in d.asked]
                said = iter(list(pool.map(until_failure(lambda at: self._next(at[0], at[1], kind.k)), places)))
                answers = [[next(said) for _ in d.asked] for d in documents]
            else:
                answers = list(pool.map(until_failure(lambda d: self._prompt(d, kind.k)), documents))
        finally:
            pool.shutdown(cancel_futures=True)
            self._save_cost()
        yield from (_entries(rows, kind) for rows in answers)

    def _prompt(self, document: Document, k: int) -> list[Place]:
        """One request for a whole document."""
        if not len(document.asked):
            return []
        body: dict[str, Any] = {"prompt": document.tokens.tolist(), "max_tokens": 1, "temperature": 1.0}
        if self.way == "prompt_logprobs":
            body["prompt_logprobs"] = k
        else:
            body |= {"echo": True, "logprobs": k, "max_tokens": 0, "return_tokens_as_token_ids": True}
        choice = self._post(body, len(document.tokens))["choices"][0]
        if self.way == "prompt_logprobs":
            told = choice.get("prompt_logprobs") or []
            rows = [[(int(token), value["logprob"]) for token, value in (row or {}).items()] for row in told]
        else:
            told = (choice.get("logprobs") or {}).get("top_logprobs") or []
            rows = [list((row or {}).items()) for row in told]
        if len(rows) < len(document.tokens):
            raise BadInput(
                f"the server gave log-probabilities of {len(rows)} of {len(document.tokens)} tokens of document "
                f"{document.id}: it does not support `way` {self.way!r}, or cuts texts of this length; try another "
                "way, such as steps"
            )
        return [self._kept(self._ids(rows[int(t) + 1]), k, document) for t in document.asked]  # what follows place t

    def _next(self, document: Document, place: int, k: int) -> Place:
        """One request for the token that follows a place."""
        prefix = document.tokens[: place + 1].tolist()
        body = {"prompt": prefix, "max_tokens": 1, "temperature": 1.0, "logprobs": k}
        choice = self._post({**body, "return_tokens_as_token_ids": True}, len(prefix) + 1)["choices"][0]
        told: Any = choice.get("logprobs") or {}
        if told.get("content"):  # the shape of chats, which llama.cpp uses here, too
            items = told["content"][0].get("top_logprobs") or []
            row = [(item.get("id", item["token"]), item["logprob"]) for item in items]
        else:
            row = list(((told.get("top_logprobs") or [{}])[0] or {}).items())
        return self._kept(self._ids(row), k, document)

    def _ids(self, told: Iterable[tuple[int | str, float]]) -> Place:
        """Log-probabilities by token id, of tokens named by their id, as `token_id:N`, or by their text."""
        out: Place = {}
        for name, logprob in told:
            found: int | None = name if isinstance(name, int) else None
            if isinstance(name, str):
                number = name.removeprefix("token_id:")
                known = number != name and number.isdecimal()
                found = int(number) if known else self.token_id(name) if self.token_id else None
            if found is None or not 0 <= found < self.vocab:
                with self._lock:
                    self.cost.unknown += 1
            else:
                out[found] = max(float(logprob), out.get(found, -math.inf))
        return out

    def _kept(self, row: Place, k: int, document: Document) -> Place:
        """The k likeliest; vLLM adds the token of the text where it is not among them."""
        kept = dict(sorted(row.items(), key=lambda item: -item[1])[:k])
        if not kept:
            raise BadInput(
                f"the server gave no log-probabilities that could be read at a place of document {document.id}; if it "
                "names tokens by their text, give `token_id`"
            )
        return kept

    # ---- requests ----------------------------------------------------------------------------------------------------
    def _post(self, body: dict[str, Any], tokens: int) -> dict[str, Any]:
        """Send a request until it is answered. tokens: how many it will probably cost."""
        content = json.dumps({"model": self.model, **body}).encode()
        problem = ""
        for attempt in range(self.retries + 1):
            if attempt:
                with self._lock:
                    self.cost.retries += 1
            self.limits[0].take(1)
            self.limits[1].take(tokens)
            wait = min(60.0, self.backoff * 2**attempt) * random.uniform(0.5, 1.0)
            try:
                status, headers, raw = self._send(content)
                if status == 200:
                    answer: dict[str, Any] = json.loads(raw)
                    self._count(answer.get("usage") or {}, tokens)
                    return answer
                problem = f"{status} {_message(raw)}"
                if status not in AGAIN:
                    raise BadInput(f"the server at {self.parts.netloc} refuses the request: {problem}")
                wait = max(wait, _seconds(headers.get("retry-after", "")))
            except (OSError, http.client.HTTPException, json.JSONDecodeError) as error:
                problem = str(error) or type(error).__name__
            if attempt < self.retries:
                time.sleep(wait)
        raise LimbeckError(
            f"the server at {self.parts.netloc} did not answer after {self.retries + 1} tries ({problem}); what was "
            "captured is kept: run it again to go on"
        )

    def _send(self, content: bytes) -> tuple[int, dict[str, str], bytes]:
        secure = self.parts.scheme == "https"
        connect = http.client.HTTPSConnection if secure else http.client.HTTPConnection
        link = connect(str(self.parts.hostname), self.parts.port, timeout=self.timeout)
        headers = {"Content-Type": "application/json"}
        if key := os.environ.get(self.key_env, ""):
            headers["Authorization"] = f"Bearer {key}"
        try:
            link.request("POST", self.parts.path.rstrip("/") + "/completions", content, headers)
            answer = link.getresponse()
            return answer.status, {k.lower(): v for k, v in answer.getheaders()}, answer.read()
        finally:
            link.close()

    def _count(self, usage: Mapping[str, Any], tokens: int) -> None:
        read, written = int(usage.get("prompt_tokens") or tokens), int(usage.get("completion_tokens") or 0)
        with self._lock:
            self.cost.requests += 1
            self.cost.input_tokens += read
            self.cost.output_tokens += written
            self.cost.price += (read * self.prices[0] + written * self.prices[1]) / 1e6

    def _save_cost(self) -> None:
        if self.cost_file is not None:
            draft = self.cost_file.with_name(f".{self.cost_file.name}")
            draft.write_text(json.dumps(asdict(self.cost)))
            draft.replace(self.cost_file)


class _Limit:
    """At most so many units a minute: a bucket that fills steadily, and holds a tenth of a minute's."""

    def __init__(self, per_minute: float) -> None:
        self.rate = per_minute / 60
        self.free_at, self.lock = 0.0, threading.Lock()

    def take(self, units: float) -> None:
        """Wait for one's turn."""
        if self.rate <= 0:
            return
        with self.lock:
            now = time.monotonic()
            turn = max(self.free_at, now - 6.0)
            self.free_at = turn + units / self.rate
        if turn > now:
            time.sleep(turn - now)


def until_failure(work: Callable[[A], R]) -> Callable[[A], R]:
    """`work` for several threads: once it has failed, what is still in the queue is not begun, and fails alike."""
    failed: list[Exception] = []

    def once(item: A) -> R:
        if failed:
            raise failed[0]
        try:
            return work(item)
        except Exception as error:
            failed.append(error)
            raise

    return once


def _entries(places: Iterable[Place], kind: TopK) -> Entries:
    rows = list(places)
    sizes = np.array([len(row) for row in rows], np.int64)
    ids = np.array([i for row in rows for i in row], np.int64)
    logprobs = np.minimum(np.array([p for row in rows for p in row.values()], np.float64), 0.0)
    tail = np.array([1 - sum(map(math.exp, row.values())) for row in rows], np.float64)
    return kind.of(sizes, ids, logprobs, tail)


def _message(raw: bytes) -> str:
    """What an error answer says, in one line."""
    text = raw.decode(errors="replace").strip()
    try:
        told = json.loads(text)
        inner = told.get("error", told)
        text = str(inner.get("message", inner) if isinstance(inner, Mapping) else inner)
    except (ValueError, AttributeError):
        pass
    return " ".join(text.split())[:200]


def _seconds(told: str) -> float:
    try:
        return min(300.0, max(0.0, float(told)))
    except ValueError:
        return 0.0
