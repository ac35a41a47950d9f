"""What the library costs on a GPU, against the least that it could, as `run.py` measures it on the processor.

    python benchmarks/speed/gpu.py [--repeats N] [--out FILE]

The data lies in the memory of the processor and is carried over batch by batch, in both ways of doing it.
"""

import argparse
import copy
import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torchvision
from run import cut_off_passes, resnet
from timing import Ratio, machine, ratio
from torch import nn

import retrainscope as rs

BATCH = 256


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5, metavar="N")
    parser.add_argument("--out", type=Path, metavar="FILE")
    args = parser.parse_args()
    rows = []
    for rows_of in (spread_rows, inverter_rows, advice_rows):
        for row in rows_of(args.repeats):
            rows.append(asdict(row))
            print(" | ".join(row.cells()), flush=True)
    if args.out:
        found = {"machine": machine() | {"gpu": torch.cuda.get_device_name()}, "rows": rows}
        args.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def spread_rows(repeats: int) -> Iterator[Ratio]:
    for name, model, X in (
        ("ResNet-18, 20 layers", resnet().cuda(), torch.randn(4096, 3, 128, 128)),
        ("ResNet-50, 53 layers", torchvision.models.resnet50().eval().cuda(), torch.randn(2048, 3, 224, 224)),
    ):
        y, half = torch.arange(len(X)) % 10, len(X) // 2

        def ours(model: nn.Module = model, X: torch.Tensor = X, y: torch.Tensor = y, half: int = half) -> Any:
            spread = rs.ActivationSpread(model, batch_size=BATCH, random_state=0, progress=False)
            return spread.fit((X[:half], y[:half])).score_layers((X[half:], y[half:]))

        def bare(model: nn.Module = model, X: torch.Tensor = X) -> None:
            with torch.no_grad():
                for rows in X.split(BATCH):
                    model(rows.cuda())
            torch.cuda.synchronize()

        yield ratio((f"ActivationSpread, {name}", ours), ("a forward pass", bare), repeats=repeats, aim="≤ 1.10")


def inverter_rows(repeats: int) -> Iterator[Ratio]:
    model, X, layer, steps = resnet().cuda(), torch.rand(64, 3, 64, 64), "layer2.0.conv1", 200
    for optimizer in ("adam", "lbfgs"):
        descent = rs.Descent(optimizer, max_iter=steps)

        def ours(descent: Any = descent) -> Any:
            return rs.invert_layers(model, X, [layer], descent=descent, low=0, high=1, random_state=0, progress=False)

        def bare() -> None:
            cut_off_passes(copy.deepcopy(model), layer, X.cuda(), steps)
            torch.cuda.synchronize()

        yield ratio(
            (f"inversion with {optimizer}, {layer} of a ResNet-18, 64 images", ours),
            (f"{steps} bare passes, cut off there", bare), repeats=repeats, aim="≤ 1.10",
        )  # fmt: skip


def advice_rows(repeats: int) -> Iterator[Ratio]:
    model = torchvision.models.resnet50(num_classes=10).eval().cuda()
    X, y = torch.randn(2048, 3, 224, 224), torch.arange(2048) % 10

    def ours() -> Any:
        return rs.recommend_layers(
            model, (X[:1024], y[:1024]), (X[1024:], y[1024:]), batch_size=BATCH, random_state=0, progress=False
        )

    def epochs() -> None:
        """Train everything for ten epochs on the unknown data."""
        learner = copy.deepcopy(model).train()
        optimizer = torch.optim.SGD(learner.parameters(), lr=1e-3)
        for _ in range(10):
            for rows, labels in zip(X[1024:].split(64), y[1024:].split(64), strict=True):
                optimizer.zero_grad()
                nn.functional.cross_entropy(learner(rows.cuda()), labels.cuda()).backward()
                optimizer.step()
        torch.cuda.synchronize()

    yield ratio(
        ("recommend_layers, ResNet-50", ours), ("ten epochs of fine-tuning everything", epochs),
        repeats=min(repeats, 2), aim="",
    )  # fmt: skip


if __name__ == "__main__":
    main()
