"""Hooks and models that are borrowed, and given back on every path."""

import random
from collections import OrderedDict, namedtuple

import numpy as np
import pytest
import torch
from helpers import (
    Apply,
    Counted,
    assert_same_state,
    content_of,
    halving_network,
    hook_count,
    model_state,
    random_states,
    small_mlp,
    unchanged,
)
from torch import nn

from retrainscope.exceptions import (
    LayerNotFoundError,
    LayerNotRunError,
    NonFiniteError,
    ReusedLayerError,
    UnsupportedModelError,
)
from retrainscope.tracing import (
    borrow,
    call_model,
    copy_model,
    main_tensor,
    model_place,
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


@pytest.mark.parametrize(
    "output",
    [
        lambda x: (x + 1, x),
        lambda x: [None, "text", torch.arange(3), x + 1],
        lambda x: ((torch.arange(3), x + 1), x),
        lambda x: Pair(x + 1, x),
        lambda x: {"states": x, "last_hidden_state": x + 1},
        lambda x: OrderedDict(positions=torch.arange(3), scores=x + 1, other=x),
    ],
)
def test_the_main_tensor_of_a_compound_output(output):
    """Of a tuple, list or mapping the first floating tensor counts, of Hugging Face's names the last hidden state."""
    model = nn.Sequential(nn.Identity(), Apply(output))
    with trace_layers(model, ["1"]) as outputs:
        model(INPUTS)
    assert torch.equal(outputs["1"], INPUTS + 1)
    assert torch.equal(run(model, INPUTS, ["1"])["1"], INPUTS + 1)


@pytest.mark.parametrize(
    ("output", "rest"),
    [
        (lambda x: (x, 1), lambda found: found[1] == 1),
        (lambda x: [None, x], lambda found: found[0] is None),
        (lambda x: Pair(x, 2), lambda found: found.second == 2),
        (lambda x: {"other": x, "logits": x}, lambda found: "other" in found),
        (lambda x: ((x, 3), 4), lambda found: found[0][1] == 3 and found[1] == 4),
    ],
)
def test_the_main_tensor_is_replaced_in_its_place(output, rest):
    """What stands in for a layer's output takes the place of its main tensor; the rest stays as it was."""
    model = nn.Sequential(Apply(output))
    with replace_output(model, "0", torch.full((2, 2), 7.0)):
        found = model(INPUTS)
    assert type(found) is type(output(INPUTS))
    assert rest(found)
    assert torch.equal(main_tensor(found), torch.full((2, 2), 7.0))


def test_samples_second_are_brought_to_the_front():
    """A recurrent or attention module that has the samples second is traced with the samples first, and back."""
    x = torch.randn(7, 3, 4)  # 7 steps, 3 samples
    model = nn.Sequential(OrderedDict(gru=nn.GRU(4, 5), last=Apply(lambda out: out[0][-1])))
    with trace_layers(model, ["gru"]) as outputs:
        final = model(x)
    assert outputs["gru"].shape == (3, 7, 5)
    assert torch.equal(outputs["gru"][:, -1], final)
    with replace_output(model, "gru", outputs["gru"] + 1):
        assert torch.equal(model(x), final + 1)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize(
    ("wrap", "message"),
    [
        (nn.DataParallel, r"wrapped in DataParallel, .* Give the model inside it: model.module"),
        (torch.compile, r"wrapped in OptimizedModule, .* Give the model inside it: model._orig_mod"),
    ],
)
def test_wrapped_models_are_refused(wrap, message):
    """A wrapper has other names than the model inside, which is what to give."""
    model = wrap(nn.Linear(2, 2))
    with pytest.raises(UnsupportedModelError, match=message), borrow(model):
        pass


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_scripted_modules_are_refused():
    """Hooks cannot look into TorchScript: the whole or the part is named."""
    scripted = torch.jit.script(nn.Sequential(nn.Linear(2, 2)))
    with pytest.raises(UnsupportedModelError, match="The model is compiled by TorchScript"), borrow(scripted):
        pass
    model = nn.Sequential(nn.Linear(2, 2), scripted)
    with pytest.raises(UnsupportedModelError, match="The module '1' is compiled by TorchScript"), borrow(model):
        pass


@pytest.mark.filterwarnings("ignore")
def test_quantised_modules_are_refused():
    """Quantised weights cannot be retrained: the module is named."""
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    torch.ao.quantization.quantize_dynamic(model, {"1"}, inplace=True)
    with pytest.raises(UnsupportedModelError, match=r"The module '1' is quantised \(Linear\)"), borrow(model):
        pass


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


# --- borrow


class Restless(nn.Module):
    """A model whose forward pass changes all that it can reach, except its parameters."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(2, 2)
        self.norm = nn.BatchNorm1d(2)
        self.register_buffer("in_place", torch.tensor([1.0, float("nan")]))
        self.register_buffer("replaced", torch.arange(3))
        self.register_buffer("absent", None)
        self.register_buffer("untouched", torch.ones(4))
        self.register_buffer("hidden", torch.zeros(2))
        self.register_buffer("sign", torch.zeros(2))

    def forward(self, x):
        self.in_place += 1
        self.in_place[1] = 0.5
        self.hidden.data.add_(1)  # leaves no trace in the version
        self.sign.fill_(-0.0)  # equals 0, but not bit for bit
        self.replaced = self.replaced + 1
        self.absent = torch.ones(1)
        self.register_buffer("new", torch.ones(1))
        noise = torch.rand(2) + float(np.random.rand()) + random.random()  # noqa: NPY002
        return self.norm(self.layer(x + noise))


@pytest.fixture
def restless():
    """Return a restless model with mixed flags and gradients: some frozen, some with a gradient."""
    model = Restless()
    model.eval()
    model.norm.train()
    model.layer.bias.requires_grad_(False)
    model.layer.weight.grad = torch.full((2, 2), 3.0)
    return model


@pytest.mark.parametrize("end", ["success", "error", "interrupt"])
def test_borrowed_model_is_given_back_bit_for_bit(restless, end):
    """Flags of each module, buffers, gradients, requires_grad and random states come back, however it ends."""
    ends = {"success": None, "error": ValueError("of the user's"), "interrupt": KeyboardInterrupt()}

    def use():
        with borrow(restless) as model:
            assert model is restless
            model(INPUTS)
            for parameter in model.parameters():
                parameter.requires_grad_(not parameter.requires_grad)
            model.train()
            model(INPUTS).sum().backward()
            if ends[end] is not None:
                raise ends[end]

    before = model_state(restless)
    if ends[end] is None:
        use()
    else:
        with pytest.raises(type(ends[end])):
            use()
    assert_same_state(before, model_state(restless))


def test_error_of_the_model_comes_through():
    """What the model raises comes out as it is, and the model is given back."""

    def fail(x):
        torch.rand(1)
        raise ZeroDivisionError("inside the model")

    model = nn.Sequential(nn.Linear(2, 2), Apply(fail))
    with unchanged(model), pytest.raises(ZeroDivisionError, match="inside the model"), borrow(model):
        model(INPUTS)


def test_borrowed_model_is_in_evaluation_mode():
    """Inside, every module is in evaluation mode, whatever flag it had."""
    model = nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.5).eval(), nn.BatchNorm1d(2))
    with borrow(model):
        assert not any(module.training for module in model.modules())
        assert torch.equal(model(INPUTS), model(INPUTS))
    assert [module.training for module in model.modules()] == [True, True, False, True]


def test_gradients_inside_do_not_add_to_the_owners():
    """Inside no parameter has a gradient, so what accumulates there does not reach the owner's."""
    model = nn.Sequential(nn.Linear(2, 1))
    model(INPUTS).sum().backward()
    with unchanged(model), borrow(model):
        assert model[0].weight.grad is None
        model(INPUTS).sum().backward()
        assert torch.equal(model[0].weight.grad, torch.tensor([[5.0, 4.0]]))


def test_random_numbers_inside_come_from_the_seed():
    """Inside, the generators of torch, numpy and Python start from the seed; outside they go on as if untouched."""

    def draw():
        return torch.rand(()).item(), np.random.rand(), random.random()  # noqa: NPY002

    model = small_mlp()
    drawn = []
    for seed in (1, 1, 2):
        with borrow(model, seed=seed):
            drawn.append(draw())
    assert drawn[0] == drawn[1]
    assert not set(drawn[0]) & set(drawn[2])
    state = random_states()
    with borrow(model):
        draw()
    assert random_states() == state


def test_random_states_of_accelerators_are_given_back(monkeypatch):
    """Where there are accelerators, the states of their generators come back as well."""
    given_back = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_rng_state_all", lambda: ["state of cuda:0"])
    monkeypatch.setattr(torch.cuda, "set_rng_state_all", given_back.append)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(torch.mps, "get_rng_state", lambda: "state of mps")
    monkeypatch.setattr(torch.mps, "set_rng_state", given_back.append)
    with borrow(small_mlp()):
        assert given_back == []
    assert given_back == [["state of cuda:0"], "state of mps"]


def test_unchanged_buffers_are_not_written_to(restless):
    """A buffer that has not changed is not written to, so that a graph of the user's that holds it stays valid."""
    weight = torch.ones(4, requires_grad=True)
    loss = (weight * restless.untouched).sum()
    version = restless.untouched._version
    with borrow(restless) as model:
        model(INPUTS)
    assert restless.untouched._version == version
    loss.backward()
    assert torch.equal(weight.grad, torch.ones(4))


def test_buffers_of_inference_mode_are_given_back():
    """A buffer made in inference mode, which keeps no version, comes back as well."""
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    with torch.inference_mode():
        model[1].running_mean = torch.tensor([1.0, 2.0])
    with unchanged(model), borrow(model), torch.inference_mode():
        model[1].running_mean.add_(1)


def test_parameters_of_inference_mode_can_be_borrowed():
    """A model made in inference mode can be borrowed and given back."""
    with torch.inference_mode():
        model = nn.Sequential(nn.Linear(2, 2))
    with unchanged(model), borrow(model), torch.no_grad():
        assert model(INPUTS).shape == (2, 2)


def test_another_device_gets_a_copy():
    """A model that lies on another device than asked for is not moved: a copy of it is lent."""
    model = small_mlp()
    with unchanged(model), borrow(model, device="meta") as lent:
        assert lent is not model
        assert {parameter.device.type for parameter in lent.parameters()} == {"meta"}
        assert {parameter.device.type for parameter in model.parameters()} == {"cpu"}
        assert not any(module.training for module in lent.modules())
        assert lent(torch.zeros(5, 3, device="meta")).shape == (5, 2)


@pytest.mark.parametrize("device", ["cpu", torch.device("cpu"), None])
def test_the_same_device_gets_the_model_itself(device):
    """A model that lies where it is to be measured is lent itself."""
    model = small_mlp()
    with borrow(model, device=device) as lent:
        assert lent is model


def test_model_that_cannot_be_copied_is_refused():
    """A model that cannot be copied is refused with the reason and what to do, and is given back."""
    model = small_mlp()
    model.cache = model[0].weight * 2
    message = r"The model cannot be copied \(.*graph.*\)\. Remove non-parameter tensors .* leave device= out"
    with unchanged(model), pytest.raises(UnsupportedModelError, match=message), borrow(model, device="meta"):
        pass
    with pytest.raises(UnsupportedModelError, match="The model cannot be copied") as caught:
        copy_model(model)
    assert isinstance(caught.value.__cause__, RuntimeError)


def test_copy_is_equal_and_apart():
    """A copy has the same weights in tensors of its own."""
    model = small_mlp()
    copied = copy_model(model)
    for mine, theirs in zip(model.parameters(), copied.parameters(), strict=True):
        assert mine is not theirs
        assert content_of(mine) == content_of(theirs)
        assert mine.data_ptr() != theirs.data_ptr()


def two_devices():
    """Return a model that lies on two devices."""
    return nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2, device="meta"))


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (nn.ReLU(), "The model has no parameters, so there is nothing to retrain"),
        (nn.Sequential(nn.LazyLinear(2)), "The model has lazy parameters or buffers. Run one batch through it first"),
        (nn.Sequential(nn.Linear(2, 2), nn.LazyBatchNorm1d(affine=False)), "lazy parameters or buffers"),
        (two_devices(), r"The model lies on several devices \(cpu, meta\). Move it to one"),
        (torch.relu, "The model must be a torch.nn.Module. Got builtin_function_or_method instead"),
        (nn.Linear, "The model must be a torch.nn.Module. Got type instead"),
    ],
    ids=["no parameters", "lazy parameters", "lazy buffers", "two devices", "function", "class"],
)
def test_model_that_cannot_be_measured_is_refused(model, message):
    """A model that cannot be measured is refused before anything is done with it."""
    state = random_states()
    with pytest.raises(UnsupportedModelError, match=message), borrow(model):
        pass
    assert random_states() == state


@pytest.mark.parametrize(
    ("model", "place"),
    [
        (nn.Linear(2, 2), ("cpu", torch.float32)),
        (nn.Linear(2, 2).to(torch.bfloat16), ("cpu", torch.bfloat16)),
        (nn.Linear(2, 2, device="meta", dtype=torch.float64), ("meta", torch.float64)),
        (nn.ParameterList([nn.Parameter(torch.ones(2, dtype=torch.int8), requires_grad=False)]), ("cpu", None)),
    ],
    ids=["float32", "bfloat16", "elsewhere", "no floating parameters"],
)
def test_place_of_a_model(model, place):
    """A model's place is the device of its parameters and the type of the first floating one, else the default."""
    device, dtype = model_place(model)
    assert (device.type, dtype) == (place[0], place[1] or torch.get_default_dtype())
