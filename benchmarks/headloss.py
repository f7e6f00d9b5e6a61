"""The vocabulary loss from hidden states against three that build logits: seconds, memory and error of the gradient.

`python benchmarks/headloss.py --peers FOLDER` prints a table and writes benchmarks/results/headloss.json. FOLDER holds
`pip install --no-deps --target FOLDER trl==1.16.0 liger-kernel==0.8.5`; transformers must be importable. Forward
divergence of a student close to its teacher, one head each, forward and backward, one thread; all ways read the same
tensors and take turns in one process, so that what else the machine does falls on all. Ratios are medians over rounds
of processor time. Peaks are what torch allocated at once, with and without the gradients that all must return.

A CPU without units for bf16 takes minutes for the products of the ways that multiply in bf16: there, these shapes have
`--bf16-tokens` tokens (0: all).

Where there is a CUDA device, it is measured too, in bf16 at 8192 tokens, hidden size 4096 and 128256 words: ours with
and without the Triton kernel, the naive loss and Liger's where it is at hand, against the four bare products; device
time by events, peaks by torch's allocator. `--only cuda` does this alone; of the peers it asks Liger's, where it is.
"""

from __future__ import annotations

import argparse
import contextlib
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
GPU = (8192, 4096, 128256)
LIGER_PUBLISHED = {"milliseconds": 60.7, "peak_bytes": 11.1e9}  # on an H100, for the shape of GPU
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


def setting(tokens: int, width: int, words: int, dtype: torch.dtype, device: str = "cpu") -> Setting:
    g = torch.Generator(device).manual_seed(0)
    hidden, head, noise = (torch.randn(n, width, generator=g, device=device) for n in (tokens, words, tokens))
    head *= 2 / width**0.5  # logits of deviation 2
    near = hidden + 0.05 * noise
    return Setting(
        near.to(dtype).requires_grad_(), head.to(dtype).requires_grad_(), hidden.to(dtype), head.to(dtype).clone()
    )


def logits(s: Setting) -> Tensor:
    with torch.no_grad():
        teacher = (s.teacher_hidden @ s.teacher_head.T).float().log_softmax(-1)
    student = (s.hidden @ s.head.T).float().log_softmax(-1)
    return F.kl_div(student, teacher, reduction="sum", log_target=True) / len(s.hidden)


def limbeck(s: Setting, *, fast: bool = False, recompute: bool = False, fused: bool | None = None) -> Tensor:
    student, teacher = Head(s.hidden, s.head), Head(s.teacher_hidden, s.teacher_head)
    (values,) = head_loss(student, teacher, [Term(forward_kl)], fast=fast, recompute=recompute, fused=fused)
    return values.mean()


def liger() -> Callable[[Setting], Tensor]:
    """Liger's chunked loss, if it can be imported."""
    from liger_kernel.chunked_loss.jsd_loss import LigerFusedLinearJSDFunction

    def way(s: Setting) -> Tensor:
        labels = torch.zeros(len(s.hidden), dtype=torch.long, device=s.hidden.device)
        loss: Tensor = LigerFusedLinearJSDFunction.apply(
            s.hidden, s.head, s.teacher_hidden, s.teacher_head, labels, None, None, 0.0, 1.0, 0.0, -100, 1.0, False
        )
        return loss

    return way


def ways() -> dict[str, Callable[[Setting], Tensor]]:
    """The naive loss, ours, and the peers'."""
    try:
        of_liger = liger()
        from trl.kernels.chunked_divergence import ChunkedDivergenceFunction
    except ImportError as error:
        raise SystemExit(f"{error}; say where the peers are: --peers FOLDER, see --help") from error

    def trl(s: Setting) -> Tensor:
        values: Tensor = ChunkedDivergenceFunction.apply(
            s.hidden, s.head, None, s.teacher_hidden, s.teacher_head, None, 0.0
        )[0]
        return values.mean()

    return {
        NAIVE: logits,
        "exact": limbeck,
        "fast": lambda s: limbeck(s, fast=True),
        "recompute": lambda s: limbeck(s, recompute=True),
        "trl": trl,
        "liger": of_liger,
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


def products(s: Setting, rows: int = 4096) -> Tensor:
    """What no way can do without: logits of both, and the gradients to hidden states and head, a block at a time."""
    with torch.no_grad():
        to_hidden, to_head = torch.empty_like(s.hidden), torch.zeros_like(s.head)
        z = s.hidden.new_empty(rows, len(s.head))
        for low in range(0, len(s.hidden), rows):
            part = slice(low, low + rows)
            torch.mm(s.teacher_hidden[part], s.teacher_head.T, out=z[: len(s.hidden[part])])
            out = torch.mm(s.hidden[part], s.head.T, out=z[: len(s.hidden[part])])
            torch.mm(out, s.head, out=to_hidden[part])
            to_head.addmm_(out.T, s.hidden[part])
    s.hidden.grad, s.head.grad = to_hidden, to_head
    return to_hidden.new_zeros((), requires_grad=True)


def cuda_ways() -> dict[str, Callable[[Setting], Tensor]]:
    """The products first: ratios are to them."""
    found: dict[str, Callable[[Setting], Tensor]] = {
        "products": products,
        "fast": lambda s: limbeck(s, fast=True),
        "fast, torch": lambda s: limbeck(s, fast=True, fused=False),
        "exact": limbeck,
        "exact, torch": lambda s: limbeck(s, fused=False),
        NAIVE: logits,
    }
    with contextlib.suppress(ImportError):
        found["liger"] = liger()
    return found


def on_cuda(rounds: int, shape: tuple[int, int, int] = GPU) -> dict[str, Any]:
    """Milliseconds, peak bytes beyond the inputs, and errors against fp64; the reason where a way does not run."""
    s = setting(*shape, torch.bfloat16, "cuda")
    value, grads = truth(s, 512)
    grads = {k: g.float() for k, g in grads.items()}  # room for the naive loss
    methods, found = cuda_ways(), dict[str, Any]()
    for name, way in list(methods.items()):
        for leaf in s.leaves.values():
            leaf.grad = None
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        try:
            step(way, s)  # warms up
            loss = step(way, s)
        except (torch.OutOfMemoryError, RuntimeError) as error:
            found[name] = {"failed": str(error).splitlines()[0]}
            del methods[name]
            continue
        found[name] = {"peak_bytes": torch.cuda.max_memory_allocated() - before}
        if name != "products":
            found[name]["value_error"] = abs(loss - value) / value
            found[name]["gradient_error"] = {k: _far(leaf.grad, grads[k]) for k, leaf in s.leaves.items()}
    times: dict[str, list[float]] = {name: [] for name in methods}
    for _ in range(rounds):
        for name, way in methods.items():
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda.synchronize()
            start.record()
            step(way, s)
            end.record()
            torch.cuda.synchronize()
            times[name].append(start.elapsed_time(end))
    bare = statistics.median(times["products"])
    for name, own in times.items():
        middle = statistics.median(own)
        found[name] |= {"milliseconds": own, "median_milliseconds": middle, "ratio_to_products": middle / bare}
    return {
        "shape": shape,
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "liger_published": LIGER_PUBLISHED,
        "ways": found,
    }


def show_cuda(told: dict[str, Any]) -> None:
    print(
        f"{told['device']}, {told['shape']} bf16\n{'way':<14}{'ms':>9}{'products':>10}{'peak GB':>9}{'value':>10}",
        end="",
    )
    print(f"{'hidden':>9}{'head':>9}")
    for name, f in told["ways"].items():
        if "failed" in f:
            print(f"{name:<14}{f['failed']}")
            continue
        error = f.get("gradient_error", {"hidden": 0.0, "head": 0.0})
        print(
            f"{name:<14}{f['median_milliseconds']:>9.1f}{f['ratio_to_products']:>9.2f}x{f['peak_bytes'] / 1e9:>9.2f}"
            f"{f.get('value_error', 0.0):>10.1e}{error['hidden']:>9.1e}{error['head']:>9.1e}"
        )


def judge(found: dict[str, Any], dtype: str, *, whole: bool = True) -> list[str]:
    """What misses its bar. whole: with all tokens; what few take of memory says nothing."""
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
    if whole:  # beyond the gradients: that of a head of 262144 words alone is half of all that the naive loss holds
        hold("exact memory beyond gradients", exact["beyond_gradients_bytes"] / naive["beyond_gradients_bytes"], 0.5)
    return missed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", type=Path, action="append", default=[], help="folder with trl and liger_kernel")
    parser.add_argument("--rounds", type=int, default=5, help="passes of each way that count")
    parser.add_argument("--bf16-tokens", type=int, default=16, help="where the CPU has no units for bf16; 0 for all")
    parser.add_argument("--only", nargs="*", default=[], help="cases such as 49152-fp32; writes nothing but for cuda")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "headloss.json")
    args = parser.parse_args()
    sys.path[:0] = [str(folder) for folder in args.peers]
    torch.set_num_threads(1)
    gpu = on_cuda(args.rounds) if torch.cuda.is_available() and (not args.only or "cuda" in args.only) else None
    if gpu is not None:
        show_cuda(gpu)
        path = args.out.with_name(f"{args.out.stem}_cuda.json")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(gpu, indent=1) + "\n")
    if args.only == ["cuda"]:
        raise SystemExit(None if gpu else "there is no CUDA device that torch sees")
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
            cases[name] = found | {"missed": judge(found, kind, whole=n == tokens)}
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
