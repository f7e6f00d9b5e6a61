"""What the tests of the command line and of the Python API share: tiny data, a tiny teacher, and calling `limbeck`."""

import contextlib
import io
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
import yaml
from safetensors.torch import save_file

from limbeck import cli
from limbeck.zoo.nets import build

ROOT = Path(__file__).parent.parent
CLASSES = 2


@dataclass(frozen=True)
class Called:
    """What one call of `limbeck` gave."""

    code: int
    out: str
    err: str

    @property
    def said(self) -> str:
        """The one sentence of a refusal: nothing on stdout, one line on stderr, and no traceback."""
        assert self.out == "", self.out
        assert self.err.count("\n") == 1 and self.err.startswith("limbeck: "), self.err
        assert "Traceback" not in self.err
        return self.err.removeprefix("limbeck: ").strip()


def limbeck(*arguments: object) -> Called:
    """Call the command line in this process."""
    out, err = io.StringIO(), io.StringIO()
    argv = ["limbeck", *map(str, arguments)]
    code: int | str | None = 0
    with mock.patch.object(sys, "argv", argv), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            cli.main()
        except SystemExit as stop:
            code = stop.code
    assert isinstance(code, int) or code is None
    return Called(code or 0, out.getvalue(), err.getvalue())


def environment(package: Path = ROOT) -> dict[str, str]:
    """Of a subprocess that runs the package below `package` on one thread."""
    return {**os.environ, "PYTHONPATH": str(package), "OMP_NUM_THREADS": "1"}


def command(*arguments: object) -> list[str]:
    """The command line as a subprocess's arguments."""
    return [sys.executable, "-c", "from limbeck.cli import main; main()", *map(str, arguments)]


def outside(*arguments: object, package: Path = ROOT, cwd: Path | None = None, **options: Any) -> Called:
    """Call the command line in a process of its own."""
    done = subprocess.run(
        command(*arguments), env=environment(package), cwd=cwd, capture_output=True, text=True, timeout=300, **options
    )
    return Called(done.returncode, done.stdout, done.stderr)


def images(count: int = 64, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Pictures [N, 1, 8, 8] of two classes, bright above or bright below, with noise."""
    draw = np.random.default_rng(seed)
    labels = np.arange(count) % CLASSES
    x = draw.normal(0, 1.0, (count, 1, 8, 8))
    x[labels == 0, :, :4] += 1
    x[labels == 1, :, 4:] += 1
    return x.astype(np.float32), labels.astype(np.int64)


def data(folder: Path, count: int = 64) -> Path:
    """An npz file of tiny pictures."""
    path = folder / "tiny.npz"
    x, y = images(count)
    np.savez(path, inputs=x, labels=y)
    return path


def teacher(folder: Path, name: str = "mlp", seed: int = 1, **options: Any) -> Path:
    """Weights of a small teacher that has learned nothing: what is tested here does not depend on it."""
    torch.manual_seed(seed)
    net = build({"net": name, **options}, classes=CLASSES, channels=1, size=8)
    path = folder / "teacher.safetensors"
    save_file({k: v.contiguous() for k, v in net.state_dict().items()}, path)
    return path


def body(folder: Path, **changes: Any) -> dict[str, Any]:
    """A recipe's tree: `teach` on tiny pictures in six steps. A change to None takes a key out."""
    known = {
        "name": "tiny",
        "do": "teach",
        "teacher": {"net": "mlp", "width": 16, "weights": str(folder / "teacher.safetensors")},
        "student": {"net": "mlp", "width": 4, "depth": 1},
        "data": {"name": str(folder / "tiny.npz")},
        "match": ["ce", {"kd": {"temperature": 2}}],
        "train": {"steps": 6, "batch_size": 16},
    } | changes
    return {key: value for key, value in known.items() if value is not None}


def recipe(folder: Path, **changes: Any) -> Path:
    """A recipe file with its data and its teacher beside it."""
    if not (folder / "tiny.npz").exists():
        data(folder)
        teacher(folder, width=16)
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump(body(folder, **changes), sort_keys=False))
    return path
