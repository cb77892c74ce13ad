"""Time and memory of a step: by the clock on a CPU, by its own events on a GPU, which the program runs ahead of."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

Step = Callable[[], object]


def synchronize(device: torch.device) -> None:
    """Waits until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def milliseconds(step: Step, device: torch.device) -> float:
    """Time of one step."""
    if device.type == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        step()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end))
    begun = time.perf_counter()
    step()
    return 1e3 * (time.perf_counter() - begun)


def median(step: Step, device: torch.device, *, steps: int, warm: int = 1) -> float:
    """Median time of some steps, after a few that do not count, milliseconds."""
    for _ in range(warm):
        step()
    synchronize(device)
    return statistics.median(milliseconds(step, device) for _ in range(steps))


def device_mib(step: Step, device: torch.device) -> float:
    """Most memory that tensors have on a GPU during a step, beyond what they had before it, MiB."""
    synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    step()
    synchronize(device)
    return (torch.cuda.max_memory_allocated(device) - before) / 2**20


def peak_mib() -> float:
    """Largest resident set of this process so far, MiB (``ru_maxrss`` would be inherited from the parent)."""
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) / 1024
    raise RuntimeError("/proc/self/status has no VmHWM: peak memory is measured on Linux only")
