"""Figures of samples: maps of activations, images and what is rebuilt of them, loss curves."""

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from retrainscope.batches import Label
from retrainscope.exceptions import InvalidDataError
from retrainscope.figures import INCHES_A_LETTER, MARKERS, PALETTE, new_figure, short_name, short_names

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["plot_losses", "plot_maps", "plot_reconstructions"]

_MOST_NAMED = 24  # classes; of more only whether they are known can be told apart
_MAPS_A_ROW = 3
_LETTERS_A_PICTURE = 10


def plot_maps(
    maps: Mapping[str, NDArray[np.float64]], labels: Sequence[Label] | NDArray[Any], known: Sequence[Label]
) -> "Figure":
    """Draw t-SNE maps side by side; known classes as rings, unknown ones filled.

    Parameters
    ----------
    maps : mapping of str to ndarray of shape (n_samples, 2)
        By layer.
    labels : sequence of n_samples labels
        Of more than 24 classes, known and unknown have one colour each.
    known : sequence of labels
        The classes that the model knows.

    Returns
    -------
    matplotlib.figure.Figure
    """
    n_rows = math.ceil(len(maps) / _MAPS_A_ROW)
    n_columns = math.ceil(len(maps) / n_rows)
    figure, axes = new_figure(4 * n_columns, 0.6 + 4 * n_rows, n_rows=n_rows, n_columns=n_columns)
    groups = _groups(np.asarray(labels), known)
    for ax, name, points in zip(axes.flat, short_names([*maps]), maps.values(), strict=False):
        for label, (rows, order, is_known) in groups.items():
            colour = PALETTE[order % len(PALETTE)]
            ax.scatter(
                *points[rows].T,
                s=14,
                marker=MARKERS[order % len(MARKERS)],
                facecolors="none" if is_known else colour,
                edgecolors=colour,
                linewidths=0.8,
                label=label,
            )
        ax.set_title(name)
        ax.set_xticks([])
        ax.set_yticks([])
        ax.set_xlabel("t-SNE axis 1 (no unit)")
    for ax in axes[:, 0]:
        ax.set_ylabel("t-SNE axis 2 (no unit)")
    for ax in axes.flat[len(maps) :]:
        ax.remove()
    widest = 0.6 + INCHES_A_LETTER * max(map(len, groups))
    handles, names = axes[0, 0].get_legend_handles_labels()
    n_across = max(1, min(5, int(4 * n_columns / widest)))
    figure.set_figheight(figure.get_figheight() + 0.22 * math.ceil(len(names) / n_across))
    figure.legend(handles, names, loc="outside lower center", ncols=n_across, frameon=False)
    return figure


def _groups(labels: NDArray[Any], known: Sequence[Label]) -> dict[str, tuple[NDArray[np.bool_], int, bool]]:
    """Return by name the rows of every class, its place among the known or the others, and whether it is known."""
    others = [label for label in dict.fromkeys(labels.tolist()) if label not in set(known)]
    if len(known) + len(others) > _MOST_NAMED:
        is_known = np.array([label in set(known) for label in labels.tolist()])
        return {"known": (is_known, 0, True), "unknown": (~is_known, 3, False)}
    names = short_names([*known, *others])
    return {
        f"{name} ({'known' if place < len(known) else 'unknown'})": (
            labels == label,
            place if place < len(known) else place - len(known),
            place < len(known),
        )
        for place, (name, label) in enumerate(zip(names, [*known, *others], strict=True))
    }


def plot_reconstructions(
    originals: NDArray[np.float64],
    rows: Mapping[str, NDArray[np.float64]],
    labels: Sequence[Label],
    known: Sequence[Label],
) -> "Figure":
    """Draw originals in the first row and their reconstructions below, on one scale.

    Parameters
    ----------
    originals : ndarray of shape (n_samples, height, width)
        Or (n_samples, 3, height, width) or (n_samples, height, width, 3) for colours, with 1 for 3 for grey. What is
        not within [0, 1] is scaled, from the lowest to the highest value of the originals.
    rows : mapping of str to ndarray of the same shape
        The reconstructions, by what made them.
    labels : sequence of n_samples labels
    known : sequence of labels
        The classes that the model knows.

    Returns
    -------
    matplotlib.figure.Figure

    Raises
    ------
    InvalidDataError
        If these are no images.
    """
    shown = {"original": _pixels(originals)} | {name: _pixels(images) for name, images in rows.items()}
    low, high = float(np.nanmin(shown["original"])), float(np.nanmax(shown["original"]))
    if shown["original"].ndim == 4 and low >= 0 and high <= 1:
        low, high = 0.0, 1.0
    names = short_names([*shown])
    figure, axes = new_figure(
        0.4 + INCHES_A_LETTER * max(map(len, names)) + 0.8 * len(labels),
        0.5 + 0.85 * len(shown),
        n_rows=len(shown),
        n_columns=len(labels),
    )
    titles = [short_name(label, _LETTERS_A_PICTURE) for label in labels]
    for row, (name, images) in enumerate(zip(names, shown.values(), strict=True)):
        for column, image in enumerate(images):
            ax: Axes = axes[row, column]
            if image.ndim == 3:
                image = ((image - low) / max(high - low, 1e-12)).clip(0, 1)
            ax.imshow(image, cmap="gray", vmin=low, vmax=high)
            ax.set_xticks([])
            ax.set_yticks([])
            if row == 0:
                ax.set_title(f"{titles[column]}\n{'known' if labels[column] in set(known) else 'unknown'}", fontsize=9)
        axes[row, 0].set_ylabel(name, rotation=0, ha="right", va="center", fontsize=9)
    return figure


def _pixels(images: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return images of shape (n, height, width), or with three colours (n, height, width, 3)."""
    images = np.asarray(images, dtype=np.float64)
    if images.ndim == 4 and images.shape[-1] not in (1, 3):
        images = np.moveaxis(images, 1, -1)
    if images.ndim == 4 and images.shape[-1] == 1:
        images = images[..., 0]
    if images.ndim != 3 and (images.ndim != 4 or images.shape[-1] != 3):
        raise InvalidDataError(
            "Images must have the shape (n_samples, height, width), (n_samples, colours, height, width) or "
            f"(n_samples, height, width, colours), with 1 or 3 colours. Got {np.shape(images)}."
        )
    return images


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
    figure, axes = new_figure(6.4, 3.4 + 0.12 * len(losses))
    ax: Axes = axes[0, 0]
    styles = ("-", "--", ":", "-.")
    for place, (name, curve) in enumerate(zip(short_names([*losses]), losses.values(), strict=True)):
        ax.plot(
            np.arange(1, len(curve) + 1),
            curve,
            # In grey the styles tell them apart.
            styles[(place + place // len(PALETTE)) % len(styles)],
            color=PALETTE[place % len(PALETTE)],
            label=name,
        )
    ax.set_yscale("log")
    ax.set_xlabel(x_label)
    ax.set_ylabel(y_label)
    ax.grid(alpha=0.3)
    figure.legend(loc="outside lower center", ncols=2, frameon=False)
    return figure
