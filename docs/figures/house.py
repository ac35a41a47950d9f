"""The way of the data through the modules, from the user's model and data to what acts on the advice."""

import matplotlib.pyplot as plt
from matplotlib.patches import FancyBboxPatch

from retrainscope.figures import PALETTE

GIVEN, WORK, RESULT = "#EDEDED", "#DCEBF5", "#FBE9D0"
HEIGHT = 0.92
# Where each box lies, how wide it is, what it is called, and which modules are in it.
BOXES = {
    "model": (0.0, 3.2, 1.75, "your model", "lending.borrow\nlent, and given back", GIVEN),
    "data": (0.0, 1.7, 1.75, "your data", "sources, padding\nbatches.as_batches", GIVEN),
    "layers": (2.35, 3.2, 1.75, "measuring points", "layers.find_layers\ntracing.run_layers", WORK),
    "estimators": (2.35, 1.7, 1.75, "estimators", "base; tangent, spread,\ninversion, decoding, criteria", WORK),
    "scores": (4.75, 3.2, 1.75, "needs", "scores.score\nLayerScores", RESULT),
    "forecast": (4.75, 1.7, 1.75, "sets of layers", "policies, ridge\nForecast", RESULT),
    "sweep": (2.35, 0.2, 1.75, "retrain and see", "new_head, finetuning\nsweep.sweep_layers", WORK),
    "trials": (4.75, 0.2, 1.75, "the truth", "trials\nLayerSweep", RESULT),
    "advice": (7.15, 1.7, 1.75, "the advice", "choice, verdicts\nRecommendation", RESULT),
    "act": (9.55, 3.2, 1.75, "to act on it", "finetuning, new_head\noptimising, export", WORK),
    "show": (9.55, 1.7, 1.75, "to show it", "tables, plotting\nreport, cli", WORK),
    "keep": (9.55, 0.2, 1.75, "to keep it", "saving\nparts, checkpoints", WORK),
}
ARROWS = (
    ("model", "layers"), ("data", "estimators"), ("data", "sweep"), ("layers", "estimators"),
    ("estimators", "scores"), ("estimators", "forecast"), ("sweep", "trials"), ("scores", "advice"),
    ("forecast", "advice"), ("trials", "advice"), ("advice", "act"), ("advice", "show"), ("advice", "keep"),
)  # fmt: skip


def ends(start: str, stop: str) -> tuple[tuple[float, float], tuple[float, float]]:
    """Leave a box at its right and enter one at its left; below each other, at the bottom and the top."""
    (x, y, width, *_), (to_x, to_y, to_width, *_) = BOXES[start], BOXES[stop]
    if x == to_x:
        return (x + width / 2, y), (to_x + to_width / 2, to_y + HEIGHT)
    return (x + width, y + HEIGHT / 2), (to_x, to_y + HEIGHT / 2)


figure, ax = plt.subplots(figsize=(10.2, 4.1), layout="constrained")
for x, y, width, title, modules, colour in BOXES.values():
    box = FancyBboxPatch(
        (x, y), width, HEIGHT, boxstyle="round,pad=0.04", facecolor=colour, edgecolor="0.5", linewidth=0.8
    )
    ax.add_patch(box)
    ax.text(x + width / 2, y + 0.74, title, ha="center", va="center", fontsize=9, weight="bold")
    ax.text(x + width / 2, y + 0.3, modules, ha="center", va="center", fontsize=7.2)
for start, stop in ARROWS:
    tail, head = ends(start, stop)
    ax.annotate("", head, tail, arrowprops={"arrowstyle": "-|>", "color": PALETTE[0], "shrinkA": 3, "shrinkB": 3})
ax.set_xlim(-0.15, 11.45)
ax.set_ylim(0, 4.3)
ax.axis("off")
