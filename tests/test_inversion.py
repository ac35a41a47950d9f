"""GradientInverter: descent on the input as an estimator."""

from dataclasses import fields

import numpy as np
import pytest
import torch
from helpers import Apply, unchanged
from networks import TokenNet, classifier, samples
from sklearn.base import clone
from sklearn.exceptions import ConvergenceWarning, NotFittedError
from torch import Tensor, nn

import retrainscope as rs
from retrainscope.exceptions import InvalidDataError, LayerNotFoundError, UnsupportedModelError


def fixed_linear(weight: Tensor) -> nn.Linear:
    """Return a linear layer of this weight, without bias."""
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    with torch.no_grad():
        layer.weight.copy_(weight)
    return layer


class Rounding(nn.Module):
    """A layer that no gradient passes."""

    def forward(self, x: Tensor) -> Tensor:
        """Return x cut from the graph."""
        return x.detach()


class TwoInputs(nn.Module):
    """Takes a floating input and integers by keyword, or two floating ones."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(4, 6)
        self.head = nn.Linear(6, 2)

    def forward(self, x: Tensor, shift: Tensor) -> Tensor:
        """Return the logits."""
        return self.head(torch.relu(self.body(x + shift)))


@pytest.mark.parametrize("frozen", [True, False])
def test_a_layer_without_gradient(frozen):
    """A layer that no gradient passes is refused, whether or not its own weights have one."""
    model = nn.Sequential(nn.Linear(4, 4), Rounding(), nn.Linear(4, 3), nn.Linear(3, 2)).requires_grad_(not frozen)
    message = r"No gradient flows from the layer '2' to the input: it ends at '1' \(Rounding\) or just before it"
    with unchanged(model), pytest.raises(UnsupportedModelError, match=message):
        rs.GradientInverter(model, layers=["2"], max_iter=2).fit(samples())


def test_half_of_the_inputs_dropped_is_half_of_the_variance_missed():
    """Reconstructions through the estimator leave just the dropped inputs wrong."""
    model = nn.Sequential(fixed_linear(torch.eye(4)[:2]), fixed_linear(torch.eye(2)))
    X, labels = samples(40)
    inverter = rs.GradientInverter(model, max_iter=400, random_state=0).fit((X, labels))
    result = inverter.reconstruct(X, "0")
    np.testing.assert_allclose(result.inputs[:, :2], X[:, :2], atol=0.02)
    assert (result.inputs[:, 2:] - X[:, 2:]).abs().mean() > 0.5


def test_reconstruct_keeps_order_whatever_the_batches():
    """Samples come back in the order of X, each the same in every batch size."""
    X, labels = samples(23)
    X = X.double()
    model = classifier(dtype=torch.float64)
    small, large = (
        rs.GradientInverter(model, max_iter=10, batch_size=size, random_state=0).fit((X, labels)).reconstruct(X, "2")
        for size in (4, 256)  # few steps, as rounding, which depends on the machine, grows from one to the next
    )
    np.testing.assert_allclose(small.inputs, large.inputs, rtol=1e-9)
    assert small.losses.shape == (23, 10)
    np.testing.assert_allclose(small.input_error, large.input_error, rtol=1e-9)
    np.testing.assert_allclose(small.feature_error, large.feature_error, rtol=1e-9)
    np.testing.assert_allclose(small.losses, large.losses, rtol=1e-6)
    np.testing.assert_allclose(small.input_error, (small.inputs - X).square().sum(dim=1), rtol=1e-9)


def test_every_sample_has_a_start_of_its_own():
    """Two equal samples start from two places, each the same at every layer and for the control."""
    X, labels = samples(20)
    model = nn.Sequential(fixed_linear(torch.zeros(3, 4)), fixed_linear(torch.zeros(3, 3)), nn.Linear(3, 2))
    inverter = rs.GradientInverter(model, max_iter=1, random_state=0).fit((X, labels))
    first, second = inverter.reconstruct(X[:1].expand(2, 4), "0").inputs
    assert not torch.isclose(first, second).any()
    assert torch.equal(inverter.reconstruct(X[1:3], "1").inputs, torch.stack([first, second]))


def test_the_unit_of_the_input_does_not_matter():
    """Inputs in another unit are rebuilt in that unit: start, step and range follow the known data."""
    X, labels = samples(20)
    model, other = classifier(), classifier()
    with torch.no_grad():
        other[0].weight.mul_(2.0**-6)
    options = {"max_iter": 10, "random_state": 0}
    plain = rs.GradientInverter(model, **options).fit((X, labels)).reconstruct(X, "2")
    scaled = rs.GradientInverter(other, **options).fit((X * 2.0**6, labels)).reconstruct(X * 2.0**6, "2")
    np.testing.assert_allclose(scaled.inputs / 2.0**6, plain.inputs, rtol=1e-3, atol=1e-4)


def test_an_error_of_a_hundredth_of_the_variance_counts_as_none():
    """Needs are of the errors with a hundredth of the known input's variance added, summed over its elements."""
    (X, labels), unknown = samples(40), samples(40, seed=1)
    scores = rs.GradientInverter(classifier(), max_iter=5, random_state=0).fit((X, labels)).score_layers(unknown)
    floor = 0.01 * X.double().numpy().var() * 4
    contrast = np.log((scores.unknown + floor) / (scores.known + floor))
    expected = np.log((scores.unknown_reference + floor) / (scores.known_reference + floor))
    np.testing.assert_allclose(scores.values, contrast - expected, atol=1e-9)


def test_reconstruct_keeps_to_the_range_of_the_known_data():
    """What is rebuilt stays within the lowest and the highest value of the known inputs."""
    X, labels = samples(20)
    inverter = rs.GradientInverter(classifier(), max_iter=50, learning_rate=1.0, random_state=0).fit((X, labels))
    rebuilt = inverter.reconstruct(10 * X, "2").inputs
    assert rebuilt.min() >= X.min()
    assert rebuilt.max() <= X.max()


def test_reconstruct_from_the_control():
    """The control is another network: it rebuilds other inputs, and the same ones again."""
    X, labels = samples(20)
    inverter = rs.GradientInverter(classifier(), max_iter=10, random_state=0).fit((X, labels))
    control = inverter.reconstruct(X, "2", control=True)
    assert not torch.equal(control.inputs, inverter.reconstruct(X, "2").inputs)
    assert torch.equal(control.inputs, inverter.reconstruct(X, "2", control=True).inputs)


def test_reconstruct_of_a_layer_that_was_not_measured():
    """Only measured layers can be inverted, and the error has the nearest name."""
    inverter = rs.GradientInverter(classifier(), max_iter=1).fit(samples())
    with pytest.raises(LayerNotFoundError, match=r"no measured layer named '1'. It has '0', '2'"):
        inverter.reconstruct(samples()[0], "1")


def test_reconstruct_needs_fit():
    """Before fit there is no range and no scale to start from."""
    with pytest.raises(NotFittedError, match="not fitted"):
        rs.GradientInverter(classifier()).reconstruct(samples()[0], "0")


@pytest.mark.parametrize("name", ["max_iter", "samples_per_class"])
@pytest.mark.parametrize("value", [0, -1, 2.5, "many"])
def test_counts_must_be_positive_integers(name, value):
    """Steps and samples are counted, and the error repeats what it got."""
    with pytest.raises(InvalidDataError, match=rf"'{name}' parameter must be a positive integer. Got {value!r}"):
        rs.GradientInverter(classifier(), **{name: value}).fit(samples())


def test_counts_may_come_from_numpy():
    """An integer of numpy, as a grid of settings has them, is an integer."""
    X, labels = samples(20)
    counts = {"max_iter": np.int64(2), "samples_per_class": np.int32(5)}
    inverter = rs.GradientInverter(classifier(), random_state=0, **counts).fit((X, labels))
    assert inverter.reconstruct(X, "0").losses.shape == (20, 2)
    assert inverter.known_errors_.class_counts.tolist() == [5, 5]


@pytest.mark.parametrize("value", [0.0, 0.1, 1e8])
def test_constant_inputs(value):
    """Inputs that are all equal leave nothing to rebuild, even where rounding makes them seem to vary."""
    with pytest.raises(InvalidDataError, match="known inputs are all equal, so there is nothing to rebuild"):
        rs.GradientInverter(classifier(), max_iter=1).fit((torch.full((20, 4), value), samples(20)[1]))


@pytest.mark.parametrize("labelled", [True, False])
def test_only_the_first_samples_of_each_class_are_inverted(labelled):
    """At most samples_per_class samples a class are measured, ten times as many without labels."""
    X, labels = samples(50)
    inverter = rs.GradientInverter(classifier(), max_iter=1, samples_per_class=3, batch_size=7, random_state=0)
    known = (X, labels) if labelled else X
    scores = inverter.fit(known).score_layers(known)
    assert scores.n_samples == ((6, 6) if labelled else (30, 30))
    assert scores.measure == "squared error of the input after 1 steps"


def test_errors_of_fit_are_those_of_reconstruct():
    """The known measure is the mean of the squared errors that reconstruct tells, and so is its reference."""
    X, labels = samples(20)
    model = classifier(dtype=torch.float64)
    inverter = rs.GradientInverter(model, max_iter=5, random_state=0).fit((X, labels))
    scores = inverter.score_layers((X, labels))
    for place, layer in enumerate(("0", "2")):
        errors = inverter.reconstruct(X, layer).input_error
        np.testing.assert_allclose(scores.known[place], errors.mean(), rtol=1e-9)
        np.testing.assert_allclose(scores.known_per_class[0, place], errors[::2].mean(), rtol=1e-9)
        errors = inverter.reconstruct(X, layer, control=True).input_error
        np.testing.assert_allclose(scores.known_reference[place], errors.mean(), rtol=1e-9)


def test_need_rises_where_the_layer_drops_what_the_unknown_varies_in():
    """A layer that drops two inputs is in need for data that varies in those, as against data that does not."""
    model = nn.Sequential(fixed_linear(torch.eye(4)[:2]), fixed_linear(torch.eye(2)))
    narrow, wide = torch.randn(40, 4), torch.randn(40, 4)
    narrow[:, 2:] *= 0.1
    wide[:, :2] *= 0.1
    labels = ["a", "b"] * 20
    inverter = rs.GradientInverter(model, max_iter=60, random_state=0).fit((narrow, labels))
    scores = inverter.score_layers((wide, labels))
    assert scores.interval[0, 0] > 0


def test_mapping_with_one_floating_input():
    """Of inputs by keyword the one that is floating is rebuilt, the others stay."""
    X, labels = samples(20)
    data = {"x": X, "shift": torch.arange(20)[:, None] % 3, "labels": labels}
    model = TwoInputs().double()
    inverter = rs.GradientInverter(model, max_iter=5, random_state=0).fit(data)
    rebuilt = inverter.reconstruct(data, "body")
    assert rebuilt.inputs.shape == (20, 4)
    other = {**data, "shift": data["shift"] + 1}
    assert not torch.equal(rebuilt.inputs, inverter.reconstruct(other, "body").inputs)
    assert np.isfinite(inverter.score_layers(data).values).all()


def test_mapping_with_several_floating_inputs():
    """With several floating inputs it is not clear which to rebuild: the error names them and the way out."""
    X, labels = samples(20)
    data = ({"x": X, "shift": X}, labels)
    with pytest.raises(InvalidDataError, match=r"rebuilds one floating-point input. Got x, shift; .*input_layer="):
        rs.GradientInverter(TwoInputs(), max_iter=1).fit(data)


def test_input_layer_is_rebuilt():
    """With an input layer it is that layer's output which is found again, for both networks alike."""
    model = TokenNet()
    ids = torch.randint(0, 10, (20, 3))
    inverter = rs.GradientInverter(model, input_layer="embedding", max_iter=400, random_state=0)
    inverter.fit((ids, torch.arange(20) % 2))
    result = inverter.reconstruct(ids, "mix")
    with torch.no_grad():
        np.testing.assert_allclose(result.inputs, model.embedding(ids), atol=0.05)
    control = inverter.reconstruct(ids, "mix", control=True)
    np.testing.assert_allclose(
        control.input_error, (control.inputs - model.embedding(ids).detach()).square().sum(dim=(1, 2)), rtol=1e-4
    )


@pytest.mark.parametrize("which", ["known", "unknown"])
def test_one_sample_of_a_class_is_too_few(which):
    """A class of one sample is refused with its name before anything is inverted."""
    X, labels = samples(21)
    single = (X, ["lonely", *map(str, labels[1:])])
    inverter = rs.GradientInverter(classifier(), max_iter=10**9)
    message = rf"The {which} class 'lonely' has 1 sample"
    if which == "known":
        with pytest.raises(InvalidDataError, match=message):
            inverter.fit(single)
    else:
        inverter.set_params(max_iter=1).fit((X, labels)).set_params(max_iter=10**9)
        with pytest.raises(InvalidDataError, match=message):
            inverter.score_layers(single)


# ---- How to search


@pytest.mark.parametrize(("name", "value"), [("max_iter", 7), ("optimizer", "lbfgs"), ("n_iter_no_change", 2),
    ("learning_rate", 0.3), ("n_init", 2), ("norm_weight", 0.5), ("autocast", "bfloat16")])  # fmt: skip
def test_parameters_of_the_descent_reach_it(name, value):
    """With each parameter of a `Descent` the estimator rebuilds what invert_layers does with it."""
    X, labels = samples(20)
    inverter = rs.GradientInverter(classifier(), random_state=0, **{"max_iter": 12, "tol": 0.5, name: value})
    found = inverter.fit((X, labels)).reconstruct(X, "2")
    descent = rs.Descent(**{"max_iter": 12, "tol": 0.5, name: value})
    expected = rs.invert_layers(classifier(), X, ["2"], descent=descent, random_state=0)["2"]
    for field in fields(rs.Inversion):
        np.testing.assert_array_equal(getattr(found, field.name), getattr(expected, field.name), err_msg=field.name)


def test_all_parameters_of_the_descent_are_parameters():
    """The estimator has every parameter of a `Descent`, with the same default, and gives them to it."""
    inverter = rs.GradientInverter(classifier(), max_iter=1, random_state=0)
    parameters, other = inverter.get_params(), rs.Descent()
    for field in fields(rs.Descent):
        assert field.name == "max_iter" or parameters[field.name] == getattr(other, field.name)
    values = {
        "optimizer": "adam", "max_iter": 2, "learning_rate": 0.2, "n_init": 2, "tol": 0.03, "n_iter_no_change": 4,
        "tv_weight": 0.1, "tv_exponent": 1.5, "norm_weight": 0.2, "norm_exponent": 3.0, "jitter": 1,
        "autocast": "bfloat16",
    }  # fmt: skip
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(8, 2))
    inverter = rs.GradientInverter(model, random_state=0).set_params(**values)
    twin = clone(inverter)
    assert twin.get_params() == inverter.get_params()
    assert twin.model is model
    twin.fit((torch.randn(8, 1, 4, 4), torch.arange(8) % 2))
    assert twin._descent == rs.Descent(**values)


def test_a_wrong_parameter_of_the_descent():
    """Parameters are looked at when the estimator is fitted, as `Descent` does it."""
    inverter = rs.GradientInverter(classifier(), optimizer="sgd")
    with pytest.raises(InvalidDataError, match=r"The 'optimizer' parameter must be 'adam' or 'lbfgs'\. Got 'sgd'"):
        inverter.fit(samples())
    with pytest.raises(NotFittedError, match="not fitted"):
        inverter.reconstruct(samples()[0], "0")
    with pytest.raises(InvalidDataError, match="Total variation and jitter are for images"):
        rs.GradientInverter(classifier(), tv_weight=1.0).fit(samples())


def test_reconstruct_several_layers():
    """Several layers give an inversion by name, each as it is alone, also with the control."""
    X, labels = samples(20)
    inverter = rs.GradientInverter(classifier(), max_iter=10, random_state=0).fit((X, labels))
    for control in (False, True):
        found = inverter.reconstruct(X, iter(["2", "0"]), control=control)
        assert list(found) == ["2", "0"]
        for layer, result in found.items():
            np.testing.assert_array_equal(result.inputs, inverter.reconstruct(X, layer, control=control).inputs)
    with pytest.raises(LayerNotFoundError, match="no measured layer named '1'"):
        inverter.reconstruct(X, ["0", "1"])


def test_a_reconstruction_that_does_not_fit():
    """Samples of another shape than the known ones are refused with both shapes."""
    inverter = rs.GradientInverter(classifier(), max_iter=1).fit(samples())
    with pytest.raises(InvalidDataError, match="The known and given samples must have the same shape"):
        inverter.reconstruct(torch.randn(5, 3), "0")


# ---- The measure


def test_the_error_of_the_features():
    """With error="feature" the measure is the activations' relative error, and one of a hundredth counts as none."""
    X, labels = samples(20)
    unknown = samples(20, seed=1)
    inverter = rs.GradientInverter(classifier(), error="feature", max_iter=5, random_state=0).fit((X, labels))
    scores = inverter.score_layers(unknown)
    assert scores.unit == "relative to their squared norm"
    assert scores.measure == "squared error of the activations after 5 steps"
    for place, layer in enumerate(("0", "2")):
        errors = inverter.reconstruct(X, layer).feature_error
        np.testing.assert_allclose(scores.known[place], errors.mean(), rtol=1e-5)
        errors = inverter.reconstruct(X, layer, control=True).feature_error
        np.testing.assert_allclose(scores.known_reference[place], errors.mean(), rtol=1e-5)
    contrast = np.log((scores.unknown + 0.01) / (scores.known + 0.01))
    expected = np.log((scores.unknown_reference + 0.01) / (scores.known_reference + 0.01))
    np.testing.assert_allclose(scores.values, contrast - expected, atol=1e-9)


def test_the_unit_of_the_error_of_the_input():
    """The input's error is in its units squared."""
    scores = rs.GradientInverter(classifier(), max_iter=2, random_state=0).fit(samples()).score_layers(samples())
    assert scores.unit == "input units squared, summed"
    assert scores.measure == "squared error of the input after 2 steps"


def test_a_measure_that_is_not_known():
    """The error is one of two, and the message names both."""
    message = r"The 'error' parameter must be 'input' or 'feature'\. Got 'output' instead\."
    with pytest.raises(InvalidDataError, match=message):
        rs.GradientInverter(classifier(), error="output").fit(samples())


# ---- Diverged samples


def overflowing() -> nn.Module:
    """Return a network whose first layer overflows above 1.5, where its random weights may not."""
    torch.manual_seed(0)
    wall = Apply(lambda x: torch.where(x > 1.5, torch.inf, x))
    return nn.Sequential(wall, nn.Linear(4, 3), nn.Linear(3, 2))


def test_diverged_samples_are_told():
    """Samples whose loss was not finite are counted in a warning that names the layer, the network and the data."""
    generator = torch.Generator().manual_seed(0)
    X, labels = 1.4 * torch.rand(20, 4, generator=generator), torch.arange(20) % 2
    X[::2] = 1.49
    inverter = rs.GradientInverter(overflowing(), layers=["1"], max_iter=20, learning_rate=2.0, random_state=0)
    space = rs.InputSpace.of([X])
    assert space.high < 1.5
    inverter.fit((X, labels))  # in the range of the known data nothing overflows, and nothing warns
    inverter.input_space_ = rs.InputSpace(space.low, 9.0, space.mean, space.std, space.variance)
    with pytest.warns(ConvergenceWarning) as caught:
        scores = inverter.score_layers((X, labels))
    found = inverter.reconstruct(X, "1")
    n = int(found.diverged.sum())
    assert n > 0
    texts = [str(warning.message) for warning in caught]
    assert texts[0] == (
        f"{n} of 20 inversions at layer '1' of the model and the unknown data diverged: their loss was not finite. "
        "They were stopped, and what they had reached is measured. Give a smaller learning_rate."
    )
    assert "of the control and the unknown data" in texts[1]
    np.testing.assert_allclose(scores.unknown[0], found.input_error.mean(), rtol=1e-5)
    assert np.isfinite(scores.unknown).all()
