"""The criteria on features as estimators: needs known by hand, what is sampled, and what is compared with what."""

import numpy as np
import pytest
import torch
from networks import TokenNet, classifier, samples
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler
from torch import nn

import retrainscope as rs
from retrainscope.criteria import (
    HiddenStateVariability,
    HScore,
    KNNProbe,
    LinearProbe,
    LogME,
    TransRate,
    h_score,
    hidden_variability,
    log_me,
    trans_rate,
)
from retrainscope.criteria.criterion import FeatureCriterion
from retrainscope.criteria.pooling import channel_axis
from retrainscope.criteria.sampling import Reservoir, deal, halved
from retrainscope.exceptions import InvalidDataError

KINDS = [HScore, HiddenStateVariability, KNNProbe, LinearProbe, LogME, TransRate]
FORMULAS = [HScore, HiddenStateVariability, LogME, TransRate]
PROBES = [KNNProbe, LinearProbe]

every_kind = pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)


def linear(weight: list[list[float]], bias: float = 0.0) -> nn.Linear:
    """Return a linear layer of these weights."""
    layer = nn.Linear(len(weight[0]), len(weight))
    with torch.no_grad():
        layer.weight.copy_(torch.tensor(weight))
        layer.bias.fill_(bias)
    return layer


def made(kind: type[FeatureCriterion], model: nn.Module, **options: object) -> FeatureCriterion:
    """Make an estimator that is quiet, with few resamples."""
    quick = {"random_state": 0, "progress": False, "n_resamples": 8} | ({"n_folds": 2} if kind in PROBES else {})
    return kind(model, **(quick | options))


def scored(kind: type[FeatureCriterion], model: nn.Module, known: object, unknown: object, **options: object):
    """Fit on the known data and score the unknown."""
    return made(kind, model, **options).fit(known).score_layers(unknown)


def islands(*centres: tuple[float, ...], n: int = 20, seed: int = 0, labels: tuple[object, ...] | None = None):
    """Return Gaussian classes of n samples around these centres, in turn."""
    generator = torch.Generator().manual_seed(seed)
    places = torch.arange(n * len(centres)) % len(centres)
    X = torch.randn(len(places), len(centres[0]), generator=generator) + torch.tensor(centres)[places]
    return X, [(labels or range(len(centres)))[place] for place in places.tolist()]


# Keeps the first axis, along which two known classes differ, and drops the second, along which two unknown ones do.
PARTING = nn.Sequential(linear([[1.0, 0.0]]), linear([[1.0]]))
KNOWN = islands((2.0, 0.0), (-2.0, 0.0), labels=("left", "right"))
UNKNOWN = islands((0.0, 2.0), (0.0, -2.0), seed=1, labels=("up", "down"))


# Needs


@every_kind
def test_a_layer_that_drops_what_parts_the_unknown_classes(kind):
    """It is in need, with an interval above 0, for each class as well, and the other way round by as much the opposite.

    The known classes lie at the corners of a triangle in the plane of the first two axes, the unknown ones of the next
    two; the layer keeps the first two and the last, which is noise.
    """
    triangle = torch.tensor([[2.0, 0.0], [-1.0, 1.73], [-1.0, -1.73]])
    nothing = torch.zeros(3, 2)
    flat, steep = torch.cat([triangle, nothing, nothing], 1), torch.cat([nothing, triangle, nothing], 1)
    known = islands(*map(tuple, flat.tolist()), n=40)
    unknown = islands(*map(tuple, steep.tolist()), n=40, seed=1, labels=("x", "z", "y"))
    model = nn.Sequential(linear(torch.eye(6)[[0, 1, 5]].tolist()), nn.Linear(3, 2))
    scores = scored(kind, model, known, unknown)
    assert scores.interval[0, 0] > 0
    assert (scores.per_class > 0).all()
    back = scored(kind, model, unknown, known)
    np.testing.assert_allclose(back.values, -scores.values, rtol=1e-9)
    assert scores.classes == ("x", "y", "z")
    assert scores.known_classes == (0, 1, 2)
    assert scores.reference_name == "input"
    assert scores.estimator == kind.__name__
    assert not scores.one_sided


def test_trans_rate_of_two_classes_shows_no_layer_to_be_kept():
    """Between two classes it cannot tell near from far, so a low need tells nothing: the scores say so."""
    assert scored(TransRate, PARTING, KNOWN, UNKNOWN).one_sided
    near, far = islands((0.1,), (-0.1,), n=500), islands((9.0,), (-9.0,), n=500)
    rates = [-negative_rate(X.double().numpy(), y) for X, y in (near, far)]
    np.testing.assert_allclose(rates, 0.0, atol=0.02)


@every_kind
def test_layers_that_change_nothing_have_no_need(kind):
    """Where the features are the inputs the need is exactly 0, whatever the data, in every resample and class."""
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2))
    with torch.no_grad():
        for layer in model[:2]:
            layer.weight.copy_(torch.eye(4))
            layer.bias.zero_()
    scores = scored(kind, model, samples(), samples(classes=("x", "y", "z"), seed=1))
    for value in (scores.values, scores.interval, scores.per_class, scores.per_class_interval):
        np.testing.assert_array_equal(value, 0.0)


def negative_log_me(features: np.ndarray, labels: object) -> float:
    """Of features of mean squared length 1."""
    return -log_me(features / np.sqrt((features**2).sum(axis=1).mean()), labels)


def unexplained(features: np.ndarray, labels: object) -> float:
    """Undo the factor by which the published score divides otherwise."""
    n, n_classes = len(features), len(set(labels))
    return 1 - h_score(features, labels) * (n - 1) / n / (n_classes - 1)


def negative_rate(features: np.ndarray, labels: object) -> float:
    """Of features of mean square 1, by dimension."""
    centred = features - features.mean(axis=0)
    return -trans_rate(centred / np.sqrt((centred**2).mean()), labels) / features.shape[1]


BY_DEFINITION = {
    LogME: negative_log_me,
    HScore: lambda *data: np.log(unexplained(*data)),
    TransRate: negative_rate,
    HiddenStateVariability: lambda *data: np.log(hidden_variability(*data)),
}


@pytest.mark.parametrize("kind", FORMULAS, ids=lambda kind: kind.__name__)
def test_needs_by_definition(kind):
    """With equally many samples and classes on both sides the need is that of the published measures of all samples."""
    model = classifier(dtype=torch.float64)
    known, unknown = samples(), samples(classes=("x", "y"), seed=1)
    scores = scored(kind, model, known, unknown, batch_size=7)
    measure = BY_DEFINITION[kind]
    with torch.no_grad():
        for place, depth in enumerate((1, 3)):

            def beyond_input(data, depth=depth):
                X, labels = data[0].double(), data[1]
                return measure(model[:depth](X).numpy(), labels) - measure(X.numpy(), labels)

            np.testing.assert_allclose(scores.values[place], beyond_input(unknown) - beyond_input(known), rtol=1e-6)


def test_error_of_the_linear_probe():
    """The error is that of logistic regression on standardised features, each fold by one fitted to the others."""
    model, known = classifier(dtype=torch.float64), samples()
    probe = made(LinearProbe, model, n_folds=3).fit(known)
    scores = probe.score_layers(samples(seed=1))
    wrong = []
    for fold in range(3):  # of the samples as they were drawn: the first third of each class, and so on
        parts = [np.array_split(rows, 3) for rows in probe.sample_.features["2"]]
        train = np.concatenate([part for c in parts for k, part in enumerate(c) if k != fold])
        test = np.concatenate([c[fold] for c in parts])
        scaler = StandardScaler().fit(train)
        classes = np.arange(2).repeat(20)
        fitted = LogisticRegression().fit(scaler.transform(train), classes)
        wrong.append(fitted.predict(scaler.transform(test)) != np.arange(2).repeat(10))
    np.testing.assert_allclose(scores.known[1], np.mean(wrong), rtol=1e-12)


def test_error_of_the_neighbours():
    """The error is that of the vote of the nearest by cosine, each fold by the samples of the others."""
    model, known = classifier(dtype=torch.float64), samples()
    probe = made(KNNProbe, model, n_folds=3, n_neighbors=3).fit(known)
    scores = probe.score_layers(samples(seed=1))
    features = np.concatenate(probe.sample_.features["2"])
    labels, fold = np.arange(2).repeat(30), np.tile(np.arange(3).repeat(10), 2)
    lengths = np.linalg.norm(features, axis=1)
    similar = features @ features.T / np.outer(lengths, lengths)
    similar[fold[:, None] == fold] = -np.inf
    votes = labels[np.argsort(-similar, axis=1)[:, :3]].mean(axis=1)
    np.testing.assert_allclose(scores.known[1], np.mean((votes > 0.5) != labels), rtol=1e-12)


@pytest.mark.parametrize("kind", PROBES, ids=lambda kind: kind.__name__)
def test_no_errors_are_half_an_error(kind):
    """Classes far apart are told apart without an error on both sides: the need is 0, not infinite or nothing."""
    known, unknown = islands((50.0, 0.0), (-50.0, 0.0)), islands((40.0, 5.0), (-40.0, 5.0), seed=1, labels=("a", "b"))
    scores = scored(kind, PARTING, known, unknown)
    np.testing.assert_array_equal(scores.known, 0.0)
    np.testing.assert_array_equal(scores.unknown, 0.0)
    np.testing.assert_array_equal(scores.values, 0.0)
    np.testing.assert_array_equal(scores.interval, 0.0)
    # Against half of the samples wrong, as at a layer that says nothing: half an error of forty samples.
    scores = scored(
        kind, nn.Sequential(linear([[0.0, 1.0]]), linear([[1.0]])), known, islands((0.0, 90.0), (0.0, -90.0))
    )
    np.testing.assert_allclose(scores.values, np.log(0.0125) - np.log(scores.known + 0.0125), rtol=1e-9)


@pytest.mark.parametrize("kind", [HScore, HiddenStateVariability, TransRate], ids=lambda kind: kind.__name__)
def test_a_layer_that_does_not_vary_has_no_need(kind):
    """Of a layer that says the same of every sample these measures are not defined: NaN, and no warning."""
    model = nn.Sequential(linear([[0.0, 0.0]], bias=0.3), linear([[1.0]]))
    scores = scored(kind, model, KNOWN, UNKNOWN)
    assert np.isnan(scores.values).all()
    assert np.isnan(scores.interval).all()


@pytest.mark.parametrize("kind", [KNNProbe, LinearProbe, LogME], ids=lambda kind: kind.__name__)
def test_a_layer_that_says_nothing_is_as_good_as_chance(kind):
    """Of a layer that says the same of every sample the others measure what chance gives, on both sides alike."""
    model = nn.Sequential(linear([[0.0, 0.0]], bias=0.3), linear([[1.0]]))
    scores = scored(kind, model, KNOWN, UNKNOWN)
    chance = np.log(2 * np.pi * np.e / 4) / 2 if kind is LogME else 0.5
    np.testing.assert_allclose(scores.known, chance, atol=0.07)
    np.testing.assert_allclose(scores.unknown, chance, atol=0.07)


# What is compared with what


@pytest.mark.parametrize("kind", [HScore, LogME, TransRate], ids=lambda kind: kind.__name__)
def test_more_samples_on_one_side_are_no_need(kind):
    """Of the same distribution, ten times the samples on a side leave the need near 0: they are drawn down to match."""
    model, needs = classifier(dtype=torch.float64), []
    options = {"samples_per_class": 200, "n_resamples": 1}
    for seed in range(4):
        many, few = samples(400, seed=seed), samples(40, seed=10 + seed)
        needs += [scored(kind, model, *sides, **options).values for sides in ((many, few), (few, many))]
    standard_error = np.std(needs, axis=0, ddof=1) / np.sqrt(len(needs))
    assert (np.abs(np.mean(needs, axis=0)) < np.maximum(0.05, 3 * standard_error)).all()


@pytest.mark.parametrize("kind", [LinearProbe, LogME], ids=lambda kind: kind.__name__)
def test_more_classes_on_one_side_are_no_need(kind):
    """Eight classes against two, all told apart as well, have no need: two of them at a time are compared."""
    corners = [tuple(1.5 * (axis == place) for axis in range(8)) for place in range(8)]
    two, eight = islands(*corners[:2], n=30), islands(*corners, n=30, seed=1, labels=tuple("abcdefgh"))
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 2))
    with torch.no_grad():
        model[0].weight.copy_(2 * torch.eye(8) + 0.3 * torch.randn(8, 8, generator=torch.Generator().manual_seed(0)))
    for known, unknown in ((two, eight), (eight, two)):
        scores = scored(kind, model, known, unknown)
        assert scores.interval[0, 0] < 0 < scores.interval[0, 1]
        assert abs(scores.values[0]) < 0.3
        assert np.isfinite(scores.per_class).all()
        assert np.isfinite(scores.per_class_interval).all()
        assert scores.unknown_per_class.shape == (len(set(unknown[1])), 1)
    # Measured with eight classes, the raw measure is another.
    same = scored(kind, model, eight, eight)
    assert abs(same.known[0] - scores.known[0]) > 0.05


@every_kind
def test_known_classes_are_compared_with_themselves(kind):
    """If every unknown class is a known one, the known data is measured on those classes alone."""
    X, y = islands((2.0, 0.0), (-2.0, 0.0), (0.0, 50.0), labels=("left", "right", "far"))
    rows = [label != "far" for label in y]
    domain = (X[rows] + 1, [label for label in y if label != "far"])
    scores = scored(kind, PARTING, (X, y), domain)
    assert scores.known_classes == ("left", "right")
    only = scored(kind, PARTING, (X[rows], domain[1]), domain)
    tolerance = 0.1 if kind in PROBES else 1e-9  # the folds are others
    np.testing.assert_allclose(scores.known_reference, only.known_reference, atol=tolerance)
    assert scores.n_samples == (40, 40)


@every_kind
def test_few_samples_leave_no_interval(kind):
    """With three samples a class there is a need, and no interval; the table says why."""
    scores = scored(kind, classifier(), samples(6), samples(6, seed=1))
    assert np.isfinite(scores.values).all()
    assert np.isnan(scores.interval).all()
    assert "a class of fewer than 4 samples leaves no interval" in str(scores)


@every_kind
@pytest.mark.parametrize("side", ["known", "unknown"])
def test_one_class_is_too_few(kind, side):
    """One class cannot be told from others: it is refused on either side, with its name."""
    single = (samples(20)[0], ["only"] * 20)
    estimator = made(kind, classifier())
    message = rf"{kind.__name__} measures how well classes can be told apart, and the {side} data has only 'only'"
    if side == "unknown":
        estimator.fit(samples())
    with pytest.raises(InvalidDataError, match=message):
        estimator.fit(single) if side == "known" else estimator.score_layers(single)


def test_labels_are_asked_for_before_the_data_is_run_through():
    """Without labels the first batch is refused, and the model has seen only the few samples of the dry run."""
    model, seen = classifier(), []
    model[0].register_forward_hook(lambda _module, _args, output: seen.append(len(output)))
    with pytest.raises(InvalidDataError, match="LogME needs labels, and the known data has none"):
        made(LogME, model).fit(samples()[0])
    assert sum(seen) < 20


@pytest.mark.parametrize(
    ("kind", "option", "message"),
    [
        (
            LogME,
            {"samples_per_class": 1},
            "'samples_per_class' parameter must be a positive integer, at least 2. Got 1",
        ),
        (LogME, {"max_features": 0}, "'max_features' parameter must be a positive integer. Got 0"),
        (LogME, {"n_resamples": 1.5}, "'n_resamples' parameter must be a positive integer. Got 1.5"),
        (LinearProbe, {"n_folds": 1}, "'n_folds' parameter must be a positive integer, at least 2. Got 1"),
        (KNNProbe, {"n_neighbors": 0}, "'n_neighbors' parameter must be a positive integer. Got 0"),
    ],
)
def test_parameters_out_of_range(kind, option, message):
    """Parameters that make no sense are refused by fit."""
    with pytest.raises(InvalidDataError, match=message):
        made(kind, classifier(), **option).fit(samples())


# Which features


def test_maps_are_averaged_over_space():
    """Maps are measured by their channels' means, or with pool=False value by value, and the result says which."""
    model = nn.Sequential(nn.Conv2d(1, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(48, 2))
    X, y = torch.randn(40, 1, 6, 6), [0, 1] * 20
    pooled = made(LogME, model, layers=["0"]).fit((X, y))
    assert [rows.shape for rows in pooled.sample_.features["0"]] == [(20, 3)] * 2
    assert [rows.shape for rows in pooled.sample_.features[""]] == [(20, 36)] * 2
    with torch.no_grad():
        expected = model[0](X).mean(dim=(2, 3)).numpy()
    found = np.concatenate(pooled.sample_.features["0"])
    np.testing.assert_allclose(np.sort(found, axis=0), np.sort(expected, axis=0), rtol=1e-4, atol=1e-6)
    assert "features averaged over places, at most 1,024 of a layer" in pooled.score_layers((X, y)).measure
    flat = made(LogME, model, layers=["0"], pool=False).fit((X, y))
    assert flat.sample_.features["0"][0].shape == (20, 48)
    assert "features flattened, at most 1,024" in flat.score_layers((X, y)).measure
    few = made(LogME, model, layers=["0"], pool=False, max_features=10).fit((X, y))
    assert few.sample_.features["0"][0].shape == few.sample_.features[""][0].shape == (20, 10)


def test_channels_that_cannot_be_told_are_not_averaged_away():
    """Where no module tells which axis the channels are, all values are measured, and the result names the layer."""

    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.mix, self.last = nn.Linear(12, 30), nn.Linear(30, 2)
            self.fold = nn.Unflatten(1, (5, 6))

        def forward(self, x):
            return self.last(self.fold(self.mix(x)).flatten(1))

    X, y = torch.randn(40, 12), [0, 1] * 20
    odd = made(LogME, Odd(), layers=["mix", "fold"]).fit((X, y))
    assert odd.sample_.features["fold"][0].shape == (20, 30)
    assert "features averaged over places (flattened: fold)" in odd.score_layers((X, y)).measure


@pytest.mark.parametrize(
    ("layer", "shape", "axis"),
    [
        (nn.Conv2d(3, 8, 3), (5, 8, 4, 4), 1),
        (nn.Conv2d(3, 8, 3), (5, 8, 8, 8), 1),  # the kind decides where both axes fit
        (nn.ConvTranspose1d(3, 8, 3), (5, 8, 4), 1),
        (nn.Linear(3, 8), (5, 4, 8), 2),
        (nn.Linear(3, 8), (5, 8, 8), 2),
        (nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU()), (5, 8, 4, 4), 1),
        (nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 32), nn.GELU(), nn.Linear(32, 8)), (5, 4, 8), 2),
        (nn.Sequential(nn.Conv2d(8, 8, 7, groups=8), nn.LayerNorm(8), nn.Linear(8, 8)), (5, 8, 4, 4), 1),
        (nn.Embedding(10, 8), (5, 4, 8), 2),
        (nn.MultiheadAttention(8, 2), (5, 4, 8), 2),
        (nn.LSTM(3, 8), (5, 4, 8), 2),
        (nn.Linear(3, 8), (5, 4, 7), None),
    ],
)
def test_axis_of_the_channels(layer, shape, axis):
    """The axis as long as a module has outputs is the channels'; of two such axes the kind of module decides."""
    assert channel_axis(nn.Sequential(layer, nn.Linear(1, 2)), "0", shape) == axis


def test_axis_of_the_channels_after_a_module_without_weights():
    """A module without weights has the channels of the one before it, and not of what comes after."""
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(8, 4, 3))
    assert channel_axis(model, "2", (5, 8, 4, 4)) == 1


def test_padding_does_not_count():
    """Where the data tells what is padding, features are means over real tokens: what padding holds changes nothing."""

    class Masked(TokenNet):
        def forward(self, ids, attention_mask):
            return super().forward(ids)

    torch.manual_seed(0)
    model, ids = Masked(), torch.randint(0, 10, (40, 5))
    mask = torch.ones(40, 5, dtype=torch.long)
    mask[::3, 3:] = 0
    found = []
    for filled in (0, 9):
        data = {"ids": torch.where(mask == 1, ids, filled), "attention_mask": mask, "labels": [0, 1] * 20}
        found.append(made(LogME, model, layers=["mix"], input_layer="embedding", pool=False).fit(data).sample_.features)
    for name, n_features in (("", 4), ("mix", 5)):
        assert found[0][name][0].shape == (20, n_features)
        np.testing.assert_array_equal(found[0][name], found[1][name])


# The sample


@pytest.mark.parametrize("batch_size", [1, 7, 300])
def test_at_most_so_many_samples_of_a_class(batch_size):
    """A class is measured on at most so many samples, each with its own features, the same whatever the batches."""
    model, (X, y) = classifier(dtype=torch.float64), samples(300, classes=("a", "b", "c"))
    sample = made(LogME, model, samples_per_class=40, batch_size=batch_size).fit((X, y)).sample_
    assert sample.classes == ("a", "b", "c")
    np.testing.assert_array_equal(sample.sizes, [40, 40, 40])
    whole = made(LogME, model, samples_per_class=40, batch_size=100).fit((X, y)).sample_
    for label, rows, same in zip("abc", sample.features[""], whole.features[""], strict=True):
        np.testing.assert_array_equal(rows, same)
        places = [np.flatnonzero((X.double().numpy() == row).all(axis=1)).item() for row in rows]
        assert len(set(places)) == 40
        assert {y[place] for place in places} == {label}
    with torch.no_grad():
        expected = model[0](torch.from_numpy(sample.features[""][1])).numpy()
    np.testing.assert_allclose(sample.features["0"][1], expected, rtol=1e-9)


def test_only_what_may_stay_goes_through_the_model():
    """Of many samples only those that are drawn are run: far fewer than there are."""
    model, seen = classifier(), []
    model[0].register_forward_hook(lambda _module, _args, output: seen.append(len(output)))
    made(LogME, model, samples_per_class=10, batch_size=50).fit(samples(2000))
    assert 20 <= sum(seen) < 300


def test_features_are_kept_in_the_precision_of_the_model():
    """Single precision takes half the memory, and is what a model in single precision gives."""
    for dtype in (torch.float32, torch.float64):
        sample = made(LogME, classifier(dtype=dtype)).fit(samples()).sample_
        assert {str(rows.dtype) for found in sample.features.values() for rows in found} == {str(dtype)[6:]}


def test_every_sample_is_drawn_as_often():
    """Each sample of a class stays with the same probability, wherever it comes."""
    stays = np.zeros(20)
    for seed in range(600):
        reservoir = Reservoir(5, np.random.default_rng(seed))
        for start in range(0, 20, 4):
            reservoir.offer(["a"] * 4, np.arange(start, start + 4))
        stays[reservoir.chosen["a"]] += 1
    # Binomial(600, 1/4): 150 with a standard deviation of 10.6
    assert (np.abs(stays - 150) < 4 * 10.6).all()


def test_many_classes_share_the_room():
    """With more classes than leave room, fewer samples of each stay; what leaves is told, and nothing else."""
    rng = np.random.default_rng(0)
    labels = [*("a" * 50), *rng.permutation([*"bcd"] * 30).tolist()]
    reservoir, kept = Reservoir(40, np.random.default_rng(0), most=80), set()
    for start in range(0, 140, 10):
        positions = np.arange(start, start + 10)
        stay, leave = reservoir.offer(labels[start : start + 10], positions)
        kept |= set(positions[stay].tolist())
        kept -= leave
    chosen = reservoir.chosen
    assert {label: len(rows) for label, rows in chosen.items()} == {"a": 20, "b": 20, "c": 20, "d": 20}
    assert kept == {position for rows in chosen.values() for position in rows}
    assert all(labels[position] == label for label, rows in chosen.items() for position in rows)


# Draws


@pytest.mark.parametrize(
    ("sizes", "n_classes", "n"),
    [([4, 4], 2, 4), ([9, 4, 6], 3, 4), ([4] * 5, 2, 4), ([10] * 7, 3, 2), ([3, 3, 3], 2, 2)],
)
def test_draws_are_alike_and_use_all(sizes, n_classes, n):
    """Every draw has so many classes of so many different samples, and all classes and samples are in some draw."""
    rows = [np.arange(size) for size in sizes]
    n_rounds = -(-max(sizes) // n)
    draws = deal(rows, range(len(sizes)), n_classes=n_classes, n=n, n_rounds=n_rounds)
    used = [set() for _ in sizes]
    for draw in draws:
        classes = [c for c, _ in draw]
        assert classes == sorted(set(classes))
        assert len(classes) == n_classes
        for c, chosen in draw:
            assert len(set(chosen.tolist())) == n
            used[c] |= set(chosen.tolist())
    assert [len(found) for found in used] == sizes
    assert len(draws) == n_rounds * -(-len(sizes) // n_classes)


def test_halves_are_halves():
    """A half has half of each class, rounded up or down at random, without repetition, and so has a draw from it."""
    rng, sizes = np.random.default_rng(0), np.array([6, 7])
    seen = set()
    for _ in range(50):
        rows, n = halved(sizes, 5, rng)
        seen.add((len(rows[0]), len(rows[1]), n))
        assert all(len(set(found.tolist())) == len(found) for found in rows)
        assert all(set(found.tolist()) <= set(range(size)) for found, size in zip(rows, sizes, strict=True))
    assert seen == {(3, 3, 2), (3, 4, 3)}


# Together with the rest


def test_a_recommendation_from_a_criterion():
    """The criteria take the place of the default estimators, and the layer in need is the one to retrain."""
    rec = rs.recommend_layers(
        PARTING, KNOWN, UNKNOWN, estimators=[made(HiddenStateVariability, PARTING)], random_state=0
    )
    assert rec.layers == ("0",)


def test_a_layer_by_its_second_name():
    """A layer that has two names can be named by either."""

    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.Sequential(nn.Conv2d(1, 3, 3), nn.ReLU())
            self.first, self.head = self.body[0], nn.Linear(3, 2)

        def forward(self, x):
            return self.head(self.body(x).mean(dim=(2, 3)))

    torch.manual_seed(0)
    model, X, y = Twice(), torch.randn(40, 1, 6, 6), [0, 1] * 20
    needs = [made(LogME, model, layers=[name]).fit((X, y)).score_layers((X, y)).values for name in ("first", "body.0")]
    np.testing.assert_array_equal(*needs)
