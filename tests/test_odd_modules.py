"""What the estimators make of odd modules: of each the same as of a plain one, what is known by hand, or a refusal."""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import cache
from itertools import chain
from typing import Any

import numpy as np
import pytest
import torch
from helpers import hook_count, unchanged
from odd_modules import (
    FORMS,
    Added,
    AddInPlace,
    Again,
    Argmax,
    Attending,
    Awake,
    Bagged,
    Catching,
    Chain,
    Checkpointed,
    Choosing,
    Codes,
    Delegating,
    Doubling,
    Force,
    Functional,
    Guarded,
    InForm,
    InPlace,
    IntoInput,
    Keyed,
    Keywords,
    LateBuffer,
    Listed,
    Looped,
    MapNet,
    OneByOne,
    OutOfPlace,
    Positions,
    Recurrent,
    Remembering,
    Rolled,
    Scalar,
    SwitchingModes,
    ThroughFourier,
    ThroughRecord,
    Tied,
    TwoInputs,
    Uncalled,
    Unrolled,
    Unused,
    WithLabels,
    WithLoss,
    Worded,
    convolutions,
    deep,
    frozen,
    hooked,
    made_in_inference_mode,
    on_two_devices,
    parallel_part,
    parametrised,
    pruned,
    quantised,
    scripted,
    traced,
    transformer,
    weight_normalised,
)
from torch import Tensor, nn

import retrainscope as rs
from retrainscope.exceptions import (
    InvalidDataError,
    LayerNotFoundError,
    RetrainscopeError,
    ReusedLayerError,
    UnsupportedModelError,
)

N = 16
LABELS = [place % 2 for place in range(N)]
ESTIMATORS = {
    "spread": lambda model, **options: rs.ActivationSpread(model, random_state=0, **options),
    "probe": lambda model, **options: rs.LayerDecoderProbe(model, max_epochs=1, random_state=0, **options),
    "inverter": lambda model, **options: rs.GradientInverter(
        model, max_iter=2, samples_per_class=2, random_state=0, **options
    ),
}
NUMBERS = ("values", "interval", "per_class", "known", "unknown", "known_reference", "unknown_reference")


def values(*shape: int, seed: int = 0) -> Tensor:
    """Gaussian inputs of N samples, the two classes apart."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(N, *shape, generator=generator) + torch.tensor(LABELS).reshape(N, *[1] * len(shape))


def ids(n_tokens: int = 5, *, seed: int = 0) -> Tensor:
    """Token ids of N samples, none of them 0."""
    return torch.randint(1, 9, (N, n_tokens), generator=torch.Generator().manual_seed(seed))


def both(X: Any, Y: Any) -> tuple[Any, Any]:
    """Known and unknown data with labels."""
    return (X, LABELS), (Y, LABELS)


VECTORS = both(values(4), values(4, seed=1) * 2)
SEQUENCES = both(values(5, 4), values(5, 4, seed=1) * 2)
SIGNALS = both(values(2, 8), values(2, 8, seed=1) * 2)
IMAGES = both(values(2, 6, 6), values(2, 6, 6, seed=1) * 2)
VOLUMES = both(values(1, 4, 4, 4), values(1, 4, 4, 4, seed=1) * 2)
TOKENS = both(ids(), ids(seed=1))


def scores_of(
    model: nn.Module, data: tuple[Any, Any], estimators: tuple[str, ...] = tuple(ESTIMATORS), **options: Any
) -> tuple[rs.Layers, dict[str, rs.LayerScores]]:
    """Find the layers and run the estimators, and check what holds for every model."""
    known, unknown = data
    with unchanged(model):
        layers = rs.find_layers(model, known, **options)
        owned = [*chain(*layers.parameters.values()), *layers.unused]
        assert sorted(owned) == sorted(name for name, _ in model.named_parameters())
        scores = {}
        for name in estimators:
            estimator = ESTIMATORS[name](model, **options).fit(known)
            assert estimator.layers_ == layers
            scores[name] = estimator.score_layers(unknown)
            assert scores[name].layers == layers.names
            assert np.isfinite(scores[name].values).all()
    return layers, scores


@cache
def plain_scores(make: Callable[[], nn.Module] = Chain) -> dict[str, rs.LayerScores]:
    """Return the scores of a network that is written plainly."""
    return scores_of(make(), VECTORS)[1]


def assert_same_scores(first: dict[str, rs.LayerScores], second: dict[str, rs.LayerScores], rtol: float = 1e-5) -> None:
    for name, scores in first.items():
        for number in NUMBERS:
            got, expected = getattr(scores, number), getattr(second[name], number)
            np.testing.assert_allclose(got, expected, rtol=rtol, atol=rtol, err_msg=f"{name}: {number}")


def keyword_data(data: tuple[Any, Any]) -> tuple[Any, Any]:
    return tuple({"x": X, "labels": y} for X, y in data)


SAME: dict[str, tuple[Callable[[], nn.Module], Callable[[], nn.Module]]] = {
    **{f"output as {form}": (lambda form=form: InForm(form), Chain) for form in FORMS},
    "in place": (InPlace, Chain),
    "into the input": (IntoInput, OutOfPlace),
    "checkpointed": (lambda: Checkpointed(False), Chain),
    "catching": (Catching, Chain),
    "with a loss": (WithLoss, Chain),
    "any keywords": (Keywords, Chain),
    "with labels": (WithLabels, Chain),
    "looped": (Looped, Chain),
    "keyed": (Keyed, Chain),
    "delegating": (Delegating, Chain),
    "adding in place": (AddInPlace, Added),
    "remembering": (Remembering, Chain),
    "late buffer": (LateBuffer, Chain),
    "switching modes": (SwitchingModes, Chain),
    "functional call": (Functional, Chain),
    "parallel part": (parallel_part, Chain),
    "frozen": (lambda: frozen(Chain()), Chain),
    "evaluated": (lambda: Chain().eval(), Chain),
    "in inference mode": (made_in_inference_mode, Chain),
}
NAMES = {"looped": ("blocks.0", "blocks.1"), "keyed": ("parts.body.one", "parts.body.two")}


@pytest.mark.parametrize("kind", SAME)
def test_other_ways_to_write_a_network_give_the_same_scores(kind):
    """How a network is written changes no score of any estimator."""
    odd, plain = SAME[kind]
    layers, scores = scores_of(odd(), VECTORS)
    expected = plain_scores(plain)
    assert layers.names == NAMES.get(kind, ("first", "second"))
    assert_same_scores(scores, expected)


@pytest.mark.parametrize("kind", ["with labels", "any keywords"])
def test_data_by_keyword_gives_the_same_scores(kind):
    """A mapping is given to the model by keyword, and its labels are kept back."""
    model = SAME[kind][0]()
    _, scores = scores_of(model, keyword_data(VECTORS))
    expected = plain_scores()
    assert_same_scores(scores, expected)


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_context_of_the_caller_does_not_matter(context):
    """Inside no_grad or inference_mode the scores are the same, those of the inverter too."""
    expected = plain_scores()
    model = Chain()
    with context():
        _, scores = scores_of(model, VECTORS)
    assert_same_scores(scores, expected)


@pytest.mark.parametrize("bidirectional", [False, True], ids=["forward", "bidirectional"])
@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_samples_of_a_recurrent_layer_may_come_second(kind, bidirectional):
    """A recurrent layer gives the same scores whether it has its samples first or second."""
    layers, scores = scores_of(Recurrent(kind, True, bidirectional), SEQUENCES)
    other, expected = scores_of(Recurrent(kind, False, bidirectional), SEQUENCES)
    assert layers.names == other.names == ("rnn", "mix")
    assert layers.shapes == other.shapes == {"rnn": (5, 12 if bidirectional else 6), "mix": (5,)}
    assert_same_scores(scores, expected)


def test_samples_of_attention_may_come_second():
    """Attention gives the same scores whether it has its samples first or second."""
    layers, scores = scores_of(Attending(True), SEQUENCES)
    other, expected = scores_of(Attending(False), SEQUENCES)
    assert layers.names == other.names == ("attention", "mix")
    assert layers.shapes == other.shapes == {"attention": (5, 4), "mix": (5, 5)}
    assert_same_scores(scores, expected)


@pytest.mark.skipif(
    torch.torch_version.TorchVersion(torch.__version__) < "2.13",
    reason="earlier ones draw weights in the order that they lie in memory, so that the control is another",
)
def test_channels_last():
    """The memory format of the model and of the data changes no score."""
    plain = tuple((X.double(), y) for X, y in IMAGES)  # so that rounding is small after training, too
    data = tuple((X.to(memory_format=torch.channels_last), y) for X, y in plain)
    layers, scores = scores_of(convolutions(dtype=torch.float64, memory_format=torch.channels_last), data)
    _, expected = scores_of(convolutions(dtype=torch.float64), plain)
    assert layers.names == ("0", "3")
    assert_same_scores(scores, expected, rtol=1e-4)


def test_training_mode_is_neither_seen_nor_changed():
    """Dropout and batch normalisation are measured as in evaluation, and the running statistics stay."""
    model = convolutions().train()
    _, scores = scores_of(model, IMAGES)
    assert model.training
    assert int(model[1].num_batches_tracked) == 0
    _, expected = scores_of(convolutions().eval(), IMAGES)
    assert_same_scores(scores, expected)


def test_part_that_runs_sample_by_sample():
    """A layer inside vmap returns one sample at a time: it is no layer by default, and its weights go to others."""
    layers, _ = scores_of(OneByOne(), VECTORS)
    assert layers.names == ("first",)


def test_gradient_inside_a_model():
    """A model that computes a gradient inside is measured like any other."""
    model = Force()
    layers, _ = scores_of(model, VECTORS)
    assert layers.names == ("energy", "one")


@pytest.mark.parametrize("guard", [torch.no_grad, torch.inference_mode])
def test_part_without_gradient(guard):
    """Where a model itself keeps no gradient, the inverter names the place, and the others measure all layers."""
    model = Guarded(guard)
    _, scores = scores_of(model, VECTORS, ("spread", "probe"))
    assert_same_scores(scores, plain_scores())
    message = r"No gradient flows from the layer 'first' to the input: it ends at 'first' \(Linear\).* Leave the layer"
    with unchanged(model), pytest.raises(UnsupportedModelError, match=message):
        ESTIMATORS["inverter"](model).fit(VECTORS[0])


@pytest.mark.parametrize("name", ["weight_norm", "spectral_norm", "orthogonal"])
def test_parametrised_weights(name):
    """A layer whose weight is made from others is one layer, and owns what its weight is made from."""
    model = parametrised(name).eval()
    plain = Chain()
    with torch.no_grad():
        plain.first.weight.copy_(model.first.weight)
    layers, scores = scores_of(model, VECTORS)
    assert layers.names == ("first", "second")
    assert all(owned.startswith("first.") for owned in layers.parameters["first"])
    assert len(layers.parameters["first"]) == (3 if name == "weight_norm" else 2)
    # The control is another network: how its weights are drawn differs.
    expected = scores_of(plain, VECTORS, ("spread",))[1]
    assert_same_scores({"spread": scores["spread"]}, expected, rtol=1e-4)


@pytest.mark.filterwarnings("ignore:.*weight_norm. is deprecated")
@pytest.mark.parametrize("make", [weight_normalised, pruned])
def test_weights_computed_by_hooks(make):
    """A weight that a hook computes before each call is measured as it is."""
    layers, scores = scores_of(make(), VECTORS)
    assert layers.names == ("first", "second")
    assert all(owned.startswith("first.") for owned in layers.parameters["first"])
    assert_same_scores({"spread": scores["spread"]}, plain_scores())


def test_output_changed_by_a_hook_of_the_user_is_what_is_measured():
    """What a hook makes of an output is the output, and the hook stays."""
    model = hooked()
    layers, scores = scores_of(model, VECTORS)
    _, expected = scores_of(Doubling(), VECTORS, layers=["doubled", "second"])
    assert layers.names == ("first", "second")
    assert_same_scores(scores, expected)
    assert hook_count(model) == 1
    with rs.trace_layers(model, ["first"]) as outputs:
        model(VECTORS[0][0])
    torch.testing.assert_close(outputs["first"], 2 * Chain().first(VECTORS[0][0]))


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad=True")
def test_checkpoints_that_reenter():
    """A reentrant checkpoint has no gradient inside: the inverter names the place, the others measure all layers."""
    model = Checkpointed(True)
    expected = plain_scores()
    layers, scores = scores_of(model, VECTORS, ("spread", "probe"))
    assert layers.names == ("first", "second")
    assert_same_scores(scores, {name: expected[name] for name in scores})
    message = "No gradient flows from the layer 'first' to the input: it ends at 'first'"
    with unchanged(model), pytest.raises(UnsupportedModelError, match=message):
        ESTIMATORS["inverter"](model).fit(VECTORS[0])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_weights_of_other_types(dtype):
    """Half, bfloat16 and double weights give about the scores of single ones; the data gets their type."""
    expected = plain_scores()
    layers, scores = scores_of(Chain().to(dtype), VECTORS)
    assert layers.names == ("first", "second")
    rtol = 1e-4 if dtype is torch.float64 else 0.1
    assert_same_scores({"spread": scores["spread"]}, expected, rtol=rtol)
    if dtype is torch.float64:
        np.testing.assert_allclose(scores["inverter"].known, expected["inverter"].known, rtol=1e-3)


def by_name(data: tuple[Any, Any], **columns: Callable[[Tensor], Tensor]) -> tuple[Any, Any]:
    """Give each input a name."""
    return tuple(({name: make(X) for name, make in columns.items()}, y) for X, y in data)


@dataclass(frozen=True)
class Case:
    """A network, its data, and what is known of it by hand."""

    make: Callable[[], nn.Module]
    data: tuple[Any, Any] = VECTORS
    names: tuple[str, ...] = ("one", "two")
    estimators: tuple[str, ...] = tuple(ESTIMATORS)
    options: dict[str, Any] = field(default_factory=dict)
    owned: dict[str, tuple[str, ...]] = field(default_factory=dict)
    unused: tuple[str, ...] = ()


SEVERAL = by_name(VECTORS, a=lambda X: X[:, :3], b=lambda X: X[:, 2:], scale=lambda X: torch.ones(len(X)).long())
CHOOSING = {"two": ("choice.weight", "choice.bias", "two.weight", "two.bias")}
BLOCKS = ("0.layers.0", "0.layers.1")
HAND: dict[str, Case] = {
    # The inverter rebuilds one input only; it says so, see below.
    "several inputs": Case(TwoInputs, SEVERAL, ("left", "right"), ("spread", "probe")),
    "class token and positions": Case(
        Positions, SEQUENCES, owned={"one": ("token", "position", "one.weight", "one.bias")}
    ),
    "tied weights": Case(Tied, owned={"one": ("one.weight", "one.bias"), "two": ("two.bias",)}),
    "list of weights": Case(
        Listed,
        owned={"two": ("factors.0", "two.weight", "two.bias"), "head": ("factors.1", "head.weight", "head.bias")},
        unused=("factors.2",),
    ),
    "weights used without a call": Case(
        Uncalled, names=("one",), owned={"one": ("lent.weight", "lent.bias", "one.weight", "one.bias")}
    ),
    "branch that does not run": Case(Unused, names=("one",), unused=("auxiliary.weight", "auxiliary.bias")),
    "one whole number": Case(lambda: Choosing(Argmax), owned=CHOOSING),
    "whole numbers": Case(lambda: Choosing(Codes), owned=CHOOSING),
    "one number": Case(lambda: Choosing(Scalar), owned=CHOOSING),
    "complex numbers": Case(
        ThroughFourier, owned={"two": ("fourier.weight", "fourier.bias", "two.weight", "two.bias")}
    ),
    "dataclass": Case(ThroughRecord, owned={"two": ("record.weight", "record.bias", "two.weight", "two.bias")}),
    "bag of words": Case(Bagged, TOKENS, ("one",), options={"input_layer": "bag"}),
    "words": Case(Worded, TOKENS, ("one",), options={"input_layer": "words"}),
    "signals": Case(lambda: MapNet(nn.Conv1d, 2), SIGNALS),
    "images": Case(lambda: MapNet(nn.Conv2d, 2), IMAGES),
    "volumes": Case(lambda: MapNet(nn.Conv3d, 1), VOLUMES),
    "lazy, after a batch": Case(Awake, names=("first", "second")),
    "transformer": Case(transformer, SEQUENCES, BLOCKS, options={"layers": ["0.layers.*"]}),
}


@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature")
@pytest.mark.parametrize("kind", HAND)
def test_layers_and_owners_known_by_hand(kind):
    """Each odd network has the layers and the owners that one would name by hand, and all estimators run."""
    case = HAND[kind]
    layers, _ = scores_of(case.make(), case.data, case.estimators, **case.options)
    assert layers.names == case.names
    assert {name: sorted(layers.parameters[name]) for name in case.owned} == {
        name: sorted(owned) for name, owned in case.owned.items()
    }
    assert layers.unused == case.unused


def test_of_many_layers_some_at_even_distances():
    """A tower of 60 layers without blocks is measured at 24 of them, the first and the last among them."""
    model = deep()
    layers, scores = scores_of(model, VECTORS, ("spread",))
    assert len(layers.names) == 24
    assert (layers.names[0], layers.names[-1]) == ("0", "59")
    assert scores["spread"].values.shape == (24,)


BRIEF = rs.Descent(max_iter=3)
PLANE = both(values(2), values(2, seed=1) * 2)


@dataclass(frozen=True)
class Refused:
    """A network or data that cannot be measured, and what is said of it."""

    make: Callable[[], nn.Module]
    message: str
    error: type[RetrainscopeError] = UnsupportedModelError
    data: tuple[Any, Any] = VECTORS
    options: dict[str, Any] = field(default_factory=dict)
    readable: bool = True  # whether all weights have a content to compare


REFUSED: dict[str, Refused] = {
    "data parallel": Refused(
        lambda: nn.DataParallel(Chain()), r"wrapped in DataParallel.* Give the model inside it: model\.module"
    ),
    "compiled": Refused(
        lambda: torch.compile(Chain()), r"wrapped in OptimizedModule.* Give the model inside it: model\._orig_mod"
    ),
    "scripted": Refused(
        scripted, "The module 'second' is compiled by TorchScript.* Give the Python module that it was made from"
    ),
    "traced": Refused(
        traced, "The module 'second' is compiled by TorchScript.* Give the Python module that it was made from"
    ),
    "quantised": Refused(
        quantised, r"The module 'second' is quantised \(Linear\).* Give the model as it was before quantisation"
    ),
    "several devices": Refused(
        on_two_devices, r"lies on several devices \(cpu, meta\)\. Move it to one", readable=False
    ),
    "lazy": Refused(
        lambda: nn.Sequential(nn.LazyLinear(4), nn.Linear(4, 2)),
        "has lazy parameters or buffers. Run one batch through it first",
        readable=False,
    ),
    "layer that runs twice": Refused(
        Again,
        "The layer 'twice' runs 2 times in one forward pass.* say with calls= whether the first, the last or the sum",
        ReusedLayerError,
        PLANE,
        {"layers": ["twice"]},
    ),
    "complex layer": Refused(
        ThroughFourier,
        "The layer 'fourier' returns complex numbers.* Name a module before or after it",
        options={"layers": ["fourier"]},
    ),
    "dataclass layer": Refused(
        ThroughRecord,
        "The layer 'record' returns a Record without a floating-point tensor in it. Name a module inside or after it",
        options={"layers": ["record"]},
    ),
    "layer of whole numbers": Refused(
        lambda: Choosing(Codes), "The layer 'choice' .*Name", options={"layers": ["choice"]}
    ),
    "layer of one number": Refused(
        lambda: Choosing(Scalar),
        r"The layer 'choice' returns one number a sample.* let it return \(n_samples, 1\)",
        options={"layers": ["choice"]},
    ),
    "complex inputs": Refused(
        Chain, "The known inputs are complex.* Give real numbers", InvalidDataError, both(VECTORS[0][0] + 0j, 0)
    ),
    "token ids": Refused(
        Worded, r"The inputs must be floating-point.* name the embedding with input_layer=", InvalidDataError, TOKENS
    ),
    "misspelt layer": Refused(
        Chain, "no layer named 'secnd'. Did you mean 'second'", LayerNotFoundError, options={"layers": ["secnd"]}
    ),
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("name", ESTIMATORS)
@pytest.mark.parametrize("kind", REFUSED)
def test_what_cannot_be_measured_is_refused_by_name(kind, name):
    """Every estimator names what it cannot measure and says what to do, and leaves the model as it was."""
    case = REFUSED[kind]
    model = case.make()
    n_hooks = hook_count(model)
    estimator = ESTIMATORS[name](model, **case.options)
    before = unchanged(model) if case.readable else nullcontext()
    with before, pytest.raises(case.error, match=case.message):
        estimator.fit(case.data[0])
    assert hook_count(model) == n_hooks
    assert not hasattr(estimator, "layers_")


def test_inverter_rebuilds_one_input():
    """Of several inputs the inverter cannot rebuild one: they are named, with what to do."""
    model = TwoInputs()
    message = r"rebuilds one floating-point input. Got a, b; name one module's output with input_layer="
    with unchanged(model), pytest.raises(InvalidDataError, match=message):
        ESTIMATORS["inverter"](model).fit(SEVERAL[0])


@pytest.mark.filterwarnings(
    r"ignore:Using `torch\.compile\(module\)` when", r"ignore:The \.grad attribute of a Tensor that is not"
)
@pytest.mark.parametrize("in_place", [False, True])
def test_part_that_is_compiled(in_place):
    """A part compiled by torch.compile gives the scores that it gives uncompiled."""
    model = Chain()
    if in_place:
        model.second.compile(backend="eager")
    else:
        model.second = torch.compile(model.second, backend="eager")
    layers, scores = scores_of(model, VECTORS)
    expected = plain_scores()
    assert layers.names == ("first", "second")
    assert_same_scores(scores, expected)


# Layers that run several times


@pytest.mark.parametrize(
    ("calls", "factor", "names", "owners"),
    [
        ("first", 2.0, ("twice", "between", "after"), {"twice": ("twice.weight",), "between": ("between.weight",)}),
        ("last", 20.0, ("between", "twice", "after"), {"twice": (), "between": ("twice.weight", "between.weight")}),
        ("sum", 22.0, ("between", "twice", "after"), {"twice": (), "between": ("twice.weight", "between.weight")}),
    ],
)
def test_calls_of_a_layer_that_runs_twice(calls, factor, names, owners):
    """The first call doubles x, the last one gives 20 x, their sum 22 x; order and owners follow from when it is there.

    With calls= the default takes the layer too.
    """
    model, X = Again(), PLANE[0][0]
    with rs.trace_layers(model, ["twice"], calls=calls) as outputs:
        model(X)
    torch.testing.assert_close(outputs["twice"], factor * X)
    layers, scores = scores_of(model, PLANE, calls=calls)
    assert layers.names == names
    assert {name: layers.parameters[name] for name in owners} == owners
    # Every layer multiplies the input with a number, which changes no share of a variance.
    np.testing.assert_allclose(scores["spread"].values, 0, atol=1e-5)


def test_default_leaves_out_a_layer_that_runs_twice():
    """Without calls= a layer that runs twice is no layer by default, and its weights count with the next."""
    layers, _ = scores_of(Again(), PLANE)
    assert layers.names == ("between", "after")
    assert layers.parameters["between"] == ("twice.weight", "between.weight")


@pytest.mark.parametrize("calls", ["first", "last", "sum"])
def test_calls_give_the_scores_of_the_network_unrolled(calls):
    """What a layer's calls give is what modules of their own would give; the gradient is that of them, too."""
    layers, scores = scores_of(Rolled(), VECTORS, layers=["cell"], calls=calls)
    _, expected = scores_of(Unrolled(), VECTORS, ("spread",), layers=[calls])
    assert layers.parameters == {"cell": ("cell.weight", "cell.bias"), "head": ("head.weight", "head.bias")}
    assert_same_scores({"spread": scores["spread"]}, expected)
    rolled = rs.invert_layers(Rolled(), VECTORS[0][0], ["cell"], calls=calls, random_state=0, descent=BRIEF)
    unrolled = rs.invert_layers(Unrolled(), VECTORS[0][0], [calls], random_state=0, descent=BRIEF)
    torch.testing.assert_close(rolled["cell"].input_error, unrolled[calls].input_error)
