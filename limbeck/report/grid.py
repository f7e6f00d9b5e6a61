"""Grids of small pictures side by side, each under its title, as one PNG."""

import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from limbeck.core.errors import BadInput
from limbeck.report.files import write

if TYPE_CHECKING:
    from torch import Tensor

Images = "np.ndarray[Any, Any] | Tensor"
Pixels = np.ndarray[Any, np.dtype[np.float64]]
TITLE, LABEL, GAP, BETWEEN, MARGIN = 34, 18, 2, 28, 12  # pixels
BROKEN = (0.85, 0.2, 0.2)  # a pixel that is not finite stands out


def grid(
    panels: "Mapping[str, np.ndarray[Any, Any] | Tensor]",
    out: Path,
    *,
    columns: int = 5,
    labels: Sequence[str] = (),
    low: float | None = None,
    high: float | None = None,
    scale: int = 0,
) -> Path:
    """Draw every panel's images in rows of `columns`, the panels side by side, and write `out` as a PNG.

    panels: title -> images [N, C, H, W] (or [N, H, W]), C is 1 or 3. columns: images a row, at least 1.
    labels: a name for each image (N of them, under it) or each row (one a row, at its left), the same for all panels.
    low, high: values drawn black and white in all panels; None takes them from the first, so put the reference first:
    a wild panel beside it can then not wash it out.
    scale: screen pixels a picture pixel, 0 chooses it so that an image is about 64 pixels wide.
    """
    if not panels:
        raise BadInput("a picture grid needs at least one panel, found none")
    if columns < 1:
        raise BadInput(f"columns must be >= 1, found {columns}")
    arrays = {title: pixels(title, images) for title, images in panels.items()}
    first = next(iter(arrays.values()))
    finite = first[np.isfinite(first)]
    bottom = low if low is not None else float(finite.min()) if finite.size else 0.0
    top = high if high is not None else float(finite.max()) if finite.size else 1.0
    height, width = (max(a.shape[axis] for a in arrays.values()) for axis in (1, 2))
    zoom = scale or max(1, round(64 / width))
    count = max(len(a) for a in arrays.values())
    across = min(columns, count)
    down = math.ceil(count / across)
    each = len(labels) == count and len(labels) != down
    if labels and not each and len(labels) != down:
        raise BadInput(f"labels must name each image ({count}) or each row ({down}), found {len(labels)} labels")
    aside = 8 * max(map(len, labels)) if labels and not each else 0
    step_x, step_y = width * zoom + GAP, height * zoom + GAP + (LABEL if each else 0)
    panel_width = across * step_x - GAP
    total_width = 2 * MARGIN + aside + len(arrays) * panel_width + (len(arrays) - 1) * BETWEEN
    titled = any(arrays)
    total_height = 2 * MARGIN + (TITLE if titled else 0) + down * step_y - GAP
    canvas = np.ones((total_height, total_width, 3))
    words: list[tuple[float, float, str, str, float]] = []  # x, y from the top, text, alignment, size
    start = MARGIN + (TITLE if titled else 0)
    for p, (title, images) in enumerate(arrays.items()):
        x0 = MARGIN + aside + p * (panel_width + BETWEEN)
        words.append((x0, MARGIN + TITLE / 2 - 4, shortened(title, panel_width, 9.2), "left", 16))
        for i, image in enumerate(images):
            x, y = x0 + (i % across) * step_x, start + (i // across) * step_y
            drawn = colours(image, bottom, top).repeat(zoom, 0).repeat(zoom, 1)
            canvas[y : y + drawn.shape[0], x : x + drawn.shape[1]] = drawn
            if each:
                name = shortened(labels[i], step_x, 5.6)
                words.append((x + width * zoom / 2, y + height * zoom + LABEL / 2, name, "center", 10))
    for row, name in enumerate(labels if not each else ()):
        words.append((MARGIN + aside - 8, start + row * step_y + height * zoom / 2, name, "right", 12))
    return write(out, png(canvas, words))


def pixels(title: str, images: object) -> Pixels:
    """[N, H, W, C] float64 from a tensor or an array in the order of torch."""
    if hasattr(images, "detach"):
        images = images.detach().cpu().double().numpy()
    array: Pixels = np.asarray(images, dtype=np.float64)
    array = array[:, None] if array.ndim == 3 else array
    if array.ndim != 4 or array.shape[1] not in (1, 3) or 0 in array.shape:
        raise BadInput(f"panel {title!r}: expected images [N, C, H, W] with C 1 or 3, found shape {list(array.shape)}")
    return array.transpose(0, 2, 3, 1)


def colours(image: Pixels, low: float, high: float) -> Pixels:
    """[H, W, 3] in [0, 1]; grey becomes three equal channels, what is not finite becomes red."""
    broken = ~np.isfinite(image).all(-1)
    shown = np.clip((np.nan_to_num(image) - low) / ((high - low) or 1.0), 0.0, 1.0)
    shown = np.repeat(shown, 3 // shown.shape[-1], axis=-1)
    shown[broken] = BROKEN
    return shown


def shortened(text: str, room: float, letter: float) -> str:
    """The text cut to `room` pixels at `letter` pixels a letter."""
    most = max(2, int(room / letter))
    return text if len(text) <= most else text[: most - 1] + "…"


def png(canvas: Pixels, words: Sequence[tuple[float, float, str, str, float]]) -> bytes:
    """The canvas pixel for pixel with its words on top."""
    height, width = canvas.shape[:2]
    figure = Figure(figsize=(width / 100, height / 100), dpi=100)
    FigureCanvasAgg(figure)
    figure.figimage(np.rint(canvas * 255).astype(np.uint8), origin="upper")
    for x, y, text, align, points in words:
        # parse_math off: a class named '$x$' is a name, not a formula.
        figure.text(
            x / width,
            1 - y / height,
            text,
            ha=align,
            va="center",
            fontsize=points * 0.72,
            color="#26282b",
            parse_math=False,
        )
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()
