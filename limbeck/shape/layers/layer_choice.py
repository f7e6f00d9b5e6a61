"""The student starts as the teacher with some of its blocks left out."""

from collections.abc import Iterable, Sequence
from typing import Any

from torch import nn

from limbeck.core.card import method, require
from limbeck.core.errors import BadInput
from limbeck.core.surgery import copied, strided, widths
from limbeck.core.taps import find_layer


@method(
    paper="Sanh et al. 2019 (DistilBERT), section 3",
    year=2019,
    arxiv="1910.01108",
    code="huggingface/transformers-research-projects@fccd0cd:distillation/scripts/extract_distilbert.py",
    differs="the student's start only. `keep_every` is the paper's 'one layer out of two' (0, 2, 4, ...); the released "
    "12-layer choice is keep=[0, 2, 4, 7, 9, 11]. Works on any network of blocks, not only BERT",
)
def layer_choice(teacher: nn.Module, *, blocks: str = "", keep: Sequence[int] = (), keep_every: int = 2) -> nn.Module:
    """A copy of the teacher that holds only the chosen blocks, with their weights.

    Only blocks whose output has the shape of their input can go: those that change width or resolution always stay.

    blocks: path of the nn.ModuleList or nn.Sequential that holds them; '' takes every list of like blocks in the
        network, such as the stages of a residual network.
    keep: indices of the blocks to keep, counted through all lists in order; () keeps by `keep_every`.
    keep_every: k >= 2: keep blocks 0, k, 2k, ... of each list.

    *Needs*: residual blocks: what a plain stack computes does not survive a missing layer. Train it afterwards.
    *Relates to*: use `channel_pruning` to make every block thinner instead, `weight_inheritance` to make the whole
        network narrower. Depth buys latency, width buys size.
    *Differs*: see the card.
    """
    require(keep_every >= 2, "keep_every", keep_every, ">= 2")
    student = copied(teacher)
    lists = [_listed(student, blocks)] if blocks else list(_lists(student))
    if not lists:
        raise BadInput(f"{type(teacher).__name__} has no list of like blocks; name one with `blocks`")
    every = [(holder, i) for holder in lists for i in range(len(holder))]
    beyond = [i for i in keep if not 0 <= i < len(every)]
    require(not beyond, "keep", list(keep), f"indices in 0..{len(every) - 1}")
    chosen = set(keep) or {k for k, (_, i) in enumerate(every) if i % keep_every == 0}
    firm = {k for k, (holder, i) in enumerate(every) if not _keeps_shape(holder, i)}
    if keep and firm - chosen:
        raise BadInput(f"`keep` leaves out blocks {sorted(firm - chosen)}, which change the shape of what they pass on")
    gone = [place for k, place in enumerate(every) if k not in chosen | firm]
    if not gone:
        raise BadInput(
            f"nothing to leave out: {len(firm)} of {len(every)} blocks change the shape of what they pass on"
        )
    before = {len(holder) for holder in lists}
    for holder, i in reversed(gone):
        del holder[i]
    _renumber(student, lists, before)
    return student


def _listed(student: nn.Module, path: str) -> Any:
    holder = find_layer(student, path)
    if not isinstance(holder, (nn.ModuleList, nn.Sequential)):
        raise BadInput(
            f"`blocks` must be the path of an nn.ModuleList or nn.Sequential; {path} is {type(holder).__name__}"
        )
    return holder


def _lists(module: nn.Module) -> Iterable[Any]:
    """Outermost lists of two or more children of one class that are built of other layers."""
    for child in module.children():
        inner = list(child.children())
        alike = isinstance(child, (nn.ModuleList, nn.Sequential)) and len({type(block) for block in inner}) == 1
        if (
            alike
            and len(inner) >= 2
            and not isinstance(inner[0], (nn.ModuleList, nn.Sequential))
            and any(inner[0].children())
        ):
            yield child
        else:
            yield from _lists(child)


def _keeps_shape(holder: Any, i: int) -> bool:
    """Whether block i gives what it takes: by its first and last layer, else by being built like its neighbour."""
    layers = list(holder[i].modules())
    if strided(layers):
        return False
    mixing = [w for w in map(widths, layers) if w != (0, 0)]
    if mixing:
        return mixing[0][0] == mixing[-1][1]
    return any(_build(holder[i]) == _build(other) for j, other in enumerate(holder) if j != i)


def _build(block: nn.Module) -> list[tuple[str, tuple[int, ...]]]:
    return [(name, tuple(p.shape)) for name, p in block.named_parameters()]


def _renumber(student: nn.Module, lists: list[Any], before: set[int]) -> None:
    """Tell a transformers model its new depth, and its layers their new places in the cache."""
    config = getattr(student, "config", None)
    for name in ("num_hidden_layers", "n_layer", "n_layers", "num_layers"):
        if len(lists) == 1 and getattr(config, name, None) in before:
            setattr(config, name, len(lists[0]))
    for holder in lists:
        for i, block in enumerate(holder):
            for layer in block.modules():
                if hasattr(layer, "layer_idx"):
                    layer.layer_idx = i
