"""`limbeck demo`: the four verbs on embedded data, each beside its control, in at most three minutes on two cores."""

import shutil
import time
from pathlib import Path

from limbeck.core.errors import BadInput

PARTS = ("teach", "condense", "shorten", "shape")


def demo(*, quick: bool = False, folder: Path = Path("runs/demo")) -> Path:
    """Run the four recipes that lie beside this file, print one table, write folder/report.html and return its path.

    quick: fewer seeds and steps, about 30 seconds; its figures are rough.
    """
    import torch
    from rich.console import Console

    from limbeck import recipe as recipes
    from limbeck.progress import live
    from limbeck.report.page import html
    from limbeck.report.tables import terminal
    from limbeck.run import run

    if folder.exists():
        if any(folder.iterdir()) and not any((folder / part / "recipe.yaml").exists() for part in PARTS):
            raise BadInput(f"{folder} is not empty and holds no earlier demo; choose another folder with --out")
        shutil.rmtree(folder)
    console, began = Console(), time.monotonic()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # networks this small lose more to waiting threads than they gain
    try:
        for part in PARTS:
            here = Path(__file__).parent
            overrides = (here / "quick.txt").read_text().splitlines() if quick else []
            changes = [line.split(" ", 1)[1] for line in overrides if line.split(" ", 1)[0] == part]
            recipe = recipes.load(here / f"{part}.yaml", changes)
            with live() as progress:
                result = run(recipe, folder=folder / part, on_event=progress)
            console.print(f"[bold]{part}[/bold]  {result.verdict}", highlight=False)
    finally:
        torch.set_num_threads(threads)
    runs = [folder / part for part in PARTS]
    page = html(runs, folder / "report.html", title="limbeck demo")
    console.print(terminal(runs))
    console.print(f"{time.monotonic() - began:.0f} s, report: {page}", highlight=False)
    return page
