"""Imports go one way, no method knows a sibling, the core dependencies suffice, and starting the CLI costs no torch.

The rules read source through `ast`, so they see imports inside functions too, and need nothing installed. Every rule is
also run over a small tree with one planted violation, which it has to report.
"""

import ast
import re
import subprocess
import sys
import tomllib
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

from limbeck.core.find import FAMILIES

ROOT = Path(__file__).parent.parent

# What stands in an earlier row may be imported by a later one; within a row, only one's own part.
LAYERS = (
    ("core",),
    ("losses", "data", "shape", "measure"),
    ("train",),
    ("zoo",),
    ("adapters",),
    ("report", "recipe"),
    ("verbs", "conformance"),
    ("run", "catalogue", "progress"),
    ("api",),
    ("",),  # limbeck itself: the public API, which only looks things up when they are asked for
    ("demo", "describe", "doctor", "export", "outlook", "plan", "verify"),  # what the commands do
    ("tune", "compare"),  # many recipes at once
    ("cli",),
    ("__main__",),
)
RANK = {part: rank for rank, row in enumerate(LAYERS) for part in row}
BROUGHT = {"scipy", "markupsafe"}  # scikit-learn and jinja2 cannot be installed without them
TORCH_FREE = (
    "limbeck",
    "limbeck.cli",
    "limbeck.core.card",
    "limbeck.core.errors",
    "limbeck.core.find",
    "limbeck.core.names",
)


@dataclass(frozen=True)
class Import:
    """One import statement: who imports what, as dotted modules, where, and whether it runs when the file is loaded."""

    source: str
    target: str
    where: str
    at_load: bool


def modules(root: Path) -> dict[str, Path]:
    """Every module of the package below `root`: dotted name -> file."""
    found = {}
    for file in sorted((root / "limbeck").rglob("*.py")):
        parts = file.relative_to(root).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file
    return found


def type_checking(node: ast.AST) -> bool:
    """Whether this is an `if TYPE_CHECKING:` block, whose imports never run."""
    return isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")


def targets(node: ast.AST, source: str, known: dict[str, Path]) -> list[str]:
    """What one statement or call imports; `from limbeck.core import maths` is limbeck.core.maths if that is one."""
    match node:
        case ast.Import(names=names):
            return [alias.name for alias in names]
        case ast.ImportFrom(module=base, names=names, level=level):
            if level:  # relative: resolve against the package that the file lies in
                inside = source.split(".") if known[source].stem == "__init__" else source.split(".")[:-1]
                base = ".".join([*inside[: len(inside) - level + 1], *filter(None, [base])])
            return [full if (full := f"{base}.{alias.name}") in known else str(base) for alias in names]
        case ast.Call(
            func=ast.Name(id="import_module") | ast.Attribute(attr="import_module"),
            args=[ast.Constant(value=str(name)), *_],
        ):
            return [name]
    return []


@cache
def imports(root: Path) -> tuple[Import, ...]:
    """Every import in the package, those inside functions too."""
    known, found = modules(root), []
    for source, file in known.items():
        nodes: list[tuple[ast.AST, bool]] = [(ast.parse(file.read_text(encoding="utf-8"), str(file)), True)]
        while nodes:
            node, at_load = nodes.pop()
            for target in targets(node, source, known):
                found.append(Import(source, target, f"{file.relative_to(root)}:{getattr(node, 'lineno', 0)}", at_load))
            later = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) or type_checking(node)
            nodes += ((child, at_load and not later) for child in ast.iter_child_nodes(node))
    return tuple(found)


def part(module: str) -> str:
    """limbeck.losses.logits.kd -> losses; limbeck -> ''."""
    return [*module.split("."), ""][1]


def wrong_direction(root: Path) -> list[str]:
    """Imports that climb: a lower part uses a higher one, or a part beside it."""
    out = []
    for i in imports(root):
        if i.target.split(".")[0] != "limbeck":
            continue
        low, high = part(i.source), part(i.target)
        if low not in RANK:
            out.append(f"{i.where}: limbeck/{low} has no place in the house; give it a row in LAYERS")
        elif high not in RANK or (low != high and RANK[high] >= RANK[low]):
            out.append(f"{i.where}: {low or 'limbeck'} must not import {i.target}")
    return list(dict.fromkeys(out))


def siblings(root: Path) -> list[str]:
    """Methods that import a method, except train -> losses. What two methods share belongs in core."""
    methods = {m for m, file in modules(root).items() if part(m) in FAMILIES and not file.stem.startswith("_")}
    return [
        f"{i.where}: {i.source} must not import the method {i.target}; what two share moves to core"
        for i in imports(root)
        if {i.source, i.target} <= methods and i.source != i.target
        if (part(i.source), part(i.target)) != ("train", "losses")
    ]


KERNELS = {("limbeck.core.headloss.kernels", "triton")}  # a file that is read where Triton is there, by `fused` alone


def beyond_core(root: Path) -> list[str]:
    """Libraries of an extra that are imported at load time outside adapters, so that a core install would break."""
    project = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    package = {"scikit_learn": "sklearn", "pyyaml": "yaml"}
    wanted = [re.split(r"[^A-Za-z0-9_-]", d)[0].lower().replace("-", "_") for d in project["dependencies"]]
    allowed = {package.get(d, d) for d in wanted} | BROUGHT | set(sys.stdlib_module_names) | {"limbeck"}
    return [
        f"{i.where}: {i.target} is no core dependency; import it inside the function that needs it, or in adapters"
        for i in imports(root)
        if i.at_load and part(i.source) != "adapters" and i.target.split(".")[0] not in allowed
        if (i.source, i.target.split(".")[0]) not in KERNELS
    ]


@pytest.mark.parametrize("rule", [wrong_direction, siblings, beyond_core])
def test_the_house_holds(rule):
    broken = rule(ROOT)
    assert not broken, "\n".join(["", *broken])


CLEAN = {
    "limbeck/__init__.py": "from limbeck.core import find\n",
    "limbeck/core/__init__.py": "",
    "limbeck/core/find.py": "import importlib\n",
    "limbeck/core/maths.py": "import torch\nfrom limbeck.core.find import names\n",
    "limbeck/losses/kd.py": "from limbeck.core.maths import kl\nfrom limbeck.losses._shared import a\n",
    "limbeck/losses/rkd.py": "from limbeck.core import maths\n",
    "limbeck/losses/_shared.py": "",
    "limbeck/train/dml.py": "from limbeck.losses.kd import kd\n",
    "limbeck/train/ban.py": "",
    "limbeck/data/herding.py": "import numpy\nimport sklearn.cluster\nimport yaml\n",
    "limbeck/adapters/hf.py": "import transformers\nfrom limbeck.train import dml\n",
    "limbeck/zoo.py": "",
    "limbeck/report/html.py": "import jinja2\n",
    "limbeck/run.py": "def go():\n    import transformers\n    from limbeck.report import html\n",
    "limbeck/catalogue.py": "import limbeck.report.html\n",
    "limbeck/cli.py": "import typer\nfrom limbeck import run\n",
    "pyproject.toml": "[project]\ndependencies = ['torch>=2', 'numpy', 'scikit-learn', 'pyyaml', 'jinja2', 'typer']\n",
}


def plant(root: Path, **changed: str) -> Path:
    """Write the clean tree below `root`, with `changed` lines put at the head of some files."""
    for name, text in CLEAN.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(changed.get(name, "") + text, encoding="utf-8")
    return root


def test_the_rules_accept_a_clean_tree(tmp_path):
    plant(tmp_path)
    assert wrong_direction(tmp_path) == siblings(tmp_path) == beyond_core(tmp_path) == []
    assert len(imports(tmp_path)) == 19


@pytest.mark.parametrize(
    ("rule", "file", "line"),
    [
        (wrong_direction, "limbeck/core/maths.py", "from limbeck.losses.kd import kd"),
        (wrong_direction, "limbeck/core/maths.py", "import limbeck"),
        (wrong_direction, "limbeck/core/maths.py", "from ..losses import kd"),
        (wrong_direction, "limbeck/core/maths.py", "from limbeck import losses"),
        (wrong_direction, "limbeck/core/maths.py", "def f():\n    import limbeck.train.dml"),
        (wrong_direction, "limbeck/core/maths.py", "if TYPE_CHECKING:\n    from limbeck.train.dml import DML"),
        (wrong_direction, "limbeck/core/maths.py", "import_module('limbeck.train.dml')"),
        (wrong_direction, "limbeck/losses/kd.py", "from limbeck.measure import agreement"),
        (wrong_direction, "limbeck/losses/kd.py", "from limbeck.train.dml import DML"),
        (wrong_direction, "limbeck/train/dml.py", "from limbeck.adapters import hf"),
        (wrong_direction, "limbeck/zoo.py", "from limbeck import adapters"),
        (wrong_direction, "limbeck/adapters/hf.py", "from limbeck.report import html"),
        (wrong_direction, "limbeck/report/html.py", "from limbeck import run"),
        (wrong_direction, "limbeck/run.py", "from limbeck.catalogue import rows"),
        (wrong_direction, "limbeck/catalogue.py", "from limbeck.cli import main"),
        (wrong_direction, "limbeck/catalogue.py", "import limbeck.attic"),
        (siblings, "limbeck/losses/kd.py", "from limbeck.losses.rkd import rkd"),
        (siblings, "limbeck/losses/kd.py", "from limbeck.losses import rkd"),
        (siblings, "limbeck/losses/kd.py", "from . import rkd"),
        (siblings, "limbeck/train/dml.py", "from limbeck.train.ban import BAN"),
        (siblings, "limbeck/train/dml.py", "def f():\n    from limbeck.data.herding import herding"),
        (beyond_core, "limbeck/run.py", "import transformers"),
        (beyond_core, "limbeck/losses/kd.py", "try:\n    import pandas as pd\nexcept ImportError:\n    pass"),
        (beyond_core, "limbeck/losses/kd.py", "class C:\n    from timm.models import create"),
    ],
)
def test_the_rules_catch_a_planted_violation(tmp_path, rule, file, line):
    broken = rule(plant(tmp_path, **{file: line + "\n"}))
    assert len(broken) == 1 and broken[0].startswith(f"{file}:"), broken


@pytest.mark.parametrize("module", [m for m in TORCH_FREE if m == "limbeck" or m in modules(ROOT)])
def test_importing_costs_no_torch(module):
    code = (
        f"import sys, {module}; print(*sorted({{'torch', 'numpy', 'transformers', 'accelerate'}} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "", f"importing {module} also imports {done.stdout.strip()}"
