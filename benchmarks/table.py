"""`python benchmarks/table.py` writes what the benchmarks measured, from benchmarks/results, into their README."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
BEGIN, END = "<!-- measured -->\n", "<!-- end of measured -->\n"


def rows(
    overhead: dict[str, Any],
    replay: dict[str, Any],
    signals: dict[str, Any],
    headloss: dict[str, Any],
    cuda: dict[str, Any],
) -> list[list[str]]:
    """What, goal, found."""
    table = []
    for clock in ("processor", "wall"):
        found = overhead[clock]
        low, high = found["quartiles_of_pairs"]
        mine, bare = (1000 * found["seconds_a_step"][way] for way in ("limbeck", "bare"))
        what = f"overhead: a step of `teach` against a bare loop, {clock} time"
        ratio = f"{found['median_ratio_of_pairs']:.3f}x, quartiles {low:.3f} to {high:.3f}"
        table.append([what, f"at most {overhead['bar']}x", f"{ratio} ({mine:.0f} and {bare:.0f} ms)"])
    own = 1000 * overhead["seconds_of_the_loop_itself"]
    table.append(["overhead: what the loop itself takes of a step", "", f"{own:.2f} ms"])
    error = replay["gradient_relative_error"]
    table.append(["replay: relative error of the gradient, fp64", "below 1e-10", f"{error:.1e}"])
    for setting in replay["settings"]:
        memory, times = setting["peak_memory_ratio"], setting["time_ratio"]
        what = f"replay: peak memory at {replay['steps']} steps, batch {setting['batch']}"
        table.append([what, "at most 0.35x", f"{memory:.3f}x, for {times:.2f}x the time"])
    goals, words = signals["goals"], f"{signals['vocabulary']:,} words"
    for kind, told in signals["kinds"].items():
        goal = f"at most {goals['bytes_a_token']:.0f} bytes" if kind == "sampled" else ""
        lost = f"{told['bytes_a_token']:.1f} bytes, {told['ids']:.0f} ids; bias {told['bias']:+.4f} nats"
        table.append([f"signals: a token of {kind}, {words}", goal, lost])
    step = signals["step"]
    low, high = min(step["ratios"]), max(step["ratios"])
    what = "signals: a step on stored draws against one on labels, processor time"
    found = f"{step['ratio']:.3f}x, pairs {low:.3f} to {high:.3f} ({step['tokens']} tokens)"
    table.append([what, f"at most {goals['step_ratio']:.2f}x", found])
    read = signals["decode_ms"][-1]
    table.append(["signals: reading stored draws", "", f"{read['median']:.1f} ms for {read['tokens']} tokens"])
    for case, told in headloss["cases"].items():
        ways, kind = told["ways"], case.split()[-1]
        mine = ways["exact"]
        ratios = {name: mine["ratio_to"][name] for name in ("logits", "trl", "liger")}
        bars = ("" if kind == "bf16" else "1.0x of logits, ") + "0.6x of TRL, half the memory beyond gradients"
        speed = ", ".join(f"{ratio:.2f}x of {name}" for name, ratio in ratios.items())
        size, error = (1e-6 * mine["beyond_gradients_bytes"], max(mine["gradient_error"].values()))
        of = 1e-6 * ways["logits"]["beyond_gradients_bytes"]
        found = (
            f"{speed} ({mine['median_seconds']:.2f} s); {size:.0f} MB (logits: {of:.0f}); gradient off by {error:.1e}"
        )
        table.append([f"headloss: exact forward KL, {case}", bars, found])
        if kind == "bf16":
            fast, theirs = ways["fast"], max(ways["logits"]["gradient_error"].values())
            found = f"{fast['ratio_to']['logits']:.2f}x of logits, {fast['ratio_to']['liger']:.2f}x of liger"
            found += f" ({fast['median_seconds']:.2f} s); gradient off by {max(fast['gradient_error'].values()):.2f}"
            found += f" (that of logits by {theirs:.2f})"
            bars = "0.8x of logits; gradient off by 0.03 (hidden states) and 0.06 (head)"
            table.append([f"headloss: fast forward KL, {case}", bars, found])
    for way, told in cuda["ways"].items():
        error, bare = max(told.get("gradient_error", {"": 0.0}).values()), way == "products"
        found = f"{told['median_milliseconds']:.1f} ms, {1e-9 * told['peak_bytes']:.1f} GB" + (
            "" if bare else f", {told['ratio_to_products']:.2f}x of the products; gradient off by {error:.1e}"
        )
        shape = ", ".join(map(str, cuda["shape"]))
        table.append([f"headloss: {way}, ({shape}) bf16, {cuda['device']}", "", found])
    return table


def main() -> None:
    parts = ("overhead", "replay", "signals", "headloss", "headloss_cuda")
    told = [json.loads((HERE / "results" / f"{name}.json").read_text()) for name in parts]
    head = [["measured", "goal", "found"], ["---"] * 3]
    lines = [f"| {' | '.join(row)} |" for row in (*head, *rows(*told))]
    here, there = told[0], told[-1]
    versions = f"\nWith torch {here['torch']} and Python {here['python']}; on the GPU, torch {there['torch']}.\n"
    page = HERE / "README.md"
    before, rest = page.read_text().split(BEGIN)
    page.write_text(before + BEGIN + "\n".join(lines) + "\n" + versions + END + rest.split(END)[1])


if __name__ == "__main__":
    main()
