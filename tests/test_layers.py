"""Where to measure, and which layer owns which parameter."""

import dataclasses
from collections import OrderedDict

import numpy as np
import pytest
import torch
from helpers import Apply, hook_count, small_mlp, unchanged
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils.parametrizations import weight_norm
from torch.utils.data import DataLoader, TensorDataset

from retrainscope.exceptions import (
    InvalidDataError,
    LayerNotFoundError,
    LayerNotRunError,
    ReusedLayerError,
    UnsupportedModelError,
)
from retrainscope.layers import find_layers

X = torch.linspace(-1, 1, 18).reshape(6, 3)
IMAGES = torch.linspace(-1, 1, 6 * 2 * 8 * 8).reshape(6, 2, 8, 8)


def owned_once(model, layers):
    """Return whether every trainable parameter is owned once or listed as unused."""
    listed = [name for names in layers.parameters.values() for name in names] + list(layers.unused)
    return sorted(listed) == sorted(name for name, _ in model.named_parameters())


class Net(nn.Module):
    """A module with the given parts, run by the given function of the module and the input."""

    def __init__(self, run, **parts):
        super().__init__()
        self.run = run
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, *args, **kwargs):
        return self.run(self, *args, **kwargs)


def in_turn(*names):
    """Run the named parts one after the other."""

    def run(self, x):
        for name in names:
            x = getattr(self, name)(x)
        return x

    return run


# --- the choice of layers


def test_layers_of_an_mlp(mlp):
    """An MLP is measured at each linear layer but the last, which is the head."""
    found = find_layers(mlp, X)
    assert found.names == ("0", "2")
    assert found.head == "4"
    assert found.shapes == {"0": (8,), "2": (6,)}
    assert found.parameters == {
        "0": ("0.weight", "0.bias"),
        "2": ("2.weight", "2.bias"),
        "4": ("4.weight", "4.bias"),
    }
    assert found.n_parameters == {"0": 3 * 8 + 8, "2": 8 * 6 + 6, "4": 6 * 2 + 2}
    assert found.buffers == {"0": (), "2": (), "4": ()}
    assert found.unused == ()


def conv_block(a, b):
    """Return a block with one convolution and what commonly stands around it."""
    return nn.Sequential(nn.Conv2d(a, b, 3, padding=1), nn.BatchNorm2d(b), nn.ReLU(inplace=True), nn.MaxPool2d(2))


def test_block_with_one_convolution_is_one_layer():
    """A convolution that stands alone in a block is measured at the end of the block, which owns all in it."""
    model = nn.Sequential(conv_block(2, 4), nn.Sequential(conv_block(4, 5)), nn.Flatten(), nn.Linear(20, 3))
    found = find_layers(model, IMAGES)
    assert found.names == ("0", "1")
    assert found.shapes == {"0": (4, 4, 4), "1": (5, 2, 2)}
    assert found.parameters["1"] == ("1.0.0.weight", "1.0.0.bias", "1.0.1.weight", "1.0.1.bias")
    assert found.buffers["1"] == ("1.0.1.running_mean", "1.0.1.running_var")
    assert owned_once(model, found)


def test_block_with_two_convolutions_is_two_layers():
    """A block with two convolutions is measured at each of them."""
    model = nn.Sequential(
        nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3)), nn.Flatten(), nn.Linear(64, 3)
    )
    assert find_layers(model, IMAGES).names == ("0.0", "0.2")


def test_block_that_runs_twice_is_no_layer():
    """A weighted module is not replaced by a block that runs more than once."""
    block = Net(lambda self, x, skip: x if skip else self.fc(x), fc=nn.Linear(3, 3))
    model = Net(lambda self, x: self.head(self.block(self.block(x, True), False)), block=block, head=nn.Linear(3, 2))
    assert find_layers(model, X).names == ("block.fc",)


def test_block_that_holds_the_head_is_no_layer():
    """A weighted module is not replaced by a block that the head is in."""
    model = nn.Sequential(nn.Linear(3, 3), nn.Sequential(nn.Linear(3, 2), nn.LayerNorm(2)))
    found = find_layers(model, X)
    assert (found.names, found.head) == (("0", "1.0"), "1.1")
    assert found.parameters["1.1"] == ("1.1.weight", "1.1.bias")


def test_block_that_does_not_return_a_tensor_is_no_layer():
    """A weighted module is replaced by a block that returns a tensor among others, not by one that returns none."""
    block = Net(lambda self, x: (self.fc(x), x), fc=nn.Linear(3, 3))
    model = Net(lambda self, x: self.head(self.block(x)[0]), block=block, head=nn.Linear(3, 2))
    assert find_layers(model, X).names == ("block",)
    block.run = lambda self, x: self.keep.append(self.fc(x))
    block.keep = []
    model.run = lambda self, x: (self.block(x), self.head(block.keep.pop()))[1]
    assert find_layers(model, X).names == ("block.fc",)


def test_block_with_weights_of_its_own_is_one_layer():
    """A block with weights of its own and one weighted module is measured once."""
    block = Net(lambda self, x: self.fc(x) * self.scale, fc=nn.Linear(3, 3), scale=nn.Parameter(torch.ones(1, 3)))
    found = find_layers(nn.Sequential(block, nn.Linear(3, 2)), X)
    assert found.names == ("0",)
    assert found.parameters["0"] == ("0.scale", "0.fc.weight", "0.fc.bias")


def test_module_that_does_not_run_is_no_layer():
    """A module that the forward pass leaves out is not measured, and its parameters are listed as unused."""
    model = small_mlp()
    model[1].idle = nn.Linear(3, 3)
    found = find_layers(model, X)
    assert found.names == ("0", "2")
    assert found.unused == ("1.idle.weight", "1.idle.bias")
    assert owned_once(model, found)


def test_order_is_that_of_execution():
    """Layers are listed in the order in which they run, not that in which they were made or asked for."""
    model = Net(in_turn("first", "second", "last"), last=nn.Linear(5, 2), second=nn.Linear(4, 5), first=nn.Linear(3, 4))
    assert find_layers(model, X).names == ("first", "second")
    assert find_layers(model, X, layers=["second", "first"]).names == ("first", "second")
    assert list(find_layers(model, X).parameters) == ["first", "second", "last"]


def test_layer_that_holds_another_comes_after_it():
    """A module ends after those inside it, and owns what it uses after the last of them."""
    block = Net(
        lambda self, x: self.b(self.a(x)) + self.shift,
        a=nn.Linear(3, 3),
        b=nn.Linear(3, 3),
        shift=nn.Parameter(torch.ones(3)),
    )
    found = find_layers(nn.Sequential(block, nn.Linear(3, 2)), X, layers=["0", "0.a"])
    assert found.names == ("0.a", "0")
    assert found.parameters["0"] == ("0.shift", "0.b.weight", "0.b.bias")


@pytest.mark.parametrize(
    "layers", [lambda: "2", lambda: ["2", "2"], lambda: iter(["2"])], ids=["one name", "twice", "iterator"]
)
def test_layers_may_be_asked_for(mlp, layers):
    """Only the layers asked for are measured, and what comes before belongs to them."""
    found = find_layers(mlp, X, layers=layers())
    assert found.names == ("2",)
    assert found.parameters["2"] == ("0.weight", "0.bias", "2.weight", "2.bias")


def test_one_type_may_be_asked_for(mlp):
    """A type by itself is taken as one type, as a name is."""
    expected = find_layers(mlp, X, layers=[nn.Linear]).names
    assert find_layers(mlp, X, layers=nn.Linear).names == expected == ("0", "2")


def test_layer_without_weights_may_be_asked_for(mlp):
    """A module without weights may be measured, and owns what runs between the layer before and itself."""
    found = find_layers(mlp, X, layers=["0", "1", "3"])
    assert found.parameters["1"] == ()
    assert found.parameters["3"] == ("2.weight", "2.bias")


def test_module_with_two_names_may_be_asked_for_by_either():
    """A module that is registered twice is known by its first name, and found by the second."""
    first, norm, second, head = nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Linear(3, 3), nn.Linear(3, 2)
    model = Net(
        lambda self, x: nn.Sequential.forward(self.every, x),
        first=first,
        norm=norm,
        second=second,
        head=head,
        every=nn.Sequential(first, norm, second, head),
    )
    found = find_layers(model, X)
    assert (found.names, found.head) == (("first", "second"), "head")
    assert found.parameters["first"] == ("first.weight", "first.bias", "norm.weight", "norm.bias")
    assert find_layers(model, X, layers=["every.0", "every.2"]).parameters == {
        "every.0": found.parameters["first"],
        "every.2": found.parameters["second"],
        "head": found.parameters["head"],
    }


def test_pattern_fits_second_names_too():
    """A pattern fits what a module is called where it is registered for the second time."""
    first, second, head = nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 2)
    every = nn.Sequential(first, second, head)
    model = Net(lambda self, x: self.every(x), first=first, second=second, head=head, every=every)
    assert find_layers(model, X, layers=["every.*"], head="every.2").names == ("every.0", "every.1")


class Transformer(nn.Module):
    """A small transformer with a class token and learnt positions outside of any module."""

    def __init__(self, *, norm_first=False):
        super().__init__()
        self.token = nn.Parameter(torch.zeros(1, 1, 8))
        self.positions = nn.Parameter(torch.zeros(1, 7, 8))
        self.embedding = nn.Linear(3, 8)
        layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, norm_first=norm_first)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(8, 2)

    def forward(self, x):
        x = self.embedding(x)
        x = torch.cat([self.token.expand(len(x), -1, -1), x], dim=1) + self.positions
        return self.head(self.encoder(x)[:, 0])


@pytest.mark.parametrize("norm_first", [False, True])
def test_layers_of_a_transformer(norm_first):
    """Attention counts by the first tensor that it returns; class token and positions count with the first block's."""
    model = Transformer(norm_first=norm_first)
    found = find_layers(model, torch.zeros(5, 6, 3))
    parts = ("self_attn", "linear1", "linear2")
    layers = [f"encoder.layers.{block}.{part}" for block in (0, 1) for part in parts]
    assert found.names == ("embedding", *layers)
    assert {"token", "positions"} < set(found.parameters[layers[0]])
    for part in ("in_proj_weight", "in_proj_bias", "out_proj.weight", "out_proj.bias"):
        assert f"encoder.layers.0.self_attn.{part}" in found.parameters[layers[0]]
        assert f"encoder.layers.1.self_attn.{part}" in found.parameters[layers[3]]
    assert owned_once(model, found)
    assert found.unused == ()


def test_layers_around_a_recurrent_one():
    """A recurrent layer counts by itself, or with the block that it stands alone in."""
    rnn = Net(lambda self, x: self.lstm(x)[0][:, -1], lstm=nn.LSTM(3, 4, batch_first=True))
    found = find_layers(nn.Sequential(rnn, nn.Linear(4, 2)), torch.zeros(5, 6, 3))
    assert found.names == ("0",)
    assert len(found.parameters["0"]) == 4
    bare = Net(
        lambda self, x: self.head(self.fc(self.gru(x)[0][:, -1])),
        gru=nn.GRU(3, 4, batch_first=True),
        fc=nn.Linear(4, 4),
        head=nn.Linear(4, 2),
    )
    found = find_layers(bare, torch.zeros(5, 6, 3))
    assert found.names == ("gru", "fc")
    assert found.shapes["gru"] == (6, 4)
    assert "gru.weight_hh_l0" in found.parameters["gru"]
    assert owned_once(bare, found)


def twice_and_once(**others):
    """Return a network whose block runs one linear layer twice and another once; others run before its head."""
    block = Net(in_turn("twice", "twice", "once"), twice=nn.Linear(3, 3), once=nn.Linear(3, 3))
    parts = {"block": block, **others, "head": nn.Linear(3, 2)}
    return Net(in_turn(*parts), **parts)


def test_block_around_a_layer_that_runs_twice():
    """The block around a layer that runs twice is taken, but not where it holds more than half of the network."""
    found = find_layers(twice_and_once(other=nn.Linear(3, 3)), X)
    assert found.names == ("block", "other")
    assert len(found.parameters["block"]) == 4
    model = twice_and_once()
    model.matrix = nn.Parameter(torch.ones(3, 3))  # which makes the model itself no layer with weights
    found = find_layers(model, X)
    assert found.names == ("block.once",)
    assert len(found.parameters["block.once"]) == 4


def test_block_around_all_that_runs_twice():
    """Where no layer can be measured otherwise the block is taken, however much of the network it holds."""
    model = twice_and_once()
    model.block.run = in_turn("twice", "once", "twice", "once")
    assert find_layers(model, X).names == ("block",)


@pytest.mark.parametrize(
    ("calls", "names", "n_owned", "flops"),
    [
        ("first", ("twice", "between", "after"), (2, 2, 2, 2), (18, 18, 36, 12)),
        ("last", ("between", "twice", "after"), (4, 0, 2, 2), (36, 18, 18, 12)),
        ("sum", ("between", "twice", "after"), (4, 0, 2, 2), (36, 18, 18, 12)),
    ],
)
@pytest.mark.parametrize("layers", [None, ["twice", "after", "between"], [nn.Linear]], ids=["default", "names", "type"])
def test_layer_that_runs_twice_counts_by_its_call(layers, calls, names, n_owned, flops):
    """With calls= a layer that runs twice has its place, and what it owns, by the call that counts."""
    parts = {name: nn.Linear(3, 3) for name in ("twice", "between", "after")}
    model = Net(in_turn("twice", "between", "twice", "after", "head"), **parts, head=nn.Linear(3, 2))
    found = find_layers(model, X, layers=layers, calls=calls)
    assert found.names == names
    assert tuple(len(found.parameters[name]) for name in (*names, "head")) == n_owned
    assert tuple(found.flops[name] for name in (*names, "head")) == flops
    assert found.shapes == dict.fromkeys(names, (3,))


def test_tokens_are_found_by_their_mask():
    """With a mask the axis of the tokens is told, not for what pools; what padding holds need not be finite."""
    model = Net(
        lambda self, ids, attention_mask: self.head(self.pool(self.mix(self.words(ids)).nan_to_num())),
        words=nn.Embedding(9, 4),
        mix=nn.Linear(4, 4),
        pool=nn.Sequential(Apply(lambda x: x.sum(dim=1)), nn.Linear(4, 4)),
        head=nn.Linear(4, 2),
    )
    with torch.no_grad():
        model.words.weight[0] = torch.nan
    ids = torch.tensor([[1, 2, 3], [4, 5, 0], [6, 7, 8], [2, 0, 0]])
    data = {"ids": ids, "attention_mask": (ids > 0).long()}
    found = find_layers(model, data, input_layer="words")
    assert found.names == ("mix", "pool")
    assert found.token_axes == {"mix": 1, "words": 1}
    assert find_layers(model, data, layers=["mix"]).token_axes == {"mix": 1}


def square_tokens():
    """Return a model of texts of three tokens, with three features each but for one layer, and data for it."""
    model = Net(
        lambda self, ids, attention_mask: self.head(self.b(self.a(self.c(self.words(ids)) + self.places)).sum(dim=1)),
        words=nn.Embedding(9, 3),
        c=nn.Linear(3, 3),
        places=nn.Parameter(torch.zeros(3, 3)),  # so that it takes no shorter texts
        a=nn.Linear(3, 3),
        b=nn.Linear(3, 5),
        head=nn.Linear(5, 2),
    )
    return model, {"ids": torch.arange(12).reshape(4, 3) % 9, "attention_mask": torch.ones(4, 3, dtype=torch.long)}


def test_layers_whose_tokens_are_unclear_are_left_out():
    """A layer in whose output tokens cannot be told from features is none, and refused where it is asked for."""
    model, data = square_tokens()
    assert find_layers(model, data).names == ("b",)
    assert find_layers(model, data, layers=[nn.Linear]).names == ("b",)
    for options in ({"layers": ["c", "b"]}, {"input_layer": "c"}):
        with pytest.raises(UnsupportedModelError, match=r"'c', of shape \(4, 3, 3\), padding cannot be told from"):
            find_layers(model, data, **options)


def test_tokens_that_are_unclear_everywhere_are_refused():
    """Where no layer is left the error names the first one that runs."""
    model, data = square_tokens()
    model.b, model.head = nn.Linear(3, 3), nn.Linear(3, 2)
    with pytest.raises(UnsupportedModelError, match=r"'words', of shape \(4, 3, 3\)"):
        find_layers(model, data)


# --- who owns what


def test_norm_counts_with_what_it_follows():
    """A norm outside any layer belongs to the layer before it, with its running statistics."""
    model = nn.Sequential(
        nn.BatchNorm2d(2),  # follows nothing
        nn.Conv2d(2, 3, 3),
        nn.BatchNorm2d(3),
        nn.ReLU(),
        nn.Conv2d(3, 4, 3),
        nn.GroupNorm(2, 4),
        nn.GroupNorm(1, 4),
        nn.Flatten(),
        nn.Linear(64, 2),
    )
    found = find_layers(model, IMAGES)
    assert found.parameters == {
        "1": ("0.weight", "0.bias", "1.weight", "1.bias", "2.weight", "2.bias"),
        "4": ("4.weight", "4.bias", "5.weight", "5.bias", "6.weight", "6.bias"),
        "8": ("8.weight", "8.bias"),
    }
    statistics = ("0.running_mean", "0.running_var", "2.running_mean", "2.running_var")
    assert found.buffers == {"1": statistics, "4": (), "8": ()}


def test_norm_after_what_is_not_measured_stays_with_it():
    """A norm that follows weights which count with the next layer counts with that layer as well."""
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3), nn.LayerNorm(3), nn.Linear(3, 3), nn.Linear(3, 2))
    found = find_layers(model, X, layers=["0", "3"])
    assert found.parameters["3"] == ("1.weight", "1.bias", "2.weight", "2.bias", "3.weight", "3.bias")


def test_norm_inside_a_layer_belongs_to_it():
    """A norm at the beginning of a measured block belongs to that block, one at that of the head to the head."""
    model = nn.Sequential(
        nn.Linear(3, 3),
        nn.Sequential(nn.LayerNorm(3), nn.Linear(3, 3)),
        nn.Sequential(nn.LayerNorm(3), nn.Linear(3, 2)),
    )
    found = find_layers(model, X, head="2")
    assert found.names == ("0", "1")
    assert found.parameters["0"] == ("0.weight", "0.bias")
    assert found.parameters["1"][:2] == ("1.0.weight", "1.0.bias")
    assert found.parameters["2"] == ("2.0.weight", "2.0.bias", "2.1.weight", "2.1.bias")


def test_what_is_left_belongs_to_the_head():
    """Parameters used after the last layer belong to the head."""
    model = nn.Sequential(nn.Linear(3, 3), nn.PReLU(), nn.Linear(3, 2))
    assert find_layers(model, X).parameters["2"] == ("1.weight", "2.weight", "2.bias")


def test_parameters_outside_of_modules_are_owned():
    """A parameter of the model itself belongs to the layer that follows its first use."""
    model = Net(
        lambda self, x: self.head(self.b(self.a(x) + self.middle) * self.late),
        a=nn.Linear(3, 3),
        b=nn.Linear(3, 3),
        head=nn.Linear(3, 2),
        middle=nn.Parameter(torch.ones(3)),
        late=nn.Parameter(torch.ones(3)),
        idle=nn.Parameter(torch.ones(3)),
    )
    found = find_layers(model, X)
    assert found.parameters["b"] == ("middle", "b.weight", "b.bias")
    assert found.parameters["head"] == ("late", "head.weight", "head.bias")
    assert found.unused == ("idle",)
    assert owned_once(model, found)


def test_parameters_used_before_the_model_begins_are_owned():
    """A parameter that a hook of the user's uses before the forward pass belongs to the first layer."""
    model = small_mlp()
    model.shift = nn.Parameter(torch.ones(3))
    model.register_forward_pre_hook(lambda module, args: (args[0] + module.shift,))
    assert find_layers(model, X).parameters["0"] == ("shift", "0.weight", "0.bias")


def test_asking_for_the_type_of_a_parameter_is_not_using_it():
    """To look at a parameter's type, shape or device early in the forward pass does not decide who owns it."""
    model = Net(
        lambda self, x: self.head(self.b(self.a(x.to(self.b.weight.dtype)[:, : self.b.weight.shape[0]]))),
        a=nn.Linear(3, 3),
        b=nn.Linear(3, 3),
        head=nn.Linear(3, 2),
    )
    assert find_layers(model, X).parameters["b"] == ("b.weight", "b.bias")


def test_tied_weights_have_one_owner():
    """A weight that two modules share belongs to the layer that uses it first."""
    model = Net(in_turn("a", "b", "head"), a=nn.Linear(3, 3), b=nn.Linear(3, 3), head=nn.Linear(3, 2))
    model.b.weight = model.a.weight
    found = find_layers(model, X)
    assert found.parameters == {
        "a": ("a.weight", "a.bias"),
        "b": ("b.bias",),
        "head": ("head.weight", "head.bias"),
    }
    assert owned_once(model, found)


@pytest.mark.parametrize("bias", [True, False])
def test_parametrised_weights_are_owned(bias):
    """What a parametrised weight is made from belongs to the module whose weight it is, and is no layer itself."""
    model = nn.Sequential(
        weight_norm(nn.Linear(3, 4, bias=bias)), nn.ReLU(), nn.Sequential(weight_norm(nn.Linear(4, 2, bias=bias)))
    )
    found = find_layers(model, X)
    assert (found.names, found.head) == (("0",), "2.0")
    parts = ("parametrizations.weight.original0", "parametrizations.weight.original1")
    assert set(found.parameters["0"]) == {f"0.{part}" for part in parts} | ({"0.bias"} if bias else set())
    assert set(found.parameters["2.0"]) == {f"2.0.{part}" for part in parts} | ({"2.0.bias"} if bias else set())
    assert owned_once(model, found)


def test_head_owns_what_is_used_inside_it():
    """A head that runs before another branch keeps its parameters."""
    model = Net(
        lambda self, x: (lambda h: self.main(h) + self.other(h))(self.a(x)),
        a=nn.Linear(3, 3),
        main=nn.Linear(3, 2),
        other=nn.Linear(3, 2),
    )
    found = find_layers(model, X, head="main")
    assert found.parameters["main"] == ("main.weight", "main.bias")
    assert found.parameters["other"] == ("other.weight", "other.bias")


@st.composite
def networks(draw):
    """Draw a network of blocks of many kinds, nested and not, with idle, tied and bare parameters."""
    width = 4

    def block():
        kind = draw(st.sampled_from(["linear", "block", "two", "norm", "prelu", "shift", "normed", "residual"]))
        linear = nn.Linear(width, width, bias=draw(st.booleans()))
        if kind == "linear":
            return linear
        if kind == "block":
            return nn.Sequential(nn.LayerNorm(width), linear, nn.ReLU(inplace=True))
        if kind == "two":
            return nn.Sequential(linear, nn.BatchNorm1d(width), nn.Linear(width, width))
        if kind == "norm":
            return nn.BatchNorm1d(width)
        if kind == "prelu":
            return nn.PReLU()
        if kind == "normed":
            return weight_norm(linear)
        if kind == "residual":
            return Net(lambda self, x: x + self.inner(x), inner=linear, idle=nn.Linear(1, 1))
        return Net(lambda self, x: x + self.shift, shift=nn.Parameter(torch.ones(width)))

    parts = [block() for _ in range(draw(st.integers(1, 5)))]
    model = nn.Sequential(nn.Linear(3, width), *parts, nn.Linear(width, 2))
    linears = [part for part in model if type(part) is nn.Linear and part.out_features == part.in_features]
    if len(linears) > 1 and draw(st.booleans()):
        linears[-1].weight = linears[0].weight
    return model


@given(model=networks())
def test_every_parameter_is_owned_once(model):
    """In any network every parameter belongs to one layer or to the head, or is listed as unused."""
    found = find_layers(model, X)
    assert owned_once(model, found)
    assert list(found.parameters) == list(found.buffers) == [*found.names, found.head]
    gradients = torch.autograd.grad(model.eval()(X).sum(), list(model.parameters()), allow_unused=True)
    without = {name for (name, _), g in zip(model.named_parameters(), gradients, strict=True) if g is None}
    assert set(found.unused) == without


# --- head, input layer, cost


def test_head_may_be_named(mlp):
    """A head that is named is taken, and what is in front of it is measured."""
    mlp[4] = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 2))
    assert find_layers(mlp, X).names == ("0", "2", "4.0")
    found = find_layers(mlp, X, head="4")
    assert (found.names, found.head) == (("0", "2"), "4")
    assert found.parameters["4"] == ("4.0.weight", "4.0.bias", "4.2.weight", "4.2.bias")


def test_head_is_the_last_that_runs_not_the_last_that_was_made():
    """The head is the module with parameters that runs last."""
    model = Net(in_turn("a", "out"), out=nn.Linear(3, 2), a=nn.Linear(3, 3), idle=nn.Linear(3, 3))
    assert find_layers(model, X).head == "out"


def test_input_layer_is_no_layer():
    """The input layer is not measured, nor is what is inside it; what it owns counts with the first layer."""
    model = Net(
        lambda self, ids: self.head(self.fc(self.embedding(ids).mean(dim=1))),
        embedding=nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 4)),
        fc=nn.Linear(4, 4),
        head=nn.Linear(4, 2),
    )
    ids = torch.arange(12).reshape(4, 3) % 9
    assert find_layers(model, ids).names == ("embedding", "fc")
    found = find_layers(model, ids, input_layer="embedding")
    assert found.names == ("fc",)
    assert "embedding.0.weight" in found.parameters["fc"]


def test_operations_of_linear_layers_are_known_by_hand(mlp):
    """A linear layer takes two operations for each weight and sample, whatever the number of samples."""
    expected = {"0": 2 * 3 * 8, "2": 2 * 8 * 6, "4": 2 * 6 * 2}
    for n_samples in (1, 3, 6):
        assert find_layers(mlp, X[:n_samples]).flops == expected


def test_operations_count_up_to_the_layer():
    """What lies between two layers counts with the later one, and what comes last with the head."""
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 5), nn.Linear(5, 6), nn.Linear(6, 2))
    found = find_layers(model, X, layers=["1"])
    assert found.flops == {"1": 2 * (3 * 4 + 4 * 5), "3": 2 * (5 * 6 + 6 * 2)}


def test_operations_of_convolutions_are_known_by_hand():
    """A convolution takes two operations for each weight, place and sample."""
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.Flatten(), nn.Linear(4 * 6 * 6, 3))
    assert find_layers(model, IMAGES).flops == {"0": 2 * 4 * 2 * 9 * 36, "2": 2 * 144 * 3}


# --- the example


@pytest.mark.parametrize(
    "example",
    [
        X,
        X.numpy(),
        X.to(torch.float64),
        X[:1],
        (X, list("ababab")),
        TensorDataset(X, torch.arange(6)),
        DataLoader(TensorDataset(X, torch.arange(6)), batch_size=6, shuffle=True),
        [(X, np.arange(6))],
        {"input": X},
    ],
    ids=["tensor", "array", "float64", "one sample", "X and y", "data set", "loader", "list", "mapping"],
)
def test_example_may_have_any_form(mlp, example):
    """The example may have any form that data may have, and its form changes nothing."""
    with unchanged(mlp):
        found = find_layers(mlp, example)
    assert found == find_layers(mlp, X)


def test_only_a_few_samples_are_run():
    """The dry run uses at most four samples, and one less to see which dimension they are."""
    seen = []
    model = nn.Sequential(Apply(lambda x: seen.append(len(x)) or x), nn.Linear(3, 3), nn.Linear(3, 2))
    find_layers(model, [torch.zeros(100, 3)])
    find_layers(model, {"input": torch.zeros(100, 3)})
    find_layers(model, torch.zeros(2, 3))
    assert seen == [4, 3, 4, 4, 3, 4, 2, 1, 2]
    seen.clear()
    find_layers(model, torch.zeros(2, 3), layers=["1"])  # once more on one less: outputs asked for are looked at too
    find_layers(model, torch.zeros(1, 3), layers=["1"])
    assert seen == [2, 1, 2, 1, 1, 1]


def test_wrong_example_is_refused(mlp):
    """What is wrong with the example is said under its own name."""
    with unchanged(mlp), pytest.raises(InvalidDataError, match="The example data is empty"):
        find_layers(mlp, X[:0])


@pytest.mark.parametrize(
    ("model", "example"),
    [
        (small_mlp(inplace=True), X),
        (Transformer(), torch.zeros(5, 6, 3)),
        (nn.Sequential(conv_block(2, 3), nn.Flatten(), nn.Linear(48, 2)), IMAGES),
    ],
    ids=["mlp", "transformer", "convolutions"],
)
def test_model_is_left_as_it_was(model, example):
    """Finding layers leaves the model, its hooks and the random states bit for bit as they were."""
    for number, module in enumerate(model.modules()):
        module.training = number % 2 == 0
    next(model.parameters()).grad = torch.ones_like(next(model.parameters()))
    with unchanged(model):
        find_layers(model, example)
    assert hook_count(model) == 0


def test_model_that_fails_is_left_as_it_was():
    """An error in the dry run comes through, and the model and its hooks are as they were."""

    def fail(x):
        raise ZeroDivisionError("inside the model")

    model = nn.Sequential(nn.Linear(3, 3), Apply(fail), nn.Linear(3, 2))
    with unchanged(model), pytest.raises(ZeroDivisionError, match="inside the model"):
        find_layers(model, X)


def test_result_cannot_be_changed(mlp):
    """What was found is frozen."""
    with pytest.raises(dataclasses.FrozenInstanceError):
        find_layers(mlp, X).head = "0"


# --- what is refused


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layers": ["0", "5"]}, r"no layer named '5'. It has '0', '1', '2', '3', '4'\."),
        ({"head": "five"}, "no head named 'five'"),
        ({"head": ""}, "no head named ''"),
        ({"input_layer": "embedding"}, "no input layer named 'embedding'"),
        ({"layers": []}, r"^The 'layers' parameter must .* returns a tensor\. Leave it out for the default\.$"),
    ],
)
def test_layers_that_are_not_there_are_refused(mlp, options, message):
    """A layer, head or input layer that the model lacks is refused before anything runs."""
    with unchanged(mlp), pytest.raises(LayerNotFoundError, match=message):
        find_layers(mlp, X, **options)


def test_calls_that_mean_nothing_are_refused(mlp):
    """What counts of a layer that runs several times is one of three words."""
    with pytest.raises(InvalidDataError, match=r"'calls' parameter must be 'first' or 'last' or 'sum'\. Got 'all'"):
        find_layers(mlp, X, calls="all")


@pytest.mark.parametrize("layers", [None, ["shared"]], ids=["by default", "asked for"])
def test_layer_that_runs_twice_is_refused(layers):
    """A layer that runs more than once is refused by name with the number of runs, and what to do."""
    model = Net(in_turn("shared", "shared", "head"), shared=nn.Linear(3, 3), head=nn.Linear(3, 2))
    message = (
        r"'shared' runs 2 times in one forward pass, so its output is not one thing\. Name the modules around it that "
        r"run once with layers=, or say with calls= whether the first, the last or the sum counts\.$"
    )
    with unchanged(model), pytest.raises(ReusedLayerError, match=message):
        find_layers(model, X, layers=layers)


@pytest.mark.parametrize("option", ["layers", "head"])
def test_layer_that_does_not_run_is_refused(mlp, option):
    """A layer or head that the forward pass leaves out is refused by name."""
    mlp[1].idle = nn.Linear(3, 3)
    asked = {"layers": ["0", "1.idle"]} if option == "layers" else {"head": "1.idle"}
    message = "'1.idle' does not run in the forward pass. Leave it out, or name a module that is called"
    with unchanged(mlp), pytest.raises(LayerNotRunError, match=message):
        find_layers(mlp, X, **asked)


@pytest.mark.parametrize("options", [{"layers": ["0", "4"]}, {"layers": ["2"], "head": "2"}])
def test_head_among_the_layers_is_refused(mlp, options):
    """The head cannot be measured as a layer."""
    name = options.get("head", "4")
    message = (
        f"'{name}' is the model's head, which is reported on its own. Leave it out of layers=, or name another head "
        r"with head=\.$"
    )
    with unchanged(mlp), pytest.raises(UnsupportedModelError, match=message):
        find_layers(mlp, X, **options)


@pytest.mark.parametrize(
    "model",
    [
        nn.Sequential(nn.Linear(3, 2)),
        nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 2)),
    ],
    ids=["head", "norm and head"],
)
def test_model_with_a_head_only_is_refused(model):
    """A model without a layer to measure besides its head is refused, with the head's name."""
    message = r"no layer with weights besides its head '\w+' that returns a tensor with one row a sample. Name the"
    with unchanged(model), pytest.raises(UnsupportedModelError, match=message):
        find_layers(model, X)


def test_model_with_a_head_only_that_runs_twice_is_refused():
    """Where the head alone is left the error says so, not that the head runs twice."""
    model = Net(in_turn("head", "head"), head=nn.Linear(3, 3))
    with pytest.raises(UnsupportedModelError, match="no layer with weights besides its head 'head'"):
        find_layers(model, X)


@pytest.mark.parametrize("model", [nn.Linear(3, 2), weight_norm(nn.Linear(3, 2))], ids=["plain", "parametrised"])
def test_model_that_is_one_module_is_refused(model):
    """A model whose parameters are all its own has no layer that can be told from its head."""
    message = "no named module with parameters, so no layer can be told from its head. Wrap it in an nn.Sequential"
    with unchanged(model), pytest.raises(UnsupportedModelError, match=message):
        find_layers(model, X)


def test_layer_without_a_row_a_sample_is_refused():
    """A layer whose output has not the batch first is refused with its shape."""
    model = nn.Sequential(nn.Linear(3, 5), Apply(lambda x: x.T), Apply(lambda x: x.T), nn.Linear(5, 2))
    with unchanged(model), pytest.raises(UnsupportedModelError, match=r"'1' returns shape \(5, 4\) for 4 samples"):
        find_layers(model, X, layers=["1"])
    with unchanged(model), pytest.raises(UnsupportedModelError, match=r"'1' returns shape \(5, 4\) for 4 samples"):
        find_layers(model, X, layers=["0"], input_layer="1")


@pytest.mark.parametrize(
    ("model", "message"),
    [(nn.ReLU(), "has no parameters"), (nn.Sequential(nn.LazyLinear(2)), "lazy"), ("vgg19", "Got str instead")],
)
def test_model_that_cannot_be_measured_is_refused(model, message):
    """A model that cannot be borrowed is refused first of all."""
    with pytest.raises(UnsupportedModelError, match=message):
        find_layers(model, X)


def test_layer_around_the_head_is_refused():
    """A layer that contains the head lies not below it, and cannot be advised on."""
    model = nn.Sequential(nn.Linear(3, 4), nn.Sequential(nn.ReLU(), nn.Linear(4, 2)))
    with pytest.raises(UnsupportedModelError, match=r"'1' contains the model's head '1.1'.*Name layers below"):
        find_layers(model, torch.zeros(4, 3), layers=["0", "1"])


# --- which of many, and by pattern


class Residual(nn.Module):
    """Two linear layers and a way round."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(3, 3), nn.Linear(3, 3)

    def forward(self, x):
        return x + self.b(torch.relu(self.a(x)))


def deep(n_blocks):
    """Return a stem, so many residual blocks and a head."""
    blocks = nn.Sequential(*[Residual() for _ in range(n_blocks)])
    return nn.Sequential(OrderedDict(stem=nn.Linear(3, 3), blocks=blocks, head=nn.Linear(3, 2)))


@pytest.mark.parametrize(
    ("n_blocks", "n_names", "first", "second"),
    [
        (11, 23, "stem", "blocks.0.a"),  # few enough: every one
        (12, 13, "stem", "blocks.0"),  # the blocks
        (23, 24, "stem", "blocks.0"),
        (24, 24, "stem", "blocks.0"),  # some of the blocks, as their block would be one
        (100, 24, "stem", "blocks.3"),
    ],
)
def test_of_many_layers_the_blocks_around_them(n_blocks, n_names, first, second):
    """More than 24 layers are taken by their blocks, or some of these; each parameter still has one owner."""
    model = deep(n_blocks)
    found = find_layers(model, X)
    assert len(found.names) == n_names
    assert found.names[:2] == (first, second)
    assert found.names[-1].startswith(f"blocks.{n_blocks - 1}")
    assert owned_once(model, found)
    assert found.unused == ()


def test_as_many_layers_as_may_be_are_all_taken():
    """Of 24 layers each is measured, though there are blocks around them."""
    model = nn.Sequential(OrderedDict(blocks=deep(12).blocks, head=nn.Linear(3, 2)))
    assert len(find_layers(model, X).names) == 24


def test_as_few_layers_as_may_be_are_enough():
    """Four blocks and four layers outside of any are eight, which is enough not to look at more than the blocks."""
    blocks = {f"block{n}": nn.Sequential(*[nn.Linear(3, 3) for _ in range(6)]) for n in range(4)}
    alone = {f"alone{n}": nn.Linear(3, 3) for n in range(4)}
    model = nn.Sequential(OrderedDict(**blocks, **alone, head=nn.Linear(3, 2)))
    assert find_layers(model, X).names == (*blocks, *alone)


def test_blocks_in_a_list_that_does_not_run():
    """A list of modules, which is never called, is no block: what is around it is taken."""
    parts = nn.ModuleList([nn.ModuleList([nn.Linear(3, 3) for _ in range(3)]) for _ in range(10)])

    def run(self, x):
        for group in self.parts:
            for part in group:
                x = part(x)
        return self.head(x)

    model = Net(run, parts=parts, head=nn.Linear(3, 2))
    found = find_layers(model, X)
    assert len(found.names) == 24
    assert found.names[-1] == "parts.9.2"
    assert owned_once(model, found)


@pytest.mark.parametrize(
    ("layers", "names"),
    [
        (["blocks.*"], ("blocks.0", "blocks.1")),
        (["blocks.*.a", "stem"], ("stem", "blocks.0.a", "blocks.1.a")),
        (["**.b"], ("blocks.0.b", "blocks.1.b")),
        (["s*"], ("stem",)),
        ("blocks.0.*", ("blocks.0.a", "blocks.0.b")),
        ([Residual], ("blocks.0", "blocks.1")),
        ([nn.Linear], ("stem", "blocks.0.a", "blocks.0.b", "blocks.1.a", "blocks.1.b")),  # the head is none
        (["blocks.0", "blocks.*"], ("blocks.0", "blocks.1")),
    ],
)
def test_layers_by_pattern_and_type(layers, names):
    """A pattern or a type stands for all that fits and can be measured, in the order of execution."""
    model = deep(2)
    found = find_layers(model, X, layers=layers)
    assert found.names == names
    assert owned_once(model, found)


@pytest.mark.parametrize(
    ("layer", "message"),
    [("blocks.9.*", r"no layer that fits 'blocks.9.\*'"), (nn.Conv2d, "no layer of type Conv2d")],
)
def test_patterns_and_types_without_a_layer(layer, message):
    """What fits no module at all is an error with the pattern or the type."""
    with pytest.raises(LayerNotFoundError, match=message):
        find_layers(deep(1), X, layers=[layer])


def test_a_pattern_for_what_cannot_be_measured():
    """A pattern that fits the head alone leaves nothing to measure."""
    with pytest.raises(LayerNotFoundError, match="must name at least one layer below the head that runs once"):
        find_layers(deep(1), X, layers=["h*"])


def test_outputs_with_the_samples_elsewhere_are_refused():
    """An output whose samples are not first shows itself even where it happens to have as many rows."""
    model = nn.Sequential(nn.Linear(3, 4), Apply(lambda x: x.T), Apply(lambda x: x.T), nn.Linear(4, 2))
    with pytest.raises(UnsupportedModelError, match=r"'1' returns shape \(4, 3\) for 3 samples; one row a sample"):
        find_layers(model, torch.zeros(4, 3), layers=["1"])


def test_input_layer_that_does_not_run_is_refused(mlp):
    """An input layer that is never called, as an embedding whose weights others use, is named as such."""
    model = nn.Sequential(OrderedDict(first=nn.Linear(3, 4), last=nn.Linear(4, 2)))
    model.first.idle = nn.Embedding(5, 3)
    message = (
        r"input layer 'first\.idle' does not run in the forward pass. Name the module that does, such as the embedding "
        r"of the encoder where several share its weights\.$"
    )
    with unchanged(model), pytest.raises(LayerNotRunError, match=message):
        find_layers(model, torch.zeros(4, 3), input_layer="first.idle")


def test_layers_are_a_table():
    """Layers print as a table with shapes, parameters and operations, and unused parameters are named below it."""
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8, 2000), nn.Linear(2000, 2))
    text = """\
layer        output  parameters  operations
--------  ---------  ----------  ----------
0         2 x 2 x 2          20         144
3              2000      18,000      32,000
4 (head)          -       4,002       8,000"""
    assert str(find_layers(model, torch.zeros(4, 1, 4, 4))) == text
    for name in ("spare", "idle"):
        model.register_parameter(name, nn.Parameter(torch.zeros(3)))
    found = find_layers(model, torch.zeros(4, 1, 4, 4))
    assert str(found) == f"{text}\nNot used for the output: spare, idle."
    assert "<td>2 x 2 x 2</td>" in found._repr_html_()


class OneWay(torch.autograd.Function):
    """Refuses to be differentiated, by an error of its own."""

    @staticmethod
    def forward(_context, x):
        return x.clone()

    @staticmethod
    def backward(_context, _gradient):
        raise AssertionError


class Aside(nn.Module):
    """Has a second branch, whose output comes last or is returned beside the class scores."""

    def __init__(self, returned) -> None:
        super().__init__()
        self.first, self.second, self.scores = nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(4, 2)
        self.aside, self.returned = nn.Linear(4, 5), returned

    def forward(self, x):
        inner = self.first(x).relu()
        scores = self.scores(self.second(inner).relu())
        return self.returned(scores, self.aside(inner))


@pytest.mark.parametrize(
    "returned",
    [
        lambda scores, other: {"logits": scores, "other": other},
        lambda scores, other: {"other": other, "logits": scores},
        lambda scores, other: (scores, other),
    ],
)
def test_the_head_is_what_the_output_depends_on(returned):
    """A branch beside the class scores that runs after them is no head and no layer, and can be named as none."""
    model = Aside(returned)
    model.second.requires_grad_(False)
    with unchanged(model):
        found = find_layers(model, torch.zeros(4, 3))
    assert (found.names, found.head) == (("first", "second"), "scores")
    assert found.unused == ("aside.weight", "aside.bias")
    assert found.parameters["scores"] == ("scores.weight", "scores.bias")
    with torch.no_grad():
        assert find_layers(model, torch.zeros(4, 3)).head == "scores"
    message = "the one that counts does not depend on the head 'aside'. What counts is the entry 'logits'"
    with unchanged(model), pytest.raises(UnsupportedModelError, match=message):
        find_layers(model, torch.zeros(4, 3), head="aside")
    assert find_layers(model, torch.zeros(4, 3), head="scores") == found


def test_without_gradients_the_head_is_what_runs_last():
    """Where gradients do not tell what an output depends on, the last module with weights is the head."""
    model = Aside(lambda scores, other: (scores.detach(), other))
    assert find_layers(model, torch.zeros(4, 3)).head == "aside"
    model = Aside(lambda scores, other: (OneWay.apply(scores), other))
    with unchanged(model):
        assert find_layers(model, torch.zeros(4, 3)).head == "aside"
