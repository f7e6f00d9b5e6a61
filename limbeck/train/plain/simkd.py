"""The student keeps the teacher's classifier and only learns, through a projector that stays, to feed it."""

from collections.abc import Iterator
from dataclasses import dataclass

from limbeck.core.card import method, require
from limbeck.core.features import apart, picture, shrunk
from limbeck.core.graft import Bottleneck, Grafted, anatomy, last_maps, watched
from limbeck.core.loop import Clock, Turn
from limbeck.core.nets import Batch, Nets
from limbeck.core.reduce import mean
from limbeck.core.surgery import copied
from limbeck.core.teachers import at_hand


@method(
    paper="Chen et al. 2022, eq. 3-4",
    year=2022,
    arxiv="2203.14001",
    code="DefangChen/SimKD@2b389c3:models/util.py",
    differs="a network whose classifier reads no mean over a map is matched in what its classifier does read",
)
@dataclass(frozen=True)
class SimKD:
    """mean (P(F_s) - F_t)^2 of the last features; the student is body, P, mean over the places, teacher's classifier.

    No label and no soft target is used. P is a bottleneck of 1x1, 3x3 and 1x1 convolutions with batch norm and ReLU;
    the larger map is averaged down to the smaller. P and the frozen classifier belong to the student from then on,
    whose own classifier is taken out: they count as its parameters.

    factor: by how much narrower than the teacher's feature the inside of P is, >= 1; 2, 4 and 8 in the paper.

    *Needs*: a teacher at hand, whose feature after a ReLU suits P; both classifiers must be linear layers.
    *Relates to*: use it when the student may grow a little, with a learning rate about ten times that of cross-entropy,
        since the mean over so many differences is small. `srrl` learns from the same classifier and leaves the student
        as it was; `fitnets` needs none.
    """

    factor: int = 2

    def __post_init__(self) -> None:
        require(self.factor >= 1, "factor", self.factor, ">= 1")

    def setup(self, nets: Nets, probe: Batch) -> None:
        """Put projector and classifier into the student."""
        at_hand(nets, "simkd", "keeps the teacher's classifier")
        teacher, student = watched(nets, "teacher", probe), anatomy(nets, "student", probe)
        aim, head = picture(teacher.feature), copied(teacher.head).requires_grad_(False)
        neck, size = Bottleneck(picture(student.feature).shape[1], aim.shape[1], self.factor), aim.shape[2:]
        nets.student = Grafted(nets.student, neck, head, cut=student.path, reads=student.reads, size=size)

    def step(self, nets: Nets, batch: Batch, clock: Clock) -> Iterator[Turn]:
        """One turn of the student."""
        aim, mine = last_maps(nets.run("teacher", batch)), nets.run("student", batch)["grafted"]
        yield "student", mean(apart(mine, shrunk(aim, mine.shape[2:])), batch.get("mask"))
