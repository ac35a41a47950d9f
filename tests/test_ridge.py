"""kernel_ridge: leaving out in closed form against refitting, one ridge for all sets, and kernels at the edge."""

import numpy as np
import pytest
from sklearn.kernel_ridge import KernelRidge

from retrainscope.ridge import RIDGES, kernel_ridge


def kernel_of(n: int, rank: int, seed: int, scale: float = 1.0) -> np.ndarray:
    """Make a kernel of this rank."""
    rows = np.random.default_rng(seed).normal(size=(n, rank)) * scale
    return rows @ rows.T


def refitted(
    kernel: np.ndarray, targets: np.ndarray, alpha: float, groups: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Fit scikit-learn's regression anew without each group; return the errors and hits on the samples left out."""
    groups = np.arange(len(targets)) if groups is None else groups
    n_classes = targets.max() + 1
    truth = np.eye(n_classes)[targets] - 1 / n_classes
    predicted = np.empty(truth.shape)
    for group in np.unique(groups):
        rows, others = np.flatnonzero(groups == group), np.flatnonzero(groups != group)
        model = KernelRidge(alpha=alpha, kernel="precomputed")
        model.fit(kernel[np.ix_(others, others)], truth[others])
        predicted[rows] = model.predict(kernel[np.ix_(rows, others)])
    return np.square(truth - predicted).sum(axis=1), predicted.argmax(axis=1) == targets


@pytest.mark.parametrize("n_classes", [2, 3])
@pytest.mark.parametrize("ridge", [1e-4, 0.1, 10.0])
def test_leaving_out_equals_refitting(n_classes, ridge):
    """The closed form gives the errors and hits of as many regressions as there are samples, fitted without them."""
    targets = np.arange(24) % n_classes
    base, kernels = kernel_of(24, 3, 0) + 1, {"a": kernel_of(24, 5, 1), "b": kernel_of(24, 40, 2, scale=0.3)}
    sets = [(), ("a",), ("b",), ("a", "b")]
    found = kernel_ridge(kernels, [base] * len(sets), targets, sets, ridges=[ridge])
    unit = np.trace(base + kernels["a"] + kernels["b"]) / 24  # of all kernels, whichever are in the set
    for place, names in enumerate(sets):
        errors, hits = refitted(base + sum(kernels[name] for name in names), targets, ridge * unit)
        np.testing.assert_allclose(found.errors[place], errors, rtol=1e-6)
        np.testing.assert_array_equal(found.hits[place], hits)
    assert found.ridge == ridge


@pytest.mark.parametrize("ridge", [1e-4, 0.1, 10.0])
def test_leaving_groups_out_equals_refitting(ridge):
    """Samples of a group are predicted as by a regression that was fitted without all of it, whatever its size."""
    rng = np.random.default_rng(3)
    targets, groups = np.arange(30) % 3, rng.permutation(np.repeat(np.arange(12), [1, 1, 1, 1, 1, 2, 2, 2, 4, 4, 4, 7]))
    base, kernels = kernel_of(30, 3, 0) + 1, {"a": kernel_of(30, 50, 1)}
    found = kernel_ridge(kernels, [base, base], targets, [(), ("a",)], groups=groups, ridges=[ridge])
    unit = np.trace(base + kernels["a"]) / 30
    for place, kernel in enumerate((base, base + kernels["a"])):
        errors, hits = refitted(kernel, targets, ridge * unit, groups)
        np.testing.assert_allclose(found.errors[place], errors, rtol=1e-6)
        np.testing.assert_array_equal(found.hits[place], hits)


def test_one_ridge_for_all_sets():
    """The ridge is the one by which the best set has the smallest mean error, also for the sets it is worse for."""
    targets = np.arange(30) % 2
    signal = np.where(targets == 0, 1.0, -1.0)[:, None]
    good = signal @ signal.T
    kernels = {"good": good + kernel_of(30, 5, 1, scale=0.2), "noise": kernel_of(30, 60, 2)}
    base, sets = np.ones((30, 30)), [(), ("good",), ("noise",)]
    found = kernel_ridge(kernels, [base] * len(sets), targets, sets)
    each = [kernel_ridge(kernels, [base] * len(sets), targets, sets, ridges=[ridge]) for ridge in RIDGES]
    by_ridge = np.array([one.errors.mean(axis=1) for one in each])
    best = int(by_ridge.min(axis=1).argmin())
    assert found.ridge == RIDGES[best]
    np.testing.assert_array_equal(found.errors, each[best].errors)
    assert by_ridge[:, 2].argmin() != best  # the noise alone would have asked for another


def test_no_kernels_but_the_base():
    """Without any other kernel the head alone can be regressed on."""
    targets = np.arange(12) % 2
    base = kernel_of(12, 2, 0) + 1
    found = kernel_ridge({}, [base], targets, [()], ridges=[0.1])
    errors, _ = refitted(base, targets, 0.1 * np.trace(base) / 12)
    np.testing.assert_allclose(found.errors[0], errors, rtol=1e-6)


def test_a_constant_kernel_predicts_the_mean_of_the_others():
    """With the constant alone and next to no ridge, two equal classes are each predicted from one more of the other.

    Of 10 and 10 samples, what is left has 9 and 10: the mean of +-1/2 is 1/38 away from 0, to the wrong side.
    """
    found = kernel_ridge({}, [np.ones((20, 20))], np.arange(20) % 2, [()], ridges=[1e-6])
    np.testing.assert_allclose(found.errors, 2 * (1 / 2 + 1 / 38) ** 2, rtol=1e-5)
    assert not found.hits.any()


@pytest.mark.parametrize(
    "kernel",
    [
        np.zeros((20, 20)),
        np.diag([1e12] + [0.0] * 19),  # a sample that nothing is like: its leverage is all but 1
        np.eye(20) * 1e9,
        kernel_of(20, 1, 0, scale=1e8),
        kernel_of(20, 30, 0).astype(np.float32).astype(np.float64) - 1e-6 * np.eye(20),
    ],
    ids=["zero", "one sample", "all alike", "rank one", "rounded"],
)
@pytest.mark.parametrize("ridge", [min(RIDGES), max(RIDGES)])
def test_kernels_at_the_edge(kernel, ridge):
    """Degenerate kernels, also of a leverage near 1, give finite errors, those of refitting."""
    targets = np.arange(20) % 2
    base = np.ones((20, 20))
    with np.errstate(all="raise"):
        found = kernel_ridge({"odd": kernel}, [base] * 2, targets, [(), ("odd",)], ridges=[ridge])
    assert np.isfinite(found.errors).all()
    errors, _ = refitted(base + kernel, targets, ridge * np.trace(base + kernel) / 20)
    np.testing.assert_allclose(found.errors[1], errors, rtol=1e-3, atol=1e-5)


def test_a_layer_that_tells_the_classes_is_found():
    """A kernel in which samples of one class are alike has far less error than the constant or noise."""
    targets = np.arange(40) % 2
    same = (targets[:, None] == targets).astype(float)
    kernels, sets = {"same": same, "noise": np.eye(40)}, [(), ("same",), ("noise",)]
    found = kernel_ridge(kernels, [np.ones((40, 40))] * len(sets), targets, sets)
    constant, told, noise = found.errors.mean(axis=1)
    assert told < 0.01
    assert min(constant, noise) > 0.45
    assert found.hits[1].all()
