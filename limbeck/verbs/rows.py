"""condense on rows of text: a method keeps some of them, and fresh networks are trained on what it keeps.

Rows without classes are lines of one text for a language model, and the figure is its negative log-likelihood a token
of held-out text. Texts with classes train a classifier, and the figure is its accuracy. The control is random rows of
as many tokens, read for as many steps.
"""

import json
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from limbeck.adapters import words
from limbeck.adapters.files import Source
from limbeck.adapters.files import load as load_data
from limbeck.core import find, knobs
from limbeck.core.batches import Table, Tokenizer, generator
from limbeck.core.errors import BadInput
from limbeck.core.evaluate import hits
from limbeck.core.evaluate import logits as predict
from limbeck.core.nets import Nets
from limbeck.recipe import Recipe, Train, merge
from limbeck.verbs.setting import Outcome, Setting, batches_of, make_plan
from limbeck.verbs.together import leads

Row = dict[str, Any]
ROWS = "rows.jsonl"
PLACE = "_place"  # of a row in its table, while a method has it in hand


@dataclass(frozen=True)
class Pool:
    """The rows that are chosen from. ids: of the tokens of each. table: of a classifier, None for a language model."""

    rows: list[Row]
    ids: list[list[int]]
    tokenizer: Tokenizer | None
    length: int
    table: Table | None = None

    @property
    def sizes(self) -> Tensor:
        """Tokens of each row [N]."""
        return torch.tensor([len(line) for line in self.ids])

    def training(self, places: Tensor, tokens: int | None = None) -> Table:
        """What a judge is trained on: the rows at `places`, of a language model's text the first `tokens` tokens."""
        if self.table is not None:
            return self.table.select(places)
        text = list(chain.from_iterable(self.ids[i] for i in places.tolist()))[:tokens]
        return _stretches(text, self.tokenizer, self.length)


def asked(recipe: Recipe) -> bool:
    """Whether the method of a recipe keeps rows of text."""
    if recipe.do != "condense" or recipe.method is None:
        return False
    name, _ = knobs.split(recipe.method)
    return find.family(name) == "data" and find.needs(find.get(name)) == ["rows"]


def measured(setting: Setting) -> str:
    """The figure that the rows are judged by."""
    return "accuracy" if _classifies(setting.splits.train) else "nll"


def label(recipe: Recipe, arm: str) -> str:
    """A plain description of an arm."""
    name, _ = knobs.split(recipe.method)
    return {"whole": "all the rows", "control": "random rows, as many tokens"}.get(arm, f"rows kept by {name}")


def rehearse(setting: Setting) -> None:
    """Raise BadInput where rows cannot be chosen or judged; nothing is trained or written."""
    recipe = setting.recipe
    with recipe.blamed("method"):
        pool = pool_of(setting)
        _, kept, _ = keep(setting, pool)
    training = pool.training(kept)
    batch = recipe.judge.train.batch_size
    if batch > len(training):
        name, _ = knobs.split(recipe.method)
        raise BadInput(
            f"{recipe.at('judge', 'train')}batch_size {batch} is larger than what `{name}` keeps: {len(kept)} of "
            f"{len(pool.rows)} rows, {len(training)} examples"
        )
    with recipe.blamed("judge", "train"):
        make_plan(recipe.judge.train, 1, 0)
    held_out(setting, pool)
    with recipe.blamed("judge", "net"):
        _judge_net(setting, training)


def run(setting: Setting, arm: str, seed: int, folder: Path) -> tuple[Outcome, Table]:
    """Choose the rows of one arm under one seed, and judge them by training fresh networks on them."""
    pool = pool_of(setting)
    chosen, places, dropped = keep(setting, pool)
    tokens = int(pool.sizes[places].sum())
    train = _budget(setting.recipe.judge.train, pool.training(places))  # the control's, too
    if arm == "student" and setting.on_event is not None:
        reasons = ", ".join(f"{reason} {count:,}" for reason, count in dropped.items())
        note = f"kept {len(places):,} of {len(pool.rows):,} rows"
        setting.on_event({"note": f"{note}; dropped: {reasons}" if reasons else note})
    if arm == "whole":  # its epochs are passes over all of it, so that it does not depend on the method
        places, tokens = torch.arange(len(pool.rows)), int(pool.sizes.sum())
        train = _budget(setting.recipe.judge.train, pool.training(places))
    elif arm == "control":
        places = at_random(pool.sizes, tokens, seed)
    training = pool.training(places, tokens)
    if arm != "student":
        chosen = [pool.rows[i] for i in places.tolist()]
    written = save_rows(chosen, folder / ROWS)
    scores, seconds = _judge(setting, pool, training, train, seed, folder)
    read = tokens if pool.table is None else int(pool.sizes[places].sum())  # a classifier reads whole rows
    sizes = {"rows": float(len(chosen)), "tokens": float(read)}
    return Outcome(label(setting.recipe, arm), scores, bytes=written, seconds=seconds, sizes=sizes), training


def pool_of(setting: Setting) -> Pool:
    """The training rows with their tokens. The vocabulary is that of all of them, whatever is kept."""
    train, options = setting.splits.train, setting.recipe.data.options if setting.recipe.data else {}
    if _classifies(train):
        real = train.columns.get("attention_mask", train["inputs"] != words.PAD).bool()
        ids = [line[mask].tolist() for line, mask in zip(train["inputs"], real, strict=True)]
        return Pool(list(train.rows or ()), ids, train.tokenizer, train["inputs"].shape[1], train)
    rows, field = rows_of(train, _field(setting.recipe)), _field(setting.recipe)
    texts = [f"{row[field]}\n" if isinstance(row.get(field), str) else "" for row in rows]
    if train.tokenizer is not None:
        tokenizer, length = train.tokenizer, train["inputs"].shape[1]
    else:
        size = int(options.get("vocab", Source.vocab))
        tokenizer = words.make(options.get("tokenizer"), texts, size=size, language=True)
        length = int(options.get("length", Source.length))
    return Pool(rows, [tokenizer.encode(text) for text in texts], tokenizer, length)


def rows_of(table: Table, field: str) -> list[Row]:
    """The rows of a table of text; the lines of one text, where that is what it holds."""
    if table.rows is not None:
        return list(table.rows)
    if table.kind != "tokens" or table.tokenizer is None or table["inputs"].ndim != 2:
        raise BadInput(
            f"rows of text are wanted, and {table.name} holds {table.kind}; give a text, or a jsonl, csv or parquet "
            "file with `kind: rows`"
        )
    tokens = torch.cat([table["inputs"].flatten(), table["labels"].flatten()[-1:]])
    last = int(table["mask"].sum()) + 1 if "mask" in table.columns else len(tokens)
    lines = table.tokenizer.decode(tokens[:last].tolist()).split("\n")
    if len(lines) == 1:
        raise BadInput(
            f"{table.name} is one line; take its rows (`kind: rows`), or a tokenizer that keeps lines, such as `chars`"
        )
    return [{field: line} for line in lines]


def keep(setting: Setting, pool: Pool) -> tuple[list[Row], Tensor, dict[str, int]]:
    """The rows that the method keeps, their places, and how many it dropped for which reason."""
    name, given = knobs.split(setting.recipe.method)
    method = find.get(name)
    stream = method([{**row, PLACE: i} for i, row in enumerate(pool.rows)], **knobs.check(name, method, given))
    kept: list[Row] = []
    dropped: dict[str, int] = {}
    while True:
        try:
            kept.append(next(stream))
        except StopIteration as end:
            dropped = end.value if isinstance(end.value, dict) else dropped
            break
    if not kept:
        raise BadInput(f"`{name}` keeps none of the {len(pool.rows):,} rows")
    return kept, torch.tensor([row.pop(PLACE) for row in kept]), dropped


def at_random(sizes: Tensor, tokens: int, seed: int) -> Tensor:
    """Places, in rising order, of the fewest random rows that hold `tokens` tokens; all where they hold fewer."""
    order = torch.randperm(len(sizes), generator=generator(seed, "rows"))
    enough = int((sizes[order].cumsum(0) < tokens).sum()) + 1
    return order[:enough].sort().values


def held_out(setting: Setting, pool: Pool) -> Table:
    """The text that a judge is tested on: the data's own, or that of the judge's `data`."""
    recipe, table = setting.recipe, setting.splits.test
    if pool.table is not None:
        return table
    if changes := recipe.judge.net.data:
        own = recipe.data.model_dump(exclude_unset=True, exclude={"augment"}) if recipe.data else {}
        with recipe.blamed("judge", "net", "data"):
            splits = load_data(merge(own, changes))
            table = splits.validation if recipe.split == "validation" else splits.test
    with recipe.blamed("judge", "net"):
        field = _field(recipe)
        text = "\n".join(str(row.get(field, "")) for row in rows_of(table, field))
    assert pool.tokenizer is not None
    return _stretches(pool.tokenizer.encode(text), pool.tokenizer, pool.length).check()


def save_rows(rows: list[Row], path: Path) -> int:
    """Write rows as JSON lines, whole or not at all, from the first process: how many bytes they are."""
    text = "".join(json.dumps(row, ensure_ascii=False, default=str) + "\n" for row in rows)
    data = text.encode(errors="backslashreplace")  # half a surrogate pair is written as JSON writes it
    if leads():
        path.parent.mkdir(parents=True, exist_ok=True)
        draft = path.with_name(f".{path.name}")
        draft.write_bytes(data)
        draft.replace(path)
    return len(data)


def artefact(setting: Setting, folder: Path) -> Table:
    """What the judge of a finished arm was trained on, but for a last row that was cut."""
    pool, lines = pool_of(setting), (folder / ROWS).read_text(encoding="utf-8").split("\n")  # no other line ends
    if pool.table is not None:
        return pool.training(keep(setting, pool)[1])
    assert pool.tokenizer is not None
    text = "".join(f"{json.loads(line)[_field(setting.recipe)]}\n" for line in lines if line)
    return _stretches(pool.tokenizer.encode(text), pool.tokenizer, pool.length)


def _classifies(table: Table) -> bool:
    return table.kind == "tokens" and table.rows is not None and table.num_classes > 0


def _field(recipe: Recipe) -> str:
    """The key of the text in a row: a knob of the method's."""
    name, given = knobs.split(recipe.method)
    return str(given.get("field", find.knobs(find.get(name)).get("field", "text")))


def _stretches(tokens: list[int], tokenizer: Tokenizer | None, length: int) -> Table:
    columns = words.blocks(tokens, length, int(getattr(tokenizer, "pad", words.PAD)))
    return Table(columns, "tokens", name="the rows", tokenizer=tokenizer)


def _budget(train: Train, table: Table) -> Train:
    """A judge's training with passes over a table told in steps."""
    if train.steps is not None or train.epochs is None:
        return train
    return train.model_copy(update={"steps": max(1, round(train.epochs * (len(table) // train.batch_size)))})


def _judge_net(setting: Setting, training: Table) -> nn.Module:
    """A fresh network for the rows."""
    if "judge" not in setting.blank or training.num_classes:
        return setting.build("judge")
    from limbeck.verbs.build import network  # it imports the verbs

    return network(setting.recipe.judge.net, training, setting.folder)


def _judge(
    setting: Setting, pool: Pool, training: Table, train: Train, seed: int, folder: Path
) -> tuple[dict[str, float], float]:
    """The figure of fresh networks trained on a table, their mean, and the seconds of training."""
    recipe, test, scores, seconds = setting.recipe, held_out(setting, pool), [], 0.0
    for i in range(recipe.judge.nets):
        torch.manual_seed(1000 * seed + i)  # the arms start from the same weights
        net = _judge_net(setting, training)
        batches = batches_of(recipe, training, 1000 * seed + i, train=train, augment=False)
        method, place = knobs.make("distill", {"match": ("ce",)}), folder if recipe.judge.nets == 1 else folder / str(i)
        seconds += setting.fit(method, Nets(student=net), train, batches, seed=seed, folder=place).seconds
        scores.append(_score(net, test, classify=pool.table is not None))
    return {measured(setting): sum(scores) / len(scores)}, seconds


def _score(net: nn.Module, test: Table, *, classify: bool) -> float:
    """Accuracy in [0, 1], or the mean negative log-likelihood of a token in nats."""
    if classify:
        return hits(predict(net, test), test)
    total, tokens = 0.0, 0
    for places in torch.arange(len(test)).split(256):  # the logits of a whole text would fill the memory
        part = test.select(places)
        mask = part["mask"].bool()
        total += float(F.cross_entropy(predict(net, part)[mask].double(), part["labels"][mask], reduction="sum"))
        tokens += int(mask.sum())
    return total / tokens
