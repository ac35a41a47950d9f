"""Does the need that inversion finds tell unknown digits from known ones, and better so in deeper layers?

    python benchmarks/inversion_needs.py --out FOLDER [--seeds 5]

A network of eight layers and a head learns the digits 0-4 of the bundled MNIST sample. At every layer each test digit
gets a need, the unknown digits 5-9 and the known ones alike, against held-out training images of 0-4. Separation is
the share of pairs (unknown digit, known digit) in which the unknown one has the higher need (the area under the ROC
curve): 0.5 is chance. The spread of the activations, which costs one pass, is measured beside it.
"""

import argparse
import json
import time
from collections import OrderedDict
from pathlib import Path

import numpy as np
import torch
from scipy.stats import t as student
from sklearn.metrics import roc_auc_score
from torch import nn

from retrainscope import ActivationSpread, GradientInverter
from retrainscope.data import load_mnist
from retrainscope.plotting import PALETTE, new_figure, save_figure
from retrainscope.studies.mnist.experiments import KNOWN, UNKNOWN, images_of, split_roles
from retrainscope.tables import Table

EPOCHS, BATCH = 15, 32


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--seeds", type=int, default=5, metavar="N")
    parser.add_argument("--samples", type=int, default=20, metavar="N", help="of each digit")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    split = split_roles(load_mnist())
    results = []
    for seed in range(options.seeds):
        path = options.out / f"inversion-needs-seed-{seed}.json"
        if not path.exists():
            start = time.perf_counter()
            found = one_seed(split, seed, options.samples)
            path.write_text(json.dumps(found) + "\n", encoding="utf-8")
            print(f"seed {seed}: accuracy {found['accuracy']:.1f} %, {time.perf_counter() - start:.0f} s", flush=True)
        results.append(json.loads(path.read_text(encoding="utf-8")))
    table = summary(results)
    print(table)
    save_figure(figure(results), options.out, "inversion-needs")
    document = {
        "seeds": results,
        "title": table.title,
        "header": list(table.header),
        "rows": table.rows,
        "note": table.note,
    }
    (options.out / "inversion-needs.json").write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


def deep_network() -> nn.Sequential:
    """Seven convolutions and a fully connected layer, each with its ReLU, then the head."""

    def convolution(n_in: int, n_out: int, *, pool: bool = False) -> nn.Sequential:
        parts = [nn.Conv2d(n_in, n_out, kernel_size=3, padding=1), nn.ReLU()]
        return nn.Sequential(*parts, nn.MaxPool2d(2)) if pool else nn.Sequential(*parts)

    network = nn.Sequential(
        OrderedDict(
            conv1=convolution(1, 16),
            conv2=convolution(16, 16, pool=True),
            conv3=convolution(16, 32),
            conv4=convolution(32, 32, pool=True),
            conv5=convolution(32, 64),
            conv6=convolution(64, 64, pool=True),
            conv7=convolution(64, 64),
            fc1=nn.Sequential(nn.Flatten(), nn.Linear(64 * 3 * 3, 128), nn.ReLU()),
            head=nn.Linear(128, len(KNOWN)),
        )
    )
    for module in network.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
            nn.init.zeros_(module.bias)
    return network


def trained(data: tuple[torch.Tensor, torch.Tensor], seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    network, (images, labels) = deep_network(), data
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-3)
    for _ in range(EPOCHS):
        for rows in torch.randperm(len(images)).split(BATCH):
            loss = nn.functional.cross_entropy(network(images[rows]), labels[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return network.eval()


def one_seed(split, seed: int, samples: int) -> dict:
    network = trained(split.training, seed)
    known_test = images_of(split.test, KNOWN)
    with torch.no_grad():
        accuracy = 100 * float((network(known_test[0]).argmax(dim=1) == known_test[1]).float().mean())
    unknown_test = images_of(split.test, UNKNOWN)
    common = {"layers": [name for name, _ in network.named_children()][:-1], "head": "head", "random_state": seed}
    inverter = {"optimizer": "lbfgs", "max_iter": 150, "samples_per_class": samples}
    estimators = {
        "inversion, input error": GradientInverter(network, **inverter, **common),
        "inversion, feature error": GradientInverter(network, error="feature", **inverter, **common),
        "spread": ActivationSpread(network, **common),
    }
    found = {}
    for name, estimator in estimators.items():
        estimator.fit(split.known)
        of_unknown, of_known = estimator.score_layers(unknown_test), estimator.score_layers(known_test)
        found[name] = {
            "need": of_unknown.values.tolist(),
            "need_of_known": of_known.values.tolist(),
            "by_digit": np.concatenate([of_known.per_class, of_unknown.per_class]).T.tolist(),
        }
    return {"seed": seed, "accuracy": accuracy, "layers": list(common["layers"]), "estimators": found}


def separations(results: list[dict], estimator: str) -> np.ndarray:
    """Return the area under the ROC curve, of shape (n_seeds, n_layers)."""
    unknown = [digit in UNKNOWN for digit in (*KNOWN, *UNKNOWN)]
    return np.array(
        [[roc_auc_score(unknown, needs) for needs in r["estimators"][estimator]["by_digit"]] for r in results]
    )


def mean_and_reach(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the mean over seeds and half the width of its 90 % interval."""
    n = len(values)
    reach = (
        student.ppf(0.95, n - 1) * values.std(axis=0, ddof=1) / n**0.5 if n > 1 else np.full(values.shape[1:], np.nan)
    )
    return values.mean(axis=0), reach


def summary(results: list[dict]) -> Table:
    layers, estimators = results[0]["layers"], list(results[0]["estimators"])
    columns = []
    for estimator in estimators:
        needs = np.array([r["estimators"][estimator]["need"] for r in results])
        columns += [(needs, "+.2f"), (separations(results, estimator), ".2f")]
    cells = []
    for values, form in columns:
        mean, reach = mean_and_reach(values)
        cells.append([f"{m:{form}} ± {r:.2f}" for m, r in zip(mean, reach, strict=True)])
    accuracy = np.mean([r["accuracy"] for r in results])
    return Table(
        f"Need of the digits 5-9, and separation of 5-9 from 0-4, at every layer; {len(results)} networks",
        ["layer", *(f"{what}, {e}" for e in estimators for what in ("need", "separation"))],
        [[layer, *(column[place] for column in cells)] for place, layer in enumerate(layers)],
        note=f"± is half the 90 % interval of the mean over networks; they have {accuracy:.1f} % accuracy on 0-4.",
    )


def figure(results: list[dict]):
    made, axes = new_figure(9, 4, n_columns=2)
    layers, estimators = results[0]["layers"], list(results[0]["estimators"])
    places = np.arange(len(layers))
    for colour, estimator in zip(PALETTE, estimators, strict=False):
        needs = np.array([r["estimators"][estimator]["need"] for r in results])
        for ax, values in zip(axes[0], (needs, separations(results, estimator)), strict=True):
            mean, reach = mean_and_reach(values)
            ax.errorbar(places, mean, np.nan_to_num(reach), fmt="o-", capsize=3, color=colour, label=estimator)
    for ax, name, neutral in zip(
        axes[0], ("need of the digits 5-9 (nats)", "separation of 5-9 from 0-4 (AUC)"), (0, 0.5), strict=True
    ):
        ax.axhline(neutral, color="0.6", linewidth=1, zorder=0)
        ax.set_xticks(places, layers, rotation=45, ha="right")
        ax.set_xlabel("layer, input at the left")
        ax.set_ylabel(name)
        ax.grid(alpha=0.3)
    handles, names = axes[0, 0].get_legend_handles_labels()
    made.legend(handles, names, loc="outside lower center", ncols=3, frameon=False)
    return made


if __name__ == "__main__":
    main()
