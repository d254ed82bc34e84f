"""The largest number of bytes that tensors held at once, as the allocator saw it.

On a GPU the caching allocator keeps it; on a CPU it is summed from the profiler's record of every allocation.
"""

from __future__ import annotations

import gc
from collections.abc import Callable

import torch
from torch import nn


def peak_bytes(step: Callable[[], object], device: str = "cpu") -> int:
    """Bytes that `step()` adds at its worst moment to what was allocated when it began (tensors only, no Python).

    Run one step before, so that what stays (optimizer moments, gradients) is there already.
    """
    gc.collect()
    if device.startswith("cuda"):
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        torch.cuda.synchronize()
        return int(torch.cuda.max_memory_allocated() - before)
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True, acc_events=True
    ) as record:
        step()
    results = record.profiler.kineto_results
    events = sorted((e for e in results.events() if e.name() == "[memory]"), key=lambda e: e.start_ns())
    level = peak = 0
    for event in events:
        level += event.nbytes()
        peak = max(peak, level)
    return peak


def resident_bytes(model: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Bytes of weights, gradients and optimizer state as they stand."""
    held = [t for p in model.parameters() for t in (p, p.grad) if t is not None]
    held += [v for state in optimizer.state.values() for v in state.values() if isinstance(v, torch.Tensor)]
    return sum(t.numel() * t.element_size() for t in held)
