"""The published measures of features and labels: known values, and each computed in another way."""

import numpy as np
import pytest
from scipy.optimize import minimize
from scipy.stats import multivariate_normal
from sklearn.covariance import ledoit_wolf
from sklearn.linear_model import LinearRegression

from retrainscope.criteria import h_score, hidden_variability, log_me, trans_rate
from retrainscope.criteria.transferability import class_evidences, class_explained, class_rates, class_variabilities
from retrainscope.exceptions import InvalidDataError, NonFiniteError

i = np.arange(12)
A = np.stack([np.sin(i), np.cos(0.7 * i), 0.5 * (i % 3) + 0.1 * np.sin(3 * i)], axis=1), i % 3
_random = np.random.RandomState(0)
_labels = np.arange(60) % 3
_centres = _random.randn(3, 8)
B = _centres[_labels] + 0.8 * _random.randn(60, 8), _labels

MEASURES = [log_me, h_score, trans_rate, hidden_variability]
BY_CLASS = [class_evidences, class_explained, class_rates, class_variabilities]

every_measure = pytest.mark.parametrize("measure", MEASURES, ids=lambda measure: measure.__name__)
every_by_class = pytest.mark.parametrize("by_class", BY_CLASS, ids=lambda by_class: by_class.__name__)


def wide(n_features: int, *, n: int = 40, n_classes: int = 4, seed: int = 3) -> tuple[np.ndarray, np.ndarray]:
    """Return classes of unequal size with features of unequal scale."""
    rng = np.random.default_rng(seed)
    labels = np.sort(rng.integers(0, n_classes, n))
    labels[:n_classes] = np.arange(n_classes)
    scales = np.geomspace(1, 30, n_features)
    return (
        rng.standard_normal((n_classes, n_features))[labels] + rng.standard_normal((n, n_features))
    ) * scales, labels


# Narrow and wide, with the rank below both sides
SHAPES = {"A": A, "B": B, "wide": wide(200), "square": wide(40), "low rank": (wide(5)[0] @ np.ones((5, 9)), wide(5)[1])}
every_shape = pytest.mark.parametrize("data", SHAPES.values(), ids=SHAPES)


@pytest.mark.parametrize(
    ("measure", "data", "expected", "tolerance"),
    [
        (log_me, A, -0.75060, 1e-5),
        (log_me, B, -0.26288529, 1e-8),
        (lambda *data: h_score(*data, regularised=False), A, 0.9729150072, 1e-10),
        (h_score, A, 0.4381914927, 1e-10),
        (lambda *data: h_score(*data, regularised=False), B, 1.72437573, 1e-8),
        (h_score, B, 1.68709693, 1e-8),
        (trans_rate, A, 1.0454990583, 1e-10),
        (trans_rate, B, 1.23331072, 1e-8),
        (hidden_variability, B, 0.12363813, 1e-8),
    ],
)
def test_values_of_the_released_codes(measure, data, expected, tolerance):
    """On two small sets the values are those of the codes that the authors released."""
    np.testing.assert_allclose(measure(*data), expected, rtol=0, atol=tolerance)


# LogME


def best_evidence(features: np.ndarray, targets: np.ndarray) -> float:
    """Maximise the marginal likelihood of a linear model over both precisions, by the density of the targets."""
    n = len(targets)

    def negative(logs):
        alpha, beta = np.exp(logs)
        covariance = np.eye(n) / beta + features @ features.T / alpha
        return -multivariate_normal(np.zeros(n), covariance).logpdf(targets) / n

    return -min(
        (minimize(negative, start, method="Nelder-Mead") for start in ([0, 0], [3, 3])), key=lambda r: r.fun
    ).fun


@pytest.mark.parametrize("data", [A, B, wide(60, n=30, n_classes=3)], ids=["A", "B", "wide"])
def test_log_me_is_the_greatest_evidence(data):
    """Numerical maximisation of the marginal likelihood, from a normal density, finds the same for each class.

    The fixed point is the maximum but for its stopping rule and its guards.
    """
    features, labels = data
    expected = [best_evidence(features, (labels == c).astype(float)) for c in np.unique(labels)]
    np.testing.assert_allclose(class_evidences(*data), expected, atol=2e-3)
    assert (class_evidences(*data) <= np.array(expected) + 1e-6).all()


def test_log_me_of_more_features_than_samples():
    """With 60 samples and 200 features the term of the directions without features counts: -0.268, and not 7.29.

    Features of zeros add nothing but that term: the density of the targets, and so the evidence, is the same.
    """
    features, labels = B
    padded = np.concatenate([features, np.zeros((60, 192))], axis=1)
    np.testing.assert_allclose(class_evidences(padded, labels), class_evidences(features, labels), rtol=1e-9)


def test_log_me_does_not_depend_on_the_scale():
    """Features a few times larger or smaller have the same evidence, but for the guard."""
    np.testing.assert_allclose([log_me(4 * B[0], B[1]), log_me(B[0] / 4, B[1])], log_me(*B), atol=1e-4)


def test_log_me_of_zeros_is_nan():
    """Without features there is no evidence to maximise."""
    assert np.isnan(log_me(np.zeros((6, 2)), [0, 1] * 3))


# H-score


@every_shape
def test_h_score_by_pseudo_inverse(data):
    """The score is the trace that its definition says, with scikit-learn's covariance."""
    features, labels = data
    means = np.stack([features[labels == label].mean(axis=0) for label in labels])
    between = np.cov(means, rowvar=False)
    shrunk, shrinkage = ledoit_wolf(features)
    expected = np.trace(np.linalg.pinv(shrunk, hermitian=True) @ between) * (1 - shrinkage)
    np.testing.assert_allclose(h_score(features, labels), expected, rtol=1e-8)
    plain = np.trace(np.linalg.pinv(np.cov(features, rowvar=False), rcond=1e-10, hermitian=True) @ between)
    np.testing.assert_allclose(h_score(features, labels, regularised=False), plain, rtol=1e-6)


@pytest.mark.parametrize("data", [A, B, wide(20)], ids=["A", "B", "unequal"])
def test_what_is_explained_is_r_squared(data):
    """Without shrinkage a class's share is the R squared of the least-squares fit to being of that class."""
    features, labels = data
    expected = [
        LinearRegression().fit(features, labels == label).score(features, labels == label)
        for label in np.unique(labels)
    ]
    np.testing.assert_allclose(class_explained(features, labels, regularised=False), expected, rtol=1e-9)


def test_h_score_of_random_features():
    """With more random features than samples the first form finds all explained, the regularised one hardly any."""
    features, labels = np.random.default_rng(0).standard_normal((60, 80)), np.arange(60) % 3
    np.testing.assert_allclose(h_score(features, labels, regularised=False), 2.0, rtol=1e-9)
    assert h_score(features, labels) < 0.1


@every_shape
def test_shares_are_shares(data):
    """No share lies outside 0 to 1, whatever the shape."""
    for regularised in (True, False):
        shares = class_explained(*data, regularised=regularised)
        assert (shares >= 0).all()
        assert (shares <= 1 + 1e-9).all()


# TransRate


@every_shape
def test_trans_rate_by_the_other_gram_matrix(data):
    """The code lengths are the same from the samples' Gram matrix as from the features', whichever is smaller."""
    features, labels = data
    centred = features - features.mean(axis=0)

    def rate(rows, side):
        n = len(rows)
        gram = rows @ rows.T if side == "samples" else rows.T @ rows
        return np.linalg.slogdet(np.eye(len(gram)) + gram / (n * 1e-4))[1] / 2

    for side in ("samples", "features"):
        saved = [rate(centred, side) - rate(centred[labels == c], side) for c in np.unique(labels)]
        np.testing.assert_allclose(class_rates(features, labels), saved, rtol=1e-6)
        np.testing.assert_allclose(trans_rate(features, labels), np.mean(saved), rtol=1e-6)


def test_trans_rate_by_hand():
    """Two classes of one point each, 2 apart: the whole has variance 1, and so has each class around the centre."""
    features = np.array([[-1.0], [-1.0], [1.0], [1.0]])
    np.testing.assert_allclose(class_rates(features, [0, 0, 1, 1]), [0.0, 0.0], atol=1e-12)
    # With a third at the centre: R = ln(1 + variance / eps) / 2 with the variance 2/3, 1, 0 and 1.
    features = np.array([[-1.0], [-1.0], [0.0], [0.0], [1.0], [1.0]])
    rates = [np.log(1 + variance / 0.5) / 2 for variance in (2 / 3, 1, 0, 1)]
    np.testing.assert_allclose(class_rates(features, [0, 0, 1, 1, 2, 2], eps=0.5), rates[0] - np.array(rates[1:]))


# Hidden-state variability


@every_shape
def test_variability_by_pseudo_inverse(data):
    """The ratio is the trace that its definition says, where a pseudo-inverse in double precision can be had."""
    features, labels = data
    classes = np.unique(labels)
    means = np.stack([features[labels == c].mean(axis=0) for c in classes])
    apart = means - means.mean(axis=0)
    inverse = np.linalg.pinv(apart.T @ apart / len(classes), rcond=1e-10, hermitian=True)
    scatters = [np.cov(features[labels == c], rowvar=False, ddof=0) for c in classes]
    if data is SHAPES["low rank"]:  # along one axis only
        assert np.linalg.matrix_rank(apart) == 1
    expected = [np.trace(scatter @ inverse) / len(classes) for scatter in scatters]
    np.testing.assert_allclose(class_variabilities(features, labels), expected, rtol=1e-6)
    np.testing.assert_allclose(hidden_variability(features, labels), np.mean(expected), rtol=1e-6)


def test_variability_by_hand():
    """Two classes at -3 and 3 that vary by 4: 4 / 9 over two classes; along an axis that parts no means, nothing."""
    features = np.array([[-5.0, 9.0], [-1.0, -9.0], [1.0, 9.0], [5.0, -9.0]])
    np.testing.assert_allclose(class_variabilities(features, [0, 0, 1, 1]), [2 / 9, 2 / 9], rtol=1e-12)


def test_variability_is_never_negative():
    """Features in single precision far from 0, where a pseudo-inverse of all features fails, still give a ratio."""
    features, labels = wide(300, n=90)
    assert hidden_variability((features + 1e4).astype(np.float32), labels) >= 0


def test_classes_with_one_mean_have_no_ratio():
    """Where the class means coincide there is nothing to divide by."""
    features = np.array([[-1.0], [1.0], [-1.0], [1.0]])
    assert np.isnan(hidden_variability(features, [0, 0, 1, 1]))


# All of them


@every_measure
def test_labels_are_names(measure):
    """Labels are mapped to 0, 1, 2 first: other numbers and strings give the same."""
    expected = measure(*B)
    assert measure(B[0], B[1] * 10 + 7) == expected
    assert measure(B[0], np.array(["a", "b", "c"])[B[1]]) == expected


@every_measure
def test_order_of_the_samples_does_not_matter(measure):
    """Shuffled samples give the same value."""
    order = np.random.default_rng(0).permutation(60)
    np.testing.assert_allclose(measure(B[0][order], B[1][order]), measure(*B), rtol=1e-9)


@every_measure
def test_rotation_does_not_matter(measure):
    """Features in other orthogonal axes give the same value."""
    axes = np.linalg.qr(np.random.default_rng(0).standard_normal((8, 8)))[0]
    np.testing.assert_allclose(measure(B[0] @ axes, B[1]), measure(*B), rtol=1e-9)


@pytest.mark.parametrize(
    ("measure", "by_class"),
    [(log_me, class_evidences), (trans_rate, class_rates), (hidden_variability, class_variabilities)],
)
def test_measures_are_means_over_classes(measure, by_class):
    """The published number is the mean over the classes."""
    np.testing.assert_allclose(measure(*wide(20)), by_class(*wide(20)).mean(), rtol=1e-12)


def test_h_score_is_the_mean_over_equal_classes():
    """With classes of equal size the mean of what is explained is the score over n_classes - 1."""
    np.testing.assert_allclose(class_explained(*B).mean(), h_score(*B) * 59 / 60 / 2, rtol=1e-12)


@pytest.mark.parametrize("measure", [h_score, hidden_variability, log_me], ids=lambda measure: measure.__name__)
def test_features_that_do_not_vary(measure):
    """Features that are the same for all samples say nothing: NaN, or the evidence of the mean alone; no warning."""
    value = measure(np.full((6, 4), 0.1), [0, 1] * 3)
    assert np.isnan(value) or measure is log_me


@every_measure
@pytest.mark.parametrize(
    ("features", "labels", "message"),
    [
        (np.zeros(6), [0, 1] * 3, r"must have the shape \(n_samples, n_features\).*Got \(6,\) and \(6,\)"),
        (np.zeros((6, 2)), [0, 1], r"Got \(6, 2\) and \(2,\)"),
        (np.zeros((6, 2)), [1] * 6, "at least two classes. Got 1"),
    ],
)
def test_what_does_not_fit_is_refused(measure, features, labels, message):
    """Shapes that do not fit, and a single class, are refused."""
    with pytest.raises(InvalidDataError, match=message):
        measure(features, labels)


@every_by_class
def test_infinite_features_are_refused(by_class):
    """NaN and infinity are refused."""
    with pytest.raises(NonFiniteError, match="features have NaN or infinity"):
        by_class(np.full((4, 2), np.inf), [0, 1, 0, 1])
