"""Two networks that have layers in common: what belongs to the one is the other's own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from limbeck.core.branches import weighted
from limbeck.core.errors import BadInput, nearest
from limbeck.core.graft import put
from limbeck.core.nets import outputs
from limbeck.core.taps import unwrap


def common(one: nn.Module, other: nn.Module, below: Sequence[str] = ()) -> list[str]:
    """Paths of the layers that two networks could share: of one kind, with tensors of the same names and shapes.

    Parameters that a network holds itself, such as the places of a transformer, are found by their names. below: only
    layers at these paths or inside them; () for all.
    """
    mine, its = weighted(one), weighted(other)
    fit = [path for path, layer in mine.items() if path in its and _form(layer) == _form(its[path])]
    loose, theirs = _loose(one), _loose(other)
    fit += [name for name, tensor in loose.items() if name in theirs and tensor.shape == theirs[name].shape]
    for start in below:
        if not any(_inside(path, start) for path in fit):
            raise BadInput(
                f"{type(unwrap(one)).__name__} and {type(unwrap(other)).__name__} have no layer of one shape at "
                f"{start!r}{nearest(start, {*fit, *(p.split('.')[0] for p in fit)})}"
            )
    found = [path for path in fit if not below or any(_inside(path, start) for start in below)]
    if not found:
        raise BadInput(
            f"{type(unwrap(one)).__name__} and {type(unwrap(other)).__name__} have no layer of one path and shape in "
            "common; give both the same width"
        )
    return found


def _inside(path: str, start: str) -> bool:
    return path == start or path.startswith(f"{start}.")


def _loose(network: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters that lie in no layer."""
    return dict(unwrap(network).named_parameters(recurse=False))


def _form(layer: nn.Module) -> tuple[Any, ...]:
    own = [*layer.named_parameters(recurse=False), *layer.named_buffers(recurse=False)]
    return type(layer), [(name, tuple(tensor.shape)) for name, tensor in own]


class Around(nn.Module):
    """A network that shares the layers at `paths` with another; parameters and state of this module are the rest.

    So each tensor has one owner, who saves it and trains it. network: all of it, with the other's layers in place.
    """

    network: nn.Module

    def __init__(self, network: nn.Module, other: nn.Module, paths: Sequence[str]) -> None:
        super().__init__()
        theirs, loose = weighted(other), _loose(other)
        for path in paths:
            if path in loose:
                setattr(unwrap(network), path, loose[path])
            else:
                put(network, path, theirs[path])
        rest = [layer for path, layer in weighted(network).items() if path not in paths]
        alone = [layer for layer in rest if not any(True for _ in layer.children())]
        self.layers = nn.ModuleList(alone)
        held = {id(p) for p in (*self.layers.parameters(), *other.parameters())}
        self.loose = nn.ParameterList(p for p in network.parameters() if id(p) not in held)
        self.__dict__["network"] = network  # not as a child: its parameters would be this module's, the lent ones too

    def train(self, mode: bool = True) -> Around:
        """Of everything, the lent layers too."""
        super().train(mode)
        self.network.train(mode)
        return self

    def forward(self, inputs: Tensor) -> dict[str, Any]:
        """What the whole network returns."""
        return outputs(self.network, {"inputs": inputs})
