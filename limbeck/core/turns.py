"""Who was trained when, by what and for how long: counted turn by turn, kept in checkpoints, written as turns.json."""

import json
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

FILE = "turns.json"


@dataclass
class Turns:
    """What one player did in one stage.

    turns: optimiser steps. first, last: steps of the stage at which it had its first and its latest turn. parts: names
    of the parts of its loss. optimizer: with its learning rate before the schedule. seconds: by the host's watch, from
    the end of the turn before.
    """

    turns: int
    first: int
    last: int
    parts: list[str]
    optimizer: str
    lr: float
    seconds: float = 0.0


@dataclass
class StageTurns:
    """One stage. steps: planned. began: seconds of the run before it. seconds: its own, with data and validation."""

    name: str
    steps: int
    began: float
    seconds: float = 0.0
    players: dict[str, Turns] = field(default_factory=dict)


class TurnRecord:
    """Counts turns, stage by stage."""

    def __init__(self) -> None:
        self.stages: list[StageTurns] = []
        self.mark = 0.0

    def stage(self, name: str, steps: int, elapsed: float) -> None:
        """A stage begins."""
        self.stages.append(StageTurns(name, steps, elapsed))

    def step(self) -> None:
        """A step begins."""
        self.mark = time.perf_counter()

    def turn(self, player: str, parts: dict[str, Any], t: int, optimizer: torch.optim.Optimizer) -> None:
        """A turn has ended."""
        now = time.perf_counter()
        players = self.stages[-1].players
        seen = players.get(player)
        if seen is None:
            group = optimizer.param_groups[0]
            seen = players[player] = Turns(0, t, t, [], type(optimizer).__name__.lower(), float(group["initial_lr"]))
        seen.turns, seen.last, seen.seconds = seen.turns + 1, t, seen.seconds + now - self.mark
        if len(parts) != len(seen.parts) or not all(map(seen.parts.__contains__, parts)):
            seen.parts = list(dict.fromkeys([*seen.parts, *parts]))
        self.mark = now

    def state(self, elapsed: float) -> list[dict[str, Any]]:
        """All of it in plain values, for a checkpoint or a file."""
        if self.stages:
            self.stages[-1].seconds = elapsed - self.stages[-1].began
        return [asdict(stage) for stage in self.stages]

    def load(self, state: list[dict[str, Any]]) -> None:
        """Take up what `state` gave."""
        self.stages = [
            StageTurns(**{**stage, "players": {p: Turns(**t) for p, t in stage["players"].items()}}) for stage in state
        ]

    def write(self, folder: Path, elapsed: float) -> None:
        """turns.json in `folder`, whole or not at all."""
        draft = folder / f".{FILE}"
        draft.write_text(json.dumps(self.state(elapsed)))
        draft.replace(folder / FILE)
