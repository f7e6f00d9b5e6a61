"""The report's plots as small inline SVG: colours are the page's own (light and dark), text stays text."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

from limbeck.report import numerals
from limbeck.report.logs import Curve

WIDTH, HEIGHT = 340, 230
LEFT, RIGHT, TOP, BOTTOM = 44, 10, 10, 30


@dataclass(frozen=True)
class Line:
    """A curve with its colour class and the name shown in the legend and on hover."""

    name: str
    colour: str
    curve: Curve


@dataclass(frozen=True)
class Column:
    """One arm of the seeds plot: a dot a seed (nan where a seed is missing)."""

    name: str
    colour: str
    values: tuple[float, ...]
    mean: str


def ticks(low: float, high: float, most: int = 5) -> list[float]:
    """Round numbers inside [low, high], at most `most` of them."""
    if not high > low:
        return [low]
    raw = (high - low) / most
    power = 10.0 ** math.floor(math.log10(raw))
    for base in (1, 2, 2.5, 5, 10, 20, 25, 50):
        step = base * power
        first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
        if last - first + 1 <= most:
            return [i * step for i in range(first, last + 1)]
    return [low, high]


def tick_text(value: float, step: float) -> str:
    """A tick with as many decimals as its step needs."""
    if value != 0 and (abs(value) >= 1e6 or step < 1e-4):
        return numerals.minus(f"{value:.3g}")
    decimals = next((d for d in range(6) if math.isclose(step, round(step, d), rel_tol=1e-6)), 6)
    return numerals.minus(f"{value + 0.0:,.{decimals}f}")


def wrapped(name: str, room: int) -> list[str]:
    """The name on at most two lines of `room` characters, cut with an ellipsis where it is longer."""
    rows = [""]
    for word in name.split():
        joined = f"{rows[-1]} {word}".strip()
        if rows[-1] and len(joined) > room:
            rows.append(word)
        else:
            rows[-1] = joined
    if len(rows) > 2:
        rows = [rows[0], " ".join(rows[1:])]
    return [row if len(row) <= room else row[: max(1, room - 1)] + "…" for row in rows]


@dataclass(frozen=True)
class Axis:
    """A scale from values to pixels, linear or logarithmic, with its ticks."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def at(self, value: float) -> float:
        low, high, x = (math.log10(v) if self.log else v for v in (self.low, self.high, value))
        return self.start + (self.end - self.start) * ((x - low) / (high - low) if high > low else 0.5)

    def ticks(self, most: int) -> list[tuple[float, str]]:
        if self.log:
            first, last = math.ceil(math.log10(self.low) - 1e-9), math.floor(math.log10(self.high) + 1e-9)
            step = max(1, math.ceil((last - first + 1) / most))
            return [(10.0**p, numerals.plain(10.0**p)) for p in range(first, last + 1, step)]
        places = ticks(self.low, self.high, most)
        gap = places[1] - places[0] if len(places) > 1 else 1.0
        return [(p, tick_text(p, gap)) for p in places]


def padded(values: Sequence[float], share: float = 0.08) -> tuple[float, float]:
    """The range of values with some air; a single value gets a range around it."""
    low, high = min(values), max(values)
    air = (high - low) * share or abs(high) * 0.05 or 0.5
    return low - air, high + air


def lines(curves: Sequence[Line], *, percent: bool, title: str, stages: Sequence[float] = ()) -> Markup:
    """Curves over training steps. percent: values are fractions, shown times 100. stages: where a stage begins."""
    factor = 100.0 if percent else 1.0
    points = [(x, y * factor) for line in curves for x, y in line.curve]
    if not points:
        return Markup("")
    values = [y for _, y in points]
    log = not percent and min(values) > 0 and max(values) / min(values) >= 100
    if log:
        low, high = min(values) / 1.2, max(values) * 1.2
    else:
        low, high = padded(values)
        low = max(low, 0.0) if min(values) >= 0 else low
        high = min(high, 100.0) if percent and max(values) <= 100 else high
    y = Axis(low, high, HEIGHT - BOTTOM, TOP, log)
    first, last = min(p for p, _ in points), max(p for p, _ in points)
    x = Axis(0.0 if 0 < first < 0.2 * last else first, last, LEFT, WIDTH - RIGHT)
    parts = [*horizontal(y), *below(x)]
    for start in stages:
        if x.low < start < x.high:
            parts.append(f'<path class="stage" d="M{x.at(start):.1f} {TOP}V{HEIGHT - BOTTOM}"/>')
    for line in curves:
        shown = [(x.at(px), y.at(py * factor)) for px, py in line.curve]
        if len(shown) == 1:
            drawn = f'<circle class="dot" cx="{shown[0][0]:.1f}" cy="{shown[0][1]:.1f}" r="3"/>'
        else:
            drawn = f'<polyline class="line" points="{" ".join(f"{a:.1f},{b:.1f}" for a, b in shown)}"/>'
        parts.append(f'<g class="{line.colour}"><title>{escape(line.name)}</title>{drawn}</g>')
    return drawing(title, parts)


def seeds(
    columns: Sequence[Column], *, percent: bool, title: str, pair: tuple[int, int] | None, names: Sequence[str]
) -> Markup:
    """A dot a seed in a column an arm; the lines join the same seed of the two columns in `pair`."""
    factor = 100.0 if percent else 1.0
    values = [v * factor for c in columns for v in c.values if math.isfinite(v)]
    if not values:
        return Markup("")
    low, high = padded(values, 0.12)
    bottom = HEIGHT - 58
    y = Axis(low, high, bottom, TOP)
    step = (WIDTH - LEFT - RIGHT) / len(columns)
    centres = [LEFT + step * (i + 0.5) for i in range(len(columns))]
    parts = horizontal(y)
    if pair:
        (a, b), (first, second) = pair, (columns[pair[0]], columns[pair[1]])
        for v, w in zip(first.values, second.values, strict=False):
            if math.isfinite(v) and math.isfinite(w):
                path = f"M{centres[a]:.1f} {y.at(v * factor):.1f}L{centres[b]:.1f} {y.at(w * factor):.1f}"
                parts.append(f'<path class="pair" d="{path}"/>')
    room = max(3, int(step / 6.2))
    for centre, column in zip(centres, columns, strict=True):
        finite = [v * factor for v in column.values if math.isfinite(v)]
        parts.append(f'<g class="{column.colour}">')
        if finite:
            mean = y.at(sum(finite) / len(finite))
            parts.append(f'<path class="mean" d="M{centre - 13:.1f} {mean:.1f}h26"/>')
        for i, v in enumerate(column.values):
            if math.isfinite(v):
                name = f"seed {names[i] if i < len(names) else i}: {numerals.bare('accuracy' if percent else '', v)}"
                dot = f'<circle class="dot" cx="{centre:.1f}" cy="{y.at(v * factor):.1f}" r="4"/>'
                parts.append(f"<g><title>{escape(name)}</title>{dot}</g>")
        parts.append("</g>")
        rows = wrapped(column.name, room)
        for i, row in enumerate(rows):
            parts.append(f'<text class="name" x="{centre:.1f}" y="{bottom + 19 + 14 * i}">{escape(row)}</text>')
        parts.append(
            f'<text class="under" x="{centre:.1f}" y="{bottom + 20 + 14 * len(rows)}">{escape(column.mean)}</text>'
        )
    return drawing(title, parts)


def strip(differences: Sequence[float], mean: float, low: float, high: float, *, reach: float, title: str) -> Markup:
    """The gain on a line, fluid in width: worse than the control to the left of zero, better to the right.

    reach: the value at the right end; the left end is -reach, so that strips of one metric can share a scale.
    """
    if not (math.isfinite(mean) and reach > 0):
        return Markup("")

    def at(value: float) -> str:
        return f"{50 + 47 * max(-1.0, min(1.0, value / reach)):.2f}%"

    parts = [
        '<line class="rule" x1="0" x2="100%" y1="15" y2="15"/>',
        '<line class="zero" x1="50%" x2="50%" y1="3" y2="27"/>',
    ]
    if math.isfinite(low) and math.isfinite(high):
        parts.append(f'<line class="bar" x1="{at(low)}" x2="{at(high)}" y1="15" y2="15"/>')
    parts += [f'<circle class="seed" cx="{at(d)}" cy="15" r="3"/>' for d in differences if math.isfinite(d)]
    parts.append(f'<circle class="centre" cx="{at(mean)}" cy="15" r="5"/>')
    name = escape(title)
    return Markup(f'<svg class="strip" role="img" aria-label="{name}"><title>{name}</title>{"".join(parts)}</svg>')


def horizontal(y: Axis) -> list[str]:
    """Grid lines and the numbers at their left."""
    parts = []
    for value, label in y.ticks(5):
        place = y.at(value)
        parts.append(f'<path class="grid" d="M{LEFT} {place:.1f}H{WIDTH - RIGHT}"/>')
        parts.append(f'<text class="left" x="{LEFT - 7}" y="{place + 4:.1f}">{label}</text>')
    return parts


def below(x: Axis) -> list[str]:
    """The numbers under the plot, as far as they leave room for the word 'steps' at its end."""
    parts = [f'<text class="left" x="{WIDTH - RIGHT}" y="{HEIGHT - BOTTOM + 18}">steps</text>']
    for value, label in x.ticks(5):
        place = x.at(value)
        if place + 3.5 * len(label) < WIDTH - RIGHT - 36:
            parts.append(f'<text class="under" x="{place:.1f}" y="{HEIGHT - BOTTOM + 18}">{label}</text>')
    return parts


def drawing(title: str, parts: Sequence[str]) -> Markup:
    """The parts as one picture, with its title for those who cannot see it."""
    box, name = f"0 0 {WIDTH} {HEIGHT}", escape(title)
    return Markup(f'<svg class="plot" viewBox="{box}" role="img" aria-label="{name}">{"".join(parts)}</svg>')
