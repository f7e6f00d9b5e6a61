"""Which layers of a recipe's student and teacher to match, proposed from one batch of its training data."""

from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
import yaml

from limbeck.core.batches import Batches
from limbeck.core.errors import BadInput
from limbeck.core.layers import Pairing, propose, taps_of
from limbeck.recipe import load
from limbeck.report.tables import aligned
from limbeck.verbs import build

EXAMPLES = 256  # CKA needs more examples than classes to tell layers apart; this many are quick to run


def pairs(path: Path) -> list[Pairing]:
    """Proposed pairs for a `teach` recipe, shallow to deep. The student is the recipe's: random unless it has weights.

    Nothing is written or trained, but a teacher that the recipe trains first.
    """
    recipe = load(path)
    if recipe.stages or recipe.teacher is None or recipe.student is None:
        raise BadInput(f"{path}: layers are matched between a `teacher` and a `student` of a recipe of one stage")
    roles = {"teacher": {"taps": None}, "student": {"taps": None}}
    plain = recipe.with_changes({**roles, "match": ["ce"], "method": None, "store": None, "beside": None})
    with TemporaryDirectory() as folder:
        made = build.setting(plain, Path(folder) / "run", None, False)
        assert made.teacher is not None
        torch.manual_seed(0)
        examples = min(EXAMPLES, len(made.splits.train))
        batch = next(Batches(made.splits.train, examples, seed=0))
        return propose(made.build("student"), made.teacher, batch)


def lines(found: Sequence[Pairing]) -> list[str]:
    """A table: student layer, teacher layer, their shapes, how alike they are (CKA), and the projector."""
    head = ("student", "gives", "teacher", "gives", "alike", "projector")
    cells = [head] + [
        (p.student, _shape(p.student_shape), p.teacher, _shape(p.teacher_shape), f"{p.alike:.2f}", p.projector)
        for p in found
    ]
    return aligned(cells)


def _shape(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))


def written(found: Sequence[Pairing]) -> str:
    """What a recipe says to tap these layers, YAML."""
    taps = {role: {"taps": names} for role, names in taps_of(found).items()}
    return yaml.safe_dump(taps, sort_keys=False, default_flow_style=None, width=110).rstrip()
