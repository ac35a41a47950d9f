"""A model that is lent, and given back bit for bit on every path; models that cannot be."""

import contextlib
import functools
import random

import numpy as np
import pytest
import torch
from helpers import (
    Apply,
    assert_same_state,
    content_of,
    model_state,
    random_states,
    small_mlp,
    unchanged,
)
from torch import nn

from retrainscope import snapshot
from retrainscope.exceptions import (
    UnsupportedModelError,
)
from retrainscope.lending import borrow, copy_model, gradients_in_evaluation, model_place

INPUTS = torch.tensor([[0.0, 3.0], [5.0, 1.0]])


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


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:.torch.jit.script. is deprecated")
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
    model.cache = [model[0].weight * 2]
    message = r"The model cannot be copied \(.*graph.*\)\. Remove non-parameter tensors .* leave device= out"
    with unchanged(model), pytest.raises(UnsupportedModelError, match=message), borrow(model, device="meta"):
        pass
    with pytest.raises(UnsupportedModelError, match="The model cannot be copied") as caught:
        copy_model(model)
    assert isinstance(caught.value.__cause__, RuntimeError)


def test_what_a_module_has_computed_is_copied_as_it_is():
    """A tensor with a graph that a module keeps is copied without it, so that the model can be copied at all."""
    model = small_mlp()
    model.cache = model[0].weight * 2
    copied = copy_model(model)
    assert torch.equal(copied.cache, model.cache)
    assert not copied.cache.requires_grad


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


def test_a_method_of_the_name_is_not_taken_for_torchs():
    """A module of the user's with a method `reshard` is lent as any other, and the method is not called."""

    class Own(nn.Linear):
        def reshard(self):
            raise AssertionError

    model = Own(2, 2)
    with unchanged(model), borrow(model) as lent:
        assert lent is model


# What else a forward pass may change


class Keeping(nn.Linear):
    """Keeps what it saw, counts its calls, and names a parameter and a module anew."""

    calls = 0

    def forward(self, x):
        self.calls += 1
        self.kept = super().forward(x)
        self.weight = nn.Parameter(self.weight.detach().clone())
        self.inner = nn.Identity()
        return self.inner(self.kept)


def test_attributes_of_modules_are_given_back():
    """What a forward pass leaves in a module goes, so that the model can be copied as before; what was there stays."""
    model = nn.Sequential(Keeping(2, 2), nn.Linear(2, 1))
    with torch.no_grad():
        model(INPUTS)
    weight, kept, calls = model[0].weight, model[0].kept, model[0].calls
    with unchanged(model), borrow(model):
        model(INPUTS).sum().backward()
        assert model[0].kept.requires_grad
    assert (model[0].weight, model[0].kept, model[0].calls) == (weight, kept, calls)
    copy_model(model)
    fresh = nn.Sequential(Keeping(2, 2), nn.Linear(2, 1))
    with borrow(fresh):
        fresh(INPUTS)
    assert not vars(fresh[0]).keys() & {"kept", "calls"}
    assert "inner" not in fresh[0]._modules


@pytest.mark.parametrize("end", ["success", "error"])
def test_other_memory_of_a_parameter_is_given_back(end):
    """A weight that the forward pass brings to a norm lies where it did, with what it held."""

    def renorm(x):
        model[0].weight.data = torch.renorm(model[0].weight.data, 2, 0, 0.1)
        if end == "error":
            raise ZeroDivisionError
        return x

    model = nn.Sequential(nn.Linear(2, 2), Apply(renorm))
    place = model[0].weight.data_ptr()
    with unchanged(model), contextlib.suppress(ZeroDivisionError), borrow(model):
        model(INPUTS)
    assert model[0].weight.data_ptr() == place


@pytest.mark.parametrize("kind", [nn.Embedding, nn.EmbeddingBag])
def test_embeddings_of_a_largest_norm_are_given_back(kind):
    """With `max_norm` torch writes to the weight at every pass; it is measured so, and given back as it was."""
    model = nn.Sequential(kind(5, 3, max_norm=0.5), nn.Linear(3, 2))
    with torch.no_grad():
        model[0].weight.mul_(10)
    with unchanged(model), borrow(model), torch.no_grad():
        model(torch.tensor([[0, 1], [2, 3]]))
        assert model[0].weight[0].norm() < 0.51


def test_a_parameter_written_to_in_place_is_told(monkeypatch):
    """What a forward pass writes to its weights in place is taken back, and the model refused by name."""
    writes = {
        "weight": lambda weight: weight.clamp_(-0.1, 0.1),
        "data": lambda weight: weight.data.clamp_(-0.1, 0.1),
        "detached": lambda weight: weight.detach().clamp_(-0.1, 0.1),
    }
    layer = nn.Linear(2, 2)

    def clip(x, write):
        with torch.no_grad():
            write(layer.weight)
        return x

    for write in writes.values():
        model = nn.Sequential(layer, Apply(functools.partial(clip, write=write)))
        nn.init.constant_(model[0].weight, 0.5)
        message = r"writes to its parameter '0\.weight' in place.*measuring would change it"
        with unchanged(model), pytest.raises(UnsupportedModelError, match=message), borrow(model):
            model(INPUTS)
    monkeypatch.setattr(snapshot, "_MOST_KEPT", 0)  # of a large model the content is not kept
    model = nn.Sequential(layer, Apply(functools.partial(clip, write=writes["weight"])))
    with pytest.raises(UnsupportedModelError, match="measuring has changed it"), borrow(model):
        model(INPUTS)
    model.append(Apply(lambda x: 1 // 0))
    with pytest.raises(ZeroDivisionError), borrow(model):  # an error of the model's own comes first
        model(INPUTS)


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta")
@pytest.mark.parametrize("layout", [torch.sparse_coo, torch.sparse_csr])
def test_sparse_buffers(layout):
    """A model with a graph in a sparse buffer can be lent, and its gradients come back."""
    model = nn.Sequential(nn.Linear(2, 2), Apply(lambda x: (model.graph @ x.T).T))
    model.register_buffer("graph", torch.eye(2).to_sparse(layout=layout))
    model[0].weight.grad = torch.ones(2, 2)
    with borrow(model):
        assert model(INPUTS).shape == (2, 2)
    assert torch.equal(model[0].weight.grad, torch.ones(2, 2))
    assert torch.equal(model.graph.to_dense(), torch.eye(2))


def test_buffers_of_another_size_are_given_back():
    """A buffer that a forward pass makes larger in place has its size and content again."""

    def grow(x):
        model.seen.resize_(6).fill_(1)
        return x

    model = nn.Sequential(nn.Linear(2, 2), Apply(grow))
    model.register_buffer("seen", torch.full((2,), 3.0))
    with borrow(model):
        model(INPUTS)
        assert len(model.seen) == 6
    assert model.seen.tolist() == [3.0, 3.0]


def test_batches_that_are_normalised_by_themselves_are_refused():
    """Without running statistics a sample's output depends on the others of its batch, so the module is named."""
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2, track_running_stats=False))
    message = r"The module '1' \(BatchNorm1d\) has no running statistics .*track_running_stats=True"
    with pytest.raises(UnsupportedModelError, match=message), borrow(model):
        pass
    with borrow(nn.Sequential(nn.Linear(2, 2), nn.InstanceNorm1d(2))):  # by each sample's own
        pass


def test_gradients_of_recurrent_modules_do_without_cudnn():
    """CuDNN has none in evaluation mode; it is on again at the end, and stays on for other models."""
    before = torch.backends.cudnn.enabled
    with gradients_in_evaluation(nn.Sequential(nn.LSTM(2, 2))):
        assert not torch.backends.cudnn.enabled
    assert torch.backends.cudnn.enabled == before
    with gradients_in_evaluation(small_mlp()):
        assert torch.backends.cudnn.enabled == before


class Settling(nn.Module):
    """Sets itself up when it first runs, and keeps what it has seen, as models of transformers do with their hooks."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.ready, self.n_noted = nn.Linear(2, 2), False, 0
        self.history, self.cache, self.names = [1], {"a": 1}, {"b"}
        self.mean = torch.zeros(2)

    def forward(self, x):
        if not self.ready:
            self.inner.register_forward_hook(lambda *_: setattr(self, "n_noted", self.n_noted + 1))
            self.ready = True
        self.history.append(len(x))
        self.cache.clear()
        self.names.add("c")
        self.mean.add_(x.mean(dim=0))
        return self.inner(x)


def test_hooks_and_tables_of_modules_are_given_back():
    """What a model hooks into itself and notes while it is lent is gone: to lend it again does not add to it."""
    model = nn.Sequential(Settling(), nn.Linear(2, 2))
    for _ in range(3):
        with borrow(model):
            model(INPUTS)
            model(INPUTS)
    settling = model[0]
    assert (settling.ready, settling.history, settling.cache, settling.names) == (False, [1], {"a": 1}, {"b"})
    assert settling.mean.tolist() == [0.0, 0.0]
    assert not settling.inner._forward_hooks
    model(INPUTS)
    assert settling.n_noted == 1


def test_parameters_of_all_kinds_are_given_back():
    """A largest norm of something else, weights with NaN and sparse weights are no reason to refuse a model."""
    model = nn.Sequential(nn.Linear(2, 2), Apply(lambda x: (model.graph @ x.T).T))
    model.max_norm = 5.0
    model.graph = nn.Parameter(torch.eye(2).to_sparse(), requires_grad=False)
    with torch.no_grad():
        model[0].bias[0] = torch.nan
    with borrow(model):
        assert model(INPUTS).shape == (2, 2)
    assert model[0].bias.isnan().tolist() == [True, False]
    assert torch.equal(model.graph.to_dense(), torch.eye(2))
