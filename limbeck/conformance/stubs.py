"""Writes the two files of a new method: source that imports and says what to fill in, and a vector that is still empty.

A stub passes no conformance run: its card names no year and its vector no numbers, and `limbeck check` says so.
"""

import datetime
import json
import keyword
import re
from dataclasses import dataclass
from textwrap import dedent

from limbeck.core import find
from limbeck.core.errors import BadInput, nearest


@dataclass(frozen=True)
class Kind:
    """One kind of method. body: its source below the card. vector: what its vector must hold."""

    body: str
    vector: dict[str, object]
    imports: str = ""
    decorate: str = ""


LOGITS = Kind(
    imports="""
    from torch import Tensor

    from limbeck.core.card import method, require
    from limbeck.core.maths import kl
    """,
    body='''
    def {name}(student_logits: Tensor, teacher_logits: Tensor, *, temperature: float = 1.0) -> Tensor:
        """The equation, in one line.  [..., C] x 2 -> [...]

        temperature: T > 0; what it does, and what is usual.

        *Needs*: logits of both over the same classes. *Relates to*: use `kd` when ...
        """
        require(temperature > 0, "temperature", temperature, "> 0")
        return temperature**2 * kl(student_logits, teacher_logits.detach(), temperature)
    ''',
    vector={
        "knobs": {"temperature": 1.0},
        "inputs": {"student_logits": None, "teacher_logits": None},
        "reduce": "mean",
        "value": None,
        "grad": {"student_logits": None},
    },
)
MODULE = Kind(
    imports="""
    from torch import Tensor, nn

    from limbeck.core.card import method
    from limbeck.core.maths import pair
    """,
    body='''
    class {title}(nn.Module):
        """The equation, in one line.  [B, D], [B, E] -> [B]

        bias: whether the projector has one.

        *Needs*: embeddings of both. *Relates to*: use `rkd` when ...
        """

        def __init__(self, student_emb: tuple[int, ...], teacher_emb: tuple[int, ...], *, bias: bool = True) -> None:
            super().__init__()
            self.bias = bias
            self.projector = nn.Linear(student_emb[-1], teacher_emb[-1], bias=bias)

        def forward(self, student_emb: Tensor, teacher_emb: Tensor) -> Tensor:
            """Per example."""
            weight = self.projector.weight
            student, teacher = pair(self.projector(student_emb.to(weight.dtype)), teacher_emb.detach())
            return (student - teacher).square().mean(-1)
    ''',
    vector={
        "knobs": {"bias": True},
        "inputs": {"student_emb": None, "teacher_emb": None},
        "state": {"projector.weight": None, "projector.bias": None},
        "reduce": "mean",
        "value": None,
        "grad": {"student_emb": None},
    },
)
RELATION = Kind(
    imports="""
    from torch import Tensor

    from limbeck.core.card import method
    from limbeck.core.maths import pairwise_distances
    """,
    body='''
    def {name}(student_emb: Tensor, teacher_emb: Tensor, *, power: float = 2.0) -> Tensor:
        """The equation, in one line.  [B, D], [B, E] -> []

        power: p >= 1; what it does.

        *Needs*: embeddings of both, at least two examples. *Relates to*: use `rkd` when ...
        """
        gap = pairwise_distances(student_emb) - pairwise_distances(teacher_emb.detach())
        return gap.abs().pow(power).mean()
    ''',
    vector={
        "knobs": {"power": 2.0},
        "inputs": {"student_emb": None, "teacher_emb": None},
        "reduce": "mean",
        "value": None,
        "grad": {"student_emb": None},
    },
)
MAPS = Kind(
    imports="""
    import torch
    from torch import Tensor

    from limbeck.core.card import method
    from limbeck.core.maths import upcast
    """,
    body='''
    def {name}(student_feats: list[Tensor], teacher_feats: list[Tensor], *, power: float = 2.0) -> Tensor:
        """The equation, in one line.  [B, C, H, W] lists -> [B]

        power: p >= 1; what it does.

        *Needs*: feature maps, as many layers a side. *Relates to*: use `at` when ...
        """
        gaps = [
            (upcast(s).mean((1, 2, 3)) - upcast(t).detach().mean((1, 2, 3))).abs().pow(power)
            for s, t in zip(student_feats, teacher_feats, strict=True)
        ]
        return torch.stack(gaps).sum(0)
    ''',
    vector={
        "knobs": {"power": 2.0},
        "inputs": {"student_feats": None, "teacher_feats": None},
        "reduce": "mean",
        "value": None,
        "grad": {"student_feats": None},
    },
)
TRAIN = Kind(
    imports="""
    from collections.abc import Iterator
    from dataclasses import dataclass

    from limbeck.core.card import method, require
    from limbeck.core.loop import Clock, Turn
    from limbeck.core.nets import Batch, Nets
    from limbeck.core.reduce import mean
    from limbeck.losses.logits.kd import kd
    """,
    decorate="@dataclass(frozen=True)\n",
    body='''
    class {title}:
        """What each player minimises, in one line.

        temperature: T > 0; what it does, and what is usual.

        *Needs*: nets.teacher, nets.student. *Relates to*: use `distill` when ...
        """

        temperature: float = 4.0

        def __post_init__(self) -> None:
            require(self.temperature > 0, "temperature", self.temperature, "> 0")

        def step(self, nets: Nets, batch: Batch, clock: Clock) -> Iterator[Turn]:
            """One turn of the student."""
            student, teacher = nets.run("student", batch)["logits"], nets.run("teacher", batch)["logits"]
            yield "student", mean(kd(student, teacher, temperature=self.temperature), batch.get("mask"))
    ''',
    vector={"knobs": {}, "turns": None},
)
SHAPE = Kind(
    imports="""
    from torch import nn

    from limbeck.core.card import method, require
    from limbeck.core.surgery import copied
    """,
    body='''
    def {name}(teacher: nn.Module, *, ratio: float = 0.5) -> nn.Module:
        """A copy of the teacher that ...

        ratio: share that goes, in (0, 1).

        *Needs*: ... *Relates to*: use `layer_choice` when ...
        """
        require(0 < ratio < 1, "ratio", ratio, "in (0, 1)")
        return copied(teacher)
    ''',
    vector={"knobs": {}, "kept": None},
)
SELECT = Kind(
    imports="""
    from torch import Tensor

    from limbeck.core.card import method, require
    from limbeck.core.maths import upcast
    """,
    body='''
    def {name}(features: Tensor, *, budget: int = 10) -> Tensor:
        """Indices of the examples that ...  [N, ...] -> [budget]

        budget: how many to pick, 1..N.

        *Needs*: features, best of a trained network. *Relates to*: use `herding` when ...
        """
        require(1 <= budget <= len(features), "budget", budget, f"in 1..{{len(features)}}")
        return upcast(features).flatten(1).norm(dim=1).argsort(stable=True)[:budget]
    ''',
    vector={"knobs": {"budget": 3}, "inputs": {"features": None}, "value": None},
)
ROWS = Kind(
    imports="""
    from collections.abc import Iterable, Iterator
    from typing import Any

    from limbeck.core.card import method, require
    """,
    body='''
    def {name}(rows: Iterable[dict[str, Any]], *, field: str = "text", shortest: int = 1) -> Iterator[dict[str, Any]]:
        """The rows that ..., in order -> rows, with this filter added to their `provenance`.

        field: the key of the text in a row.
        shortest: characters, >= 0.

        *Needs*: rows with text. *Relates to*: use `quality_filter` when ...
        """
        require(shortest >= 0, "shortest", shortest, ">= 0")
        for row in rows:
            if len(row[field]) >= shortest:
                yield {{**row, "provenance": [*row.get("provenance", []), "{name}"]}}
    ''',
    vector={"knobs": {}, "inputs": {"rows": None}, "value": None},
)
MEASURE = Kind(
    imports="""
    from torch import Tensor

    from limbeck.core.card import method
    """,
    body='''
    def {name}(student_logits: Tensor, teacher_logits: Tensor) -> float:
        """What the number says, its unit and range.  [..., C] x 2 -> number

        *Needs*: logits of both over the same classes. *Relates to*: use `agreement` when ...
        """
        return (student_logits.double() - teacher_logits.double()).abs().mean().item()
    ''',
    vector={"knobs": {}, "inputs": {"student_logits": None, "teacher_logits": None}, "value": None},
)
KINDS = {
    "losses/logits": LOGITS,
    "losses/tokens": LOGITS,
    "losses/features": MAPS,
    "losses/attention": MAPS,
    "losses/relations": RELATION,
    "losses/contrast": MODULE,
    "losses": LOGITS,
    "train": TRAIN,
    "shape": SHAPE,
    "data/select": SELECT,
    "data": ROWS,
    "measure": MEASURE,
}


def folders() -> list[str]:
    """Every folder that a method may live in."""
    found = []
    for family in find.FAMILIES:
        for init in sorted((find.ROOT / family).glob("*/__init__.py")):
            found.append(f"{family}/{init.parent.name}")
    return found


def stub(name: str, folder: str) -> tuple[str, str]:
    """Source of limbeck/FOLDER/NAME.py and of tests/vectors/NAME.json for a new method, ready to be filled in.

    name: the file stem, lower case, such as "topk_kd". folder: one of `folders()`, such as "losses/logits".
    """
    folder = folder.strip("/").removeprefix("limbeck/")
    if not re.fullmatch(r"[a-z][a-z0-9_]*", name) or keyword.iskeyword(name):
        raise BadInput(f"{name!r} cannot be a method's name: it is a file name, lower case, such as `topk_kd`")
    if name in find.names():
        raise BadInput(f"there is a method {name!r} already, in {find.folder(name)}")
    if folder not in folders():
        raise BadInput(f"methods do not live in {folder!r}{nearest(folder, folders())}")
    kind = KINDS.get(folder) or KINDS[folder.split("/")[0]]
    title = "".join(part.capitalize() for part in name.split("_"))
    card = dedent(f"""
    @method(
        paper="Author et al., eq. 1",
        year={datetime.date.today().year},
        arxiv="",
        differs="",
    )
    """).strip()
    body = dedent(kind.body).strip().format(name=name, title=title)
    idea = "The idea of the paper in one sentence."
    source = f'"""{idea}"""\n\n{dedent(kind.imports).strip()}\n\n\n{card}\n{kind.decorate}{body}\n'
    vector = {"source": "", **kind.vector}
    return source, json.dumps(vector, indent=1) + "\n"
