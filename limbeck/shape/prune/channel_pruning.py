"""Takes the weakest channels out of the convolutions inside a network, for good: smaller tensors, no masks."""

import inspect
from collections.abc import Iterator
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from limbeck.core.card import method, require
from limbeck.core.errors import BadInput
from limbeck.core.surgery import copied, depthwise, keep_inputs, keep_outputs, share

Norm = nn.BatchNorm2d
Chain = tuple[nn.Conv2d, list[nn.Module], list[nn.Module]]
# What acts on every channel by itself and has no size of its own.
PASSES = (
    *(nn.Identity, nn.Dropout, nn.Dropout2d, nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.Upsample),
    *(nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.GELU, nn.SiLU, nn.Hardswish, nn.Tanh, nn.Sigmoid),
)
FUNCTIONS = {
    torch.relu,
    F.relu,
    F.relu6,
    F.leaky_relu,
    F.elu,
    F.gelu,
    F.silu,
    F.hardswish,
    F.dropout,
    F.max_pool2d,
    F.avg_pool2d,
}


@method(
    paper="Li et al. 2016, section 3.1; with score='batch_norm' Liu et al. 2017, section 3",
    year=2016,
    arxiv="1608.08710",
    code="Eric-mingjie/rethinking-network-pruning@2ac473d:cifar/l1-norm-pruning/res56prune.py",
    differs="the same share is taken from every layer; the papers leave out layers found sensitive (Li) or set one "
    "threshold for all (Liu)",
)
def channel_pruning(teacher: nn.Module, *, ratio: float = 0.5, score: Literal["l1", "batch_norm"] = "l1") -> nn.Module:
    """A copy of the teacher whose inner convolutions have only (1 - ratio) of their channels, the strongest.

    A channel can go when all that reads it is another convolution, through batch norm, activation or a depthwise
    convolution. So the insides of residual blocks shrink, and what blocks add up keeps its width.

    ratio: share of the channels that go from each, in (0, 1); at least one stays.
    score: of a channel. "l1" is the sum of the absolute weights of its filter, "batch_norm" the absolute scale of the
        batch norm after it (best after training with an L1 penalty on the scales).

    *Needs*: a network that torch.fx can follow, as a whole or block by block. Train it afterwards.
    *Relates to*: use `layer_choice` for depth; `weight_inheritance` also makes narrower what blocks add up.
    *Differs*: see the card.
    """
    require(0 < ratio < 1, "ratio", ratio, "in (0, 1)")
    require(score in ("l1", "batch_norm"), "score", score, "'l1' or 'batch_norm'")
    student = copied(teacher)
    chains = list({id(chain[0]): chain for chain in _chains(student)}.values())
    if score == "batch_norm":
        chains = [c for c in chains if any(isinstance(layer, Norm) for layer in c[1])]
    if not chains:
        raise BadInput(f"{type(teacher).__name__} has no convolution whose channels only another convolution reads")
    kept = [share(_score(conv, between, score), ratio) for conv, between, _ in chains]
    for (conv, between, readers), index in zip(chains, kept, strict=True):
        for layer in (conv, *between):
            keep_outputs(layer, index)
        for reader in readers:
            keep_inputs(reader, index)
    return student


def _score(conv: nn.Conv2d, between: list[nn.Module], score: str) -> Tensor:
    if score == "l1":
        return conv.weight.detach().abs().sum((1, 2, 3))
    norm = next(layer for layer in between if isinstance(layer, Norm))
    return norm.weight.detach().abs()


def _chains(module: nn.Module) -> Iterator[Chain]:
    """Every inner convolution, the layers with a size that its channels pass, and the convolutions that read them."""
    parameters = inspect.signature(module.forward).parameters.values()
    given = {p.name: p.default for p in parameters if p.default is not p.empty}
    try:
        graph = fx.Tracer().trace(module, given)
    except Exception:  # whatever a forward does that cannot be traced: look into its parts
        for child in module.children():
            yield from _chains(child)
        return
    layers = dict(module.named_modules())
    calls = [str(node.target) for node in graph.nodes if node.op == "call_module"]
    once = {name: layer for name, layer in layers.items() if calls.count(name) == 1 or not list(layer.parameters())}
    for node in graph.nodes:
        conv = once.get(str(node.target)) if node.op == "call_module" else None
        if isinstance(conv, nn.Conv2d) and conv.groups == 1:
            found = _follow(node, once)
            if found is not None:
                yield conv, *found


def _follow(node: fx.Node, layers: dict[str, nn.Module]) -> tuple[list[nn.Module], list[nn.Module]] | None:
    """Sized layers between, and the convolutions that end all paths from `node`; None when anything else reads it."""
    between: list[nn.Module] = []
    readers: list[nn.Module] = []
    for user in node.users:
        layer = layers.get(str(user.target)) if user.op == "call_module" else None
        if isinstance(layer, nn.Conv2d) and layer.groups == 1:
            readers.append(layer)
            continue
        sized = layer is not None and (isinstance(layer, Norm) or depthwise(layer))
        calls = user.op == "call_function" and user.target in FUNCTIONS
        if not (sized or calls or isinstance(layer, PASSES) or (user.op == "call_method" and user.target == "relu")):
            return None
        further = _follow(user, layers)
        if further is None:
            return None
        between += [*([layer] if sized and layer is not None else []), *further[0]]
        readers += further[1]
    return (between, readers) if readers else None
