"""The one decorator: it attaches a method's card and registers nothing; the file tree is the registry."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

T = TypeVar("T")


@dataclass(frozen=True)
class Card:
    """What a method says of itself.

    paper: authors, year and the equation or algorithm. year: of first publication. arxiv: identifier or ''.
    code: official code as 'owner/repo@commit:path', or ''. differs: where this departs from paper or code.
    row: catalogue keys that the method fulfils (the file stem when empty). variant_of: the method it varies.
    zero_at_match: the loss is exactly 0 when student equals teacher. exact_accumulation: two half-batches give the
    gradient of one. exceptions: conformance check -> reason why it cannot hold; shown in the catalogue. head: for a
    loss of vocabulary logits, (*, its knobs) -> `core.headloss.Term`, the same from hidden states, without logits.
    """

    paper: str
    year: int
    arxiv: str = ""
    code: str = ""
    differs: str = ""
    row: tuple[str, ...] = ()
    variant_of: str = ""
    zero_at_match: bool = False
    exact_accumulation: bool = False
    exceptions: dict[str, str] = field(default_factory=dict)
    head: Callable[..., Any] | None = None


class Carded(Protocol):
    """Anything that `@method` has been put on."""

    card: Card
    __name__: str


def method(
    *,
    paper: str,
    year: int,
    arxiv: str = "",
    code: str = "",
    differs: str = "",
    row: str | tuple[str, ...] = (),
    variant_of: str = "",
    zero_at_match: bool = False,
    exact_accumulation: bool = False,
    exceptions: dict[str, str] | None = None,
    head: Callable[..., Any] | None = None,
) -> Callable[[T], T]:
    """Attach a `Card` to a function or class as `.card`."""
    rows = (row,) if isinstance(row, str) else row
    made = Card(
        paper, year, arxiv, code, differs, rows, variant_of, zero_at_match, exact_accumulation, exceptions or {}, head
    )

    def attach(thing: T) -> T:
        thing.card = made  # type: ignore[attr-defined]
        return thing

    return attach


def require(ok: bool, name: str, value: object, want: str) -> None:
    """Raise one clear ValueError unless `ok`: "`temperature` must be > 0, got -1"."""
    if not ok:
        raise ValueError(f"`{name}` must be {want}, got {value!r}")
