"""A large and a small network are trained side by side; each learns from the labels and from the other."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

from limbeck.core.card import method, require
from limbeck.core.group import form
from limbeck.core.loop import Clock, Turn
from limbeck.core.mutual import facing
from limbeck.core.nets import Batch, Nets
from limbeck.core.pair import Pair, parse_all
from limbeck.core.pairs import Pairs, own


@method(
    paper="Lee et al. 2023 (CTCD), section 3",
    year=2023,
    arxiv="2311.02849",
    differs="there is no official code; the divergence and the weights of each stage are not known, and are for the "
    "user to set",
    exact_accumulation=True,
)
@dataclass(frozen=True)
class CTCD:
    """L_S = b_h CE(labels, z_S) + b_s D(sg z_L, z_S) and L_L = a_h CE(labels, z_L) + a_s D(sg z_S, z_L), at once.

    Both speak before either moves, and each is a constant to the other. D is any loss between a student and a teacher,
    such as `kd`, `wttm` or one on inner layers; in L_L the small network is the one that teaches.

    match: losses of the small network, the student, as names, {name: {knob: value, weight: number}} or callables.
    back: losses of the large one. A weight may be a schedule, to let the small one's word fade; ["ce"] is one-way
        online distillation, and with match ["ce"], too, each learns alone.

    *Needs*: nets.peers, the small network first, or factories "student" and "peer"; no teacher. A large network that
        has learned already comes as `peer` with weights. Whoever is the student is the result: exchange the two for an
        improved large one.
    *Relates to*: in `dml` peers move one after the other, on equal terms; `bd_kd` weighs two divergences, example by
        example; `distill` leaves the large one as it is.
    *Differs*: see the card.
    """

    match: tuple[Any, ...] = ("ce", {"kd": {"temperature": 1.0}})
    back: tuple[Any, ...] = ("ce", {"kd": {"temperature": 1.0}})

    learner: ClassVar[str] = "peers.0"

    @cached_property
    def pairs(self) -> Pairs:
        """Who learns from whom, and by which losses."""
        return {
            "small": Pair("peers.0", "peers.1", parse_all(self.match), "losses.small"),
            "large": Pair("peers.1", "peers.0", parse_all(self.back), "losses.large"),
        }

    def setup(self, nets: Nets, probe: Batch) -> None:
        """Build the networks that are not given, and the losses that own weights."""
        players = form(nets, 2)
        require(len(players) == 2, "peers", len(players), "2 networks, a small and a large one")
        own(nets, self.pairs, dict.fromkeys(self.pairs, probe))

    def step(self, nets: Nets, batch: Batch, clock: Clock) -> Iterator[Turn]:
        """Both speak; then a turn of the small one, and one of the large one."""
        said = {player: nets.run(player, batch) for player in ("peers.0", "peers.1")}
        for pair in self.pairs.values():
            have = facing(batch, said[pair.learner], said[pair.teacher])
            yield pair.learner, pair.weighed(nets, have, clock.progress)
