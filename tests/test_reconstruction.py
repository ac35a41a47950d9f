"""invert_layers: inputs rebuilt from the activations of layers, and what it is made of."""

import numpy as np
import pytest
import torch
from helpers import Apply, Counted, unchanged
from networks import Failing, TokenNet, classifier, samples
from torch import Tensor, nn

import retrainscope as rs
from retrainscope.descent import Descent, NoGradientError
from retrainscope.exceptions import InvalidDataError, LayerNotFoundError, NonFiniteError, UnsupportedModelError
from retrainscope.rebuilding import InputSpace, Inversion, _FeatureLoss, invert
from retrainscope.reconstruction import invert_layers

WIDE = InputSpace(low=-10.0, high=10.0, mean=0.0, std=1.0, variance=1.0)
FIELDS = ("inputs", "input_error", "feature_error", "losses", "n_iter", "diverged")
BOTH = pytest.mark.parametrize("optimizer", ["adam", "lbfgs"])


def inverted(function, inputs, *starts, space=WIDE, seed=0, **options) -> Inversion:
    """Invert a function of the values alone, with Adam unless told otherwise."""
    options = {"optimizer": "adam", **options}
    return invert(lambda x, rows: function(x), inputs, starts, space=space, descent=Descent(**options), seed=seed)


def assert_equal(first: Inversion, second: Inversion, *, rows: slice = slice(None), rtol: float = 0.0) -> None:
    """Fail unless all that two inversions tell of these samples is the same."""
    for name in FIELDS:
        np.testing.assert_allclose(getattr(first, name)[rows], getattr(second, name), rtol=rtol, err_msg=name)


def image_network() -> nn.Sequential:
    """Return a small convolutional network for inputs of shape (n, 2, 6, 6)."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(2, 4, 3), nn.Tanh(), nn.Conv2d(4, 4, 3), nn.Flatten(), nn.Linear(16, 2))


class Shifted(nn.Module):
    """Takes an input and integers, both by keyword, which it adds up."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(4, 6)
        self.head = nn.Linear(6, 2)

    def forward(self, x: Tensor, shift: Tensor) -> Tensor:
        """Return the logits."""
        return self.head(torch.tanh(self.body(x + shift)))


# ---- invert


def test_an_invertible_layer_is_inverted():
    """From what an invertible linear map puts out, the input is found again."""
    matrix = torch.tensor([[2.0, 1.0, 0.0], [0.0, 1.0, -1.0], [1.0, 0.0, 1.5]])
    inputs = torch.randn(5, 3)
    for options in ({"learning_rate": 0.05, "max_iter": 1500}, {"optimizer": "lbfgs", "max_iter": 100}):
        result = inverted(lambda x: x @ matrix, inputs, torch.zeros(5, 3), **options)
        assert result.input_error.max() < 1e-6
        assert result.feature_error.max() < 1e-6
        np.testing.assert_allclose(result.inputs, inputs, atol=1e-3)


@BOTH
def test_what_a_layer_drops_stays_at_the_start(optimizer):
    """Inputs that the features do not depend on are not rebuilt, and only those are wrong."""
    inputs, start = torch.randn(5, 6), torch.randn(5, 6)
    result = inverted(lambda x: x[:, :3], inputs, start, optimizer=optimizer, learning_rate=0.05, max_iter=800)
    np.testing.assert_allclose(result.inputs[:, :3], inputs[:, :3], atol=1e-3)
    np.testing.assert_array_equal(result.inputs[:, 3:], start[:, 3:])
    np.testing.assert_allclose(result.input_error, (start - inputs)[:, 3:].square().sum(dim=1), rtol=1e-3)


def test_errors_by_hand():
    """The errors are the squared distance of the inputs, and that of the features over their squared norm."""
    inputs, start = torch.tensor([[3.0, 4.0], [1.0, 0.0]]), torch.tensor([[0.0, 0.0], [1.0, 2.0]])
    result = inverted(lambda x: 2 * x, inputs, start, learning_rate=1e-12, max_iter=1)
    np.testing.assert_allclose(result.input_error, [25.0, 4.0], rtol=1e-6)
    np.testing.assert_allclose(result.feature_error, [1.0, 4.0], rtol=1e-6)
    np.testing.assert_allclose(result.losses, [[1.0], [4.0]], rtol=1e-6)
    assert result.n_iter.tolist() == [1, 1]
    assert result.diverged.tolist() == [False, False]
    assert result.input_error.dtype == torch.float64


def test_the_loss_before_each_step_is_kept():
    """The first loss is that of the start, and the losses fall."""
    inputs = torch.randn(4, 3)
    result = inverted(lambda x: x * 3, inputs, torch.zeros(4, 3), learning_rate=0.02, max_iter=15)
    assert result.losses.shape == (4, 15)
    np.testing.assert_allclose(result.losses[:, 0], 1.0, rtol=1e-6)
    assert (result.losses.mean(dim=0).diff() < 0).all()
    assert result.feature_error.mean() < result.losses[:, -1].mean()


@BOTH
def test_the_range_of_the_input_is_kept(optimizer):
    """What is rebuilt never leaves the range, even where the true input lies beyond it."""
    inputs = torch.tensor([[5.0, -5.0, 0.3]])
    space = InputSpace(-1.0, 2.0, 0.0, 1.0, 3.0)
    result = inverted(lambda x: x, inputs, torch.zeros(1, 3), space=space, optimizer=optimizer, max_iter=300)
    np.testing.assert_allclose(result.inputs, [[2.0, -1.0, 0.3]], atol=1e-2)


@BOTH
def test_samples_do_not_touch_each_other(optimizer):
    """A sample is rebuilt the same alone and beside another one whose features are a thousand times larger."""
    net = classifier(dtype=torch.float64)[:3].requires_grad_(False)
    inputs, start = torch.randn(3, 4).double(), torch.randn(3, 4).double()
    inputs[2] *= 1000
    options = {"space": InputSpace(-1e4, 1e4, 0.0, 1.0, 4.0), "optimizer": optimizer, "max_iter": 30}
    together = inverted(net, inputs, start, **options)
    assert_equal(together, inverted(net, inputs[:1], start[:1], **options), rows=slice(1), rtol=1e-6)


@BOTH
def test_the_scale_of_the_features_does_not_matter(optimizer):
    """Features that are rescaled lead to the same inputs."""
    inputs, start = torch.randn(3, 4), torch.randn(3, 4)
    plain = inverted(lambda x: x[:, :2], inputs, start, optimizer=optimizer, max_iter=30)
    scaled = inverted(lambda x: x[:, :2] * 2.0**20, inputs, start, optimizer=optimizer, max_iter=30)
    np.testing.assert_array_equal(plain.inputs, scaled.inputs)


def test_a_silent_layer_leaves_finite_errors():
    """Where a layer puts out nothing but zeros for a sample, its error is finite, and the others' the same."""
    inputs, start = torch.tensor([[-1.0, -2.0], [1.0, 2.0]]), torch.full((2, 2), 1e9)
    options = {"space": InputSpace(-1e10, 1e10, 0.0, 1.0, 2.0), "max_iter": 5}
    result = inverted(torch.relu, inputs, start, **options)
    assert torch.isfinite(result.input_error).all()
    assert torch.isfinite(result.losses).all()
    assert_equal(result, inverted(torch.relu, inputs[1:], start[1:], **options), rows=slice(1, 2))


@BOTH
def test_features_and_inputs_of_different_types(optimizer):
    """Features of another precision than the input's are no obstacle, and the precision is the input's."""
    for inner, outer in ((torch.float32, torch.float64), (torch.float64, torch.float32)):
        inputs = torch.randn(3, 4).to(inner)
        result = inverted(lambda x, to=outer: 2 * x.to(to), inputs, torch.zeros(3, 4), optimizer=optimizer)
        assert result.inputs.dtype == inner
        assert result.input_error.max() < 0.01


def test_features_without_a_graph():
    """Features that are cut from the graph, or whose graph does not lead to the input, have no gradient."""
    weight = torch.ones(2, requires_grad=True)
    for function in (Tensor.detach, lambda x: x.detach() * weight):
        with pytest.raises(NoGradientError, match="gradient"):
            inverted(function, torch.ones(2, 2), torch.zeros(2, 2))


def test_features_see_only_the_samples_left():
    """Of a batch only the rows that are not done are run, and the function is told which."""
    seen = []

    def shifted(x: Tensor, rows: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            seen.append((len(x), rows.tolist()))
        return (x + shift[rows]).pow(3)

    shift = torch.tensor([[0.0], [100.0], [200.0]])
    inputs, start = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]), torch.tensor([[9.0, 9], [3, 4], [9, 9]])
    descent = Descent("adam", max_iter=40, n_iter_no_change=10)
    result = invert(shifted, inputs, [start], space=WIDE, descent=descent)
    assert result.n_iter[1] == 20  # the first step counts as a fall, so ten without one are past at the second look
    assert seen[:20] == [(3, [0, 1, 2])] * 20
    assert seen[20] == (2, [0, 2])
    plain = invert(shifted, inputs, [start], space=WIDE, descent=Descent("adam", max_iter=40))
    for row in (0, 2):
        n = int(result.n_iter[row])
        np.testing.assert_allclose(result.losses[row, :n], plain.losses[row, :n], rtol=1e-5)


# ---- Restarts


def two_valleys(x: Tensor) -> Tensor:
    """Return features that are right at the true input alone, and have a false valley below zero."""
    return torch.where(x > 0, x, -1 - 0.5 * (x + 3).square())


@BOTH
def test_of_two_starts_the_better_is_kept_for_each_sample(optimizer):
    """Each sample is taken whole from the start that led to the lower loss for it."""
    inputs = torch.full((3, 1), 2.0)
    first, second = torch.tensor([[1.5], [-3.5], [-2.5]]), torch.tensor([[-3.5], [1.5], [1.0]])
    options = {"optimizer": optimizer, "max_iter": 30, "learning_rate": 0.02}
    apart = [inverted(two_valleys, inputs, start, **options) for start in (first, second)]
    both = inverted(two_valleys, inputs, first, second, **options)
    assert both.inputs.min() > 0
    for row, which in enumerate((0, 1, 1)):
        for name in FIELDS:
            assert torch.equal(getattr(both, name)[row], getattr(apart[which], name)[row])


def test_a_start_that_diverged_loses():
    """A start whose loss was not finite is not kept against one that went well, even if its loss was lower."""
    inputs = torch.tensor([[2.0], [2.0]])

    def walled(x: Tensor) -> Tensor:
        return torch.where((x > 2.05).any(dim=1, keepdim=True), torch.nan, x)

    good, bad = torch.tensor([[-5.0]]), torch.tensor([[1.99]])
    alone = inverted(walled, inputs[:1], bad, max_iter=20, learning_rate=0.3)
    assert alone.diverged.all()
    other = inverted(walled, inputs[:1], good, max_iter=20, learning_rate=0.3)
    assert alone.feature_error < other.feature_error
    for starts in (torch.cat([good, bad]), torch.cat([bad, good])), (torch.cat([bad, good]), torch.cat([good, bad])):
        result = inverted(walled, inputs, *starts, max_iter=20, learning_rate=0.3)
        assert not result.diverged.any()
        np.testing.assert_allclose(result.inputs, torch.cat([other.inputs] * 2), rtol=1e-6)


def test_a_start_without_gradient_loses_against_one_with():
    """Samples that cannot move from one start are rebuilt from the other."""
    inputs, dead, live = torch.ones(2, 2), torch.full((2, 2), -1.0), torch.full((2, 2), 0.5)
    for starts in ((dead, live), (live, dead)):
        assert_equal(inverted(torch.relu, inputs, *starts), inverted(torch.relu, inputs, live))


def test_a_dead_start_alone_is_no_error():
    """Samples that cannot move from their only start stay there: elsewhere there is a gradient."""
    inputs, dead = torch.ones(2, 2), torch.full((2, 2), -1.0)
    result = inverted(torch.relu, inputs, dead)
    np.testing.assert_array_equal(result.inputs, dead)
    np.testing.assert_array_equal(result.feature_error, [1.0, 1.0])


def test_features_without_slope_anywhere_are_refused():
    """Where the gradient is zero at the start and at the true inputs, nothing can be found."""
    with pytest.raises(NoGradientError, match="zero, at the true inputs as well"):
        inverted(torch.round, torch.ones(2, 2), torch.zeros(2, 2), torch.full((2, 2), 3.0))


@BOTH
def test_more_starts_are_never_worse(optimizer):
    """With two starts no sample's loss is higher than with the first alone."""
    X, _ = samples(20)
    one, two = (
        invert_layers(
            classifier(), X, ["2"], descent=Descent(optimizer, max_iter=20, n_init=n_init), random_state=0
        )["2"].feature_error
        for n_init in (1, 2)
    )  # fmt: skip
    assert (two <= one).all()
    assert (two < one).any()


# ---- Priors


def priors_of(x: Tensor, space: InputSpace, **options: float) -> tuple[Tensor, Tensor]:
    """Return the value and the gradient of the priors alone, as the features are those sought."""
    loss = _FeatureLoss(lambda values, rows: values[:, :1] * 0, x, space, Descent(**options), 0)
    return loss(x)


@pytest.mark.parametrize("exponent", [1.0, 2.0, 3.0])
@pytest.mark.parametrize("shape", [(2, 3, 4, 5), (2, 2, 3, 4, 3)])
def test_the_total_variation(shape, exponent):
    """It is the mean over all pixels of the squared differences to the next, summed, to half the exponent."""
    space = InputSpace(-10.0, 10.0, 0.5, 2.0, 1.0)
    x = torch.randn(shape, dtype=torch.float64)
    z = (x.numpy() - 0.5) / 2.0
    squares = np.zeros(shape)
    for place in np.ndindex(*shape):
        for direction in range(2, len(shape)):
            following = list(place)
            following[direction] += 1
            if following[direction] < shape[direction]:
                squares[place] += (z[tuple(following)] - z[place]) ** 2
    expected = 0.3 * (squares ** (exponent / 2)).reshape(shape[0], -1).mean(axis=1)
    value, gradient = priors_of(x, space, tv_weight=0.3, tv_exponent=exponent)
    np.testing.assert_allclose(value, expected, rtol=1e-3)
    assert_slope(lambda x: priors_of(x, space, tv_weight=0.3, tv_exponent=exponent)[0], x, gradient)


@pytest.mark.parametrize("exponent", [1.0, 2.0, 6.0])
def test_the_norm(exponent):
    """It is the mean of the distances from the mean, in standard deviations, to the exponent."""
    space = InputSpace(-10.0, 10.0, 0.5, 2.0, 1.0)
    x = torch.randn(3, 4, dtype=torch.float64)
    value, gradient = priors_of(x, space, norm_weight=0.7, norm_exponent=exponent)
    z = np.abs((x.numpy() - 0.5) / 2.0)
    np.testing.assert_allclose(value, 0.7 * (z**exponent).mean(axis=1), rtol=1e-12)
    slope = 0.7 * exponent * z ** (exponent - 1) * np.sign(x.numpy() - 0.5) / 2.0 / 4
    np.testing.assert_allclose(gradient, slope, rtol=1e-9)


def assert_slope(function, x: Tensor, gradient: Tensor, h: float = 1e-6) -> None:
    """Compare a gradient with finite differences in some random directions."""
    for _ in range(5):
        direction = torch.randn_like(x)
        slope = (function(x + h * direction) - function(x - h * direction)) / (2 * h)
        np.testing.assert_allclose((gradient * direction).flatten(1).sum(dim=1), slope, rtol=1e-4, atol=1e-6)


def test_the_gradient_of_the_whole_loss():
    """The gradient of the features' error and of the priors together is that of finite differences."""
    net = image_network().double().requires_grad_(False)
    inputs, x = torch.randn(2, 3, 2, 6, 6).double()
    descent = Descent(tv_weight=0.1, norm_weight=0.01, norm_exponent=3.0)
    loss = _FeatureLoss(lambda values, rows: net[:3](values), inputs, WIDE, descent, 0)
    losses, gradient = loss(x)
    np.testing.assert_allclose(losses, loss.only(x))
    assert_slope(lambda x: loss(x)[0], x, gradient)
    errors = (net[:3](x) - net[:3](inputs)).square().sum(dim=(1, 2, 3)) / net[:3](inputs).square().sum(dim=(1, 2, 3))
    plain = _FeatureLoss(lambda values, rows: net[:3](values), inputs, WIDE, Descent(), 0)
    np.testing.assert_allclose(plain.only(x), errors)
    np.testing.assert_allclose(plain(x)[0], errors)


@BOTH
def test_priors_do_not_know_the_unit_of_the_input(optimizer):
    """Weights are for standard deviations: inputs in another unit are rebuilt in that unit."""
    net, other = image_network(), image_network()
    with torch.no_grad():
        other[0].weight.mul_(2.0**-5)
    X = torch.randn(4, 2, 6, 6)
    descent = Descent(optimizer, max_iter=10, tv_weight=0.2, norm_weight=0.05)
    plain = invert_layers(net, X, ["2"], descent=descent, random_state=0)["2"]
    scaled = invert_layers(other, X * 2.0**5, ["2"], descent=descent, random_state=0)["2"]
    np.testing.assert_allclose(scaled.inputs / 2.0**5, plain.inputs, rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(scaled.losses, plain.losses, rtol=1e-3)


def test_the_losses_hold_the_priors_and_the_feature_error_does_not():
    """Losses are with the priors, the feature error is without."""
    X = torch.randn(4, 2, 6, 6)
    descent = Descent("lbfgs", max_iter=40, norm_weight=1.0, norm_exponent=2.0)
    found = invert_layers(image_network(), X, ["0"], descent=descent, random_state=0)["0"]
    prior = ((found.inputs - X.mean()) / X.std(correction=0)).square().mean(dim=(1, 2, 3))
    np.testing.assert_allclose(found.feature_error + prior, found.losses[:, -1], rtol=1e-3)


@BOTH
def test_a_strong_total_variation_smooths(optimizer):
    """With a strong prior neighbours differ less than without."""
    X = torch.randn(4, 2, 6, 6)
    rough, smooth = (
        invert_layers(
            image_network(), X, ["2"], random_state=0, descent=Descent(optimizer, max_iter=60, tv_weight=weight)
        )["2"].inputs
        for weight in (0.0, 10.0)
    )  # fmt: skip
    assert smooth.diff(dim=3).square().mean() < 0.1 * rough.diff(dim=3).square().mean()


def test_a_strong_norm_draws_to_the_mean():
    """With a strong norm all that is rebuilt is the mean."""
    X, _ = samples(20)
    descent = Descent("lbfgs", max_iter=60, norm_weight=1e4, norm_exponent=2.0)
    found = invert_layers(classifier(), X, ["0"], descent=descent, random_state=0)["0"]
    np.testing.assert_allclose(found.inputs, np.full((20, 4), X.mean()), atol=0.02)


@pytest.mark.parametrize("options", [{"tv_weight": 0.1}, {"jitter": 1}])
def test_vectors_have_no_neighbours(options):
    """Total variation and jitter need pixels; the error has the shape of what came."""
    message = r"Total variation and jitter are for images .* Got \(20, 4\)\. Set tv_weight and jitter to 0\."
    with pytest.raises(InvalidDataError, match=message):
        invert_layers(classifier(), samples(20)[0], ["0"], descent=Descent("adam", **options))


# ---- Jitter


def test_jitter_shifts_all_samples_alike_round_the_edge():
    """Each step all images are rolled by the same number of pixels, at most as many as asked for."""
    seen = []

    def features(x: Tensor) -> Tensor:
        seen.append(x.detach().clone())
        return x

    place = torch.arange(2.0 * 5 * 7).reshape(1, 2, 5, 7) / 70
    start = torch.cat([place, place + 1])
    inverted(features, start + 3, start, learning_rate=1e-9, max_iter=40, jitter=2)
    offsets = set()
    for x in seen[1:41]:
        possible = [
            (down, across)
            for down in range(-2, 3)
            for across in range(-2, 3)
            if torch.allclose(x, torch.roll(start, (down, across), dims=(2, 3)), atol=1e-3)
        ]
        assert len(possible) == 1
        offsets.add(possible[0])
    assert {down for down, _ in offsets} == {across for _, across in offsets} == {-2, -1, 0, 1, 2}


def test_jitter_is_repeatable():
    """The shifts come from the seed alone: the same again, in any batch size, and others for another seed."""
    X = torch.randn(5, 2, 6, 6)
    options = {"descent": Descent("adam", max_iter=12, jitter=2)}
    first = invert_layers(image_network(), X, ["2"], random_state=0, **options)["2"]
    torch.rand(3)
    again = invert_layers(image_network(), X, ["2"], random_state=0, batch_size=2, **options)["2"]
    assert_equal(first, again, rtol=1e-3)
    shifts = [
        invert(lambda x, _: x, X, [torch.zeros_like(X)], space=WIDE, seed=seed, **options).losses for seed in (0, 1)
    ]
    assert not torch.equal(*shifts)


# ---- Autocast


@BOTH
def test_autocast_searches_in_half_and_measures_in_full_precision(optimizer):
    """The forward pass sees bfloat16, and the errors are those computed anew in single precision."""
    kinds = set()
    net = classifier()

    def watched(x: Tensor) -> Tensor:
        kinds.add(x.dtype)
        return x

    model = nn.Sequential(net[0], Apply(watched), nn.Tanh(), net[2], Apply(watched), net[4])
    X, _ = samples(20)
    descent = Descent(optimizer, max_iter=40, autocast="bfloat16")
    found = invert_layers(model, X, ["3"], descent=descent, random_state=0)["3"]
    assert kinds == {torch.float32, torch.bfloat16}
    with torch.no_grad():
        target, rebuilt = model[:4](X), model[:4](found.inputs)
    errors = (target - rebuilt).square().sum(dim=1) / target.square().sum(dim=1)
    np.testing.assert_allclose(found.feature_error, errors, rtol=1e-4, atol=1e-10)
    np.testing.assert_allclose(found.input_error, (found.inputs - X).double().square().sum(dim=1))
    assert found.feature_error.mean() < 0.1 * found.losses[:, 0].mean()
    assert found.inputs.dtype == torch.float32


# ---- Diverged samples


@BOTH
def test_diverged_samples_do_not_touch_the_others(optimizer):
    """A sample without a finite loss is told, and the others are what they are without it; nothing warns."""
    bad = torch.tensor([9.0, 9.0, 9.0, 9.0])

    def cursed(x: Tensor, rows: Tensor) -> Tensor:
        return (x + 0) @ weight + torch.where(torch.is_grad_enabled() & (rows == 1), torch.nan, 0.0)[:, None]

    # In double precision, as rounding, which depends on the batch and the machine, grows from step to step.
    weight, inputs, start = (torch.randn(size, dtype=torch.float64) for size in ((4, 3), (4, 4), (4, 4)))
    inputs[1] = bad
    descent = Descent(optimizer, max_iter=25)
    result = invert(cursed, inputs, [start], space=WIDE, descent=descent)
    assert result.diverged.tolist() == [False, True, False, False]
    assert torch.equal(result.inputs[1], start[1])
    left = [0, 2, 3]
    others = inverted(lambda x: x @ weight, inputs[left], start[left], optimizer=optimizer, max_iter=25)
    for name in FIELDS:
        np.testing.assert_allclose(getattr(result, name)[left], getattr(others, name), rtol=1e-6, atol=1e-12)


def test_infinite_activations_on_the_way():
    """A layer that overflows on the way to an input stops that sample, and invert_layers does not warn."""
    model = nn.Sequential(Apply(lambda x: torch.where(x > 2.0, torch.inf, x)), nn.Linear(2, 2))
    X = torch.tensor([[1.9, 1.9], [-1.0, -1.5]])
    descent = Descent("adam", max_iter=40, learning_rate=3.0)
    found = invert_layers(model, X, ["0"], descent=descent, low=-4, high=4, random_state=0)["0"]
    assert found.diverged[0]
    assert torch.isfinite(found.inputs).all()


# ---- InputSpace


def test_the_space_of_inputs():
    """Range, mean, spread, and the variance summed over elements are those of all batches together."""
    X = torch.randn(50, 2, 3)
    space = InputSpace.of([X[:20], X[20:]])
    array = X.double().numpy()
    np.testing.assert_allclose(
        [space.low, space.high, space.mean, space.std, space.variance],
        [array.min(), array.max(), array.mean(), array.std(), 6 * array.var()],
    )


@pytest.mark.parametrize("value", [0.0, 0.1, 1e8])
def test_inputs_that_are_all_equal(value):
    """Inputs of one value all over are refused, even where rounding makes them seem to vary."""
    with pytest.raises(InvalidDataError, match="known inputs are all equal, so there is nothing to rebuild"):
        InputSpace.of([torch.full((20, 4), value)])


def test_starts():
    """A start depends on the seed, the sample's place and the number of the try; it lies in the range."""
    space = InputSpace(-1.0, 4.0, 1.0, 2.0, 4.0)
    starts = space.start((3, 4), [0, 7, 2], 5, 0)
    assert starts.shape == (3, 3, 4)
    assert torch.equal(space.start((3, 4), [7], 5, 0)[0], starts[1])
    assert not torch.isclose(space.start((3, 4), [7], 6, 0)[0], starts[1]).all()
    assert not torch.isclose(space.start((3, 4), [7], 5, 1)[0], starts[1]).all()
    many = space.start((50,), range(400), 0, 0)
    assert many.min() == -1
    assert many.max() == 4
    wide = InputSpace(-1e3, 1e3, 1.0, 2.0, 4.0).start((50,), range(400), 0, 0)
    np.testing.assert_allclose([wide.mean(), wide.std()], [1.0, 2.0], atol=0.05)


# ---- invert_layers


@BOTH
def test_the_truth_is_found(optimizer):
    """From layers that drop nothing, the inputs are rebuilt."""
    X = torch.rand(6, 4)
    descent = Descent(optimizer, max_iter=400, learning_rate=0.05)
    found = invert_layers(classifier()[:1].append(nn.Linear(8, 8)), X, ["0", "1"], descent=descent, random_state=0)
    for result in found.values():
        np.testing.assert_allclose(result.inputs, X, atol=0.05)


@BOTH
def test_several_layers_are_as_each_alone(optimizer):
    """Layers in one call are what each is in a call of its own, in the order asked for; a name twice counts once."""
    X, _ = samples(12)
    model, options = classifier(), {"descent": Descent(optimizer, max_iter=15), "random_state": 3}
    together = invert_layers(model, X, ["2", "0", "2"], **options)
    assert list(together) == ["2", "0"]
    for layer, found in together.items():
        assert_equal(found, invert_layers(model, X, [layer], **options)[layer])
    assert_equal(invert_layers(model, X, "2", **options)["2"], together["2"])


@BOTH
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_batch_size_does_not_matter(optimizer, dtype):
    """Samples come back in the order of X, the same in any batch size."""
    X, _ = samples(23)
    steps = 20 if dtype == torch.float64 else 8  # rounding, which depends on the machine, grows from step to step
    model, options = classifier(dtype=dtype), {"descent": Descent(optimizer, max_iter=steps), "random_state": 0}
    large = invert_layers(model, X.to(dtype), ["2"], **options)["2"]
    small = invert_layers(model, X.to(dtype), ["2"], batch_size=4, **options)["2"]
    for name in FIELDS:
        exact = dtype == torch.float64
        tolerance = {"rtol": 1e-6, "atol": 1e-12} if exact else {"rtol": 1e-2, "atol": 1e-4}
        np.testing.assert_allclose(getattr(small, name), getattr(large, name), **tolerance, err_msg=name)
    np.testing.assert_allclose(large.input_error, (large.inputs - X).double().square().sum(dim=1))


def test_a_silent_start_does_not_depend_on_the_batch():
    """A sample whose random start a layer does not answer to is inverted in a batch of one as in any other."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 2), nn.ReLU(), nn.Linear(2, 2))
    X = torch.randn(20, 4)
    large, small = (invert_layers(model, X, ["1"], batch_size=size, random_state=0)["1"] for size in (20, 1))
    np.testing.assert_allclose(small.input_error, large.input_error, rtol=1e-2)


def test_keyword_inputs_are_cut_down_with_the_samples():
    """With samples that are done, the other inputs of those left are still their own."""
    X = torch.randn(12, 4)
    data = {"x": X, "shift": torch.arange(12)[:, None] % 4}
    model, options = Shifted(), {"low": -4, "high": 4, "random_state": 0}
    with torch.no_grad():
        model.body.weight.mul_(0.3)
    stopping = Descent("lbfgs", max_iter=80, n_iter_no_change=8)
    found = invert_layers(model, data, ["body"], descent=stopping, **options)["body"]
    assert len(found.n_iter.unique()) > 1
    assert found.n_iter.max() < 80
    assert (found.n_iter % 10 == 0).all()
    plain = invert_layers(model, data, ["body"], descent=Descent("lbfgs", max_iter=80), **options)["body"]
    assert found.feature_error.max() < 1e-6
    for row, n in enumerate(found.n_iter.tolist()):
        np.testing.assert_allclose(found.losses[row, :n], plain.losses[row, :n], rtol=0.05, atol=1e-6)


def test_the_input_layer_is_rebuilt():
    """With an input layer its output is rebuilt, within its own range, also while samples drop out."""
    model, ids = TokenNet(), torch.randint(0, 10, (20, 3))
    options = {"input_layer": "embedding", "random_state": 0}
    stopping = Descent("lbfgs", max_iter=200, n_iter_no_change=15)
    with unchanged(model):
        found = invert_layers(model, ids, ["mix"], descent=stopping, **options)["mix"]
    with torch.no_grad():
        true = model.embedding(ids)
        np.testing.assert_allclose(found.inputs, true, atol=0.1)
    assert len(found.n_iter.unique()) > 1
    assert found.inputs.min() >= true.min()
    assert found.inputs.max() <= true.max()
    np.testing.assert_allclose(found.input_error, (found.inputs - true).square().sum(dim=(1, 2)), rtol=1e-4)


def test_the_range_is_that_of_the_data_or_as_given():
    """Rebuilt inputs stay within those given, or within low and high."""
    X, _ = samples(20)
    descent = Descent("adam", max_iter=30, learning_rate=1.0)
    found = invert_layers(classifier(), X, ["2"], descent=descent, random_state=0)["2"].inputs
    assert found.min() == X.min()
    assert found.max() == X.max()
    found = invert_layers(classifier(), X, ["2"], descent=descent, low=-0.5, high=0.25, random_state=0)["2"].inputs
    assert found.min() == -0.5
    assert found.max() == 0.25


@pytest.mark.parametrize(("low", "high"), [(1.0, 1.0), (2, -2), (float("nan"), 1.0), (100.0, None)])
def test_an_empty_range(low, high):
    """A range needs low < high; what is not given comes from the data."""
    with pytest.raises(InvalidDataError, match=r"The range of the input must have low < high\. Got "):
        invert_layers(classifier(), samples(20)[0], ["0"], low=low, high=high)


def test_unknown_layers():
    """A layer or an input layer that the model lacks is named with the nearest that it has."""
    X, _ = samples(20)
    with pytest.raises(LayerNotFoundError, match=r"The model has no layer named '7'"):
        invert_layers(classifier(), X, ["0", "7"])
    with pytest.raises(LayerNotFoundError, match=r"no layer named 'embeding'. Did you mean 'embedding'\?"):
        invert_layers(TokenNet(), torch.zeros(4, 3, dtype=torch.long), ["mix"], input_layer="embeding")


def test_data_that_does_not_fit():
    """Whole numbers, several floating inputs, equal ones and NaN in a layer are refused."""
    with pytest.raises(InvalidDataError, match="name the embedding with input_layer="):
        invert_layers(TokenNet(), torch.zeros(4, 3, dtype=torch.long), ["mix"])
    X, _ = samples(20)
    with pytest.raises(InvalidDataError, match=r"rebuilds one floating-point input\. Got x, shift; .*input_layer="):
        invert_layers(Shifted(), {"x": X, "shift": X}, ["body"])
    with pytest.raises(InvalidDataError, match="all equal"):
        invert_layers(classifier(), torch.ones(5, 4), ["0"])
    with pytest.raises(NonFiniteError, match="The layer '0' puts out NaN or infinity"):
        invert_layers(nn.Sequential(Apply(lambda x: x / 0), nn.Linear(4, 2)), X, ["0"])


def test_the_random_state_decides():
    """The same state gives the same inversions, another one others."""
    X, _ = samples(10)
    options = {"descent": Descent("adam", max_iter=5)}
    first, again, other = (
        invert_layers(classifier(), X, ["0"], random_state=state, **options)["0"] for state in (0, 0, 1)
    )
    assert_equal(first, again)
    assert not torch.equal(first.inputs, other.inputs)


def test_a_device_that_is_named():
    """On a device that is named, the same is computed."""
    X, _ = samples(10)
    options = {"descent": Descent("adam", max_iter=12), "random_state": 0}
    plain = invert_layers(classifier(), X, ["0"], **options)["0"]
    assert_equal(plain, invert_layers(classifier(), X, ["0"], device="cpu", **options)["0"])


@pytest.mark.parametrize("disable", [False, True])
def test_progress(monkeypatch, disable):
    """A bar counts the passes of all layers, batches and starts to the end, also where samples stop early."""
    bars = []

    class Bar:
        def __init__(self, what: str, progress: bool | None, total: int | None) -> None:
            self.what, self.total, self.n, self.disable, self.texts = what, total, 0, disable, []
            bars.append(self)

        def __enter__(self) -> "Bar":
            return self

        def __exit__(self, *_: object) -> None:
            pass

        def update(self, n: int) -> None:
            self.n += n

        def set_postfix(self, *, error: str, refresh: bool) -> None:
            self.texts.append(float(error))

    monkeypatch.setattr("retrainscope.reconstruction.progress_bar", Bar)
    descent = Descent("adam", max_iter=25, n_init=2, n_iter_no_change=1, tol=0.9)
    invert_layers(classifier(), samples(10)[0], ["0", "2"], descent=descent, batch_size=5, random_state=0)
    (bar,) = bars
    assert (bar.what, bar.n, bar.total) == ("inverting", 200, 200)
    assert bool(bar.texts) is not disable  # the losses are fetched only for a bar that is seen


# ---- The model is only borrowed


@BOTH
def test_the_model_is_unchanged(optimizer):
    """Bit for bit the model is what it was, parameters that are trained keep that and get no gradient."""
    model = classifier()
    model[0].weight.requires_grad_(False)
    model[2].weight.grad = torch.ones_like(model[2].weight)
    with unchanged(model):
        invert_layers(model, samples(10)[0], ["0", "2"], descent=Descent(optimizer, max_iter=12), random_state=0)
    assert model[4].weight.requires_grad
    assert model[4].weight.grad is None
    assert not model[0].weight.requires_grad


@pytest.mark.parametrize("error", [RuntimeError("broken"), KeyboardInterrupt()])
@pytest.mark.parametrize("at", [1, 2, 9])
def test_the_model_is_unchanged_after_an_error(error, at):
    """Also when the model fails on the way, or the user interrupts, it is left as it was."""
    model = nn.Sequential(nn.Linear(4, 4), Failing(at, error), nn.Linear(4, 3), nn.Linear(3, 2))
    with unchanged(model), pytest.raises(type(error)):
        invert_layers(model, samples(10)[0], ["2"], descent=Descent("adam", max_iter=30))


def test_nothing_after_the_layer_runs():
    """The model runs up to the layer, and no further."""
    before, after = Counted(), Counted()
    model = nn.Sequential(before, nn.Linear(4, 3), after, nn.Linear(3, 2))
    invert_layers(model, samples(10)[0], ["1"], descent=Descent("adam", max_iter=7))
    assert before.calls >= 7
    assert after.calls == 0


def test_in_place_operations_after_the_layer_do_no_harm():
    """What follows a layer in place is not part of its output."""
    torch.manual_seed(0)
    body = [nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2)]
    changing = nn.Sequential(body[0], nn.ReLU(inplace=True), body[2])
    options = {"descent": Descent("adam", max_iter=10), "random_state": 0}
    X, _ = samples(10)
    plain = invert_layers(nn.Sequential(*body), X, ["0", "1"], **options)
    for layer, found in invert_layers(changing, X, ["0", "1"], **options).items():
        assert_equal(found, plain[layer])


@BOTH
def test_half_precision(optimizer):
    """A model in bfloat16 is inverted; the search itself is in single precision."""
    X, _ = samples(12)
    model = classifier(dtype=torch.bfloat16)
    with unchanged(model):
        found = invert_layers(model, X, ["0"], descent=Descent(optimizer, max_iter=60), random_state=0)["0"]
    assert found.inputs.dtype == torch.float32
    assert found.feature_error.mean() < 0.02
    assert not found.diverged.any()


def test_gradients_may_be_off():
    """The caller's no_grad and inference_mode do not matter, and are as before afterwards."""
    X, _ = samples(10)
    options = {"descent": Descent("adam", max_iter=5), "random_state": 0}
    expected = invert_layers(classifier(), X, ["2"], **options)["2"]
    with torch.no_grad():
        assert_equal(invert_layers(classifier(), X, ["2"], **options)["2"], expected)
        assert not torch.is_grad_enabled()
    model = classifier()
    with torch.inference_mode():
        assert_equal(invert_layers(model, X, ["2"], **options)["2"], expected)
        assert torch.is_inference_mode_enabled()


# ---- No gradient


class Cutting(nn.Module):
    """Cuts the graph between two of its modules, not in one."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(4, 4), nn.Linear(4, 3), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits."""
        return self.head(self.second(self.first(x).detach()))


class Rounding(nn.Module):
    """A layer whose slope is zero wherever it has one."""

    def forward(self, x: Tensor) -> Tensor:
        """Return x in whole numbers."""
        return torch.round(3 * x)


class Detaching(nn.Module):
    """A layer that no gradient passes."""

    def forward(self, x: Tensor) -> Tensor:
        """Return x cut from the graph."""
        return x.detach()


class Choosing(nn.Module):
    """A layer that returns the place of the largest element as a number."""

    def forward(self, x: Tensor) -> Tensor:
        """Return the place."""
        return x.argmax(dim=1, keepdim=True).float()


@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize("breaking", [Rounding(), Detaching(), Choosing()])
def test_a_module_that_no_gradient_passes(breaking, frozen):
    """The module where the gradient ends is named, whether or not the weights have gradients of their own."""
    width = 1 if isinstance(breaking, Choosing) else 6
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), breaking, nn.Linear(width, 3), nn.Linear(3, 2))
    model.requires_grad_(not frozen)
    kind = type(breaking).__name__
    message = rf"No gradient flows from the layer '3' to the input: it ends at '2' \({kind}\) or just before it\. Leave"
    with unchanged(model), pytest.raises(UnsupportedModelError, match=message):
        invert_layers(model, samples(10)[0], ["1", "3"], descent=Descent("adam", max_iter=2), random_state=0)


@pytest.mark.parametrize("frozen", [True, False])
def test_a_gradient_that_ends_between_two_modules(frozen):
    """A cut between modules is laid at the module that follows."""
    model = Cutting().requires_grad_(not frozen)
    with pytest.raises(UnsupportedModelError, match=r"it ends at 'second' \(Linear\) or just before it"):
        invert_layers(model, samples(10)[0], ["second"], descent=Descent("adam", max_iter=2))


def test_a_gradient_that_ends_in_the_layer_itself():
    """A block that cuts its own output is named itself."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x).detach()

    model = nn.Sequential(Block(), nn.Linear(3, 2))
    with pytest.raises(UnsupportedModelError, match=r"it ends at '0' \(Block\)"):
        invert_layers(model, samples(10)[0], ["0"], descent=Descent("adam", max_iter=2))


def test_modules_that_return_no_tensor_are_passed_over():
    """A module on the way that returns several tensors does not stop the search for the break."""
    model = nn.Sequential(
        nn.Linear(4, 4), Apply(lambda x: (x, x)), Apply(lambda pair: pair[0].detach()), nn.Linear(4, 2)
    )
    with pytest.raises(UnsupportedModelError, match=r"it ends at '2' \(Apply\)"):
        invert_layers(model, samples(10)[0], ["3"], descent=Descent("adam", max_iter=2))


@pytest.mark.parametrize("breaking", [Rounding(), Detaching()])
def test_modules_beside_the_way_are_not_blamed(breaking):
    """A module that does not depend on the input, as a table of positions, has no part in the break."""

    class Positions(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.positions = nn.Embedding(4, 1)
            self.first, self.breaking, self.second = nn.Linear(4, 4), breaking, nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            places = self.positions(torch.arange(4))[:, 0]
            return self.second(self.breaking(self.first(x) + places))

    with pytest.raises(UnsupportedModelError, match=r"it ends at 'breaking' "):
        invert_layers(Positions(), samples(10)[0], ["second"], descent=Descent("adam", max_iter=2), random_state=0)


@pytest.mark.parametrize("breaking", [Rounding(), Detaching()])
def test_the_input_layer_is_not_blamed(breaking):
    """Where the output of an input layer is rebuilt, the break is sought after it."""

    class Tokens(TokenNet):
        def __init__(self) -> None:
            super().__init__()
            self.breaking = breaking

        def forward(self, ids: Tensor) -> Tensor:
            return self.head(self.mix(self.breaking(self.embedding(ids))).mean(dim=1))

    ids = torch.randint(0, 10, (20, 3))
    with pytest.raises(UnsupportedModelError, match=r"it ends at 'breaking' "):
        invert_layers(
            Tokens(), ids, ["mix"], input_layer="embedding", descent=Descent("adam", max_iter=2), random_state=0
        )


def test_the_public_names():
    """What is needed to invert layers can be had from the package itself."""
    assert rs.invert_layers is invert_layers
    assert rs.Descent is Descent
    assert rs.Inversion is Inversion
    assert rs.InputSpace is InputSpace
