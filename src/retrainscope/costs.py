"""What work costs: time on a clock, samples through the model, memory."""

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from math import nan
from pathlib import Path
from threading import Event, Thread

import numpy as np
import torch

__all__ = ["Cost", "costing", "count_samples"]

_INTERVAL = 0.01  # seconds between two looks at the memory
_STATM = Path("/proc/self/statm")


@dataclass
class Cost:
    """What work has cost.

    Attributes
    ----------
    seconds : float
        As on a clock.
    n_forward : int
        Samples that went forward through a model, or through a part of it that was cut off, in this process.
    peak_memory : float
        Bytes, above what was in use when the work began: what torch has allocated on a GPU, or for a CPU the resident
        memory of this process; NaN where the system does not tell. Looked at a hundred times a second.
    """

    seconds: float = 0.0
    n_forward: int = 0
    peak_memory: float = 0.0


_CURRENT: ContextVar[Cost | None] = ContextVar("cost", default=None)


def count_samples(n: int) -> None:
    """Count samples that go forward through a model."""
    cost = _CURRENT.get()
    if cost is not None:
        cost.n_forward += n


@contextmanager
def costing(device: torch.device, cost: Cost) -> Iterator[None]:
    """Add what is done in the context to a cost. Nobody's statistics of memory are reset for it."""
    over, began, before = Event(), time.perf_counter(), _in_use(device)
    most = [before]

    def look() -> None:
        while not over.wait(_INTERVAL):
            most.append(max(most.pop(), _in_use(device)))

    watcher = Thread(target=look, name="retrainscope-memory", daemon=True)
    token = _CURRENT.set(cost)
    watcher.start()
    try:
        yield
    finally:
        over.set()
        watcher.join()
        _CURRENT.reset(token)
        cost.seconds += time.perf_counter() - began
        cost.peak_memory = float(np.max([cost.peak_memory, most[0] - before, _in_use(device) - before]))  # NaN stays


def _in_use(device: torch.device) -> float:
    """Return the bytes in use on a device, NaN where that is not told."""
    if device.type == "cuda":
        return float(torch.cuda.memory_allocated(device))
    if device.type == "mps":
        return float(torch.mps.current_allocated_memory())
    if device.type == "cpu" and sys.platform == "linux":
        return float(_STATM.read_text(encoding="ascii").split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return nan
