"""What two processes under torch.distributed take against one, with one thread each, and how far the results lie apart.

    python benchmarks/speed/processes.py [--processes N] [--samples N] [--repeats N] [--out FILE]

A small residual network on random images, where computing costs more than anything else. One process and the group run
by turns; a time is that of the slowest process, without its start and the first call, which imports. The machine needs
a core for each process; where others use it too, seconds of computing (of the process that needed most) tell more than
those on the clock.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from timing import machine
from torch import Tensor, distributed, nn

import retrainscope as rs

HEADER = ("what", "one process, s", "{} processes, s", "ratio [least, greatest]", "of computing", "largest difference")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=2, metavar="N")
    parser.add_argument("--samples", type=int, default=512, metavar="N")
    parser.add_argument("--repeats", type=int, default=3, metavar="N")
    parser.add_argument("--out", type=Path, metavar="FILE")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.worker:
        torch.save(measured(args.samples), args.worker / f"{rank_and_size()[0]}.pt")
        return
    rounds = [(run(args, 1), run(args, args.processes)) for _ in range(args.repeats)]
    rows = [row(name, rounds) for name in WORK]
    print(" | ".join(HEADER).format(args.processes))
    for each in rows:
        low, high = each["low"], each["high"]
        times = f"{each['one_seconds']:.3g} | {each['seconds']:.3g} | {each['ratio']:.2f} [{low:.2f}, {high:.2f}]"
        print(f"{each['what']} | {times} | {each['computing_ratio']:.2f} | {each['difference']:.1e}")
    if args.out:
        options = {"processes": args.processes, "samples": args.samples, "repeats": args.repeats}
        found = {"machine": machine(), **options, "rows": rows}
        args.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def row(name: str, rounds: list[tuple[list[dict[str, Any]], list[dict[str, Any]]]]) -> dict[str, Any]:
    """Compare the times and the results of one process and of several."""

    def pairs_of(kind: int) -> list[tuple[float, float]]:
        return [(one[0][name][kind], max(found[name][kind] for found in several)) for one, several in rounds]

    pairs = pairs_of(0)
    ratios = [several / one for one, several in pairs]
    apart = [float(np.nanmax(np.abs(found[name][2] - one[0][name][2]))) for one, several in rounds for found in several]
    return {
        "what": name,
        "one_seconds": statistics.median(one for one, _ in pairs),
        "seconds": statistics.median(several for _, several in pairs),
        "ratio": statistics.median(ratios),
        "low": min(ratios),
        "high": max(ratios),
        "computing_ratio": statistics.median(several / one for one, several in pairs_of(1)),
        "difference": max(apart),
    }


def run(args: argparse.Namespace, n: int) -> list[dict[str, Any]]:
    """Start n processes; return the seconds and the numbers of each."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, __file__, "--worker", folder, "--samples", str(args.samples)]
        common = {**os.environ, "OMP_NUM_THREADS": "1", "WORLD_SIZE": str(n)}
        group = [subprocess.Popen(command, env={**common, "RANK": str(number)}) for number in range(n)]
        codes = [process.wait() for process in group]
        if any(codes):
            raise SystemExit("A process failed: see above.")
        return [torch.load(Path(folder, f"{number}.pt"), weights_only=False) for number in range(n)]


def measured(n_samples: int) -> dict[str, tuple[float, float, Any]]:
    """Be one process; return for each kind of work its seconds, those of computing, and numbers that came of it."""
    number, n = rank_and_size()
    if n > 1:
        file = f"file://{sys.argv[sys.argv.index('--worker') + 1]}/group"
        distributed.init_process_group("gloo", init_method=file, rank=number, world_size=n)
    torch.manual_seed(0)
    model, images = residual_network(), torch.randn(2 * n_samples, 3, 32, 32)
    labels = torch.arange(2 * n_samples) % 4
    images += 0.2 * labels[:, None, None, None]
    known, unknown = (images[:n_samples], labels[:n_samples]), (-images[n_samples:], labels[n_samples:])
    spread(model, *((X[:64], y[:64]) for X, y in (known, unknown)))  # warmed up
    found = {}
    for name, work in WORK.items():
        if n > 1:
            distributed.barrier()
        began, computed = time.perf_counter(), time.process_time()
        numbers = work(model, known, unknown)
        found[name] = (time.perf_counter() - began, time.process_time() - computed, numbers)
    if n > 1:
        distributed.destroy_process_group()
    return found


def rank_and_size() -> tuple[int, int]:
    return int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])


def spread(model: nn.Module, known: Any, unknown: Any) -> Any:
    return rs.ActivationSpread(model, batch_size=32, random_state=0).fit(known).score_layers(unknown).values


def advice(model: nn.Module, known: Any, unknown: Any) -> Any:
    found = rs.recommend_layers(model, known, unknown, batch_size=32, random_state=0)
    assert found.forecast is not None
    return np.concatenate([found.forecast.error, *(scores.values for scores in found.scores)])


WORK: dict[str, Callable[[nn.Module, Any, Any], Any]] = {"ActivationSpread": spread, "recommend_layers": advice}


class Block(nn.Module):
    """Two convolutions beside a shortcut."""

    def __init__(self, n_in: int, n_out: int, stride: int) -> None:
        super().__init__()
        self.first, self.first_norm = nn.Conv2d(n_in, n_out, 3, stride, 1, bias=False), nn.BatchNorm2d(n_out)
        self.second, self.second_norm = nn.Conv2d(n_out, n_out, 3, 1, 1, bias=False), nn.BatchNorm2d(n_out)
        self.shortcut = nn.Conv2d(n_in, n_out, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        inner = torch.relu(self.first_norm(self.first(x)))
        return torch.relu(self.second_norm(self.second(inner)) + self.shortcut(x))


def residual_network() -> nn.Sequential:
    blocks = [Block(3, 32, 1), Block(32, 64, 2), Block(64, 128, 2)]
    return nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(128, 4)).eval()


if __name__ == "__main__":
    main()
