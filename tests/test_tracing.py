"""Hooks, set and taken away on every path."""

from collections import namedtuple

import pytest
import torch
from helpers import (
    Apply,
    Counted,
    halving_network,
    hook_count,
    small_mlp,
    unchanged,
)
from torch import nn
from torch.utils.checkpoint import checkpoint

from retrainscope.exceptions import (
    LayerNotFoundError,
    LayerNotRunError,
    NonFiniteError,
    ReusedLayerError,
    UnsupportedModelError,
)
from retrainscope.tracing import (
    call_model,
    named_layers,
    replace_output,
    run_layers,
    trace_layers,
)

INPUTS = torch.tensor([[0.0, 3.0], [5.0, 1.0]])


def run(model, inputs, layers, **options):
    """Run layers and return clones of their outputs."""
    found = {}
    run_layers(model, inputs, layers, lambda name, output: found.update({name: output.clone()}), **options)
    return found


class Twice(nn.Module):
    """Runs the same layer twice."""

    def __init__(self):
        super().__init__()
        self.shared = nn.Linear(2, 2)
        self.head = nn.Linear(2, 2)

    def forward(self, x):
        return self.head(self.shared(self.shared(x)))


# --- trace_layers


def test_traced_outputs_are_those_of_the_layers():
    """What is traced is what each layer put out, in the order of execution."""
    model = halving_network()
    with trace_layers(model, ["2", "0"]) as outputs:
        assert outputs == {}
        final = model(INPUTS)
    assert list(outputs) == ["0", "2"]
    assert torch.equal(outputs["0"], torch.tensor([[-1.0, 2.0], [4.0, 0.0]]))
    assert torch.equal(outputs["2"], final)
    assert torch.equal(final, torch.tensor([[0.0, 1.0], [2.0, 0.0]]))


def test_traced_output_is_safe_from_what_follows_in_place():
    """An in-place ReLU after a layer does not change what was traced."""
    model = halving_network()
    with trace_layers(model, ["0", "1"]) as outputs:
        model(INPUTS)
    assert outputs["0"].min() == -1.0
    assert outputs["1"].min() == 0.0


def test_traced_outputs_are_of_the_latest_pass():
    """A second forward pass replaces the outputs of the first."""
    model = halving_network()
    with trace_layers(model, ["0"]) as outputs:
        model(INPUTS)
        model(INPUTS + 1)
    assert torch.equal(outputs["0"], INPUTS)


def test_traced_outputs_are_part_of_the_graph():
    """A traced output can be differentiated with respect to the weights."""
    model = halving_network()
    with trace_layers(model, ["0"]) as outputs:
        model(INPUTS)
    outputs["0"].sum().backward()
    assert torch.equal(model[0].bias.grad, torch.tensor([2.0, 2.0]))


def test_one_name_may_stand_alone():
    """A single name stands for a list of one."""
    model = halving_network()
    with trace_layers(model, "1") as outputs:
        model(INPUTS)
    assert list(outputs) == ["1"]


def test_a_module_with_two_names_is_found_by_either():
    """A module that is registered twice can be traced by each of its names."""
    model = halving_network()
    model[2].first = model[0]
    for name in ("0", "2.first"):
        with trace_layers(model, [name]) as outputs:
            model(INPUTS)
        assert torch.equal(outputs[name], INPUTS - 1)


def test_layer_that_runs_twice_is_refused_by_name():
    """A layer that runs twice in one forward pass is refused by name, and the hooks are gone."""
    model = Twice()
    with (
        unchanged(model),
        pytest.raises(ReusedLayerError, match=r"'shared' runs more than once .* Name the modules around it"),
        trace_layers(model, ["shared"]),
    ):
        model(INPUTS)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "features.conv",
            r"named 'features.conv'. Did you mean 'features.conv\d' or 'features.conv\d' or 'features'\?",
        ),
        ("zzz", "no layer named 'zzz'. It has 'features', 'features.conv1', 'features.conv2'"),
        ("", "no layer named ''"),
    ],
)
def test_misspelt_name_is_answered_with_the_nearest(name, message):
    """A name that the model lacks is answered with those it has, and no hook is left behind."""
    model = nn.Sequential()
    model.features = nn.Sequential()
    model.features.conv1, model.features.conv2 = nn.Linear(2, 2), nn.Linear(2, 2)
    with (
        unchanged(model),
        pytest.raises(LayerNotFoundError, match=message),
        trace_layers(model, ["features.conv1", name]),
    ):
        pass
    assert hook_count(model) == 0


def test_what_was_looked_for_is_named():
    """The message about a missing module says what it was wanted for."""
    with pytest.raises(LayerNotFoundError, match="The model has no input layer named 'embedding'"):
        named_layers(small_mlp(), ["embedding"], what="input layer")


@pytest.mark.parametrize("layers", [["0", "2"], []], ids=["some", "none"])
@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_hooks_are_gone_after_an_error(layers, error):
    """No hook is left when the block ends by an error, a KeyboardInterrupt among them."""
    model = halving_network()

    def fail():
        with trace_layers(model, layers):
            assert hook_count(model) == len(layers) + 1
            model(INPUTS)
            raise error

    with unchanged(model), pytest.raises(error):
        fail()


def test_other_hooks_stay():
    """A hook that the user has set is not touched."""
    model = halving_network()
    calls = []
    model[0].register_forward_hook(lambda *_: calls.append("user"))
    with unchanged(model), trace_layers(model, ["0"]):
        model(INPUTS)
    model(INPUTS)
    assert calls == ["user", "user"]


def test_hooks_are_gone_where_one_cannot_be_set():
    """If one of the hooks cannot be set, those that were set are removed."""

    class NoHooks(nn.Linear):
        def register_forward_hook(self, *args, **kwargs):
            raise NotImplementedError("no hooks here")

    model = nn.Sequential(nn.Linear(2, 2), NoHooks(2, 2))
    with unchanged(model), pytest.raises(NotImplementedError, match="no hooks here"), trace_layers(model, ["0", "1"]):
        pass


@pytest.mark.parametrize(
    ("output", "kind"),
    [(lambda x: (None, "text"), "tuple"), (lambda x: {"n": x.long()}, "dict"), (lambda x: None, "NoneType")],
)
def test_layer_that_returns_no_tensor_is_refused(output, kind):
    """A layer without a floating-point tensor in what it returns is refused by name, with what it returns."""
    model = nn.Sequential(nn.Linear(2, 2), Apply(output))
    message = f"'1' returns a {kind} without a floating-point tensor in it. Name a module inside or after it"
    with unchanged(model), pytest.raises(UnsupportedModelError, match=message), trace_layers(model, ["1"]):
        model(INPUTS)
    with unchanged(model), pytest.raises(UnsupportedModelError, match=message):
        run(model, INPUTS, ["1"])


Pair = namedtuple("Pair", ["first", "second"])


# --- run_layers


def test_layers_are_visited_as_they_run():
    """Each layer asked for is visited once with its output, in the order of execution."""
    found = run(halving_network(), INPUTS, ["2", "0"])
    assert list(found) == ["0", "2"]
    assert torch.equal(found["0"], torch.tensor([[-1.0, 2.0], [4.0, 0.0]]))


@pytest.mark.parametrize("layers", [["0"], ["0", "1"]])
def test_forward_pass_stops_after_the_last_layer(layers):
    """What comes after the last layer asked for does not run."""
    counted = Counted()
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), counted)
    with unchanged(model):
        run(model, INPUTS, layers)
    assert counted.calls == 0
    run(model, INPUTS, [*layers, "2"])
    assert counted.calls == 1


class Swallows(nn.Module):
    """A forward pass that lets no error of a given kind out, and counts how often it goes on after the layer."""

    def __init__(self, kind):
        super().__init__()
        self.kind = kind
        self.layer = nn.Linear(2, 2)
        self.after = Counted()

    def forward(self, x):
        try:
            x = self.layer(x)
        except self.kind:
            x = torch.zeros(2, 2)
        return self.after(x)


def test_model_that_swallows_errors_is_cut_off_too():
    """A forward pass that catches every Exception ends after the last layer asked for all the same."""
    model = Swallows(Exception)
    assert list(run(model, INPUTS, ["layer"])) == ["layer"]
    assert model.after.calls == 0


def test_model_that_swallows_everything_is_measured_in_full():
    """A forward pass that catches even the end that is put to it runs on, and what was found counts."""
    model = Swallows(BaseException)
    visited = []
    with unchanged(model):
        run_layers(model, INPUTS, ["layer"], lambda name, _: visited.append(name))
    assert visited == ["layer"]
    assert model.after.calls == 1


def test_layers_that_do_not_run_are_named():
    """All layers that the forward pass leaves out are named together, sorted."""
    model = halving_network()
    model[1].idle, model[1].again = nn.Linear(2, 2), nn.Linear(2, 2)
    message = "These layers do not run in the forward pass: 1.again, 1.idle. Leave them out of layers="
    with unchanged(model), pytest.raises(LayerNotRunError, match=message):
        run(model, INPUTS, ["0", "1.idle", "1.again"])


def test_layer_that_runs_twice_before_the_end_is_refused():
    """A layer that runs twice before the last one asked for is refused by name."""
    model = Twice()
    with unchanged(model), pytest.raises(ReusedLayerError, match="'shared' runs more than once"):
        run(model, INPUTS, ["shared", "head"])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_non_finite_activations_are_named_by_layer_and_batch(value):
    """NaN or infinity in an activation is refused with the layer's name, and the batch where it is told."""
    model = nn.Sequential(nn.Linear(2, 2), Apply(lambda x: x * value), nn.Linear(2, 2))
    with pytest.raises(NonFiniteError, match=r"'1' puts out NaN or infinity\.$"):
        run(model, INPUTS, ["0", "1", "2"])
    with unchanged(model), pytest.raises(NonFiniteError, match=r"'1' puts out NaN or infinity in batch 7 of the known"):
        run(model, INPUTS, ["0", "1", "2"], where="batch 7 of the known data")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_non_finite_activations_can_be_let_through(value):
    """Where it is asked for, NaN and infinity in an activation are no error."""
    model = nn.Sequential(nn.Linear(2, 2), Apply(lambda x: x * 0 + value))
    assert not torch.isfinite(run(model, INPUTS, ["0", "1"], check_finite=False)["1"]).any()


def test_activations_whose_sum_overflows_are_finite():
    """Finite activations whose sum is infinite are accepted."""
    model = nn.Sequential(Apply(lambda x: torch.full_like(x, 3e38)))
    assert run(model, INPUTS, ["0"])["0"].sum().isinf()


@pytest.mark.parametrize(
    ("function", "shape"),
    [(lambda x: x.T, r"\(3, 2\)"), (lambda x: x.mean(), r"\(\)"), (lambda x: x[:1], r"\(1, 3\)")],
    ids=["batch second", "one number", "one row"],
)
def test_output_without_a_row_a_sample_is_refused(function, shape):
    """A layer whose output has not one row a sample is refused with its shape."""
    model = nn.Sequential(nn.Linear(2, 3), Apply(function))
    with (
        unchanged(model),
        pytest.raises(UnsupportedModelError, match=rf"'1' returns shape {shape} for 2 samples; one row a sample"),
    ):
        run(model, INPUTS, ["1"])


def test_mapping_is_passed_by_keyword():
    """A mapping of inputs reaches the model by keyword, and tells the number of samples."""
    model = Apply(lambda *, left, right: model.layer(left - right))
    model.layer = nn.Identity()
    found = run(model, {"left": INPUTS, "right": torch.ones(2, 2)}, ["layer"])
    assert torch.equal(found["layer"], INPUTS - 1)


def test_error_of_the_visitor_comes_through():
    """What the visitor raises comes out as it is, and no hook is left."""
    model = halving_network()

    def visit(name, output):
        raise KeyboardInterrupt

    with unchanged(model), pytest.raises(KeyboardInterrupt):
        run_layers(model, INPUTS, ["0", "1"], visit)


@pytest.mark.parametrize("inputs", [INPUTS, {"x": INPUTS}], ids=["tensor", "mapping"])
def test_model_may_write_into_its_input(inputs):
    """A model that begins in place does not change the data."""
    model = Apply(lambda x: x.zero_())
    before = INPUTS.clone()
    call_model(model, inputs)
    assert torch.equal(INPUTS, before)


# --- replace_output


def test_output_is_replaced_inside_only():
    """Inside the block the rest of the network sees the given output, afterwards the layer's own again."""
    model = halving_network()
    with unchanged(model):
        with replace_output(model, "1", torch.full((2, 2), 6.0)):
            assert torch.equal(model(INPUTS), torch.full((2, 2), 3.0))
        assert torch.equal(model(INPUTS), torch.tensor([[0.0, 1.0], [2.0, 0.0]]))
    with unchanged(model), pytest.raises(KeyboardInterrupt), replace_output(model, "1", INPUTS):
        raise KeyboardInterrupt
    with pytest.raises(LayerNotFoundError, match="no layer named '7'"), replace_output(model, "7", INPUTS):
        pass


def test_what_replaces_an_output_is_not_written_to():
    """A network that goes on in place writes into a copy of what is given, which can be differentiated."""
    model, values = nn.Sequential(nn.Linear(2, 2), nn.ReLU(inplace=True)), INPUTS.clone().requires_grad_(True)
    with replace_output(model, "0", values):
        model(INPUTS).sum().backward()
    assert torch.equal(values, INPUTS)
    assert torch.equal(values.grad, (INPUTS > 0).float())


def test_what_a_checkpoint_runs_again_does_not_count():
    """On the way back a checkpoint runs its part once more, which is no second call of the layer."""

    class Saving(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.head = nn.Linear(2, 3), nn.Linear(3, 1)

        def forward(self, x):
            return self.head(checkpoint(lambda x: self.inner(x).relu(), x, use_reentrant=False))

    model = Saving()
    with trace_layers(model, ["inner"]) as outputs:
        model(INPUTS).sum().backward()
    assert torch.equal(outputs["inner"], model.inner(INPUTS))
    assert model.inner.weight.grad is not None
