"""Figures from results, by matplotlib. Nothing here touches pyplot's global state."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from retrainscope.advice import KEEP, RETRAIN, UNDECIDED, Recommendation
from retrainscope.batches import Label
from retrainscope.exceptions import MissingExtraError
from retrainscope.forecast import Forecast
from retrainscope.scores import TAILS, LayerScores
from retrainscope.trials import LayerSweep

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = [
    "PALETTE",
    "new_figure",
    "plot_class_needs",
    "plot_cost",
    "plot_estimators",
    "plot_losses",
    "plot_maps",
    "plot_needs",
    "plot_policies",
    "plot_reconstructions",
    "save_figure",
]

# Okabe and Ito's colours, which the colour-blind tell apart.
PALETTE = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#F0E442", "#000000")
_VERDICTS = {
    RETRAIN: (PALETTE[3], "o", "retrain"),
    UNDECIDED: (PALETTE[1], "s", "undecided"),
    KEEP: (PALETTE[0], "D", "keep"),
}
_INCHES_A_LETTER = 0.085
_MOST_NUMBERED = 12  # layers, of a heat map with a number in each field
_MARKERS = ("o", "s", "^", "D", "v")


def new_figure(width: float, height: float, *, n_rows: int = 1, n_columns: int = 1) -> tuple["Figure", Any]:
    """Make a figure with axes, or name the extra that brings matplotlib.

    Parameters
    ----------
    width, height : float
        In inches.
    n_rows, n_columns : int

    Returns
    -------
    (Figure, ndarray of Axes of shape (n_rows, n_columns))

    Raises
    ------
    MissingExtraError
        If matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingExtraError.for_package("matplotlib", "plot") from error
    figure = Figure(figsize=(width, height), layout="constrained", facecolor="white")
    return figure, figure.subplots(n_rows, n_columns, squeeze=False)


def save_figure(figure: "Figure", folder: str | Path, name: str) -> tuple[Path, Path]:
    """Write a figure as PNG and as SVG, and return both paths."""
    png, svg = Path(folder) / f"{name}.png", Path(folder) / f"{name}.svg"
    figure.savefig(png, dpi=150)
    figure.savefig(svg)
    return png, svg


def plot_needs(result: Recommendation) -> "Figure":
    """Draw the need of every layer with its interval and the verdict, and the threshold where that decides.

    Parameters
    ----------
    result : Recommendation

    Returns
    -------
    matplotlib.figure.Figure
    """
    rows = result.table
    figure, axes = new_figure(6.4, 1.4 + 0.42 * len(rows))
    ax: Axes = axes[0, 0]
    for verdict, (colour, marker, label) in _VERDICTS.items():
        places = [place for place, row in enumerate(rows) if row.verdict == verdict]
        if not places:
            continue
        needs = np.array([rows[place].need for place in places])
        ends = np.array([rows[place].interval for place in places])
        reach = np.nan_to_num(np.abs(ends - needs[:, None]).T)
        ax.errorbar(needs, places, xerr=reach, fmt=marker, color=colour, capsize=3, label=label)
    if result.forecast is None:
        ax.axvline(result.threshold, color="0.4", linestyle="--", linewidth=1, label=f"threshold {result.threshold:g}")
    ax.axvline(0, color="0.8", linewidth=1, zorder=0)
    ax.set_yticks(range(len(rows)), [_short(row.name) for row in rows])
    ax.set_ylim(len(rows) - 0.5, -0.5)
    ax.set_xlabel("need (nats), with 90 % interval")
    ax.set_ylabel("layer, input at the top")
    ax.set_title(f"Verdict: {result.verdict}")
    figure.legend(loc="outside lower center", ncols=4, frameon=False)
    return figure


def plot_estimators(result: Recommendation) -> "Figure":
    """Draw the needs by each estimator side by side, with their intervals.

    Parameters
    ----------
    result : Recommendation

    Returns
    -------
    matplotlib.figure.Figure
    """
    rows, names = result.table, list(result.table[0].needs)
    figure, axes = new_figure(2.2 + 2.6 * len(names), 1.6 + 0.36 * len(rows), n_columns=len(names))
    for column, name in enumerate(names):
        ax: Axes = axes[0, column]
        needs = np.array([row.needs[name] for row in rows])
        ends = np.array([row.intervals[name] for row in rows])
        reach = np.nan_to_num(np.abs(ends - needs[:, None]).T)
        colour, marker = PALETTE[column % len(PALETTE)], _MARKERS[column % len(_MARKERS)]
        ax.errorbar(needs, range(len(rows)), xerr=reach, fmt=marker, color=colour, capsize=3)
        ax.axvline(0, color="0.8", linewidth=1, zorder=0)
        ax.set_title(_short(name), fontsize=10)
        ax.set_xlabel("need (nats)")
        ax.set_yticks(range(len(rows)), [_short(row.name) for row in rows] if column == 0 else [])
        ax.set_ylim(len(rows) - 0.5, -0.5)
    axes[0, 0].set_ylabel("layer, input at the top")
    return figure


def plot_cost(result: Recommendation) -> "Figure":
    """Draw how the parameters are spread over the layers and the head, and which of them are trained.

    Parameters
    ----------
    result : Recommendation

    Returns
    -------
    matplotlib.figure.Figure
    """
    rows = (*result.table, result.head)
    figure, axes = new_figure(6.4, 1.6 + 0.36 * len(rows))
    ax: Axes = axes[0, 0]
    for verdict, (colour, _, label) in _VERDICTS.items():
        places = [place for place, row in enumerate(rows) if row.verdict == verdict]
        if places:
            shares = [100 * rows[place].share for place in places]
            hatch = {RETRAIN: "", UNDECIDED: "..", KEEP: "//"}[verdict]
            bars = ax.barh(places, shares, color=colour, hatch=hatch, edgecolor="white", label=label)
            ax.bar_label(bars, [f"{share:.1f}" for share in shares], padding=3, fontsize=8)
    ax.set_yticks(range(len(rows)), [*(_short(row.name) for row in result.table), f"{_short(result.head.name)} (head)"])
    ax.set_ylim(len(rows) - 0.5, -0.5)
    ax.margins(x=0.12)
    ax.set_xlabel("share of all parameters (%)")
    parameters, backward = result.cost["parameters"], result.cost["backward"]
    figure.suptitle(f"Trained: {parameters:.1%} of the parameters, {backward:.0%} of the backward work", fontsize=10)
    figure.legend(loc="outside lower center", ncols=3, frameon=False)
    return figure


def plot_policies(result: Forecast | LayerSweep) -> "Figure":
    """Draw the accuracy of every policy with its 90 % interval, forecast or measured; marked is what was advised.

    Parameters
    ----------
    result : Forecast or LayerSweep

    Returns
    -------
    matplotlib.figure.Figure
    """
    swept = isinstance(result, LayerSweep)
    accuracy = 100 * (result.accuracy.mean(axis=1) if isinstance(result, LayerSweep) else result.accuracy)
    draws = result.draws if isinstance(result, LayerSweep) else result.accuracy_draws
    reach = np.nan_to_num(np.abs(100 * np.quantile(draws, TAILS, axis=0) - accuracy))
    figure, axes = new_figure(6.4, 1.4 + 0.36 * len(result.policies))
    ax: Axes = axes[0, 0]
    advised = result.advised if isinstance(result, LayerSweep) else None
    for place, policy in enumerate(result.policies):
        colour, marker = (PALETTE[3], "D") if policy == advised else (PALETTE[0], "o")
        ax.errorbar(accuracy[place], place, xerr=reach[:, place : place + 1], fmt=marker, color=colour, capsize=3)
    names = [
        f"{_short(policy)}{' (advised)' if policy == advised else ''}, {result.share(policy):.0%}"
        for policy in result.policies
    ]
    ax.set_yticks(range(len(names)), names)
    ax.set_ylim(len(names) - 0.5, -0.5)
    ax.set_xlabel(f"{'accuracy' if swept else 'forecast accuracy'} (%), with 90 % interval")
    ax.set_ylabel("policy, and share trained")
    return figure


def plot_class_needs(scores: LayerScores) -> "Figure":
    """Draw the need of every class of the unknown data at every layer as a heat map.

    Parameters
    ----------
    scores : LayerScores
        Of labelled data.

    Returns
    -------
    matplotlib.figure.Figure
    """
    classes = [_short(str(label)) for label in scores.classes]
    numbered = len(scores.layers) <= _MOST_NUMBERED
    width = 2.4 + (0.8 if numbered else 0.3) * len(scores.layers) + _INCHES_A_LETTER * max(map(len, classes))
    figure, axes = new_figure(width, 2.0 + 0.4 * len(classes))
    ax: Axes = axes[0, 0]
    reach = float(np.nanmax(np.abs(scores.per_class), initial=1e-9))
    image = ax.imshow(scores.per_class, cmap="PuOr_r", vmin=-reach, vmax=reach, aspect="auto")
    for (row, column), need in np.ndenumerate(scores.per_class if numbered else scores.per_class[:0]):
        dark = math.isfinite(need) and abs(need) > 0.6 * reach
        ax.text(column, row, f"{need:.2f}", ha="center", va="center", color="white" if dark else "black")
    ax.set_xticks(range(len(scores.layers)), [_short(name) for name in scores.layers], rotation=30, ha="right")
    ax.set_yticks(range(len(classes)), classes)
    ax.set_xlabel("layer")
    ax.set_ylabel("class")
    ax.set_title(scores.estimator)
    figure.colorbar(image, ax=ax, label="need (nats)")
    return figure


def plot_maps(
    maps: Mapping[str, NDArray[np.float64]], labels: Sequence[Label] | NDArray[Any], known: Sequence[Label]
) -> "Figure":
    """Draw t-SNE maps side by side; known classes as rings, unknown ones filled.

    Parameters
    ----------
    maps : mapping of str to ndarray of shape (n_samples, 2)
        By layer.
    labels : sequence of n_samples labels
    known : sequence of labels
        The classes that the model knows.

    Returns
    -------
    matplotlib.figure.Figure
    """
    labels = np.asarray(labels)
    classes = [*known, *[label for label in dict.fromkeys(labels.tolist()) if label not in set(known)]]
    figure, axes = new_figure(4 * len(maps), 4.6, n_columns=len(maps))
    for ax, (layer, points) in zip(axes[0], maps.items(), strict=True):
        for place, label in enumerate(classes):
            of_class = points[labels == label]
            is_known = label in set(known)
            order = place if is_known else place - len(known)
            colour = PALETTE[order % len(PALETTE)]
            ax.scatter(
                of_class[:, 0],
                of_class[:, 1],
                s=14,
                marker=_MARKERS[order % len(_MARKERS)],
                facecolors="none" if is_known else colour,
                edgecolors=colour,
                linewidths=0.8,
                label=f"{label} ({'known' if is_known else 'unknown'})",
            )
        ax.set_title(_short(layer))
        ax.set_xticks([])
        ax.set_yticks([])
        ax.set_xlabel("t-SNE axis 1 (no unit)")
    axes[0, 0].set_ylabel("t-SNE axis 2 (no unit)")
    handles, names = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=5, frameon=False)
    return figure


def plot_reconstructions(
    originals: NDArray[np.float64],
    rows: Mapping[str, NDArray[np.float64]],
    labels: Sequence[Label],
    known: Sequence[Label],
) -> "Figure":
    """Draw originals in the first row and their reconstructions below, on one scale.

    Parameters
    ----------
    originals : ndarray of shape (n_samples, height, width), or with colours (n_samples, height, width, 3)
        In colour, from 0 to 1.
    rows : mapping of str to ndarray of the same shape
        The reconstructions, by what made them.
    labels : sequence of n_samples labels
    known : sequence of labels
        The classes that the model knows.

    Returns
    -------
    matplotlib.figure.Figure
    """
    shown = {"original": originals, **rows}
    figure, axes = new_figure(2.2 + 0.8 * len(originals), 0.5 + 0.85 * len(shown), n_rows=len(shown),
                              n_columns=len(originals))  # fmt: skip
    low, high = float(originals.min()), float(originals.max())
    for row, (name, images) in enumerate(shown.items()):
        for column, image in enumerate(images):
            ax: Axes = axes[row, column]
            ax.imshow(image if image.ndim == 2 else image.clip(0, 1), cmap="gray", vmin=low, vmax=high)
            ax.set_xticks([])
            ax.set_yticks([])
            if row == 0:
                kind = "known" if labels[column] in set(known) else "unknown"
                ax.set_title(f"{labels[column]}\n{kind}", fontsize=9)
        axes[row, 0].set_ylabel(name, rotation=0, ha="right", va="center", fontsize=9)
    return figure


def plot_losses(losses: Mapping[str, NDArray[np.float64]], *, x_label: str, y_label: str) -> "Figure":
    """Draw loss curves on a logarithmic scale.

    Parameters
    ----------
    losses : mapping of str to ndarray of shape (n_steps,)
    x_label, y_label : str
        With units.

    Returns
    -------
    matplotlib.figure.Figure
    """
    figure, axes = new_figure(6.4, 4.2)
    ax: Axes = axes[0, 0]
    styles = ("-", "--", ":")
    for place, (name, curve) in enumerate(losses.items()):
        ax.plot(
            np.arange(1, len(curve) + 1),
            curve,
            styles[place // len(PALETTE) % len(styles)] if place >= len(PALETTE) else "-",
            color=PALETTE[place % len(PALETTE)],
            label=_short(name),
        )
    ax.set_yscale("log")
    ax.set_xlabel(x_label)
    ax.set_ylabel(y_label)
    ax.grid(alpha=0.3)
    figure.legend(loc="outside lower center", ncols=2, frameon=False)
    return figure


def _short(text: str, most: int = 32) -> str:
    """Cut a long name in the middle; a dollar sign is text, not mathematics, and what cannot be printed is escaped."""
    text = "".join(letter if letter.isprintable() else letter.encode("unicode_escape").decode() for letter in text)
    text = text if len(text) <= most else f"{text[: most // 2 - 1]}…{text[-(most // 2) :]}"
    return text.replace("$", r"\$")
