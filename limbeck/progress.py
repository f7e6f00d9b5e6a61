"""The live display of a run in the terminal; a plain line now and then where there is none."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

Event = Callable[[dict[str, Any]], None]
ENDLESS = 10**9  # steps of a run that only a time limit ends


@contextmanager
def live(*, quiet: bool = False) -> Iterator[Event]:
    """A function that takes the loop's events and shows them. quiet: show nothing (output is for a machine)."""
    console = Console(stderr=True)
    if quiet:
        yield lambda event: None
        return
    if not console.is_terminal:
        yield _plain(console)
        return
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[note]}"))
    with Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=console, transient=True) as progress:
        task = progress.add_task("starting", total=None, note="")

        def show(event: dict[str, Any]) -> None:
            if "arm" in event:
                progress.reset(task, description=f"{event['label']}, seed {event['seed']}", total=None, note="")
            elif "note" in event:
                progress.update(task, description=event["note"])
            elif "validation" in event:
                name, value = next(iter(event["validation"].items()))
                progress.update(task, note=f"{name} {value:.3f}")
            elif "steps" in event:
                known = event["steps"] if event["steps"] < ENDLESS else None
                progress.update(task, total=known, completed=event["t"] + 1)

        yield show


def _plain(console: Console) -> Event:
    last = [0.0]

    def show(event: dict[str, Any]) -> None:
        if "arm" in event:
            console.print(f"{event['label']}, seed {event['seed']}", markup=False, highlight=False)
        elif "note" in event:
            console.print(event["note"], markup=False, highlight=False)
        elif "steps" in event and time.monotonic() - last[0] > 10:
            last[0] = time.monotonic()
            of = f" of {event['steps']}" if event["steps"] < ENDLESS else ""
            line = f"  step {event['t'] + 1}{of}, loss {event['loss']:.4f}"
            console.print(line, markup=False, highlight=False)

    return show
