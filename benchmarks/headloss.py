"""The vocabulary loss from hidden states against three that build logits: seconds, memory and error of the gradient.

`python benchmarks/headloss.py --peers FOLDER` prints a table and writes benchmarks/results/headloss.json. FOLDER holds
`pip install --no-deps --target FOLDER trl==1.16.0 liger-kernel==0.8.5`; transformers must be importable. Forward
divergence of a student close to its teacher, one head each, forward and backward, one thread; all ways read the same
tensors and take turns in one process, so that what else the machine does falls on all. Ratios are medians over rounds
of processor time. Peaks are what torch allocated at once, with and without the gradients that all must return.

A CPU without units for bf16 takes minutes for the products of the ways that multiply in bf16: there, these shapes have
`--bf16-tokens` tokens (0: all).
"""

from __future__ import annotations

import argparse
import gc
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from memory import memory
from torch import Tensor
from torch.nn import functional as F

from limbeck.core.headloss import Head, Term, head_loss
from limbeck.core.headloss.divergences import forward_kl
from limbeck.core.headloss.loss import half_units

ROOT = Path(__file__).resolve().parent.parent
SHAPES = [(512, 576, 49152), (256, 640, 262144)]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
NAIVE = "logits"
EXACT_ERROR, FAST_ERROR = {"hidden": 0.003, "head": 0.003}, {"hidden": 0.03, "head": 0.06}


@dataclass
class Setting:
    """What all ways read; gradients are left on `hidden` and `head`."""

    hidden: Tensor
    head: Tensor
    teacher_hidden: Tensor
    teacher_head: Tensor

    @property
    def leaves(self) -> dict[str, Tensor]:
        return {"hidden": self.hidden, "head": self.head}


def setting(tokens: int, width: int, words: int, dtype: torch.dtype) -> Setting:
    g = torch.Generator().manual_seed(0)
    hidden, head = torch.randn(tokens, width, generator=g), torch.randn(words, width, generator=g)
    head *= 2 / width**0.5  # logits of deviation 2
    near = hidden + 0.05 * torch.randn(tokens, width, generator=g)
    return Setting(
        near.to(dtype).requires_grad_(), head.to(dtype).requires_grad_(), hidden.to(dtype), head.to(dtype).clone()
    )


def logits(s: Setting) -> Tensor:
    with torch.no_grad():
        teacher = (s.teacher_hidden @ s.teacher_head.T).float().log_softmax(-1)
    student = (s.hidden @ s.head.T).float().log_softmax(-1)
    return F.kl_div(student, teacher, reduction="sum", log_target=True) / len(s.hidden)


def limbeck(s: Setting, *, fast: bool = False, recompute: bool = False) -> Tensor:
    student, teacher = Head(s.hidden, s.head), Head(s.teacher_hidden, s.teacher_head)
    (values,) = head_loss(student, teacher, [Term(forward_kl)], fast=fast, recompute=recompute)
    return values.mean()


def ways() -> dict[str, Callable[[Setting], Tensor]]:
    """The naive loss, ours, and the peers'."""
    try:
        from liger_kernel.chunked_loss.jsd_loss import LigerFusedLinearJSDFunction
        from trl.kernels.chunked_divergence import ChunkedDivergenceFunction
    except ImportError as error:
        raise SystemExit(f"{error}; say where the peers are: --peers FOLDER, see --help") from error

    def trl(s: Setting) -> Tensor:
        values: Tensor = ChunkedDivergenceFunction.apply(
            s.hidden, s.head, None, s.teacher_hidden, s.teacher_head, None, 0.0
        )[0]
        return values.mean()

    def liger(s: Setting) -> Tensor:
        labels = torch.zeros(len(s.hidden), dtype=torch.long)
        loss: Tensor = LigerFusedLinearJSDFunction.apply(
            s.hidden, s.head, s.teacher_hidden, s.teacher_head, labels, None, None, 0.0, 1.0, 0.0, -100, 1.0, False
        )
        return loss

    return {
        NAIVE: logits,
        "exact": limbeck,
        "fast": lambda s: limbeck(s, fast=True),
        "recompute": lambda s: limbeck(s, recompute=True),
        "trl": trl,
        "liger": liger,
    }


def step(way: Callable[[Setting], Tensor], s: Setting) -> float:
    for leaf in s.leaves.values():
        leaf.grad = None
    loss = way(s)
    loss.backward()
    return float(loss.detach())


def seconds(way: Callable[[Setting], Tensor], s: Setting) -> float:
    gc.collect()
    start = time.process_time()
    step(way, s)
    return time.process_time() - start


def truth(s: Setting, rows: int = 32) -> tuple[float, dict[str, Tensor]]:
    """Value and gradients by full logits in fp64, a few rows at a time."""
    exact = [t.detach().double() for t in (s.hidden, s.head, s.teacher_hidden, s.teacher_head)]
    head = exact[1].requires_grad_()
    total, to_hidden = 0.0, []
    for low in range(0, len(exact[0]), rows):
        part = slice(low, low + rows)
        few = Setting(exact[0][part].requires_grad_(), head, exact[2][part], exact[3])
        student = (few.hidden @ few.head.T).log_softmax(-1)
        teacher = (few.teacher_hidden @ few.teacher_head.T).log_softmax(-1)
        loss = F.kl_div(student, teacher, reduction="sum", log_target=True) / len(exact[0])
        loss.backward()
        total += float(loss.detach())
        assert few.hidden.grad is not None
        to_hidden.append(few.hidden.grad)
    assert head.grad is not None
    return total, {"hidden": torch.cat(to_hidden), "head": head.grad}


def measure(s: Setting, rounds: int, methods: dict[str, Callable[[Setting], Tensor]]) -> dict[str, Any]:
    value, grads = truth(s)
    found: dict[str, Any] = {"value": value, "ways": {}}
    returned = sum(leaf.numel() * leaf.element_size() for leaf in s.leaves.values())
    for name, way in methods.items():  # the first of each warms up
        for leaf in s.leaves.values():
            leaf.grad = None
        values: list[float] = []
        peak = memory(lambda way=way, values=values: values.append(step(way, s)))  # type: ignore[misc]
        found["ways"][name] = {
            "peak_bytes": peak,
            "beyond_gradients_bytes": peak - returned,
            "value_error": abs(values[0] - value) / value,
            "gradient_error": {k: _far(leaf.grad, grads[k]) for k, leaf in s.leaves.items()},
        }
    del grads
    times: dict[str, list[float]] = {name: [] for name in methods}
    for _ in range(rounds):
        for name, way in methods.items():
            times[name].append(seconds(way, s))
    for name, own in times.items():
        ratios = {
            other: statistics.median(a / b for a, b in zip(own, times[other], strict=True))
            for other in (NAIVE, "trl", "liger")
            if other in times
        }
        found["ways"][name] |= {"seconds": own, "median_seconds": statistics.median(own), "ratio_to": ratios}
    return found


def _far(grad: Tensor | None, exact: Tensor) -> float:
    """|grad - exact| / |exact|, without a second tensor of that size."""
    assert grad is not None
    apart = norm = 0.0
    for g, e in zip(grad.split(4096), exact.split(4096), strict=True):
        apart += float((g.double() - e).square().sum())
        norm += float(e.square().sum())
    return (apart / norm) ** 0.5


def judge(found: dict[str, Any], dtype: str) -> list[str]:
    """What misses its bar."""
    ways, missed = found["ways"], []
    exact, fast, naive = ways["exact"], ways["fast"], ways[NAIVE]

    def hold(what: str, got: float, bar: float) -> None:
        if got > bar:
            missed.append(f"{what} {got:.3g}, bar {bar:g}")

    if dtype == "fp32":
        hold("exact to logits", exact["ratio_to"][NAIVE], 1.0)
    else:
        hold("fast to logits", fast["ratio_to"][NAIVE], 0.8)
        for kind, bars, way in (("exact", EXACT_ERROR, exact), ("fast", FAST_ERROR, fast)):
            for leaf, bar in bars.items():
                hold(f"{kind} gradient to {leaf}", way["gradient_error"][leaf], bar)
    hold("exact to TRL", exact["ratio_to"]["trl"], 0.6)
    # beyond the gradients: that of a head of 262144 words alone is half of all that the naive loss holds
    hold("exact memory beyond gradients", exact["beyond_gradients_bytes"] / naive["beyond_gradients_bytes"], 0.5)
    return missed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", type=Path, action="append", default=[], help="folder with trl and liger_kernel")
    parser.add_argument("--rounds", type=int, default=5, help="passes of each way that count")
    parser.add_argument("--bf16-tokens", type=int, default=16, help="where the CPU has no units for bf16; 0 for all")
    parser.add_argument("--only", nargs="*", default=[], help="cases such as 49152-fp32; writes nothing")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "headloss.json")
    args = parser.parse_args()
    sys.path[:0] = [str(folder) for folder in args.peers]
    torch.set_num_threads(1)
    methods, cases, missed = ways(), {}, []
    units = half_units(torch.empty(0, dtype=torch.bfloat16))
    print(
        f"{'case':<26}{'way':<11}{'seconds':>8}{'to logits':>10}{'to TRL':>8}{'peak MB':>9}{'beyond':>8}{'value':>10}",
        end="",
    )
    print(f"{'hidden':>9}{'head':>9}")
    for tokens, width, words in SHAPES:
        for kind, dtype in DTYPES.items():
            if args.only and f"{words}-{kind}" not in args.only:
                continue
            n = tokens if kind == "fp32" or units or not args.bf16_tokens else args.bf16_tokens
            found = measure(setting(n, width, words, dtype), args.rounds if n == tokens or units else 1, methods)
            name = f"({n}, {width}, {words}) {kind}"
            cases[name] = found | {"missed": judge(found, kind)}
            missed += [f"{name}: {m}" for m in cases[name]["missed"]]
            for way, f in found["ways"].items():
                error = f["gradient_error"]
                print(
                    f"{name:<26}{way:<11}{f['median_seconds']:>8.2f}{f['ratio_to'][NAIVE]:>9.2f}x"
                    f"{f['ratio_to']['trl']:>7.2f}x{f['peak_bytes'] / 1e6:>9.0f}"
                    f"{f['beyond_gradients_bytes'] / 1e6:>8.0f}"
                    f"{f['value_error']:>10.1e}{error['hidden']:>9.1e}{error['head']:>9.1e}",
                    flush=True,
                )
    print("\n".join(["NOT held:", *missed]) if missed else "all bars held")
    if not args.only:
        result = {
            "cases": cases,
            "missed": missed,
            "setting": {"rounds": args.rounds, "threads": 1, "bf16_units": units},
            "peers": {"trl": "1.16.0", "liger-kernel": "0.8.5"},
            "torch": torch.__version__,
            "python": platform.python_version(),
        }
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(result, indent=1) + "\n")
    if missed:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
