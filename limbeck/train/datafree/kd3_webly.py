"""A student is taught on pictures from the web: those that both networks are sure of, and in other looks, too."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributions import Beta

from limbeck.core.card import method, require
from limbeck.core.errors import BadInput
from limbeck.core.features import apart, picture, shrunk
from limbeck.core.graft import Bottleneck, Grafted, anatomy, last_maps, watched
from limbeck.core.loop import Clock, Turn
from limbeck.core.maths import upcast
from limbeck.core.mixing import deranged
from limbeck.core.nets import Batch, Nets
from limbeck.core.reduce import mean
from limbeck.core.surgery import copied
from limbeck.core.teachers import at_hand
from limbeck.losses.logits.kd import kd


class Confidence(nn.Module):
    """The last combined prediction of every picture of the pool, as buffers: its class (-1: not met) and how sure."""

    named: Tensor
    sure: Tensor

    def __init__(self, pictures: int) -> None:
        super().__init__()
        self.register_buffer("named", torch.full((pictures,), -1))
        self.register_buffer("sure", torch.zeros(pictures))

    @torch.no_grad()
    def note(self, index: Tensor, predictions: Tensor, counts: Tensor) -> Tensor:
        """Remember predictions [B, C] where they count [B]; how sure all are [B]."""
        sure, named = predictions.max(-1)
        self.sure[index[counts]], self.named[index[counts]] = sure[counts].to(self.sure), named[counts]
        return sure

    def top(self, index: Tensor, share: float) -> Tensor:
        """Which of the pictures [B] are among the surest `share` of those that are taken for the same class."""
        same = self.named[index][:, None] == self.named
        surer = same & (self.sure > self.sure[index][:, None])
        return surer.sum(1) < share * same.sum(1)


def another_look(pictures: Tensor, partner: Tensor, keep: Tensor) -> Tensor:
    """sigma_mix (x - mu) / sigma + mu_mix, channel by channel; mu_mix = keep mu + (1 - keep) mu' is a blend with the
    partner's mean, sigma_mix alike. pictures [B, C, H, W], partner [B], keep [B] in [0, 1]; 1 is x itself."""
    x, keep = upcast(pictures), keep.view(-1, 1, 1, 1).to(pictures.device)
    mu, sigma = x.mean((2, 3), keepdim=True), (x.var((2, 3), correction=0, keepdim=True) + 1e-6).sqrt()
    mu_mix, sigma_mix = (keep * s + (1 - keep) * s[partner] for s in (mu, sigma))
    return (sigma_mix * (x - mu) / sigma + mu_mix).to(pictures.dtype)


def told_apart(near: Tensor, far: Tensor, chosen: Tensor, temperature: float) -> Tensor:
    """-log softmax_j(cos(near_i, far_j) / temperature) of its own, among itself and those chosen: [B, D] x 2 -> [B]."""
    scores = F.normalize(upcast(near)) @ F.normalize(upcast(far)).mT / temperature
    rivals = chosen | torch.eye(len(near), dtype=torch.bool, device=near.device)
    return -scores.masked_fill(~rivals, -torch.inf).log_softmax(1).diagonal()


@method(
    paper="Tang et al. 2023, section 4",
    year=2023,
    arxiv="2307.11469",
    differs="no code was published. That the student's part in the choice grows from none in a line, that looks are "
    "mixed in the pictures themselves, and all default weights are choices made here; a projector as in `simkd`",
)
@dataclass(frozen=True)
class KD3Webly:
    """T^2 KL(t || s) + align q mean(P(F_s) - F_t)^2 + contrast InfoNCE(P(F_s(x)), P(F_s(x'))), a mean over the chosen.

    q = max_c [w p_t + (1 - w) p_s], w falling from 1 to `trust`, is how sure both are of a picture; of those that are
    taken for the same class the surest `share` are chosen, by the last look at each. P is a projector that stays: it
    feeds the teacher's frozen classifier, which is the student's from then on. x' is x with means and deviations of
    its channels blended with those of another picture, so that the student learns to see through the look of the web.

    share: part of each class that is chosen, in (0, 1]. trust: in [0, 1]; 1 is the teacher's choice alone.
    align, contrast: weights >= 0. temperature: T > 0. contrast_temperature: > 0.
    spread: > 0; how much stays is drawn from Beta(spread, spread), below 1 mostly nearly all or nothing.
    factor: by how much narrower than the teacher's feature the inside of P is, >= 1.

    *Needs*: a teacher at hand, `index`, pictures; both classifiers must be linear layers. Labels are never read.
    *Relates to*: `distill` by `kd` on the same pictures is its control; `simkd` shares the classifier on any data.
    *Differs*: see the card.
    """

    share: float = 0.5
    trust: float = 0.5
    align: float = 1.0
    contrast: float = 0.1
    temperature: float = 4.0
    contrast_temperature: float = 0.5
    spread: float = 0.5
    factor: int = 2

    def __post_init__(self) -> None:
        require(0 < self.share <= 1, "share", self.share, "in (0, 1]")
        require(0 <= self.trust <= 1, "trust", self.trust, "in [0, 1]")
        for name in ("align", "contrast"):
            require(getattr(self, name) >= 0, name, getattr(self, name), ">= 0")
        for name in ("temperature", "contrast_temperature", "spread"):
            require(getattr(self, name) > 0, name, getattr(self, name), "> 0")
        require(self.factor >= 1, "factor", self.factor, ">= 1")

    def setup(self, nets: Nets, probe: Batch) -> None:
        """Put projector and classifier into the student, and make room for how sure both are."""
        at_hand(nets, "kd3_webly", "keeps the teacher's classifier")
        if "index" not in probe or probe["inputs"].ndim != 4:
            raise BadInput("`kd3_webly` needs pictures [B, C, H, W] with their `index`")
        teacher, student = watched(nets, "teacher", probe), anatomy(nets, "student", probe)
        aim, head = picture(teacher.feature), copied(teacher.head).requires_grad_(False)
        neck, size = Bottleneck(picture(student.feature).shape[1], aim.shape[1], self.factor), aim.shape[2:]
        nets.student = Grafted(nets.student, neck, head, cut=student.path, reads=student.reads, size=size)
        nets.pool = Confidence(int(probe.get("examples") or probe["index"].max() + 1))

    def step(self, nets: Nets, batch: Batch, clock: Clock) -> Iterator[Turn]:
        """One turn of the student."""
        shown = {"inputs": batch["inputs"]}
        teacher, student = nets.run("teacher", shown), nets.run("student", shown)
        w = 1 - (1 - self.trust) * clock.progress
        t, s = (upcast(told["logits"].detach()).softmax(-1) for told in (teacher, student))
        index, counts = batch["index"], batch.get("mask", torch.ones_like(batch["index"])).bool()
        sure = nets.pool.note(index, w * t + (1 - w) * s, counts)
        chosen = nets.pool.top(index, self.share) & counts
        parts = {"kd": mean(kd(student["logits"], teacher["logits"], temperature=self.temperature), chosen)}
        if self.align:
            mine, aim = student["grafted"], last_maps(teacher)
            parts["align"] = self.align * mean(sure * apart(mine, shrunk(aim, mine.shape[2:])), chosen)
        if self.contrast:
            keep = Beta(self.spread, self.spread).sample((len(sure),))
            looks = another_look(batch["inputs"], deranged(len(sure)), keep)
            other = nets.run("student", {"inputs": looks})["emb"]
            lost = told_apart(student["emb"], other, chosen, self.contrast_temperature)
            parts["contrast"] = self.contrast * mean(lost, chosen)
        yield "student", parts
