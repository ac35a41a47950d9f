"""Inversion by depth: a trained network beside untrained ones, layer by layer."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import t as student
from torch import Tensor, nn

from retrainscope.descent import Descent
from retrainscope.exceptions import MissingExtraError
from retrainscope.plotting import PALETTE, new_figure
from retrainscope.rebuilding import Inversion
from retrainscope.reconstruction import invert_layers
from retrainscope.scores import CONFIDENCE
from retrainscope.tables import Table, interval_text

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = [
    "MEASURES",
    "Measures",
    "contrast",
    "contrast_table",
    "image_quality",
    "measure_network",
    "measures_table",
    "plot_contrasts",
    "plot_pictures",
]

Floats = NDArray[np.float64]
_NEGLIGIBLE = 1e-4  # an error so small counts as none: of pixels it is 40 dB, of activations one percent of their size
_MOST_DECIBELS = 60.0  # beyond, the rounding to 8 bits is larger
MEASURES = {
    "input_error": "input error",
    "feature_error": "feature error",
    "psnr": "PSNR",
    "ssim": "SSIM",
}


@dataclass(frozen=True, eq=False)
class Measures:
    """How well the images are rebuilt from every layer of one network.

    Attributes
    ----------
    input_error : ndarray of shape (n_layers, n_images)
        Mean squared error of the pixels, which are in [0, 1].
    feature_error : ndarray of that shape
        Squared error of the activations relative to their squared norm.
    psnr : ndarray of that shape
        Peak signal-to-noise ratio, in decibels, up to 60 (scikit-image).
    ssim : ndarray of that shape
        Structural similarity, up to 1 (scikit-image).
    n_diverged : int
        Inversions that were stopped because their loss was not finite.
    pictures : ndarray of uint8 of shape (n_layers, n_images, height, width, 3)
    """

    input_error: Floats
    feature_error: Floats
    psnr: Floats
    ssim: Floats
    n_diverged: int
    pictures: NDArray[np.uint8]


def measure_network(
    network: nn.Module,
    images: Tensor,
    layers: Sequence[str],
    *,
    descent: Descent,
    seed: int,
    batch_size: int = 8,
    device: str | None = None,
    progress: bool | None = None,
) -> Measures:
    """Invert a network at every layer and compare what comes out with the images.

    Parameters
    ----------
    network : nn.Module
        Takes images in [0, 1].
    images : Tensor of shape (n_images, 3, height, width)
    layers : sequence of str
    descent : Descent
    seed : int
        For the starts: the same for every network.
    batch_size, device, progress
        As in `invert_layers`.

    Returns
    -------
    Measures
    """
    found = invert_layers(
        network, images, layers, descent=descent, low=0.0, high=1.0, batch_size=batch_size, device=device,
        random_state=seed, progress=progress,
    )  # fmt: skip
    true, n_pixels = _pixels(images), images[0].numel()
    rebuilt = {layer: _pixels(found[layer].inputs) for layer in layers}
    quality = np.array([[image_quality(a, b) for a, b in zip(true, rebuilt[layer], strict=True)] for layer in layers])

    def each(value: Callable[[Inversion], Tensor]) -> Floats:
        return np.stack([value(found[layer]).double().numpy() for layer in layers])

    return Measures(
        input_error=each(lambda inversion: inversion.input_error) / n_pixels,
        feature_error=each(lambda inversion: inversion.feature_error),
        psnr=quality[..., 0],
        ssim=quality[..., 1],
        n_diverged=int(sum(inversion.diverged.sum() for inversion in found.values())),
        pictures=np.stack([(255 * rebuilt[layer]).round().astype(np.uint8) for layer in layers]),
    )


def image_quality(true: NDArray[Any], rebuilt: NDArray[Any]) -> tuple[float, float]:
    """Return PSNR in decibels and SSIM of an image of shape (height, width, 3) in [0, 1].

    A PSNR above 60 dB, where the rounding to 8 bits is the larger error, is given as 60.

    Raises
    ------
    MissingExtraError
        If scikit-image is not installed.
    """
    try:
        from skimage.metrics import peak_signal_noise_ratio, structural_similarity
    except ImportError as error:
        raise MissingExtraError.for_package("scikit-image", "vision") from error
    with np.errstate(divide="ignore"):
        psnr = float(peak_signal_noise_ratio(true, rebuilt, data_range=1.0))
    return min(psnr, _MOST_DECIBELS), float(structural_similarity(true, rebuilt, data_range=1.0, channel_axis=-1))


def contrast(trained: Measures, random: Sequence[Measures], measure: str) -> tuple[Floats, Floats]:
    """Compare trained weights with random ones by one measure.

    Parameters
    ----------
    trained : Measures
    random : sequence of Measures
        One for each initialisation.
    measure : str
        Of `MEASURES`. Errors are compared by the logarithm of their ratio, with 1e-4 added to each, as the ratio of
        two errors that are as good as none is noise; PSNR and SSIM by their difference.

    Returns
    -------
    (ndarray of shape (n_layers,), ndarray of shape (n_layers, 2))
        Random less trained, averaged over images and initialisations, and its 90 % interval. Images and
        initialisations both count as random draws: the variance of the mean is the sum of theirs, with as many
        degrees of freedom as the smaller number less one. NaN where there are fewer than two of either.
    """

    def value(measures: Measures) -> Floats:
        raw: Floats = getattr(measures, measure)
        return np.log(raw + _NEGLIGIBLE) if measure.endswith("error") else raw

    differences = np.stack([value(one) - value(trained) for one in random])
    n_inits, _, n_images = differences.shape
    mean = differences.mean(axis=(0, 2))
    least = min(n_inits, n_images)
    if least < 2:
        return mean, np.full((len(mean), 2), np.nan)
    variance = differences.mean(axis=0).var(axis=1, ddof=1) / n_images
    variance += differences.mean(axis=2).var(axis=0, ddof=1) / n_inits
    reach = student.ppf((1 + CONFIDENCE) / 2, least - 1) * np.sqrt(variance)
    return mean, np.stack([mean - reach, mean + reach], axis=1)


def contrast_table(trained: Measures, random: Sequence[Measures], layers: Sequence[str], *, title: str) -> Table:
    """Show for every layer and measure how far random weights are from trained ones."""
    found = {measure: contrast(trained, random, measure) for measure in MEASURES}
    rows = []
    for place, layer in enumerate(layers):
        cells = [f"{mean[place]:+.2f} {interval_text(reach[place])}" for mean, reach in found.values()]
        _, reach = found["input_error"]
        rows.append([layer, *cells, _who_is_better(reach[place])])
    return Table(
        title,
        ["layer", "input error, log ratio", "feature error, log ratio", "PSNR (dB)", "SSIM", "better in input error"],
        rows,
        note=f"Random less trained, with 90 % intervals over {len(random)} initialisations and "
        f"{trained.psnr.shape[1]} images; 1e-4 is added to errors. A positive log ratio, and a negative difference of "
        "PSNR or SSIM: the trained network is rebuilt from better.",
    )


def measures_table(kinds: Mapping[str, Sequence[Measures]], layers: Sequence[str], *, title: str = "") -> Table:
    """Show every measure for every layer: means over images, with the spread over initialisations.

    Parameters
    ----------
    kinds : mapping of str to sequence of Measures
        By what kind of network it is: one of each initialisation.
    layers : sequence of str
    title : str
    """
    digits = {"input_error": ".2g", "feature_error": ".2g", "psnr": ".1f", "ssim": ".2f"}

    def cell(networks: Sequence[Measures], measure: str, place: int) -> str:
        means = [float(getattr(one, measure)[place].mean()) for one in networks]
        spread = f" ± {np.std(means, ddof=1):{digits[measure]}}" if len(means) > 1 else ""
        return f"{np.mean(means):{digits[measure]}}{spread}"

    return Table(
        title,
        ["layer", "weights", *MEASURES.values()],
        [
            [layer, kind, *(cell(networks, measure, place) for measure in MEASURES)]
            for place, layer in enumerate(layers)
            for kind, networks in kinds.items()
        ],
        note="Input error: mean squared error of pixels in [0, 1]. Feature error: relative to the squared norm of the "
        "activations. PSNR in dB. Means over images, ± standard deviation over initialisations.",
    )


def plot_contrasts(kinds: Mapping[str, Sequence[Measures]], trained: Measures, layers: Sequence[str]) -> "Figure":
    """Draw the log ratios of both errors by depth, with their intervals, for every kind of random weights."""
    figure, axes = new_figure(9, 3.9, n_columns=2)
    places = np.arange(len(layers))
    for ax, measure in zip(axes[0], ("input_error", "feature_error"), strict=True):
        for place, (kind, networks) in enumerate(kinds.items()):
            mean, reach = contrast(trained, networks, measure)
            ax.errorbar(
                places + 0.12 * place, mean, np.nan_to_num(np.abs(reach - mean[:, None]).T), fmt="o-", capsize=3,
                color=PALETTE[place], label=kind,
            )  # fmt: skip
        ax.axhline(0, color="0.6", linewidth=1, zorder=0)
        ax.set_xticks(places, layers, rotation=45, ha="right")
        ax.set_xlabel("layer, input at the left")
        ax.set_ylabel("log(random / trained), 90 % interval")
        ax.set_title(f"{MEASURES[measure]}: above 0 trained is better")
        ax.grid(alpha=0.3)
    handles, names = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=len(kinds), frameon=False)
    return figure


def plot_pictures(image: Tensor, kinds: Mapping[str, Measures], layers: Sequence[str], *, place: int = 0) -> "Figure":
    """Draw an image and what is rebuilt of it: a row for each network, a column for each layer.

    Parameters
    ----------
    image : Tensor of shape (3, height, width)
    kinds : mapping of str to Measures
    layers : sequence of str
    place : int
        Which of the images measured it is.
    """
    n_rows, n_columns = len(kinds), 1 + len(layers)
    figure, axes = new_figure(1.0 + 1.6 * n_columns, 0.5 + 1.7 * n_rows, n_rows=n_rows, n_columns=n_columns)
    for row, (kind, measures) in enumerate(kinds.items()):
        shown = [_pixels(image[None])[0], *measures.pictures[:, place]]
        for column, picture in enumerate(shown):
            ax = axes[row, column]
            ax.imshow(picture)
            ax.set_xticks([])
            ax.set_yticks([])
            if row == 0:
                ax.set_title("original" if column == 0 else layers[column - 1], fontsize=9)
            if column:
                ax.set_xlabel(f"SSIM {measures.ssim[column - 1, place]:.2f}", fontsize=8)
        axes[row, 0].set_ylabel(kind, fontsize=9)
    return figure


def _pixels(images: Tensor) -> Floats:
    return images.movedim(1, -1).double().cpu().numpy()


def _who_is_better(interval: Floats) -> str:
    low, high = interval
    if low > 0:
        return "trained"
    return "random" if high < 0 else "not shown"
