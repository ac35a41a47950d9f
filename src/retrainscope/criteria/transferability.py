"""How well labels can be told from features, by measures published for choosing a pretrained model.

Each measure is a mean over the classes, so each comes in two functions: the published number (`log_me`, `h_score`,
`trans_rate`, `hidden_variability`), and its share of every class (`class_evidences` and the like).
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from sklearn.covariance import ledoit_wolf_shrinkage

from retrainscope.exceptions import InvalidDataError, NonFiniteError

__all__ = [
    "class_evidences",
    "class_explained",
    "class_rates",
    "class_variabilities",
    "h_score",
    "hidden_variability",
    "log_me",
    "trans_rate",
]

_MOST_STEPS, _TOLERANCE, _GUARD = 11, 1e-3, 1e-5  # of LogME, as its authors released it
_EPS = float(np.finfo(np.float64).eps)
_ROUNDING = 1e-12

Floats = NDArray[np.float64]


def log_me(features: ArrayLike, labels: ArrayLike) -> float:
    """Compute LogME, the logarithm of the maximum evidence of linear models from the features to the labels.

    Parameters
    ----------
    features : array_like of shape (n_samples, n_features)
    labels : array_like of shape (n_samples,)
        Of at least two classes.

    Returns
    -------
    float
        In nats per sample, of any sign; higher is better. NaN if all features are zero.

    Raises
    ------
    InvalidDataError
        If the shapes do not fit, there is one class only, or a feature is not finite.

    Notes
    -----
    For each class, t = 1 for its samples and 0 for the others is taken to be the features times weights ~ N(0, 1/alpha)
    plus noise ~ N(0, 1/beta). The evidence p(t | features, alpha, beta) is maximised over both by MacKay's fixed point,
    its logarithm divided by n_samples and averaged over the classes. Neither features nor labels are centred. The
    evidence itself does not depend on the scale of the features. The guard of 1e-5 against a division by zero does:
    bring features whose lengths are far from 1, such as in the thousands, to about that first.

    References
    ----------
    K. You, Y. Liu, J. Wang, M. Long, "LogME: practical assessment of pre-trained models for transfer learning", ICML
    2021, arXiv 2102.11005.

    Examples
    --------
    >>> import numpy as np
    >>> labels = np.arange(60) % 3
    >>> noise = np.random.default_rng(0).standard_normal((60, 3))
    >>> telling = noise + 3 * np.eye(3)[labels]
    >>> log_me(telling, labels) > log_me(noise, labels)
    True
    """
    return float(class_evidences(features, labels).mean())


def class_evidences(features: ArrayLike, labels: ArrayLike) -> Floats:
    """Compute the evidence of each class against the others; `log_me` is their mean.

    Parameters
    ----------
    features : array_like of shape (n_samples, n_features)
    labels : array_like of shape (n_samples,)

    Returns
    -------
    ndarray of shape (n_classes,)
        In nats per sample, classes in sorted order.
    """
    data = _Labelled.of(features, labels)
    n, n_features = data.features.shape
    strengths, found = _spectrum(data.features, data.targets)
    if not len(strengths):
        return np.full(len(data.counts), np.nan)
    rank, strengths, squares = len(strengths), strengths[:, None], np.square(found)
    left = np.maximum(data.counts - squares.sum(axis=0), 0.0)  # of the targets, outside of what the features span
    alpha, beta = np.ones_like(left), np.ones_like(left)
    weight, residual = np.zeros_like(left), np.zeros_like(left)
    moving = np.ones(len(left), dtype=bool)
    for _ in range(_MOST_STEPS):
        ratio = alpha / beta
        effective = (strengths / (strengths + ratio)).sum(axis=0)
        weight = np.where(moving, (strengths * squares / np.square(ratio + strengths)).sum(axis=0), weight)
        residual = np.where(moving, (squares / np.square(1 + strengths / ratio)).sum(axis=0) + left, residual)
        alpha = np.where(moving, effective / (weight + _GUARD), alpha)
        beta = np.where(moving, (n - effective) / (residual + _GUARD), beta)
        moving &= np.abs(alpha / beta - ratio) > _TOLERANCE * ratio
        if not moving.any():
            break
    # Directions without features count with ln alpha: one released version forgets them.
    spread = np.log(alpha + beta * strengths).sum(axis=0) + (n_features - rank) * np.log(alpha)
    evidence: Floats = (
        n_features * np.log(alpha)
        + n * np.log(beta)
        - spread
        - beta * residual
        - alpha * weight
        - n * np.log(2 * np.pi)
    ) / (2 * n)
    return evidence


def h_score(features: ArrayLike, labels: ArrayLike, *, regularised: bool = True) -> float:
    """Compute the H-score, the variance between the classes in units of the variance of the features.

    Parameters
    ----------
    features : array_like of shape (n_samples, n_features)
    labels : array_like of shape (n_samples,)
        Of at least two classes.
    regularised : bool
        Shrink the covariance (Ledoit and Wolf). False gives the first form, which is n_classes - 1 for any
        features as soon as there are as many of them as samples.

    Returns
    -------
    float
        From 0 to n_classes - 1 (times n_samples / (n_samples - 1) if regularised), without unit; higher is better. NaN
        if the features do not vary.

    Raises
    ------
    InvalidDataError
        If the shapes do not fit, there is one class only, or a feature is not finite.

    Notes
    -----
    tr( pinv(cov F) cov(G) ), where G has each sample's class mean in the place of its features. Regularised, with
    the shrinkage a of Ledoit and Wolf and their covariance S, tr( pinv(S) (1 - a) cov(G) ).

    References
    ----------
    Y. Bao et al., "An information-theoretic approach to transferability in task transfer learning", ICIP 2019.
    S. Ibrahim, N. Ponomareva, R. Mazumder, "Newer is not always better: rethinking transferability metrics, their
    peculiarities, stability and performance", 2021, arXiv 2110.06893.

    Examples
    --------
    >>> import numpy as np
    >>> labels = np.arange(60) % 3
    >>> random = np.random.default_rng(0).standard_normal((60, 80))
    >>> print(round(h_score(random, labels, regularised=False), 6), h_score(random, labels) < 0.1)
    2.0 True
    """
    explained = class_explained(features, labels, regularised=regularised)
    counts = np.unique(np.asarray(labels), return_counts=True)[1]
    n = counts.sum()
    score = float((explained * (1 - counts / n)).sum())
    return score * n / (n - 1) if regularised else score


def class_explained(features: ArrayLike, labels: ArrayLike, *, regularised: bool = True) -> Floats:
    """Compute for each class the share that the features explain of the variance of being of this class.

    It is the R squared of the least-squares fit to 1 for the class and 0 for the others. The sum of its products with
    the share of the other classes' samples is `h_score`, which, regularised, is larger by n / (n - 1); with classes of
    equal size its mean is the score over n_classes - 1.

    Parameters
    ----------
    features : array_like of shape (n_samples, n_features)
    labels : array_like of shape (n_samples,)
    regularised : bool

    Returns
    -------
    ndarray of shape (n_classes,)
        From 0 to 1, classes in sorted order.
    """
    data = _Labelled.of(features, labels)
    centred = _centred(data.features)
    if centred is None:
        return np.full(len(data.counts), np.nan)
    n, n_features = centred.shape
    strengths, found = _spectrum(centred, data.targets)
    variances = strengths / n
    shrinkage = float(ledoit_wolf_shrinkage(centred, assume_centered=True)) if regularised else 0.0
    shrunk = (1 - shrinkage) * variances + shrinkage * variances.sum() / n_features
    # The class means along the principal axes, squared, times the share of the samples that they stand for.
    between = np.square(found) * strengths[:, None] / (data.counts * n)
    explained: Floats = (1 - shrinkage) * (between / shrunk[:, None]).sum(axis=0) / (1 - data.counts / n)
    return explained


def trans_rate(features: ArrayLike, labels: ArrayLike, *, eps: float = 1e-4) -> float:
    """Compute TransRate, what knowing the class saves of the code for the features.

    Parameters
    ----------
    features : array_like of shape (n_samples, n_features)
    labels : array_like of shape (n_samples,)
        Of at least two classes.
    eps : float
        The squared error that the code may have.

    Returns
    -------
    float
        In nats per sample; higher is better. It depends on the scale of the features.

    Raises
    ------
    InvalidDataError
        If the shapes do not fit, there is one class only, or a feature is not finite.

    Notes
    -----
    R(F) minus the mean over classes of R(F of the class), with R(F) = logdet(I + F'F / (n eps)) / 2 for the n rows of
    F, and F centred over all samples.

    References
    ----------
    L.-K. Huang et al., "Frustratingly easy transferability estimation", ICML 2022, arXiv 2106.09362.

    Examples
    --------
    >>> import numpy as np
    >>> labels = np.arange(60) % 3
    >>> noise = np.random.default_rng(0).standard_normal((60, 3))
    >>> trans_rate(noise + 3 * np.eye(3)[labels], labels) > trans_rate(noise, labels)
    True
    """
    return float(class_rates(features, labels, eps=eps).mean())


def class_rates(features: ArrayLike, labels: ArrayLike, *, eps: float = 1e-4) -> Floats:
    """Compute what the code for each class is shorter than that for all; `trans_rate` is the mean.

    Parameters
    ----------
    features : array_like of shape (n_samples, n_features)
    labels : array_like of shape (n_samples,)
    eps : float

    Returns
    -------
    ndarray of shape (n_classes,)
        In nats per sample, classes in sorted order.
    """
    data = _Labelled.of(features, labels)
    centred = data.features - data.features.mean(axis=0)

    def rate(rows: Floats) -> float:
        gram = _smaller_gram(rows) / (len(rows) * eps)
        return float(np.linalg.slogdet(np.eye(len(gram)) + gram).logabsdet) / 2

    whole = rate(centred)
    return np.array([whole - rate(centred[rows]) for rows in data.targets.T > 0])


def hidden_variability(features: ArrayLike, labels: ArrayLike) -> float:
    """Compute the hidden-state variability ratio, the scatter within classes in units of that between them.

    Parameters
    ----------
    features : array_like of shape (n_samples, n_features)
    labels : array_like of shape (n_samples,)
        Of at least two classes.

    Returns
    -------
    float
        From 0 upwards, without unit; higher is worse. NaN if the class means do not differ.

    Raises
    ------
    InvalidDataError
        If the shapes do not fit, there is one class only, or a feature is not finite.

    Notes
    -----
    tr( S_w pinv(S_b) ) / n_classes, with the covariance S_w within classes and that of the class means, S_b, in which
    classes weigh alike. It is taken along the n_classes - 1 axes that part the means, from their singular value
    decomposition: a pseudo-inverse of S_b with all features, whose rank rounding hides, can turn out negative.

    References
    ----------
    S. Xie et al., "Hidden state variability of pretrained language models can guide computation reduction for transfer
    learning", Findings of EMNLP 2022, arXiv 2210.10041.

    Examples
    --------
    >>> import numpy as np
    >>> labels = np.arange(60) % 3
    >>> noise = np.random.default_rng(0).standard_normal((60, 3))
    >>> hidden_variability(noise + 3 * np.eye(3)[labels], labels) < hidden_variability(noise, labels)
    True
    """
    return float(class_variabilities(features, labels).mean())


def class_variabilities(features: ArrayLike, labels: ArrayLike) -> Floats:
    """Compute the scatter of each class in units of that between classes; `hidden_variability` is the mean.

    Parameters
    ----------
    features : array_like of shape (n_samples, n_features)
    labels : array_like of shape (n_samples,)

    Returns
    -------
    ndarray of shape (n_classes,)
        Classes in sorted order.
    """
    data = _Labelled.of(features, labels)
    n_classes = len(data.counts)
    centred = _centred(data.features)
    if centred is None:
        return np.full(n_classes, np.nan)
    means = data.targets.T @ centred / data.counts[:, None]
    apart = means - means.mean(axis=0)
    _, singular, axes = np.linalg.svd(apart, full_matrices=False)
    axes, singular = axes[: n_classes - 1], singular[: n_classes - 1]
    real = singular > max(apart.shape) * _EPS * max(singular[0], np.abs(means).max())
    if not real.any():
        return np.full(n_classes, np.nan)
    within = (centred - data.targets @ means) @ (axes[real] / singular[real, None]).T
    # S_b has the eigenvalues singular ** 2 / n_classes, and its n_classes cancels the one that divides.
    ratios: Floats = data.targets.T @ np.square(within).sum(axis=1) / data.counts
    return ratios


@dataclass(frozen=True)
class _Labelled:
    """Features with their labels as columns of 0 and 1, and the samples of each class."""

    features: Floats
    targets: Floats
    counts: Floats

    @classmethod
    def of(cls, features: ArrayLike, labels: ArrayLike) -> "_Labelled":
        values, names = np.asarray(features, dtype=np.float64), np.asarray(labels)
        if values.ndim != 2 or names.shape != values.shape[:1]:
            raise InvalidDataError(
                "The features must have the shape (n_samples, n_features) and the labels (n_samples,). Got "
                f"{values.shape} and {names.shape}."
            )
        if not np.isfinite(values).all():
            raise NonFiniteError("The features have NaN or infinity. Remove or mend those samples.")
        classes, places = np.unique(names, return_inverse=True)
        if len(classes) < 2:
            raise InvalidDataError(f"The labels must be of at least two classes. Got {len(classes)}.")
        targets = np.eye(len(classes))[places]
        return cls(values, targets, targets.sum(axis=0))


def _centred(features: Floats) -> Floats | None:
    """Subtract the mean; None if what is left is no more than rounding."""
    centred: Floats = features - features.mean(axis=0)
    return centred if np.square(centred).sum() > _ROUNDING * np.square(features).sum() else None


def _smaller_gram(features: Floats) -> Floats:
    """Return F'F or FF', whichever is smaller: both have the same eigenvalues but for zeros."""
    n, n_features = features.shape
    gram: Floats = features.T @ features if n_features < n else features @ features.T
    return gram


def _spectrum(features: Floats, targets: Floats) -> tuple[Floats, Floats]:
    """Return the squared singular values above rounding, (rank,), and the targets along the left ones, (rank, k).

    By the eigenvalues of the smaller Gram matrix, several times quicker than a singular value decomposition. What it
    loses, singular values below 1e-7 of the largest, float32 features do not have either.
    """
    squares, vectors = np.linalg.eigh(_smaller_gram(features))
    real = squares > max(features.shape) * _EPS * squares[-1]
    squares, vectors = squares[real], vectors[:, real]
    if features.shape[1] < len(features):
        return squares, vectors.T @ (features.T @ targets) / np.sqrt(squares)[:, None]
    return squares, vectors.T @ targets
