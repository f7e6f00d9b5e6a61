"""What schemes ask of a teacher beyond what it says."""

from limbeck.core.errors import BadInput
from limbeck.core.nets import Nets


def at_hand(nets: Nets, scheme: str, why: str) -> None:
    """Raise BadInput where there is no teacher to ask, at most a store of what one said."""
    if "teacher" not in nets:
        raise BadInput(f"`{scheme}` {why}, so it needs the teacher itself, not a store")
