"""What is matched: a list of losses with weights and knobs, each asking for tensors by argument name."""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import Tensor, nn

from limbeck.core import find, knobs, schedule
from limbeck.core.errors import BadInput
from limbeck.core.reduce import Part, mean


@dataclass(frozen=True)
class Match:
    """One loss with its weight and knobs, each a number or a schedule.

    name: in logs. loss: a function or an nn.Module class. weight: factor on its mean.
    """

    name: str
    loss: Callable[..., Any]
    knobs: dict[str, Any]
    weight: Any = 1.0

    @cached_property  # asked for in every step, and a signature takes as long to read as a small loss to compute
    def needs(self) -> list[str]:
        """Names that the loss must be given."""
        return find.needs(self.loss)

    @cached_property
    def wants(self) -> list[str]:
        """Names that the loss takes when they are there."""
        return find.wants(self.loss)

    @property
    def is_module(self) -> bool:
        """Whether the loss owns weights or memory."""
        return inspect.isclass(self.loss)

    def build(self, shapes: Mapping[str, Any]) -> nn.Module:
        """Make the loss module from the shapes of what it asks for, with its knobs at the start of training."""
        asks = [
            p.name
            for p in inspect.signature(self.loss).parameters.values()
            if p.kind == inspect.Parameter.POSITIONAL_OR_KEYWORD
        ]
        start = {k: schedule.value(v, 0.0) for k, v in self.knobs.items()}
        built: nn.Module = self.loss(*[pick(self.name, n, shapes) for n in asks], **start)
        return built

    def part(self, have: Mapping[str, Any], progress: float, module: nn.Module | None = None) -> Part:
        """The weighted mean of the loss on what is at hand."""
        positional = [pick(self.name, n, have) for n in self.needs]
        optional = {n: have[n] for n in self.wants if n in have}
        now = {k: schedule.value(v, progress) for k, v in self.knobs.items()}
        if module is None:
            values: Tensor = self.loss(*positional, **optional, **now)
        else:
            for name, value in now.items():
                if schedule.is_schedule(self.knobs[name]):
                    setattr(module, name, value)
            values = module(*positional, **optional)
        weight: float = schedule.value(self.weight, progress)
        return weight * mean(values, have.get("mask"))


def pick(loss: str, name: str, have: Mapping[str, Any]) -> Any:
    """have[name], or one sentence that says what the network returns instead."""
    if name in have:
        return have[name]
    side, _, rest = name.partition("_")
    if side in ("student", "teacher") and rest:
        there = sorted(k.removeprefix(f"{side}_") for k in have if k.startswith(f"{side}_"))
        raise BadInput(
            f"`{loss}` asks for {name}, but the {side} returns {', '.join(there) or 'nothing'}; "
            f"tap its layers (taps: {{{rest}: [path, ...]}}) or return {rest!r} from its forward"
        )
    raise BadInput(f"`{loss}` asks for {name!r}, but the batch holds {', '.join(sorted(have)) or 'nothing'}")


def parse(spec: Any) -> Match:
    """A Match from "kd", {"kd": {"temperature": 4, "weight": 0.9}}, a function or an nn.Module class."""
    if isinstance(spec, Match):
        return spec
    options: dict[str, Any] = {}
    if isinstance(spec, Mapping):
        if len(spec) != 1:
            raise BadInput(f"a loss is written `name` or `name: {{knob: value}}`, found {dict(spec)!r}")
        ((name, given),) = spec.items()
        options = {"weight": given} if isinstance(given, (int, float)) else dict(given or {})
    else:
        name = spec
    if isinstance(name, str):
        loss = find.get(name)
        if find.family(name) != "losses":
            raise BadInput(f"{name!r} is a method of {find.folder(name)}, not a loss")
    else:
        loss, name = name, name.__name__.lower()
    weight = options.pop("weight", 1.0)
    return Match(name, loss, knobs.check(name, loss, options, schedules=True), weight)
