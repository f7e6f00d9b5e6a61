"""What schemes ask of a teacher beyond what it says."""

from limbeck.core.errors import BadInput
from limbeck.core.nets import Batch, Nets


def at_hand(nets: Nets, scheme: str, why: str) -> None:
    """Raise BadInput where there is no teacher to ask, at most a store of what one said."""
    if "teacher" not in nets:
        raise BadInput(f"`{scheme}` {why}, so it needs the teacher itself, not a store")


def read_by(player: str, batch: Batch) -> Batch:
    """The batch as one of several teachers reads it, such as "teachers.0".

    What a batch holds for one teacher alone is called "teachers.0.teacher_inputs", "teachers.0.student_spans" and so
    on; here it gets its usual name, in the place of what has that name for everyone. A teacher with nothing of its own
    reads in the student's tokens.
    """
    shared = {name: value for name, value in batch.items() if not name.startswith("teachers.")}
    return shared | {k.removeprefix(f"{player}."): v for k, v in batch.items() if k.startswith(f"{player}.")}
