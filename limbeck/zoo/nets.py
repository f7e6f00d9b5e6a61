"""Networks by name: those of the zoo, `timm:NAME`, `hf:NAME_OR_PATH`, and a class in the user's own `file.py:Class`.

A network returns a dict of named tensors (logits, feats from shallow to deep, emb ...); those of other libraries return
their own outputs, which `core/nets.outputs` names.
"""

import importlib.util
import inspect
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from limbeck.core import knobs
from limbeck.core.errors import BadInput, MissingExtra, nearest
from limbeck.core.graft import Grafted
from limbeck.core.sampler import Denoiser
from limbeck.shape.layers.layer_choice import layer_choice
from limbeck.zoo.convnet import convnet, mlp
from limbeck.zoo.darts import darts
from limbeck.zoo.denoise import denoiser_mlp, generator, unet
from limbeck.zoo.experts import tiny_moe_lm
from limbeck.zoo.films import conv_lstm, frames
from limbeck.zoo.lora import adapted
from limbeck.zoo.pairs import pair_encoder
from limbeck.zoo.pictures import painter, patch_judge
from limbeck.zoo.prompts import prompted_encoder
from limbeck.zoo.quantized import quantized
from limbeck.zoo.resnet import resnet, wrn
from limbeck.zoo.routed import routed_encoder
from limbeck.zoo.text import bag, text_cnn
from limbeck.zoo.transformer import text_encoder, tiny_lm, vit_tiny

__all__ = ["DENOISERS", "NETS", "build"]

NETS: dict[str, Callable[..., nn.Module]] = {
    **{f"resnet{depth}": partial(resnet, depth=depth) for depth in (8, 14, 20, 26, 32, 44, 56, 110)},
    **{
        f"wrn{d}x{w}": partial(wrn, depth=d, widen=w) for d, w in ((16, 1), (16, 2), (16, 4), (28, 2), (40, 1), (40, 2))
    },
    "convnet": convnet,
    "mlp": mlp,
    "vit_tiny": vit_tiny,
    "darts": darts,
    "bag": bag,
    "text_cnn": text_cnn,
    "text_encoder": text_encoder,
    "routed_encoder": routed_encoder,
    "prompted_encoder": prompted_encoder,
    "pair_encoder": pair_encoder,
    "tiny_lm": tiny_lm,
    "tiny_moe_lm": tiny_moe_lm,
    "unet": unet,
    "denoiser_mlp": denoiser_mlp,
    "generator": generator,
    "painter": painter,
    "patch_judge": patch_judge,
    "frames": frames,
    "conv_lstm": conv_lstm,
}
DENOISERS = ("unet", "denoiser_mlp")
FACTS = {
    "classes": "class labels",
    "channels": "pictures",
    "size": "pictures or vectors",
    "vocab": "token ids",
}


def build(
    spec: str | Mapping[str, Any],
    *,
    classes: int | None = None,
    channels: int | None = None,
    size: int | None = None,
    vocab: int | None = None,
    masked: bool = False,
) -> nn.Module:
    """A network with fresh random weights, except that `hf:` brings its own.

    spec: a name, or {"net": name, knob: value}. Knobs go to the network's builder, where they may also overrule the
    facts about the data: classes, channels and size (side of pictures, or length of vectors), vocab. masked: the tokens
    to be told are hidden in the text, not the next ones, for which `hf:` loads another head.

    `unet` and `denoiser_mlp` come wrapped as a Denoiser; their knob `denoiser` says how, as Denoiser.from_spec reads
    it, such as {"schedule": "flow", "kind": "flow"}. Left out, it is the preconditioning of Karras et al. for data of
    unit deviation. `graft` is what a method such as `simkd` has put into a network for good, as Grafted.spec says.
    `file.py:Class` may ask for any of the facts by name.
    """
    body = {"net": spec} if isinstance(spec, str) else dict(spec)
    if "net" not in body:
        raise BadInput("a network needs a `net`: a name of the zoo, timm:NAME, hf:NAME_OR_PATH or file.py:Class")
    if "graft" in body:
        graft: Any = body.pop("graft")
        plain = build(body, classes=classes, channels=channels, size=size, vocab=vocab, masked=masked)
        return Grafted.from_spec(plain, graft)
    name = str(body.pop("net"))
    facts = {"classes": classes, "channels": channels, "size": size, "vocab": vocab}
    known = {key: value for key, value in facts.items() if value is not None}
    if name.startswith("timm:"):
        return _timm(name.removeprefix("timm:"), body, known)
    if is_transformers(name):
        return _transformers(name.removeprefix("hf:"), body, known, masked)
    if ":" in name and name.partition(":")[0].endswith(".py"):
        return _own(name, body, known)
    if name not in NETS:
        other = re.fullmatch(r"(?:resnet|wrn)\D*\d+.*", name) and f"; depths of the zoo: {', '.join(NETS)}"
        raise BadInput(f"no network {name!r}{nearest(name, NETS) or other or ''}")
    wrapped = body.pop("denoiser", {"schedule": {"edm": {"sigma_data": 1.0}}}) if name in DENOISERS else None
    module = _called(name, NETS[name], body, known)
    if wrapped is None:
        return module
    return Denoiser.from_spec(module, {"schedule": wrapped} if isinstance(wrapped, str) else dict(wrapped))


def is_transformers(name: str) -> bool:
    """Whether a name is that of a transformers model: hf:NAME_OR_PATH, owner/name, or a saved model's folder."""
    own = ":" in name and name.partition(":")[0].endswith(".py")
    saved = "/" in name and (Path(name).expanduser() / "config.json").exists()
    return name.startswith("hf:") or saved or bool(not own and re.fullmatch(r"[\w.-]+/[\w.-]+", name))


def _called(
    name: str, builder: Callable[..., nn.Module], given: Mapping[str, Any], known: Mapping[str, int]
) -> nn.Module:
    """Call a builder with its knobs and with those facts about the data that it asks for."""
    function = builder.func if isinstance(builder, partial) else builder
    fixed = builder.keywords if isinstance(builder, partial) else {}
    for key in given:
        if key in fixed:
            raise BadInput(f"{name!r} says its own `{key}`, {fixed[key]}; choose another name for another `{key}`")
    checked = knobs.check(name, function, given)
    for key, parameter in inspect.signature(function).parameters.items():
        if key in FACTS and key not in checked and key in known:
            checked[key] = known[key]
        elif key not in checked and key not in fixed and parameter.default is inspect.Parameter.empty:
            raise BadInput(f"{name!r} needs data with {FACTS.get(key, key)}, or `{key}` told; the data here has none")
    try:
        return builder(**checked)
    except ValueError as error:
        raise BadInput(f"{name!r}: {error}") from None


def _timm(name: str, given: dict[str, Any], known: Mapping[str, int]) -> nn.Module:
    try:
        import timm
    except ImportError:
        raise MissingExtra("timm", "vision") from None
    except (RuntimeError, OSError) as error:  # a torchvision whose compiled part was built for another torch
        raise BadInput(f"timm is installed but cannot be imported: {error}; torchvision must fit torch") from None
    if name not in timm.list_models(name) and name.split(".")[0] not in timm.list_models(name.split(".")[0]):
        raise BadInput(f"timm has no model {name!r}{nearest(name, timm.list_models())}")
    facts = {"num_classes": known.get("classes"), "in_chans": known.get("channels")}
    try:
        module: nn.Module = timm.create_model(name, **{k: v for k, v in facts.items() if v is not None} | given)
    except (TypeError, RuntimeError) as error:
        raise BadInput(f"timm:{name} cannot be built with {given}: {error}") from None
    return module


def _transformers(name: str, given: dict[str, Any], known: Mapping[str, int], masked: bool) -> nn.Module:
    """A model of the transformers library with its weights: of causal or masked language, text or picture classes.

    keep: only that many of its layers, spread evenly from the first to the last, or those of the indices given. lora:
    train low-rank adapters alone; options as `zoo.lora.adapted` has them. quantize: keep the weights of the linear
    layers frozen in "int8" or "nf4" (see `zoo.quantized`). Others go to `from_pretrained`.
    """
    options = dict(given)
    keep, lora, quantize = (options.pop(key, None) for key in ("keep", "lora", "quantize"))
    try:
        import transformers
    except ImportError:
        raise MissingExtra("transformers", "text") from None
    if "vocab" in known and "classes" not in known:
        kind, facts = transformers.AutoModelForMaskedLM if masked else transformers.AutoModelForCausalLM, {}
    else:
        text = "vocab" in known
        kind = transformers.AutoModelForSequenceClassification if text else transformers.AutoModelForImageClassification
        facts = {"num_labels": known["classes"]} if "classes" in known else {}
    bars = transformers.utils.logging.is_progress_bar_enabled()
    transformers.utils.logging.disable_progress_bar()
    try:
        module: nn.Module = kind.from_pretrained(name, **facts | options)
    except (OSError, ValueError, TypeError) as error:
        raise BadInput(f"hf:{name} cannot be loaded: {(str(error).splitlines() or ['?'])[0]}") from None
    finally:
        if bars:
            transformers.utils.logging.enable_progress_bar()
    module = module if keep is None else layer_choice(module, keep=_spread(keep, module))
    module = module if quantize is None else quantized(module, quantize)
    return module if lora is None else adapted(module, lora)


def _spread(keep: int | Sequence[int], module: Any) -> list[int]:
    """Indices of so many layers, from the first to the last."""
    layers = int(module.config.num_hidden_layers)
    if not isinstance(keep, int):
        return list(keep)
    if not 1 < keep < layers:
        raise BadInput(f"`keep` must be in [2, {layers - 1}] of {layers} layers, got {keep}")
    return [round(i * (layers - 1) / (keep - 1)) for i in range(keep)]


def _own(name: str, given: dict[str, Any], known: Mapping[str, int]) -> nn.Module:
    """A class or function of a local file that the user names; this runs the file."""
    place, _, attribute = name.rpartition(":")
    path = Path(place).expanduser()
    if not path.is_file():
        raise BadInput(f"there is no file {place!r} to take the network {attribute!r} from")
    plan = importlib.util.spec_from_file_location(f"limbeck_own_{path.stem}", path.resolve())
    assert plan is not None and plan.loader is not None
    module = importlib.util.module_from_spec(plan)
    sys.modules[plan.name] = module  # dataclasses and pickling of the user's classes look it up
    plan.loader.exec_module(module)
    if not hasattr(module, attribute):
        names = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        raise BadInput(f"{place} has no {attribute!r}{nearest(attribute, names)}")
    maker = getattr(module, attribute)
    parameters = inspect.signature(maker).parameters
    for key in given:
        if key not in parameters:
            raise BadInput(f"{name} takes no {key!r}{nearest(key, parameters)}")
    asked = {key: value for key, value in known.items() if key in parameters} | given
    lacking = [k for k, p in parameters.items() if p.default is p.empty and k not in asked and p.kind in (1, 3)]
    if lacking:
        raise BadInput(f"{name} needs {lacking[0]!r}, which the data does not tell; give it beside `net`")
    made = maker(**asked)
    if not isinstance(made, nn.Module):
        raise BadInput(f"{name} makes a {type(made).__name__}, not an nn.Module")
    return made
