"""What the library costs against the least that it could, and against what a user would write or pick instead.

    python benchmarks/speed/run.py [--only WORD ...] [--repeats N] [--out FILE]

What the file holds already for other words is kept. Every row is a ratio within one run, of one thread: two ways of
doing it, by turns, several times over. Needs torchvision and torch-cka (`make bench-speed` has them).
"""

import argparse
import contextlib
import copy
import io
import json
import os
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchvision
from timing import Ratio, machine, ratio, seconds
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torchvision.models.feature_extraction import create_feature_extractor

import retrainscope as rs
from retrainscope import criteria
from retrainscope.control import untrained_copy
from retrainscope.data import load_mnist
from retrainscope.studies.mnist.experiments import split_roles, trained

BATCH = 64
HERE = Path(__file__).parent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=[*ROWS], choices=[*ROWS], metavar="WORD")
    parser.add_argument("--repeats", type=int, default=7, metavar="N")
    parser.add_argument("--out", type=Path, metavar="FILE")
    args = parser.parse_args()
    torch.set_num_threads(1)
    kept = json.loads(args.out.read_text(encoding="utf-8"))["rows"] if args.out and args.out.exists() else {}
    for name in args.only:
        rows = []
        for row in ROWS[name](args.repeats):
            rows.append(asdict(row))
            print(" | ".join(row.cells()), flush=True)
        kept[name] = rows
        if args.out:
            found = {"machine": machine(), "rows": {name: kept[name] for name in ROWS if name in kept}}
            args.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


# ---- Against the least that it could cost


def spread_rows(repeats: int) -> Iterator[Ratio]:
    for name, model, X, aim in (
        ("ResNet-18, 20 layers", resnet(), torch.randn(1024, 3, 128, 128), "≤ 1.10"),
        ("network of the MNIST study", mnist_network(), digits()[0], "≤ 1.5"),
    ):
        y, half = torch.arange(len(X)) % 10, len(X) // 2

        def ours(model: nn.Module = model, X: Tensor = X, y: Tensor = y, half: int = half) -> Any:
            spread = rs.ActivationSpread(model, batch_size=BATCH, random_state=0, progress=False)
            return spread.fit((X[:half], y[:half])).score_layers((X[half:], y[half:]))

        def bare(model: nn.Module = model, X: Tensor = X) -> None:
            forward(model, X)

        yield ratio((f"ActivationSpread, {name}", ours), ("a forward pass", bare), repeats=repeats, aim=aim)


def probe_rows(_repeats: int) -> Iterator[Ratio]:
    model, (X, y) = mnist_network(), (part[:1000] for part in digits())
    epochs, learnt = 5, int(0.8 * 1000)

    def ours() -> rs.LayerDecoderProbe:
        return rs.LayerDecoderProbe(model, max_epochs=epochs, random_state=0, progress=False).fit((X, y))

    fitted = ours()
    layers, start = fitted.layers_.names, fitted.decoders_

    def bare() -> None:
        """Keep the activations of one pass, and train the same decoders on them."""
        networks = {"model": model, "control": untrained_copy(model, seed=0, keep=None)}
        kept = {kind: features_of(network, X, layers) for kind, network in networks.items()}
        decoders = {kind: copy.deepcopy(chain).train().requires_grad_(True) for kind, chain in start.items()}
        optimizer = torch.optim.Adam([p for chain in decoders.values() for p in chain.parameters()], lr=2e-3)
        for _ in range(epochs):
            for rows in torch.randperm(learnt).split(BATCH):
                optimizer.zero_grad()
                losses = [
                    nn.functional.mse_loss(decoder(kept[kind][layer][rows]), X[rows])
                    for kind, chain in decoders.items()
                    for layer, decoder in zip(layers, chain, strict=True)
                ]
                torch.stack(losses).sum().backward()
                optimizer.step()

    what = "a forward pass and the bare training steps of its decoders"
    yield ratio(("LayerDecoderProbe, network of the MNIST study", ours), (what, bare), repeats=3, aim="≤ 1.10")


def inverter_rows(repeats: int) -> Iterator[Ratio]:
    steps = 200
    for name, model, layer, X in (
        ("conv2 of the MNIST study's network", mnist_network(), "conv2", digits()[0][:64]),
        ("layer2.0.conv1 of a ResNet-18", resnet(), "layer2.0.conv1", torch.rand(8, 3, 64, 64)),
    ):
        for optimizer in ("adam", "lbfgs"):
            descent = rs.Descent(optimizer, max_iter=steps)

            def ours(model: nn.Module = model, layer: str = layer, X: Tensor = X, descent: Any = descent) -> Any:
                return rs.invert_layers(
                    model, X, [layer], descent=descent, low=0, high=1, random_state=0, progress=False
                )

            def bare(model: nn.Module = model, layer: str = layer, X: Tensor = X) -> None:
                cut_off_passes(model, layer, X, steps)

            yield ratio(
                (f"inversion with {optimizer}, {name}", ours),
                (f"{steps} bare passes, cut off there", bare),
                repeats=repeats,
                aim="≤ 1.10",
            )


# ---- Against what one would write or pick instead


def alternative_rows(repeats: int) -> Iterator[Ratio]:
    model, X, y = resnet(), torch.randn(256, 3, 64, 64), torch.arange(256) % 8
    spread = rs.ActivationSpread(model, max_features=10**7, batch_size=BATCH, random_state=0, progress=False)

    def ours() -> dict[str, float]:
        scores = spread.fit((X, y)).score_layers((X, y))
        return dict(zip(scores.layers, scores.unknown.tolist(), strict=True))

    layers = list(ours())

    def twice(collect: Callable[[], dict[str, Tensor]]) -> dict[str, float]:
        collect()  # of the known data, as ours measures both
        return {name: share_within(features.numpy(), y.numpy()) for name, features in collect().items()}

    def one_by_one() -> dict[str, float]:
        return twice(lambda: {layer: features_of(model, X, [layer])[layer].flatten(1) for layer in layers})

    extractor = create_feature_extractor(model, layers)

    def extracted() -> dict[str, float]:
        def collect() -> dict[str, Tensor]:
            with torch.no_grad():
                parts = [extractor(rows) for rows in X.split(BATCH)]
            return {layer: torch.cat([part[layer] for part in parts]).flatten(1) for layer in layers}

        return twice(collect)

    for what, theirs in (
        ("a pass with a hook for every layer, and numpy", one_by_one),
        ("torchvision's create_feature_extractor, and numpy", extracted),
    ):
        yield ratio(
            ("ActivationSpread, ResNet-18", ours), (what, theirs), repeats=repeats, aim="< 1", apart=largest_gap
        )


def cka_rows(repeats: int) -> Iterator[Ratio]:
    from torch_cka import CKA

    one, two = resnet(), resnet(seed=1)
    X = torch.randn(256, 3, 64, 64)
    layers = [f"layer{stage}.{block}.conv2" for stage in (1, 2, 3, 4) for block in (0, 1)]
    loader = DataLoader(TensorDataset(X), batch_size=BATCH)

    def ours() -> dict[str, float]:
        found = criteria.compare_layers(one, two, X, layers=layers, batch_size=BATCH, progress=False)
        return dict(zip(found.layers, found.values.tolist(), strict=True))

    def theirs() -> dict[str, float]:
        with warnings.catch_warnings(action="ignore"), contextlib.redirect_stderr(io.StringIO()), torch.no_grad():
            cka = CKA(copy.deepcopy(one), copy.deepcopy(two), "one", "two", layers, layers)
            cka.compare(loader)
        return dict(zip(layers, cka.export()["CKA"].diagonal().tolist(), strict=True))

    yield ratio(
        ("compare_layers, 8 layers of ResNet-18", ours), ("torch_cka (all pairs)", theirs),
        repeats=repeats, aim="< 1", apart=largest_gap,
    )  # fmt: skip


def log_me_rows(repeats: int) -> Iterator[Ratio]:
    model, X, y = resnet(), torch.randn(256, 3, 64, 64), torch.arange(256) % 8

    def ours() -> dict[str, float]:
        fitted = criteria.LogME(model, batch_size=BATCH, random_state=0, progress=False).fit((X, y))
        scores = fitted.score_layers((X, y))
        return dict(zip(scores.layers, scores.unknown.tolist(), strict=True))

    layers = list(ours())

    def theirs() -> dict[str, float]:
        found = {}
        for layer in layers:
            for _ in "ku":  # known and unknown data
                features = features_of(model, X, [layer])[layer].mean(dim=(2, 3)).double().numpy()
                found[layer] = criteria.log_me(features, y.numpy())
        return found

    yield ratio(
        ("criteria.LogME, ResNet-18, with intervals", ours), ("LogME layer by layer, without", theirs),
        repeats=repeats, aim="< 1", apart=lambda *_: "",
    )  # fmt: skip


def sweep_rows(_repeats: int) -> Iterator[Ratio]:
    split = split_roles(load_mnist())
    model = trained(split.training, 0).eval()
    known, unknown = split.known, split.unknown

    def ours() -> Any:
        return rs.recommend_layers(model, known, unknown, random_state=0, progress=False)

    def sweep() -> Any:
        return rs.sweep_layers(model, known, unknown, random_state=0, progress=False)

    mine, theirs = min(seconds(ours) for _ in range(3)), seconds(sweep)
    found = mine / theirs
    yield Ratio(
        "recommend_layers, MNIST study", "the sweep that it replaces", mine, theirs, found, found, found, "≤ 0.05"
    )


# ---- Memory and start


def memory_rows(_repeats: int) -> Iterator[Ratio]:
    for what in ("spread", "default"):
        small, large = (peak_memory(what, n) for n in (2_000, 50_000))
        yield Ratio(
            f"peak memory with 50,000 samples, {what}", "with 2,000 samples", large, small,
            large / small, large / small, large / small, "≤ 1.05", "in MB instead of seconds",
        )  # fmt: skip


def peak_memory(what: str, n: int) -> float:
    """Return the peak of a process of its own, in MB."""
    done = subprocess.run(
        [sys.executable, HERE / "memory.py", what, str(n)], capture_output=True, text=True, check=True
    )
    return float(done.stdout)


def import_rows(repeats: int) -> Iterator[Ratio]:
    usual = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}

    def start(code: str) -> Callable[[], Any]:
        return lambda: subprocess.run([sys.executable, "-c", code], check=True, env=usual)

    yield ratio(
        ("import retrainscope", start("import retrainscope")),
        ("import torch, sklearn.base", start("import torch, sklearn.base")),
        repeats=repeats, aim="≤ 1.10",
    )  # fmt: skip


# ---- Networks, data, and the work of others


def resnet(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return torchvision.models.resnet18(num_classes=10).eval()


def digits() -> tuple[Tensor, Tensor]:
    mnist = load_mnist()
    return torch.from_numpy(mnist.train_images), torch.from_numpy(mnist.train_labels)


def mnist_network() -> nn.Module:
    return trained(split_roles(load_mnist()).training, 0).eval()


def forward(model: nn.Module, X: Tensor) -> None:
    with torch.no_grad():
        for rows in X.split(BATCH):
            model(rows)


def features_of(model: nn.Module, X: Tensor, layers: Any) -> dict[str, Tensor]:
    """Collect what layers put out in one pass."""
    found: dict[str, list[Tensor]] = {layer: [] for layer in layers}
    modules = dict(model.named_modules())
    handles = [
        modules[layer].register_forward_hook(
            lambda _module, _args, output, name=layer: found[name].append(output.clone())
        )
        for layer in layers
    ]
    forward(model, X)
    for handle in handles:
        handle.remove()
    return {layer: torch.cat(parts) for layer, parts in found.items()}


def cut_off_passes(model: nn.Module, layer: str, X: Tensor, steps: int) -> None:
    """Run forward to a layer and back to the input, so many times."""

    class Seen(BaseException):
        pass

    found: list[Tensor] = []

    def stop(_module: nn.Module, _args: Any, output: Tensor) -> None:
        found.append(output)
        raise Seen

    model.requires_grad_(False)
    x = torch.rand_like(X).requires_grad_(True)
    handle = dict(model.named_modules())[layer].register_forward_hook(stop)
    for _ in range(steps):
        with contextlib.suppress(Seen):
            model(x)
        features = found.pop()
        torch.autograd.grad(features, x, features.detach())
    handle.remove()


def share_within(features: np.ndarray, labels: np.ndarray) -> float:
    """Return the share of the variance within classes, as in `scatter_share`, from all features at once."""
    features = features.astype(np.float64)
    parts = [features[labels == label] for label in np.unique(labels)]
    within = [part.var(axis=0, ddof=1).sum() for part in parts]
    means = np.stack([part.mean(axis=0) for part in parts])
    between = means.var(axis=0, ddof=1).sum() - np.mean([w / len(part) for w, part in zip(within, parts, strict=True)])
    overall = float(np.mean(within))
    return overall / (overall + max(between, 0.0))


def largest_gap(ours: dict[str, float], theirs: dict[str, float]) -> str:
    return f"results differ by {max(abs(ours[name] - theirs[name]) for name in ours):.1g}"


ROWS: dict[str, Callable[[int], Iterator[Ratio]]] = {
    "spread": spread_rows,
    "probe": probe_rows,
    "inverter": inverter_rows,
    "alternatives": alternative_rows,
    "cka": cka_rows,
    "logme": log_me_rows,
    "sweep": sweep_rows,
    "memory": memory_rows,
    "import": import_rows,
}

if __name__ == "__main__":
    main()
