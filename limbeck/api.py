"""The four verbs from Python, on any nn.Module or transformers model, without YAML.

Each returns a `Result`: the artefact, its metrics, the control's metrics, the gain and the run folder. A network is
given as a module (every seed starts from its weights), as a function that makes one (every seed starts fresh), or as
a recipe's spec such as "resnet8". Data is a name or path, `Splits`, a `Table`, (inputs, labels) tensors or a dataset.
A run that was interrupted goes on with the same call and `folder=..., resume=True`.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from limbeck.recipe import Spec
from limbeck.run import Network, in_python
from limbeck.verbs.result import Result

Event = Callable[[dict[str, Any]], None]


def teach(
    teacher: Network | None,
    student: Network,
    data: Any,
    *,
    match: Sequence[Spec] = ("ce", "kd"),
    method: Spec | None = None,
    epochs: float | None = None,
    steps: int | None = None,
    train: Mapping[str, Any] | None = None,
    measure: Sequence[Spec] = (),
    seeds: int | Iterable[int] = 1,
    name: str = "teach",
    folder: str | Path | None = None,
    resume: bool = False,
    on_event: Event | None = None,
) -> Result:
    """Train a student by a teacher, and the same student without it, and say whether the teacher helped.

    match: losses of the plain scheme, "kd" or {"kd": {"temperature": 4, "weight": 0.9}}; method: another training
    method, such as {"dml": {}}. epochs or steps: how long (default 10 epochs). train: any key of a recipe's `train`
    block, such as {"optimizer": {"sgd": {"lr": 0.05}}}. Raises BadInput in one sentence when something does not fit.

        result = limbeck.teach(teacher, student, (x, y), match=["ce", {"dkd": {"beta": 2}}], epochs=5)
        result.artefact, result.gain.mean, result.control["accuracy"]
    """
    settings = {"match": list(match), "method": method, "measure": list(measure), "name": name}
    return in_python(
        "teach",
        networks={"teacher": teacher, "student": student},
        data=data,
        folder=folder,
        resume=resume,
        on_event=on_event,
        seeds=seeds,
        settings={**settings, "train": _train(train, epochs, steps, 10)},
    )


def condense(
    data: Any,
    *,
    method: Spec = "dm",
    ipc: int = 10,
    net: Network = "convnet",
    steps: int = 1000,
    train: Mapping[str, Any] | None = None,
    judge: Mapping[str, Any] | None = None,
    seeds: int | Iterable[int] = 1,
    name: str = "condense",
    folder: str | Path | None = None,
    resume: bool = False,
    on_event: Event | None = None,
) -> Result:
    """Make a small training set of `ipc` examples a class, and judge it against as many random ones.

    method: "dm", "dc", "mtt", "kip", or a selection such as "herding". net: architecture that the set is made with and
    judged by. steps: updates of the set. judge: keys of a recipe's `judge` block, such as {"train": {"epochs": 100}}.
    The artefact is a `Table` with inputs and labels.
    """
    body = dict(judge or {})
    if isinstance(net, (str, Mapping)):
        body.setdefault("net", net)
    return in_python(
        "condense",
        networks={"judge": net},
        data=data,
        folder=folder,
        resume=resume,
        on_event=on_event,
        seeds=seeds,
        settings={
            "method": method,
            "ipc": ipc,
            "judge": body or None,
            "name": name,
            "train": _train(train, None, steps, None, per_class=64),
        },
    )


def shorten(
    denoiser: Network,
    data: Any,
    *,
    method: Spec = "consistency_distillation",
    steps: int = 1,
    teacher_steps: int = 18,
    updates: int = 2000,
    train: Mapping[str, Any] | None = None,
    features: Network | None = None,
    seeds: int | Iterable[int] = 1,
    name: str = "shorten",
    folder: str | Path | None = None,
    resume: bool = False,
    on_event: Event | None = None,
) -> Result:
    """Distil a many-step sampler into one of `steps` steps, and compare with the teacher at that many steps.

    denoiser: a trained `limbeck.core.sampler.Denoiser`. data: what it was trained on; it is the reference of the
    Frechet distance. features: network whose embeddings that distance compares (default: the pixels themselves).
    updates: optimiser steps. The artefact is the student's Denoiser.
    """
    return in_python(
        "shorten",
        networks={"teacher": denoiser, "features": features},
        data=data,
        folder=folder,
        resume=resume,
        on_event=on_event,
        seeds=seeds,
        settings={
            "method": method,
            "steps": steps,
            "teacher_steps": teacher_steps,
            "name": name,
            "train": _train(train, None, updates, None),
        },
    )


def shape(
    model: nn.Module | Network,
    data: Any,
    *,
    method: Spec = "layer_choice",
    match: Sequence[Spec] = ("ce", "kd"),
    epochs: float | None = None,
    steps: int | None = None,
    train: Mapping[str, Any] | None = None,
    measure: Sequence[Spec] = (),
    seeds: int | Iterable[int] = 1,
    name: str = "shape",
    folder: str | Path | None = None,
    resume: bool = False,
    on_event: Event | None = None,
) -> Result:
    """Make a smaller network out of a trained one and recover it by distillation.

    method: "layer_choice", {"channel_pruning": {...}}, ... The control trains the same architecture from scratch; the
    result also holds removal without recovery (`result.arms["removal"]`). The artefact is the recovered network.
    """
    settings = {"method": method, "match": list(match), "measure": list(measure), "name": name}
    return in_python(
        "shape",
        networks={"teacher": model},
        data=data,
        folder=folder,
        resume=resume,
        on_event=on_event,
        seeds=seeds,
        settings={**settings, "train": _train(train, epochs, steps, 5)},
    )


def _train(
    train: Mapping[str, Any] | None, epochs: float | None, steps: int | None, default: float | None, **base: Any
) -> dict[str, Any]:
    body = {**base, **dict(train or {})}
    for key, value in (("epochs", epochs), ("steps", steps)):
        if value is not None and key not in body:
            body[key] = value
    if not {"epochs", "steps", "minutes"} & set(body) and default is not None:
        body["epochs"] = default
    return body
