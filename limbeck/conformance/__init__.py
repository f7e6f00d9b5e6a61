"""The conformance suite: every rule of the house, for every method found; nothing here names a method.

`run(name)` applies every check that concerns one method and says what came out; `limbeck check NAME` prints it. A check
is a function `check_something(name)` in cards (all methods), losses, training, shaping, selecting (data) or measuring;
`loop` holds what the loop promises whatever the method. What a method cannot keep it declares in its own card, with a
reason: exceptions={"batch order": "why"}. An exception that is not needed fails too.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from limbeck.conformance.stubs import stub
    from limbeck.conformance.suite import Outcome, checks, run, self_test

__all__ = ["Outcome", "checks", "run", "self_test", "stub"]


def __getattr__(name: str) -> Any:
    """Loaded when asked for: writing a stub needs no torch."""
    if name == "stub":
        from limbeck.conformance.stubs import stub

        return stub
    if name in __all__:
        from limbeck.conformance import suite

        return getattr(suite, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
