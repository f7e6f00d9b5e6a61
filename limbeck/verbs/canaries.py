"""Canaries: random secrets in a training text, and how likely a network finds each of them beside others like it."""

from dataclasses import replace

import torch
from torch import Tensor, nn

from limbeck.adapters.words import next_tokens
from limbeck.core.batches import Splits, Table, Tokenizer, generator
from limbeck.core.errors import BadInput
from limbeck.core.evaluate import logits
from limbeck.core.policy import text
from limbeck.recipe import Data

SENTENCE = "the secret is "


def planted(splits: Splits, data: Data) -> Splits:
    """The same with each secret so many times in the training part, in place of what stood there, if the data say so.

    A stretch holds one at most, and never at its edges, where the next one goes on with the same token.
    """
    if data.canaries is None:
        return splits
    train, draw = splits.train, generator(data.options.get("seed", 0), "canaries")
    told = sentences(train, count=data.canaries.count, letters=data.canaries.letters)[:, 0]
    told = told.repeat(data.canaries.copies, 1)
    whole = train.columns.get("mask", torch.ones_like(train["labels"])).bool().all(1).nonzero()[:, 0]
    if len(told) > len(whole):
        raise BadInput(f"{len(told)} canaries need as many stretches of text, and {train.name} has {len(whole)}")
    rows = whole[torch.randperm(len(whole), generator=draw)[: len(told)], None]
    first = torch.randint(1, train["inputs"].shape[1] - told.shape[1] + 1, (len(told), 1), generator=draw)
    line = text(train.columns)
    line[rows, first + torch.arange(told.shape[1])] = told
    inputs, labels = (side.contiguous() for side in next_tokens(line))
    return splits._replace(train=replace(train, columns={**train.columns, "inputs": inputs, "labels": labels}))


def sentences(table: Table, *, count: int, letters: int, candidates: int = 0) -> Tensor:
    """The sentence with each secret, and with others that are nowhere: ids [count, 1 + candidates, L].

    They depend on the tokenizer and the number of letters alone, so that tables of other texts have the same.
    """
    running = table.kind == "tokens" and table.columns.get("labels", torch.empty(0)).ndim == 2 and table.rows is None
    if not running or table.tokenizer is None or table.cloze is not None:
        raise BadInput(f"canaries are secrets in running text (`kind: language`), and {table.name} is none")
    if table.teacher_tokenizer is not None:
        raise BadInput("canaries are secrets in one tokenizer, and here the teacher has another than the student")
    known, begun = _alphabet(table.tokenizer), torch.tensor(table.tokenizer.encode(SENTENCE))
    if len(known) < 2:
        raise BadInput(f"the tokenizer of {table.name} knows no words or letters to make canaries of")
    if len(begun) + letters >= table["inputs"].shape[1]:
        raise BadInput(f"a canary of {len(begun) + letters} tokens needs longer stretches; raise `length` of the data")

    def drawn(number: int, *key: int | str) -> Tensor:
        return known[torch.randint(len(known), (number, letters), generator=generator(*key))]

    secrets = torch.stack([torch.cat([drawn(1, "canary", i), drawn(candidates, "others", i)]) for i in range(count)])
    return torch.cat([begun.expand(*secrets.shape[:2], -1), secrets], -1)


def _alphabet(tokenizer: Tokenizer) -> Tensor:
    """Ids of what secrets are made of: capitals, or where a tokenizer knows none, all that is letters."""
    said = [tokenizer.decode([i]).strip() for i in range(tokenizer.size)]
    letters = [i for i, piece in enumerate(said) if piece.isalpha()]
    capitals = [i for i in letters if said[i].isupper()]
    return torch.tensor(capitals if len(capitals) > 1 else letters)


def secrets(module: nn.Module, table: Table, *, count: int, letters: int, candidates: int) -> dict[str, Tensor]:
    """student_secrets [count, 1 + candidates] of a network that reads such tables: see core/names."""
    lines = sentences(table, count=count, letters=letters, candidates=candidates).flatten(0, 1)
    found = []
    for some in lines.split(128):
        inputs, labels = next_tokens(some)
        told = logits(module, replace(table, columns={"inputs": inputs}))[:, -letters:].double().log_softmax(-1)
        found.append(told.gather(-1, labels[:, -letters:, None]).sum((1, 2)))
    return {"student_secrets": torch.cat(found).view(count, 1 + candidates)}
