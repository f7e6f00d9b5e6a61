"""How much memory a call takes: what several benchmarks of this folder measure alike."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch._C._profiler import _EventType
from torch.profiler import ProfilerActivity, profile


def memory(run: Callable[[], Any]) -> int:
    """Bytes, by torch's own account: the most that `run` holds at once above what there was before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        run()
    moments: list[tuple[int, int]] = []
    assert seen.profiler is not None
    todo = list(seen.profiler.kineto_results.experimental_event_tree())
    while todo:
        event = todo.pop()
        todo += event.children
        if event.tag == _EventType.Allocation:
            moments.append((event.start_time_ns, event.extra_fields.alloc_size))
    held = most = 0
    for _, size in sorted(moments, key=lambda m: m[0]):
        held += size
        most = max(most, held)
    return most
