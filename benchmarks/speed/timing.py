"""Time two ways of doing something by turns, so that what else the machine does weighs on both."""

import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

__all__ = ["Ratio", "machine", "ratio", "seconds"]


@dataclass
class Ratio:
    """What ours took against another way.

    Attributes
    ----------
    ours, against : str
    our_seconds, their_seconds : float
        Medians.
    value, low, high : float
        Median of the ratios within a round, and the least and greatest of them.
    aim : str
        What it should be.
    note : str
        What else is to be known, such as how far the results of both lie apart.
    """

    ours: str
    against: str
    our_seconds: float
    their_seconds: float
    value: float
    low: float
    high: float
    aim: str
    note: str = ""

    def cells(self) -> list[str]:
        """Return the row of a table."""
        times = [f"{self.our_seconds:.3g}", f"{self.their_seconds:.3g}"]
        return [
            self.ours,
            self.against,
            *times,
            f"{self.value:.2f} [{self.low:.2f}, {self.high:.2f}]",
            self.aim,
            self.note,
        ]


def ratio(
    ours: tuple[str, Callable[[], Any]],
    theirs: tuple[str, Callable[[], Any]],
    *,
    repeats: int,
    aim: str,
    apart: Callable[[Any, Any], str] = lambda *_: "",
) -> Ratio:
    """Run both once to warm up, then by turns; `apart` tells of both results how they compare."""
    note = apart(ours[1](), theirs[1]())
    rounds = [(seconds(ours[1]), seconds(theirs[1])) for _ in range(repeats)]
    found = [mine / other for mine, other in rounds]
    mine, other = (statistics.median(column) for column in zip(*rounds, strict=True))
    return Ratio(ours[0], theirs[0], mine, other, statistics.median(found), min(found), max(found), aim, note)


def seconds(work: Callable[[], Any]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def machine() -> dict[str, Any]:
    """Describe what the figures were measured on."""
    file = Path("/proc/cpuinfo")
    lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
    names = [line.split(": ")[1] for line in lines if line.startswith("model name")]
    return {
        "processor": names[0] if names else platform.processor(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "threads": torch.get_num_threads(),
    }
