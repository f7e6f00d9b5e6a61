"""What this machine has, and whether limbeck works on it: versions, devices, extras, threads, a short self-test."""

import os
import platform
import time
from importlib.metadata import PackageNotFoundError, requires, version
from importlib.util import find_spec

EXTRAS = {
    "text": ("transformers", "datasets", "tokenizers", "peft", "zstandard"),
    "vision": ("timm", "torchvision"),
    "generative": ("diffusers", "torchdiffeq", "geomloss"),
    "retrieval": ("sentence_transformers", "ir_measures"),
    "graph": ("torch_geometric",),
    "scale": ("ray", "flwr"),
    "export": ("onnx", "onnxscript", "onnxruntime"),
    "track": ("tensorboard",),
}


def examine() -> tuple[list[str], bool]:
    """Lines to print, and whether all is well."""
    import torch

    import limbeck

    lines = [f"limbeck {limbeck.__version__}, Python {platform.python_version()}, {platform.platform()}"]
    lines.append("core: " + ", ".join(f"{name} {_version(name)}" for name in _core()))
    devices = [f"cuda:{i} {torch.cuda.get_device_name(i)}" for i in range(torch.cuda.device_count())]
    if torch.backends.mps.is_available():
        devices.append("mps")
    lines.append("devices: " + ", ".join(["cpu", *devices]))
    tip = "tiny networks run faster with OMP_NUM_THREADS=1"
    lines.append(f"threads: {torch.get_num_threads()} of {os.cpu_count()} cores ({tip})")
    for extra, modules in EXTRAS.items():
        absent = [m for m in modules if find_spec(m) is None]
        cure = f"absent: {', '.join(absent)}; pip install 'limbeck[{extra}]'"
        lines.append(f"extra {extra}: {cure if absent else 'there'}")
    folder = os.environ.get("LIMBECK_DATA")
    gone = folder is not None and not os.path.isdir(folder)
    lines.append(f"LIMBECK_DATA: {folder or 'not set'}{' (no such folder)' if gone else ''}")
    began = time.monotonic()
    problems = self_test()
    lines += [f"self-test: {p}" for p in problems]
    lines.append(f"self-test: {'FAILED' if problems else 'passed'} in {time.monotonic() - began:.1f} s")
    return lines, not problems


def self_test() -> list[str]:
    """Train, interrupt, resume and compare in a few seconds; [] when all is well."""
    import tempfile
    from pathlib import Path

    import torch
    from torch import nn

    from limbeck.core import knobs
    from limbeck.core.batches import Batches, Table
    from limbeck.core.loop import Plan, fit
    from limbeck.core.nets import Nets

    generator = torch.Generator().manual_seed(0)
    x = torch.randn(512, 8, generator=generator)
    table = Table({"inputs": x, "labels": (x[:, 0] > 0).long()})

    def once(steps: int, folder: Path | None, resume: bool = False) -> tuple[list[float], nn.Module]:
        torch.manual_seed(0)
        student = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 2))
        teacher = nn.Linear(8, 2)
        method = knobs.make("distill", {"match": ("ce", "kd")})
        nets = Nets(student=student, teacher=teacher)
        fitted = fit(method, nets, Batches(table, 64), Plan(steps=steps, save_every=20), folder=folder, resume=resume)
        return [sum(parts.values()) for *_, parts in fitted.turns], nets.student

    problems = []
    with tempfile.TemporaryDirectory() as scratch:
        losses, whole = once(40, Path(scratch) / "a")
        _, again = once(40, Path(scratch) / "a", resume=True)
        if not losses[-1] < losses[0]:
            problems.append(f"the loss did not fall: {losses[0]:.4f} -> {losses[-1]:.4f}")
        if any(not torch.equal(a, b) for a, b in zip(whole.parameters(), again.parameters(), strict=True)):
            problems.append("a resumed run differs from an uninterrupted one")
    return problems


def _core() -> list[str]:
    try:
        wanted = [r.split(";")[0] for r in requires("limbeck") or [] if "extra ==" not in r]
    except PackageNotFoundError:
        return ["torch", "numpy", "accelerate"]
    return [w.split(">")[0].split("=")[0].split("[")[0].strip() for w in wanted]


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "absent"
