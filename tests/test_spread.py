"""ActivationSpread: needs known by hand, its fallbacks, neighbours and the t-SNE map."""

import numpy as np
import pytest
import torch
from networks import TokenNet, classifier, samples
from sklearn.decomposition import PCA
from sklearn.exceptions import NotFittedError
from torch import Tensor, nn

import retrainscope as rs
from retrainscope.exceptions import InvalidDataError, LayerNotFoundError, NonFiniteError

CORNERS = torch.tensor([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]])


def linear(weight: list[list[float]], bias: float = 0.0) -> nn.Linear:
    """Return a linear layer of these weights."""
    layer = nn.Linear(len(weight[0]), len(weight))
    with torch.no_grad():
        layer.weight.copy_(torch.tensor(weight))
        layer.bias.fill_(bias)
    return layer


def squares(*centres: tuple[float, float], labels: tuple[object, ...] | None = None) -> tuple[Tensor, list[object]]:
    """Return for each centre one class of four samples, at the corners of a square of side 2 around it."""
    X = torch.cat([CORNERS + torch.tensor(centre) for centre in centres])
    return X, [label for label in labels or range(len(centres)) for _ in range(4)]


def spread_of(model: nn.Module, known: object, unknown: object, **options: object) -> rs.LayerScores:
    """Fit on the known data and score the unknown."""
    return rs.ActivationSpread(model, random_state=0, progress=False, **options).fit(known).score_layers(unknown)


# Parts the known classes, which differ along the first axis, and drops the second, along which the unknown differ.
PARTING = nn.Sequential(linear([[1.0, 0.0]]), linear([[1.0]]))
KNOWN = squares((10.0, 0.0), (-10.0, 0.0), labels=("left", "right"))
UNKNOWN = squares((0.0, 10.0), (0.0, -10.0), labels=("up", "down"))


def numpy_share(features: np.ndarray, labels: list[object], which: object = None) -> float:
    """Compute W / (W + B), or W_c / (W + B), from the definition, with numpy alone."""
    parts = [features[[label == c for label in labels]] for c in dict.fromkeys(labels)]
    within = np.array([part.var(axis=0, ddof=1).sum() for part in parts])
    between = np.stack([part.mean(axis=0) for part in parts]).var(axis=0, ddof=1).sum()
    between = max(between - (within / [len(part) for part in parts]).mean(), 0.0)
    chosen = within.mean() if which is None else within[list(dict.fromkeys(labels)).index(which)]
    return chosen / (within.mean() + between)


def test_need_by_hand():
    """A layer that parts the known classes and merges the unknown is in need, by the amount that a pencil gives.

    Known and unknown inputs have equal shares, so the reference is silent. At the layer a class varies by 4/3. The
    means of the known classes lie at 10 and -10, whose variance is 200, less (4/3)/4 for the sampling: their share is
    (4/3) / (4/3 + 200 - 1/3) = (4/3) / 201. The means of the unknown classes are the same: theirs is 1.
    """
    scores = spread_of(PARTING, KNOWN, UNKNOWN)
    np.testing.assert_allclose(scores.known, [4 / 3 / 201], rtol=1e-12)
    np.testing.assert_allclose(scores.unknown, [1.0], rtol=1e-12)
    np.testing.assert_allclose(scores.known_reference, scores.unknown_reference, rtol=1e-12)
    np.testing.assert_allclose(scores.values, [np.log(201 * 3 / 4)], rtol=1e-12)
    assert scores.reference_name == "input"
    assert scores.unit == "share of all variance"
    assert scores.n_samples == (8, 8)


def test_need_the_other_way_round_is_the_opposite():
    """With known and unknown exchanged the need changes its sign."""
    np.testing.assert_allclose(
        spread_of(PARTING, UNKNOWN, KNOWN).values, -spread_of(PARTING, KNOWN, UNKNOWN).values, rtol=1e-12
    )


def test_layers_that_change_nothing_have_no_need():
    """Where the activations are the inputs the need is exactly 0, whatever the data, in every resample and class."""
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2))
    with torch.no_grad():
        for layer in model[:2]:
            layer.weight.copy_(torch.eye(4))
            layer.bias.zero_()
    scores = spread_of(model, samples(), samples(classes=("x", "y", "z"), seed=1))
    assert (scores.values == 0).all()
    assert (scores.interval == 0).all()
    assert (scores.per_class == 0).all()
    assert (scores.per_class_interval == 0).all()


def test_need_against_numpy():
    """Needs overall and by class are those of the definition, computed with numpy from the activations."""
    model = classifier()
    known, unknown = samples(), samples(classes=("x", "y", "z"), seed=1)
    scores = spread_of(model, known, unknown, batch_size=7)
    with torch.no_grad():
        for place, depth in enumerate((1, 3)):

            def share(data, which=None, depth=depth):
                X, labels = data
                return numpy_share(model[:depth](X).double().numpy(), labels, which) / (
                    numpy_share(X.double().numpy(), labels, which)
                )

            np.testing.assert_allclose(scores.values[place], np.log(share(unknown) / share(known)), rtol=1e-6)
            for row, label in enumerate(("x", "y", "z")):
                np.testing.assert_allclose(
                    scores.per_class[row, place], np.log(share(unknown, label) / share(known)), rtol=1e-6
                )


def test_needs_by_class_tell_the_classes_apart():
    """Of two unknown classes the one that the layer spreads more is more in need."""
    tight, wide = CORNERS * 0.1 + torch.tensor([0.0, 10.0]), CORNERS + torch.tensor([0.0, -10.0])
    tight[:, 1] = wide[:, 1] + 20  # equally wide along the axis that is dropped
    scores = spread_of(PARTING, KNOWN, (torch.cat([tight, wide]), ["tight"] * 4 + ["wide"] * 4))
    assert scores.classes == ("tight", "wide")
    tight_need, wide_need = scores.per_class[:, 0]
    # Within, the layer sees 100 times less of the one; the input sees (0.01 + 1) / 2 of it.
    np.testing.assert_allclose(wide_need - tight_need, np.log(100 * 1.01 / 2), rtol=1e-4)


@pytest.mark.parametrize("side", ["known", "unknown"])
def test_single_class_is_compared_by_its_variance(side):
    """With one class on a side nothing lies between classes: the variances within are compared as they are."""
    one, two = squares((0.0, 10.0), labels=("one",)), KNOWN
    known, unknown = (one, two) if side == "known" else (two, one)
    scores = spread_of(PARTING, known, unknown)
    assert scores.unit == "squared activation"
    np.testing.assert_allclose(scores.known, [4 / 3], rtol=1e-12)
    np.testing.assert_allclose(scores.unknown, [4 / 3], rtol=1e-12)
    np.testing.assert_allclose(scores.known_reference, [8 / 3], rtol=1e-12)
    np.testing.assert_allclose(scores.values, [0.0], atol=1e-12)
    assert scores.classes == tuple(sorted(set(unknown[1])))


@pytest.mark.parametrize("unlabelled", [("known",), ("unknown",), ("known", "unknown")])
def test_without_labels_each_set_is_one_class(unlabelled):
    """Without labels on a side the variance of each whole set is compared, and there is no table by class."""
    known = KNOWN[0] if "known" in unlabelled else KNOWN
    unknown = UNKNOWN[0] if "unknown" in unlabelled else UNKNOWN
    spread = rs.ActivationSpread(PARTING, random_state=0).fit(known)
    scores = spread.score_layers(unknown)
    # Along the first axis the known samples lie at 10 +- 1 and -10 +- 1, the unknown at +-1.
    np.testing.assert_allclose(scores.known, [8 * 101 / 7], rtol=1e-12)
    np.testing.assert_allclose(scores.unknown, [8 / 7], rtol=1e-12)
    np.testing.assert_allclose(scores.values, [-np.log(101)], rtol=1e-12)
    assert scores.classes == scores.known_classes == ()
    assert spread.neighbours_ == {}


def test_a_layer_without_variance_has_no_need():
    """A layer that says the same of every sample cannot be measured: NaN, and no warning."""
    model = nn.Sequential(linear([[0.0, 0.0]], bias=3.0), linear([[1.0]]))
    scores = spread_of(model, KNOWN, UNKNOWN)
    assert np.isnan(scores.values).all()
    assert np.isnan(scores.interval).all()


def test_neighbours_by_hand():
    """A novel class's neighbour is the known class whose mean activation is nearest, layer by layer."""
    model = nn.Sequential(linear([[1.0, 0.0], [0.0, 0.1]]), linear([[0.0, 1.0]]), linear([[1.0]]))
    known = squares((0.0, 0.0), (9.0, 50.0), labels=("origin", "far"))
    unknown = squares((5.0, 0.0), (1.0, 40.0), labels=("a", "b"))
    spread = rs.ActivationSpread(model, random_state=0).fit(known)
    assert not hasattr(spread, "neighbours_")
    spread.score_layers(unknown)
    # At "0" the known means are (0, 0) and (9, 5), a's is (5, 0) and b's (1, 4); at "1" they are 0 and 5, 0 and 4.
    assert spread.neighbours_ == {"0": {"a": "origin", "b": "origin"}, "1": {"a": "origin", "b": "far"}}


def test_neighbours_do_not_depend_on_how_many_samples_there_are():
    """It is the mean that is near or far, whatever the number of samples."""
    few, (many, _) = CORNERS[:2] + torch.tensor([6.0, 0.0]), squares((2.0, 0.0), (2.0, 0.0), (2.0, 0.0))
    spread = rs.ActivationSpread(PARTING, random_state=0).fit((torch.cat([few, many]), ["few"] * 2 + ["many"] * 12))
    spread.score_layers(squares((6.0, 0.0), (1.0, 0.0), labels=("right", "left")))
    assert spread.neighbours_ == {"0": {"left": "many", "right": "few"}}


def test_neighbours_of_a_single_class():
    """A single novel class has a neighbour too."""
    spread = rs.ActivationSpread(PARTING, random_state=0).fit(KNOWN)
    spread.score_layers(squares((-3.0, 0.0), labels=("new",)))
    assert spread.neighbours_ == {"0": {"new": "right"}}


def test_moments_are_kept_by_layer():
    """The moments of the known data are kept for each layer, and for the input under the empty name."""
    spread = rs.ActivationSpread(PARTING, random_state=0).fit(KNOWN)
    assert set(spread.moments_) == {"", "0"}
    assert spread.moments_[""].classes == ("left", "right")
    np.testing.assert_array_equal(spread.moments_["0"].class_counts, [4, 4])


def test_classes_are_sorted_whatever_their_order():
    """Shuffled samples give the same classes in the same order, and where labels do not compare, as they came."""
    X, labels = samples(classes=("c", "a", "b"))
    scores = spread_of(classifier(), (X, labels), (X, labels))
    assert scores.classes == ("a", "b", "c")
    mixed = [1 if label == "a" else label for label in labels]
    assert spread_of(classifier(), (X, mixed), (X, mixed)).classes == ("c", 1, "b")


def test_input_layer_stands_for_the_input():
    """With an input layer its output is the reference: a layer that repeats it has no need."""
    model = TokenNet()
    with torch.no_grad():
        model.mix.weight.zero_()
        model.mix.weight[:4].copy_(torch.eye(4))
        model.mix.bias.zero_()
    ids = torch.randint(0, 10, (40, 3))
    y = torch.arange(40) % 2
    scores = spread_of(model, (ids, y), (ids.flip(0) % 4, y), layers=["mix"], input_layer="embedding")
    np.testing.assert_allclose(scores.values, [0.0], atol=1e-12)
    with torch.no_grad():
        share = numpy_share(model.embedding(ids).flatten(1).double().numpy(), y.tolist())
    np.testing.assert_allclose(scores.known_reference, [share], rtol=1e-9)


@pytest.mark.parametrize("which", ["known", "unknown"])
def test_one_sample_of_a_class_is_too_few(which):
    """A class of one sample is refused with its name: the known one by fit, before anything else is measured."""
    X, labels = samples(21)
    single = (X, ["lonely", *labels[1:]])
    message = rf"The {which} class 'lonely' has 1 sample; at least 2 a class are needed"
    if which == "known":
        with pytest.raises(InvalidDataError, match=message):
            rs.ActivationSpread(classifier()).fit(single)
    else:
        spread = rs.ActivationSpread(classifier()).fit((X, [str(label) for label in labels]))
        with pytest.raises(InvalidDataError, match=message):
            spread.score_layers(single)


def test_nan_in_a_layer_is_traced_to_its_batch():
    """Where a layer puts out infinity the error names the layer, the batch and the set."""
    model, (X, labels) = classifier(), samples()
    nn.init.ones_(model[0].weight)
    spread = rs.ActivationSpread(model, batch_size=25).fit((X, labels))
    X[-1] = 3e38
    with pytest.raises(NonFiniteError, match="layer '0' puts out NaN or infinity in batch 2 of the unknown data"):
        spread.score_layers((X, labels))


def test_embed_maps_every_sample():
    """The t-SNE map has a row a sample in the order of X, and the random state decides it."""
    X, labels = samples(40)
    X[::2] += 50  # two islands
    spread = rs.ActivationSpread(classifier(), random_state=0, batch_size=16).fit((X, labels))
    mapped = spread.embed(X, "2", perplexity=5.0)
    assert mapped.shape == (40, 2)
    islands = mapped[::2].mean(axis=0), mapped[1::2].mean(axis=0)
    nearer = [np.linalg.norm(mapped - island, axis=1) for island in islands]
    assert ((nearer[0] < nearer[1]) == (np.arange(40) % 2 == 0)).all()
    np.testing.assert_array_equal(spread.embed((X, labels), "2", perplexity=5.0), mapped)


def test_embed_of_a_wide_layer(monkeypatch):
    """Layers of more than fifty features are brought down to fifty first."""
    reduced = []

    class Noted(PCA):
        def fit_transform(self, X, y=None):
            reduced.append((X.shape, self.n_components))
            return super().fit_transform(X, y)

    monkeypatch.setattr("sklearn.decomposition.PCA", Noted)
    model = nn.Sequential(nn.Linear(4, 60), nn.ReLU(), nn.Linear(60, 2))
    X, labels = samples(60)
    spread = rs.ActivationSpread(model, random_state=0).fit((X, labels))
    mapped = spread.embed(X, "0", perplexity=5.0)
    assert ((60, 60), 50) in reduced
    assert mapped.shape == (60, 2)
    assert np.isfinite(mapped).all()


def test_embed_of_a_misspelt_layer():
    """A layer that the model lacks is refused before any work, with the nearest names."""
    model = nn.Sequential()
    model.add_module("conv1", nn.Linear(4, 4))
    model.add_module("head", nn.Linear(4, 2))
    spread = rs.ActivationSpread(model).fit(samples())
    with pytest.raises(LayerNotFoundError, match=r"no measured layer named 'conv2'. Did you mean 'conv1'"):
        spread.embed(samples()[0], "conv2")


def test_embed_needs_fit():
    """Before fit there is nothing to map with."""
    with pytest.raises(NotFittedError, match="not fitted"):
        rs.ActivationSpread(classifier()).embed(samples()[0], "0")


def test_embed_with_too_few_samples():
    """scikit-learn's own error says that the perplexity is too high."""
    spread = rs.ActivationSpread(classifier()).fit(samples(20))
    with pytest.raises(ValueError, match="perplexity"):
        spread.embed(samples(20)[0], "0")


def test_embed_of_a_layer_with_one_feature():
    """A layer of one feature has a map too."""
    model = nn.Sequential(nn.Linear(4, 1), nn.ReLU(), nn.Linear(1, 2))
    spread = rs.ActivationSpread(model, random_state=0).fit(samples())
    assert spread.embed(samples()[0], "0", perplexity=5).shape == (60, 2)


def test_large_layers_are_measured_on_a_fixed_draw_of_features():
    """A layer with more features than the limit gives nearly the same need, from that many of them."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 2000), nn.ReLU(), nn.Linear(2000, 2))
    known, unknown = samples(200), samples(200, classes=(5, 6), seed=1)
    whole = rs.ActivationSpread(model, random_state=0).fit(known)
    drawn = rs.ActivationSpread(model, random_state=0, max_features=500).fit(known)
    assert drawn.moments_["0"].sums.shape[-1] == 500
    assert drawn.score_layers(unknown).values == pytest.approx(whole.score_layers(unknown).values, abs=0.05)
    assert drawn.score_layers(unknown).values == pytest.approx(drawn.score_layers(unknown).values, rel=1e-12)


@pytest.mark.parametrize("bad", [0, 1.5, True])
def test_max_features_must_be_a_positive_integer(bad):
    """A limit that is no positive integer is refused."""
    with pytest.raises(InvalidDataError, match=r"'max_features' parameter must be a positive integer. Got"):
        rs.ActivationSpread(classifier(), max_features=bad).fit(samples())


def test_autocast_computes_the_activations_in_half_precision_and_the_variances_in_double():
    """The layers put out bfloat16, and what is measured is exactly the variance of what they put out."""
    model, known, unknown = classifier(), samples(400), samples(400, classes=(5, 6), seed=1)
    kinds = set()
    with torch.no_grad():
        model[2].bias += 100  # what all samples share is what bfloat16 sums would drown in
    with model[2].register_forward_hook(lambda _module, _args, output: kinds.add(output.dtype)):
        whole = rs.ActivationSpread(model, random_state=0).fit(known).score_layers(unknown)
        assert kinds == {torch.float32}
        with torch.autocast("cpu", torch.bfloat16):
            half = rs.ActivationSpread(model, random_state=0).fit(known).score_layers(unknown)
        assert kinds == {torch.float32, torch.bfloat16}
    seen = []
    with (
        torch.no_grad(),
        torch.autocast("cpu", torch.bfloat16),
        model[2].register_forward_hook(lambda _module, _args, output: seen.append(output.double())),
    ):
        model(known[0])
    outputs, y = seen[0], torch.tensor(known[1])
    within = np.mean([outputs[y == label].var(dim=0).sum() for label in (0, 1)])
    means = torch.stack([outputs[y == label].mean(dim=0) for label in (0, 1)])
    between = means.var(dim=0).sum() - within / 200
    place = half.layers.index("2")
    np.testing.assert_allclose(half.known[place], within / (within + max(between, 0)), rtol=1e-9)
    np.testing.assert_allclose(half.values[0], whole.values[0], atol=0.02)
    assert not torch.is_autocast_enabled("cpu")
