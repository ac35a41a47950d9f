"""Criteria on gradients: known by hand, equal to plain loops, and what moves them."""

import copy
import functools
import pickle

import numpy as np
import pytest
import torch
from networks import classifier, samples
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from retrainscope.criteria import (
    EmpiricalFisher,
    GradientSignalToNoise,
    RelativeGradientNorm,
    relative_norm,
    signal_to_noise,
)
from retrainscope.exceptions import InvalidDataError, UnsupportedModelError
from retrainscope.heads import fitted_head
from retrainscope.outputs import output_of

KINDS = [RelativeGradientNorm, GradientSignalToNoise, EmpiricalFisher]
every_criterion = pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)


@functools.cache
def _trained() -> nn.Sequential:
    model = classifier(dtype=torch.float64)
    X, labels = samples(300, seed=7)
    optimizer = torch.optim.Adam(model.parameters(), 0.02)
    for _ in range(60):
        optimizer.zero_grad()
        cross_entropy(model(X.double()), torch.tensor(labels)).backward()
        optimizer.step()
    optimizer.zero_grad()
    return model


def trained() -> nn.Sequential:
    """Return the classifier, trained for the classes 0 and 1 of `samples`."""
    return copy.deepcopy(_trained())


def linear_body() -> nn.Sequential:
    """Return logits W x: the layer ``"0"`` is W, and the head passes them on."""
    model = nn.Sequential(nn.Linear(4, 3, bias=False), nn.Linear(3, 3, bias=False)).double()
    with torch.no_grad():
        model[1].weight.copy_(torch.eye(3))
    return model


def known_gradients(model: nn.Sequential, X: Tensor, labels: list[int]) -> np.ndarray:
    """Return the gradients of the cross-entropy of W x with respect to W, (softmax(W x) - onehot(y)) xᵀ a sample."""
    W, inputs = model[0].weight.detach().numpy(), X.double().numpy()
    exponentials = np.exp(inputs @ W.T)
    errors = exponentials / exponentials.sum(axis=1, keepdims=True) - np.eye(3)[labels]
    return (errors[:, :, None] * inputs[:, None, :]).reshape(len(X), -1)


def own_gradients(model: nn.Module, names: list[str], X: Tensor, labels: list[int]) -> np.ndarray:
    """Return the gradients of some parameters by a backward pass for each sample."""
    weights, rows = dict(model.named_parameters()), []
    model.eval()
    for x, label in zip(X, labels, strict=True):
        loss = cross_entropy(output_of(model, model(x[None].double())), torch.tensor([label]))
        found = torch.autograd.grad(loss, [weights[name] for name in names])
        rows.append(torch.cat([gradient.flatten() for gradient in found]))
    return torch.stack(rows).numpy()


def plain_ratio(gradients: np.ndarray) -> float:
    """Return the squared mean over the variance, averaged over the coordinates."""
    return float((gradients.mean(axis=0) ** 2 / gradients.var(axis=0, ddof=1)).mean())


# The maths


def test_relative_norm_by_hand():
    """The norm of (3, 4) over that of (0, 2) is 5 / 2; nothing is relative to weights of 0, or to none."""
    assert relative_norm(torch.tensor([3.0, 4.0]), torch.tensor([0.0, 2.0])) == 2.5
    assert np.isnan(relative_norm(torch.ones(2), torch.zeros(2)))
    assert np.isnan(relative_norm(torch.zeros(0), torch.zeros(0)))


def test_signal_to_noise_from_sums():
    """From sums and sums of squares it is what the gradients themselves give, less what the sample size adds."""
    rng = np.random.default_rng(0)
    gradients = rng.normal(0.3, 1.0, size=(20, 50)) * np.geomspace(1e-6, 1e6, 50)
    sums, squares = gradients.sum(axis=0), (gradients**2).sum(axis=0)
    found = signal_to_noise(sums, squares, np.array(20.0), 20)
    np.testing.assert_allclose(found, plain_ratio(gradients), rtol=1e-4)
    np.testing.assert_allclose(signal_to_noise(sums, squares, np.array(20.0), 5) - found, 1 / 5 - 1 / 20)


def test_signal_to_noise_does_not_tell_the_sample_size():
    """Gradients without a signal, and such with one, give on average the same from few samples as from many."""
    rng = np.random.default_rng(0)
    for mean in (0.0, 0.5):
        found = []
        for n in (50, 500):
            gradients = rng.normal(mean, 1.0, size=(n, 2_000))
            sums, squares = gradients.sum(axis=0), (gradients**2).sum(axis=0)
            found.append(float(signal_to_noise(sums, squares, np.array(float(n)), 20)))
        np.testing.assert_allclose(found, mean**2 + 1 / 20, rtol=0.15)


def test_signal_to_noise_where_nothing_varies_or_nothing_is():
    """Coordinates without a gradient count as 0, equal gradients are bounded, and no gradient at all is NaN."""
    gradients = np.array([[2.0, 0.0], [4.0, 0.0]])
    two = np.array(2.0)
    np.testing.assert_allclose(
        signal_to_noise(gradients.sum(axis=0), (gradients**2).sum(axis=0), two, 2), 9 / 2 / 2, rtol=1e-4
    )
    assert signal_to_noise(np.array([6.0]), np.array([18.0]), two, 2) == pytest.approx(1e6)
    assert np.isnan(signal_to_noise(np.zeros(3), np.zeros(3), two, 2))
    assert np.isnan(signal_to_noise(np.zeros(0), np.zeros(0), two, 2))


# Known in closed form


def test_fisher_in_closed_form():
    """For logits W x it is the mean of |softmax - onehot|² |x|², classes weighing alike."""
    model, (X, labels) = linear_body(), samples(50, classes=(0, 1, 2))
    squares = (known_gradients(model, X, labels) ** 2).sum(axis=1)
    by_class = [squares[np.array(labels) == label].mean() for label in (0, 1, 2)]
    scores = EmpiricalFisher(model).fit((X, labels)).score_layers((X, labels))
    np.testing.assert_allclose(scores.known, [np.mean(by_class)], rtol=1e-9)
    np.testing.assert_allclose(scores.unknown_per_class[:, 0], by_class, rtol=1e-9)
    np.testing.assert_allclose(scores.values, 0.0, atol=1e-12)


def test_signal_to_noise_in_closed_form():
    """For logits W x it is that of the known gradients, with the sample size that the smallest class has."""
    model, (X, labels) = linear_body(), samples(60, classes=(0, 1, 2))
    gradients = known_gradients(model, X, labels)
    scores = GradientSignalToNoise(model).fit((X, labels)).score_layers((X, labels))
    np.testing.assert_allclose(scores.known, [plain_ratio(gradients) - 1 / 60 + 1 / 20], rtol=1e-4)
    by_class = [plain_ratio(gradients[np.array(labels) == label]) for label in (0, 1, 2)]
    np.testing.assert_allclose(scores.unknown_per_class[:, 0], by_class, rtol=1e-4)


def test_relative_norm_in_closed_form():
    """For logits W x and mini-batches of one sample it is the mean of |softmax - onehot| |x| / |W|."""
    model, (X, labels) = linear_body(), samples(60, classes=(0, 1, 2))
    norms = np.linalg.norm(known_gradients(model, X, labels), axis=1) / float(model[0].weight.detach().norm())
    scores = RelativeGradientNorm(model, mini_batch_size=1).fit((X, labels)).score_layers((X, labels))
    np.testing.assert_allclose(scores.known, [norms.mean()], rtol=1e-9)
    by_class = [norms[np.array(labels) == label].mean() for label in (0, 1, 2)]
    np.testing.assert_allclose(scores.unknown_per_class[:, 0], by_class, rtol=1e-9)


def test_mini_batches_take_the_mean_gradient():
    """Gradients of different samples partly cancel in a mini-batch, and those of equal samples do not."""
    model, (X, labels) = linear_body(), samples(100)
    alone, together = (
        RelativeGradientNorm(model, mini_batch_size=size, random_state=0).fit((X, labels)).score_layers((X, labels))
        for size in (1, 10)
    )
    assert together.known < 0.8 * alone.known
    one_class = RelativeGradientNorm(model).fit((X, labels)).score_layers((X[:1].expand(100, 4), [1] * 100))
    expected = np.linalg.norm(known_gradients(model, X[:1], [1])) / float(model[0].weight.detach().norm())
    np.testing.assert_allclose(one_class.unknown, [expected], rtol=1e-9)


# Against plain loops


class Normalised(nn.Module):
    """A block with batch normalisation and a weight of zeros, a second layer, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.block = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU())
        self.added = nn.Parameter(torch.zeros(8))
        self.second, self.head = nn.Linear(8, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Return the logits by name."""
        return {"logits": self.head(torch.tanh(self.second(self.block(x) + self.added)))}


def normalised() -> Normalised:
    model = Normalised().double()
    model.block[1].running_mean.normal_()
    model.block[1].running_var.uniform_(0.5, 2.0)
    return model


def test_batch_normalisation_and_zeros_do_not_count_in_the_relative_norm():
    """Left out are the parameters of batch normalisation and tensors of zeros; the rest counts as one vector."""
    model, (X, labels) = normalised(), samples(60)
    criterion = RelativeGradientNorm(model, mini_batch_size=1, layers=["block", "second"]).fit((X, labels))
    assert "added" in criterion.layers_.parameters["block"]
    scores = criterion.score_layers((X, labels))
    weights = dict(model.named_parameters())
    for place, names in enumerate((["block.0.weight", "block.0.bias"], ["second.weight", "second.bias"])):
        norms = np.linalg.norm(own_gradients(model, names, X, labels), axis=1)
        size = float(torch.cat([weights[name].detach().flatten() for name in names]).norm())
        np.testing.assert_allclose(scores.known[place], norms.mean() / size, rtol=1e-9)


def test_a_new_head_is_fitted_to_the_other_half():
    """For classes without an output of the model the loss is that of a head fitted to the samples not measured."""
    model, (X, labels) = trained(), samples(40, classes=("a", "b", "c", "d"), seed=1)
    scores = EmpiricalFisher(model).fit(samples()).score_layers((X, labels))
    turn = np.arange(40) // 4 % 2  # the classes come in turn, and their samples alternate between the halves
    features = model[:4](X.double()).detach()
    squares = np.empty(40)
    for half in (0, 1):
        fitting = np.flatnonzero(turn != half)
        linear = fitted_head(features[fitting], [labels[row] for row in fitting], ("a", "b", "c", "d"))
        rows = np.flatnonzero(turn == half)
        places = ["abcd".index(labels[row]) for row in rows]
        found = own_gradients(nn.Sequential(*model[:4], linear), ["2.weight", "2.bias"], X[rows], places)
        squares[rows] = (found**2).sum(axis=1)
    np.testing.assert_allclose(scores.unknown[1], squares.mean(), rtol=1e-6)


# What the data decides


@every_criterion
def test_flipped_labels_pull_harder(kind):
    """Where the labels are swapped every layer has a larger value than on the known data."""
    X, labels = samples(120, seed=1)
    criterion = kind(trained(), random_state=0).fit(samples(120))
    scores = criterion.score_layers((X, [1 - label for label in labels]))
    assert (scores.unknown > 2 * scores.known).all()
    assert (scores.interval[:, 0] > 0).all()


@every_criterion
def test_damaged_weights_pull_harder(kind):
    """A layer whose weights were shuffled, which keeps their norm, has a larger value than before on the same data."""
    damaged, data = trained(), samples(120)
    with torch.no_grad():
        weight = damaged[2].weight
        weight.copy_(weight.flatten()[torch.randperm(weight.numel())].reshape(weight.shape))
    whole, broken = (kind(model, random_state=0).fit(data).score_layers(data) for model in (trained(), damaged))
    assert broken.unknown[1] > 1.5 * whole.unknown[1]


@every_criterion
def test_the_number_of_samples_does_not_count(kind):
    """Of the known distribution, few samples have about the same value as many."""
    known, few = samples(200, seed=3), samples(40, seed=4)
    needs = []
    for seed in range(3):
        model = classifier(seed=seed, dtype=torch.float64)
        scores = kind(model, samples_per_class=100, random_state=seed).fit(known).score_layers(few)
        assert scores.n_samples == (200, 40)
        needs.append(scores.values)
    np.testing.assert_allclose(np.mean(needs, axis=0), 0.0, atol=0.2)


@every_criterion
def test_needs_by_class_compare_classes_with_classes(kind):
    """Known classes by themselves have on average no need, although single classes pull harder than all together."""
    needs = []
    for seed in range(4):
        model = trained()
        known, unknown = samples(80, seed=10 + seed), samples(80, seed=20 + seed)
        needs.append(kind(model, random_state=seed).fit(known).score_layers(unknown).per_class)
    np.testing.assert_allclose(np.mean(needs, axis=(0, 1)), 0.0, atol=0.25)


@every_criterion
def test_names_instead_of_numbers_give_both_sides_a_new_head(kind):
    """Known data whose labels are names has on average no need: the known side gets a new head as well."""
    needs = []
    for seed in range(4):
        (X, labels), (other, others) = samples(60, seed=100 + 2 * seed), samples(60, seed=101 + 2 * seed)
        criterion = kind(trained(), random_state=seed).fit((X, labels))
        scores = criterion.score_layers((other, [("zero", "one")[label] for label in others]))
        assert not np.allclose(scores.known, criterion.score_layers((other, others)).known)
        needs.append(scores.values)
    np.testing.assert_allclose(np.mean(needs, axis=0), 0.0, atol=0.3)


@every_criterion
def test_fewer_unknown_classes_are_compared_with_themselves(kind):
    """If the unknown classes are some of the known, the known data is measured on those alone."""
    model, X, labels = classifier(dtype=torch.float64), *samples(90, classes=(0, 1, 2))
    some = [row for row, label in enumerate(labels) if label != 1]
    part = (X[some], [labels[row] for row in some])
    scores = kind(model, random_state=0).fit((X, labels)).score_layers(part)
    assert scores.known_classes == (0, 2)
    np.testing.assert_allclose(scores.values, 0.0, atol=1e-9)


# What moves them though it should not


def test_rescaling_moves_the_measures():
    """Weights rescaled so that the function stays the same change norm and Fisher, and not the signal to noise.

    With W_0 and its bias times c, and W_2 by c: the gradients of layer 0 fall by c and its weights grow by c. Of layer
    2 the bias keeps its gradient, so its need moves as well. This is a limit of the criteria, stated in their
    documentation.
    """
    c = 8.0
    plain, scaled = trained(), trained()
    with torch.no_grad():
        scaled[0].weight.mul_(c)
        scaled[0].bias.mul_(c)
        scaled[2].weight.div_(c)
    known, unknown = samples(100), samples(100, seed=1)
    unknown = (unknown[0] - 1, unknown[1])
    found = {}
    for kind in KINDS:
        found[kind] = [kind(model, random_state=0).fit(known).score_layers(unknown) for model in (plain, scaled)]
    for kind, factor in ((RelativeGradientNorm, c**-2), (EmpiricalFisher, c**-2)):
        before, after = found[kind]
        np.testing.assert_allclose(after.unknown[0], factor * before.unknown[0], rtol=1e-9)
        np.testing.assert_allclose(after.values[0], before.values[0], rtol=1e-6)
        assert after.unknown[1] > 2 * before.unknown[1]
        assert abs(after.values[1] - before.values[1]) > 1e-3
    before, after = found[GradientSignalToNoise]
    np.testing.assert_allclose(after.unknown, before.unknown, rtol=1e-6)


def test_sum_and_mean_differ_by_the_number_of_parameters():
    """The sum of the Fisher information is its mean times the parameters of a layer, and both have the same need."""
    model = trained()
    summed, mean = (
        EmpiricalFisher(model, reduction=reduction, random_state=0).fit(samples()).score_layers(samples(seed=1))
        for reduction in ("sum", "mean")
    )
    np.testing.assert_allclose(summed.unknown, mean.unknown * [40, 54])
    np.testing.assert_allclose(summed.values, mean.values)
    assert "sum" in summed.measure
    assert "mean" in mean.measure


# Models and data


@every_criterion
def test_layers_without_a_gradient(kind):
    """A layer that the outputs do not depend on has NaN, one without parameters too, and the others have a value."""

    class Partly(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.relu, self.aside = nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 6)
            self.head = nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            hidden = self.relu(self.first(x))
            return self.head(hidden + self.aside(hidden).detach())

    names = ["first", "relu", "aside"]
    scores = kind(Partly(), layers=names, random_state=0).fit(samples()).score_layers(samples(seed=1))
    assert np.isfinite(scores.values).tolist() == [True, False, False]
    assert np.isnan(scores.interval[1:]).all()
    assert np.isnan(scores.unknown[1:]).all()


@every_criterion
@pytest.mark.parametrize("labels", [None, {0: "a", 1: "b"}], ids=["own head", "new head"])
def test_fitted_criteria_can_be_pickled(kind, labels):
    """An estimator that was pickled after fit scores as the original does."""
    X, y = samples(60, seed=3)
    known = (X, y if labels is None else [labels[label] for label in y])
    fitted = kind(trained(), samples_per_class=20, random_state=0).fit(known)
    unknown = samples(60, classes=(0, 1), seed=4)
    twin = pickle.loads(pickle.dumps(fitted))
    np.testing.assert_array_equal(twin.score_layers(unknown).values, fitted.score_layers(unknown).values)


@every_criterion
def test_frozen_layers_are_measured(kind):
    """Frozen parameters have the values of those that are not."""
    frozen = trained().requires_grad_(False)
    first, second = (
        kind(model, random_state=0).fit(samples()).score_layers(samples(seed=1)) for model in (trained(), frozen)
    )
    np.testing.assert_array_equal(first.values, second.values)
    assert not any(weight.requires_grad for weight in frozen.parameters())


@every_criterion
def test_recurrent_models(kind):
    """Models whose samples torch can differentiate only one by one are measured as well."""

    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.steps, self.head = nn.GRU(1, 5, batch_first=True), nn.Linear(5, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.steps(x[..., None])[0][:, -1])

    scores = kind(Recurrent(), layers=["steps"], random_state=0).fit(samples()).score_layers(samples(seed=1))
    assert np.isfinite(scores.values).all()


@every_criterion
def test_at_most_so_many_samples_a_class(kind):
    """Of each class so many samples are drawn at random, and all where there are fewer."""
    X, labels = samples(60)
    labels = [0 if row < 7 else 1 for row in range(60)]
    criterion = kind(trained(), samples_per_class=10, random_state=0).fit((X, labels))
    scores = criterion.score_layers((X, labels))
    assert scores.n_samples == (17, 17)
    assert scores.class_sizes == ((7, 10), (7, 10))
    other = kind(trained(), samples_per_class=10, random_state=1).fit((X, labels)).score_layers((X, labels))
    assert not np.array_equal(other.unknown, scores.unknown)


@every_criterion
def test_parameters_are_checked(kind):
    """A number of samples below two is refused before any work."""
    with pytest.raises(InvalidDataError, match="'samples_per_class' parameter must be a positive integer, at least 2"):
        kind(trained(), samples_per_class=1).fit(samples())


def test_own_parameters_are_checked():
    """The parameters of a single criterion are refused with what is allowed."""
    with pytest.raises(InvalidDataError, match=r"'mini_batch_size' parameter must be a positive integer. Got 0"):
        RelativeGradientNorm(trained(), mini_batch_size=0).fit(samples())
    with pytest.raises(InvalidDataError, match=r"'max_parameters' parameter must be a positive integer. Got 0"):
        GradientSignalToNoise(trained(), max_parameters=0).fit(samples())
    with pytest.raises(InvalidDataError, match=r"'reduction' parameter must be 'sum' or 'mean'. Got 'median'"):
        EmpiricalFisher(trained(), reduction="median").fit(samples())


@every_criterion
def test_labels_are_needed(kind):
    """Without labels on a side the error says so, and names what does without."""
    X, labels = samples()
    with pytest.raises(InvalidDataError, match=f"{kind.__name__} needs labels, and the known data has none. Give"):
        kind(trained()).fit(X)
    with pytest.raises(InvalidDataError, match=r"the unknown data has none.*such as ActivationSpread"):
        kind(trained()).fit((X, labels)).score_layers(X)


@every_criterion
def test_a_new_head_needs_two_classes_and_a_linear_head(kind):
    """One unknown class without an output of the model is refused, and so is a head that no linear layer replaces."""
    X, labels = samples()
    with pytest.raises(InvalidDataError, match="The unknown data has one class"):
        kind(trained()).fit((X, labels)).score_layers((X, ["new"] * 60))
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Sequential(nn.Linear(8, 3), nn.Tanh()))
    with pytest.raises(UnsupportedModelError, match="head '2' is a Sequential; a new head"):
        kind(model, head="2").fit((X, labels)).score_layers((X, ["a", "b"] * 30))


@every_criterion
def test_models_without_class_scores_are_refused(kind):
    """A model that returns no row of class scores a sample is refused with the shape."""
    model = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 6), nn.Unflatten(1, (2, 3)))
    with pytest.raises(UnsupportedModelError, match=r"one row of class scores a sample.*Got shape \(n_samples, 2, 3\)"):
        kind(model).fit(samples())


def test_fewer_coordinates_than_parameters():
    """Signal to noise from some of the parameters is near that from all."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 400), nn.Tanh(), nn.Linear(400, 3)).double()
    known, unknown = samples(100), samples(100, seed=1)
    all_of_them, some = (
        GradientSignalToNoise(model, max_parameters=most, random_state=0).fit(known).score_layers(unknown)
        for most in (10**6, 500)
    )
    np.testing.assert_allclose(some.unknown, all_of_them.unknown, rtol=0.15)
    assert not np.array_equal(some.unknown, all_of_them.unknown)
