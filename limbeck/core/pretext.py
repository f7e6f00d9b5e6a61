"""Learning without labels before a task: two pools and two stages, hidden patches, views and averages."""

import math
from collections.abc import Iterator, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from limbeck.core.augment import ResizedCrop
from limbeck.core.card import require
from limbeck.core.errors import BadInput
from limbeck.core.loop import Stage
from limbeck.core.masked import Decoder, draw, only, patchify, sides, unseen
from limbeck.core.maths import upcast
from limbeck.core.nets import Batch, Nets, evaluating
from limbeck.core.views import another

SEEN, TASK = "seen", "task"
STRETCH = 4 / 3  # largest ratio of the sides of a view


def pools(labels: Tensor) -> dict[str, Tensor]:
    """The rows of both stages: all of them, and those with a label."""
    return {TASK: (labels >= 0).nonzero()[:, 0], SEEN: torch.arange(len(labels))}


def check_share(share: float) -> None:
    """Raise ValueError for a share that leaves the task no steps."""
    require(0 <= share < 1, "share", share, "in [0, 1)")


def before_task(
    nets: Nets, helpers: Mapping[str, str], share: float, steps: int, averages: Mapping[str, str] | None = None
) -> Iterator[Stage]:
    """A share of the steps without labels, in which each player's helper trains along, then the task on those with one.

    A share of 0 leaves out the first. In a run of one step it is empty, so that the task is still the second. averages:
    player -> of which network it takes the weights over for the task.
    """
    before = min(steps - 1, max(1, round(share * steps))) if share else 0
    if share:
        nets.companions |= {player: [helper] for player, helper in helpers.items()}
        yield Stage(before, "unlabelled", SEEN, until=share, validated=False)
        for player in helpers:
            del nets.companions[player]
        for player, average in (averages or {}).items():
            nets.find(player).load_state_dict(nets.find(average).state_dict())
    yield Stage(steps - before, "task", TASK)


def answer(nets: Nets, player: str, batch: Batch, *, probe: bool = False) -> Tensor:
    """Logits of a player; probe: of its head alone, on what the rest says in eval mode and without gradient."""
    if not probe:
        logits: Tensor = nets.run(player, batch)["logits"]
        return logits
    with torch.no_grad(), evaluating(nets.find(player)):
        told = nets.run(player, batch)
    if "head" not in told or "emb" not in told:
        raise BadInput(f"`probe` needs a network that also returns `emb` and `head`, and the {player} does not")
    return F.linear(upcast(told["emb"]), told["head"], told.get("head_bias"))


def rising(decay: float, progress: float) -> float:
    """From `decay` at the start to 1 at the end, by a half cosine: how slowly an average comes to follow."""
    return 1 - (1 - decay) * (1 + math.cos(math.pi * progress)) / 2


# ---------------------------------------------------------------- hidden patches


def teller(nets: Nets, entry: str, probe: Batch, *, inner: int, depth: int, heads: int) -> Decoder:
    """A decoder that tells the pixels of patches from the student's last feature."""
    side = sides(nets, "student", entry, probe)
    with torch.no_grad(), evaluating(nets.student):
        width = nets.run("student", probe)["feats"][-1].shape[2]
    out = patchify(probe["inputs"], side).shape[2]
    return Decoder(width, side**2, out, inner=inner, depth=depth, heads=heads)


def told_wrong(nets: Nets, decoder: Decoder, entry: str, batch: Batch, hidden: float) -> Tensor:
    """Mean squared error of standardised pixels where a share of patches is hidden from the student, drawn now: [B]."""
    pictures, count = batch["inputs"], len(decoder.places)
    kept = min(count - 1, max(1, int(count * (1 - hidden))))
    shown = draw(len(pictures), count, kept, pictures.device)
    with only(nets.student, entry, shown, count):
        told = nets.run("student", batch)["feats"][-1]
    return unseen(decoder(told, shown), standardised(patchify(pictures, math.isqrt(count))), shown)


def standardised(patches: Tensor) -> Tensor:
    """Patches [..., D] of zero mean and unit variance, each."""
    spread, centre = torch.var_mean(patches, -1, keepdim=True)
    return (patches - centre) / (spread + 1e-6).sqrt()


# ---------------------------------------------------------------- views


def cut(pictures: Tensor, area: tuple[float, float], augment: Sequence[object]) -> Tensor:
    """A random box of each picture [B, C, H, W], scaled to full size, with further augmentations on top.

    area: least and largest part of the picture, in (0, 1]; the box's sides have a ratio of at most 4 : 3.
    """
    draws = torch.rand(len(pictures), 4)
    part = area[0] + (area[1] - area[0]) * draws[:, 0]
    ratio = torch.exp((2 * draws[:, 1] - 1) * math.log(STRETCH))
    height, width = (part / ratio).sqrt().clamp(max=1), (part * ratio).sqrt().clamp(max=1)
    box = torch.stack([draws[:, 2] * (1 - height), draws[:, 3] * (1 - width), height, width], 1)
    return another(ResizedCrop().apply(pictures, box), augment)


def check_area(name: str, area: tuple[float, float]) -> None:
    """Raise ValueError for what are no least and largest part of a picture."""
    require(0 < area[0] <= area[1] <= 1, name, area, "two parts of a picture in (0, 1], the smaller first")


def normed(width: int, inner: int, out: int) -> nn.Sequential:
    """BYOL's projector and predictor: two linear maps with batch norm and a ReLU between."""
    return nn.Sequential(nn.Linear(width, inner), nn.BatchNorm1d(inner), nn.ReLU(), nn.Linear(inner, out))
