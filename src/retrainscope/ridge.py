"""Kernel ridge regression for sums of kernels, every sample predicted by those of other groups."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

__all__ = ["RIDGES", "LeftOut", "kernel_ridge"]

RIDGES = tuple(np.logspace(-4, 1, 11).tolist())  # as shares of the mean of the diagonal of the sum of all kernels

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class LeftOut:
    """Predictions of samples by those of other groups.

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
    groups: NDArray[np.int64] | None = None,
    ridges: Sequence[float] = RIDGES,
) -> LeftOut:
    """Regress one-hot classes on a base kernel and some of the others, leaving out one group after the other.

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
    groups : ndarray of shape (n_samples,), optional
        What each sample is a part of; None: every sample is on its own.
    ridges : sequence of float
        As shares of the mean of the diagonal of the sum of all kernels.

    Returns
    -------
    LeftOut

    References
    ----------
    Ridge regression in dual variables: Saunders, Gammerman and Vovk (1998). Leaving out in closed form, from the blocks
    on the diagonal of the hat matrix: Allen (1974), the PRESS statistic.
    """
    n_classes = int(targets.max()) + 1
    truth = np.eye(n_classes)[targets] - 1 / n_classes
    errors = np.empty((len(ridges), len(sets), len(targets)))
    hits = np.empty(errors.shape, dtype=bool)
    left_out = _rows_by_size(np.arange(len(targets)) if groups is None else groups)
    for place, (names, base) in enumerate(zip(sets, bases, strict=True)):
        unit = (np.trace(base) + sum(np.trace(kernel) for kernel in kernels.values())) / len(targets)
        values, vectors = np.linalg.eigh(base + sum(kernels[name] for name in names))
        values = np.maximum(values, 0)  # below zero by rounding alone
        along = vectors.T @ truth
        blocks = [vectors[rows] for rows in left_out]
        for row, ridge in enumerate(ridges):
            kept = values / (values + ridge * unit)
            missed = truth - vectors @ (kept[:, None] * along)
            for rows, block in zip(left_out, blocks, strict=True):
                leverage = (block * kept) @ block.transpose(0, 2, 1)
                missed[rows] = np.linalg.solve(np.eye(rows.shape[1]) - leverage, missed[rows])
            errors[row, place] = np.square(missed).sum(axis=1)
            hits[row, place] = (truth - missed).argmax(axis=1) == targets
    by_ridge = errors.mean(axis=-1)
    # Of equally good ones for the best set, the one that is better for all.
    chosen = int(np.lexsort((by_ridge.mean(axis=1), by_ridge.min(axis=1)))[0])
    return LeftOut(errors[chosen], hits[chosen], float(ridges[chosen]))


def _rows_by_size(groups: NDArray[np.int64]) -> list[NDArray[np.int64]]:
    """Return the rows of each group; groups of one size in one array of shape (n_groups, size)."""
    order = np.argsort(groups, kind="stable")
    _, sizes = np.unique(groups, return_counts=True)
    members = np.split(order, np.cumsum(sizes)[:-1])
    return [np.stack([rows for rows in members if len(rows) == size]) for size in np.unique(sizes)]
