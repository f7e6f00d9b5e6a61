"""A method's knobs against what a recipe or a caller gave: unknown names, wrong types and schedules, in one place."""

import inspect
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any, get_type_hints

from pydantic import TypeAdapter, ValidationError

from limbeck.core import find, schedule
from limbeck.core.errors import BadInput, nearest


def annotations(thing: Any) -> dict[str, Any]:
    """Knob -> its type, from the signature of a function, module class or training method."""
    target = thing.__init__ if inspect.isclass(thing) and not is_dataclass(thing) else thing
    hints = get_type_hints(target)
    names = [f.name for f in fields(thing)] if is_dataclass(thing) else list(find.knobs(thing))
    return {name: hints.get(name, Any) for name in names}


def check(name: str, thing: Any, given: Mapping[str, Any] | None, *, schedules: bool = False) -> dict[str, Any]:
    """`given` with its values converted to the knobs' types. Raises BadInput for an unknown knob or a wrong type.

    schedules: whether a number may be a schedule such as {"linear": [1, 0]}.
    """
    types, checked = annotations(thing), {}
    for key, value in (given or {}).items():
        if key not in types:
            raise BadInput(f"`{name}` has no knob {key!r}{nearest(str(key), types) or '; it has none'}")
        if schedules and schedule.is_schedule(value):
            schedule.value(value, 0.0)
            checked[key] = value
            continue
        try:
            checked[key] = TypeAdapter(types[key]).validate_python(value)
        except ValidationError as error:
            wanted = getattr(types[key], "__name__", str(types[key]))
            raise BadInput(f"`{name}.{key}` must be {wanted}, got {value!r} ({error.errors()[0]['msg']})") from error
    return checked


def make(name: str, given: Mapping[str, Any] | None = None) -> Any:
    """A training method by name with its knobs, ready for the loop; ranges are checked by the method itself."""
    cls = find.get(name)
    if not hasattr(cls, "step"):
        raise BadInput(f"{name!r} is a method of {find.folder(name)}, not a training method")
    return cls(**check(name, cls, given))


def split(spec: Any, what: str = "method") -> tuple[str, dict[str, Any]]:
    """Name and knobs of "dm" or {"dm": {"ipc": 10}}."""
    if isinstance(spec, str):
        return spec, {}
    if isinstance(spec, Mapping) and len(spec) == 1:
        ((name, given),) = spec.items()
        if given is None or isinstance(given, Mapping):
            return str(name), dict(given or {})
    raise BadInput(f"a {what} is written `name` or `name: {{knob: value}}`, got {spec!r}")
