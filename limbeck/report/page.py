"""report.html: one self-contained page for one run or several, with no script and no request to anywhere."""

import base64
import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import cache
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template
from markupsafe import Markup

from limbeck.report import cite, costs, numerals, svg
from limbeck.report.costs import Figure
from limbeck.report.files import write
from limbeck.report.logs import Log, average, logs
from limbeck.report.runs import Arm, ExtraTable, Run, read_all

TEMPLATES = Path(__file__).parent / "templates"
MARKS = {"helped": "▲", "did not help": "▼", "cannot tell": "◆"}
MOST_COLUMNS, MOST_PARTS, MOST_PLAYERS, MOST_METRICS = 6, 6, 4, 2


@dataclass(frozen=True)
class Plot:
    """A plot with its title and legend of (colour class, name)."""

    title: str
    note: str
    legend: tuple[tuple[str, str], ...]
    drawing: Markup


@dataclass(frozen=True)
class Row:
    """A line of the table of arms: what, in which unit, and for each arm the text and its '± x'."""

    name: str
    unit: str
    cells: tuple[tuple[str, str], ...]
    kind: str


@dataclass(frozen=True)
class Shown:
    """One run, worked out for the page."""

    anchor: str
    run: Run
    state: str
    mark: str
    when: str
    metric: str
    gain: str
    interval: str
    size: tuple[str, str]
    speed: tuple[str, str]
    seconds: str
    strip: Markup  # on the run's own scale
    shared: Markup  # on the scale of all runs of its metric
    figures: tuple[Figure, ...]
    arms: tuple[tuple[str, str, str], ...]
    rows: tuple[Row, ...]
    plots: tuple[Plot, ...]
    pictures: tuple[tuple[str, str, str], ...]
    tables: tuple[ExtraTable, ...]
    notes: tuple[str, ...]
    colophon: tuple[tuple[str, str], ...]


def html(runs: Sequence[Path], out: Path, *, title: str = "") -> Path:
    """Write the report of the run folders to `out` (a file, or a folder that gets report.html) and return its path.

    title: the page's heading; '' takes the run's name, or counts the runs.
    """
    read = read_all(runs)
    path = out / "report.html" if out.is_dir() else out
    return write(path, render(read, title).encode("utf-8", "replace"))


def render(runs: Sequence[Run], title: str = "") -> str:
    """The page as text."""
    reach = reaches(runs)
    shown = [show(run, f"run-{i + 1}", reach[scale_of(run)]) for i, run in enumerate(runs)]
    papers = cite.unique(citation for run in runs for citation in run.citations)
    versions = list(dict.fromkeys(tuple(sorted(run.versions.items())) for run in runs if run.versions))
    return template().render(
        title=title or (runs[0].name if len(runs) == 1 else f"{len(runs)} runs"),
        lead=lead(runs),
        style=Markup((TEMPLATES / "page.css").read_text("utf-8")),
        runs=shown,
        papers=[(paper, cite.link(paper)) for paper in papers],
        bibtex=cite.bibtex(papers),
        versions=versions,
    )


@cache
def template() -> Template:
    """The page's template: everything is escaped unless it is Markup that this package drew itself."""
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("page.html.j2")


def lead(runs: Sequence[Run]) -> str:
    """'Distillation helped in 3 of 4 runs; 1 cannot be told with these seeds.'"""
    judged = [run.state for run in runs if run.state]
    if len(runs) < 2 or not judged:
        return ""
    helped, hurt = judged.count("helped"), judged.count("did not help")
    unsure = len(judged) - helped - hurt
    told = [f"Distillation helped in {helped} of {len(judged)} comparisons"]
    told += [f"it did not help in {hurt}"] * bool(hurt) + [f"{unsure} cannot be told with these seeds"] * bool(unsure)
    return "; ".join(told) + "."


def scale_of(run: Run) -> tuple[str, bool]:
    """Runs of one metric share the scale of their gain strips."""
    return run.metric, run.higher_is_better


def reaches(runs: Sequence[Run]) -> dict[tuple[str, bool], float]:
    """The largest gain or bound of each metric, which becomes the end of its strips."""
    reach: dict[tuple[str, bool], float] = {}
    for run in runs:
        gain = run.gain
        values = (gain.mean, gain.low, gain.high, *gain.differences) if gain else ()
        largest = max((abs(v) for v in values if abs(v) < float("inf")), default=0.0)
        reach[scale_of(run)] = max(reach.get(scale_of(run), 0.0), largest)
    return reach


def show(run: Run, anchor: str, reach: float) -> Shown:
    """Everything of one run that the template puts in place."""
    state = run.state
    kept = logs(run.folder)
    arms = ordered(run)
    return Shown(
        anchor=anchor,
        run=run,
        state=state.replace(" ", "-") or "none",
        mark=MARKS.get(state, ""),
        when=when(run.folder),
        metric=numerals.pretty(run.metric),
        gain=costs.gain(run),
        interval=costs.interval(run),
        size=costs.size(run)[:2],
        speed=split(costs.speed(run)),
        seconds=numerals.duration(run.seconds),
        strip=strip(run, reaches([run])[scale_of(run)]),
        shared=strip(run, reach),
        figures=tuple(costs.figures(run)),
        arms=tuple((numerals.pretty(arm.key), arm.label, colour(run, arm.key)) for arm in arms),
        rows=tuple(table(run, arms)),
        plots=tuple(plot for plot in (seeds_plot(run, arms), *validation_plots(run, kept), *loss_plots(kept)) if plot),
        pictures=tuple(
            (p.title, p.caption, f"data:{p.kind};base64,{base64.b64encode(p.data).decode('ascii')}" if p.data else "")
            for p in run.pictures
        ),
        tables=run.tables,
        notes=(*run.notes, *log_notes(kept)),
        colophon=colophon(run),
    )


def strip(run: Run, reach: float) -> Markup:
    """The gain with its interval and seeds on a line from -reach to reach."""
    if run.gain is None:
        return Markup("")
    told = f"gain over {costs.against(run)}: {costs.gain(run)} ({costs.interval(run)})"
    return svg.strip(run.gain.differences, run.gain.mean, run.gain.low, run.gain.high, reach=reach or 1.0, title=told)


def ordered(run: Run) -> list[Arm]:
    """The student, what it is compared with, the teacher, then the rest as they came."""
    first = [arm for arm in (run.student, run.against, run.reference) if arm is not None]
    return [run.arms[key] for key in dict.fromkeys([*(arm.key for arm in first), *run.arms])]


def colour(run: Run, key: str) -> str:
    """The colour class of an arm by its part in the run: the same in every plot and table."""
    if key == "student":
        return "a-student"
    if key == "control" or (run.gain and key == run.gain.against):
        return "a-control"
    return "a-teacher" if run.reference and key == run.reference.key else "a-other"


def table(run: Run, arms: Sequence[Arm]) -> list[Row]:
    """Measures down, arms across: first the metric of the comparison, then the others, then what it costs."""
    metrics = list(dict.fromkeys([run.metric, *(name for arm in arms for name in arm.per_seed)]))
    rows: list[Row] = []
    for metric in metrics:
        cells = []
        for arm in arms:
            values = arm.values(metric)
            mean, half = costs.mean(values), costs.half_width(values)
            spread = f"±{numerals.SPACE}{numerals.half(metric, mean, half)}" if mean is not None and half else ""
            cells.append(("NaN" if values and mean is None else numerals.bare(metric, mean), spread))
        if any(arm.values(metric) for arm in arms):
            rows.append(
                Row(
                    numerals.pretty(metric), numerals.unit(metric), tuple(cells), "main" if metric == run.metric else ""
                )
            )
    cost: list[tuple[str, list[tuple[str, str]]]] = [
        (numerals.pretty(name), [(numerals.plain(arm.sizes.get(name)), "") for arm in arms])
        for name in dict.fromkeys(name for arm in arms for name in arm.sizes)
    ]
    cost += [
        ("parameters", [(numerals.parameters(arm.parameters), "") for arm in arms]),
        ("size", [(numerals.size(arm.bytes), "") for arm in arms]),
        ("latency", [(numerals.milliseconds(arm.latency_ms), tail(arm)) for arm in arms]),
        ("time a seed", [(numerals.duration(costs.mean(arm.seconds)), "") for arm in arms]),
    ]
    known = [(name, cells) for name, cells in cost if any(text != numerals.ABSENT for text, _ in cells)]
    rows += [Row(name, "", tuple(cells), "" if i else "first-cost") for i, (name, cells) in enumerate(known)]
    return rows


def tail(arm: Arm) -> str:
    """The 95th percentile of the latency, where it was measured."""
    return "" if arm.latency_p95_ms is None else f"p95 {numerals.milliseconds(arm.latency_p95_ms)}"


def seeds_plot(run: Run, arms: Sequence[Arm]) -> Plot | None:
    """A dot a seed; lines pair the student with what it is compared with."""
    kept = [arm for arm in arms if costs.mean(arm.values(run.metric)) is not None][:MOST_COLUMNS]
    # From the control up to the student, so that lines that rise are gains.
    kept.sort(key=lambda arm: 0 if run.gain and arm.key == run.gain.against else 1 if arm.key == "student" else 2)
    if not kept:
        return None
    keys = [arm.key for arm in kept]
    paired = run.gain is not None and run.gain.against in keys and "student" in keys
    pair = (keys.index(run.gain.against), keys.index("student")) if paired and run.gain else None
    columns = [
        svg.Column(
            numerals.pretty(arm.key),
            colour(run, arm.key),
            arm.values(run.metric),
            numerals.bare(run.metric, costs.mean(arm.values(run.metric))),
        )
        for arm in kept
    ]
    name = numerals.pretty(run.metric)
    drawing = svg.seeds(
        columns, percent=numerals.is_fraction(run.metric), title=f"{name} of each seed", pair=pair, names=run.seeds
    )
    note = "dot: a seed, bar: the mean" + ("" if run.higher_is_better else "; lower is better")
    title = f"{numerals.sentence(name)}, seed by seed"
    return Plot(title, numerals.unit(run.metric), (("", note),), drawing) if drawing else None


def validation_plots(run: Run, kept: Sequence[Log]) -> list[Plot]:
    """The comparison's metric first, then what else was validated; a line a seed."""
    names = list(dict.fromkeys(name for log in kept for name in log.validation))
    names.sort(key=lambda name: name != run.metric)
    plots = []
    for metric in names[:MOST_METRICS]:
        those = [log for log in kept if metric in log.validation]
        # The student is drawn last, on top.
        those.sort(key=lambda log: log.arm == "student")
        curves = [
            svg.Line(f"{numerals.pretty(log.arm)}, seed {log.seed}", colour(run, log.arm), log.validation[metric])
            for log in those
        ]
        drawing = svg.lines(
            curves,
            percent=numerals.is_fraction(metric),
            title=f"validation {metric} over steps",
            stages=those[-1].stages,
        )
        legend = dict.fromkeys((colour(run, log.arm), numerals.pretty(log.arm)) for log in reversed(those))
        note = ", ".join(t for t in (numerals.unit(metric), "a line a seed") if t)
        plots.append(Plot(f"Validation {numerals.pretty(metric)}", note, tuple(legend), drawing))
    return [plot for plot in plots if plot.drawing]


def loss_plots(kept: Sequence[Log]) -> list[Plot]:
    """The student arm's losses, one plot a player, one line a part, the mean over seeds."""
    ours = [log for log in kept if log.arm == "student"]
    players = list(dict.fromkeys(player for log in ours for player in log.losses))
    plots = []
    for player in players[:MOST_PLAYERS]:
        curves: dict[str, list[tuple[float, float]]] = {}
        for part in dict.fromkeys(part for log in ours for part in log.losses.get(player, {})):
            curves[part] = average([log.losses.get(player, {}).get(part, []) for log in ours])
        largest = sorted(curves, key=lambda part: -max((abs(y) for _, y in curves[part]), default=0.0))[:MOST_PARTS]
        chosen = [part for part in curves if part in largest]
        lines = [svg.Line(part, f"c{i}", curves[part]) for i, part in enumerate(chosen)]
        drawing = svg.lines(lines, percent=False, title=f"loss of {player} over steps", stages=ours[0].stages)
        left = len(curves) - len(chosen)
        note = "mean over seeds" if len(ours) > 1 else "one seed"
        note += f"; {left} smaller part{'s' * (left != 1)} not drawn" if left else ""
        legend = tuple((f"c{i}", part) for i, part in enumerate(chosen))
        plots.append(Plot(f"Loss of {player}", note, legend, drawing))
    return [plot for plot in plots if plot.drawing]


def log_notes(kept: Sequence[Log]) -> list[str]:
    """What a reader must know of the logs: diverged seeds, lines that a killed run left torn."""
    notes = []
    for log in kept:
        who = f"Seed {log.seed}, {numerals.pretty(log.arm)}"
        if log.not_finite:
            notes.append(f"{who}: {log.not_finite:,} of {log.logged:,} logged losses are not finite.")
        if log.unreadable:
            notes.append(f"{who}: {log.unreadable:,} unreadable log line{'s' * (log.unreadable != 1)} left out.")
    return notes


def when(folder: Path) -> str:
    """The start that a run folder's name ends with: '25 November 2026, 21:42'."""
    found = re.search(r"-(\d{8})-(\d{6})(-\d+)?$", folder.resolve().name)
    if not found:
        return ""
    try:
        start = datetime.strptime(found[1] + found[2], "%Y%m%d%H%M%S")
    except ValueError:
        return ""
    return f"{start.day} {start:%B %Y, %H:%M}"


def split(text: str) -> tuple[str, str]:
    """'12,345 (8.3x smaller)' -> ('12,345', '8.3x smaller')."""
    first, _, rest = text.partition(" (")
    return first, rest.removesuffix(")")


def colophon(run: Run) -> tuple[tuple[str, str], ...]:
    """What it takes to find or repeat the run."""
    known = (
        ("methods", ", ".join(run.methods)),
        ("seeds", ", ".join(run.seeds)),
        ("device", run.device),
        ("commit", run.commit),
        ("recipe hash", run.recipe_hash),
        ("folder", run.folder.resolve().name),
    )
    return tuple((name, text) for name, text in known if text)
