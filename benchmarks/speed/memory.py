"""Print the peak memory, in MB, of measuring so many samples that are made when they are asked for.

python benchmarks/speed/memory.py spread|default N
"""

import re
import resource
import sys
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

import retrainscope as rs


class Made(Dataset[tuple[Tensor, int]]):
    """Samples of ten classes that take no room."""

    def __init__(self, n: int, first: int) -> None:
        self.n, self.first = n, first

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, place: int) -> tuple[Tensor, int]:
        if not 0 <= place < self.n:
            raise IndexError(place)
        generator = torch.Generator().manual_seed(self.first + place)
        return torch.randn(1, 28, 28, generator=generator) + place % 10 / 5, place % 10


def main(what: str, n: int) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = nn.Sequential(
        *(nn.Conv2d(1, 16, 3, stride=2), nn.ReLU(), nn.Conv2d(16, 32, 3, stride=2), nn.ReLU(), nn.Flatten()),
        *(nn.Linear(32 * 36, 64), nn.ReLU(), nn.Linear(64, 10)),
    )
    known, unknown = Made(n, 0), Made(n, n)
    if what == "spread":
        rs.ActivationSpread(model, random_state=0, progress=False).fit(known).score_layers(unknown)
    else:
        rs.recommend_layers(model, known, unknown, random_state=0, progress=False)
    print(peak())


def peak() -> float:
    """Return the most memory that this process had, in MB."""
    status = Path("/proc/self/status")
    if status.exists():  # what getrusage tells begins, on Linux, with what the parent had
        return int(re.search(r"VmHWM:\s+(\d+) kB", status.read_text())[1]) / 1024
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most / (2**20 if sys.platform == "darwin" else 1024)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
