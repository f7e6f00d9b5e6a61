"""Files that a report writes are whole or absent: written beside their place, then moved into it."""

import math
import os
import tempfile
from pathlib import Path
from typing import Any

from limbeck.core.errors import LimbeckError


def write(path: Path, content: bytes) -> Path:
    """Write atomically; a full disk or a closed folder gives one sentence and leaves what was there."""
    part = ""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, part = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        # mkstemp makes private files; a report is as readable as any file that the user makes.
        mask = os.umask(0)
        os.umask(mask)
        os.chmod(part, 0o666 & ~mask)
        os.replace(part, path)
    except OSError as error:
        if part:
            Path(part).unlink(missing_ok=True)
        raise LimbeckError(f"{path} cannot be written: {error.strerror or error}; nothing was changed") from None
    return path


def plain(tree: Any) -> Any:
    """The same with None for nan and infinities, which JSON does not know: an interval needs two seeds."""
    if isinstance(tree, dict):
        return {key: plain(value) for key, value in tree.items()}
    if isinstance(tree, (list, tuple)):
        return [plain(value) for value in tree]
    return None if isinstance(tree, float) and not math.isfinite(tree) else tree
