"""First the student tells what the teacher thinks of patches that neither sees, then it learns the task."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from limbeck.core.card import method, require
from limbeck.core.errors import BadInput
from limbeck.core.features import per_example
from limbeck.core.loop import Clock, Stage, Turn
from limbeck.core.masked import Decoder, check_decoder, covered, draw, masked_first, only, patchify, sides, unseen
from limbeck.core.maths import pair
from limbeck.core.nets import Batch, Nets, evaluating
from limbeck.core.pair import Pair, parse_all
from limbeck.core.reduce import mean
from limbeck.core.taps import Taps


@method(
    paper="Huang et al. 2023, eq. 2-5",
    year=2023,
    arxiv="2302.14771",
    code="pengzhiliang/G2SD@6146adf:G2SD/engine_distill.py",
    differs="the teacher need not have been a masked autoencoder: its decoder is fitted first, to the frozen teacher; "
    "one head learns from labels and teacher, where the paper adds a distillation token; decoders are smaller",
)
@dataclass(frozen=True)
class G2SD:
    """Generic: mean smoothL1(P(D_s(h_s)) - LN(D_t(h_t))) over hidden patches, beta = 2. Specific: `match`.

    One draw of visible patches serves both networks. D_t, a small transformer, learns before to tell the pixels of
    hidden patches from the teacher's last feature, and is read after its block `layer`; LN has no weights, so that
    scale and shift of what a patch is thought to be do not matter. D_s and the perceptron P go after the first stage.

    match: losses of the specific stage; in the paper labels and the teacher's hard decision, in equal parts.
    hidden: share of hidden patches, in (0, 1). everywhere: match visible patches, too.
    before: steps for D_t, as a share of the student's and on top of them, > 0. share: of the student's steps that are
        generic, in (0, 1).
    decoder_width, decoder_depth, decoder_heads: of D_s, >= 1; the paper's are 256 or 128, 4 and 8.
    teacher_width, teacher_depth, teacher_heads: of D_t; 512, 8 and 16. layer: in [1, teacher_depth]; 4.
    entry, teacher_entry: path of the first block of either network.

    *Needs*: vision transformers with the same number of patches, which return `feats` of tokens; a teacher at hand.
    *Relates to*: `dmae` matches inner features of visible patches and tells pixels itself. Use either where pictures
        are many and labels few.
    *Differs*: see the card.
    """

    match: tuple[Any, ...] = ({"ce": 0.5}, {"kd": {"temperature": 1.0, "weight": 0.5}})
    hidden: float = 0.75
    everywhere: bool = False
    before: float = 0.5
    share: float = 0.5
    decoder_width: int = 64
    decoder_depth: int = 1
    decoder_heads: int = 4
    teacher_width: int = 64
    teacher_depth: int = 2
    teacher_heads: int = 4
    layer: int = 1
    entry: str = "blocks.0"
    teacher_entry: str = "blocks.0"

    def __post_init__(self) -> None:
        require(0 < self.hidden < 1, "hidden", self.hidden, "in (0, 1)")
        require(self.before > 0, "before", self.before, "> 0")
        require(0 < self.share < 1, "share", self.share, "in (0, 1)")
        check_decoder(self.decoder_width, self.decoder_depth, self.decoder_heads)
        check_decoder(self.teacher_width, self.teacher_depth, self.teacher_heads)
        require(1 <= self.layer <= self.teacher_depth, "layer", self.layer, f"in [1, {self.teacher_depth}]")

    @cached_property
    def pair(self) -> Pair:
        """Who learns what from whom in the specific stage."""
        return Pair("student", "teacher", parse_all(self.match))

    def setup(self, nets: Nets, probe: Batch) -> None:
        """Check how the networks cut pictures, and build decoders and perceptron."""
        side, other = sides(nets, "student", self.entry, probe), sides(nets, "teacher", self.teacher_entry, probe)
        if other != side:
            raise BadInput(f"the student cuts a picture into {side} x {side} patches, the teacher {other} x {other}")
        with torch.no_grad(), evaluating(*nets.modules.values()):
            mine, its = (nets.run(player, probe)["feats"][-1].shape[2] for player in ("student", "teacher"))
        out, wide = patchify(probe["inputs"], side).shape[2], self.teacher_width
        nets.decoder = Decoder(its, side**2, out, inner=wide, depth=self.teacher_depth, heads=self.teacher_heads)
        sizes = {"inner": self.decoder_width, "depth": self.decoder_depth, "heads": self.decoder_heads}
        nets.pretext = Decoder(mine, side**2, wide, **sizes)
        nets.pretext.leave = nn.Sequential(nn.Linear(self.decoder_width, wide), nn.GELU(), nn.Linear(wide, wide))
        nets.losses = self.pair.build(nets, probe)

    def stages(self, nets: Nets, steps: int) -> Iterator[Stage]:
        """The teacher's decoder, then the student on masked pictures, then on whole ones."""
        first = self.before / (1 + self.before)
        yield Stage(max(1, round(self.before * steps)), "decoder", until=first, validated=False)
        nets.freeze("decoder")
        for stage in masked_first(nets, self.share, steps):
            yield stage._replace(until=first + (1 - first) * stage.until)

    def seen(self, nets: Nets, player: str, batch: Batch, shown: Tensor) -> Tensor:
        """The last feature of a network that sees the shown patches alone: [B, extra + K, D]."""
        entry = self.teacher_entry if player == "teacher" else self.entry
        with only(nets.find(player), entry, shown, len(nets.decoder.places)):
            feature: Tensor = nets.run(player, batch)["feats"][-1]
        return feature

    def thoughts(self, nets: Nets, batch: Batch, shown: Tensor) -> Tensor:
        """What the teacher's decoder holds of every patch after block `layer`: [B, patches, teacher_width]."""
        with torch.no_grad(), Taps(nets.decoder, {"inner": f"blocks.{self.layer - 1}"}) as taps:
            nets.decoder(self.seen(nets, "teacher", batch, shown), shown)
            inner: Tensor = taps.read()["inner"]
        return inner[:, inner.shape[1] - len(nets.decoder.places) :]

    def step(self, nets: Nets, batch: Batch, clock: Clock) -> Iterator[Turn]:
        """One turn of the teacher's decoder, or of the student."""
        if clock.stage == 2:
            yield "student", self.pair.parts(nets, batch, clock.progress)
            return
        patches = len(nets.decoder.places)
        kept = min(patches - 1, max(1, int(patches * (1 - self.hidden))))
        shown = draw(len(batch["inputs"]), patches, kept, batch["inputs"].device)
        if clock.stage == 0:
            pixels = patchify(batch["inputs"], math.isqrt(patches))
            told = nets.decoder(self.seen(nets, "teacher", batch, shown), shown)
            yield "decoder", {"pixels": mean(unseen(told, pixels, shown), batch.get("mask"))}
            return
        told, aim = nets.pretext(self.seen(nets, "student", batch, shown), shown), self.thoughts(nets, batch, shown)
        error = apart(told, aim, None if self.everywhere else shown)
        yield "student", {"generic": mean(error, batch.get("mask"))}


def apart(told: Tensor, aim: Tensor, shown: Tensor | None) -> Tensor:
    """Smooth L1 (beta 2) to the normalised aim, [B, patches, D] x 2, at patches that are not shown [B, K]: [B]."""
    told, aim = pair(told, aim.detach())
    error = F.smooth_l1_loss(told, F.layer_norm(aim, aim.shape[-1:], eps=1e-6), beta=2.0, reduction="none")
    if shown is None:
        return per_example(error)
    dark = covered(shown, error.shape[1])
    return (error.mean(2) * dark).sum(1) / dark.sum(1)
