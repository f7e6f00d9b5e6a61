"""Spoiled copies of tables: noise for robustness curves, and the trigger of a backdoor."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from limbeck.core import find, knobs
from limbeck.core.batches import Splits, Table, generator
from limbeck.core.errors import BadInput
from limbeck.core.evaluate import logits
from limbeck.recipe import PLANTED, Poison, Recipe, Spec, merge

SEVERITIES = 4  # besides the clean inputs
NOISE = 0.35  # of the inputs' own deviation, a severity
SWAPPED = 0.08  # share of the tokens, a severity


def stamps(measure: Any) -> bool:
    """Whether a measure is of pictures that bear a trigger, and not of rising severities of noise."""
    return "patch" in find.knobs(measure)


def shown(module: nn.Module, table: Table, measure: Any, given: Mapping[str, Any]) -> Tensor:
    """Logits of what a measure of robustness shows to a network: stamped pictures [N, C], or noise [S, N, C]."""
    if stamps(measure):
        return logits(module, stamped(table, int({**find.knobs(measure), **given}["patch"])))
    return stacked(module, table)


def stacked(module: nn.Module, table: Table) -> Tensor:
    """Logits [S, N, C] on the clean table and on rising severities of Gaussian noise, or of tokens swapped."""
    return torch.stack([logits(module, corrupted(table, s)) for s in range(SEVERITIES + 1)])


def corrupted(table: Table, severity: int) -> Table:
    """A copy of the table at a severity; 0 is the table itself."""
    if severity == 0:
        return table
    x, draw = table["inputs"], generator("corruption", severity)
    if table.kind == "tokens":
        swap = torch.rand(x.shape, generator=draw) < SWAPPED * severity
        x = torch.where(swap, torch.randint(1, max(2, table.vocab), x.shape, generator=draw), x)
    else:
        x = x + NOISE * severity * x.std() * torch.randn(x.shape, generator=draw)
    return replace(table, columns={**table.columns, "inputs": x})


# ---- backdoors -------------------------------------------------------------------------------------------------------
def stamped(table: Table, patch: int, rows: Tensor | None = None) -> Table:
    """A copy with a white square of `patch` pixels a side in the lower right corner of its pictures, or of `rows`."""
    x = table["inputs"].clone()
    if table.kind != "images" or patch > min(x.shape[-2:]):
        shape = f"pictures of {x.shape[-2]} x {x.shape[-1]}" if table.kind == "images" else table.kind
        raise BadInput(f"a trigger of {patch} x {patch} pixels goes into a picture, and {table.name} holds {shape}")
    white = [(1 - m) / s for m, s in zip(table.mean, table.std, strict=True)] or [1.0]
    rows = torch.arange(len(x)) if rows is None else rows
    x[rows, :, -patch:, -patch:] = torch.tensor(white, dtype=x.dtype).view(-1, 1, 1)
    return replace(table, columns={**table.columns, "inputs": x})


def poisoned(splits: Splits, poison: Poison | None) -> Splits:
    """The same with a backdoor in the training part: some pictures are stamped, and labelled with the target."""
    if poison is None:
        return splits
    train = splits.train
    if train.columns.get("labels", torch.empty(0)).ndim != 1 or poison.target >= train.num_classes:
        raise BadInput(f"`poison` needs a target among the classes of {train.name}, which has {train.num_classes}")
    count = max(1, round(poison.share * len(train)))
    rows = torch.randperm(len(train), generator=generator("poison"))[:count]
    made = stamped(train, poison.patch, rows)
    columns = {**made.columns, "labels": made["labels"].index_fill(0, rows, poison.target)}
    return splits._replace(train=replace(made, columns=columns))


def triggered(measures: list[Spec], recipe: Recipe) -> list[Spec]:
    """The measures, of which those of a trigger, or of secrets, look for what the recipe plants in its teacher's data,
    or its own, where they do not say it."""
    shared = recipe.data.model_dump(exclude_unset=True) if recipe.data is not None else {}
    own = merge(shared, recipe.teacher.data) if recipe.teacher is not None else {}
    found = list(measures)
    for key, of in (("poison", "patch"), ("canaries", "letters")):
        planted = own.get(key) if own.get(key) is not None else shared.get(key)
        if planted is None:
            continue
        known = PLANTED[key].model_validate(planted).model_dump()
        for i, spec in enumerate(found):
            name, given = knobs.split(spec, "measure")
            asks = find.knobs(find.get(name)) if name in find.names() and find.family(name) == "measure" else {}
            if of in asks:
                found[i] = {name: {**{knob: known[knob] for knob in asks if knob in known}, **given}}
    return found
