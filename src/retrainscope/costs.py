"""What work costs: time on a clock, samples through the model, memory."""

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass, field
from math import isnan, nan
from pathlib import Path
from threading import Event, Thread

import torch

__all__ = ["Cost", "costing", "passing"]

_INTERVAL = 0.01  # seconds between two looks at the memory, and more where that would take more than
_SHARE = 0.02  # of the time
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
        Bytes, above what was in use when the work first began: what torch has allocated on a GPU, or for a CPU the
        resident memory of this process; NaN where the system does not tell. Looked at up to a hundred times a second.
    """

    seconds: float = 0.0
    n_forward: int = 0
    peak_memory: float = 0.0
    _before: float | None = field(default=None, repr=False)  # bytes in use when the work first began

    def see(self, in_use: float) -> None:
        """Take the bytes that are in use now into account."""
        if self._before is None:
            self._before = in_use
        if not (isnan(self.peak_memory) or in_use - self._before <= self.peak_memory):  # NaN stays
            self.peak_memory = in_use - self._before


_CURRENT: ContextVar[Cost | None] = ContextVar("cost", default=None)


@contextmanager
def passing(n_samples: int) -> Iterator[None]:
    """Count samples that go forward through a model in the context; a model called by that model counts no more."""
    cost = _CURRENT.get()
    if cost is None:
        yield
        return
    cost.n_forward += n_samples
    token = _CURRENT.set(None)
    try:
        yield
    finally:
        _CURRENT.reset(token)


@contextmanager
def costing(device: torch.device, cost: Cost) -> Iterator[None]:
    """Add what is done in the context to a cost. Nobody's statistics of memory are reset for it."""
    over, began = Event(), time.perf_counter()
    with _memory(device) as in_use:
        cost.see(in_use())

        def watch() -> None:
            pause = _INTERVAL
            with suppress(ValueError):  # the file is closed: Ctrl-C has come while this thread was waited for
                while not over.wait(pause):
                    began = time.thread_time()  # without what it waits for other threads
                    cost.see(in_use())
                    pause = max(_INTERVAL, (time.thread_time() - began) / _SHARE)

        watcher = Thread(target=watch, name="retrainscope-memory", daemon=True)
        token = _CURRENT.set(cost)
        try:
            watcher.start()
            yield
        finally:
            over.set()
            if watcher.is_alive():  # Ctrl-C may have come before it was
                watcher.join()
            _CURRENT.reset(token)
            cost.seconds += time.perf_counter() - began
            cost.see(in_use())


@contextmanager
def _memory(device: torch.device) -> Iterator[Callable[[], float]]:
    """Open what tells the bytes in use on a device, or gives NaN where that is not told."""
    if device.type == "cuda":
        yield lambda: float(torch.cuda.memory_allocated(device))
    elif device.type == "mps":
        yield lambda: float(torch.mps.current_allocated_memory())
    elif device.type == "cpu" and os.access(_STATM, os.R_OK):
        with _STATM.open("rb", buffering=0) as file:  # kept open, which halves what a look takes
            yield lambda: float(os.pread(file.fileno(), 128, 0).split()[1]) * os.sysconf("SC_PAGE_SIZE")
    else:
        yield lambda: nan
