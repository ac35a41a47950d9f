"""How the cost grows with samples, layers, classes, width and input size, one of them at a time.

    python benchmarks/speed/growth.py [--repeats N] [--out FILE] [--figure FILE]

A plain convolutional network of one thread. The exponent is the slope of a straight line through the logarithms of the
last three points, where what every run costs no longer weighs: 1 is linear.
"""

import argparse
import json
import statistics
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from timing import machine, seconds
from torch import Tensor, nn

import retrainscope as rs
from retrainscope.figures import MARKERS, PALETTE, new_figure


@dataclass(frozen=True)
class Case:
    """A network and data of some size."""

    samples: int = 500
    layers: int = 4
    classes: int = 10
    width: int = 16
    pixels: int = 24

    def model(self) -> nn.Module:
        torch.manual_seed(0)
        parts: list[nn.Module] = []
        for place in range(self.layers):
            parts += [nn.Conv2d(self.width if place else 3, self.width, 3, padding=1), nn.ReLU()]
        head = nn.Linear(self.width, self.classes)
        return nn.Sequential(*parts, nn.AdaptiveAvgPool2d(1), nn.Flatten(), head).eval()

    def data(self) -> tuple[Tensor, Tensor]:
        y = torch.arange(self.samples) % self.classes
        generator = torch.Generator().manual_seed(1)
        shift = torch.randn(self.classes, 3, 1, 1, generator=generator)
        return torch.randn(self.samples, 3, self.pixels, self.pixels, generator=generator) + shift[y], y


SIZES = {
    "samples": [500, 1000, 2000, 4000, 8000],
    "layers": [2, 4, 8, 16, 24],
    "classes": [10, 30, 100, 300, 1000],
    "width": [8, 16, 32, 64, 128],
    "pixels": [12, 24, 48, 96],
}
SAMPLES_FOR_CLASSES = 5000  # five of each of a thousand


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3, metavar="N")
    parser.add_argument("--out", type=Path, metavar="FILE")
    parser.add_argument("--figure", type=Path, metavar="FILE", help="a PNG")
    args = parser.parse_args()
    torch.set_num_threads(1)
    measured(Case(samples=100), 1)  # to warm up
    found: dict[str, dict[str, list[float]]] = {}
    for what, sizes in SIZES.items():
        for size in sizes:
            case = replace(Case(samples=SAMPLES_FOR_CLASSES if what == "classes" else 500), **{what: size})
            for name, took in measured(case, args.repeats).items():
                found.setdefault(what, {}).setdefault(name, []).append(took)
        for name, times in found[what].items():
            slope = exponent(sizes[-3:], times[-3:])
            print(f"{what:8} {name:18} {' '.join(f'{t:8.3f}' for t in times)}   exponent {slope:.2f}", flush=True)
    if args.out:
        args.out.write_text(json.dumps({"machine": machine(), "sizes": SIZES, "seconds": found}, indent=1) + "\n")
    if args.figure:
        draw(found, args.figure)


def measured(case: Case, repeats: int) -> dict[str, float]:
    model, (X, y) = case.model(), case.data()
    half = {"random_state": 0, "progress": False}

    def forward() -> None:
        with torch.no_grad():
            for rows in X.split(256):
                model(rows)

    def spread() -> None:
        rs.ActivationSpread(model, **half).fit((X, y)).score_layers((X, y))

    def default() -> None:
        rs.recommend_layers(model, (X, y), (X, y), **half)

    works = {
        "two forward passes": lambda: (forward(), forward()),
        "ActivationSpread": spread,
        "recommend_layers": default,
    }
    if case.classes > 100:
        del works["recommend_layers"]
    return {name: statistics.median(seconds(work) for _ in range(repeats)) for name, work in works.items()}


def exponent(sizes: list[int], times: list[float]) -> float:
    return float(np.polyfit(np.log(sizes), np.log(times), 1)[0])


def draw(found: dict[str, Any], path: Path) -> None:
    figure, axes = new_figure(12, 3.8, n_columns=len(found))
    for ax, (what, curves) in zip(axes[0], found.items(), strict=True):
        for place, (name, times) in enumerate(curves.items()):
            sizes = SIZES[what][: len(times)]
            ax.plot(sizes, times, f"-{MARKERS[place]}", color=PALETTE[place], label=name, markersize=4)
        ax.set_xscale("log")
        ax.set_yscale("log")
        ax.set_xticks(SIZES[what], SIZES[what], fontsize=7)
        ax.minorticks_off()
        ax.set_xlabel(what)
        ax.grid(alpha=0.3)
    axes[0, 0].set_ylabel("seconds")
    handles, names = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=3, frameon=False)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
