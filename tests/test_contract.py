"""The contract of all estimators: one suite, run on each."""

import pickle
import re

import numpy as np
import pytest
import torch
from helpers import unchanged
from networks import Failing, TokenNet, classifier, samples
from sklearn.base import clone
from sklearn.exceptions import NotFittedError
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import retrainscope as rs
from retrainscope import criteria
from retrainscope.base import LayerEstimator
from retrainscope.criteria.criterion import FeatureCriterion
from retrainscope.exceptions import InvalidDataError, LayerNotFoundError, NonFiniteError, UnsupportedModelError

FAST = {
    rs.ActivationSpread: {},
    rs.GradientInverter: {"optimizer": "adam", "max_iter": 5, "samples_per_class": 15},
    rs.LayerDecoderProbe: {"max_epochs": 3},
    criteria.HScore: {},
    criteria.HiddenStateVariability: {},
    criteria.KNNProbe: {"n_folds": 2},
    criteria.LinearProbe: {"n_folds": 2},
    criteria.LogME: {},
    criteria.TransRate: {},
    rs.TangentProbe: {"samples_per_class": 40},
}
# What they measure does not depend on the batches; the decoders learn from them.
BATCH_FREE = [kind for kind in FAST if kind is not rs.LayerDecoderProbe]
# They measure how well classes are told apart: without labels, or with one class, the answer is an error.
NEEDS_LABELS = {kind for kind in FAST if issubclass(kind, FeatureCriterion)}
# Their measure is a logarithm by itself.
IN_NATS = {criteria.LogME, criteria.TransRate}
# To their measure half an error is added, of two classes of twenty samples in `scored`.
FLOORS = dict.fromkeys((criteria.KNNProbe, criteria.LinearProbe), 0.5 / 40)
# It asks what retraining gains on the unknown data, and of the known data uses no more than the classes: none of that
# is measured, so there is no reference and nothing to refuse. What stands in for these rules is in test_tangent.py.
UNKNOWN_ALONE = {rs.TangentProbe}

every_estimator = pytest.mark.parametrize("kind", FAST, ids=lambda kind: kind.__name__)
comparing = pytest.mark.parametrize(
    "kind", [kind for kind in FAST if kind not in UNKNOWN_ALONE], ids=lambda kind: kind.__name__
)
batch_free = pytest.mark.parametrize("kind", BATCH_FREE, ids=lambda kind: kind.__name__)


def made(kind: type[LayerEstimator], model: nn.Module | None = None, **options: object) -> LayerEstimator:
    """Make an estimator that is quick, in double precision."""
    model = classifier(dtype=torch.float64) if model is None else model
    return kind(model, **({"random_state": 0} | FAST[kind] | options))


def scored(kind: type[LayerEstimator], model: nn.Module | None = None, **options: object) -> rs.LayerScores:
    """Fit on two classes and score three others."""
    return made(kind, model, **options).fit(samples()).score_layers(samples(classes=(3, 4, 5), seed=1))


def assert_equal_scores(first: rs.LayerScores, second: rs.LayerScores, *, rtol: float = 0.0) -> None:
    """Fail unless all numbers are equal."""
    for name in first.__dataclass_fields__:
        one, other = getattr(first, name), getattr(second, name)
        if isinstance(one, np.ndarray):
            assert (one.shape, one.dtype) == (other.shape, other.dtype), name
            np.testing.assert_allclose(one, other, rtol=rtol, atol=rtol, err_msg=name)


def worn_model() -> nn.Module:
    """Return a model whose state is easily lost: mixed modes, batch statistics, gradients, frozen parts."""
    model = nn.Sequential(
        *(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(inplace=True), nn.Dropout(0.5)),
        *(nn.Linear(8, 6), nn.ReLU(inplace=True), nn.Linear(6, 3)),
    )
    model[3].eval()
    model[0].weight.grad = torch.ones(8, 4)
    model[4].requires_grad_(False)
    return model


# As scikit-learn's estimators


@every_estimator
def test_clone_is_for_the_same_model(kind):
    """A clone has the same parameters, the very same model, and is not fitted."""
    estimator = made(kind, layers=["2"], batch_size=7).fit(samples())
    twin = clone(estimator)
    assert type(twin) is kind
    assert twin is not estimator
    for name, value in estimator.get_params().items():
        assert twin.get_params()[name] is value
    assert not hasattr(twin, "layers_")


@every_estimator
def test_parameters_are_got_and_set(kind):
    """Parameters are stored as given, set by name, and not touched by fit; an unknown one is refused."""
    layers = ["2"]
    estimator = made(kind, layers=layers)
    before = estimator.get_params()
    assert before["layers"] is layers
    assert estimator.fit(samples()).get_params() == before
    assert estimator.set_params(batch_size=3) is estimator
    assert estimator.get_params()["batch_size"] == estimator.batch_size == 3
    with pytest.raises(ValueError, match="Invalid parameter 'depth'"):
        estimator.set_params(depth=1)


@every_estimator
def test_repr_names_the_class(kind):
    """An estimator can be printed, as text and in a notebook, before and after fit."""
    estimator = made(kind, batch_size=9)
    for fitted in (estimator, estimator.fit(samples())):
        assert repr(fitted).startswith(f"{kind.__name__}(")
        assert "batch_size=9" in repr(fitted)
        assert kind.__name__ in fitted._repr_html_()


@every_estimator
def test_scoring_needs_fit(kind):
    """Scores before fit are refused with scikit-learn's error."""
    with pytest.raises(NotFittedError, match=f"This {kind.__name__} instance is not fitted yet"):
        made(kind).score_layers(samples())


@every_estimator
def test_fit_returns_itself(kind):
    """Fit returns the estimator, which then knows its layers."""
    estimator = made(kind)
    assert estimator.fit(samples()) is estimator
    assert estimator.layers_.names == ("0", "2")
    assert estimator.layers_.head == "4"


@every_estimator
def test_a_second_fit_forgets_the_first(kind):
    """After fit on other data, with other classes and layers, an estimator is as if it had seen no more than that."""
    other = samples(80, classes=("a", "b", "c"), seed=5)
    twice = made(kind).fit(samples()).set_params(layers=["2"]).fit(other)
    once = made(kind, layers=["2"]).fit(other)
    assert_equal_scores(twice.score_layers(samples(seed=1)), once.score_layers(samples(seed=1)))


@every_estimator
def test_an_estimator_is_fitted_or_not(kind):
    """After a fit that failed halfway the estimator is not fitted, instead of half new and half old."""
    X, labels = samples()
    X[-1] = float("nan")
    estimator = made(kind, batch_size=20).fit(samples())
    with pytest.raises(NonFiniteError):
        estimator.fit((X, labels))
    with pytest.raises(NotFittedError):
        estimator.score_layers(samples())


@every_estimator
def test_fitted_estimators_can_be_pickled(kind):
    """An estimator that was pickled after fit scores as the original does."""
    estimator, unknown = made(kind).fit(samples()), samples(classes=(3, 4, 5), seed=1)
    twin = pickle.loads(pickle.dumps(estimator))
    assert_equal_scores(twin.score_layers(unknown), estimator.score_layers(unknown))


@every_estimator
def test_scoring_changes_nothing(kind):
    """Scores do not depend on what was scored before."""
    estimator = made(kind).fit(samples())
    first = estimator.score_layers(samples(seed=1))
    estimator.score_layers(samples(classes=("x", "y") if kind in NEEDS_LABELS | UNKNOWN_ALONE else ("x",), seed=2))
    assert_equal_scores(estimator.score_layers(samples(seed=1)), first)


# Results


@every_estimator
def test_fields_have_the_documented_shapes(kind):
    """Every field of the scores has the shape that its documentation says, with labels on both sides."""
    scores = scored(kind)
    shapes = {
        **dict.fromkeys(("values", "known", "unknown", "known_reference", "unknown_reference"), (2,)),
        "interval": (2, 2),
        **dict.fromkeys(("per_class", "unknown_per_class", "unknown_per_class_reference"), (3, 2)),
        "per_class_interval": (3, 2, 2),
        **dict.fromkeys(("known_per_class", "known_per_class_reference"), (2, 2)),
    }
    for name, shape in shapes.items():
        value = getattr(scores, name)
        assert value.shape == shape
        assert value.dtype == np.float64
        assert np.isnan(value).all() if kind in UNKNOWN_ALONE and "reference" in name else np.isfinite(value).all()
    assert scores.estimator == kind.__name__
    assert scores.layers == ("0", "2")
    assert scores.classes == (3, 4, 5)
    assert scores.known_classes == (0, 1)
    assert scores.reference_name in (("",) if kind in UNKNOWN_ALONE else ("input", "control"))
    assert scores.measure
    assert scores.unit
    assert all(n > 0 for n in scores.n_samples)


@every_estimator
def test_needs_follow_from_the_measures(kind):
    """The need is the contrast of the raw measures less that of the reference, but for a floor below one percent."""

    def nats(measure):
        return measure if kind in IN_NATS else np.log(measure + FLOORS.get(kind, 0.0))

    scores = scored(kind)
    contrast = nats(scores.unknown) - nats(scores.known)
    expected = 0 if kind in UNKNOWN_ALONE else nats(scores.unknown_reference) - nats(scores.known_reference)
    np.testing.assert_allclose(scores.values, contrast - expected, atol=0.05)
    assert (scores.interval[:, 0] <= scores.values).all()
    assert (scores.values <= scores.interval[:, 1]).all()


@every_estimator
def test_scores_come_back_from_a_file(kind, tmp_path):
    """Scores that were saved and loaded are the same."""
    scores = scored(kind)
    scores.save(tmp_path / "scores.json")
    back = rs.LayerScores.load(tmp_path / "scores.json")
    assert_equal_scores(scores, back)
    assert str(back) == str(scores)


@comparing
def test_data_of_the_known_distribution_has_no_need(kind):
    """Of unknown data that is drawn as the known is, intervals cover 0 about as often as they promise.

    Twelve draws of two layers: were the intervals 90 % ones and the layers independent, less than 17 of 24 would cover
    0 once in a thousand times.
    """
    covering, needs = 0, []
    for draw in range(12):
        model = classifier(seed=draw, dtype=torch.float64)
        known, unknown = samples(120, seed=2 * draw), samples(120, seed=2 * draw + 1)
        scores = made(kind, model, random_state=draw).fit(known).score_layers(unknown)
        covering += ((scores.interval[:, 0] <= 0) & (scores.interval[:, 1] >= 0)).sum()
        needs.append(scores.values)
    assert covering >= 17
    standard_error = np.std(needs, axis=0, ddof=1) / np.sqrt(len(needs))
    assert (np.abs(np.mean(needs, axis=0)) < np.maximum(0.1, 3 * standard_error)).all()


@comparing
def test_rescaling_through_a_relu_moves_no_need(kind):
    """Two layers rescaled so that the function stays the same have the same needs.

    The factor is a power of two, so that floating point adds no difference of its own.
    """
    plain = classifier(dtype=torch.float64)
    scaled = classifier(dtype=torch.float64)
    with torch.no_grad():
        scaled[0].weight.mul_(2.0**10)
        scaled[0].bias.mul_(2.0**10)
        scaled[2].weight.mul_(2.0**-10)
        assert torch.equal(scaled(samples()[0].double()), plain(samples()[0].double()))
    first, second = scored(kind, plain), scored(kind, scaled)
    np.testing.assert_allclose(second.values, first.values, rtol=1e-6)
    np.testing.assert_allclose(second.interval, first.interval, rtol=1e-6)
    np.testing.assert_allclose(second.per_class, first.per_class, rtol=1e-6)


# Randomness and batches


@every_estimator
def test_random_state_decides_all(kind):
    """The same random state, an integer or a RandomState from it, gives the same scores; another one gives others."""
    first = scored(kind)
    torch.manual_seed(99)
    np.random.seed(99)  # noqa: NPY002 -- the global state is what must not matter
    assert_equal_scores(scored(kind), first)
    assert_equal_scores(scored(kind, random_state=np.random.RandomState(0)), first)
    assert not np.array_equal(scored(kind, random_state=1).interval, first.interval)


@every_estimator
def test_without_a_random_state_numpys_global_one_stays(kind):
    """None draws from fresh entropy: numpy's global state decides nothing and is not moved."""
    before = np.random.get_state()[1].copy()  # noqa: NPY002 -- the global state is what is looked at
    first, second = scored(kind, random_state=None), scored(kind, random_state=None)
    assert np.array_equal(before, np.random.get_state()[1])  # noqa: NPY002
    assert not np.array_equal(first.interval, second.interval)


@batch_free
@pytest.mark.parametrize("batch_size", [1, 7, 1000])
def test_batch_size_does_not_matter(kind, batch_size):
    """How many samples go through the model at once changes no number."""
    assert_equal_scores(scored(kind, batch_size=batch_size), scored(kind, batch_size=20), rtol=1e-9)


def as_loader(X: Tensor, labels: list[int]) -> DataLoader:
    """Return a DataLoader in the order of the samples."""
    return DataLoader(TensorDataset(X, torch.tensor(labels)), batch_size=7)


FORMS = {
    "labels in a tensor": lambda X, y: (X, torch.tensor(y)),
    "arrays": lambda X, y: (X.numpy(), np.array(y)),
    "dataset": lambda X, y: TensorDataset(X, torch.tensor(y)),
    "mapping": lambda X, y: {"input": X, "labels": y},
    "double": lambda X, y: (X.double(), y),
}
STREAMS = {
    "loader": as_loader,
    "list of batches": lambda X, y: [(X[:33], y[:33]), (X[33:], y[33:])],
}


@every_estimator
@pytest.mark.parametrize("form", FORMS)
def test_form_of_the_data_does_not_matter(kind, form):
    """Tensors, arrays, data sets and mappings of the same samples give the same scores."""
    estimator = made(kind).fit(FORMS[form](*samples()))
    scores = estimator.score_layers(FORMS[form](*samples(classes=(3, 4, 5), seed=1)))
    assert_equal_scores(scores, scored(kind))


@batch_free
@pytest.mark.parametrize("form", STREAMS)
def test_streams_give_the_same(kind, form):
    """A DataLoader, or a list of batches, gives what the samples in one tensor give."""
    estimator = made(kind).fit(STREAMS[form](*samples()))
    scores = estimator.score_layers(STREAMS[form](*samples(classes=(3, 4, 5), seed=1)))
    assert_equal_scores(scores, scored(kind), rtol=1e-9)


@every_estimator
@pytest.mark.parametrize("form", STREAMS)
def test_streams_repeat_themselves(kind, form):
    """The same stream gives the same scores again, from all of its samples."""
    stream = STREAMS[form](*samples())
    first, again = (made(kind).fit(stream).score_layers(stream) for _ in range(2))
    assert_equal_scores(first, again)
    assert first.classes == (0, 1)


@every_estimator
def test_labels_may_be_strings(kind):
    """Labels are names: strings give what integers in the same order give."""
    names = made(kind).fit(samples(classes=("a", "b"))).score_layers(samples(classes=("c", "d", "e"), seed=1))
    assert names.classes == ("c", "d", "e")
    assert names.known_classes == ("a", "b")
    assert_equal_scores(names, scored(kind))


@every_estimator
@pytest.mark.parametrize("unlabelled", ["known", "unknown", "both"])
def test_labels_may_be_missing(kind, unlabelled):
    """Without labels on a side there are needs for the layers, and none by class; or an error that says which side."""
    known, unknown = samples(), samples(seed=1)
    known = known if unlabelled == "unknown" else known[0]
    unknown = unknown if unlabelled == "known" else unknown[0]
    if kind in NEEDS_LABELS:
        side = "unknown" if unlabelled == "unknown" else "known"
        with pytest.raises(InvalidDataError, match=rf"needs labels, and the {side} data has none. Give \(X, y\)"):
            made(kind).fit(known).score_layers(unknown)
        return
    if kind in UNKNOWN_ALONE and unlabelled != "known":
        with pytest.raises(
            InvalidDataError, match=r"The unknown data has no labels, and this needs them. Give \(X, y\)"
        ):
            made(kind).fit(known).score_layers(unknown)
        return
    scores = made(kind).fit(known).score_layers(unknown)
    assert np.isfinite(scores.values).all()
    assert np.isfinite(scores.interval).all()
    assert scores.known_classes == ()
    if kind in UNKNOWN_ALONE:
        assert scores.classes == (0, 1)
        return
    assert scores.classes == ()
    assert scores.per_class.shape == (0, 2)


# What is borrowed is given back


@every_estimator
def test_model_and_data_are_left_alone(kind):
    """After fit, scores and reconstruction the model, the data and the global random states are as before."""
    model, (X, labels) = worn_model(), samples()
    copy = X.clone()
    estimator = made(kind, model)
    with unchanged(model):
        estimator.fit((X, labels)).score_layers((X, labels))
        if hasattr(estimator, "reconstruct"):
            estimator.reconstruct(X, "4")
            estimator.reconstruct(X, "4", control=True)
        if hasattr(estimator, "embed"):
            estimator.embed(X, "4", perplexity=5.0)
    assert torch.equal(X, copy)


@every_estimator
@pytest.mark.parametrize("error", [RuntimeError("boom"), KeyboardInterrupt("boom")], ids=lambda e: type(e).__name__)
def test_model_is_given_back_after_any_error(kind, error):
    """Whichever call of the model fails, in fit or in scoring, the model is as before and the error comes through."""

    def attempt(at: int) -> Failing:
        failing, model = Failing(at, error), worn_model()
        model.insert(2, failing)
        with unchanged(model):
            estimator = made(kind, model, batch_size=30, layers=["0", "5"])
            if at == 0:
                estimator.fit(samples()).score_layers(samples(seed=1))
                return failing
            with pytest.raises(type(error), match="boom") as caught:
                estimator.fit(samples()).score_layers(samples(seed=1))
        assert caught.value is error
        return failing

    n_calls = attempt(0).calls[0]  # never fails: counting begins at 1
    assert n_calls > 4
    for at in {*range(1, min(n_calls, 6)), *np.linspace(1, n_calls, 8, dtype=int).tolist()}:
        assert attempt(at).calls[0] == at


@every_estimator
@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_gradients_may_be_turned_off_outside(kind, context):
    """Inside no_grad and inference_mode the scores are the same, and afterwards gradients are as they were."""
    expected = scored(kind)
    model = classifier(dtype=torch.float64)
    with context():
        scores = scored(kind, model)
        assert not torch.is_grad_enabled()
    assert_equal_scores(scores, expected)


@every_estimator
def test_device_by_name(kind):
    """The device may be named, and the device of the model changes nothing."""
    assert_equal_scores(scored(kind, device="cpu"), scored(kind))


@every_estimator
def test_progress_is_shown_when_asked(kind, capsys):
    """Bars are written to stderr if progress is True; neither False nor None writes where no terminal is."""
    for progress in (False, None):
        scored(kind, progress=progress)
    assert capsys.readouterr().err == ""
    scored(kind, progress=True)
    assert ("gradients" if kind in UNKNOWN_ALONE else "known") in capsys.readouterr().err


# What is refused


@every_estimator
def test_nan_in_the_inputs(kind):
    """NaN or infinity in the inputs is refused, with the set, the batch and the sample."""
    X, labels = samples()
    X[25, 2] = float("inf")
    with pytest.raises(NonFiniteError, match="The known data has NaN or infinity in batch 2, first in sample 25 "):
        made(kind, batch_size=10).fit((X, labels))
    estimator = made(kind, batch_size=10).fit(samples())
    with pytest.raises(NonFiniteError, match="The unknown data has NaN or infinity in batch 2, first in sample 25 "):
        estimator.score_layers((X, labels))


@comparing
def test_nan_in_the_activations(kind):
    """NaN or infinity in a layer's output is refused with the layer's name, at whichever sample it comes up."""
    broken = classifier()
    with torch.no_grad():
        broken[2].weight[0, 0] = float("nan")
    with pytest.raises(NonFiniteError, match="The layer '2' puts out NaN or infinity"):
        made(kind, broken).fit(samples())
    summing, (X, labels) = classifier(), samples()
    nn.init.ones_(summing[0].weight)
    X[-1] = 3e38
    with pytest.raises(NonFiniteError, match="The layer '0' puts out NaN or infinity"):
        made(kind, summing).fit((X, labels))


@every_estimator
def test_shapes_must_agree(kind):
    """Unknown samples of another shape than the known are refused with both shapes."""
    X, labels = samples()
    estimator = made(kind).fit((X, labels))
    with pytest.raises(InvalidDataError, match=r"must have the same shape. Got \(4,\) and \(5,\)"):
        estimator.score_layers((torch.zeros(60, 5), labels))
    with pytest.raises(InvalidDataError, match=r"must have the same shape. Got \(4,\) and {'input': \(4,\)}"):
        estimator.score_layers({"input": X, "labels": labels})


@every_estimator
@pytest.mark.parametrize("side", ["known", "unknown"])
def test_a_class_with_one_sample(kind, side):
    """A class of a single sample is refused with its name and what is needed."""
    X, labels = samples()
    single = (X, ["lonely", *map(str, labels[1:])])
    estimator = made(kind)
    if kind in UNKNOWN_ALONE and side == "known":
        assert estimator.fit(single).score_layers((X, labels)).class_sizes[0] == (1, 30)
        return
    message = rf"The {side} class 'lonely' has 1 sample; at least \d a class are needed. Add samples, or leave"
    if side == "unknown":
        estimator.fit((X, labels))
    with pytest.raises(InvalidDataError, match=message):
        estimator.fit(single) if side == "known" else estimator.score_layers(single)


@comparing
def test_several_classes_with_one_sample(kind):
    """Of several classes that are too small the first is named and the others are counted."""
    X, labels = samples()
    with pytest.raises(InvalidDataError, match="class 'x' has 1 sample, and 1 more classes are as small"):
        made(kind).fit((X, ["x", "y", *map(str, labels[2:])]))


BAD_DATA = {
    "fewer labels": (lambda X, y: (X, y[:-1]), "data has 60 samples but 59 labels"),
    "empty": (lambda X, y: (X[:0], []), "data is empty"),
    "no batches": (lambda X, y: [], "data is empty"),
    "one pass only": (lambda X, y: ((X, y) for _ in range(2)), "generator, which can be run through only once"),
    "integers": (
        lambda X, y: (X.long(), y),
        "must be floating-point numbers. Got torch.int64 instead. .*name the embedding with input_layer=",
    ),
    "integers by name": (lambda X, y: {"input": X.long(), "labels": y}, "must be floating-point numbers"),
    "no data": (lambda X, y: None, "Got NoneType instead"),
}


@every_estimator
@pytest.mark.parametrize("what", BAD_DATA)
def test_data_that_cannot_be_measured(kind, what):
    """Data that cannot be measured is refused, and the message says what is wrong and what to do."""
    change, message = BAD_DATA[what]
    model = nn.Sequential(Rounded(), *classifier()) if "integers" in what else None
    with pytest.raises(InvalidDataError, match=message):
        made(kind, model).fit(change(*samples()))


class Rounded(nn.Module):
    """Takes integers too."""

    def forward(self, input: Tensor) -> Tensor:
        """Return the input as floating-point numbers."""
        return input.float()


@every_estimator
def test_unknown_data_that_cannot_be_measured(kind):
    """The unknown data is looked at in the same way."""
    estimator = made(kind).fit(samples())
    X, labels = samples()
    with pytest.raises(InvalidDataError, match="The unknown data has 60 samples but 59 labels"):
        estimator.score_layers((X, labels[:-1]))
    with pytest.raises(InvalidDataError, match="The unknown data is a generator"):
        estimator.score_layers(batch for batch in [(X, labels)])


@every_estimator
@pytest.mark.parametrize("batch_size", [0, 2.5])
def test_batch_size_must_be_a_positive_integer(kind, batch_size):
    """A batch has a sample at least, and the error repeats what it got."""
    with pytest.raises(InvalidDataError, match=f"'batch_size' parameter must be a positive integer. Got {batch_size}"):
        made(kind, batch_size=batch_size).fit(samples())


@every_estimator
def test_models_that_cannot_be_measured(kind):
    """A model without parameters, or without a layer besides its head, is refused."""
    with pytest.raises(UnsupportedModelError, match="has no parameters"):
        made(kind, nn.Sequential(nn.ReLU())).fit(samples())
    with pytest.raises(UnsupportedModelError, match="no layer with weights"):
        made(kind, nn.Sequential(nn.Linear(4, 2))).fit(samples())


@every_estimator
@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"layers": ["conv3"]}, "no layer named 'conv3'. Did you mean '(conv1|conv2)' or '(conv1|conv2)'"),
        ({"head": "haed"}, "no head named 'haed'. Did you mean 'head'"),
        ({"input_layer": "convv1"}, "no input layer named 'convv1'. Did you mean 'conv1'"),
    ],
)
def test_misspelt_names(kind, option, message):
    """A name that the model lacks is refused with the nearest ones that it has."""
    model = nn.Sequential()
    for name in ("conv1", "conv2", "head"):
        model.add_module(name, nn.Linear(4, 4))
    with pytest.raises(LayerNotFoundError, match=message):
        made(kind, model, **option).fit(samples())


@every_estimator
def test_token_ids_are_measured_from_their_embedding_on(kind):
    """Token ids need an input layer, and with it give needs for the layers after it."""
    model, ids, labels = TokenNet(), torch.randint(0, 10, (60, 3)), [0, 1] * 30
    with pytest.raises(InvalidDataError, match=re.escape("name the embedding with input_layer=")):
        made(kind, model).fit((ids, labels))
    estimator = made(kind, model, input_layer="embedding").fit((ids, labels))
    assert estimator.layers_.names == ("mix",)
    scores = estimator.score_layers((ids.flip(0) % 5, labels))
    assert np.isfinite(scores.values).all()
    assert np.isfinite(scores.interval).all()


@every_estimator
def test_the_input_layer_is_no_layer_to_measure(kind):
    """The input layer is what the others are compared with: among the layers it is refused."""
    with pytest.raises(UnsupportedModelError, match=r"layer 'embedding' is the input layer.*Leave it out of layers="):
        made(kind, TokenNet(), layers=["embedding", "mix"], input_layer="embedding").fit(
            (torch.zeros(20, 3, dtype=torch.long), [0, 1] * 10)
        )


@every_estimator
def test_layers_without_a_feature_axis(kind):
    """A layer that returns one number a sample, without an axis for it, is refused by name."""

    class Scalar(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.flat, self.last = nn.Linear(4, 1), nn.Flatten(0), nn.Linear(1, 2)

        def forward(self, x):
            return self.last(self.flat(self.first(x))[:, None])

    with pytest.raises(UnsupportedModelError, match="layer 'flat' returns one number a sample"):
        made(kind, Scalar(), layers=["flat"]).fit(samples())


@every_estimator
def test_byte_images_are_refused_before_the_model_runs(kind):
    """Integer inputs are refused with the remedy, not by an error from inside the model."""
    images = torch.zeros(20, 4, dtype=torch.uint8)
    with pytest.raises(InvalidDataError, match=r"must be floating-point numbers. Got torch.uint8.*\.float\(\)"):
        made(kind, classifier()).fit((images, [0, 1] * 10))
