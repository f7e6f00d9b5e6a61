"""Two views of a picture hide nearly all of it between them, and every token, shown or not, tells its target."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from limbeck.core.card import method, require
from limbeck.core.errors import BadInput
from limbeck.core.features import per_example
from limbeck.core.loop import Clock, Stage, Turn
from limbeck.core.masked import Decoder, check_decoder, draw, masked_first, only, patchify, sides, unseen
from limbeck.core.maths import pair, upcast
from limbeck.core.nets import Batch, Nets, evaluating
from limbeck.core.pair import Pair, parse_all
from limbeck.core.reduce import Part, mean


@method(
    paper="Ma et al. 2023, disjoint masking and joint distillation",
    year=2023,
    arxiv="2301.00230",
    code="mx-mark/DMJD@881b21d:models_dmjd.py",
    differs="targets are a teacher's features or pixels, not histograms of gradients, and patches are hidden one by "
    "one, not in blocks; each shown token is held against its own target, the code takes targets row by row. Both "
    "stages together take the steps that a control has for one; the learning rate is the recipe's",
)
@dataclass(frozen=True)
class DMJD:
    """Stage 1: mean (D(h) - y)^2 over hidden patches + weight mean smooth |Q(h) - y| over shown ones. Stage 2: `match`.

    A batch holds two views of each picture; the second hides first what the first has shown, then others at random, as
    many as the first. y, of zero mean and unit variance in each patch, is what the teacher's last feature is there when
    it sees the whole picture, or the pixels. D is a small transformer, Q a perceptron on shown tokens; smooth |d| is
    d^2 / (2 beta) below beta = 2 and |d| - beta / 2 above. Both are dropped after stage 1.

    match: losses of the second stage; the paper's is cross-entropy with labels.
    target: teacher or pixels.
    weight: of the shown patches, >= 0; the paper's is 1.
    hidden: share of hidden patches of a view, in (0, 1).
    predicted: share of patches that the two views together hide, in [hidden, 1].
    share: of all steps that the first stage takes, in (0, 1).
    decoder_width, decoder_depth, decoder_heads: of D, >= 1.
    entry: path of the student's first block.

    *Needs*: a vision transformer which returns `feats` of tokens; for `teacher` another of as many patches, at hand.
    *Relates to*: `dmae` compares inner features of shown patches alone; its teacher is cheaper, for it sees no more.
    """

    match: tuple[Any, ...] = ("ce",)
    target: Literal["teacher", "pixels"] = "teacher"
    weight: float = 1.0
    hidden: float = 0.6
    predicted: float = 1.0
    share: float = 0.5
    decoder_width: int = 64
    decoder_depth: int = 1
    decoder_heads: int = 4
    entry: str = "blocks.0"

    def __post_init__(self) -> None:
        require(self.target in ("teacher", "pixels"), "target", self.target, "teacher or pixels")
        require(self.weight >= 0, "weight", self.weight, ">= 0")
        require(0 < self.hidden < 1, "hidden", self.hidden, "in (0, 1)")
        require(self.hidden <= self.predicted <= 1, "predicted", self.predicted, f"in [{self.hidden}, 1]")
        require(0 < self.share < 1, "share", self.share, "in (0, 1)")
        check_decoder(self.decoder_width, self.decoder_depth, self.decoder_heads)

    @cached_property
    def pair(self) -> Pair:
        """Who learns what from whom in the second stage."""
        return Pair("student", "teacher", parse_all(self.match))

    def setup(self, nets: Nets, probe: Batch) -> None:
        """Check how the networks cut pictures, and build what tells the targets."""
        side, inner = sides(nets, "student", self.entry, probe), self.decoder_width
        with torch.no_grad(), evaluating(*nets.modules.values()):
            width, out = nets.run("student", probe)["feats"][-1].shape[2], self.targets(nets, probe, side).shape[2]
        decoder = Decoder(width, side**2, out, inner=inner, depth=self.decoder_depth, heads=self.decoder_heads)
        layers = (nn.Linear(width, inner), nn.LayerNorm(inner), nn.GELU(), nn.Linear(inner, out))
        nets.pretext = nn.ModuleDict({"decoder": decoder, "shown": nn.Sequential(*layers)})
        nets.losses = self.pair.build(nets, probe)

    def stages(self, nets: Nets, steps: int) -> Iterator[Stage]:
        """Masked pictures, then whole ones."""
        yield from masked_first(nets, self.share, steps)

    def targets(self, nets: Nets, batch: Batch, side: int) -> Tensor:
        """What is to be told of every patch: [B, side * side, D]."""
        if self.target == "pixels":
            raw = patchify(batch["inputs"], side)
        else:
            feature = nets.run("teacher", batch)["feats"][-1]
            if feature.ndim != 3 or feature.shape[1] < side**2:
                raise BadInput(f"the student has {side**2} patches, the teacher's feature is {list(feature.shape)}")
            raw = feature[:, -(side**2) :]
        return F.layer_norm(upcast(raw), raw.shape[2:])

    def masked(self, nets: Nets, batch: Batch) -> dict[str, Part]:
        """The losses of the first stage."""
        decoder, pictures = nets.pretext["decoder"], torch.cat([batch["inputs"]] * 2)
        patches = len(decoder.places)
        views = disjoint(draw(len(batch["inputs"]), patches, patches, pictures.device), self.hidden, self.predicted)
        shown, targets = torch.cat(views), torch.cat([self.targets(nets, batch, round(patches**0.5))] * 2)
        mask = torch.cat([batch["mask"]] * 2) if "mask" in batch else None
        with only(nets.student, self.entry, shown, patches):
            told: Tensor = nets.run("student", {**batch, "inputs": pictures})["feats"][-1]
        parts = {"hidden": mean(unseen(decoder(told, shown), targets, shown), mask)}
        if self.weight:
            seen = nets.pretext["shown"](told[:, -shown.shape[1] :])
            parts["shown"] = self.weight * mean(visible(seen, targets, shown), mask)
        return parts

    def step(self, nets: Nets, batch: Batch, clock: Clock) -> Iterator[Turn]:
        """One turn of the student."""
        yield "student", self.pair.parts(nets, batch, clock.progress) if clock.stage else self.masked(nets, batch)


def disjoint(order: Tensor, hidden: float, predicted: float) -> tuple[Tensor, Tensor]:
    """Patches that two views show, by a random order of all [B, patches]: twice [B, K]."""
    patches = order.shape[1]
    kept = min(patches - 1, max(1, int(patches * (1 - hidden))))
    other = min(kept, patches - kept, int(min(predicted - hidden, hidden) * patches))
    return order[:, :kept], torch.cat([order[:, other:kept], order[:, kept : kept + other]], 1)


def visible(told: Tensor, targets: Tensor, shown: Tensor) -> Tensor:
    """Mean smooth difference of what shown tokens [B, K, D] tell from their own targets: [B]."""
    told, wanted = pair(told, targets.gather(1, shown.unsqueeze(-1).expand(-1, -1, targets.shape[2])))
    return per_example(F.smooth_l1_loss(told, wanted, reduction="none", beta=2.0))
