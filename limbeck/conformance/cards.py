"""Checks of every method: its card, signature, docstring, file and reference vector."""

import ast
import inspect
import re
from dataclasses import MISSING
from pathlib import Path
from typing import Any

from limbeck.conformance import vectors
from limbeck.conformance.calling import build
from limbeck.conformance.expect import concerns, expect
from limbeck.conformance.tensors import tensors
from limbeck.core import find
from limbeck.core.errors import nearest
from limbeck.core.names import NAMES

LINES = 150
# What a method may ask for besides tensors: a network, text rows, prompts.
OTHERS = {"shape": {"teacher", "batches"}, "data": {"rows", "teacher", "seeds", "batches"}}
VECTOR = {"losses": ("inputs", "value", "grad"), "train": ("turns",), "data": ("value",), "measure": ("value",)}


def _source(name: str) -> str:
    return Path(inspect.getfile(inspect.unwrap(find.get(name)))).read_text(encoding="utf-8")


def _is_loss_module(method: Any) -> bool:
    return inspect.isclass(method) and not hasattr(method, "step")


def _returns_numbers(method: Any) -> bool:
    return not hasattr(method, "step") and find.family(method.__module__.split(".")[-1]) in (
        "losses",
        "data",
        "measure",
    )


def check_vector(name: str) -> None:
    """There is a reference vector, it says where its numbers come from, and it holds what its family needs."""
    vector = vectors.read(name)
    source = vector.get("source")
    expect(isinstance(source, str) and len(source.split()) > 1, f"the vector of {name!r} does not say its `source`")
    for key in VECTOR.get(find.family(name), ()):
        expect(key in vector, f"the vector of {name!r} has no {key!r}")
        expect(vector[key] is not None, f"{key!r} is still empty in the vector of {name!r}: fill in reference numbers")
    if find.family(name) == "shape":
        facts = [k for k, v in vector.items() if k not in ("source", "knobs", "inputs") and v is not None]
        expect(bool(facts), f"the vector of {name!r} holds no fact about the student, such as `kept` or `value`")
    known = set(find.knobs(find.get(name)))
    for knob in vector.get("knobs", {}):
        expect(knob in known, f"the vector of {name!r} sets {knob!r}, which is no knob{nearest(knob, known)}")


def check_card(name: str) -> None:
    """Paper, year, identifier and code are there and well formed, and the object is called as its file."""
    method = find.get(name)
    card = method.card
    expect(bool(card.paper.strip()), "the card names no paper")
    expect(1900 < card.year < 2100, f"the card's year {card.year} is no year")
    named = [int(y) for y in re.findall(r"\b(?:19|20)\d\d\b", card.paper)]
    near = any(abs(card.year - y) <= 2 for y in named)  # a preprint is often a year older than the publication
    expect(near, f"the card's paper {card.paper!r} does not name a year near {card.year}")
    if card.arxiv:
        form = r"(\d{4}\.\d{4,5}|[a-z-]+(\.[A-Z]{2})?/\d{7})"
        expect(bool(re.fullmatch(form, card.arxiv)), f"{card.arxiv!r} is no arXiv identifier such as 1503.02531")
    else:
        said = bool(card.code or card.differs) or "," in card.paper
        expect(said, "the card has no arxiv identifier; say where the paper appeared after a comma in `paper`")
    if card.code:
        form = r"[\w.-]+/[\w.-]+@[0-9a-f]{7,40}(:\S.*)?"
        expect(bool(re.fullmatch(form, card.code)), f"code {card.code!r} is not written owner/repo@commit:path")
    called = method.__name__.replace("_", "").lower()
    expect(called == name.replace("_", ""), f"the file is called {name}.py but holds {method.__name__}")


def check_exceptions(name: str) -> None:
    """Declared exceptions name checks that concern the method, and say why."""
    from limbeck.conformance.suite import FIRM, checks  # the suite imports this module

    known = set(checks(name)) - set(FIRM)
    for key, reason in find.get(name).card.exceptions.items():
        key = key.replace("_", " ")
        expect(key in known, f"the card declares an exception to {key!r}, which is no check{nearest(key, known)}")
        expect(len(reason.split()) >= 3, f"the exception to {key!r} gives no reason")


def check_knobs(name: str) -> None:
    """Every knob has a default and a line in the docstring."""
    method = find.get(name)
    doc = inspect.getdoc(method) or ""
    for knob, default in find.knobs(method).items():
        expect(default is not inspect.Parameter.empty and default is not MISSING, f"knob {knob!r} has no default")
        explained = re.search(rf"(?<![\w.]){re.escape(knob)}`?(,[ \n][\w`, \n]+?)?:", doc)
        expect(explained is not None, f"knob {knob!r} is not explained in the docstring as `{knob}: ...`")


@concerns(_is_loss_module)
def check_attributes(name: str) -> None:
    """A loss module keeps each knob as an attribute of the same name, so that schedules can turn it."""
    method = find.get(name)
    module = build(method, tensors(method))
    for knob, value in find.knobs(method).items():
        expect(hasattr(module, knob), f"the module does not keep its knob as `self.{knob}`")
        kept = getattr(module, knob)
        expect(kept == value or value is None, f"`self.{knob}` is {kept!r} where the knob was {value!r}")


def check_names(name: str) -> None:
    """It asks only for tensors of the vocabulary, by position; knobs are keyword-only and optional tensors are None."""
    method, family = find.get(name), find.family(name)
    if family == "train":
        return
    known = NAMES.keys() | OTHERS.get(family, set())
    asked = find.needs(method) + find.wants(method)
    if _is_loss_module(method):
        built = [p for p in inspect.signature(method).parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD]
        asked += [p.name for p in built]
        extra = [p.name for p in built if p.name not in find.needs(method) + find.wants(method)]
        expect(not extra, f"__init__ asks for the shape of {extra}, which forward does not take")
    for one in asked:
        expect(one in known, f"it asks for {one!r}, which is no name of the vocabulary{nearest(one, known)}")
    call = method.forward if _is_loss_module(method) else method
    for p in inspect.signature(call).parameters.values():
        if p.name != "self" and p.kind is p.POSITIONAL_OR_KEYWORD and p.default is not p.empty:
            expect(p.default is None, f"{p.name!r} is positional, so its default must be None; knobs come after `*`")
    expect(bool(asked), "it asks for nothing")


def check_file(name: str) -> None:
    """One short file: a docstring, exactly one carded object, no keyword soup, nothing printed, no inheritance."""
    source = _source(name)
    lines = len(source.splitlines())
    expect(lines <= LINES, f"the file has {lines} lines, at most {LINES} are allowed")
    tree = ast.parse(source)
    expect(bool(ast.get_docstring(tree)), "the file does not begin with the idea in one sentence")
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            expect(node.args.kwarg is None, f"line {node.lineno}: **kwargs hides what a function takes")
            expect(
                node.args.vararg is None or isinstance(node, ast.Lambda),
                f"line {node.lineno}: *args hides what a function takes",
            )
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            expect(node.func.id != "print", f"line {node.lineno}: a method prints nothing")
    method = find.get(name)
    if inspect.isclass(method):
        parents = [b.__name__ for b in method.__mro__[1:] if hasattr(b, "card")]
        expect(not parents, f"it inherits from the method {parents}; say variant_of in the card and share through core")


def check_docstring(name: str) -> None:
    """The docstring says what comes out; where that is a tensor or a number, with its shape after `->`."""
    method = find.get(name)
    doc = inspect.getdoc(method) or ""
    expect(len(doc.split()) >= 5, "the docstring does not say what the method does")
    if _returns_numbers(method):
        inside = doc + (inspect.getdoc(method.forward) or "" if _is_loss_module(method) else "")
        expect("->" in inside, "the docstring does not say the shape of the result, such as `-> [...]`")
