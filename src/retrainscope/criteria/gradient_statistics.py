"""The maths of the criteria on gradients."""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from retrainscope.moments import ClassMoments

__all__ = ["class_signal_to_noise", "relative_norm", "signal_to_noise"]

_MOST_SUMS = 2**18  # scalars resampled at a time: few enough for a cache
_NO_NOISE = 1e-6  # of a coordinate's mean square: less variance than that counts as so much

Floats = NDArray[np.float64]


def relative_norm(gradient: Tensor, weights: Tensor) -> float:
    """Compute the Euclidean norm of a gradient over that of the weights it belongs to.

    Parameters
    ----------
    gradient, weights : Tensor of shape (n_parameters,)

    Returns
    -------
    float
        NaN where the weights are all 0, or there are none.

    Examples
    --------
    >>> import torch
    >>> relative_norm(torch.tensor([3.0, 4.0]), torch.tensor([0.0, 2.0]))
    2.5
    """
    size = float(torch.linalg.vector_norm(weights))
    return float(torch.linalg.vector_norm(gradient)) / size if size > 0 else float("nan")


def signal_to_noise(sums: Floats, squares: Floats, counts: Floats, n_reference: float) -> Floats:
    """Compute the squared mean of per-sample gradients over their variance, averaged over coordinates.

    For the gradients g_n of n samples in coordinate k,

        mean over k of  (mean g_k)² / (Var g_k + ε)  -  1 / n  +  1 / n_reference.

    Without any signal the first term is 1 / n on average, so its value tells how many samples there are; the other two
    bring it to what it would be for `n_reference` samples, and cancel where n is that. ε is a millionth of the
    coordinate's mean square. A coordinate without a gradient counts as 0.

    Parameters
    ----------
    sums, squares : ndarray of shape (..., n_coordinates)
        Sums over the samples, of the gradients and of their squares.
    counts : ndarray of shape (...)
        Samples; at least two.
    n_reference : float

    Returns
    -------
    ndarray of shape (...)
        NaN where no coordinate has a gradient.

    Examples
    --------
    Gradients 1 and 3: mean 2, variance 2.

    >>> import numpy as np
    >>> float(signal_to_noise(np.array([4.0]), np.array([10.0]), np.array(2.0), 2).round(4))
    2.0
    """
    n = counts[..., None]
    with np.errstate(divide="ignore", invalid="ignore"):
        means, mean_squares = sums / n, squares / n
        variances = np.maximum(mean_squares - means**2, 0.0) * n / (n - 1)
        ratios = means**2 / (variances + _NO_NOISE * mean_squares) - 1 / n + 1 / n_reference
    alive = mean_squares > 0
    found: Floats = np.where(alive, ratios, 0.0).sum(axis=-1) / max(1, sums.shape[-1])
    return np.where(alive.any(axis=-1), found, np.nan)


def class_signal_to_noise(moments: ClassMoments, weights: Floats, n_reference: int) -> Floats:
    """Return the signal to noise of all samples together, then of each class, of shape (n_draws, 1 + n_classes)."""
    n_coordinates = moments.sums.shape[-1] // 2
    step = max(1, _MOST_SUMS // max(1, moments.sums[:, 0].size))

    def ratios(weights: Floats) -> Floats:
        counts = (weights * moments.counts).sum(axis=-1)
        sums = np.matmul(weights.transpose(1, 0, 2), moments.sums).transpose(1, 0, 2)
        counts, sums = (np.concatenate([part.sum(axis=1, keepdims=True), part], axis=1) for part in (counts, sums))
        return signal_to_noise(sums[..., :n_coordinates], sums[..., n_coordinates:], counts, n_reference)

    return np.concatenate([ratios(weights[at : at + step]) for at in range(0, len(weights), step)])
