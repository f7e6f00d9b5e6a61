"""How the vocabularies and chat templates of two networks agree."""

from __future__ import annotations

from typing import Any

from torch import nn

from limbeck.adapters.pieces import pieces_of
from limbeck.adapters.words import Pretrained
from limbeck.core.batches import Table
from limbeck.core.errors import BadInput
from limbeck.core.evaluate import logits as predict
from limbeck.outlook.facts import Words
from limbeck.recipe import Recipe
from limbeck.zoo.nets import is_transformers

TALK = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]


def tokenizer_of(net: str) -> Pretrained | None:
    """The tokenizer that comes with a transformers model; None for other networks and for models without one."""
    if not is_transformers(net):
        return None
    try:
        return Pretrained(net.removeprefix("hf:"))
    except BadInput:
        return None


def one_vocabulary(a: Pretrained, b: Pretrained) -> bool:
    """Whether equal words have equal ids in both."""
    return bool(a.inner.get_vocab() == b.inner.get_vocab())


def words(recipe: Recipe, student: nn.Module, teacher: nn.Module, table: Table) -> Words | None:
    """How the two vocabularies agree; None where there are no texts."""
    if table.kind != "tokens" or table.tokenizer is None:
        return None
    assert recipe.teacher is not None
    mine: Any = table.tokenizer
    theirs: Any = table.teacher_tokenizer or tokenizer_of(recipe.teacher.net) or mine
    pairs = ((student, table), (teacher, table.retold()))
    wide, wider = (int(predict(net, one.select([0])).shape[-1]) for net, one in pairs)
    a, b = _vocabulary(mine), _vocabulary(theirs)
    return Words(len(a), len(b), len(a.keys() & b.keys()), a == b, wide, wider, _templates(mine, theirs))


def _vocabulary(tokenizer: Any) -> dict[Any, int]:
    """Word -> id, special words among them."""
    inner = getattr(tokenizer, "inner", None)
    if inner is not None:
        return dict(inner.get_vocab())
    try:
        pieces = pieces_of(tokenizer)
        return pieces.ids()
    except BadInput:
        return {symbol: i for i, symbol in enumerate(getattr(tokenizer, "symbols", range(tokenizer.size)))}


def _templates(mine: Any, theirs: Any) -> str:
    found = [getattr(getattr(t, "inner", None), "chat_template", None) for t in (mine, theirs)]
    if not any(found):
        return "none"
    if not all(found):
        return f"only the {'student' if found[0] else 'teacher'} has one"
    said = []
    for tokenizer in (mine, theirs):
        try:
            said.append(tokenizer.inner.apply_chat_template(TALK, tokenize=False, add_generation_prompt=True))
        except Exception as error:  # a template is a program of its own, and raises what it likes
            said.append(f"{type(error).__name__}: {error}")
    return "same" if said[0] == said[1] else "different"
