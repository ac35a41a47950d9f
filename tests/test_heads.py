"""Heads: which output stands for which class, what goes into a head, and a new one fitted to it."""

import numpy as np
import pytest
import torch
from helpers import content_of, hook_count, unchanged
from networks import classifier, samples
from sklearn.linear_model import LogisticRegression
from torch import Tensor, nn

from retrainscope.batches import Batches, as_batches, ordered_classes
from retrainscope.exceptions import InvalidDataError, LayerNotFoundError, NonFiniteError, UnsupportedModelError
from retrainscope.heads import (
    check_classes,
    check_new_head,
    collect_head_inputs,
    fit_head,
    fitted_head,
    head_inputs,
    output_places,
    own_places,
    predictions_of,
    with_head,
)
from retrainscope.memory import Halving


def features_of(n_classes: int, *, n: int = 90, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Return five features of very different scale and place, the last one constant, and overlapping classes."""
    generator = torch.Generator().manual_seed(seed)
    targets = torch.arange(n) % n_classes
    X = torch.randn(n, 5, generator=generator, dtype=torch.float64) + torch.eye(5, dtype=torch.float64)[targets]
    X = X * torch.tensor([1.0, 100.0, 0.01, 1.0, 0.0]) + torch.tensor([0.0, 5.0, 3.0, -40.0, 7.0])
    return X, targets


def standardised(X: Tensor) -> np.ndarray:
    """Bring each feature to mean 0 and deviation 1, with numpy alone; a constant one to 0."""
    array = X.numpy()
    deviation = array.std(axis=0)
    return (array - array.mean(axis=0)) / np.where(deviation > 1e-9, deviation, 1.0)


def batches_of(data: object, *, batch_size: int = 7) -> Batches:
    return as_batches(data, name="known", batch_size=batch_size, device=torch.device("cpu"), dtype=torch.float32)


# Which output stands for which class


@pytest.mark.parametrize(
    ("classes", "expected"),
    [
        ((0, 1, 2), {0: 0, 1: 1, 2: 2}),
        ((2, 0), {2: 2, 0: 0}),
        ((0, 3), None),
        ((-1, 0), None),
        (("0", "1"), None),
        ((0.0, 1.0), None),
        ((False, True), None),
        ((None,), None),
    ],
)
def test_labels_that_are_places_of_outputs(classes, expected):
    """Whole numbers below the number of outputs are places; anything else does not tell."""
    assert output_places(3, classes) == expected


@pytest.mark.parametrize(
    ("known", "unknown", "expected"),
    [
        ((0, 1, 2), (2, 1), {2: 2, 1: 1}),
        ((0, 1), (0, 1, 2), None),  # an output for 2 is there, but nothing was learnt about it
        ((0, 1, 5), (0, 1), None),  # so the labels are no places
        (("a", "b"), ("a", "b"), None),
        ((None,), (0, 1), None),
    ],
)
def test_a_head_is_its_own_for_known_classes_only(known, unknown, expected):
    """A model's own head serves where the unknown classes are known ones and labels are places."""
    assert own_places(3, known, unknown) == expected


def test_classes_are_sorted_if_they_compare():
    """Labels come sorted and once each, or as they came where they do not compare."""
    assert ordered_classes(["b", "a", "b"]) == ("a", "b")
    assert ordered_classes([3, "a", 3]) == (3, "a")
    assert ordered_classes([None, None]) == (None,)


def test_classes_that_nothing_can_be_learnt_from():
    """Data without labels, and data of one class, are refused by name."""
    check_classes((0, 1), "unknown")
    with pytest.raises(InvalidDataError, match=r"The unknown data has no labels.*Give \(X, y\)"):
        check_classes((None,), "unknown")
    with pytest.raises(InvalidDataError, match=r"The known data has one class \('cat'\); at least two"):
        check_classes(("cat",), "known")


# Outputs, and what goes into the head


class Wrapped(nn.Module):
    """Returns what a function makes of a classifier's outputs."""

    def __init__(self, wrap: object) -> None:
        super().__init__()
        self.net, self.wrap = classifier(), wrap

    def forward(self, x: Tensor) -> object:
        return self.wrap(self.net(x))


@pytest.mark.parametrize(
    "wrap",
    [
        lambda out: (out, torch.zeros(1)),
        lambda out: {"loss": torch.zeros(()), "logits": out},
        lambda out: [torch.arange(3), out],
    ],
)
def test_outputs_in_any_wrapping(wrap):
    """Class scores are found in the tuples, lists and mappings that models return."""
    model, X = Wrapped(wrap), samples()[0]
    assert torch.equal(predictions_of(model, X), model.net(X))


@pytest.mark.parametrize(
    ("wrap", "got"),
    [
        (lambda out: out[:, 0], r"shape \(n_samples, \)"),
        (lambda out: out[:, None], r"shape \(n_samples, 1, 3\)"),
        (lambda out: out.argmax(dim=1), "no tensor"),
        (lambda out: None, "no tensor"),
    ],
)
def test_outputs_that_are_no_class_scores(wrap, got):
    """A model that does not return one row of scores a sample is refused, with the shape that it returns."""
    with pytest.raises(UnsupportedModelError, match=rf"one row of class scores a sample.*Got {got}"):
        predictions_of(Wrapped(wrap), samples()[0])


def test_what_goes_into_the_head():
    """The head's input and the model's output are those of the forward pass, and no hook is left."""
    model, X = classifier(), samples()[0]
    features, outputs = head_inputs(model, "4", X)
    assert torch.equal(features, model[:4](X))
    assert torch.equal(outputs, model(X))
    assert features.requires_grad
    assert hook_count(model) == 0


def test_what_goes_into_a_convolution_is_flattened():
    """Features that are maps come as one row a sample."""
    model = nn.Sequential(nn.Unflatten(1, (1, 2, 2)), nn.Conv2d(1, 5, 1), nn.Conv2d(5, 3, 2), nn.Flatten())
    features, outputs = head_inputs(model, "2", samples()[0])
    assert features.shape == (60, 20)
    assert outputs.shape == (60, 3)


@pytest.mark.parametrize(
    ("call", "got"),
    [
        (lambda head, x: head(input=x), "NoneType for 60"),
        (lambda head, x: head(x[:1]).expand(60, -1), r"\(1, 4\) for 60"),
        (lambda head, x: head.forward(x), "NoneType for 60"),  # as good as never called
    ],
)
def test_a_head_that_takes_something_else(call, got):
    """A head that does not take one tensor with one row a sample is refused, and no hook is left."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = nn.Linear(4, 3)

        def forward(self, x):
            return call(self.head, x)

    model = Net()
    with pytest.raises(UnsupportedModelError, match=rf"'head' must take one tensor.*Got {got} samples.*head="):
        head_inputs(model, "head", samples()[0])
    assert hook_count(model) == 0


def test_a_head_that_is_not_there():
    """A misspelt head is refused with the nearest name."""
    model = nn.Sequential()
    model.add_module("classifier", nn.Linear(4, 3))
    with pytest.raises(LayerNotFoundError, match=r"no head named 'clasifier'. Did you mean 'classifier'"):
        head_inputs(model, "clasifier", samples()[0])


def test_head_inputs_of_all_data():
    """Features and labels of whole data come in its order, whatever the batches, and are the forward pass's."""
    model, (X, labels) = nn.Sequential(*classifier()[:3], nn.ReLU(inplace=True), nn.Linear(6, 3)), samples()
    with unchanged(model):
        features, found = collect_head_inputs(model, "4", batches_of((X, labels)), Halving())
    torch.testing.assert_close(features, model[:4](X).detach())
    assert found == labels
    assert not features.requires_grad
    assert collect_head_inputs(model, "4", batches_of(X), Halving())[1] == [None] * 60


# Fitting a head


@pytest.mark.parametrize("n_classes", [2, 3, 4])
def test_a_fitted_head_decides_as_scikit_learn(n_classes):
    """Probabilities and decisions are those of scikit-learn's LogisticRegression on standardised features."""
    X, targets = features_of(n_classes)
    head = fit_head(X, targets, n_classes)
    expected = LogisticRegression(max_iter=2000).fit(standardised(X), targets.numpy())
    with torch.no_grad():
        found = head(X)
    assert head.weight.shape == (n_classes, 5)
    np.testing.assert_array_equal(found.argmax(dim=1).numpy(), expected.predict(standardised(X)))
    np.testing.assert_allclose(found.softmax(dim=1).numpy(), expected.predict_proba(standardised(X)), atol=1e-6)


@pytest.mark.parametrize("n_classes", [2, 3])
def test_a_fitted_head_is_at_the_minimum(n_classes):
    """Where the penalised loss is smallest its gradient vanishes: X'(p - y) + w = 0 for standardised features."""
    X, targets = features_of(n_classes)
    Z, truth = standardised(X), np.eye(n_classes)[targets.numpy()]
    head = fit_head(X, targets, n_classes)
    with torch.no_grad():
        weight = (head.weight * X.std(dim=0, correction=0)).numpy()
        residual = head(X).softmax(dim=1).numpy() - truth
    if n_classes == 2:  # there the penalty is on the one vector that is the difference of the two rows
        weight = weight * 2
    gradient = residual.T @ Z + weight
    np.testing.assert_allclose(gradient[:, :4], 0, atol=0.02)  # of terms that sum to tens
    np.testing.assert_allclose(residual.sum(axis=0), 0, atol=0.02)
    assert np.abs(truth.T @ Z).max() > 10


def test_a_constant_feature_says_nothing():
    """A feature that never changes makes no difference to the decisions."""
    X, targets = features_of(3)
    with torch.no_grad():
        with_it, without = fit_head(X, targets, 3)(X), fit_head(X[:, :4], targets, 3)(X[:, :4])
    torch.testing.assert_close(with_it.softmax(dim=1), without.softmax(dim=1), atol=1e-4, rtol=0)
    same = fit_head(torch.ones(6, 2), torch.arange(6) % 3, 3)
    assert all(torch.isfinite(parameter).all() for parameter in same.parameters())


@pytest.mark.parametrize("n_classes", [2, 3])
def test_the_scale_of_features_does_not_matter(n_classes):
    """Features in other units, and from another origin, give the same probabilities."""
    X, targets = features_of(n_classes)
    other = X * torch.tensor([1e-4, 10.0, 1e4, 3.0, 1.0]) - 17
    with torch.no_grad():
        first, second = fit_head(X, targets, n_classes)(X), fit_head(other, targets, n_classes)(other)
    torch.testing.assert_close(first.softmax(dim=1), second.softmax(dim=1), atol=1e-4, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_a_fitted_head_fits_the_features(dtype):
    """A head is of the type of the features, can be trained, and fits from features that carry a graph."""
    X, targets = features_of(3)
    X = (X - X.mean(dim=0)).to(dtype).requires_grad_()
    head = fit_head(X, targets, 3)
    assert head(X).dtype == head.weight.dtype == dtype
    assert all(parameter.requires_grad and parameter.is_leaf for parameter in head.parameters())
    assert (head(X).argmax(dim=1) == targets).float().mean() > 0.5


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_features_that_are_no_numbers(bad):
    """NaN or infinity in what goes into a head is refused, with what may help."""
    X, targets = features_of(2)
    X[3, 1] = bad
    with pytest.raises(NonFiniteError, match=r"goes into the head has NaN or infinity.*model.float\(\)"):
        fit_head(X, targets, 2)


def test_outputs_follow_the_classes_given():
    """The outputs of a head stand in the order of the classes, whatever the labels."""
    X, targets = features_of(3)
    labels = [("x", "y", "z")[target] for target in targets]
    one, other = fitted_head(X, labels, ("x", "y", "z")), fitted_head(X, labels, ("z", "x", "y"))
    with torch.no_grad():
        torch.testing.assert_close(one(X), other(X)[:, [1, 2, 0]], atol=1e-2, rtol=1e-3)


# A new head in place


def test_a_new_head_is_in_a_copy():
    """A model with a new head is a copy: neither the model nor the head given changes when the copy is trained."""
    model, linear = classifier(), nn.Linear(6, 5)
    before = content_of(linear.weight)
    with unchanged(model):
        renewed = with_head(model, "4", linear)
        with torch.no_grad():
            for parameter in renewed.parameters():
                parameter.zero_()
    assert content_of(linear.weight) == before
    assert [name for name, _ in renewed.named_parameters()] == [name for name, _ in model.named_parameters()]
    assert renewed(samples()[0]).shape == (60, 5)


def test_a_new_head_does_what_it_was_fitted_for():
    """A model with a new head returns what that makes of the features."""
    model, X = classifier(), samples()[0]
    linear = nn.Linear(6, 5)
    assert torch.equal(with_head(model, "4", linear)(X), linear(model[:4](X)))


def test_heads_that_a_new_one_cannot_replace():
    """A head that is no linear layer, or takes other features, is refused with what to do."""
    model = nn.Sequential(nn.Unflatten(1, (1, 2, 2)), nn.Conv2d(1, 5, 1), nn.Conv2d(5, 3, 2), nn.Flatten())
    with pytest.raises(UnsupportedModelError, match=r"The head '2' is a Conv2d.*nn.Linear only.*head="):
        with_head(model, "2", nn.Linear(20, 3))
    with pytest.raises(UnsupportedModelError, match=r"The head '4' takes 6 features, and 12 go into it.*head="):
        with_head(classifier(), "4", nn.Linear(12, 3))
    with pytest.raises(LayerNotFoundError, match="no head named '7'"):
        with_head(classifier(), "7", nn.Linear(6, 3))


class Twice(nn.Module):
    """A classifier inside another module, which calls its head by a second name."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = classifier()
        self.head = self.backbone[-1]

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.backbone[:-1](x))


def test_a_new_head_takes_all_names():
    """Where the head has two names, the new one has both, so that it runs whichever is called."""
    model, new = Twice(), nn.Linear(6, 2)
    with unchanged(model):
        renewed = with_head(model, "backbone.4", new)
    assert renewed.head is renewed.backbone[-1]
    assert torch.equal(renewed.head.weight, new.weight)
    assert renewed(samples()[0]).shape[1] == 2


def test_a_model_that_does_not_return_its_new_head():
    """What follows the head decides how many scores there are: then a new head is refused, not trained for nothing."""
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 3))
    check_new_head(model[:1], "0", 3, torch.zeros(2, 4))
    with pytest.raises(UnsupportedModelError, match="new head '0' for 2 classes the model returns 3 class scores"):
        check_new_head(model, "0", 2, torch.zeros(2, 4))
