"""The student as a plain model of its own library: no hooks, wrappers, projectors or teacher."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from limbeck.core.errors import BadInput, MissingExtra, nearest
from limbeck.core.nets import outputs
from limbeck.recipe import Net, load
from limbeck.shape.quant.fake_quant import plain
from limbeck.verbs import build
from limbeck.verbs.setting import load_weights, one
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


def export(run: Path, to: str, out: Path) -> Path:
    """Write the student of a run folder to `out` as torch (a state dict), safetensors, hf or onnx.

    Raises BadInput when the run holds no student or cannot be written in that format.
    """
    if to not in FORMATS:
        raise BadInput(f"no export format {to!r}{nearest(to, FORMATS)}")
    places = (run / "seed-0", run, *sorted(run.glob("seed-*")))
    place = next((p for p in places if (p / "weights.safetensors").exists()), None)
    if place is None:
        condensed = list(run.glob("seed-*/set.safetensors"))
        what = f"it condensed a set: {condensed[0]}" if condensed else "is it a run folder?"
        raise BadInput(f"{run} holds no trained network; {what}")
    out.mkdir(parents=True, exist_ok=True)
    return FORMATS[to](run, place, out)


def _network(run: Path, place: Path) -> tuple[nn.Module, Tensor]:
    """The student with its weights, and one example input."""
    recipe = load(run / "recipe.yaml")
    if recipe.do == "shape" and recipe.teacher is not None:
        setting = build.setting(recipe, run, None, False)
        made = shaped(setting)
        load_weights(made, str(place / "weights.safetensors"), ())
        return plain(made).eval(), one(setting.splits.test)["inputs"]
    if not (place / "net.json").exists():
        raise BadInput(f"{place} has no net.json: the network was given as an object; export safetensors instead")
    body = json.loads((place / "net.json").read_text())
    if recipe.data is None:
        raise BadInput(
            f"{run / 'recipe.yaml'} names no data, so the input's shape is unknown; export safetensors instead"
        )
    splits = build.load_splits(recipe.data.name, recipe.data.options)
    module = build.network(Net.model_validate(body), splits.train, run)
    load_weights(module, str(place / "weights.safetensors"), ())
    return module.eval(), one(splits.test)["inputs"]


def _safetensors(run: Path, place: Path, out: Path) -> Path:
    target = out / "model.safetensors"
    shutil.copyfile(place / "weights.safetensors", target)
    if (place / "net.json").exists():
        shutil.copyfile(place / "net.json", out / "net.json")
    return target


def _torch(run: Path, place: Path, out: Path) -> Path:
    from safetensors.torch import load_file

    target = out / "model.pt"
    torch.save(load_file(place / "weights.safetensors"), target)  # torch.load(..., weights_only=True) reads it
    return target


def _onnx(run: Path, place: Path, out: Path) -> Path:
    try:
        import onnx  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise MissingExtra(error.name or "onnx", "export") from error
    module, example = _network(run, place)
    target = out / "model.onnx"
    batch = torch.export.Dim("batch")
    torch.onnx.export(
        Logits(module),
        (example.repeat(2, *[1] * (example.ndim - 1)),),
        str(target),
        input_names=["inputs"],
        output_names=["logits"],
        dynamic_shapes={"inputs": {0: batch}},
        dynamo=True,
        verbose=False,
    )
    return target


def _hf(run: Path, place: Path, out: Path) -> Path:
    module, _ = _network(run, place)
    inner: Any = module if hasattr(module, "save_pretrained") else getattr(module, "model", module)
    if not hasattr(inner, "save_pretrained"):
        kind = type(inner).__name__
        raise BadInput(f"{kind} is no transformers model, so it has no `hf` form; use safetensors, torch or onnx")
    inner.save_pretrained(out)
    return out


FORMATS: dict[str, Callable[[Path, Path, Path], Path]] = {
    "safetensors": _safetensors,
    "torch": _torch,
    "onnx": _onnx,
    "hf": _hf,
}
