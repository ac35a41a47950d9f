"""Gradients sample by sample: equal to a pass of its own for each sample, whatever the model is made of."""

import numpy as np
import pytest
import torch
from helpers import unchanged
from networks import Failing, TokenNet
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, dropout

import retrainscope as rs
from retrainscope import sample_gradients as module
from retrainscope.exceptions import UnsupportedModelError
from retrainscope.lending import borrow
from retrainscope.outputs import output_of
from retrainscope.sample_gradients import sample_gradients, summed_gradient


class Attention(nn.Module):
    """Self-attention over tokens, and a head on their mean."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.MultiheadAttention(8, 2, batch_first=True)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits."""
        return self.head(self.mix(x, x, x)[0].mean(dim=1))


class Recurrent(nn.Module):
    """A recurrent layer, whose weights torch holds in a list as well, and a head on the last token."""

    def __init__(self, kind: type[nn.Module]) -> None:
        super().__init__()
        self.steps = kind(4, 5, batch_first=True)
        self.head = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits."""
        return self.head(self.steps(x)[0][:, -1])


class Around(nn.Module):
    """A layer, a function of its output, and a head."""

    def __init__(self, function: object) -> None:
        super().__init__()
        self.first, self.function, self.head = nn.Linear(4, 6), function, nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits."""
        return self.head(self.function(self.first(x)))


class Listed(nn.Module):
    """Uses its weights by a plain list of them, where torch cannot put others in their place."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(4, 6, bias=False), nn.Linear(6, 3)
        self.held = [self.first.weight]

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits."""
        return self.head(torch.tanh(x @ self.held[0].T))


class Tied(nn.Module):
    """One weight, used twice under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits."""
        return self.second(torch.tanh(self.first(x)))


def convolutional() -> nn.Sequential:
    """Convolutions with batch and group normalisation, in-place ReLU and pooling."""
    net = nn.Sequential(
        *(nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.MaxPool2d(2)),
        *(nn.Conv2d(4, 6, 3, groups=2), nn.GroupNorm(3, 6), nn.GELU(), nn.Flatten(), nn.Linear(24, 3)),
    )
    net[1].running_mean.normal_()
    net[1].running_var.uniform_(0.5, 2.0)
    return net


def images() -> Tensor:
    return torch.randn(5, 2, 8, 8)


def vectors() -> Tensor:
    return torch.randn(5, 4)


def sequences() -> Tensor:
    return torch.randn(5, 6, 4)


AT_ONCE = {
    "linear": (lambda: nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.ReLU(), nn.Linear(6, 3)), vectors),
    "convolution": (convolutional, images),
    "embedding": (TokenNet, lambda: torch.randint(0, 10, (5, 3))),
    "attention": (Attention, lambda: torch.randn(5, 6, 8)),
    "transformer": (
        lambda: nn.Sequential(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), nn.Flatten(), nn.Linear(48, 3)),
        lambda: torch.randn(5, 6, 8),
    ),
    "tied": (Tied, vectors),
}
ONE_BY_ONE = {
    "gru": (lambda: Recurrent(nn.GRU), sequences),
    "branch on the data": (lambda: Around(lambda x: x if x.sum() > 0 else 2 * x), vectors),
    "number of the data": (lambda: Around(lambda x: x * x.abs().max().item()), vectors),
    "write into a constant": (lambda: Around(lambda x: torch.zeros(1, 6, dtype=x.dtype).add_(x)), vectors),
    "weights in a list": (Listed, vectors),
}
EITHER = {"lstm": (lambda: Recurrent(nn.LSTM), sequences)}
MODELS = AT_ONCE | ONE_BY_ONE | EITHER


def layers_of(model: nn.Module) -> dict[str, list[str]]:
    """Group the parameters by the first part of their name."""
    found: dict[str, list[str]] = {}
    for name, _ in model.named_parameters():
        found.setdefault(name.partition(".")[0], []).append(name)
    return found


def by_loop(model: nn.Module, X: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """Backpropagate the cross-entropy of one sample after the other, as one would by hand."""
    rows: dict[str, list[Tensor]] = {layer: [] for layer in layers_of(model)}
    for row in range(len(X)):
        model.zero_grad()
        nn.functional.cross_entropy(output_of(model, model(X[row : row + 1].clone())), labels[row : row + 1]).backward()
        weights = dict(model.named_parameters())
        for layer, names in layers_of(model).items():
            rows[layer].append(torch.cat([weights[name].grad.clone().flatten() for name in names]))
    model.zero_grad()
    return {layer: torch.stack(gradients) for layer, gradients in rows.items()}


def joined(parts: object) -> dict[str, Tensor]:
    """Put the parts of `sample_gradients` together."""
    collected = list(parts)
    return {layer: torch.cat([part[layer] for part in collected]) for layer in collected[0]}


def made(name: str) -> tuple[nn.Module, Tensor, Tensor]:
    """Make a model in double precision, samples and labels."""
    model, X = MODELS[name][0]().double().eval(), MODELS[name][1]()
    return model, X.double() if X.is_floating_point() else X, torch.tensor([0, 1, 1, 0, 1])


@pytest.mark.parametrize("name", MODELS)
def test_equal_to_a_pass_for_each_sample(name):
    """The gradients are those of a backward pass for each sample, in the order of the samples."""
    model, X, labels = made(name)
    expected = by_loop(model, X, labels)
    with borrow(model):
        found = joined(sample_gradients(model, X, labels, cross_entropy, layers_of(model)))
    assert list(found) == list(expected)
    for layer in expected:
        assert not found[layer].requires_grad
        torch.testing.assert_close(found[layer], expected[layer], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", [*AT_ONCE, *ONE_BY_ONE])
def test_done_at_once_where_torch_can(name, monkeypatch):
    """A model is called once for many samples, and once for each only where torch can do no other."""
    model, X, labels = made(name)
    samples_a_pass = []
    plain = module._gradients
    monkeypatch.setattr(module, "_gradients", lambda *args: samples_a_pass.append(len(args[2])) or plain(*args))
    with borrow(model):
        joined(sample_gradients(model, X, labels, cross_entropy, layers_of(model)))
    assert len(samples_a_pass) == (1 if name in AT_ONCE else 5 if name != "weights in a list" else 6)


def test_known_in_closed_form():
    """For the output w x and half its squared distance to y the gradient is (w x - y) x."""
    model = nn.Linear(4, 1, bias=False).double()
    X, y = torch.randn(7, 4, dtype=torch.float64), torch.randn(7, 1, dtype=torch.float64)
    found = joined(sample_gradients(model, X, y, lambda o, t: (o - t).square().sum() / 2, {"w": ["weight"]}))
    w = model.weight.detach().numpy()[0]
    expected = (X.numpy() @ w - y.numpy()[:, 0])[:, None] * X.numpy()
    np.testing.assert_allclose(found["w"].numpy(), expected, rtol=1e-12)


def test_any_cotangent():
    """With a cotangent a sample as its target the result is the product with the Jacobian."""
    model, X, _ = made("convolution")
    cotangents = torch.randn(5, 3, dtype=torch.float64)
    found = joined(sample_gradients(model, X, cotangents, lambda o, v: (o * v).sum(), layers_of(model)))
    for row in range(5):
        outputs = model(X[row : row + 1])[0]
        expected = torch.autograd.grad(outputs, list(model[0].parameters()), cotangents[row])
        torch.testing.assert_close(found["0"][row], torch.cat([part.flatten() for part in expected]))


@pytest.mark.parametrize("max_bytes", [1, 2 * 8 * 57, 10**9])
def test_memory_decides_how_many_at_once(max_bytes):
    """So many samples are held at once as fit into the memory given, and one at least; the gradients stay the same."""
    model, X, labels = made("linear")
    n_bytes = 8 * sum(weight.numel() for weight in model.parameters())
    parts = list(sample_gradients(model, X, labels, cross_entropy, layers_of(model), max_bytes=max_bytes))
    sizes = [len(part["0"]) for part in parts]
    assert sum(sizes) == 5
    assert max(sizes) == max(1, min(5, max_bytes // n_bytes))
    torch.testing.assert_close(joined(parts)["0"], by_loop(model, X, labels)["0"])


@pytest.mark.parametrize(
    ("model", "X", "most"),
    [
        (lambda: nn.Linear(4, 3), torch.randn(300, 4), 256),
        (lambda: nn.Sequential(nn.Linear(1, 1), nn.Linear(1, 1), nn.Flatten()), torch.randn(70, 2**15, 1), 32),
        (lambda: Recurrent(nn.LSTM), torch.randn(300, 6, 4), 256),
        (lambda: Recurrent(nn.LSTM), torch.randn(40, 400, 4), 32),
    ],
    ids=["small", "activations", "few steps", "many steps"],
)
def test_what_is_kept_decides_how_many_at_once(model, X, most):
    """Many samples are done at once where what the network keeps for the way back is little, else few."""
    torch.manual_seed(0)
    net = model().eval()
    labels = torch.zeros(len(X)).long()
    with borrow(net):
        parts = list(sample_gradients(net, X, labels, cross_entropy, layers_of(net), max_bytes=2**22))
    assert len(next(iter(parts[0].values()))) == most
    torch.testing.assert_close(
        {layer: rows[-1:] for layer, rows in joined(parts).items()}, by_loop(net, X[-1:], labels[-1:])
    )


def test_inputs_by_name():
    """A mapping is passed by keyword, each sample with its own mask."""

    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.head = nn.Linear(4, 5), nn.Linear(5, 3)

        def forward(self, *, x: Tensor, attention_mask: Tensor) -> dict[str, Tensor]:
            hidden = torch.tanh(self.first(x)) * attention_mask[..., None]
            return {"hidden": hidden, "logits": self.head(hidden.sum(dim=1))}

    model, x = Masked().eval(), torch.randn(5, 6, 4)
    inputs = {"x": x, "attention_mask": (torch.arange(6) < torch.tensor([6, 2, 3, 1, 5])[:, None]).long()}
    labels = torch.tensor([0, 1, 2, 0, 1])
    found = joined(sample_gradients(model, inputs, labels, cross_entropy, layers_of(model)))
    for row in range(5):
        alone = {key: tensor[row : row + 1] for key, tensor in inputs.items()}
        loss = nn.functional.cross_entropy(model(**alone)["logits"], labels[row : row + 1])
        expected = torch.autograd.grad(loss, list(model.first.parameters()))
        torch.testing.assert_close(found["first"][row], torch.cat([part.flatten() for part in expected]))


def test_the_sum_is_that_of_the_samples():
    """The gradient of the summed objective is the sum of the samples' gradients."""
    model, X, labels = made("convolution")
    each = joined(sample_gradients(model, X, labels, cross_entropy, layers_of(model)))
    summed = summed_gradient(model, X, labels, cross_entropy, layers_of(model))
    for layer in each:
        torch.testing.assert_close(summed[layer], each[layer].sum(dim=0))


def test_tied_weights_count_once():
    """A weight with two names has one gradient, that of both of its uses."""
    model, X, labels = made("tied")
    found = joined(sample_gradients(model, X, labels, cross_entropy, {"both": ["first.weight"]}))
    assert found["both"].shape == (5, 16)
    torch.testing.assert_close(found["both"], by_loop(model, X, labels)["first"][:, :16])


@pytest.mark.parametrize("name", ["linear", "gru"])
def test_frozen_weights_have_a_gradient_too(name):
    """A frozen parameter is measured as if it were not, and stays frozen; the model is left as it was."""
    model, X, labels = made(name)
    expected = by_loop(model, X, labels)
    for weight in model.parameters():
        weight.grad = None
    next(model.parameters()).requires_grad_(False)
    with unchanged(model):
        found = joined(sample_gradients(model, X, labels, cross_entropy, layers_of(model)))
    for layer in expected:
        torch.testing.assert_close(found[layer], expected[layer])


@pytest.mark.parametrize("together", [True, False])
def test_what_the_output_does_not_use_has_no_gradient(together):
    """The gradient of an unused parameter is 0, of a layer without parameters empty, and integers are left out."""

    class Partly(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.unused = nn.Linear(4, 3), nn.Linear(2, 2)
            self.whole = nn.Parameter(torch.ones(3, dtype=torch.long), requires_grad=False)
            self.scale = nn.Parameter(torch.tensor(2.0))

        def forward(self, x: Tensor) -> Tensor:
            return self.scale * self.used(x) + (0 if together or x.sum() < 1e9 else 1)

    layers = {"unused": ["unused.weight"], "whole": ["whole"], "used": ["used.bias", "scale"], "none": []}
    found = joined(sample_gradients(Partly(), vectors(), torch.zeros(5).long(), cross_entropy, layers))
    assert {layer: tuple(gradient.shape) for layer, gradient in found.items()} == {
        "unused": (5, 4),
        "whole": (5, 0),
        "used": (5, 4),
        "none": (5, 0),
    }
    assert not found["unused"].any()
    assert found["used"].all()


def test_nothing_has_a_gradient():
    """Where the output depends on no parameter all gradients are 0."""

    class Constant(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(2))

        def forward(self, x: Tensor) -> Tensor:
            return x

    found = joined(sample_gradients(Constant(), vectors(), torch.zeros(5).long(), cross_entropy, {"w": ["weight"]}))
    assert torch.equal(found["w"], torch.zeros(5, 2))


def test_one_sample():
    """A single sample has its gradient too."""
    model, X, labels = made("linear")
    found = joined(sample_gradients(model, X[:1], labels[:1], cross_entropy, layers_of(model)))
    torch.testing.assert_close(found["0"], by_loop(model, X, labels)["0"][:1])


def test_random_models_are_done_one_by_one():
    """A model that draws random numbers draws them for each sample, as it would by itself."""
    model = Around(lambda x: dropout(x, 0.5, training=True))
    torch.manual_seed(3)
    found = joined(sample_gradients(model, vectors(), torch.zeros(5).long(), cross_entropy, layers_of(model)))
    assert len({tuple((row == 0).tolist()) for row in found["first"]}) > 1


@pytest.mark.parametrize("at", [1, 2, 3])
def test_errors_of_the_model_come_through(at):
    """What the model raises itself is no reason to try another way."""
    failing, X = Failing(at, ValueError("boom")), torch.randn(70, 4)
    model = nn.Sequential(nn.Linear(4, 6), failing, nn.Linear(6, 3))
    with unchanged(model), pytest.raises(ValueError, match="boom"):
        joined(sample_gradients(model, X, torch.zeros(70).long(), cross_entropy, layers_of(model)))
    assert failing.calls[0] == at


def test_gradients_may_be_turned_off_outside():
    """Inside no_grad the gradients are the same."""
    for name in ("linear", "gru"):
        model, X, labels = made(name)
        expected = by_loop(model, X, labels)
        with torch.no_grad():
            found = joined(sample_gradients(model, X, labels, cross_entropy, layers_of(model)))
        for layer in expected:
            torch.testing.assert_close(found[layer], expected[layer])


def test_outputs_without_a_row_a_sample_are_refused():
    """A model that drops the axis of a single sample is refused with what it returned and what to do."""
    model = Around(lambda x: x)
    model.head = nn.Sequential(nn.Linear(6, 3), nn.Flatten(0))
    with pytest.raises(
        UnsupportedModelError, match=r"shape \(3,\) for 1 sample; one row a sample is needed. Let it keep"
    ):
        joined(sample_gradients(model, vectors(), torch.zeros(5).long(), cross_entropy, layers_of(model)))
    with pytest.raises(UnsupportedModelError, match="no floating-point tensor for 2 samples"):
        summed_gradient(Integers(), vectors()[:2], torch.zeros(2), cross_entropy, {"w": ["weight"]})


class Integers(nn.Module):
    """Returns classes, not scores."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4, 3))

    def forward(self, x: Tensor) -> Tensor:
        """Return the class of each sample."""
        return (x @ self.weight).argmax(dim=1)


def test_a_module_of_two_names_and_a_recurrent_one_are_given_back():
    """Each module holds the very parameters that it held, also one with two names, and a recurrent one its lists."""
    torch.manual_seed(0)
    inner = nn.Sequential(nn.Linear(4, 4), nn.Tanh())
    twice = nn.Sequential(inner, inner, nn.Linear(4, 2))
    for model, X in ((twice, torch.randn(3, 4)), (nn.LSTM(4, 3, batch_first=True), torch.randn(3, 5, 4))):
        held = [(part, dict(part._parameters)) for part in model.modules()]
        lists = {name: vars(model)[name] for name in ("_flat_weights", "_flat_weight_refs") if name in vars(model)}
        names = {"all": [name for name, _ in model.named_parameters()]}
        list(sample_gradients(model, X, torch.zeros(3), lambda output, _: output.sum(), names))
        for part, table in held:
            assert all(part._parameters[name] is tensor for name, tensor in table.items())
        assert all(vars(model)[name] is kept for name, kept in lists.items())


def _product(output: Tensor, target: Tensor) -> Tensor:
    return (output * target).sum()


class Overwriting(nn.Module):
    """Adds to its input in place what a layer has made of it, which that layer needs for its gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        x += self.layer(x)
        return x


def test_a_model_that_cannot_be_trained():
    """A model that overwrites what its gradients need is refused with what to do, and the input is as it was."""
    model, X = Overwriting(), torch.randn(3, 4)
    before = X.clone()
    with pytest.raises(UnsupportedModelError, match=r"overwrites in place .* x = x \+ y instead of x \+= y"):
        summed_gradient(model, X.clone(), torch.ones(3, 4), _product, {"a": ["layer.weight"]})
    net = nn.Sequential(model, nn.Linear(4, 2))
    data = X.repeat(10, 1), [0, 1, 0] * 10
    rec = rs.recommend_layers(net, data, data, random_state=0)
    assert rec.forecast is None
    assert "There is no forecast: The model overwrites in place what its own gradients need" in rec.notes[0]
    assert torch.equal(X, before)
