"""Finds methods by file name: get("dkd") is the one carded object in the file dkd.py. Imports no torch itself."""

import importlib
import inspect
from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass
from functools import cache
from pathlib import Path
from typing import Any

from limbeck.core.errors import BadInput, nearest

ROOT = Path(__file__).parent.parent
FAMILIES = ("losses", "train", "shape", "data", "measure")


@cache
def names() -> Mapping[str, str]:
    """Every method: its name (the file stem) -> its module path, sorted by family and folder."""
    found: dict[str, str] = {}
    for family in FAMILIES:
        for file in sorted((ROOT / family).rglob("*.py")):
            if file.stem.startswith("_"):
                continue
            module = ".".join((ROOT.name, *file.relative_to(ROOT).with_suffix("").parts))
            if file.stem in found:
                raise BadInput(f"two methods are called {file.stem!r}: {found[file.stem]} and {module}")
            found[file.stem] = module
    return found


def folder(name: str) -> str:
    """Where a method lives below the package, such as 'losses/logits'."""
    return "/".join(names()[name].split(".")[1:-1])


def family(name: str) -> str:
    """The contract of a method: losses, train, shape, data or measure."""
    return folder(name).split("/")[0]


def get(name: str) -> Any:
    """The method called `name`. Raises BadInput with the nearest names when there is none."""
    if name not in names():
        raise BadInput(f"no method {name!r}{nearest(name, names()) or '; `limbeck list` prints them all'}")
    module = importlib.import_module(names()[name])
    carded = [
        o for o in vars(module).values() if hasattr(o, "card") and getattr(o, "__module__", "") == module.__name__
    ]
    if len(carded) != 1:
        raise BadInput(f"{names()[name]} must hold exactly one @method, found {len(carded)}")
    return carded[0]


def _positional(thing: Any) -> list[inspect.Parameter]:
    call = getattr(thing, "forward", thing) if inspect.isclass(thing) else thing
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.POSITIONAL_ONLY)
    return [p for p in inspect.signature(call).parameters.values() if p.kind in kinds and p.name != "self"]


def needs(thing: Any) -> list[str]:
    """Names of the tensors that a loss, data or measure method must be given; [] for a training method."""
    if hasattr(thing, "step"):
        return []
    return [p.name for p in _positional(thing) if p.default is inspect.Parameter.empty]


def wants(thing: Any) -> list[str]:
    """Names that the method takes when they are there (positional, default None)."""
    if hasattr(thing, "step"):
        return []
    return [p.name for p in _positional(thing) if p.default is not inspect.Parameter.empty]


def knobs(thing: Any) -> dict[str, Any]:
    """The method's options and their defaults (the paper's)."""
    if is_dataclass(thing):
        out: dict[str, Any] = {}
        for f in fields(thing):
            out[f.name] = f.default_factory() if f.default_factory is not MISSING else f.default
        return out
    parameters = inspect.signature(thing).parameters.values()
    return {p.name: p.default for p in parameters if p.kind == inspect.Parameter.KEYWORD_ONLY}
