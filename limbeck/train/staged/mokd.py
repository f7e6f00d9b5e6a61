"""Two networks of different kinds learn without labels, each from its own average and from that of the other."""

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from limbeck.core.card import method, require
from limbeck.core.dino import HEADS, Centres, Heads, Sizes, across_views, agreement, said, search, warm
from limbeck.core.ema import follow
from limbeck.core.loop import Clock, Stage, Turn
from limbeck.core.nets import Batch, Nets, evaluating
from limbeck.core.pretext import answer, before_task, check_area, check_share, cut, pools, rising
from limbeck.core.reduce import Part, labelled, mean
from limbeck.core.taps import untap
from limbeck.losses.logits.ce import ce

PLAYERS = ("student", "peer")


@method(
    paper="Song et al. 2023, section 3",
    year=2023,
    arxiv="2304.06461",
    code="skyoux/mokd@f7b1386:main_mokd.py",
    differs="small views are scaled to full size, as a ViT of fixed places reads no other; the mean of the tokens "
    "asks, where the code takes a ViT's class token; prototypes have length 1 in every head and learn from the start",
)
@dataclass(frozen=True)
class MoKD:
    """L_a = D(m_a, m_a') + D(t_a, t_a') + weight (D(m_a, m_b') + CE(s_b', t_a)), the same for b; then a task.

    m and t are what an MLP and a transformer head make of a view, primes are of the averages, constants. D is DINO's
    loss: cross-entropy of softmax(z / temperature) with softmax((z' - centre) / teacher_temperature) over every large
    view z' and every other view z. s_b' is found by search: a's mean token of a small view joins b's tokens of the
    first large one in the transformer head of b's average. Both speak before either is updated.

    weight: lambda, >= 0; 0 trains each by DINO alone.
    share: of all steps that comes before the task, in [0, 1); then networks take over their averages' weights.
    probe: the task trains heads alone, on features that stay.
    small: views beside the two large ones, >= 1. small_area, large_area: least and largest part that they show.
    augment: what is done to views beside, as `data: augment`.
    temperature: > 0. teacher_temperature: > 0, at first and from warmup on. warmup: share of the stage, in [0, 1).
    centring: decay of the centres, in [0, 1). decay: of the averages at first; rises to 1 by a half cosine.
    prototypes, hidden, bottleneck: of the heads; the paper's are 65536, 2048 and 256. width, depth, heads: of the
        transformer; as wide as a ViT's tokens, 3 and 6.

    *Needs*: nets.student and a factory "peer" of another kind, which return `emb` and `feats` (and `head`, to be
        probed); labels -100 for none. Give each its optimiser: in the paper SGD for the CNN, AdamW for the ViT.
    *Relates to*: `selfkd_ssl_covid` for one network. *Differs*: see the card.
    """

    weight: float = 1.0
    share: float = 0.7
    probe: bool = False
    small: int = 8
    small_area: tuple[float, float] = (0.05, 0.4)
    large_area: tuple[float, float] = (0.4, 1.0)
    augment: tuple[Any, ...] = ("flip", {"siamese": {"ops": ["color"]}})
    temperature: float = 0.1
    teacher_temperature: tuple[float, float] = (0.04, 0.04)
    warmup: float = 0.3
    centring: float = 0.9
    decay: float = 0.996
    prototypes: int = 256
    hidden: int = 128
    bottleneck: int = 32
    width: int = 64
    depth: int = 1
    heads: int = 4

    def __post_init__(self) -> None:
        require(self.weight >= 0, "weight", self.weight, ">= 0")
        require(self.small >= 1, "small", self.small, ">= 1")
        require(self.temperature > 0, "temperature", self.temperature, "> 0")
        require(min(self.teacher_temperature) > 0, "teacher_temperature", self.teacher_temperature, "two numbers > 0")
        for name in ("warmup", "centring", "decay"):
            require(0 <= getattr(self, name) < 1, name, getattr(self, name), "in [0, 1)")
        check_share(self.share)
        check_area("small_area", self.small_area)
        check_area("large_area", self.large_area)
        assert self.sizes

    @property
    def sizes(self) -> Sizes:
        """Of the heads."""
        return Sizes(self.prototypes, self.hidden, self.bottleneck, self.width, self.depth, self.heads)

    def pools(self, labels: Tensor) -> dict[str, Tensor]:
        """The rows of both stages."""
        return pools(labels)

    def setup(self, nets: Nets, probe: Batch) -> None:
        """The peer, the heads of both, centres, and averages, which start as copies."""
        if "peer" not in nets:
            nets.peer = nets.fresh("peer" if "peer" in nets.factories else "student")
        with torch.no_grad(), evaluating(nets.student, nets.peer):
            heads = {p: Heads(nets.run(p, probe), self.sizes) for p in PLAYERS}
        pairs = {p: nn.ModuleDict({"net": nets.find(p), "heads": heads[p]}) for p in PLAYERS}
        nets.heads, nets.averages = nn.ModuleDict(heads), copy.deepcopy(nn.ModuleDict(pairs)).requires_grad_(False)
        nets.centres = nn.ModuleDict({p: Centres(self.prototypes) for p in PLAYERS})
        untap(nets.averages)

    def stages(self, nets: Nets, steps: int) -> Iterator[Stage]:
        """Views of all pictures; then those that have a label, seen by the averages."""
        helpers, averages = {p: f"heads.{p}" for p in PLAYERS}, {p: f"averages.{p}.net" for p in PLAYERS}
        return before_task(nets, helpers, self.share, steps, averages)

    def views(self, nets: Nets, batch: Batch, clock: Clock) -> dict[str, dict[str, Part]]:
        """The losses of both in the first stage."""
        large = [cut(batch["inputs"], self.large_area, self.augment) for _ in range(2)]
        small = [cut(batch["inputs"], self.small_area, self.augment) for _ in range(self.small)]
        cold = warm(*self.teacher_temperature, clock.progress, self.warmup)
        dino = partial(across_views, temperature=self.temperature, teacher_temperature=cold)
        with torch.no_grad():
            its = {p: said(nets, f"averages.{p}.net", nets.averages[p]["heads"], batch, large) for p in PLAYERS}
        losses: dict[str, dict[str, Part]] = {}
        for p, other in zip(PLAYERS, reversed(PLAYERS), strict=True):
            big, little = (said(nets, p, nets.heads[p], batch, views) for views in (large, small))
            spoken = {head: torch.cat([getattr(big, head), getattr(little, head)]) for head in HEADS}
            each = {head: dino(spoken[head], nets.centres[p].taken(its[p], head)) for head in HEADS}
            if self.weight:
                each["cross"] = self.weight * dino(spoken["mlp"], nets.centres[other].taken(its[other], "mlp"))
                query = nets.heads[p].transformer.asked(little.feature)
                found = search(nets.averages[other]["heads"], its[other].feature, query, self.small)
                each["search"] = self.weight * agreement(little.transformer, found, self.temperature, cold).mean(0)
            losses[p] = {name: mean(values, batch.get("mask")) for name, values in each.items()}
        for p in PLAYERS:
            nets.centres[p].update(its[p], self.centring)
        return losses

    def step(self, nets: Nets, batch: Batch, clock: Clock) -> Iterator[Turn]:
        """A turn for each of the two."""
        if self.share and clock.stage == 0:
            yield from self.views(nets, batch, clock).items()
            return
        for player in PLAYERS:
            spoken = answer(nets, player, batch, probe=self.probe)
            yield player, {"ce": mean(ce(spoken, batch["labels"]), labelled(batch))}

    def after(self, nets: Nets, player: str, clock: Clock) -> None:
        """The average follows, as long as it is asked."""
        if self.share and clock.stage == 0:
            decay, average = rising(self.decay, clock.progress), nets.averages[player]
            follow(average["net"], nets.find(player), decay)
            follow(average["heads"], nets.heads[player], decay)
