"""The capacity-gap law: for a student of given size, a teacher too large teaches worse than the best one.

Zhang et al. 2023 (arXiv 2311.07052): the best teacher's size is linear in the student's, by a ratio of about 2.5. It
was found by pruning and distilling GPT-2 (140M to 1.6B) and Pythia (70M to 2.8B), and confirmed from 7B to 3B.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from limbeck.core.errors import BadInput

RATIO = 2.5  # teacher's parameters over the student's
TEACHERS = (70e6, 7e9)  # parameters of the teachers that it was found and confirmed with


@dataclass(frozen=True)
class Ladder:
    """What a ladder of teachers came to: the ratio of the best teacher's size to the student's, and each student's."""

    ratio: float
    best: dict[float, float]


def width_sparsity(sparsity: float) -> float:
    """Share of the width, and of the units of each layer, to cut so that `sparsity` of all weights go, in [0, 0.9]."""
    if not 0 <= sparsity <= 0.9:
        raise BadInput(f"sparsity must be in [0, 0.9], got {sparsity}")
    return 1 - float(np.sqrt(1 - sparsity))


def ladder(rows: Sequence[tuple[float, float, float]]) -> Ladder:
    """The ratio from runs (student's parameters, teacher's parameters, student's loss), all of equal training.

    For each student the best teacher is the vertex of a parabola in log size through the lowest loss and its
    neighbours; the ratio is the geometric mean over students. Each needs three teachers, the best one in between.
    """
    best: dict[float, float] = {}
    for size in sorted({row[0] for row in rows}):
        mine = sorted((np.log(teacher), loss) for student, teacher, loss in rows if student == size)
        low = min(range(len(mine)), key=lambda i: mine[i][1])
        if not 0 < low < len(mine) - 1:
            raise BadInput(
                f"of {len(mine)} teachers of the student with {size:.3g} parameters the best is the smallest or the "
                "largest one: widen the ladder"
            )
        x, y = np.array(mine[low - 1 : low + 2]).T
        curve, slope, _ = np.polyfit(x - x[1], y, 2)
        best[size] = float(np.exp(x[1] - slope / (2 * curve)))
    if not best:
        raise BadInput("a ladder of teachers needs runs, found none")
    return Ladder(float(np.exp(np.mean([np.log(teacher / student) for student, teacher in best.items()]))), best)
