"""The same summary for a terminal and as Markdown: gain, interval, parameters, latency, seconds."""

import re
from collections.abc import Sequence
from pathlib import Path

from rich import box
from rich.table import Table
from rich.text import Text

from limbeck.report import costs, numerals, page
from limbeck.report.runs import Run, read_all

COLOURS = {"helped": "bold green", "did not help": "bold red", "cannot tell": "bold yellow"}


def terminal(runs: Sequence[Path]) -> Table:
    """One row a run. Everything from a run is a `Text`, so that nothing in a name is taken for markup."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, collapse_padding=True)
    for name in ("run", "gain", "95 % interval"):
        table.add_column(name, overflow="fold")
    for name in ("parameters", "latency", "seconds"):
        table.add_column(name, justify="right", overflow="fold")
    for run in read_all(runs):
        told = Text(costs.gain(run))
        if run.state:
            told = Text(f"{run.state}\n", style=COLOURS[run.state]) + Text(costs.gain(run), style="none")
        what = Text(run.name, style="bold")
        if run.metric:
            what += Text(f"\n{numerals.pretty(run.metric)}", style="dim not bold")
        # '79.8 to 89.6 lower' on two lines, so that the table fits 80 letters.
        bounds = re.sub(r" (lower|higher|interval)$", r"\n\1", costs.interval(run))
        table.add_row(what, told, Text(bounds), *(Text(t) for t in cost(run)))
    return table


def cost(run: Run) -> tuple[str, str, str]:
    """Parameters and latency, each with its ratio on a second line, and the seconds of the run."""
    seconds = numerals.ABSENT if run.seconds is None else f"{run.seconds:,.1f}"
    first = [text.removesuffix(")").split(" (") for text in (costs.saved(run), costs.speed(run))]
    return "\n".join(first[0]), "\n".join(first[1]), seconds


def markdown(runs: Sequence[Path]) -> str:
    """A table with a row a run, then each verdict as a sentence."""
    read = read_all(runs)
    head = ("run", "gain", "95 % interval", "parameters", "latency", "seconds")
    lines = ["| " + " | ".join(head) + " |", "|---|---|---|--:|--:|--:|"]
    for run in read:
        what = f"{costs.gain(run)}, {numerals.pretty(run.metric)} ({run.state})" if run.state else costs.gain(run)
        cells = (run.name, what, costs.interval(run), *(t.replace("\n", ", ") for t in cost(run)))
        lines.append("| " + " | ".join(map(inert, cells)) + " |")
    lines += ["", *(f"- **{inert(run.name)}**: {inert(run.verdict)}" for run in read)]
    return "\n".join(lines) + "\n"


def figures(run: Run) -> list[str]:
    """Every measure, size and cost of every arm of one run, as the page's table has them."""
    arms = page.ordered(run)
    rows = [["", *(numerals.pretty(arm.key) for arm in arms)]]
    for row in page.table(run, arms):
        name = f"{row.name}, {row.unit}" if row.unit else row.name
        rows.append([name, *(" ".join(filter(None, cell)) for cell in row.cells)])
    return aligned(rows)


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Plain lines in which every column of `rows` begins at the same letter."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def inert(text: str) -> str:
    """Text that Markdown shows as it stands: on one line, with what it would take for markup escaped."""
    flat = " ".join(text.split("\n")).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([\\`*_\[\]|#!~])", r"\\\1", flat)
