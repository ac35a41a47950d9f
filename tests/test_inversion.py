"""GradientInverter: descent on the input, alone and as an estimator."""

import numpy as np
import pytest
import torch
from networks import TokenNet, classifier, samples
from sklearn.exceptions import NotFittedError
from torch import Tensor, nn

import retrainscope as rs
from retrainscope.exceptions import InvalidDataError, LayerNotFoundError, UnsupportedModelError
from retrainscope.inversion import invert

WIDE = {"low": -10.0, "high": 10.0}


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


def test_an_invertible_layer_is_inverted():
    """From what an invertible linear map puts out, the input is found again."""
    matrix = torch.tensor([[2.0, 1.0, 0.0], [0.0, 1.0, -1.0], [1.0, 0.0, 1.5]])
    inputs = torch.randn(5, 3)
    result = invert(lambda x: x @ matrix, inputs, torch.zeros(5, 3), **WIDE, step=0.05, max_iter=1500)
    assert result.input_error.max() < 1e-6
    assert result.feature_error.max() < 1e-6
    np.testing.assert_allclose(result.inputs, inputs, atol=1e-3)


def test_what_a_layer_drops_stays_at_the_start():
    """Inputs that the features do not depend on are not rebuilt, and only those are wrong."""
    inputs, start = torch.randn(5, 6), torch.randn(5, 6)
    result = invert(lambda x: x[:, :3], inputs, start, **WIDE, step=0.05, max_iter=800)
    np.testing.assert_allclose(result.inputs[:, :3], inputs[:, :3], atol=1e-3)
    np.testing.assert_array_equal(result.inputs[:, 3:], start[:, 3:])
    np.testing.assert_allclose(result.input_error, (start - inputs)[:, 3:].square().sum(dim=1), rtol=1e-3)


def test_errors_by_hand():
    """The errors are the squared distance of the inputs, and that of the features over their squared norm."""
    inputs, start = torch.tensor([[3.0, 4.0], [1.0, 0.0]]), torch.tensor([[0.0, 0.0], [1.0, 2.0]])
    result = invert(lambda x: 2 * x, inputs, start, **WIDE, step=0.1, max_iter=0)
    assert result.input_error.tolist() == [25.0, 4.0]
    assert result.feature_error.tolist() == [1.0, 4.0]
    assert result.losses.shape == (0,)
    assert result.input_error.dtype == torch.float64


def test_the_loss_before_each_step_is_kept():
    """The first loss is that of the start, and the losses fall."""
    inputs = torch.randn(4, 3)
    result = invert(lambda x: x * 3, inputs, torch.zeros(4, 3), **WIDE, step=0.02, max_iter=40)
    assert result.losses.shape == (40,)
    np.testing.assert_allclose(result.losses[0], 1.0, rtol=1e-6)
    assert (result.losses.diff() < 0).all()
    assert result.feature_error.mean() < result.losses[-1]


def test_the_range_of_the_input_is_kept():
    """What is rebuilt never leaves the range, even where the true input lies beyond it."""
    inputs = torch.tensor([[5.0, -5.0, 0.3]])
    result = invert(lambda x: x, inputs, torch.zeros(1, 3), low=-1.0, high=2.0, step=0.1, max_iter=300)
    np.testing.assert_allclose(result.inputs, [[2.0, -1.0, 0.3]], atol=1e-2)


def test_samples_do_not_touch_each_other():
    """A sample is rebuilt the same alone and beside another one whose features are a thousand times larger."""
    net = classifier(dtype=torch.float64)[:3]
    inputs, start = torch.randn(3, 4).double(), torch.randn(3, 4).double()
    inputs[2] *= 1000
    options = {"low": -1e4, "high": 1e4, "step": 0.1, "max_iter": 30}
    together = invert(net, inputs, start, **options)
    alone = invert(net, inputs[:1], start[:1], **options)
    np.testing.assert_allclose(together.inputs[:1], alone.inputs, rtol=1e-9)
    np.testing.assert_allclose(together.input_error[:1], alone.input_error, rtol=1e-9)


def test_the_scale_of_the_features_does_not_matter():
    """Features that are rescaled lead to the same inputs."""
    inputs, start = torch.randn(3, 4), torch.randn(3, 4)
    options = {**WIDE, "step": 0.1, "max_iter": 30}
    plain = invert(lambda x: x[:, :2], inputs, start, **options)
    scaled = invert(lambda x: x[:, :2] * 2.0**20, inputs, start, **options)
    np.testing.assert_array_equal(plain.inputs, scaled.inputs)


def test_a_silent_layer_leaves_finite_errors():
    """Where a layer puts out nothing but zeros for a sample, its error is finite, and the others' the same."""
    inputs, start = torch.tensor([[-1.0, -2.0], [1.0, 2.0]]), torch.full((2, 2), 1e9)
    options = {"low": -1e10, "high": 1e10, "step": 0.1, "max_iter": 5}
    result = invert(torch.relu, inputs, start, **options)
    assert torch.isfinite(result.input_error).all()
    assert torch.isfinite(result.losses).all()
    np.testing.assert_array_equal(result.inputs[1:], invert(torch.relu, inputs[1:], start[1:], **options).inputs)


def test_gradients_are_turned_on():
    """The descent works where the caller has turned gradients off, and leaves them off."""
    with torch.no_grad():
        result = invert(lambda x: x, torch.ones(1, 2), torch.zeros(1, 2), **WIDE, step=0.1, max_iter=3)
        assert not torch.is_grad_enabled()
    assert result.losses[-1] < result.losses[0]


@pytest.mark.parametrize("frozen", [True, False])
def test_a_layer_without_gradient(frozen):
    """A layer that no gradient passes is refused, whether or not its own weights have one."""
    model = nn.Sequential(nn.Linear(4, 4), Rounding(), nn.Linear(4, 3), nn.Linear(3, 2)).requires_grad_(not frozen)
    message = "No gradient flows from the layer to the input: something on the way detaches or rounds"
    with pytest.raises(UnsupportedModelError, match=message):
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
    """Samples come back in the order of X, each the same in every batch size, and the losses are their mean."""
    X, labels = samples(23)
    X = X.double()
    model = classifier(dtype=torch.float64)
    small, large = (
        rs.GradientInverter(model, max_iter=15, batch_size=size, random_state=0).fit((X, labels)).reconstruct(X, "2")
        for size in (4, 256)
    )
    np.testing.assert_allclose(small.inputs, large.inputs, rtol=1e-9)
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
    assert inverter.reconstruct(X, "0").losses.shape == (2,)
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
