"""Looks at a teacher, a student and their data: a recipe, or three names."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import yaml

from limbeck.core.batches import Table
from limbeck.core.errors import BadInput
from limbeck.outlook.facts import Outlook
from limbeck.outlook.figures import figures
from limbeck.outlook.trial import trial
from limbeck.outlook.verdict import judged
from limbeck.outlook.vocabularies import one_vocabulary, tokenizer_of, words
from limbeck.recipe import Recipe, check
from limbeck.verbs import build


def recipe_of(teacher: str, student: str, data: str, *, batch_size: int = 16, steps: int | None = None) -> Recipe:
    """A recipe of three specs, each a name or a YAML mapping such as '{net: resnet20, weights: zoo/fashion_resnet20}'.

    Transformers models bring their tokenizers: the student's reads the data, and a teacher with another one reads the
    text in its own.
    """
    tree: dict[str, Any] = {"teacher": _spec(teacher, "--teacher"), "student": _spec(student, "--student")}
    tree |= {"name": "doctor", "do": "teach", "data": _spec(data, "--data", key="name")}
    tree["train"] = {"batch_size": batch_size, **({"epochs": 10} if steps is None else {"steps": steps})}
    known = {role: tokenizer_of(tree[role]["net"]) for role in ("student", "teacher")}
    found = known["student"] or known["teacher"]
    if found is not None and "tokenizer" not in tree["data"]:
        own = "student" if known["student"] else "teacher"
        tree["data"]["tokenizer"] = tree[own]["net"].removeprefix("hf:")
    theirs, mine = known["teacher"], known["student"]
    two = theirs is not None and mine is not None and not one_vocabulary(mine, theirs)
    if two and "tokenizer" not in tree["teacher"]:
        tree["teacher"]["tokenizer"] = tree["teacher"]["net"].removeprefix("hf:")
        tree["match"] = ["ce", "uld"]
    return check(tree, "doctor")


def _spec(text: str, option: str, key: str = "net") -> dict[str, Any]:
    try:
        found = yaml.safe_load(text)
    except yaml.YAMLError:
        found = text
    body = dict(found) if isinstance(found, Mapping) else {key: text}
    if not isinstance(body.get(key), str):
        raise BadInput(f"{option} is a name, or a mapping with `{key}` such as {{{key}: NAME, ...}}, got {text!r}")
    return body


def look(
    recipe: Recipe,
    *,
    examples: int = 256,
    top_k: int = 10,
    folder: Path = Path("runs/doctor"),
    on_event: Callable[[dict[str, Any]], None] | None = None,
) -> Outlook:
    """Everything about a `teach` recipe of one stage, on its validation part (test, where there is none).

    A teacher that the recipe trains first is trained, and kept where the recipe's run will find it.
    """
    if recipe.stages or recipe.do != "teach" or recipe.teacher is None or recipe.student is None:
        raise BadInput(
            f"{recipe.at('do')}doctor looks at a `teach` recipe of one stage with a `teacher` and a `student`"
        )
    if recipe.teacher.served:
        raise BadInput(f"{recipe.at('teacher')}doctor needs the teacher itself, and this one is behind a server")
    for name, value in (("--examples", examples), ("--top-k", top_k)):
        if value < 1:
            raise BadInput(f"{name} must be at least 1, got {value}")
    heard: list[str] = []

    def listen(event: dict[str, Any]) -> None:
        if "note" in event:
            heard.append(str(event["note"]))
        elif on_event is not None:
            on_event(event)

    plain = {"match": ["ce"], "method": None, "store": None, "beside": None, "control": None, "expect": None}
    made = build.setting(recipe.with_changes({**plain, "measure": None}), folder, listen, False)
    assert made.teacher is not None
    torch.manual_seed(0)
    student = made.build("student").eval()
    part = "validation" if len(made.splits.validation) else "test"
    table = _some(getattr(made.splits, part), examples)
    networks = {"student": student, "teacher": made.teacher}
    found = figures(recipe, networks, table, _some(made.splits.train, examples), top_k)
    found = replace(found, part=part, notes=heard, words=words(recipe, student, made.teacher, table))
    try:
        found = replace(found, cost=trial(made, recipe.with_changes({"store": None, "beside": None})))
    except BadInput as error:
        found = replace(found, problem=str(error))
    return judged(found)


def _some(table: Table, most: int) -> Table:
    """At most so many rows, evenly spread."""
    n = len(table)
    return table if n <= most else table.select(torch.linspace(0, n - 1, most).round().long())
