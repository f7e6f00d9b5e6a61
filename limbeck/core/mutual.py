"""Two networks that teach one another on the same batch: what the losses of either see."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from limbeck.core.nets import Batch
from limbeck.core.pair import comparable


def constant(value: Any) -> Any:
    """The same tensors, alone or in lists, without gradient; anything else as it is."""
    if isinstance(value, (list, tuple)):
        return type(value)(constant(v) for v in value)
    return value.detach() if isinstance(value, Tensor) else value


def facing(batch: Batch, mine: Mapping[str, Any], its: Mapping[str, Any]) -> dict[str, Any]:
    """What losses may ask for, by name: `mine` as the student's outputs, `its` as the teacher's, a constant."""
    have = {name: value for name, value in batch.items() if not name.startswith("teacher_")}
    have |= {f"student_{name}": value for name, value in mine.items()}
    return comparable(have | {f"teacher_{name}": constant(value) for name, value in its.items()})
