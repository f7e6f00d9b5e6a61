"""`limbeck demo`: the four verbs on embedded data, each beside its control, in at most three minutes on two cores."""

import multiprocessing
import os
import queue
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from limbeck.core.errors import BadInput, LimbeckError

PARTS = ("teach", "condense", "shorten", "shape")
ORDER = ("teach", "shorten", "shape", "condense")  # the longest first, so that two cores end together
HERE = Path(__file__).parent


def demo(*, quick: bool = False, folder: Path = Path("runs/demo")) -> Path:
    """Run the four recipes that lie beside this file, print one table, write folder/report.html and return its path.

    Each recipe runs in a process of its own with one thread, as many at a time as there are cores: networks this small
    lose more to waiting threads than they gain. quick: fewer seeds and steps, about 30 seconds; its figures are rough.
    """
    from rich.console import Console

    from limbeck.report.page import html
    from limbeck.report.runs import read
    from limbeck.report.tables import terminal

    if folder.exists():
        if any(folder.iterdir()) and not any((folder / part / "recipe.yaml").exists() for part in PARTS):
            raise BadInput(f"{folder} is not empty and holds no earlier demo; choose another folder with --out")
        shutil.rmtree(folder)
    folder.mkdir(parents=True)
    console, began = Console(), time.monotonic()
    with _display(console) as show:
        _run_all(quick, folder, show)
    runs = [folder / part for part in PARTS]
    for part, place in zip(PARTS, runs, strict=True):
        console.print(f"[bold]{part}[/bold]  {read(place).verdict}", highlight=False)
    page = html(runs, folder / "report.html", title="limbeck demo")
    console.print(terminal(runs))
    console.print(f"{time.monotonic() - began:.0f} s; report: {page}", highlight=False, soft_wrap=True)
    return page


def _run_all(quick: bool, folder: Path, show: Any) -> None:
    context = multiprocessing.get_context("spawn")
    events: Any = context.Queue()
    waiting, running = list(ORDER), dict[str, Any]()
    try:
        while waiting or running:
            while waiting and len(running) < max(1, min(len(PARTS), os.cpu_count() or 1)):
                part = waiting.pop(0)
                running[part] = context.Process(target=_part, args=(part, quick, folder / part, events), daemon=True)
                running[part].start()
            try:
                part, event = events.get(timeout=0.5)
            except queue.Empty:
                for part, process in running.items():
                    if not process.is_alive() and events.empty():
                        raise LimbeckError(
                            f"the part {part!r} of the demo ended early (exit {process.exitcode})"
                        ) from None
                continue
            if "error" in event:
                raise LimbeckError(f"the part {part!r} of the demo failed: {event['error']}")
            show(part, event)
            if "done" in event:
                running.pop(part).join()
    finally:
        for process in running.values():
            process.terminate()


def _part(part: str, quick: bool, folder: Path, events: Any) -> None:
    """One recipe in its own process; what happens goes to the queue."""
    import torch

    from limbeck import recipe as recipes
    from limbeck.run import run

    torch.set_num_threads(1)
    changes = [line.split(" ", 1) for line in (HERE / "quick.txt").read_text().splitlines()] if quick else []
    try:
        recipe = recipes.load(HERE / f"{part}.yaml", [change for name, change in changes if name == part])
        run(recipe, folder=folder, on_event=lambda event: events.put((part, event)))
    except Exception as error:
        events.put((part, {"error": f"{type(error).__name__}: {error}"}))
        raise
    events.put((part, {"done": True}))


@contextmanager
def _display(console: Any) -> Iterator[Any]:
    """A function that shows (part, event): a bar a part on a terminal, a line an arm elsewhere."""
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    if not console.is_terminal:

        def line(part: str, event: dict[str, Any]) -> None:
            if "arm" in event:
                console.print(f"{part}: {event['label']}, seed {event['seed']}", markup=False, highlight=False)

        yield line
        return
    columns = (
        TextColumn("{task.fields[part]:<9}"),
        BarColumn(24),
        TextColumn("{task.description}"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console, transient=True) as progress:
        tasks = {part: progress.add_task("waiting", total=None, part=part, start=False) for part in PARTS}

        def bar(part: str, event: dict[str, Any]) -> None:
            task = tasks[part]
            if "arm" in event:
                progress.start_task(task)
                progress.update(
                    task, description=f"{event['label']}, seed {event['seed']}"[:60], total=None, completed=0
                )
            elif "steps" in event:
                progress.update(task, total=event["steps"], completed=event["t"] + 1)
            elif "done" in event:
                progress.update(task, description="done", total=1, completed=1)

        yield bar
