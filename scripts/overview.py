"""The README's picture: what goes in, what is said of each layer, and what came of it, from the MNIST study."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from retrainscope.data import load_mnist
from retrainscope.figures import PALETTE
from retrainscope.studies.mnist.experiments import SeedResult

_KEEP, _RETRAIN = PALETTE[0], PALETTE[3]
_WAYS = ("head", "advised", "everything")


def draw_overview(results: Sequence[SeedResult], path: Path) -> None:
    """Draw the first result's advice, and the accuracy of all."""
    figure = Figure(figsize=(11, 3.4), layout="constrained", facecolor="white")
    data, advice, outcome = figure.subplots(1, 3, width_ratios=(1.0, 1.5, 1.1))
    data.imshow(_strip(), cmap="gray_r")
    data.set_axis_off()
    data.set_title("A network knows 0 to 4\nand meets 5 to 9")
    first = results[0].advice
    rows = first.table
    for place, row in enumerate(rows):
        assert row.need is not None
        low, high = row.interval
        colour = _RETRAIN if row.verdict == "retrain" else _KEEP
        advice.barh(place, row.need, color=colour, height=0.6)
        advice.plot([low, high], [place, place], color="black", linewidth=1.5)
        advice.text(high + 0.015, place, row.verdict, va="center", color=colour, weight="bold")
    advice.set_yticks(range(len(rows)), [f"{row.name}\n{row.share:.0%} of the parameters" for row in rows])
    advice.invert_yaxis()
    advice.set_xlim(0, max(row.interval[1] for row in rows) * 1.3)
    advice.set_xlabel("need of retraining (nats), with 90 % interval")
    advice.set_title("Which layers must be retrained?\nForecast from gradients, without training")
    accuracy = 100 * np.array([[result.check[way] for way in _WAYS] for result in results])
    names = ["the head\nalone", "+ what is\nadvised", "everything"]
    for place, (column, colour) in enumerate(zip(accuracy.T, (PALETTE[6], _RETRAIN, PALETTE[6]), strict=True)):
        outcome.hlines(column.mean(), place - 0.3, place + 0.3, color=colour, linewidth=4)
        outcome.plot([place] * len(column), column, "o", color="black", markersize=3.5)
        outcome.text(place, 97.5, f"{column.mean():.1f} %", ha="center", color=colour, weight="bold")
    outcome.set_xticks(range(len(names)), names)
    outcome.set_xlim(-0.6, len(names) - 0.4)
    outcome.set_ylim(top=99)
    outcome.set_yticks(range(82, 97, 4))
    outcome.set_ylabel("accuracy on 5 to 9 (%)")
    outcome.set_title(f"Is that true? Retrained\n({len(results)} seeds, and their mean)")
    for axes in (advice, outcome):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)


def _strip() -> np.ndarray:
    """Return known digits above unknown ones, two of each."""
    mnist = load_mnist()
    tiles = [[mnist.train_images[mnist.train_labels == digit][place, 0] for place in (0, 1)] for digit in range(10)]
    known, unknown = (
        np.concatenate([np.concatenate(pair) for pair in half], axis=1) for half in (tiles[:5], tiles[5:])
    )
    return np.concatenate([known, np.zeros((14, known.shape[1])), unknown])
