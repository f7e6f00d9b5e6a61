"""What `list` and `show` say of a method, all of it read from its file, card, vector, recipe and evidence."""

import inspect
import json
import re
from dataclasses import dataclass
from typing import Any

from limbeck import catalogue
from limbeck.core import find, knobs, names
from limbeck.core.errors import BadInput, nearest


@dataclass(frozen=True)
class Description:
    """One method as a user meets it."""

    name: str
    folder: str
    idea: str
    doc: str
    asks: tuple[str, ...]
    takes: tuple[str, ...]
    knobs: dict[str, str]
    card: Any
    rows: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        """For --json."""
        levels = {key: catalogue.level(key) for key in self.rows}
        return {
            "name": self.name,
            "folder": self.folder,
            "idea": self.idea,
            "asks": self.asks,
            "takes": self.takes,
            "knobs": self.knobs,
            "paper": self.card.paper,
            "year": self.card.year,
            "arxiv": self.card.arxiv,
            "code": self.card.code,
            "differs": self.card.differs,
            "exceptions": self.card.exceptions,
            "head_form": self.card.head is not None,
            "levels": levels,
        }

    def page(self) -> str:
        """For the terminal."""
        card = self.card
        lines = [f"{self.name}  ({self.folder})", self.idea, "", inspect.cleandoc(self.doc), ""]
        if self.asks:
            lines.append("asks for")
            lines += [f"  {n:<18} {_asked(n)}" for n in self.asks]
        if self.takes:
            lines.append("takes when at hand: " + ", ".join(self.takes))
        if card.head is not None:
            lines.append("needs no logits where a vocabulary is large: hidden states and heads will do")
        lines.append("knobs" if self.knobs else "knobs: none")
        lines += [f"  {k:<18} {v}" for k, v in self.knobs.items()]
        lines.append(f"paper    {card.paper}" + (f"  https://arxiv.org/abs/{card.arxiv}" if card.arxiv else ""))
        if card.code:
            lines.append(f"code     {card.code}")
        if card.differs:
            lines.append(f"differs  {card.differs}")
        for check, reason in card.exceptions.items():
            lines.append(f"except   {check}: {reason}")
        vector = catalogue.vectors() / f"{self.name}.json"
        if vector.exists():
            lines.append(f"numbers  {json.loads(vector.read_text()).get('source', '')}")
        for key in self.rows:
            level = catalogue.level(key)
            means = catalogue.MEANING[level].removeprefix("and ") if level != "none" else "no evidence yet"
            lines.append(f"row      {key}: {level}, {means}")
            for recipe, path in catalogue.of_row(key).items():
                lines.append(f"recipe   {path.relative_to(catalogue.home())}")
                if (found := catalogue.evidence(recipe)) is not None:
                    lines.append(f"evidence {found['verdict']}")
        return "\n".join(lines)


def describe(name: str) -> Description:
    """Everything about one method."""
    thing = find.get(name)
    module = inspect.getmodule(thing)
    idea = inspect.cleandoc(module.__doc__ or "").splitlines()[0] if module else ""
    types = knobs.annotations(thing)
    shown = {k: f"{v!r}  ({_type(types.get(k))})" for k, v in find.knobs(thing).items()}
    return Description(
        name,
        find.folder(name),
        idea,
        thing.__doc__ or "",
        tuple(find.needs(thing)),
        tuple(find.wants(thing)),
        shown,
        thing.card,
        thing.card.row or (name,),
    )


# What a method may ask for besides tensors.
OTHERS = {
    "teacher": "a trained network",
    "batches": "some batches of the training data",
    "rows": "rows of text, as dicts",
    "seeds": "prompts to begin with",
}


def _asked(name: str) -> str:
    if name in names.NAMES:
        shape, meaning = names.NAMES[name]
        return f"[{shape}]  {meaning}"
    return OTHERS.get(name, "")


def _type(annotation: Any) -> str:
    if isinstance(annotation, type) and not hasattr(annotation, "__origin__"):
        return annotation.__name__
    return re.sub(r"\b(?:typing|collections\.abc)\.", "", str(annotation))


def chosen(family: str, has: set[str], search: str) -> list[Description]:
    """Methods of a folder, that ask only for what is at hand, and in which every word is found."""
    folders = {find.folder(n) for n in find.names()}
    if family and not any(f == family or f.startswith(family + "/") for f in folders):
        raise BadInput(f"there is no family {family!r}{nearest(family, folders | {f.split('/')[0] for f in folders})}")
    for name in has:
        if name not in names.NAMES:
            raise BadInput(f"no tensor is called {name!r}{nearest(name, names.NAMES)}")
    out = []
    for name in find.names():
        folder = find.folder(name)
        if family and not (folder == family or folder.startswith(family + "/")):
            continue
        d = describe(name)
        if has and not (d.asks and set(d.asks) <= has):
            continue
        text = f"{d.name} {d.idea} {d.doc} {d.card.paper}".lower()
        if all(word in text for word in search.lower().split()):
            out.append(d)
    return out
