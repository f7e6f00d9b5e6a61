"""The command line. Importing this imports no torch; each command imports what it needs."""

import errno
import json
import os
import shlex
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from limbeck.core.errors import BadInput, Interrupted, LimbeckError

app = typer.Typer(
    help="limbeck: teach a small model, shorten a sampler, condense a data set, shape the student.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

Recipe = Annotated[Path, typer.Argument(help="a recipe, YAML")]
Overrides = Annotated[list[str] | None, typer.Argument(help="changes such as train.epochs=3 match.dkd.beta=4")]
AsJson = Annotated[bool, typer.Option("--json", help="print JSON")]
Folder = Annotated[Path | None, typer.Option("--out", help="run folder; default runs/<name>-<time>")]


def say(text: str = "") -> None:
    """Print to the user."""
    if first_process():
        typer.echo(text)


def first_process() -> bool:
    """Whether this is the one of several processes (torchrun, accelerate launch) that speaks."""
    return os.environ.get("RANK", "0") == "0"


@app.command()
def demo(
    quick: Annotated[bool, typer.Option("--quick", help="the 30-second version")] = False,
    out: Annotated[Path, typer.Option("--out", help="folder for the four runs and report.html")] = Path("runs/demo"),
) -> None:
    """All four verbs on embedded data, with their controls, in at most three minutes; ends with report.html."""
    from limbeck.demo import demo as run_demo

    run_demo(quick=quick, folder=out)


@app.command()
def run(
    recipe: Annotated[Path | None, typer.Argument(help="a recipe, YAML; none with --resume")] = None,
    overrides: Overrides = None,
    out: Folder = None,
    resume: Annotated[Path | None, typer.Option("--resume", help="go on in this run folder where it stopped")] = None,
    check: Annotated[bool, typer.Option("--check", help="read, check and print the recipe, and stop")] = False,
) -> None:
    """Carry out a recipe: every seed, the student and its control; writes a run folder with report.html."""
    from limbeck import recipe as recipes

    if resume is not None:
        if recipe is not None:
            raise BadInput("give a recipe or --resume FOLDER, not both: the folder holds its own recipe")
        path = resume / "recipe.yaml"
        if not path.exists():
            raise BadInput(f"{resume} is no run folder: it holds no recipe.yaml")
        if objects := recipes.objects_in(path):
            raise BadInput(
                f"the run in {resume} was made in Python with objects ({objects}); go on with it there: the same call "
                f"with folder={str(resume)!r}, resume=True"
            )
        chosen, out = recipes.load(path), resume
    elif recipe is None:
        raise BadInput("give a recipe file, or --resume FOLDER")
    else:
        chosen = recipes.load(recipe, overrides or [])
    if check:
        from limbeck.verbs.check import check_names

        check_names(chosen)
        say(recipes.dump(chosen).rstrip())
        return
    from limbeck.progress import live
    from limbeck.run import new_folder
    from limbeck.run import run as carry_out

    if out is not None and resume is None:
        _free(out)
    folder = out or new_folder(Path("runs"), chosen.name)
    with _stoppable(folder), live(quiet=not first_process()) as progress:
        result = carry_out(chosen, folder=folder, resume=resume is not None, on_event=progress)
    from limbeck.report.tables import terminal

    if (result.folder / "result.json").exists() and result.arms:
        _show_table(terminal([result.folder]))
    say(result.verdict)
    page = result.folder / "report.html"
    say(f"report: {page}" if page.exists() else f"folder: {result.folder}")


def _free(folder: Path) -> None:
    """Refuse a place for a run that is taken."""
    from limbeck.verbs.together import first

    def look() -> None:
        if (folder / "recipe.yaml").exists():
            raise BadInput(f"{folder} holds a run already; go on with --resume {folder}, or choose another folder")
        for place in (folder, *folder.parents):
            if place.exists() and not place.is_dir():
                raise BadInput(f"{place} is a file; --out names a folder")

    first(look)


@contextmanager
def _stoppable(folder: Path) -> Iterator[None]:
    """Ctrl-C and SIGTERM, wherever they strike, end with the command that goes on."""
    try:
        yield
    except (Interrupted, KeyboardInterrupt) as stop:
        if not (folder / "recipe.yaml").exists():  # while the teacher was trained or the data were read
            raise Interrupted(f"{folder.parent}; run the same command again to go on") from stop
        again = f"limbeck run --resume {shlex.quote(str(folder))}"
        raise Interrupted(f"{folder}; go on with: {again}") from stop


def _show_table(table: Any) -> None:
    from rich.console import Console

    if first_process():
        Console().print(table)


@app.command("list")
def list_methods(
    family: Annotated[str, typer.Option("--family", help="losses, train/online, ...")] = "",
    has: Annotated[str, typer.Option("--has", help="names at hand: only methods that ask for no others")] = "",
    search: Annotated[str, typer.Option("--search", help="words in name, idea or paper")] = "",
    as_json: AsJson = False,
) -> None:
    """Methods, with what they ask for."""
    from limbeck.describe import chosen

    found = chosen(family, {h for h in has.replace(" ", "").split(",") if h}, search)
    if as_json:
        say(json.dumps([f.as_dict() for f in found], indent=1))
        return
    width = max((len(f.name) for f in found), default=0)
    where = max((len(f.folder) for f in found), default=0)
    for f in found:
        say(f"{f.name:<{width}}  {f.folder:<{where}}  {f.idea}")
    say(f"{len(found)} methods" if len(found) != 1 else "1 method")


@app.command()
def show(
    name: Annotated[str, typer.Argument(help="a method, or a run folder, or with --taps a recipe")],
    taps: Annotated[bool, typer.Option("--taps", help="propose pairs of layers for a recipe's two networks")] = False,
    turns: Annotated[
        bool, typer.Option("--turns", help="of a run: who was trained when, by what and for how long")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """One method: idea, equation, knobs, what it asks for, paper, recipe, level, evidence; or a run, or layers."""
    if taps:
        _show_taps(Path(name), as_json)
        return
    if turns:
        _show_turns(Path(name), as_json)
        return
    if (Path(name) / "recipe.yaml").exists():
        _show_run(Path(name), as_json)
        return
    from limbeck.describe import describe

    found = describe(name)
    say(json.dumps(found.as_dict(), indent=1) if as_json else found.page())


def _show_turns(folder: Path, as_json: bool) -> None:
    from limbeck.report.turns import read, table
    from limbeck.verbs.build import trained_first

    found = read(folder, trained_first(folder) if (folder / "recipe.yaml").exists() else {})
    if as_json:
        from dataclasses import asdict

        say(json.dumps([asdict(line) for line in found], indent=1))
        return
    for line in table(found):
        say(line)


def _show_run(folder: Path, as_json: bool) -> None:
    """Verdict and figures of a finished run."""
    from limbeck.report.files import plain
    from limbeck.report.runs import load, read
    from limbeck.report.tables import figures

    if as_json:
        say(json.dumps(plain(load(folder)), indent=1))
        return
    run = read(folder)
    say(run.verdict)
    for line in figures(run):
        say(line)


def _show_taps(path: Path, as_json: bool) -> None:
    from limbeck.verbs.layers import lines, pairs, written

    found = pairs(path)
    if as_json:
        from dataclasses import asdict

        say(json.dumps([asdict(pair) for pair in found], indent=1))
        return
    for line in lines(found):
        say(line)
    say("\nto match them, write into the recipe:\n\n" + written(found))


@app.command()
def new(
    name: Annotated[str, typer.Argument(help="the method's name: letters, digits and _")],
    where: Annotated[str, typer.Option("--in", help="folder, such as losses/logits")],
) -> None:
    """Write the stub of a method and of its vector; nothing else has to be edited."""
    from limbeck.conformance import stub
    from limbeck.core import find
    from limbeck.core.errors import nearest

    found = [p.parent.relative_to(find.ROOT) for f in find.FAMILIES for p in (find.ROOT / f).rglob("__init__.py")]
    folders = sorted({p.as_posix() for p in found} - set(find.FAMILIES))
    if where not in folders:
        raise BadInput(f"there is no folder {where!r}{nearest(where, folders)}")
    if not name.isidentifier() or name != name.lower():
        raise BadInput(f"a method's name is a lower-case identifier, got {name!r}")
    if name in find.names():
        raise BadInput(f"{name!r} exists already: {find.names()[name]}")
    from limbeck import catalogue

    source, vector = stub(name, where)
    method, numbers = find.ROOT / where / f"{name}.py", catalogue.vectors() / f"{name}.json"
    method.write_text(source)
    numbers.parent.mkdir(parents=True, exist_ok=True)
    numbers.write_text(vector)
    say(f"{method}\n{numbers}\nfill both in, then: limbeck check {name}")


@app.command()
def check(name: Annotated[str, typer.Argument(help="a method")], as_json: AsJson = False) -> None:
    """The conformance suite for one method."""
    from limbeck import conformance
    from limbeck.core import find

    find.get(name)
    outcomes = conformance.run(name)
    if as_json:
        from dataclasses import asdict

        say(json.dumps([asdict(o) for o in outcomes], indent=1, default=str))
    else:
        for o in outcomes:
            mark = "FAILED" if not o.passed else "excepted" if o.exception else "passed"
            say(f"{mark:<9} {o.check}" + (f": {o.message or o.exception}" if o.exception or not o.passed else ""))
        failed = sum(not o.passed for o in outcomes)
        say(f"{name}: {len(outcomes) - failed} of {len(outcomes)} checks hold")
    if any(not o.passed for o in outcomes):
        raise typer.Exit(1)


@app.command()
def catalogue(
    as_json: AsJson = False,
    as_markdown: Annotated[bool, typer.Option("--markdown", help="print Markdown tables")] = False,
    family: Annotated[str, typer.Option("--family", help="one family of the catalogue")] = "",
) -> None:
    """Every row of the literature, what implements it, and the level its evidence supports."""
    from limbeck import catalogue as rows

    found = rows.rows(family)
    if as_json:
        say(rows.as_json(found))
    elif as_markdown:
        say(rows.markdown(found))
    else:
        from collections import Counter

        width = max(len(r.key) for r in found)
        for r in found:
            say(f"{r.key:<{width}}  {r.level:<6} {', '.join(r.methods) or '-':<28} {r.title[:80]} ({r.year})")
        counts = Counter(r.level for r in found)
        say(f"{len(found)} rows: " + ", ".join(f"{counts[x]} {x}" for x in rows.LEVELS if counts[x]))


@app.command()
def verify(
    names: Annotated[list[str], typer.Argument(help="row keys, methods or recipe files")],
    seeds: Annotated[int | None, typer.Option("--seeds", min=1, help="default: what the recipe expects")] = None,
    as_json: AsJson = False,
) -> None:
    """Run a row's recipe over seeds with its control and write evidence/<key>.json."""
    from limbeck.progress import live
    from limbeck.verbs.check import check_names
    from limbeck.verify import recipe_of
    from limbeck.verify import verify as one

    for name in names:
        check_names(recipe_of(name)[1])  # of all, before the first long run
    gathered = []
    for i, name in enumerate(names):
        with live(quiet=as_json or not first_process()) as progress:
            try:
                found = one(name, seeds=seeds, on_event=progress)
            except (Interrupted, KeyboardInterrupt) as stop:
                options = [f"--seeds={seeds}"] * (seeds is not None) + ["--json"] * as_json
                again = shlex.join(["limbeck", "verify", *names[i:], *options])
                raise Interrupted(f"runs/verify; go on with: {again}") from stop
        gathered.append(found)
        if not as_json:
            from limbeck.catalogue import rung

            say(f"{found['key']}: {rung(found['key'])}. {found['verdict']}")
    if as_json:
        say(json.dumps(gathered, indent=1))


@app.command()
def tune(
    recipe: Recipe,
    grid: Annotated[list[str], typer.Argument(help="what to try, such as match.kd.weight=0.5,0.9")],
    seeds: Annotated[int, typer.Option("--seeds", min=1, help="for each combination")] = 3,
    as_json: AsJson = False,
) -> None:
    """Try every combination of settings and compare them on the validation split; the test split stays unseen."""
    from dataclasses import asdict

    from limbeck.progress import live
    from limbeck.report.files import plain
    from limbeck.tune import tune as search

    try:
        with live(quiet=as_json or not first_process()) as progress:
            found = search(recipe, grid, seeds=seeds, on_event=progress)
    except (Interrupted, KeyboardInterrupt) as stop:
        raise Interrupted("runs/tune; run the same command again to go on") from stop
    if as_json:
        say(json.dumps(plain({**asdict(found), "best": found.best.overrides}), indent=1))
        return
    for line in found.table():
        say(line)
    many = "s" if seeds > 1 else ""
    say(f"on the validation split, {seeds} seed{many}; run the recipe with what you choose to see the test split")


@app.command()
def compare(
    keys: Annotated[list[str], typer.Argument(help="rows or methods; differences are also taken to the first")],
    recipe: Annotated[Path, typer.Option("--recipe", help="the setting: its networks, data, budget and control")],
    seeds: Annotated[int | None, typer.Option("--seeds", min=1, help="default: the setting's")] = None,
    out: Annotated[Path | None, typer.Option("--out", help="default: runs/compare-<recipe>")] = None,
    as_json: AsJson = False,
) -> None:
    """Run several methods in one shared setting: a table, and a page with a plot of the intervals."""
    from limbeck.compare import compare as all_of
    from limbeck.compare import lines
    from limbeck.progress import live

    folder = out or Path("runs") / f"compare-{recipe.stem}"
    try:
        with live(quiet=as_json or not first_process()) as progress:
            found = all_of(keys, recipe, seeds=seeds, folder=folder, on_event=progress)
    except (Interrupted, KeyboardInterrupt) as stop:
        raise Interrupted(f"{folder}; run the same command again to go on") from stop
    if as_json:
        say(json.dumps(found.as_dict(), indent=1))
        return
    for line in lines(found):
        say(line)
    say(f"report: {found.report}")


@app.command()
def label(
    recipe: Recipe,
    overrides: Overrides = None,
    out: Folder = None,
) -> None:
    """Write a teacher's signals for a data set to a store, which `teach` reads instead of running the teacher."""
    from limbeck import recipe as recipes
    from limbeck.progress import live
    from limbeck.run import new_folder
    from limbeck.run import run as carry_out

    chosen = recipes.load(recipe, overrides or [])
    if chosen.stages:
        raise BadInput(f"{recipe}: label takes a recipe of one stage; write `do: label` into a stage and use run")
    chosen = chosen.with_changes({"do": "label", "method": None, "control": None, "expect": None})
    if out is not None and not (out / "store.json").exists():
        _free(out)
    folder = out or new_folder(Path("runs"), chosen.name)
    try:
        with live(quiet=not first_process()) as progress:
            result = carry_out(chosen, folder=folder, on_event=progress)
    except (Interrupted, KeyboardInterrupt) as stop:
        raise Interrupted(f"{folder.parent / '.stores'}; run the same command again to go on") from stop
    say(result.verdict)


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(help="run folders, side by side")],
    out: Annotated[Path | None, typer.Option("--out", help="default: report.html in the first run")] = None,
    as_markdown: Annotated[bool, typer.Option("--markdown", help="print Markdown instead")] = False,
) -> None:
    """One self-contained HTML page for one run, or several side by side."""
    from limbeck.report.page import html
    from limbeck.report.tables import markdown

    if as_markdown:
        say(markdown(runs))
        return
    say(str(html(runs, out or runs[0] / "report.html")))


@app.command()
def export(
    run: Annotated[Path, typer.Argument(help="a run folder")],
    to: Annotated[str, typer.Option("--to", help="torch, safetensors, hf or onnx")] = "safetensors",
    out: Annotated[Path | None, typer.Option("--out", help="default: <run>/export")] = None,
) -> None:
    """Write the student as a plain model: no hooks, wrappers, projectors or teacher."""
    from limbeck.export import export as write

    say(str(write(run, to, out or run / "export")))


@app.command()
def plan(
    student_params: Annotated[str, typer.Option("--student-params", help="such as 300M")],
    flops: Annotated[str, typer.Option("--flops", help="the whole budget, such as 3e20")],
    teacher_loss: Annotated[str | None, typer.Option("--teacher-loss", help="nats a token, on the same text")] = None,
    teacher_params: Annotated[str | None, typer.Option("--teacher-params", help="such as 7B")] = None,
    teacher_tokens: Annotated[
        str | None, typer.Option("--teacher-tokens", help="it was trained on, such as 2T")
    ] = None,
    pay: Annotated[str, typer.Option("--pay", help="of the teacher: nothing, inference, training or both")] = "",
    students: Annotated[int, typer.Option("--students", help="that share the teacher's training")] = 1,
    unique_tokens: Annotated[str | None, typer.Option("--unique-tokens", help="of text at hand")] = None,
    fit: Annotated[Path | None, typer.Option("--fit", help="csv of your runs, to fit the laws to")] = None,
    laws: Annotated[Path | None, typer.Option("--laws", help="JSON of fitted laws")] = None,
    save: Annotated[Path | None, typer.Option("--save", help="write the laws there, JSON")] = None,
    resamples: Annotated[int, typer.Option("--resamples", min=0, help="bootstrap fits, for intervals")] = 50,
    as_json: AsJson = False,
) -> None:
    """Distil or train? Tokens and losses for a teacher, a student size and a compute budget, by scaling laws."""
    from limbeck.plan import Question, answer, laws_of, lines, number

    question = Question(
        student=number(student_params, "--student-params") or 0.0,
        flops=number(flops, "--flops") or 0.0,
        teacher_loss=number(teacher_loss, "--teacher-loss"),
        teacher=number(teacher_params, "--teacher-params"),
        teacher_tokens=number(teacher_tokens, "--teacher-tokens"),
        pay=pay,
        students=students,
        unique=number(unique_tokens, "--unique-tokens") or 0.0,
    )
    known = laws_of(fit, laws, resamples)
    if save is not None:
        known.save(save)
    found = answer(question, known)
    if as_json:
        say(json.dumps(found.as_dict(), indent=1))
        return
    for line in lines(found, question):
        say(line)


@app.command()
def doctor(
    recipe: Annotated[Path | None, typer.Argument(help="a `teach` recipe to look at before it runs")] = None,
    teacher: Annotated[str | None, typer.Option("--teacher", help="a name, hf:NAME_OR_PATH, or {net: ...}")] = None,
    student: Annotated[str | None, typer.Option("--student", help="likewise")] = None,
    data: Annotated[str | None, typer.Option("--data", help="a name, a path, or {name: ...}")] = None,
    batch_size: Annotated[int, typer.Option("--batch-size", min=1, help="examples of a step")] = 16,
    steps: Annotated[int | None, typer.Option("--steps", min=1, help="of the run; default: 10 epochs")] = None,
    examples: Annotated[int, typer.Option("--examples", help="that both networks are compared on")] = 256,
    top_k: Annotated[int, typer.Option("--top-k", help="first choices that are compared")] = 10,
    as_json: AsJson = False,
) -> None:
    """This machine and a ten-second self-test; or, of a teacher, a student and data, whether distilling may pay."""
    three = {"--teacher": teacher, "--student": student, "--data": data}
    given = [option for option, value in three.items() if value is not None]
    if recipe is not None and given:
        raise BadInput(f"give a recipe, or --teacher, --student and --data; a recipe says its own {given[0][2:]}")
    if recipe is not None or given:
        _outlook(recipe, teacher, student, data, batch_size, steps, examples, top_k, as_json)
        return
    from limbeck.doctor import examine

    lines, healthy = examine()
    for line in lines:
        say(line)
    if not healthy:
        raise typer.Exit(1)


def _outlook(
    recipe: Path | None,
    teacher: str | None,
    student: str | None,
    data: str | None,
    batch_size: int,
    steps: int | None,
    examples: int,
    top_k: int,
    as_json: bool,
) -> None:
    from limbeck import recipe as recipes
    from limbeck.outlook import lines, look, recipe_of
    from limbeck.progress import live

    if recipe is not None:
        asked = recipes.load(recipe)
    elif teacher is None or student is None or data is None:
        raise BadInput("doctor looks at a pair of networks with --teacher, --student and --data, all three")
    else:
        asked = recipe_of(teacher, student, data, batch_size=batch_size, steps=steps)
    with live(quiet=as_json or not first_process()) as progress:
        found = look(asked, examples=examples, top_k=top_k, on_event=progress)
    if as_json:
        say(json.dumps(found.as_dict(), indent=1))
    else:
        for line in lines(found):
            say(line)
    if found.problem:
        raise typer.Exit(1)


@app.command()
def schema() -> None:
    """The JSON schema of a recipe, for editors."""
    from limbeck.recipe import Recipe as Model

    head = {"$schema": "https://json-schema.org/draft/2020-12/schema"}
    say(json.dumps(head | Model.model_json_schema(), indent=1))


@contextmanager
def _exit_codes() -> Iterator[None]:
    try:
        yield
    except LimbeckError as error:
        _end(str(error), error.code)
    except KeyboardInterrupt:
        _end("interrupted", 130)
    except BrokenPipeError:  # the reader of `limbeck list | head` has seen enough
        sys.stderr.close()
        sys.exit(1)
    except OSError as error:
        reason = "the disk is full" if error.errno in (errno.ENOSPC, errno.EDQUOT) else error.strerror or str(error)
        _end(f"{error.filename}: {reason}" if error.filename else reason, 1)
    except ValueError as error:
        if type(error) is not ValueError:
            raise
        _end(str(error), 2)  # a method's own `require`


def _end(sentence: str, code: int) -> None:
    if first_process() or code == 1:  # bad input and interruptions meet all processes alike
        typer.echo("limbeck: " + " ".join(sentence.split()), err=True)
    sys.exit(code)


def _terminate(_number: int, _frame: Any) -> None:
    """SIGTERM outside the loop, which serves it between steps, ends a command as Ctrl-C does."""
    raise KeyboardInterrupt


def main() -> None:
    """Entry point. Exit codes: 0 done, 1 failure, 2 bad input, 130 interrupted with the state saved."""
    before = signal.signal(signal.SIGTERM, _terminate)
    try:
        with _exit_codes():
            app()
    finally:
        signal.signal(signal.SIGTERM, before)


if __name__ == "__main__":
    main()
