"""limbeck: one house for distillation. Teach a student, shorten a sampler, condense a data set, shape the vessel.

import limbeck
result = limbeck.teach(teacher, student, "fashion_mnist_small", match=["ce", "kd"], epochs=5)
print(result.gain, result.folder)
"""

import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from limbeck.adapters.trainer import DistillationTrainer
    from limbeck.api import condense, shape, shorten, teach
    from limbeck.core.find import get, knobs, names, needs
    from limbeck.recipe import Recipe
    from limbeck.run import run
    from limbeck.verbs.result import Result

__version__ = "0.1.0"
__all__ = [
    "DistillationTrainer",
    "Recipe",
    "Result",
    "condense",
    "get",
    "knobs",
    "names",
    "needs",
    "run",
    "shape",
    "shorten",
    "teach",
]

_WHERE = {
    "DistillationTrainer": "limbeck.adapters.trainer",
    "teach": "limbeck.api",
    "condense": "limbeck.api",
    "shorten": "limbeck.api",
    "shape": "limbeck.api",
    "get": "limbeck.core.find",
    "names": "limbeck.core.find",
    "needs": "limbeck.core.find",
    "knobs": "limbeck.core.find",
    "Recipe": "limbeck.recipe",
    "Result": "limbeck.verbs.result",
    "run": "limbeck.run",
}


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module 'limbeck' has no attribute {name!r}")
    import importlib

    value = globals()[name] = getattr(importlib.import_module(_WHERE[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])


class _Package(ModuleType):
    """`limbeck.run` and `limbeck.shape` stay functions when the modules of the same name are imported."""

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in _WHERE and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
