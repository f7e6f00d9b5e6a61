"""Writes the pages that come from the code: one a method, the table of methods, and the catalogue.

mkdocs-gen-files runs this at every build; nothing of it is kept in the repository, so no page can be stale.
"""

import inspect
import re
from collections.abc import Iterator
from itertools import groupby
from typing import Any

import mkdocs_gen_files
import yaml

from limbeck import catalogue
from limbeck.core.find import family, folder, get, knobs, names, needs, wants
from limbeck.core.knobs import annotations
from limbeck.core.names import NAMES

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
    """Knob -> what the docstring says of it: the text between `name:` and the next `other name:` or empty line.

    "sigma_min, sigma_max: range of noise" speaks of both.
    """
    known = list(knobs(thing))
    if not known:
        return {}
    one = "|".join(map(re.escape, known))
    names_then_colon = rf"(?<![\w`])((?:`?(?:{one})`?)(?:, `?(?:{one})`?)*): "
    found: dict[str, str] = {}
    for block in (inspect.getdoc(thing) or "").split("\n\n"):
        _, *pairs = re.split(names_then_colon, block)
        for heads, text in zip(pairs[::2], pairs[1::2], strict=True):
            found |= {head.strip(" `"): text.strip() for head in heads.split(",")}
    return found


def type_name(hint: Any) -> str:
    """How a person writes a type: float, str | None."""
    return hint.__name__ if inspect.isclass(hint) else str(hint).replace("typing.", "")


def example(name: str, thing: Any) -> str:
    """The line of a recipe that uses the method, with its first two plain knobs."""
    plain = {k: v for k, v in knobs(thing).items() if isinstance(v, bool | int | float | str)}
    spec: Any = {name: dict(list(plain.items())[:2])} if plain else name
    key = {"losses": "match", "measure": "measure"}.get(family(name), "method")
    line = {key: [spec] if key in ("match", "measure") else spec}
    return yaml.safe_dump(line, default_flow_style=True, sort_keys=False, width=100).strip().strip("{}")


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
    if card.differs:
        facts.append(("differs", cell(card.differs)))
    facts += [("exception", f"{code(check)}: {cell(why)}") for check, why in card.exceptions.items()]
    asked = [(n, "always") for n in needs(thing)] + [(n, "if it is there") for n in wants(thing)]
    hints, said = annotations(thing), about_knobs(thing)
    lines = [f"# {name}", "", idea(thing)]
    lines += ["", *(f"- {what}: {text}" for what, text in facts)]
    lines += table(
        "asks for | shape | what it is | when",
        [(code(n), code(f"[{NAMES[n][0]}]") if n in NAMES else "", cell(NAMES[n][1]) if n in NAMES else "", how)
         for n, how in asked],
    )  # fmt: skip
    lines += table(
        "knob | type | default | what it does",
        [(code(k), code(type_name(hints[k])), code(repr(v)), cell(said.get(k, ""))) for k, v in knobs(thing).items()],
    )
    lines += ["In a recipe:", "", "```yaml", example(name, thing), "```", ""]
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
    lines = ["# Catalogue", "", f"{len(rows)} papers. A level is computed from what ran, never typed."]
    lines += table("level | means", [(code(level), cell(catalogue.MEANING[level])) for level in catalogue.LEVELS])
    return "\n".join([*lines, catalogue.markdown(rows)])


def write(path: str, text: str, source: str | None = None) -> None:
    """Hand a page to mkdocs; its edit link leads to the file that it was made from."""
    with mkdocs_gen_files.open(path, "w") as page:
        page.write(text)
    mkdocs_gen_files.set_edit_path(path, source)


for method in names():
    write(f"methods/{folder(method)}/{method}.md", method_page(method), names()[method].replace(".", "/") + ".py")
write("methods/index.md", methods_page())
write("catalogue.md", catalogue_page())
