"""Writes what comes from the code: a page for each method, the table of methods, the catalogue, and the tables that
stand in the guide where a page says <!-- recipe keys --> and the like.

mkdocs-gen-files runs this at every build; nothing of it is kept in the repository, so no page can be stale.
"""

import inspect
import re
import types
from collections.abc import Callable, Iterator
from dataclasses import MISSING, fields
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

import mkdocs_gen_files
import yaml
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from limbeck import catalogue, recipe
from limbeck.adapters.files import Source
from limbeck.core.find import ROOT, family, folder, get, knobs, names, needs, wants
from limbeck.core.knobs import annotations
from limbeck.core.names import NAMES
from limbeck.core.optim import OPTIMIZERS
from limbeck.describe import OTHERS
from limbeck.zoo.nets import NETS

FAMILIES = {
    "losses": "what is matched: tensors in, a number out",
    "train": "who learns from what, in which turn",
    "shape": "a trained network in, a smaller one out",
    "data": "which examples, with what weight, and new ones",
    "measure": "tensors in, a figure of the report out",
}


def cell(text: object) -> str:
    """Text for one cell of a table: on one line, with bars that do not end the cell."""
    return " ".join(str(text).split()).replace("|", "\\|")


def code(text: object) -> str:
    """The same as code."""
    return f"`{cell(text)}`"


def ended(text: object) -> str:
    """A sentence as a cell: without its full stop."""
    return cell(text) if str(text).endswith("...") else cell(text).rstrip(".")


def table(head: str, rows: list[tuple[str, ...]]) -> Iterator[str]:
    """A Markdown table, or nothing when it has no rows."""
    if rows:
        columns = [c.strip() for c in head.split("|")]
        yield from ("", "| " + " | ".join(columns) + " |", "|" + "---|" * len(columns))
        yield from ("| " + " | ".join(row) + " |" for row in rows)
        yield ""


def idea(thing: Any) -> str:
    """The first sentence of the method's file."""
    text = inspect.getdoc(inspect.getmodule(thing)) or ""
    return " ".join(text.split("\n\n")[0].split())


def about_knobs(thing: Any) -> dict[str, str]:
    """Knob -> what the docstring says of it."""
    return said_of(list(knobs(thing)), inspect.getdoc(thing) or "")


def said_of(known: list[str], text: str) -> dict[str, str]:
    """Name -> what a docstring says of it: the text between `name:` and the next `other name:` or empty line.

    "sigma_min, sigma_max: range of noise" speaks of both.
    """
    if not known:
        return {}
    one = "|".join(map(re.escape, known))
    names_then_colon = rf"(?<![\w`])((?:`?(?:{one})`?)(?:, `?(?:{one})`?)*):\s+"
    found: dict[str, str] = {}
    for block in text.split("\n\n"):
        _, *pairs = re.split(names_then_colon, block)
        for heads, said in zip(pairs[::2], pairs[1::2], strict=True):
            for head in heads.split(","):  # the first place is the knob's own; "residual blocks: ..." may follow
                found.setdefault(head.strip(" `"), said.strip())
    return found


def type_name(hint: Any) -> str:
    """How a person writes a type: float, str | None."""
    return hint.__name__ if inspect.isclass(hint) else re.sub(r"\b(?:typing|collections\.abc)\.", "", str(hint))


def example(name: str, thing: Any) -> list[str]:
    """How the method is used: a line of a recipe with its first two plain knobs, or of Python where no recipe does."""
    asks = needs(thing)
    if "rows" in asks:
        return ["In Python:", "", "```python", f'kept = list(limbeck.get("{name}")(rows))', "```", ""]
    if any(n.endswith("_samples") for n in asks):
        return ["`do: shorten` measures it.", ""]
    told = ("budget", "seed") if family(name) == "data" else ()  # the recipe's `ipc` and seeds
    plain = {k: v for k, v in knobs(thing).items() if isinstance(v, bool | int | float | str) and k not in told}
    spec: Any = {name: dict(list(plain.items())[:2])} if plain else name
    key = {"losses": "match", "measure": "measure"}.get(family(name), "method")
    line = {key: [spec] if key in ("match", "measure") else spec}
    text = yaml.safe_dump(line, default_flow_style=True, sort_keys=False, width=100).strip()[1:-1]
    return ["In a recipe:", "", "```yaml", text, "```", ""]


def method_page(name: str) -> str:
    """The page of one method."""
    thing = get(name)
    card, module = thing.card, names()[name]
    facts = [("paper", cell(card.paper)), ("year", str(card.year)), ("family", code(folder(name)))]
    if card.arxiv:
        facts.append(("arXiv", f"[{card.arxiv}](https://arxiv.org/abs/{card.arxiv})"))
    if card.code:
        facts.append(("official code", code(card.code)))
    if card.variant_of:
        facts.append(("variant of", f"[{card.variant_of}]({link(card.variant_of, name)})"))
    if card.exact_accumulation:
        facts.append(("accumulation", "exact: two half batches give the gradient of one"))
    if card.differs:
        facts.append(("differs", cell(card.differs)))
    facts += [("exception", f"{code(check)}: {cell(why)}") for check, why in card.exceptions.items()]
    asked = [(n, "always") for n in needs(thing)] + [(n, "if it is there") for n in wants(thing)]
    hints, said = annotations(thing), about_knobs(thing)
    lines = [f"# {name}", "", idea(thing)]
    lines += ["", *(f"- {what}: {text}" for what, text in facts)]
    lines += table(
        "asks for | shape | what it is | when",
        [(code(n), code(f"[{NAMES[n][0]}]") if n in NAMES else "", cell(NAMES[n][1] if n in NAMES else OTHERS[n]), how)
         for n, how in asked],
    )  # fmt: skip
    lines += table(
        "knob | type | default | what it does",
        [(code(k), code(type_name(hints[k])), code(repr(v)), cell(said.get(k, ""))) for k, v in knobs(thing).items()],
    )
    lines += ["", *example(name, thing)]
    lines += [f"::: {module}.{thing.__name__}", "    options:", "      heading: Reference", ""]
    return "\n".join(lines)


def link(name: str, source: str | None = None) -> str:
    """Address of a method's page, from the page of another method or from the table of methods."""
    up = "../" * (folder(source).count("/") + 1) if source else ""
    return f"{up}{folder(name)}/{name}.md"


def methods_page() -> str:
    """The table of all methods, by family and folder."""
    lines = ["# Methods", "", f"{len(names())} methods, read from the code. `limbeck list` prints the same."]
    for kind, inside in groupby(names(), family):
        lines += ["", f"## {kind}", "", FAMILIES[kind].capitalize() + "."]
        rows = [
            (
                f"[{n}]({link(n)})",
                "/".join(folder(n).split("/")[1:]),
                cell(idea(get(n))),
                "<br>".join(map(code, needs(get(n)))),
                cell(get(n).card.paper),
            )
            for n in inside
        ]
        lines += table("method | kind | idea | asks for | paper", rows)
    return "\n".join([*lines, ""])


def catalogue_page() -> str:
    """Every paper's row and its level, from recipes, vectors and evidence."""
    rows = catalogue.rows()
    lines = ["# Catalogue", "", f"{len(rows)} rows. A level is computed from what ran, never typed."]
    lines += table("level | means", [(code(level), cell(catalogue.MEANING[level])) for level in catalogue.LEVELS])
    return "\n".join([*lines, catalogue.markdown(rows)])


def write(path: str, text: str, source: str | None = None) -> None:
    """Hand a page to mkdocs; its edit link leads to the file that it was made from."""
    with mkdocs_gen_files.open(path, "w") as page:
        page.write(text)
    mkdocs_gen_files.set_edit_path(path, source)


# ---- tables in the guide ---------------------------------------------------------------------------------------------
BLOCKS: dict[str, type[BaseModel]] = {
    "recipe": recipe.Recipe,
    "teacher, student, nets": recipe.Net,
    "data": recipe.Data,
    "train": recipe.Train,
    "store": recipe.Store,
    "judge": recipe.Judge,
    "expect": recipe.Expect,
}
PLACES = {
    "teacher, student, nets": "`teacher`, `student`, each of `nets`, and `judge.net`",
    "data": "`data`",
    "train": "`train`, `judge.train`, and `train` of a network",
    "store": "`store`",
    "judge": "`judge`",
    "expect": "`expect`",
}


def kind_of(hint: Any) -> str:
    """A type as the author of a recipe thinks of it: number, name or {name: knobs}."""
    origin, inner = get_origin(hint), tuple(a for a in get_args(hint) if a is not type(None))
    if set(inner) == set(get_args(recipe.Spec)):
        return "name or `{name: {knob: value}}`"
    if origin is Literal:
        return ", ".join(f"`{value}`" for value in inner)
    if origin in (Union, types.UnionType):
        return " or ".join(dict.fromkeys(map(kind_of, inner)))
    if origin is list:
        return f"list: {kind_of(inner[0])}" if inner and inner[0] is not Any else "list"
    if origin is dict:
        return f"mapping to {kind_of(inner[1])}" if inner[1] is not Any else "mapping"
    if inspect.isclass(hint) and issubclass(hint, BaseModel):
        return {"Net": "network", "Data": "name, path or block", "Recipe": "recipe"}.get(hint.__name__, "block")
    return {float: "number", int: "whole number", str: "text", bool: "true or false"}.get(hint, str(hint))


def bounds(info: FieldInfo) -> str:
    """The range of a number, such as ' > 0'."""
    signs = {"gt": ">", "ge": ">=", "lt": "<", "le": "<="}
    found = [
        f"{sign} {getattr(rule, key)}" for rule in info.metadata for key, sign in signs.items() if hasattr(rule, key)
    ]
    return " " + ", ".join(found) if found else ""


def default_of(info: FieldInfo) -> str:
    """The default, as YAML; empty for none, and for a whole block."""
    if info.is_required():
        return "required" if not info.metadata else "the file's name"  # the pattern of a run's name
    value = info.get_default(call_default_factory=True)
    if value is None or value == "" or isinstance(value, BaseModel) or value in ({}, []):
        return ""
    return code(yaml.safe_dump(value, default_flow_style=True, width=200).removesuffix("...\n").strip())


def recipe_keys() -> str:
    """The keys of a recipe and of its blocks."""
    lines: list[str] = []
    for name, model in BLOCKS.items():
        said = " ".join((inspect.getdoc(model) or "").split("\n\n")[0].split())
        where = f"In {PLACES[name]}. " if name in PLACES else ""
        lines += ["", f"### {name}", "", where + said.replace("{", "`{").replace("}", "}`")]
        rows = []
        for key, info in model.model_fields.items():
            if not info.description:
                raise SystemExit(f"the key {name}.{key} of a recipe is not described: give its field a description")
            rows.append((code(key), kind_of(info.annotation) + bounds(info), default_of(info), ended(info.description)))
        lines += table("key | value | default | meaning", rows)
    return "\n".join(lines)


def data_options() -> str:
    """What a recipe may say under `data`, from the loader's own fields."""
    known = [f.name for f in fields(Source)]
    said = said_of(known, inspect.getdoc(Source) or "")
    rows = []
    for f in fields(Source):
        value = "" if f.default is MISSING or f.default in (None, ()) else code(repr(f.default))
        rows.append((code(f.name), "required" if f.default is MISSING else value, ended(said[f.name])))
    return "\n".join(table("option | default | meaning", rows))


def networks() -> str:
    """The networks of the zoo with the options of their builders; those with one builder share a line."""
    facts = {"classes", "channels", "size", "vocab"}
    shared: dict[Any, list[str]] = {}
    for name, builder in NETS.items():
        shared.setdefault(builder.func if isinstance(builder, partial) else builder, []).append(name)
    rows = []
    for builder, called in shared.items():
        fixed = next((set(NETS[n].keywords) for n in called if isinstance(NETS[n], partial)), set())
        options = {
            k: v for k, v in knobs(builder).items() if k not in facts | fixed and v is not inspect.Parameter.empty
        }
        reads = [k for k in knobs(builder) if k in facts]
        said = cell(inspect.getdoc(builder))
        rows.append(
            (
                " ".join(map(code, called)),
                ", ".join(map(code, reads)),
                "<br>".join(code(f"{k}: {v}") for k, v in options.items()),
                said,
            )
        )
    return "\n".join(table("`net` | needs from the data | options and defaults | which are", rows))


def weights() -> str:
    """The trained networks inside the package."""
    kept = sorted(p.stem for p in (ROOT / "zoo").glob("*.safetensors"))
    return ", ".join(code(f"zoo/{name}") for name in kept) + "."


def optimizers() -> str:
    """The optimisers by name."""
    rows = [(code(name), f"`torch.optim.{kind.__name__}`") for name, kind in OPTIMIZERS.items()]
    said = "An optimiser is `{sgd: {lr: 0.05, momentum: 0.9}}`, with the options of the torch class:"
    return "\n".join([said, *table("name | class", rows)])


TABLES: dict[str, Callable[[], str]] = {
    "recipe keys": recipe_keys,
    "data options": data_options,
    "networks": networks,
    "weights": weights,
    "optimizers": optimizers,
}


def guide() -> Iterator[tuple[str, str]]:
    """Every page of the guide that has a place for a table, with the tables in it."""
    here = Path(__file__).parent
    for page in sorted(here.rglob("*.md")):
        text = page.read_text()
        filled = re.sub(r"<!-- ([a-z ]+) -->", lambda m: TABLES[m[1]]() if m[1] in TABLES else m[0], text)
        if filled != text:
            yield page.relative_to(here).as_posix(), filled


for page, text in guide():
    write(page, text, page)
for method in names():
    write(f"methods/{folder(method)}/{method}.md", method_page(method), names()[method].replace(".", "/") + ".py")
write("methods/index.md", methods_page())
write("catalogue.md", catalogue_page())
