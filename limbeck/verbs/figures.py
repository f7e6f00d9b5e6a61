"""Which numbers a measure gives, and which measure gives a number: found by asking it about eight made-up examples."""

from collections.abc import Mapping

import torch
import torch.nn.functional as F

from limbeck.core import find, knobs
from limbeck.core.errors import BadInput, nearest
from limbeck.recipe import Spec
from limbeck.verbs.robust import SEVERITIES, stamps

# what measures may ask for where there are class labels or none, and where labels are pictures
TOLD = {"student_logits", "teacher_logits", "student_map", "teacher_map", "labels"}
WRITTEN = {"student_answers", "real_answers"}
DRAFTED = {"student_drafts", "teacher_calls"}
SECRET = {"student_secrets"}
SHOWN = {"student_picture", "real_picture", "student_samples", "real_samples"}
COSTS = ("latency", "size", "parameters")  # always measured; a recipe may name them


def figures(spec: Spec, classes: int = 2, *, teacher: bool = True, paired: bool | None = None) -> list[str]:
    """The names of the numbers that a measure gives, [] when it is left out: costs, and what needs an absent teacher.

    paired: whether labels are pictures, None when that is not known yet. Raises BadInput for a measure that does not
    exist or asks for what there is not, and ValueError for a knob out of its range.
    """
    name, given = knobs.split(spec, "measure")
    if name in COSTS:
        return []
    measure = find.get(name)
    if find.family(name) != "measure":
        raise BadInput(f"{name!r} is a method of {find.folder(name)}, not a measure")
    given, asks = knobs.check(name, measure, given), find.needs(measure)
    if any(n.startswith("teacher_") for n in asks) and not teacher:
        return []
    labels = torch.arange(8) % classes
    rows = F.one_hot(labels, classes).float()
    have = {"student_logits": rows, "teacher_logits": rows, "labels": labels}
    have |= dict.fromkeys(("student_map", "teacher_map"), rows[:, :, None, None])
    if find.folder(name) == "measure/robust" and not stamps(measure):
        have["student_logits"] = rows.expand(SEVERITIES + 1, *rows.shape)
    have |= dict.fromkeys(SHOWN, rows[:, :, None, None]) | dict.fromkeys(WRITTEN, labels[:, None])
    have |= {"student_drafts": torch.ones(8, 2), "teacher_calls": torch.ones(8), "student_secrets": torch.ones(8, 2)}
    texts = WRITTEN | DRAFTED | SECRET
    able = SHOWN if paired else TOLD | texts if paired is False else TOLD | SHOWN | texts
    lacking = [n for n in asks if n not in able]
    if lacking:
        told = "but labels here are pictures; `psnr` compares such" if paired else "which no classifier gives"
        raise BadInput(f"`{name}` asks for {', '.join(lacking)}, {told}")
    values = measure(*[have[n] for n in asks], **given)
    return list(values) if isinstance(values, Mapping) else [name]


def measure_of(figure: str) -> str:
    """The measure that gives a number: calibration for "ece". Raises BadInput with the nearest numbers."""
    known: dict[str, str] = {}
    able = TOLD | SHOWN | WRITTEN | DRAFTED | SECRET
    for name in find.names():
        if find.family(name) == "measure" and set(find.needs(find.get(name))) <= able:
            known |= dict.fromkeys(figures(name), name)
    if figure not in known:
        raise BadInput(f"no measure gives {figure!r}{nearest(figure, known)}")
    return known[figure]
