"""Kernel ridge regression for sums of kernels, every sample predicted by all others."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

__all__ = ["RIDGES", "LeftOut", "kernel_ridge"]

RIDGES = tuple(np.logspace(-4, 1, 11).tolist())  # as shares of the mean of the diagonal of the sum of all kernels

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class LeftOut:
    """Predictions of samples by all others.

    Attributes
    ----------
    errors : ndarray of shape (n_sets, n_samples)
        Squared distance to the one-hot class.
    hits : ndarray of shape (n_sets, n_samples), bool
        Whether the class comes out highest.
    ridge : float
        The one chosen, for all sets.
    """

    errors: Floats
    hits: NDArray[np.bool_]
    ridge: float


def kernel_ridge(
    kernels: Mapping[str, Floats],
    bases: Iterable[Floats],
    targets: NDArray[np.int64],
    sets: Sequence[Sequence[str]],
    *,
    ridges: Sequence[float] = RIDGES,
) -> LeftOut:
    """Regress one-hot classes on a base kernel and some of the others, leaving out one sample after the other.

    All sets share one ridge, the one by which the best of them has the smallest error: they stand for training with
    one budget, and what has a small kernel moves little in it.

    Parameters
    ----------
    kernels : mapping of str to ndarray of shape (n_samples, n_samples)
        One a layer.
    bases : iterable of ndarrays of shape (n_samples, n_samples)
        What each set has beside its kernels; all of the same trace.
    targets : ndarray of shape (n_samples,)
        Classes from 0 to n_classes - 1.
    sets : sequence of sequences of str
        Which kernels are added to the base.
    ridges : sequence of float
        As shares of the mean of the diagonal of the sum of all kernels.

    Returns
    -------
    LeftOut

    References
    ----------
    Ridge regression in dual variables: Saunders, Gammerman and Vovk (1998). Leaving one out in closed form, from the
    diagonal of the hat matrix: Allen (1974), the PRESS statistic.
    """
    n_classes = int(targets.max()) + 1
    truth = np.eye(n_classes)[targets] - 1 / n_classes
    errors = np.empty((len(ridges), len(sets), len(targets)))
    hits = np.empty(errors.shape, dtype=bool)
    for place, (names, base) in enumerate(zip(sets, bases, strict=True)):
        unit = (np.trace(base) + sum(np.trace(kernel) for kernel in kernels.values())) / len(targets)
        values, vectors = np.linalg.eigh(base + sum(kernels[name] for name in names))
        values = np.maximum(values, 0)  # below zero by rounding alone
        along = vectors.T @ truth
        for row, ridge in enumerate(ridges):
            kept = values / (values + ridge * unit)
            leverage = np.square(vectors) @ kept
            missed = (truth - vectors @ (kept[:, None] * along)) / (1 - leverage)[:, None]
            errors[row, place] = np.square(missed).sum(axis=1)
            hits[row, place] = (truth - missed).argmax(axis=1) == targets
    by_ridge = errors.mean(axis=-1)
    # Of equally good ones for the best set, the one that is better for all.
    chosen = int(np.lexsort((by_ridge.mean(axis=1), by_ridge.min(axis=1)))[0])
    return LeftOut(errors[chosen], hits[chosen], float(ridges[chosen]))
