"""Several processes carry out one recipe: the first one writes and speaks, and all go on from what it has."""

import os
from collections.abc import Callable
from typing import TypeVar

import torch
from accelerate import PartialState

from limbeck.core import shard
from limbeck.core.errors import BadInput, LimbeckError

T = TypeVar("T")


def processes() -> PartialState:
    """Which process this is, of how many. Asked first, it has to say itself that there are processors only: Accelerate
    would otherwise take each of the processes for the only one."""
    asked = os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes", "on")
    return PartialState(cpu=asked or not torch.accelerator.is_available())


def leads() -> bool:
    """Whether this process is the first one."""
    return bool(processes().is_main_process)


def first(make: Callable[[], T]) -> T:
    """What `make` gives in the first process, on all of them: the others wait for it, and fail when it fails."""
    if processes().num_processes == 1:
        return make()
    made: T | None = None
    problem: Exception | None = None
    if leads():
        try:
            made = make()
        except Exception as error:  # the others would wait for ever
            problem = error
    made, bad, said = shard.first((made, isinstance(problem, ValueError), None if problem is None else str(problem)))
    if problem is not None:
        raise problem
    if said is not None:
        raise (BadInput if bad else LimbeckError)(said)
    return made
