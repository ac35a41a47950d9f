"""Figures from results, by matplotlib. Nothing here touches pyplot's global state."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from retrainscope.advice import KEEP, RETRAIN, UNDECIDED, LayerAdvice, Recommendation
from retrainscope.exceptions import InvalidDataError
from retrainscope.figures import INCHES_A_LETTER, PALETTE, new_figure, save_figure, short_name, short_names
from retrainscope.forecast import Forecast
from retrainscope.plotting_maps import plot_losses, plot_maps, plot_reconstructions
from retrainscope.policies import NONE, policy_name
from retrainscope.scores import TAILS, LayerScores
from retrainscope.tables import number_text
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

# Colour, marker and hatch: in grey the last two tell them apart.
_VERDICTS = {
    RETRAIN: (PALETTE[3], "o", ""),
    UNDECIDED: (PALETTE[1], "s", ".."),
    KEEP: (PALETTE[0], "D", "//"),
}
_MOST_NUMBERED = 12  # layers, of a heat map with a number in each field
_LONGEST_POLICY = 44  # letters


def plot_needs(result: Recommendation) -> "Figure":
    """Draw the need of every layer with its interval and the verdict, and the threshold where that decides.

    A marker without an interval is hollow.

    Parameters
    ----------
    result : Recommendation

    Returns
    -------
    matplotlib.figure.Figure
    """
    figure, axes = new_figure(6.4, 1.6 + 0.42 * len(result.table))
    ax: Axes = axes[0, 0]
    _draw_verdicts(ax, result.table)
    if result.forecast is None:
        ax.axvline(result.threshold, color="0.4", linestyle="--", linewidth=1, label=f"threshold {result.threshold:g}")
    _name_layers(ax, short_names([row.name for row in result.table]))
    ax.axvline(0, color="0.8", linewidth=1, zorder=0)
    ax.set_xlabel("need (nats), with 90 % interval")
    ax.set_title(f"Verdict: {result.verdict}")
    figure.legend(loc="outside lower center", ncols=4, frameon=False)
    return figure


def plot_estimators(result: Recommendation) -> "Figure":
    """Draw the needs by each estimator side by side, and last those that the advice goes by, with the verdicts.

    Each has a scale of its own. A marker without an interval is hollow.

    Parameters
    ----------
    result : Recommendation

    Returns
    -------
    matplotlib.figure.Figure
    """
    rows, estimators = result.table, list(result.table[0].needs)
    n_columns = len(estimators) + 1
    figure, axes = new_figure(2.4 + 2.1 * n_columns, 1.9 + 0.36 * len(rows), n_columns=n_columns)
    for ax, name in zip(axes[0, :-1], estimators, strict=True):
        needs, intervals = [row.needs[name] for row in rows], [row.intervals[name] for row in rows]
        _draw(ax, range(len(rows)), needs, intervals, colour="0.35", marker="o")
        ax.set_title(short_name(name, 22), fontsize=10)
    _draw_verdicts(axes[0, -1], rows)
    axes[0, -1].set_title("the advice", fontsize=10)
    names = short_names([row.name for row in rows])
    for place, ax in enumerate(axes[0]):
        if result.forecast is None:
            label = f"threshold {result.threshold:g}" if ax is axes[0, -1] else None
            ax.axvline(result.threshold, color="0.4", linestyle="--", linewidth=1, label=label)
        _name_layers(ax, names if place == 0 else [""] * len(rows))
        ax.axvline(0, color="0.8", linewidth=1, zorder=0)
        ax.set_xlabel("need (nats)")
        ax.locator_params(axis="x", nbins=4)
    handles, labels = axes[0, -1].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False)
    return figure


def plot_cost(result: Recommendation) -> "Figure":
    """Draw what the advice costs beside the head alone and everything, and below where the parameters are.

    Parameters
    ----------
    result : Recommendation

    Returns
    -------
    matplotlib.figure.Figure
    """
    rows = (*result.table, result.head)
    names = [*short_names([row.name for row in result.table]), f"{short_name(result.head.name)} (head)"]
    width, height = 5.2 + INCHES_A_LETTER * max(map(len, names)), 0.36 * len(rows)
    figure, axes = new_figure(width, 3.9 + height, n_rows=2, height_ratios=(1.3, 0.4 + height))
    _draw_costs(axes[0, 0], result)
    ax: Axes = axes[1, 0]
    for verdict, (colour, _, hatch) in _VERDICTS.items():
        places = [place for place, row in enumerate(rows) if row.verdict == verdict]
        if places:
            shares = [100 * rows[place].share for place in places]
            bars = ax.barh(places, shares, color=colour, hatch=hatch, edgecolor="white", label=verdict)
            ax.bar_label(bars, [f"{share:.1f}" for share in shares], padding=3, fontsize=8)
    _name_layers(ax, names)
    ax.margins(x=0.12)
    ax.set_xlabel("share of all parameters (%), by layer")
    handles, labels = ax.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False)
    return figure


def _draw_costs(ax: "Axes", result: Recommendation) -> None:
    """Draw shares of the parameters and of the backward work."""
    costs = {
        "the head alone": {"parameters": result.head.share, "backward": math.nan, **result.head_cost},
        "the advice": result.cost,
        "everything": {"parameters": 1.0, "backward": 1.0},
    }
    if not result.layers and result.head.verdict == RETRAIN:
        del costs["the head alone"]
    for place, cost in enumerate(costs.values()):
        for shift, share, what, colour in (
            (-0.2, cost["parameters"], "parameters", "0.35"),
            (0.2, cost["backward"], "backward work", "0.7"),
        ):
            length = 100 * float(np.nan_to_num(share))
            ax.barh(place + shift, length, height=0.36, color=colour)
            words = f"{share:.1%} of the {what}" if math.isfinite(share) else f"{what} not known"
            ax.text(length + 1, place + shift, words, va="center", fontsize=8)
    ax.set_yticks(range(len(costs)), [*costs])
    ax.set_ylim(len(costs) - 0.5, -0.5)
    ax.set_xlim(0, 165)  # with room for the words
    ax.set_xticks(range(0, 101, 20))
    ax.set_xlabel("share of training everything (%)")


def plot_policies(result: Forecast | LayerSweep) -> "Figure":
    """Draw the accuracy of every policy with its 90 % interval, forecast or measured; marked is what was advised.

    Parameters
    ----------
    result : Forecast or LayerSweep

    Returns
    -------
    matplotlib.figure.Figure
    """
    if isinstance(result, LayerSweep):
        accuracy, draws, advised, what = result.accuracy.mean(axis=1), result.draws, result.advised, "accuracy"
    else:
        accuracy, draws, advised, what = result.accuracy, result.accuracy_draws, None, "forecast accuracy"
    intervals = 100 * np.quantile(draws, TAILS, axis=0).T
    figure, axes = new_figure(7, 1.4 + 0.36 * len(result.policies))
    ax: Axes = axes[0, 0]
    for chosen, colour, marker in ((False, PALETTE[0], "o"), (True, PALETTE[3], "D")):
        places = [place for place, policy in enumerate(result.policies) if (policy == advised) == chosen]
        _draw(ax, places, 100 * accuracy[places], intervals[places], colour=colour, marker=marker, missing="diverged")
    names = [
        f"{name}{' (advised)' if policy == advised else ''}, {result.share(policy):.0%}"
        for policy, name in zip(result.policies, _policy_names(result), strict=True)
    ]
    ax.set_yticks(range(len(names)), names)
    ax.set_ylim(len(names) - 0.5, -0.5)
    ax.set_xlabel(f"{what} (%), with 90 % interval")
    ax.set_ylabel("policy, and share trained")
    return figure


def _policy_names(result: Forecast | LayerSweep) -> list[str]:
    """Name the policies by short names of their layers."""
    layers = dict(zip(result.layers, short_names(result.layers, 28), strict=True))
    names = [
        policy if policy == NONE else policy_name(tuple(layers[name] for name in trained), tuple(layers.values()))
        for policy, trained in zip(result.policies, result.trained, strict=True)
    ]
    return [name if len(name) <= _LONGEST_POLICY else f"{name[: _LONGEST_POLICY - 1]}…" for name in names]


def plot_class_needs(scores: LayerScores) -> "Figure":
    """Draw the need of every class of the unknown data at every layer as a heat map.

    Parameters
    ----------
    scores : LayerScores
        Of labelled data.

    Returns
    -------
    matplotlib.figure.Figure
        Of more than 12 layers, a minus sign in place of its number stands for a need below 0.

    Raises
    ------
    InvalidDataError
        If the scores are of data without labels.
    """
    if not scores.classes:
        raise InvalidDataError(
            f"The scores of {scores.estimator} have no classes: the data had no labels, or on one side only. Score "
            "labelled data."
        )
    classes, layers = short_names(scores.classes), short_names(scores.layers)
    numbered = len(layers) <= _MOST_NUMBERED
    width = 2.6 + (0.8 if numbered else 0.3) * len(layers) + INCHES_A_LETTER * max(map(len, classes))
    height = 1.6 + 0.36 * len(classes) + (0.5 if numbered else 1) * INCHES_A_LETTER * max(map(len, layers))
    figure, axes = new_figure(width, height)
    ax: Axes = axes[0, 0]
    reach = float(np.nanmax(np.abs(scores.per_class), initial=1e-9))
    image = ax.imshow(scores.per_class, cmap="PuOr_r", vmin=-reach, vmax=reach, aspect="auto")
    ax.set_facecolor("0.8")  # where there is no need
    for (row, column), need in np.ndenumerate(scores.per_class):
        text = number_text(need) if numbered else "−" if need < 0 else ""
        if text:
            dark = math.isfinite(need) and abs(need) > 0.6 * reach
            ax.text(column, row, text, ha="center", va="center", color="white" if dark else "black")
    if numbered:
        ax.set_xticks(range(len(layers)), layers, rotation=30, ha="right", rotation_mode="anchor")
    else:
        ax.set_xticks(range(len(layers)), layers, rotation=90)
    ax.set_yticks(range(len(classes)), classes)
    ax.set_xlabel("layer" if np.isfinite(scores.per_class).all() else "layer (grey: not measured)")
    ax.set_ylabel("class")
    ax.set_title(scores.estimator)
    figure.colorbar(image, ax=ax, label="need (nats)")
    return figure


def _draw_verdicts(ax: "Axes", rows: Sequence[LayerAdvice]) -> None:
    """Draw needs, coloured by the verdict."""
    for verdict, (colour, marker, _) in _VERDICTS.items():
        places = [place for place, row in enumerate(rows) if row.verdict == verdict]
        if places:
            needs, intervals = [rows[place].need for place in places], [rows[place].interval for place in places]
            _draw(ax, places, needs, intervals, colour=colour, marker=marker, label=verdict)


def _draw(
    ax: "Axes",
    places: Sequence[int],
    values: Sequence[float] | NDArray[np.float64],
    intervals: Sequence[tuple[float, float]] | NDArray[np.float64],
    *,
    colour: str,
    marker: str,
    label: str | None = None,
    missing: str = "not measured",
) -> None:
    """Draw values with their intervals, which need not be around them; hollow where there is no interval."""
    rows, values = np.asarray(places), np.asarray(values, dtype=np.float64)
    ends = np.reshape(np.asarray(intervals, dtype=np.float64), (-1, 2))
    sure = np.isfinite(ends).all(axis=1)
    ax.plot(values, rows, marker, color=colour, markerfacecolor="white", zorder=3)
    ax.plot(np.where(sure, values, np.nan), rows, marker, color=colour, label=label, zorder=3)
    centre, reach = ends[sure].mean(axis=1), np.diff(ends[sure], axis=1)[:, 0] / 2
    ax.errorbar(centre, rows[sure], xerr=reach, fmt="none", ecolor=colour, capsize=3)
    for row in rows[np.isnan(values)]:
        ax.text(0.02, row, missing, transform=ax.get_yaxis_transform(), va="center", fontsize=8, color="0.4")


def _name_layers(ax: "Axes", names: Sequence[str]) -> None:
    """Give every layer its place, the input at the top."""
    ax.set_yticks(range(len(names)), names)
    ax.set_ylim(len(names) - 0.5, -0.5)
    if any(names):
        ax.set_ylabel("layer, input at the top" if len(names) > 4 else "layer")
