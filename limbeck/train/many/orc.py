"""The best student of a batch is promoted to teach the next one, and teachers first relearn what students got wrong."""

import copy
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from limbeck.core.card import method, require
from limbeck.core.errors import BadInput
from limbeck.core.group import Roles, companions, joint
from limbeck.core.loop import Clock, Stage, Turn
from limbeck.core.nets import Batch, Nets, evaluating
from limbeck.core.reduce import Part, labelled, mean
from limbeck.core.taps import untap
from limbeck.losses.logits.ce import ce
from limbeck.losses.logits.kd import kd

MEMORY = 0.98  # of the record by which the best student is kept in the end


@method(
    paper="Choi et al. 2022 (ORC), sections 3.2 to 3.4",
    year=2022,
    arxiv="2206.01186",
    differs="the repository holds no code: group sizes, weights and temperature are ours; a student is promoted for "
    "the batch that comes after the one it was best on; the private transfer of features is left out",
)
@dataclass(frozen=True)
class ORC:
    """Teacher group = the mentor, a copy of the teacher that learns on, and the promoted student; the rest are taught.

    1. Intensive teaching: each of the teacher group minimises w CE(labels) on those examples that anyone of the student
    group got wrong. 2. Transfer: each of the student group minimises CE(labels) + a T^2 KL(mean of the teacher group's
    softmax(z / T) || softmax(z / T)). 3. Role change: who of the student group was right most often on this batch is
    promoted for the next, the smaller loss deciding ties; who taught goes back to the students.

    weight: a of the KL, >= 0. temperature: T > 0.
    intensive: w >= 0, of the first phase; 0 leaves the teacher group as it is.
    promote: whether roles change; without, and with intensive 0, this is `kd` of every student.
    others: students beside the student, >= 1, built by the factory "peer", or else "student".

    *Needs*: nets.teacher itself, trained, no store; nets.student; labels. In the end the student has the weights of
        whoever has the best record, among those of its own architecture.
    *Relates to*: `dml` without a teacher, `several_teachers` with teachers that stay as they are. The mentor learns by
        the optimiser of `train: optimizers: {mentor: ...}`, which should take small steps. *Differs*: see the card.
    """

    weight: float = 1.0
    temperature: float = 4.0
    intensive: float = 1.0
    promote: bool = True
    others: int = 2

    def __post_init__(self) -> None:
        require(self.weight >= 0, "weight", self.weight, ">= 0")
        require(self.temperature > 0, "temperature", self.temperature, "> 0")
        require(self.intensive >= 0, "intensive", self.intensive, ">= 0")
        require(self.others >= 1, "others", self.others, ">= 1")

    def setup(self, nets: Nets, probe: Batch) -> None:
        """Copy the teacher, and build the other students."""
        if "teacher" not in nets:
            raise BadInput("orc trains its teacher on, so it needs the teacher itself, not a store")
        if "peers" not in nets:
            nets.peers = companions(nets, self.others)
        nets.roles = Roles(len(self.students(nets)), MEMORY)
        if self.intensive:
            nets.mentor = copy.deepcopy(nets.teacher)
            untap(nets.mentor)
            nets.thaw("mentor")

    def students(self, nets: Nets) -> list[str]:
        """All that may be promoted."""
        return ["student", *(f"peers.{k}" for k in range(len(nets.peers)))]

    def groups(self, nets: Nets) -> tuple[list[str], list[str]]:
        """The teacher group and the student group of this step."""
        mentor, pool, best = "mentor" if self.intensive else "teacher", self.students(nets), int(nets.roles.promoted)
        promoted = [pool[best]] if self.promote and best >= 0 else []
        return [mentor, *promoted], [player for player in pool if player not in promoted]

    def stages(self, nets: Nets, steps: int) -> Iterator[Stage]:
        """One stage; then the student takes over the weights of the best of its kind."""
        yield Stage(steps, "group")
        pool, mine = self.students(nets), nets.student.state_dict()
        shape = {key: value.shape for key, value in mine.items()}
        alike = [{k: v.shape for k, v in nets.find(p).state_dict().items()} == shape for p in pool]
        record = nets.roles.record.masked_fill(~torch.tensor(alike, device=nets.roles.record.device), -torch.inf)
        nets.student.load_state_dict(
            {k: v.clone() for k, v in nets.find(pool[int(record.argmax())]).state_dict().items()}
        )

    def step(self, nets: Nets, batch: Batch, clock: Clock) -> Iterator[Turn]:
        """Turns of the teacher group, then of the student group."""
        labels, mask, known = batch["labels"], batch.get("mask"), labelled(batch)
        teachers, students = self.groups(nets)
        pool = self.students(nets)
        said = {player: nets.run(player, batch)["logits"] for player in pool}
        nets.roles.note(torch.stack([said[p].detach() for p in pool]), labels, known)
        missed = torch.stack([said[p].argmax(-1) != labels for p in students]).any(0) & known
        for player in teachers if self.intensive else []:
            logits = said[player] if player in said else nets.run(player, batch)["logits"]
            yield player, {"relearned": self.intensive * mean(ce(logits, labels), missed)}
        target = self.told(nets, teachers, batch)
        for player in students:
            parts: dict[str, Part] = {"ce": mean(ce(said[player], labels), known)}
            if self.weight:
                parts["kl"] = self.weight * mean(kd(said[player], target, temperature=self.temperature), mask)
            yield player, parts

    def told(self, nets: Nets, teachers: list[str], batch: Batch) -> Tensor:
        """Logits [..., C] of the teacher group as one."""
        with torch.no_grad(), evaluating(*[nets.find(player) for player in teachers]):
            return joint(torch.stack([nets.run(player, batch)["logits"] for player in teachers]), self.temperature)

    def after(self, nets: Nets, player: str, clock: Clock) -> None:
        """Roles change when the last of the student group has been taught."""
        if player == self.groups(nets)[1][-1]:
            nets.roles.change()
