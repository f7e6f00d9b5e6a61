"""What a run gives back."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from limbeck.report.statistics import Gain
from limbeck.verbs.setting import Outcome


@dataclass
class Result:
    """What a run gave.

    artefact: the student (an nn.Module) or the condensed set (a Table), of the first seed. metrics: its test metrics,
    mean over seeds. control: the same of the control. gain: how much better than the control, in the deciding metric.
    folder: recipe, logs, weights, result.json and report.html.
    """

    artefact: Any
    metrics: dict[str, float]
    control: dict[str, float]
    gain: Gain
    verdict: str
    folder: Path
    arms: dict[str, list[Outcome]] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"{self.verdict} ({self.folder})"
