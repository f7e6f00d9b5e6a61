"""Stores of what a teacher says of texts, as recipes ask for them: of which teacher, where, and what they hold."""

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn

from limbeck.adapters.remote import Cost, Remote
from limbeck.core import find
from limbeck.core.batches import Batches, Table
from limbeck.core.checkpoint import fingerprint
from limbeck.core.errors import BadInput
from limbeck.core.headloss import route
from limbeck.core.match import Match
from limbeck.core.signals.feeding import SignalBatches, documents_in
from limbeck.core.signals.files import differs, stored_spec
from limbeck.core.signals.keys import digest, text_fingerprint, tokenizer_fingerprint
from limbeck.core.signals.kinds import KINDS, Embedding, Hidden, Kind, Sampled, TopK, kind_of, spec_of
from limbeck.core.signals.reading import SignalsInfo, SignalStore
from limbeck.core.signals.sources import Local, Source
from limbeck.core.signals.writing import capture
from limbeck.recipe import Net, Recipe
from limbeck.recipe import Store as StoreSpec

TOP = 20  # likeliest tokens that a server is asked for, when nobody says: the cap of most
HEAD = ("teacher_hidden", "teacher_head")
Event = Callable[[dict[str, Any]], None]


# ---- what a recipe asks for ------------------------------------------------------------------------------------------
def of_texts(recipe: Recipe) -> bool:
    """Whether a recipe's store is one of texts: it says a kind, its teacher is behind a server, or it is one that lies
    there."""
    spec = recipe.store
    if spec is None:
        return False
    if spec.kind is not None or (recipe.teacher is not None and recipe.teacher.served):
        return True
    path = Path(spec.folder) / "store.json"
    try:
        return bool(spec.folder) and "signals" in json.loads(path.read_text())
    except (OSError, ValueError):
        return False


def asked(recipe: Recipe) -> Kind:
    """The kind that a recipe asks for; of a store that is only read, the kind that it is of."""
    assert recipe.store is not None
    spec, teacher = recipe.store, recipe.teacher
    top = teacher.options.get("top") if teacher is not None and teacher.served else None
    if spec.kind is not None:
        if top is not None:
            raise BadInput("the teacher's `top` and `store.kind` both say what is kept; leave one of them out")
        return kind_of(spec.kind)
    if teacher is not None and teacher.served:
        if not isinstance(top, (int, type(None))):
            raise BadInput(f"`top` is a whole number of tokens, got {top!r}")
        return kind_of({"topk": {"k": TOP if top is None else top}})
    return kind_of(stored_spec(Path(spec.folder))["kind"])


def check_names(recipe: Recipe) -> None:
    """What can be told to be wrong without data and networks."""
    teacher, spec = recipe.teacher, recipe.store
    if teacher is not None and teacher.served:
        with recipe.blamed("teacher"):
            if recipe.do not in ("label", "teach") or spec is None:
                raise BadInput("a teacher behind a server is asked by `label`, or by `teach` with a `store`")
            for key in ("weights", "train", "taps", "data"):
                if key in teacher.model_fields_set:
                    raise BadInput(f"`{key}` is of a network that is here, and this teacher is behind a server")
            _remote(teacher, 2, None, None)
    if spec is not None and spec.kind is not None:
        with recipe.blamed("store", "kind"):
            kind = asked(recipe)
            if teacher is not None and teacher.served and not isinstance(kind, TopK):
                raise BadInput(f"a server gives its likeliest tokens only: keep `topk`, not `{kind.name}`")


def _remote(spec: Net, vocab: int, tokenizer: Any, cost_file: Path | None) -> Remote:
    options = {key: value for key, value in spec.options.items() if key != "top"}
    return Remote.of(options, vocab, tokenizer=tokenizer, cost_file=cost_file)


def told(name: str, kind: Mapping[str, Any]) -> str:
    """A kind in few words: topk (k 64, tail True)."""
    return name + (f" ({', '.join(f'{k} {v}' for k, v in kind.items())})" if kind else "")


# ---- the store of a recipe -------------------------------------------------------------------------------------------
def captured(
    recipe: Recipe, table: Table, teacher: nn.Module | None, place: Path, on_event: Event | None = None
) -> tuple[SignalsInfo, Cost | None]:
    """The recipe's store for a table, with what was missing in it captured now; and what a server asked for it.

    place: where stores without a folder of their own lie. Without a teacher the store is only opened.
    """
    assert recipe.store is not None
    spec, kind = recipe.store, asked(recipe)
    documents = documents_in(table, kind)
    tokenizer = tokenizer_fingerprint(table.tokenizer) if table.tokenizer is not None else ""
    served = recipe.teacher is not None and recipe.teacher.served
    if teacher is None and not served:
        return _opened(spec, kind, tokenizer, documents).info(), None
    if teacher is not None and "teacher_inputs" in table.columns:
        raise BadInput("the teacher has a tokenizer of its own, and a store keeps what is said in the student's tokens")
    source: Source = (
        Local(teacher) if teacher is not None else _remote(_net(recipe), table.vocab, table.tokenizer, None)
    )
    data = text_fingerprint(*zip(*((d.id, digest(d)[0]) for d in documents), strict=True))
    key = hashlib.sha256(json.dumps([spec_of(kind), tokenizer], sort_keys=True).encode()).hexdigest()[:8]
    name = f"{source.fingerprint.removeprefix('remote:')[:12]}-{data[:12]}-{kind.name}-{key}"
    folder = Path(spec.folder) if spec.folder else place / ".stores" / name
    cost: Cost | None = None
    if teacher is None:
        folder.parent.mkdir(parents=True, exist_ok=True)
        source = _remote(_net(recipe), table.vocab, table.tokenizer, folder.with_name(f"{folder.name}.cost.json"))
        cost = source.cost
    if on_event is not None:
        on_event({"note": f"capturing teacher signals in {folder}"})
    capture(source, documents, folder, kind=kind, tokenizer=tokenizer, on_event=_tenths(on_event, cost))
    return _opened(spec.model_copy(update={"folder": str(folder)}), kind, tokenizer, documents).info(), cost


def _net(recipe: Recipe) -> Net:
    assert recipe.teacher is not None
    return recipe.teacher


def _opened(spec: StoreSpec, kind: Kind, tokenizer: str, documents: Any) -> SignalStore:
    if not spec.folder:
        raise BadInput("teacher signals need a teacher to capture them, or the folder of a store")
    store = SignalStore.open(spec.folder, tokenizer=tokenizer, documents=documents)
    if (have := store.spec["kind"]) != spec_of(kind):
        there, here = (told(name, knobs) for k in (have, spec_of(kind)) for name, knobs in k.items())
        raise BadInput(f"the store {spec.folder} is of kind {there}, asked for is {here}; capture it again")
    return store


def _tenths(on_event: Event | None, cost: Cost | None) -> Event | None:
    """Says how far a capture is, ten times in all."""
    if on_event is None:
        return None
    seen = 0

    def event(line: dict[str, Any]) -> None:
        nonlocal seen
        part = 10 * int(line["done"]) // int(line["documents"])
        if part > seen:
            seen = part
            more = f" ({cost})" if cost is not None else ""
            on_event({"note": f"{line['done']} of {line['documents']} documents{more}"})

    return event


def fed(batches: Batches, info: SignalsInfo, device: torch.device) -> SignalBatches:
    """Training batches with the store's signals."""
    return SignalBatches(batches, SignalStore.open(info.folder), device=device)


def said(info: SignalsInfo, cost: Cost | None = None) -> str:
    """What `label` prints: where, how much, and what was lost."""
    head = f"{info.documents} documents in {info.folder}: {told(*next(iter(info.kind.items())))}; {info.bytes:,} bytes"
    fidelity = info.fidelity
    if "embedding" in info.kind:
        text = f"{head}, {info.bytes / max(1, info.documents):.0f} a document"
    elif fidelity.mass != fidelity.mass:  # behind a server nobody sees the whole distribution
        size = f"{fidelity.ids:.1f} ids each, {fidelity.bytes_per_token:.1f} bytes a token"
        text = f"{head}; {fidelity.places} places, {size}"
    else:
        text = f"{head}; {fidelity}"
    return text if cost is None else f"{text}; {cost}"


def facts(info: SignalsInfo, cost: Cost | None = None) -> dict[str, Any]:
    """The same for store.json of a run, where what is not known is null."""

    def plain(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {key: plain(inner) for key, inner in value.items()}
        return None if isinstance(value, float) and value != value else value

    body = asdict(info) | {"bytes_per_token": info.fidelity.bytes_per_token}
    found: dict[str, Any] = plain(body | ({} if cost is None else {"cost": asdict(cost)}))
    return found


# ---- what a kind holds -----------------------------------------------------------------------------------------------
def held(kind: Kind) -> tuple[str, ...]:
    """The names that batches from a store of this kind bring."""
    if isinstance(kind, Sampled):
        return ("teacher_ids", "teacher_weights")
    if isinstance(kind, TopK):
        return ("teacher_ids", "teacher_logprobs", *(["teacher_tail"] if kind.tail else []))
    if isinstance(kind, Embedding):
        return ("teacher_emb",)
    return HEAD if isinstance(kind, Hidden) else ("teacher_logits", "teacher_vocab_logits")


def readers(kind: Kind) -> list[str]:
    """Losses that such a store is enough for, those made for it before those on logits."""
    there, found = set(held(kind)), []
    for name in find.names():
        if find.family(name) == "losses":
            needs = {n for n in find.needs(find.get(name)) if n.startswith("teacher_")}
            if needs and needs <= there:
                found.append(name)
    return found


def check_losses(recipe: Recipe, kind: Kind, matches: list[Match], vocab: int) -> None:
    """Raise BadInput for a loss that asks for what a store of this kind does not hold."""
    there = {*held(kind), *(["teacher_head_bias"] if isinstance(kind, Hidden) else [])}
    if isinstance(kind, Hidden) and vocab >= route.WORTH and route.has_head_form(matches):
        return  # they are computed from hidden states and heads
    for i, loss in enumerate(matches):
        for name in (n for n in loss.needs if n.startswith("teacher_") and n not in there):
            others = [other for other in KINDS if name in held(kind_of(other))]
            cures = [f"capture it as `kind: {' or '.join(others)}`"] if others else []
            if by := readers(kind)[:4]:
                cures.append(f"match by {' or '.join(f'`{n}`' for n in by)}")
            cures = cures or ["leave `store` out and give the teacher itself"]
            raise BadInput(
                f"{recipe.at('match', i)}`{loss.name}` asks for {name}, and a store of kind `{kind.name}` holds "
                f"{', '.join(held(kind))}; {', or '.join(cures)}"
            )


def check_folder(recipe: Recipe, kind: Kind, teacher: nn.Module, table: Table) -> None:
    """Raise BadInput when the recipe's folder holds signals of another teacher, tokenizer or kind."""
    assert recipe.store is not None
    folder = Path(recipe.store.folder)
    trained_first = recipe.teacher is not None and recipe.teacher.train is not None and recipe.teacher.weights is None
    if trained_first or not recipe.store.folder or not (folder / "store.json").exists():
        return
    tokenizer = tokenizer_fingerprint(table.tokenizer) if table.tokenizer is not None else ""
    wanted = {"kind": spec_of(kind), "teacher": fingerprint(teacher), "tokenizer": tokenizer}
    if other := differs(stored_spec(folder), wanted):
        raise BadInput(f"{folder} holds another capture: {other}; delete the folder or choose another")


def try_out(kind: Kind, teacher: nn.Module, table: Table) -> int:
    """Raise BadInput when a network cannot give what the kind keeps: it is asked about one document. The number of
    words that it knows, 0 where that is not seen."""
    document = documents_in(table.select(range(1)), kind)[0]
    source = Local(teacher)
    if isinstance(kind, Hidden) and not isinstance(kind, Embedding):
        source.head(document)
    (said_,) = source.ask([document], kind)
    return said_.shape[-1] if isinstance(said_, torch.Tensor) and kind.wants == "logits" else 0
