"""At which depth do trained and random weights part, in which direction, and for which error?

    python benchmarks/inversion_depth/run.py vgg16 --out FOLDER
    python benchmarks/inversion_depth/run.py efficientnet-lite0 --out FOLDER

Really trained networks beside the same networks with random weights, layer by layer, on photographs. A network that is
finished is kept in the folder, and a run that was stopped goes on. Needs the packages of benchmarks/requirements.txt.
"""

import argparse
import json
import time
from pathlib import Path

import numpy as np
import torch
from networks import NETWORKS
from photographs import OTHERS, REPORTED, photographs

from retrainscope import Descent
from retrainscope.plotting import save_figure
from retrainscope.studies.depth import (
    Measures,
    contrast_table,
    measure_network,
    measures_table,
    plot_contrasts,
    plot_pictures,
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("network", choices=NETWORKS)
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--inits", type=int, default=3, metavar="N", help="random initialisations of each kind")
    parser.add_argument("--size", type=int, default=96, metavar="PIXELS")
    parser.add_argument("--steps", type=int, default=200, metavar="N")
    parser.add_argument("--optimizer", choices=("adam", "lbfgs"), default="lbfgs")
    parser.add_argument("--tv-weight", type=float, default=0.0, metavar="X", help="weight of the total variation")
    parser.add_argument("--layers", nargs="+", metavar="NAME", help="some of the layers only")
    parser.add_argument("--kinds", type=int, default=2, metavar="N", help="how many kinds of random weights")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    images, others = photographs(REPORTED, options.size), photographs(OTHERS, options.size)
    trained_network, kinds, layers = NETWORKS[options.network]
    layers = {name: layers[name] for name in options.layers or layers}
    descent = Descent(options.optimizer, max_iter=options.steps, tv_weight=options.tv_weight)
    builders = {"trained": [trained_network]} | {
        kind: [lambda make=make, seed=seed: make(seed, others) for seed in range(options.inits)]
        for kind, make in list(kinds.items())[: options.kinds]
    }
    found: dict[str, list[Measures]] = {}
    for kind, networks in builders.items():
        found[kind] = []
        for number, build in enumerate(networks):
            path = options.out / f"{name_of(options)}-{kind.replace(', ', '-').replace(' ', '-')}-{number}.npz"
            if not path.exists():
                start = time.perf_counter()
                measures = measure_network(build(), images, list(layers.values()), descent=descent, seed=0)
                np.savez_compressed(path, **vars(measures))
                print(f"{path.name}: {time.perf_counter() - start:.0f} s", flush=True)
            with np.load(path) as kept:
                found[kind].append(Measures(**{**kept, "n_diverged": int(kept["n_diverged"])}))
    report(options, found, images, list(layers))


def name_of(options: argparse.Namespace) -> str:
    return f"{options.network}-tv" if options.tv_weight else options.network


def report(
    options: argparse.Namespace, found: dict[str, list[Measures]], images: torch.Tensor, names: list[str]
) -> None:
    trained = found["trained"][0]
    random = {kind: measures for kind, measures in found.items() if kind != "trained"}
    tables = [measures_table(found, names)]
    tables += [
        contrast_table(trained, measures, names, title=f"trained against {kind}") for kind, measures in random.items()
    ]
    for table in tables:
        print(f"\n{table}")
    name = name_of(options)
    save_figure(plot_contrasts(random, trained, names), options.out, f"{name}-contrasts")
    first = {"trained": trained, **{kind: measures[0] for kind, measures in random.items()}}
    for place, image in enumerate(REPORTED):
        save_figure(plot_pictures(images[place], first, names, place=place), options.out, f"{name}-{image}")
    settings = {key: str(value) for key, value in vars(options).items() if key != "out"}
    document = {
        "settings": {**settings, "images": list(REPORTED), "torch": torch.__version__},
        "tables": [{"title": t.title, "header": list(t.header), "rows": t.rows, "note": t.note} for t in tables],
    }
    (options.out / f"{name}.json").write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
