"""Running moments by class, and their resampling: frozen float64 values that merge."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from retrainscope.batches import Label, ordered_classes

__all__ = [
    "N_GROUPS",
    "ClassMoments",
    "GroupCounter",
    "Rows",
    "RunningMoments",
    "class_means",
    "half_samples",
    "moments_of",
    "scatter_share",
]

N_GROUPS = 10
_ROUNDING = 1e-12

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class ClassMoments:
    """Sums over the samples of each class, kept apart in groups so that they can be resampled.

    The samples of a class are dealt in turn to ``N_GROUPS`` groups. What is kept does not depend on the
    number of samples. Sums are float64, which is exact enough for float32 features as long as their mean
    is below a million times their standard deviation.

    Attributes
    ----------
    classes : tuple of n_classes labels
    counts : ndarray of shape (n_classes, N_GROUPS)
        Samples.
    sums : ndarray of shape (n_classes, N_GROUPS, n_features)
        Sum of the features.
    squares : ndarray of shape (n_classes, N_GROUPS)
        Sum of the squared Euclidean norms of the samples.
    """

    classes: tuple[Label, ...]
    counts: Floats
    sums: Floats
    squares: Floats

    @property
    def class_counts(self) -> Floats:
        """Samples of each class, shape (n_classes,)."""
        per_class: Floats = self.counts.sum(axis=1)
        return per_class

    def merge(self, other: "ClassMoments") -> "ClassMoments":
        """Return the moments of both sets of samples together; associative, and commutative but for order."""
        if self.classes == other.classes:
            classes, mine, theirs = self.classes, self, other
        else:
            classes = tuple(dict.fromkeys((*self.classes, *other.classes)))
            mine, theirs = self._spread_to(classes), other._spread_to(classes)
        return ClassMoments(
            classes,
            mine.counts + theirs.counts,
            mine.sums + theirs.sums,
            mine.squares + theirs.squares,
        )

    def pooled(self) -> "ClassMoments":
        """Return the moments of all samples as one class, labelled None."""
        total = tuple(part.sum(axis=0, keepdims=True) for part in (self.counts, self.sums, self.squares))
        return ClassMoments((None,), *total)

    def only(self, classes: tuple[Label, ...]) -> "ClassMoments":
        """Return the moments of these classes alone, in this order."""
        if classes == self.classes:
            return self
        rows = [self.classes.index(label) for label in classes]
        return ClassMoments(classes, self.counts[rows], self.sums[rows], self.squares[rows])

    def ordered(self) -> "ClassMoments":
        """Return the same with the classes in sorted order, or as they came where they do not compare."""
        classes = ordered_classes(self.classes)
        return self if classes == self.classes else self._spread_to(classes)

    def _spread_to(self, classes: tuple[Label, ...]) -> "ClassMoments":
        place = {label: row for row, label in enumerate(classes)}
        rows = [place[label] for label in self.classes]

        def spread(part: Floats) -> Floats:
            wide = np.zeros((len(classes), *part.shape[1:]))
            wide[rows] = part
            return wide

        return ClassMoments(classes, spread(self.counts), spread(self.sums), spread(self.squares))


class GroupCounter:
    """Deals the samples of each class in turn to groups, across batches."""

    def __init__(self) -> None:
        self._dealt: dict[Label, int] = {}

    @property
    def n_classes(self) -> int:
        """How many classes were met so far."""
        return len(self._dealt)

    @property
    def classes(self) -> tuple[Label, ...]:
        """Classes met so far, as they came."""
        return tuple(self._dealt)

    def deal(self, labels: Sequence[Label]) -> NDArray[np.int64]:
        """Return the group of each sample, shape (n_samples,)."""
        groups = np.empty(len(labels), dtype=np.int64)
        for row, label in enumerate(labels):
            dealt = self._dealt.get(label, 0)
            groups[row] = dealt % N_GROUPS
            self._dealt[label] = dealt + 1
        return groups


class Rows:
    """The rows that classes and groups have among sums: the same for all layers, so looked up once a batch."""

    def __init__(self) -> None:
        self.classes: dict[Label, int] = {}
        self._asked: tuple[Any, Any] = (None, None)
        self._found = np.zeros(0, dtype=np.int64), np.zeros(0)

    def of(self, labels: Sequence[Label], groups: NDArray[np.int64]) -> tuple[NDArray[np.int64], Floats]:
        """Return the row of each sample, and how many samples each row gets."""
        if self._asked[0] is not labels or self._asked[1] is not groups:
            places = [self.classes.setdefault(label, len(self.classes)) for label in labels]
            rows = np.array(places, dtype=np.int64) * N_GROUPS + groups
            counts = np.bincount(rows, minlength=len(self.classes) * N_GROUPS).astype(np.float64)
            self._asked, self._found = (labels, groups), (rows, counts)
        return self._found


class RunningMoments:
    """Sums up features batch by batch, in place, where they lie; several may share their rows."""

    def __init__(self, rows: Rows | None = None) -> None:
        self._rows = Rows() if rows is None else rows
        self._counts = np.zeros(0)
        self._sums = self._squares = torch.zeros(0, dtype=torch.float64)

    def add(self, features: Tensor, labels: Sequence[Label], groups: NDArray[np.int64]) -> None:
        """Add a batch; the parameters are those of `moments_of`."""
        flat = features.detach().flatten(start_dim=1)
        if flat.device.type == "mps":  # has no float64
            flat = flat.cpu()
        flat = flat.to(torch.float64, copy=True)
        rows, counts = self._rows.of(labels, groups)
        self._make_room(flat)
        cells = torch.from_numpy(rows).to(flat.device)
        self._sums.index_add_(0, cells, flat)
        self._squares.index_add_(0, cells, flat.square_().sum(dim=1))  # in place, which is much faster
        self._counts += counts

    @property
    def counted(self) -> bool:
        """Whether anything was added."""
        return bool(self._counts.any())

    def moments(self) -> ClassMoments:
        """Return the moments of what was added, the classes as they came."""
        shape = (len(self._rows.classes), N_GROUPS)
        return ClassMoments(
            tuple(self._rows.classes),
            self._counts.reshape(shape).copy(),
            self._sums.cpu().numpy().reshape(*shape, -1),
            self._squares.cpu().numpy().reshape(shape),
        )

    def _make_room(self, flat: Tensor) -> None:
        new = len(self._rows.classes) * N_GROUPS - len(self._counts)
        if new:
            self._counts = np.append(self._counts, np.zeros(new))
            self._sums = torch.cat([self._sums.to(flat.device), flat.new_zeros(new, flat.shape[1])])
            self._squares = torch.cat([self._squares.to(flat.device), flat.new_zeros(new)])


def moments_of(features: Tensor, labels: Sequence[Label], groups: NDArray[np.int64]) -> ClassMoments:
    """Sum the features of a batch by class and group.

    Parameters
    ----------
    features : Tensor of shape (n_samples, ...)
        Flattened to (n_samples, n_features).
    labels : sequence of n_samples labels
    groups : ndarray of shape (n_samples,)
        From `GroupCounter.deal`.

    Returns
    -------
    ClassMoments
    """
    running = RunningMoments()
    running.add(features, labels, groups)
    return running.moments()


def half_samples(counts: Floats, n_resamples: int, rng: np.random.Generator) -> Floats:
    """Draw half of each class's groups at random, without replacement, again and again.

    The half-sample bootstrap, an exchangeably weighted bootstrap with the weights 0 and 2 (Præstgaard and
    Wellner 1993): the spread of a statistic over half samples is that of the statistic over samples. Other
    than resampling with replacement it repeats no sample, so scatter stays free of bias.

    Parameters
    ----------
    counts : ndarray of shape (n_classes, n_groups)
        Samples a group; groups without samples are never counted as part of a half.
    n_resamples : int
    rng : numpy.random.Generator

    Returns
    -------
    ndarray of shape (1 + n_resamples, n_classes, n_groups)
        Weights 0 or 1; the first row is the whole sample.
    """
    filled = counts > 0
    order = np.where(filled, rng.random((n_resamples, *counts.shape)), np.inf)
    rank = order.argsort(axis=-1).argsort(axis=-1)
    n_filled = filled.sum(axis=-1, keepdims=True)
    half = (n_filled + rng.integers(0, 2, (n_resamples, len(counts), 1))) // 2
    drawn = ((rank < half) & filled).astype(np.float64)
    return np.concatenate([filled[None].astype(np.float64), drawn])


def scatter_share(moments: ClassMoments, weights: Floats, *, between: bool = True) -> Floats:
    """Compute the share of the variance that the classes do not explain, overall and of each class.

    With W_c the unbiased variance of class c (summed over features), W its mean over classes, and B the
    variance of the class means less what sampling adds to it (the mean of W_c / n_c), not below zero:

        overall  W / (W + B),     class c  W_c / (W + B).

    Classes weigh alike, and neither the number of classes nor that of samples a class shifts the value.

    Parameters
    ----------
    moments : ClassMoments
        Of n_classes classes.
    weights : ndarray of shape (n_draws, n_classes, N_GROUPS)
        From `half_samples`.
    between : bool
        False leaves out the division by W + B: the variances themselves.

    Returns
    -------
    ndarray of shape (n_draws, 1 + n_classes)
        NaN where a class has fewer than two samples in a draw, or nothing varies.
    """
    n_draws, n_classes, n_groups = weights.shape
    counts = (weights * moments.counts).sum(axis=-1)
    squares = (weights * moments.squares).sum(axis=-1)
    with np.errstate(divide="ignore", invalid="ignore"):
        shares = weights / counts[..., None]  # the mean of a class is its row of these times the sums of its groups
        mean_norms = _square_norms(shares.transpose(1, 0, 2), moments.sums).T
        flat_sums = moments.sums.reshape(n_classes * n_groups, -1)
        grand_norm = _square_norms(shares.reshape(n_draws, -1) / n_classes, flat_sums)
        within = np.where(counts >= 2, (squares - counts * mean_norms) / (counts - 1), np.nan)
        # Below this the difference is rounding error: the features do not vary.
        within = np.where(within < _ROUNDING * squares / counts, 0.0, within)
        overall = within.mean(axis=1)
        if between:
            scatter = (mean_norms.sum(axis=1) - n_classes * grand_norm) / (n_classes - 1)
            total = overall + np.maximum(scatter - (within / counts).mean(axis=1), 0.0)
        else:
            total = np.ones(n_draws)
        share = np.concatenate([overall[:, None], within], axis=1) / total[:, None]
    return np.where(share > 0, share, np.nan)


def _square_norms(shares: Floats, sums: Floats) -> Floats:
    """Return the square norms of the rows of ``shares @ sums``, by the shorter way.

    Parameters
    ----------
    shares : ndarray of shape (..., n_draws, n_groups)
    sums : ndarray of shape (..., n_groups, n_features)

    Returns
    -------
    ndarray of shape (..., n_draws)
    """
    if sums.shape[-2] < shares.shape[-2]:
        norms: Floats = ((shares @ (sums @ sums.swapaxes(-1, -2))) * shares).sum(axis=-1)
    else:
        norms = np.square(shares @ sums).sum(axis=-1)
    return norms


def class_means(moments: ClassMoments, weights: Floats) -> Floats:
    """Compute the mean of the features, overall (classes weigh alike) and of each class.

    Parameters
    ----------
    moments : ClassMoments
        Of n_classes classes with n_features features.
    weights : ndarray of shape (n_draws, n_classes, N_GROUPS)

    Returns
    -------
    ndarray of shape (n_draws, 1 + n_classes, n_features)
        NaN where a class has no sample in a draw.
    """
    counts = (weights * moments.counts).sum(axis=-1)
    with np.errstate(invalid="ignore"):
        means = np.einsum("bcg,cgd->bcd", weights, moments.sums) / counts[..., None]
    return np.concatenate([means.mean(axis=1, keepdims=True), means], axis=1)
