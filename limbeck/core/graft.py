"""A network whose last feature goes on through a neck to a head: what is put into a student, and may stay there.

A neck is a module that takes maps [B, C, H, W] and gives two: what is matched, and what the head reads the mean of.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn

from limbeck.core.errors import BadInput
from limbeck.core.features import Shape, picture, pooled, shrunk
from limbeck.core.nets import Batch, Nets, evaluating, outputs
from limbeck.core.prototypes import Guide
from limbeck.core.taps import Taps, find_layer, unwrap


class Grafted(nn.Module):
    """What `body` returns, but with the logits of another head, and `grafted`, which is to be matched.

    body: a network; its own head, at the path `cut`, is taken out of it ('' leaves it there, unused). neck: see above.
    head: linear, after the neck. reads: the layer whose output the neck gets, or "LAYER:in" for its input; '' for the
    last of the feats that the body returns. size: a feature with a larger picture is averaged down to this one.
    """

    def __init__(
        self,
        body: nn.Module,
        neck: nn.Module,
        head: nn.Linear,
        *,
        cut: str = "",
        reads: str = "",
        size: Shape | None = None,
    ) -> None:
        super().__init__()
        self.body, self.neck, self.head = body, neck, head
        self.cut, self.source, self.size = cut, reads, size
        if cut:
            put(body, cut, Cut())

    def forward(self, inputs: Tensor) -> dict[str, Any]:
        """Named tensors, those of the body among them."""
        if self.source:
            with Taps(self.body, {"feature": self.source}) as taps:
                out = outputs(self.body, {"inputs": inputs})
                feature = taps.read()["feature"]
        else:
            out = outputs(self.body, {"inputs": inputs})
            feature = out["feats"][-1]
        matched, onward = self.neck(shrunk(picture(feature), self.size))
        emb = pooled(onward)
        head = {"head": self.head.weight, "head_bias": self.head.bias}
        return {**out, **head, "logits": self.head(emb), "emb": emb, "grafted": matched}

    def spec(self) -> dict[str, Any]:
        """How to build this around a body again, in numbers and words; see `from_spec`."""
        if not isinstance(self.neck, (Bottleneck, Guide)):
            raise BadInput(
                f"a network with a {type(self.neck).__name__} cannot be described, so it cannot be built again"
            )
        neck = self.neck.spec()
        head = {"classes": self.head.out_features, "bias": self.head.bias is not None}
        return {**neck, **head, "cut": self.cut, "reads": self.source, "size": list(self.size) if self.size else None}

    @staticmethod
    def from_spec(body: nn.Module, spec: Mapping[str, Any]) -> Grafted:
        """What `spec` describes, around a freshly built body, with weights still to be loaded."""
        size = (spec["size"][0], spec["size"][1]) if spec["size"] else None
        kind = Guide if "temperature" in spec else Bottleneck
        neck = kind(**{key: spec[key] for key in signature(kind).parameters})
        head = nn.Linear(neck.out, spec["classes"], bias=spec["bias"])
        return Grafted(body, neck, head, cut=spec["cut"], reads=spec["reads"], size=size)


class Bottleneck(nn.Module):
    """A neck of 1x1, 3x3 and 1x1 convolutions, each with batch norm and ReLU; the inner two are out // factor wide."""

    def __init__(self, width: int, out: int, factor: int) -> None:
        super().__init__()
        self.width, self.out, self.factor = width, out, factor
        inner = max(1, out // factor)
        layers: list[nn.Module] = []
        for channels, wide, kernel in ((width, inner, 1), (inner, inner, 3), (inner, out, 1)):
            convolution = nn.Conv2d(channels, wide, kernel, padding=kernel // 2, bias=False)
            layers += [convolution, nn.BatchNorm2d(wide), nn.ReLU()]
        self.layers = nn.Sequential(*layers)

    def forward(self, maps: Tensor) -> tuple[Tensor, Tensor]:
        """[B, width, H, W] -> [B, out, H, W], twice"""
        out: Tensor = self.layers(maps)
        return out, out

    def spec(self) -> dict[str, Any]:
        """The arguments that build this again."""
        return {"width": self.width, "out": self.out, "factor": self.factor}


class Cut(nn.Module):
    """Stands where a head was."""

    weight = bias = None

    def forward(self, emb: Tensor) -> Tensor:
        """[..., D] -> [..., 0]"""
        return emb[..., :0]


@dataclass(frozen=True)
class Anatomy:
    """Where a network is cut.

    head: the linear layer that gives its logits. path: of that. reads: where the feature lies whose mean over the
    places the head reads, as `Grafted` takes it. feature: its value on the probe.
    """

    head: nn.Linear
    path: str
    reads: str
    feature: Tensor


def anatomy(nets: Nets, player: str, batch: Batch) -> Anatomy:
    """Find a network's head and last feature on one batch: a map or tokens when the head reads their mean, else what it
    reads. Raises BadInput when no linear layer gives the logits.
    """
    module, seen = unwrap(nets.find(player)), {}

    def keep(path: str) -> Any:
        def hook(_layer: nn.Module, inputs: Any, output: Tensor) -> None:
            seen[path] = inputs[0].detach(), output.detach()

        return hook

    layers = {path: layer for path, layer in module.named_modules() if isinstance(layer, nn.Linear)}
    handles = [layer.register_forward_hook(keep(path)) for path, layer in layers.items()]
    try:
        with torch.no_grad(), evaluating(module):
            out = nets.run(player, batch)
    finally:
        for handle in handles:
            handle.remove()
    heads = [p for p, (_, y) in seen.items() if y.shape == out["logits"].shape and torch.equal(y, out["logits"])]
    if not heads:
        raise BadInput(f"no linear layer of the {player} ({type(module).__name__}) gives its logits")
    path = heads[-1]
    emb, feats = seen[path][0], out.get("feats")
    if feats and pooled(feats[-1]).shape == emb.shape and torch.allclose(pooled(feats[-1]), emb, rtol=1e-4, atol=1e-5):
        paths = nets.taps[player].paths.get("feats", [""]) if player in nets.taps else [""]
        return Anatomy(layers[path], path, paths[-1], feats[-1])
    return Anatomy(layers[path], path, f"{path}:in", emb)


def watched(nets: Nets, player: str, batch: Batch) -> Anatomy:
    """`anatomy` of a network that is to be matched: from now on `nets.run` returns what `last_maps` reads."""
    found = anatomy(nets, player, batch)
    if found.reads.endswith(":in"):
        tap(nets, player, "last", found.reads)
    return found


def last_maps(told: Mapping[str, Any]) -> Tensor:
    """The last feature of a `watched` network, before or after the mean over its places, as maps [B, C, H, W]."""
    return picture(told["last"] if "last" in told else told["feats"][-1])


def tap(nets: Nets, player: str, name: str, path: str) -> None:
    """Let `nets.run` return what is at a path, too, under a name."""
    paths: dict[str, Any] = {}
    if player in nets.taps:
        old = nets.taps[player]
        old.remove()
        paths = {n: group[0] if n in old.single else group for n, group in old.paths.items()}
    nets.taps[player] = Taps(nets.find(player), {**paths, name: path})


def put(module: nn.Module, path: str, layer: nn.Module) -> None:
    """Put a layer in the place of the one at `path`."""
    parent, _, name = path.rpartition(".")
    setattr(find_layer(module, parent) if parent else unwrap(module), name, layer)
