"""The student as a plain model of its own library: no hooks, wrappers, projectors or teacher."""

import json
import logging
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from limbeck.adapters.files import load as load_data
from limbeck.adapters.words import Pretrained
from limbeck.core.errors import BadInput, LimbeckError, MissingExtra, nearest
from limbeck.core.nets import outputs
from limbeck.core.sampler import Denoiser, clean_grid, sample
from limbeck.recipe import Net, Recipe, load
from limbeck.shape.quant.fake_quant import plain
from limbeck.verbs import build
from limbeck.verbs.setting import WEIGHTS, load_weights, one
from limbeck.verbs.shape import methods as shape_methods
from limbeck.verbs.shape import shaped


class Logits(nn.Module):
    """A network that returns its logits alone, for formats that know no dicts."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, inputs: Tensor) -> Tensor:
        """[B, ...] -> [B, ..., C]"""
        logits: Tensor = outputs(self.net, {"inputs": inputs})["logits"]
        return logits


class Samples(nn.Module):
    """A sampler as a network, from noise to data in a fixed number of steps, for any size of batch."""

    def __init__(self, net: Denoiser, steps: int) -> None:
        super().__init__()
        self.net, self.steps = net, steps

    def forward(self, inputs: Tensor) -> Tensor:
        """Unit noise [B, ...] -> data [B, ...]"""
        return sample(self.net, inputs, clean_grid(self.net.schedule, self.steps), self.net.solver)


def export(run: Path, to: str, out: Path) -> Path:
    """Write the student of a run folder (its first seed) to `out` as torch (a state dict), safetensors, hf or onnx.

    Raises BadInput when the run holds no student or cannot be written in that format; `out` is then as it was.
    """
    if to not in FORMATS:
        raise BadInput(f"no export format {to!r}{nearest(to, FORMATS)}")
    places = (run, run / "seed-0", *sorted(run.glob("seed-*")), *sorted(run.glob("*/seed-*")))
    place = next((p for p in places if (p / WEIGHTS).exists()), None)
    if place is None:
        condensed = list(run.glob("seed-*/set.safetensors"))
        what = f"it condensed a set: {condensed[0]}" if condensed else "is it a run folder?"
        raise BadInput(f"{run} holds no trained network; {what}")
    if out.exists() and not out.is_dir():
        raise BadInput(f"{out} is a file; an export goes into a folder")
    draft = out.with_name(f".{out.name}.draft")
    shutil.rmtree(draft, ignore_errors=True)
    try:
        draft.mkdir(parents=True)
        written = FORMATS[to](_Student(run, place), draft)
        out.mkdir(parents=True, exist_ok=True)
        for file in draft.iterdir():
            file.replace(out / file.name)
    except SafetensorError as error:
        raise LimbeckError(f"could not write the export to {out}: {error}") from error
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return out / written


class _Student:
    """What a run folder holds of its student. run: the folder with the recipe. place: the folder with the weights."""

    def __init__(self, run: Path, place: Path) -> None:
        self.place = place
        self.run = next((p for p in (place, place.parent, run) if (p / "recipe.yaml").exists()), run)

    def recipe(self) -> Recipe:
        return load(self.run / "recipe.yaml")

    def state(self) -> dict[str, Tensor]:
        """The weights; those of a network that only pretended to have few bits are the rounded ones."""
        path = self.place / WEIGHTS
        try:
            state = load_file(path)
        except SafetensorError as error:
            raise BadInput(f"{path} is not a whole safetensors file: {error}") from error
        recipe = self.recipe() if (self.run / "recipe.yaml").exists() else None
        if recipe is not None and recipe.do == "shape" and shape_methods(recipe)[0] == "fake_quant":
            return {k: v.contiguous() for k, v in self.network()[0].state_dict().items()}
        return state

    def network(self) -> tuple[nn.Module, Tensor]:
        """The student with its weights, and one example input."""
        recipe, file = self.recipe(), self.run / "recipe.yaml"
        if recipe.data is None:
            raise BadInput(f"{file} names no data, so the shape of the input is unknown; export safetensors or torch")
        if recipe.do == "shape":
            setting = build.setting(recipe, self.run, None, True)
            made = shaped(setting)
            load_weights(made, str(self.place / WEIGHTS), ())
            return plain(made).eval(), one(setting.splits.test)["inputs"]
        splits = load_data(build.data_of(recipe))
        if (self.place / "config.json").exists():
            module = _from_config(self.place / "config.json")
        elif (self.place / "net.json").exists():
            body = json.loads((self.place / "net.json").read_text())
            module = build.network(Net.model_validate(body), splits.train, self.run)
        else:
            raise BadInput(f"{self.place} does not say how to build its network; export safetensors or torch")
        load_weights(module, str(self.place / WEIGHTS), ())
        return module.eval(), one(splits.test)["inputs"]


def _from_config(path: Path) -> nn.Module:
    """An untrained transformers model of the class and configuration that a run wrote down."""
    try:
        import transformers
    except ImportError as error:
        raise MissingExtra("transformers", "text") from error
    body = json.loads(path.read_text())
    name = body["architectures"][0]
    kind = getattr(transformers, name, None)
    if kind is None:
        raise BadInput(f"{path} names {name!r}, which is no model of transformers {transformers.__version__}")
    module: nn.Module = kind(kind.config_class.from_dict(body))
    return module


def _safetensors(student: _Student, out: Path) -> str:
    save_file(student.state(), out / "model.safetensors")
    if (student.place / "net.json").exists():
        shutil.copyfile(student.place / "net.json", out / "net.json")
    return "model.safetensors"


def _torch(student: _Student, out: Path) -> str:
    torch.save(student.state(), out / "model.pt")  # torch.load(..., weights_only=True) reads it
    return "model.pt"


def _onnx(student: _Student, out: Path) -> str:
    try:
        import onnx  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise MissingExtra(error.name or "onnx", "export") from error
    net, example = student.network()
    sampler = isinstance(net, Denoiser)
    module = Samples(net, student.recipe().steps) if isinstance(net, Denoiser) else Logits(net)
    small = sum(p.numel() * p.element_size() for p in net.parameters()) < 2**30  # one file may hold 2 GB
    for name in ("torch.onnx", "torch.onnx._internal.exporter"):
        logging.getLogger(name).setLevel(logging.ERROR)  # it tells of operators of libraries that are not there
    try:
        with warnings.catch_warnings(action="ignore"):
            torch.onnx.export(
                module.eval(),
                (example.repeat(2, *[1] * (example.ndim - 1)),),
                str(out / "model.onnx"),
                input_names=["noise" if sampler else "inputs"],
                output_names=["samples" if sampler else "logits"],
                dynamic_shapes={"inputs": {0: torch.export.Dim("batch")}},
                dynamo=True,
                external_data=not small,
                verbose=False,
            )
    except Exception as error:  # torch's exporter raises its own, with pages of text
        said = (str(error).splitlines() or ["?"])[0]
        raise BadInput(
            f"torch cannot write {type(net).__name__} as onnx: {said}; export safetensors or torch instead"
        ) from error
    return "model.onnx"


def _hf(student: _Student, out: Path) -> str:
    module: Any
    if (student.place / "config.json").exists():
        module = _from_config(student.place / "config.json")
        load_weights(module, str(student.place / WEIGHTS), ())
    else:
        module, _ = student.network()
    if not hasattr(module, "save_pretrained"):
        kind = type(module).__name__
        raise BadInput(f"{kind} is no transformers model, so it has no `hf` form; export safetensors, torch or onnx")
    module.save_pretrained(out)
    recipe = student.recipe() if (student.run / "recipe.yaml").exists() else None
    told = {} if recipe is None or recipe.data is None else build.data_of(recipe)
    named = recipe is not None and recipe.data is not None and "tokenizer" in recipe.data.options
    texts = named or told.get("kind") in ("chat", "language", "text")
    tokenizer = told.get("tokenizer") if texts else None  # data of token ids was made by one that nobody knows
    if isinstance(tokenizer, str) and ("/" in tokenizer or Path(tokenizer).exists()):
        Pretrained(tokenizer).inner.save_pretrained(out)
    return ""


FORMATS: dict[str, Callable[[_Student, Path], str]] = {
    "safetensors": _safetensors,
    "torch": _torch,
    "onnx": _onnx,
    "hf": _hf,
}
