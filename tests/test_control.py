"""The control: the same architecture with freshly initialised weights."""

import pytest
import torch
from helpers import content_of, model_state, small_mlp, unchanged
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

from retrainscope.control import untrained_copy
from retrainscope.lending import borrow


class Tokens(nn.Module):
    """A network with a module of every kind: a class token of its own, embedding, attention, norms, a tied head."""

    def __init__(self):
        super().__init__()
        self.token = nn.Parameter(torch.randn(1, 1, 4))
        self.embedding = nn.Embedding(7, 4)
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.norm = nn.LayerNorm(4)
        self.batch_norm = nn.BatchNorm1d(4)
        self.scaled = weight_norm(nn.Linear(4, 4))
        self.head = nn.Linear(4, 7, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, ids):
        x = self.embedding(ids) + self.token
        x = self.norm(self.attention(x, x, x)[0]).mean(dim=1)
        return self.head(self.scaled(self.batch_norm(x)))


@pytest.fixture
def trained():
    """Return a network whose weights are far from where they began."""
    model = Tokens()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.arange(1.0, 1 + parameter.numel()).reshape(parameter.shape))
        model.batch_norm.running_mean.fill_(9.0)
        model.batch_norm.running_var.fill_(5.0)
    return model


def control_of(model, **options):
    """Make the control as it is meant to be made: of a borrowed model."""
    with borrow(model):
        return untrained_copy(model, **{"seed": 0, **options})


def test_architecture_is_kept(trained):
    """The control has the same modules and the same names, shapes and types of parameters and buffers."""
    control = control_of(trained)
    assert [(n, type(m)) for n, m in control.named_modules()] == [(n, type(m)) for n, m in trained.named_modules()]
    mine, theirs = control.state_dict(), trained.state_dict()
    assert [(n, t.shape, t.dtype) for n, t in mine.items()] == [(n, t.shape, t.dtype) for n, t in theirs.items()]
    ids = torch.zeros(3, 5, dtype=torch.int64)
    assert control(ids).shape == trained(ids).shape


def test_nothing_that_was_learnt_is_left(trained):
    """Every parameter of the control differs from the trained one, and norms keep no statistics."""
    control = control_of(trained)
    for (name, mine), theirs in zip(control.named_parameters(), trained.parameters(), strict=True):
        assert not torch.equal(mine, theirs), name
    assert torch.equal(control.batch_norm.running_mean, torch.zeros(4))
    assert torch.equal(control.batch_norm.running_var, torch.ones(4))


def test_modules_initialise_themselves(trained):
    """Modules with a method to reset themselves do so: norms to one and nought, linear layers within their bound."""
    control = control_of(trained)
    for norm in (control.norm, control.batch_norm):
        assert torch.equal(norm.weight, torch.ones(4))
        assert torch.equal(norm.bias, torch.zeros(4))
    assert control.scaled.bias.abs().max() <= 0.5  # 1 / sqrt(fan in)
    bound = (6 / (4 + 12)) ** 0.5  # Glorot and Bengio's, which attention resets itself to
    assert control.attention.in_proj_weight.abs().max() <= bound
    assert torch.equal(control.attention.in_proj_bias, torch.zeros(12))


def test_untrained_norms_stay_sensible():
    """A norm that is at its initial values already keeps them."""
    control = control_of(nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4)))
    assert torch.equal(control[1].weight, torch.ones(4))
    assert torch.equal(control[1].bias, torch.zeros(4))


@pytest.mark.parametrize("name", ["token", "scaled.parametrizations.weight.original1"])
def test_parameters_without_a_reset_are_shuffled(trained, name):
    """A parameter that no module resets keeps its values in another order."""
    mine, theirs = control_of(trained).get_parameter(name), trained.get_parameter(name)
    assert not torch.equal(mine, theirs)
    assert torch.equal(mine.flatten().sort().values, theirs.flatten().sort().values)


@pytest.mark.parametrize("method", ["reset_parameters", "_reset_parameters"])
def test_either_name_of_the_method_is_known(method):
    """A module's own way to reset itself is used, under the public name or the private one."""

    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(3))

    def reset(self):
        nn.init.constant_(self.weight, 7.0)

    setattr(Own, method, reset)
    assert torch.equal(control_of(Own()).weight, torch.full((3,), 7.0))


def test_public_method_comes_first():
    """A module with both methods is reset by the public one only."""

    class Both(nn.Linear):
        def _reset_parameters(self):
            raise AssertionError("not to be called")

    assert control_of(Both(2, 2)).weight.shape == (2, 2)


def test_attribute_that_is_no_method_is_left_alone():
    """An attribute of the method's name that cannot be called is no method."""
    model = nn.Linear(2, 2)
    model.reset_parameters = "often"
    assert sorted(control_of(model).bias.tolist()) == sorted(model.bias.tolist())


@pytest.mark.parametrize("keep", ["embedding", "attention"])
def test_kept_module_is_left_alone(trained, keep):
    """The module to keep has its weights in the control too, those that it shares with others among them."""
    control = control_of(trained, keep=keep)
    for name, parameter in trained.named_parameters():
        kept = name.startswith(f"{keep}.")
        assert torch.equal(control.get_parameter(name), parameter) is kept, name


def test_kept_module_keeps_its_statistics():
    """The module to keep has its running statistics in the control too."""
    model = nn.Sequential(nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)), nn.BatchNorm1d(3))
    for norm in (model[0][1], model[1]):
        norm.running_mean.fill_(5.0)
    control = control_of(model, keep="0")
    assert torch.equal(control[0][1].running_mean, torch.full((3,), 5.0))
    assert torch.equal(control[1].running_mean, torch.zeros(3))


def test_tied_weights_stay_tied(trained):
    """Modules that share a weight share it in the control."""
    control = control_of(trained)
    assert control.head.weight is control.embedding.weight


def test_seed_decides_the_weights(trained):
    """The same seed gives the same control bit for bit, another seed another one."""

    def weights(seed):
        return [content_of(parameter) for parameter in control_of(trained, seed=seed).parameters()]

    assert weights(1) == weights(1)
    assert weights(1) != weights(2)


def test_original_is_untouched(trained):
    """Making a control leaves the model and the random states as they were, and shares no tensor with it."""
    trained.token.grad = torch.ones(1, 1, 4)
    with unchanged(trained):
        control = control_of(trained)
    memory = {state.tensor.data_ptr() for state in model_state(trained).parameters.values()}
    assert not memory & {parameter.data_ptr() for parameter in control.parameters()}


def test_control_is_in_evaluation_mode():
    """The control comes in evaluation mode even if the model is not."""
    assert not any(module.training for module in untrained_copy(small_mlp().train(), seed=0).modules())


def test_a_reset_that_needs_arguments_is_not_called():
    """What a method of that name wants to be given is not known, so that the weights are shuffled."""

    class Needs(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.arange(6.0))

        def reset_parameters(self, std):
            raise AssertionError

    control = untrained_copy(nn.Sequential(Needs()), seed=0)
    assert sorted(control[0].weight.tolist()) == list(range(6))
    assert control[0].weight.tolist() != list(range(6))
