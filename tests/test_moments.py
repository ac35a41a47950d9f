"""Running moments by class: against numpy, against the formula, and against simulation."""

import itertools
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from retrainscope.moments import (
    N_GROUPS,
    ClassMoments,
    GroupCounter,
    RunningMoments,
    class_means,
    half_samples,
    moments_of,
    scatter_share,
)


def moments(features, labels, counter=None):
    """Take the moments of one set of samples."""
    groups = (counter or GroupCounter()).deal(labels)
    return moments_of(torch.as_tensor(features), labels, groups)


def parts_of(found):
    """Return what a value consists of, comparable with ``==``."""
    return found.classes, found.counts.tolist(), found.sums.tolist(), found.squares.tolist()


def whole(found):
    """Return the weights of the whole sample alone."""
    return half_samples(found.counts, 0, np.random.default_rng(0))


def shares_of(features, labels, **options):
    """Return the share overall and of each class for the whole sample."""
    found = moments(features, labels)
    return scatter_share(found, whole(found), **options)[0]


def blobs(rng, *, n_classes=4, n_samples=30, n_features=5, spread=1.0, distance=1.0):
    """Draw samples of classes whose means are drawn as well."""
    means = distance * rng.standard_normal((n_classes, n_features))
    labels = np.repeat(np.arange(n_classes), n_samples)
    return means[labels] + spread * rng.standard_normal((len(labels), n_features)), tuple(labels.tolist())


# --- ClassMoments


def test_sums_are_those_of_numpy():
    """Counts, sums and sums of squares of each class and group are those that numpy finds."""
    rng = np.random.default_rng(0)
    features = rng.standard_normal((57, 4))
    labels = tuple(rng.choice(["b", "a", "c"], 57).tolist())
    groups = GroupCounter().deal(labels)
    found = moments_of(torch.from_numpy(features), labels, groups)
    assert found.classes == tuple(dict.fromkeys(labels))
    for row, label in enumerate(found.classes):
        for group in range(N_GROUPS):
            here = features[(np.array(labels) == label) & (groups == group)]
            assert found.counts[row, group] == len(here)
            np.testing.assert_allclose(found.sums[row, group], here.sum(axis=0), atol=1e-12)
            np.testing.assert_allclose(found.squares[row, group], np.square(here).sum(), atol=1e-12)
    assert found.class_counts.tolist() == [labels.count(label) for label in found.classes]


def test_sums_are_exact_to_double_precision():
    """Features of single precision are summed in double precision."""
    features = np.full((1000, 1), 1e4 + 1 / 256, dtype=np.float32)
    found = moments(features, ("a",) * 1000)
    assert found.sums.dtype == found.squares.dtype == found.counts.dtype == np.float64
    assert found.sums.sum() == 1000 * float(features[0, 0])
    assert found.squares.sum() == pytest.approx(1000 * float(features[0, 0]) ** 2, rel=1e-14)


def test_features_of_any_shape_are_flattened():
    """The features of a sample may have any shape."""
    features = torch.arange(24.0).reshape(2, 3, 4)
    found = moments(features, ("a", "b"))
    assert found.sums.shape == (2, N_GROUPS, 12)
    assert found.sums[1, 0].tolist() == features[1].flatten().tolist()


def test_features_carry_no_graph():
    """Features that are part of a graph can be summed."""
    assert moments(torch.ones(2, 3, requires_grad=True) * 2, ("a", "a")).sums.sum() == 12


def test_features_of_a_device_without_doubles_are_summed_elsewhere():
    """Features on a device that has no double precision are brought to the CPU first."""

    class OnMps:
        device = SimpleNamespace(type="mps")

        def detach(self):
            return self

        def flatten(self, start_dim):
            return self

        def cpu(self):
            return torch.tensor([[1.0, 2.0], [3.0, 4.0]])

    found = moments_of(OnMps(), ("a", "a"), np.array([0, 1]))
    assert found.sums[0, :2].tolist() == [[1.0, 2.0], [3.0, 4.0]]


def samples():
    """Draw samples of small whole numbers, so that sums are exact."""
    row = st.tuples(st.sampled_from("abcd"), st.lists(st.integers(-9, 9), min_size=2, max_size=2))
    return st.lists(row, min_size=1, max_size=60)


@given(rows=samples(), data=st.data())
def test_batches_do_not_matter(rows, data):
    """However the samples are split into batches, merging the batches gives the moments of the whole."""
    labels = tuple(label for label, _ in rows)
    features = np.array([values for _, values in rows], dtype=np.float64)
    cuts = sorted(data.draw(st.sets(st.integers(1, max(1, len(rows) - 1)), max_size=5)) | {0, len(rows)})
    counter, merged = GroupCounter(), None
    for start, stop in itertools.pairwise(cuts):
        part = moments(features[start:stop], labels[start:stop], counter)
        merged = part if merged is None else merged.merge(part)
    assert parts_of(merged) == parts_of(moments(features, labels))


@given(first=samples(), second=samples(), third=samples())
def test_merge_is_associative(first, second, third):
    """It does not matter which of three are merged first, nor, but for the order of classes, which comes first."""
    a, b, c = (
        moments(np.array([values for _, values in rows], dtype=np.float64), tuple(label for label, _ in rows))
        for rows in (first, second, third)
    )
    assert parts_of(a.merge(b).merge(c)) == parts_of(a.merge(b.merge(c)))
    assert parts_of(a.merge(b).ordered()) == parts_of(b.merge(a).ordered())


def test_merge_leaves_its_parts_alone():
    """Merging changes neither of the two."""
    a, b = moments(np.ones((3, 2)), ("a", "a", "b")), moments(np.ones((2, 2)), ("c", "a"))
    before = parts_of(a), parts_of(b)
    assert a.merge(b).classes == ("a", "b", "c")
    assert (parts_of(a), parts_of(b)) == before


def test_pooled_samples_are_one_class():
    """Pooling makes one class, labelled None, of all samples."""
    features = np.random.default_rng(0).standard_normal((40, 3))
    pooled = moments(features, tuple("abcd" * 10)).pooled()
    assert pooled.classes == (None,)
    assert pooled.counts.shape == (1, N_GROUPS)
    assert pooled.class_counts.tolist() == [40]
    np.testing.assert_allclose(pooled.sums.sum(axis=(0, 1)), features.sum(axis=0))
    np.testing.assert_allclose(pooled.squares.sum(), np.square(features).sum())


def test_classes_can_be_put_in_order():
    """Ordering sorts the classes and takes their moments along; labels that do not compare stay as they came."""
    found = moments(np.array([[1.0], [2.0], [4.0]]), ("c", "a", "b")).ordered()
    assert found.classes == ("a", "b", "c")
    assert found.sums[:, 0, 0].tolist() == [2.0, 4.0, 1.0]
    mixed = moments(np.array([[1.0], [2.0]]), ("c", 1)).ordered()
    assert mixed.classes == ("c", 1)
    assert mixed.sums[:, 0, 0].tolist() == [1.0, 2.0]
    assert found.ordered() is found  # nothing is copied


def test_some_classes_can_be_taken_out():
    """Of some classes alone the moments are what they were, in the order asked for."""
    features = np.arange(24.0).reshape(12, 2)
    found = moments(features, tuple("abcd" * 3))
    some, alone = found.only(("d", "b")), moments(features[[3, 1, 7, 5, 11, 9]], tuple("db" * 3))
    assert parts_of(some) == parts_of(alone)
    assert found.only(found.classes) is found  # nothing is copied


def test_samples_are_dealt_in_turn():
    """The samples of each class go to the groups in turn, and the turn goes on in the next batch."""
    counter = GroupCounter()
    assert counter.deal(("a", "a", "b", "a")).tolist() == [0, 1, 0, 2]
    assert counter.deal(("b", "a")).tolist() == [1, 3]
    assert counter.deal(("a",) * N_GROUPS).tolist() == [*range(4, N_GROUPS), *range(4)]


# --- half samples


@pytest.mark.parametrize("n_filled", [[10, 10, 10], [10, 7, 4], [1, 2, 3]])
def test_half_of_the_filled_groups_are_drawn(n_filled):
    """A half sample has half of the groups that have samples, none that has not; the first row is the whole."""
    counts = np.zeros((3, N_GROUPS))
    rng = np.random.default_rng(1)
    for row, n in enumerate(n_filled):
        counts[row, rng.permutation(N_GROUPS)[:n]] = 5
    weights = half_samples(counts, 2000, rng)
    assert weights.shape == (2001, 3, N_GROUPS)
    assert set(np.unique(weights)) == {0.0, 1.0}
    assert np.array_equal(weights[0], (counts > 0).astype(float))
    assert not weights[:, counts == 0].any()
    for row, n in enumerate(n_filled):
        assert set(weights[1:, row].sum(axis=-1)) == {n // 2, -(-n // 2)}
        # Each group is in half of the halves: the mean of 2000 draws of 1/2 has a standard error of 0.011.
        np.testing.assert_allclose(weights[1:, row][:, counts[row] > 0].mean(axis=0), 0.5, atol=0.05)


def test_half_samples_follow_the_generator():
    """The same generator state gives the same halves; classes and draws are drawn apart."""
    counts = np.full((2, N_GROUPS), 3.0)
    weights = half_samples(counts, 20, np.random.default_rng(5))
    assert np.array_equal(weights, half_samples(counts, 20, np.random.default_rng(5)))
    assert not np.array_equal(weights[1:, 0], weights[1:, 1])
    assert len(np.unique(weights[1:, 0], axis=0)) > 10


# --- scatter


def share_by_hand(features, labels, classes):
    """Compute the formula of the docstring from the samples themselves."""
    by_class = [features[np.array(labels) == label] for label in classes]
    variances = np.array([rows.var(axis=0, ddof=1).sum() for rows in by_class])
    means = np.array([rows.mean(axis=0) for rows in by_class])
    sampling = np.mean([w / len(rows) for w, rows in zip(variances, by_class, strict=True)])
    between = max(means.var(axis=0, ddof=1).sum() - sampling, 0.0)
    return np.array([variances.mean(), *variances]) / (variances.mean() + between), variances


@pytest.mark.parametrize("distance", [0.0, 0.3, 3.0])
def test_share_is_that_of_the_formula(distance):
    """The share of every draw is what the formula gives on the samples that the draw has."""
    rng = np.random.default_rng(3)
    features, labels = blobs(rng, n_classes=3, n_samples=40, distance=distance)
    keep = rng.permutation(len(labels))[:100]  # unequal classes, in no order
    features, labels = features[keep], tuple(labels[row] for row in keep)
    groups = GroupCounter().deal(labels)
    found = moments_of(torch.from_numpy(features), labels, groups)
    weights = half_samples(found.counts, 20, rng)
    shares, variances = scatter_share(found, weights), scatter_share(found, weights, between=False)
    for draw, weight in enumerate(weights):
        inside = [weight[found.classes.index(label), group] == 1 for label, group in zip(labels, groups, strict=True)]
        chosen = tuple(label for label, yes in zip(labels, inside, strict=True) if yes)
        by_hand, by_class = share_by_hand(features[inside], chosen, found.classes)
        np.testing.assert_allclose(shares[draw], by_hand, rtol=1e-10)
        np.testing.assert_allclose(variances[draw], [by_class.mean(), *by_class], rtol=1e-10)


def test_share_is_known_by_hand():
    """Variances of 2 in classes at 0 and 10 give 2 / (2 + 50 - 1): the means vary by 50, sampling adds 1."""
    shares = shares_of(np.array([[-1.0], [1.0], [9.0], [11.0]]), ("a", "a", "b", "b"))
    np.testing.assert_allclose(shares, 2 / 51)


def test_share_of_each_class_is_its_own():
    """A class that varies more than another has the larger share, and the overall share is their mean."""
    shares = shares_of(np.array([[-1.0], [1.0], [8.0], [12.0]]), ("a", "a", "b", "b"))
    # Variances 2 and 8, mean 5; means vary by 50, of which sampling adds 5 / 2.
    np.testing.assert_allclose(shares, np.array([5, 2, 8]) / (5 + 50 - 2.5))


@given(seed=st.integers(0, 2**32 - 1), scale=st.sampled_from([1e-3, 1.0, 1e3]))
def test_share_does_not_depend_on_the_coordinates(seed, scale):
    """Scaling, turning and shifting the features leaves the share as it is."""
    rng = np.random.default_rng(seed)
    features, labels = blobs(rng)
    turn = np.linalg.qr(rng.standard_normal((5, 5))).Q
    moved = scale * (features @ turn + 10 * rng.standard_normal(5))
    np.testing.assert_allclose(shares_of(moved, labels), shares_of(features, labels), rtol=1e-6)


@pytest.mark.parametrize("n_samples", [3, 10, 100])
@pytest.mark.parametrize("n_classes", [3, 10])
def test_share_is_free_of_sample_size_and_number_of_classes(n_samples, n_classes):
    """With half of the variance between the classes the share is a half, however many classes and samples."""
    # In 400 dimensions one draw is accurate: the variance of three means has a relative error of 1 / 20.
    rng = np.random.default_rng(11)
    found = [shares_of(*blobs(rng, n_classes=n_classes, n_samples=n_samples, n_features=400))[0] for _ in range(8)]
    assert np.mean(found) == pytest.approx(0.5, abs=0.02)


def test_share_of_random_labels_is_one():
    """Labels that have nothing to do with the features explain nothing."""
    rng = np.random.default_rng(2)
    labels = tuple(rng.integers(0, 5, 1000).tolist())
    assert shares_of(rng.standard_normal((1000, 50)), labels)[0] == pytest.approx(1, abs=0.01)


def test_share_of_classes_far_apart_is_near_nought():
    """Classes that are far apart for their width explain nearly everything."""
    assert 0 < shares_of(*blobs(np.random.default_rng(4), distance=100.0))[0] < 1e-3


@pytest.mark.parametrize("value", [0.0, 0.1, 0.3, 1e6 / 3])
def test_constant_features_have_no_share(value):
    """Where nothing varies the share is NaN, and no rounding error passes for variance."""
    assert np.isnan(shares_of(np.full((66, 3), value), ("a", "b") * 33)).all()
    assert np.isnan(shares_of(np.full((66, 3), value), ("a", "b") * 33, between=False)).all()


def test_constant_class_among_others_has_no_share():
    """A class that does not vary has no share of its own, and the others have theirs."""
    shares = shares_of(np.array([[5.0], [5.0], [8.0], [12.0]]), ("a", "a", "b", "b"))
    # Variances 0 and 8, mean 4; means of 5 and 10 vary by 12.5, of which sampling adds 2.
    np.testing.assert_allclose(shares, np.array([4, np.nan, 8]) / (4 + 12.5 - 2))


def test_class_of_one_sample_has_no_share():
    """With a single sample in a class there is no variance, so neither it nor the whole has a share."""
    shares = shares_of(np.array([[1.0], [2.0], [4.0]]), ("a", "a", "b"))
    assert np.isnan(shares).all()
    variances = shares_of(np.array([[1.0], [2.0], [4.0]]), ("a", "a", "b"), between=False)
    np.testing.assert_allclose(variances, [np.nan, 0.5, np.nan])


def test_a_draw_without_samples_has_no_share():
    """Rounding error that is divided by no degree of freedom is neither a share nor a warning."""
    found = moments(np.random.default_rng(1).standard_normal((7, 50)), tuple("aaaabbc"))
    weights = half_samples(found.counts, 50, np.random.default_rng(1))
    shares, alone = scatter_share(found, weights), scatter_share(found.only(("a",)), weights[:, :1])
    assert np.isnan(shares[:, [0, 3]]).all()  # in class c there is one sample at most
    assert np.isnan(alone).all()  # of a single class there is nothing between


def test_small_variance_is_no_rounding_error():
    """A variance a billion times smaller than the square of the mean has its share."""
    features = 1e4 + 0.3 * np.random.default_rng(0).standard_normal((4000, 1))
    share = shares_of(features, ("a", "b") * 2000, between=False)
    np.testing.assert_allclose(share[1:], [features[::2].var(ddof=1), features[1::2].var(ddof=1)], rtol=1e-4)


def test_one_class_has_a_variance_but_no_share():
    """Of one class nothing can be explained by classes, but its variance is known."""
    features = np.array([[1.0, 0.0], [3.0, 4.0]])
    assert np.isnan(shares_of(features, ("a", "a"))).all()
    np.testing.assert_allclose(shares_of(features, ("a", "a"), between=False), [10, 10])


@pytest.mark.parametrize("n_features", [3, 90])
def test_the_shorter_way_changes_nothing(n_features):
    """A few draws are computed by another way than many, and are what they are among them."""
    features, labels = blobs(np.random.default_rng(6), n_features=n_features)
    found = moments(features, labels)
    weights = half_samples(found.counts, 300, np.random.default_rng(0))
    many = scatter_share(found, weights)
    np.testing.assert_allclose(scatter_share(found, weights[:5]), many[:5], rtol=1e-12)


def test_running_moments_are_those_of_all():
    """Batches that are added one by one, with classes that come later, are what they are together."""
    features, labels = blobs(np.random.default_rng(7), n_features=5)
    order = np.argsort(labels, kind="stable")
    features, labels = torch.from_numpy(features[order]), [labels[row] for row in order]
    groups, running = GroupCounter().deal(labels), RunningMoments()
    for start in range(0, len(labels), 7):
        running.add(features[start : start + 7], labels[start : start + 7], groups[start : start + 7])
        running.add(features[:0], [], groups[:0])  # an empty batch is nothing
    together, found = moments_of(features, labels, groups), running.moments()
    assert found.classes == together.classes
    for name in ("counts", "sums", "squares"):
        np.testing.assert_allclose(getattr(found, name), getattr(together, name), rtol=1e-12)


# --- means


def test_means_are_those_of_numpy():
    """The means of a draw are those of the samples that it has; overall, classes weigh alike."""
    rng = np.random.default_rng(8)
    features, labels = rng.standard_normal((50, 3)), tuple("aab" * 16 + "ab")
    groups = GroupCounter().deal(labels)
    found = moments_of(torch.from_numpy(features), labels, groups)
    weights = half_samples(found.counts, 10, rng)
    means = class_means(found, weights)
    assert means.shape == (11, 3, 3)
    for draw in range(11):
        by_class = [
            features[(np.array(labels) == label) & (weights[draw, row][groups] == 1)].mean(axis=0)
            for row, label in enumerate(("a", "b"))
        ]
        np.testing.assert_allclose(means[draw], [np.mean(by_class, axis=0), *by_class], rtol=1e-10)


def test_class_that_a_draw_lacks_has_no_mean():
    """A class without samples in a draw has no mean there, and so the whole has none."""
    found = moments(np.ones((3, 1)), ("a", "a", "b"))
    weights = whole(found)
    weights[0, 1] = 0
    np.testing.assert_array_equal(class_means(found, weights)[0, :, 0], [np.nan, 1.0, np.nan])


# --- the resampling tells the truth


def spread_and_truth(statistic, draw, *, n_sets=60, n_resamples=100):
    """Return the spread that half samples tell, and that of the statistic over new samples."""
    rng = np.random.default_rng(12)
    told, values, centres = [], [], []
    for _ in range(n_sets):
        found = moments(*draw(rng))
        drawn = statistic(found, half_samples(found.counts, n_resamples, rng))
        values.append(drawn[0])
        told.append(drawn[1:].var(ddof=1))
        centres.append(drawn[1:].mean())
    return np.sqrt(np.mean(told)), np.std(values, ddof=1), np.mean(centres) - np.mean(values)


@pytest.mark.parametrize("n_samples", [20, 45, 200])
def test_half_samples_tell_the_spread_of_a_mean(n_samples):
    """The spread of a mean over half samples is its standard error, s / sqrt(n)."""
    told, _, shift = spread_and_truth(
        lambda found, weights: class_means(found, weights)[:, 0, 0],
        lambda rng: (3 * rng.standard_normal((n_samples, 1)), (0,) * n_samples),
    )
    # Sixty estimates with nine degrees of freedom each are good to three per cent.
    assert told == pytest.approx(3 / n_samples**0.5, rel=0.12)
    assert abs(shift) < 0.1 * told


def test_half_samples_tell_the_spread_of_a_share():
    """The spread of a scatter share over half samples is that over new samples of the same classes, without bias."""
    centres = np.random.default_rng(1).standard_normal((5, 4))
    labels = tuple(range(5)) * 40
    told, truth, shift = spread_and_truth(
        lambda found, weights: scatter_share(found, weights)[:, 0],
        lambda rng: (centres[list(labels)] + rng.standard_normal((200, 4)), labels),
        n_sets=150,
    )
    # The truth of 150 sets is good to six per cent.
    assert told == pytest.approx(truth, rel=0.25)
    assert abs(shift) < 0.3 * truth


def test_moments_are_frozen():
    """Moments cannot be changed, only merged."""
    found = ClassMoments((), *(np.zeros((0, N_GROUPS)),) * 3)
    with pytest.raises(AttributeError, match="cannot assign to field 'classes'"):
        found.classes = ("a",)
