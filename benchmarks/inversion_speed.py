"""What does inverting a whole batch cost, against one image after the other, and against bare passes?

    python benchmarks/inversion_speed.py [--repeats 15] [--steps 200] [--out FILE]

64 MNIST images and the network of the MNIST study. At each layer, in turn and several times over: the batch at once,
a bare loop of forward and backward passes that ends at the same layer, and (fewer times) the images one by one.
Reported are the medians of the ratios within a round, so that what else the machine does weighs on both.
"""

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from retrainscope import Descent, invert_layers
from retrainscope.data import load_mnist
from retrainscope.studies.mnist.experiments import LAYERS, split_roles, trained

N_IMAGES = 64


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=15, metavar="N")
    parser.add_argument("--steps", type=int, default=200, metavar="N")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the figures as JSON")
    options = parser.parse_args()
    split = split_roles(load_mnist())
    network = trained(split.training, 0).eval().requires_grad_(False)
    images = split.known[0][:N_IMAGES]
    rows = []
    for place, layer in enumerate(LAYERS):
        bare = bare_loop(network[: place + 1], images, options.steps)
        for optimizer in ("adam", "lbfgs"):
            rows.append(measured(network, images, layer, optimizer, bare, options.steps, options.repeats))
            print(", ".join(f"{name} {value}" for name, value in rows[-1].items()), flush=True)
    if options.out:
        machine = {"threads": torch.get_num_threads(), "torch": torch.__version__, "machine": platform.machine()}
        options.out.write_text(json.dumps({"machine": machine, "rows": rows}, indent=1) + "\n", encoding="utf-8")


def measured(
    network: nn.Module, images: Tensor, layer: str, optimizer: str, bare: Callable[[], None], steps: int, repeats: int
) -> dict[str, object]:
    descent = Descent(optimizer, max_iter=steps)

    def batch() -> Tensor:
        return invert_layers(network, images, [layer], descent=descent, low=0, high=1, random_state=0)[
            layer
        ].input_error

    def one_by_one() -> Tensor:
        # Batches of one image from one call, so that each image has the start that it has in the whole batch.
        found = invert_layers(network, images, [layer], descent=descent, low=0, high=1, batch_size=1, random_state=0)
        return found[layer].input_error

    batch(), bare()
    rounds = [(seconds(batch), seconds(bare)) for _ in range(repeats)]
    singles = [(seconds(one_by_one), seconds(batch)) for _ in range(3)]
    together, alone = batch(), one_by_one()
    return {
        "layer": layer,
        "optimizer": optimizer,
        "batch_seconds": round(statistics.median(ours for ours, _ in rounds), 3),
        "over_bare": round(statistics.median(ours / theirs for ours, theirs in rounds), 2),
        "one_by_one_over_batch": round(statistics.median(single / ours for single, ours in singles), 1),
        "error_batch": round(float(together.mean()), 3),
        "error_one_by_one": round(float(alone.mean()), 3),
    }


def bare_loop(until: nn.Module, images: Tensor, steps: int) -> Callable[[], None]:
    x = torch.rand_like(images).requires_grad_(True)  # as the descent starts; images are mostly zeros, which is faster

    def run() -> None:
        for _ in range(steps):
            features = until(x)
            torch.autograd.grad(features, x, features.detach())

    return run


def seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
