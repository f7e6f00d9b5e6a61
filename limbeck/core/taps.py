"""Reads inner activations and weights by their paths, through forward hooks; the model itself is not changed."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from limbeck.core.errors import BadInput, nearest


def unwrap(module: nn.Module) -> nn.Module:
    """The user's module inside DistributedDataParallel, DataParallel and torch.compile wrappers."""
    while True:
        inner: nn.Module | None = getattr(module, "_orig_mod", None)
        if inner is None and isinstance(module, (nn.parallel.DistributedDataParallel, nn.DataParallel)):
            wrapped: nn.Module = module.module
            inner = wrapped
        if not isinstance(inner, nn.Module):
            return module
        module = inner


def find_layer(module: nn.Module, path: str) -> nn.Module:
    """The submodule at a dotted path. Raises BadInput naming the nearest paths, or the model's layers."""
    layers: dict[str, nn.Module] = dict(unwrap(module).named_modules())
    if path and path in layers:
        return layers[path]
    paths = [p for p in layers if p]
    hint = nearest(path, paths)
    if not hint:
        top = [p for p in paths if p.count(".") == 0 or (p.count(".") == 1 and p.rsplit(".", 1)[1].isdigit())]
        hint = "; it has: " + ", ".join(top[:40])
    raise BadInput(f"{type(unwrap(module)).__name__} has no layer {path!r}{hint}")


def untap(module: nn.Module) -> None:
    """Take off what taps have put on a copied module: a tap reports on the module that it was put on, not on copies."""
    for layer in module.modules():
        for hooks in (layer._forward_hooks, layer._forward_pre_hooks):
            for key, hook in list(hooks.items()):
                if getattr(hook, "__module__", "") == __name__:
                    del hooks[key]


def spread(student_depth: int, teacher_depth: int) -> list[tuple[int, int]]:
    """Pairs (student index, teacher index) of equal relative depth, last on last; the deeper one leaves some out."""
    pairs = min(student_depth, teacher_depth)
    return [((i + 1) * student_depth // pairs - 1, (i + 1) * teacher_depth // pairs - 1) for i in range(pairs)]


def find_parameter(module: nn.Module, path: str) -> nn.Parameter | None:
    """The parameter at a dotted path such as "head.weight", or None when there is none."""
    return dict(unwrap(module).named_parameters(remove_duplicate=False)).get(path)


class Taps:
    """Records what chosen layers return in the latest forward pass.

    paths: name -> one path (a tensor) or several (a list, shallow to deep), such as {"feats": ["layer1", "layer2"]}.
    "layer" is what the layer returns (the first element of a tuple), "layer:in" is its first input, which a ReLU gets
    before it cuts, and "layer.weight" is a parameter. Works on plain, DDP, FSDP2 and compiled modules, since the hooks
    sit on the inner layers; register before `torch.compile`.
    """

    def __init__(self, module: nn.Module, paths: Mapping[str, str | Sequence[str]]) -> None:
        self.paths = {name: [p] if isinstance(p, str) else list(p) for name, p in paths.items()}
        self.single = {name for name, p in paths.items() if isinstance(p, str)}
        self._seen: dict[str, Tensor] = {}
        self._weights: dict[str, nn.Parameter] = {}
        self._handles: list[RemovableHandle] = []
        for path in {p for group in self.paths.values() for p in group}:
            weight = find_parameter(module, path)
            if weight is not None:
                self._weights[path] = weight
            elif path.endswith(":in"):
                layer = find_layer(module, path.removesuffix(":in"))
                self._handles.append(layer.register_forward_pre_hook(self._before(path)))
            else:
                self._handles.append(find_layer(module, path).register_forward_hook(self._after(path)))

    def _before(self, path: str) -> Any:
        def keep(_module: nn.Module, inputs: Any) -> None:
            self._seen[path] = inputs[0].clone()  # what follows may work in place, as ReLU does

        return keep

    def _after(self, path: str) -> Any:
        def keep(_module: nn.Module, _inputs: Any, output: Any) -> None:
            self._seen[path] = output[0] if isinstance(output, (tuple, list)) else output

        return keep

    def read(self) -> dict[str, Any]:
        """What the latest forward pass showed, and forget it, so that no graph is kept alive."""
        seen = {**self._seen, **self._weights}
        missing = [p for group in self.paths.values() for p in group if p not in seen]
        if missing:
            raise BadInput(f"layer {missing[0]!r} was not reached in the forward pass, so it cannot be matched")
        out = {
            name: seen[group[0]] if name in self.single else [seen[p] for p in group]
            for name, group in self.paths.items()
        }
        self._seen.clear()
        return out

    def remove(self) -> None:
        """Take the hooks off again."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def __enter__(self) -> "Taps":
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()

    def __iter__(self) -> Iterator[str]:
        return iter(self.paths)
