"""What the default advice costs on large networks, as ratios against bare passes over the same samples in the same run.

    python benchmarks/forecast_cost.py [--device cuda] [--networks resnet50 vit_b_16] [--size 224] [--out FILE]

Needs torchvision. The weights are random, which changes no cost. Each time is the median of the repetitions.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torchvision
from torch import Tensor, nn

import retrainscope as rs

_BATCH, _CLASSES, _SAMPLES = 32, 8, 50


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--networks", nargs="+", default=["resnet50", "vit_b_16"], metavar="NAME")
    parser.add_argument("--size", type=int, default=224, metavar="PIXELS")
    parser.add_argument("--repeats", type=int, default=3, metavar="N")
    parser.add_argument("--out", type=Path, metavar="FILE")
    args = parser.parse_args()
    found = {name: measured(name, args) for name in args.networks}
    print(f"{_CLASSES * _SAMPLES} samples of {args.size} pixels, {described(args.device)}, torch {torch.__version__}\n")
    print(
        f"{'network':12}{'parameters':>12}{'forward':>10}{'epoch':>10}{'advice':>10}{'forwards':>10}{'epochs':>8}{'memory':>8}"
    )
    for name, row in found.items():
        print(
            f"{name:12}{row['parameters']:12,}{row['forward']:9.2f}s{row['epoch']:9.2f}s{row['advice']:9.2f}s"
            f"{row['advice'] / row['forward']:10.1f}{row['advice'] / row['epoch']:8.1f}"
            + (f"{row['advice_memory'] / row['epoch_memory']:8.2f}" if row["epoch_memory"] else f"{'-':>8}")
        )
    if args.out:
        args.out.write_text(json.dumps(found, indent=1) + "\n")


def measured(name: str, args: argparse.Namespace) -> dict[str, Any]:
    """Time a forward pass over all samples, an epoch of training, and the advice."""
    torch.manual_seed(0)
    model = torchvision.models.get_model(name, weights=None, num_classes=_CLASSES).to(args.device)
    n = _CLASSES * _SAMPLES
    y = torch.arange(n) % _CLASSES
    X = (torch.randn(n, 3, args.size, args.size) + y[:, None, None, None] / 4).to(args.device)
    first = X[: n // 2], y[: n // 2]

    def forward() -> None:
        with torch.no_grad():
            for rows in X.split(_BATCH):
                model(rows)

    def epoch() -> None:
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-5)
        for rows, labels in zip(X.split(_BATCH), y.to(args.device).split(_BATCH), strict=True):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(rows), labels).backward()
            optimizer.step()

    def advice() -> None:
        rs.recommend_layers(model, first, (X, y), batch_size=_BATCH, random_state=0, progress=False)

    row: dict[str, Any] = {"parameters": sum(p.numel() for p in model.parameters())}
    for what, work, training in (("forward", forward, False), ("epoch", epoch, True), ("advice", advice, False)):
        model.train(training)
        row[what], row[f"{what}_memory"] = timed(work, X, args.repeats)
        model.zero_grad()
    return row


def timed(work: Callable[[], None], X: Tensor, repeats: int) -> tuple[float, int]:
    """Return the median of the seconds, after one run to warm up, and the peak of memory on a GPU beside the data."""
    gpu = X.device.type == "cuda"
    work()
    if gpu:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated() if gpu else 0
    seconds = []
    for _ in range(repeats):
        began = time.perf_counter()
        work()
        if gpu:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds), torch.cuda.max_memory_allocated() - before if gpu else 0


def described(device: str) -> str:
    """Name the device."""
    return torch.cuda.get_device_name() if device.startswith("cuda") else f"{torch.get_num_threads()} threads of a CPU"


if __name__ == "__main__":
    main()
