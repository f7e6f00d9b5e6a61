"""Reference numbers: tests/vectors/NAME.json, read as tensors. All in fp64, and each says where they come from.

All: "source" (the authors' code at a commit, or the equation redone by hand) and "knobs".
losses: "inputs" {name: nested lists}, "reduce": mean, sum, none, "value", "grad" {student input: ...}; of modules
"state" (every weight; buffers as needed), "state_after", "examples" (size of the set when `index` does not tell) and
"training" (false for eval mode). Any further entry with "inputs" and "value" is a further case.
train: "turns" (players in order, from the first step on) and "steps" (of each stage, to see them).
shape: one of the three forms that `shaping.check_reference` reads, or facts for tests of its own.
data: "inputs" and "value": indices, weights or rows. measure: "inputs" and "value": a number or {name: number}.
"""

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from limbeck.core.errors import BadInput
from limbeck.core.find import ROOT
from limbeck.core.names import NAMES

INTEGERS = {
    *("labels", "index", "negatives", "teacher_ids", "edges", "domain"),
    *("teacher_inputs", "teacher_labels", "student_spans", "teacher_spans"),
    *("same_words", "nearest_words", "projection"),
    *("student_answers", "real_answers"),
}
BOOLEANS = {"mask", "attention_mask", "foreground", "teacher_mask", "teacher_attention_mask", "word_starts"}
_chosen: list[Path] = []


def use(folder: Path | None) -> None:
    """Read vectors from `folder` from now on; None goes back to the repository's."""
    _chosen[:] = [folder] if folder else []


def folder() -> Path:
    """Where the vectors lie: the folder given, the repository's tests/vectors, or that of the working directory."""
    places = _chosen or [ROOT.parent / "tests" / "vectors", Path.cwd() / "tests" / "vectors"]
    for place in places:
        if place.is_dir():
            return place
    raise BadInput(
        f"no reference vectors in {places[-1]}; an installed package has none: give the folder that holds NAME.json"
    )


def read(name: str) -> dict[str, Any]:
    """The vector of a method as written. Raises BadInput when there is none, or when it is no JSON."""
    file = folder() / f"{name}.json"
    if not file.is_file():
        raise BadInput(f"{name!r} has no reference vector; write {file}")
    try:
        vector: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise BadInput(f"{file} is no JSON: {error}") from error
    return vector


def filled(name: str) -> dict[str, Any]:
    """The vector of a method, whose numbers are needed. Raises BadInput when one is still empty, as `new` left it."""
    vector = read(name)
    if (place := _empty(vector)) is not None:
        raise BadInput(f"the vector is not filled in: `{place}` is still null in {folder() / name}.json")
    return vector


def _empty(tree: Any, path: str = "") -> str | None:
    if not isinstance(tree, dict):
        return path if tree is None else None
    found = (_empty(value, f"{path}.{key}".lstrip(".")) for key, value in tree.items())
    return next((place for place in found if place is not None), None)


def tensor(name: str, value: Any) -> Any:
    """A nested list as the tensor, or list of tensors, that `name` stands for; floating point in fp64."""
    if name in ("rows", "seeds"):
        return value
    if NAMES.get(name, ("",))[0].startswith("["):  # a list, shallow to deep
        return [_number(name, v) for v in value]
    return _number(name, value)


def _number(name: str, value: Any) -> Tensor:
    if name in INTEGERS:
        return torch.tensor(value, dtype=torch.long)
    if name in BOOLEANS:
        return torch.tensor(value, dtype=torch.bool)
    made = torch.tensor(value)
    tokens = name == "inputs" and not made.is_floating_point()
    return made if tokens else torch.tensor(value, dtype=torch.float64)


def inputs(vector: dict[str, Any]) -> dict[str, Any]:
    """The inputs of a vector as tensors, in the order in which they are written."""
    return {name: tensor(name, value) for name, value in vector.get("inputs", {}).items()}
