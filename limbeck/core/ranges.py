"""Common ranges of knobs, several knobs at once."""

from limbeck.core.card import require


def at_least(low: float, **knobs: float) -> None:
    """Raise ValueError unless each of the named values is `low` or more."""
    for name, value in knobs.items():
        require(value >= low, name, value, f">= {low}")


def above(low: float, **knobs: float) -> None:
    """Raise ValueError unless each of the named values is more than `low`."""
    for name, value in knobs.items():
        require(value > low, name, value, f"> {low}")
