"""The errors that a user may meet: each is one sentence with what, found, expected and the cure."""

import difflib
from collections.abc import Iterable


class LimbeckError(Exception):
    """Anything limbeck raises on purpose; the command line prints it without a traceback and exits with `code`."""

    code = 1


class BadInput(LimbeckError, ValueError):
    """The user's input (recipe, option, data, model) cannot be used; nothing was written."""

    code = 2


class MissingExtra(BadInput, ImportError):
    """An optional library is absent; the sentence names the extra that brings it."""

    def __init__(self, library: str, extra: str) -> None:
        super().__init__(f"{library!r} is not installed; it comes with the extra: pip install 'limbeck[{extra}]'")


class BadCheckpoint(LimbeckError):
    """A checkpoint is torn, corrupt or of another run."""


class Diverged(LimbeckError):
    """A loss became infinite or nan."""


class Interrupted(LimbeckError):
    """The run was stopped by a signal after its state was saved in `folder`."""

    code = 130

    def __init__(self, folder: str) -> None:
        super().__init__(f"interrupted; the state is saved in {folder}")
        self.folder = folder


def nearest(name: str, known: Iterable[str]) -> str:
    """'; did you mean `a` or `b`?' for the closest known names, or the short list of all, or ''."""
    known = sorted(known)
    close = difflib.get_close_matches(name, known, 3, cutoff=0.55)
    if close:
        return "; did you mean " + " or ".join(f"`{c}`" for c in close) + "?"
    return "; known: " + ", ".join(known) if 0 < len(known) <= 30 else ""
