"""gradient_features: kernels against gradients one sample at a time, for every rule and for what no rule fits."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from helpers import unchanged
from networks import Failing
from torch import Tensor, nn
from torch.nn.utils.prune import l1_unstructured

from retrainscope.batches import Batches, as_batches
from retrainscope.gradient_features import gradient_features
from retrainscope.sample_gradients import sample_gradients

MANY = 10**6


class Tokens(nn.Module):
    """Tokens (n, 5) to outputs (n, 3), by embedding, layer norm and a linear layer for each token."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm, self.mix = nn.Embedding(7, 4, padding_idx=0), nn.LayerNorm(4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.mix(self.norm(self.embed(x))).tanh().sum(dim=1)


class Positioned(nn.Module):
    """Adds an embedding of the positions, one row for all samples, as a BERT does."""

    def __init__(self, *, squeezed: bool = False) -> None:
        super().__init__()
        self.embed, self.position, self.squeezed = nn.Embedding(7, 4), nn.Embedding(6, 4), squeezed
        self.norm, self.mix = nn.LayerNorm(4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        position = self.position(torch.arange(x.shape[1])[None])
        position = position.view(x.shape[1], 4) if self.squeezed else position
        return self.mix(self.norm(self.embed(x) + position)).tanh().sum(dim=1)


class Reused(nn.Module):
    """A layer that runs twice."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(self.layer(x).tanh())


class Tied(nn.Module):
    """A weight that is used a second time outside its module."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x).tanh() @ self.layer.weight


class Outside(nn.Module):
    """A module that is never called, and a parameter of the network's own."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.scale = nn.Linear(4, 3), nn.Parameter(torch.rand(3))

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.layer.weight, self.layer.bias).tanh() * self.scale


class Windows(nn.Module):
    """A layer that takes two rows for each sample, those of one together."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x.reshape(-1, 2)).tanh().reshape(len(x), -1)


class Turned(nn.Module):
    """A layer that takes as many rows as there are samples, and mixes these up among them."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        y = x.repeat_interleave(6, dim=1).reshape(len(x), -1, 6).transpose(0, 1)  # (places, samples, 6)
        return self.layer(y).tanh().sum(dim=0)


class OddConv(nn.Conv2d):
    """Pads by itself, on one side alone."""

    def forward(self, x: Tensor) -> Tensor:
        padded = nn.functional.pad(x, (1, 0, 1, 0))
        return nn.functional.conv2d(padded, self.weight, self.bias, self.stride)


class ChannelNorm(nn.LayerNorm):
    """Normalises channels that come first, as in ConvNeXt."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.movedim(1, -1)).movedim(-1, 1)


class Flattening(nn.Linear):
    """Takes maps, which it flattens itself."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.flatten(start_dim=1))


class Mixing(nn.Embedding):
    """Takes shares of words instead of their numbers."""

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight


class ScaledConv(nn.Conv2d):
    """Standardises its weight and scales it, as in networks without normalisation; silent until training opens it."""

    def __init__(self, *args: int) -> None:
        super().__init__(*args)
        self.gain, self.gate = nn.Parameter(torch.ones(self.out_channels, 1, 1, 1)), 0.0

    def forward(self, x: Tensor) -> Tensor:
        flat = self.weight.flatten(start_dim=1)
        weight = self.gain * ((flat - flat.mean(dim=1, keepdim=True)) / flat.std(dim=1, keepdim=True)).view_as(
            self.weight
        )
        return self.gate * nn.functional.conv2d(x, weight, self.bias)


class Conv1D(nn.Module):
    """A linear layer as in GPT-2, with the inputs first."""

    def __init__(self, n_outputs: int, n_inputs: int) -> None:
        super().__init__()
        self.nf = n_outputs
        self.weight, self.bias = nn.Parameter(torch.rand(n_inputs, n_outputs)), nn.Parameter(torch.rand(n_outputs))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight + self.bias


class ActNorm(nn.BatchNorm2d):
    """Has an activation inside, which no rule knows."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).relu()


class Resting(nn.Module):
    """Has a layer that never runs."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.rest = nn.Linear(4, 3), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x).tanh()


class Tokenwise(nn.Module):
    """Runs a layer of torch's transformers on tokens, the samples first or second."""

    def __init__(self, **options: object) -> None:
        super().__init__()
        self.block = nn.TransformerEncoderLayer(8, 2, 12, dropout=0.1, **options)
        self.second = not options.get("batch_first", False)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.block(x.transpose(0, 1) if self.second else x)
        return tokens.mean(dim=0 if self.second else 1)


class Vision(nn.Module):
    """Has a class token, a position embedding, scales of blocks, and a shift of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.token, self.place = nn.Parameter(torch.rand(1, 1, 8)), nn.Parameter(torch.rand(1, 6, 8))
        self.block, self.scale = Tokenwise(batch_first=True, norm_first=True).block, nn.Parameter(torch.rand(8))
        self.shift, self.weight = nn.Parameter(torch.rand(())), nn.Parameter(1 + torch.rand(6, 1))

    def forward(self, x: Tensor) -> Tensor:
        tokens = torch.cat([self.token.expand(len(x), -1, -1), x], dim=1)
        tokens += self.place
        tokens = (tokens + self.scale * self.block(tokens)) / self.weight
        return (self.shift - tokens[:, 0]).tanh()


class Masked(nn.Module):
    """Attends to tokens that are not padding, with biases of its own for keys and values; the weights count too."""

    def __init__(self, **options: object) -> None:
        super().__init__()
        self.attend = nn.MultiheadAttention(8, 2, add_bias_kv=True, add_zero_attn=True, batch_first=True, **options)

    def forward(self, x: Tensor) -> Tensor:
        tokens, weights = self.attend(x, x, x, key_padding_mask=x[..., 0] > 1, average_attn_weights=False)
        return tokens.mean(dim=1) * weights[:, :, 0].sum(dim=(1, 2))[:, None]


class Crossed(nn.Module):
    """Attends to itself, then to something else."""

    def __init__(self) -> None:
        super().__init__()
        self.block = nn.TransformerDecoderLayer(8, 2, 12, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x, x.flip(1).tanh()).mean(dim=1)


class OtherWidth(nn.Module):
    """Attends to keys and values of another width."""

    def __init__(self) -> None:
        super().__init__()
        self.attend = nn.MultiheadAttention(8, 2, kdim=4, vdim=4)

    def forward(self, x: Tensor) -> Tensor:
        y = x.transpose(0, 1)
        return self.attend(y, y[..., :4], y[..., :4])[0].mean(dim=0)


class Trebling(nn.Linear):
    """Does more, when it is called, than multiply by its weight."""

    def forward(self, x: Tensor) -> Tensor:
        return 3 * super().forward(x)


class OddAttention(nn.Module):
    """Attends by a module that was changed: attention uses the weights of `out_proj`, and never calls it."""

    def __init__(self, change: Callable[[nn.MultiheadAttention], object]) -> None:
        super().__init__()
        self.attend = nn.MultiheadAttention(8, 2, batch_first=True)
        change(self.attend)

    def forward(self, x: Tensor) -> Tensor:
        return self.attend(x, x, x)[0].mean(dim=1)


class AttendsTwice(nn.Module):
    """Attends twice, by the same module or by two that share the weight of their projections."""

    def __init__(self, *, shared: bool) -> None:
        super().__init__()
        self.first = nn.MultiheadAttention(8, 2, batch_first=True)
        self.second = nn.MultiheadAttention(8, 2, batch_first=True) if shared else self.first
        self.second.in_proj_weight = self.first.in_proj_weight

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x, x, x)[0].tanh()
        return self.second(y, y, y, need_weights=False)[0].mean(dim=1)


def pooled(*layers: nn.Module) -> nn.Sequential:
    return nn.Sequential(*layers, nn.Tanh(), nn.AdaptiveAvgPool2d(2), nn.Flatten())


BODIES = {
    "linear": (lambda: nn.Sequential(nn.Linear(4, 6), nn.ReLU(inplace=True), nn.Linear(6, 3)), (4,)),
    "tokens": (Tokens, "tokens"),
    "positions": (Positioned, "tokens"),
    "positions in one row": (lambda: Positioned(squeezed=True), "tokens"),
    "convolution": (lambda: pooled(nn.Conv2d(2, 4, 3, stride=2, padding=1), nn.ReLU(inplace=True)), (2, 7, 7)),
    "dilated": (lambda: pooled(nn.Conv2d(2, 3, (3, 2), dilation=2, padding="same", bias=False)), (2, 7, 6)),
    "reflecting": (lambda: pooled(nn.Conv2d(2, 3, 3, padding=1, padding_mode="reflect")), (2, 5, 5)),
    "groups": (lambda: pooled(nn.Conv2d(4, 6, 3, groups=2)), (4, 5, 5)),
    "depthwise": (lambda: pooled(nn.Conv2d(4, 4, 3, groups=4), nn.Conv2d(4, 3, 1)), (4, 5, 5)),
    "one axis": (lambda: nn.Sequential(nn.Conv1d(2, 3, 3), nn.GELU(), nn.Flatten()), (2, 6)),
    "three axes": (lambda: nn.Sequential(nn.Conv3d(1, 2, 2), nn.GELU(), nn.Flatten()), (1, 3, 3, 3)),
    "own padding": (lambda: pooled(OddConv(2, 3, 3, stride=2)), (2, 6, 6)),
    "norms": (
        lambda: pooled(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.GroupNorm(2, 4)),
        (2, 6, 6),
    ),
    "dense norm": (lambda: nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 2)), (4,)),
    "standardised weight": (lambda: pooled(nn.Conv2d(2, 4, 3), ScaledConv(4, 4, 1)), (2, 6, 7)),
    "inputs first": (lambda: nn.Sequential(Conv1D(6, 4), nn.Tanh(), Conv1D(3, 6)), (4,)),
    "tokens, inputs first": (lambda: nn.Sequential(Conv1D(6, 4), nn.Tanh(), Conv1D(3, 6), nn.Flatten()), (5, 4)),
    "norm of channels": (lambda: pooled(nn.Conv2d(2, 4, 3), ChannelNorm(4), nn.Conv2d(4, 3, 1)), (2, 6, 7)),
    "norm of as many channels as columns": (lambda: pooled(nn.Conv2d(2, 4, 3), ChannelNorm(4)), (2, 5, 6)),
    "own flattening": (lambda: nn.Sequential(nn.Conv2d(1, 2, 2), nn.Tanh(), Flattening(8, 3)), (1, 3, 3)),
    "embedding of shares": (lambda: nn.Sequential(Mixing(4, 5), nn.Tanh(), nn.Linear(5, 2)), (4,)),
    "norm with activation": (lambda: pooled(nn.Conv2d(2, 4, 3), ActNorm(4)), (2, 6, 6)),
    "reused": (Reused, (4,)),
    "tied": (Tied, (4,)),
    "resting": (Resting, (4,)),
    "outside": (Outside, (4,)),
    "windows": (Windows, (4,)),
    "samples second": (Turned, (40,)),
    "transposed": (lambda: pooled(nn.ConvTranspose2d(2, 3, 3)), (2, 4, 4)),
    "transformer": (lambda: Tokenwise(batch_first=True), (5, 8)),
    "transformer, norms first": (lambda: Tokenwise(batch_first=True, norm_first=True), (5, 8)),
    "transformer, samples second": (Tokenwise, (5, 8)),
    "transformer, samples second, norms first": (lambda: Tokenwise(norm_first=True, activation="gelu"), (5, 8)),
    "vision transformer": (Vision, (5, 8)),
    "masked attention": (Masked, (5, 8)),
    "masked attention, no biases": (lambda: Masked(bias=False), (5, 8)),
    "cross attention": (Crossed, (5, 8)),
    "attention to another width": (OtherWidth, (5, 8)),
    "attention twice": (lambda: AttendsTwice(shared=False), (5, 8)),
    "attention of shared weights": (lambda: AttendsTwice(shared=True), (5, 8)),
    "attention, pruned": (lambda: OddAttention(lambda a: l1_unstructured(a, "in_proj_weight", 0.3)), (5, 8)),
    "attention, bias pruned": (lambda: OddAttention(lambda a: l1_unstructured(a, "in_proj_bias", 0.3)), (5, 8)),
    "attention, own output": (lambda: OddAttention(lambda a: setattr(a, "out_proj", Trebling(8, 8))), (5, 8)),
    "attention, idle hook": (
        lambda: OddAttention(lambda a: a.out_proj.register_forward_hook(lambda _m, _a, output: 2 * output)),
        (5, 8),
    ),
    "frozen": (lambda: nn.Sequential(nn.Linear(4, 6).requires_grad_(False), nn.Tanh(), nn.Linear(6, 3)), (4,)),
}


def prepared(name: str, n: int = 40) -> tuple[nn.Module, Batches]:
    """Return a body with statistics and weights of no special value, and its data in batches of 35."""
    torch.manual_seed(0)
    make, shape = BODIES[name]
    body = make()
    X = torch.randint(0, 7, (n, 5)) if shape == "tokens" else torch.randn(n, *shape)
    with torch.no_grad():
        for parameter in body.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
        body(X)
    batches = as_batches(X, name="known", batch_size=35, device=torch.device("cpu"), dtype=torch.float32)
    return body.eval(), batches


def along(body: nn.Module, batches: Batches, n: int = 2) -> Tensor:
    with torch.no_grad():
        n_outputs = body(batches.first().inputs).shape[1]
    return torch.randn(n, n_outputs)


def by_hand(body: nn.Module, batches: Batches, directions: Tensor) -> np.ndarray:
    """Return the kernel from passes with one sample each."""
    parameters, rows = [p.requires_grad_(True) for p in body.parameters()], []
    for batch in batches:
        for sample in batch.inputs:
            outputs, row = body(sample[None])[0], []
            for direction in directions:
                found = torch.autograd.grad(outputs @ direction, parameters, retain_graph=True, allow_unused=True)
                row += [
                    torch.zeros(weight.numel()) if gradient is None else gradient.flatten()
                    for gradient, weight in zip(found, parameters, strict=True)
                ]
            rows.append(torch.cat(row))
    features = torch.stack(rows)
    return (features @ features.T).numpy()


@pytest.mark.parametrize("name", BODIES)
def test_kernels_are_those_of_single_samples(name):
    """Below the limit the products of features are exactly those of gradients from passes with one sample each."""
    body, batches = prepared(name)
    directions = along(body, batches)
    owned = {"all": [name for name, _ in body.named_parameters()]}
    with unchanged(body):
        found = gradient_features(body, batches, directions, owned, max_features=MANY, seed=0)["all"]
    expected = by_hand(body, batches, directions)
    np.testing.assert_allclose(found @ found.T, expected, rtol=1e-3, atol=1e-4 * np.abs(expected).max())


@pytest.mark.parametrize(
    "name",
    [
        "positions",
        "norms",
        "norm of channels",
        "inputs first",
        "transformer",
        "vision transformer",
        "attention twice",
        "windows",
        "resting",
    ],
)
def test_rules_suffice(name, monkeypatch):
    """What is common in networks takes no pass for every sample."""

    def refused(*_args: object) -> None:
        raise AssertionError

    monkeypatch.setattr("retrainscope.gradient_features.sample_gradients", refused)
    body, batches = prepared(name)
    owned = {"all": [name for name, _ in body.named_parameters()]}
    assert len(gradient_features(body, batches, along(body, batches), owned, max_features=9, seed=0)["all"]) == 40


@pytest.mark.parametrize(
    ("name", "left"),
    [
        ("transformer, samples second", ("block.linear", "block.norm")),  # its attention has the samples first inside
        ("masked attention", ("attend.bias_k", "attend.bias_v")),
        ("cross attention", ("block.multihead_attn.",)),
        ("attention to another width", ("attend.",)),
        ("attention of shared weights", ("first.in_proj_weight",)),
    ],
)
def test_what_no_rule_of_attention_fits_is_left_to_single_samples(name, left, monkeypatch):
    """Attention to something else, or by shared weights, takes a pass for every sample; the rest of it does not."""
    body, batches = prepared(name)
    names = [name for name, _ in body.named_parameters()]
    asked: set[str] = set()

    def noted(*args: Any) -> Iterator[dict[str, Tensor]]:
        asked.update(args[-1]["all"])
        return sample_gradients(*args)

    monkeypatch.setattr("retrainscope.gradient_features.sample_gradients", noted)
    gradient_features(body, batches, along(body, batches), {"all": names}, max_features=9, seed=0)
    assert asked == {name for name in names if name.startswith(left)}


@pytest.mark.parametrize("name", ["transformer", "masked attention", "cross attention"])
def test_attention_is_given_back(name):
    """Modules inside, their names and the forward method are what they were, also after an error."""
    body, batches = prepared(name)
    before = [(path, type(module), sorted(vars(module))) for path, module in body.named_modules()]
    for last in (nn.Identity(), Failing(2, KeyboardInterrupt())):
        owned = {"all": [name for name, _ in body.named_parameters(prefix="0")]}
        model = nn.Sequential(body, last).eval()
        with contextlib.suppress(KeyboardInterrupt):
            gradient_features(model, batches, along(body, batches), owned, max_features=9, seed=0)
        assert [(path, type(module), sorted(vars(module))) for path, module in body.named_modules()] == before


@pytest.mark.parametrize("name", ["linear", "inputs first", "tokens", "convolution", "groups", "depthwise", "norms"])
def test_few_features_keep_products_on_average(name, monkeypatch):
    """Over many seeds the products of few features are those of the gradients; large weights are projected before."""
    monkeypatch.setattr("retrainscope.gradient_rules._LARGEST", 0)
    body, batches = prepared(name, n=6)
    directions = along(body, batches, n=1)
    owned = {"all": [name for name, _ in body.named_parameters()]}
    draws = [gradient_features(body, batches, directions, owned, max_features=9, seed=s)["all"] for s in range(400)]
    assert {rows.shape for rows in draws} == {(6, 9)}
    products = torch.stack([rows @ rows.T for rows in draws])
    expected = by_hand(body, batches, directions)
    error = (products.std(dim=0) / 400**0.5).numpy()
    assert (np.abs(products.mean(dim=0).numpy() - expected) < 4.5 * error + 1e-6 * np.abs(expected).max()).all()


@pytest.mark.parametrize("at", [1, 2, 3, 5])
@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("boom")])
def test_given_back_after_an_error(error, at):
    """An error in the common pass, or in those for what no rule fits, leaves the flags as they were."""
    body, batches = prepared("outside")
    body = nn.Sequential(nn.Linear(4, 4).requires_grad_(False), Failing(at, error), body).eval()
    owned = {"all": [name for name, _ in body.named_parameters()]}
    with unchanged(body), pytest.raises(type(error)) as raised:
        gradient_features(body, batches, torch.ones(2, 3), owned, max_features=9, seed=0)
    assert raised.value is error


def test_all_gradients_are_counted():
    """Progress adds up to samples times directions, also where it starts again for what no rule fits."""
    for name in ("linear", "tied"):
        body, batches = prepared(name)
        ticks: list[int] = []
        owned = {"all": [name for name, _ in body.named_parameters()]}
        gradient_features(body, batches, along(body, batches), owned, max_features=9, seed=0, tick=ticks.append)
        assert sum(ticks) == 80


class AfterRecurrent(nn.Module):
    """Begins with a layer that no rule is for."""

    def __init__(self) -> None:
        super().__init__()
        self.recurrent, self.head = nn.GRU(3, 4, batch_first=True), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.recurrent(x)[0][:, -1])


def test_a_first_sample_without_a_gradient_hides_nothing():
    """Where the first sample is all zeros, the gradient of the input weights of all others is there as well."""
    torch.manual_seed(0)
    model, X = AfterRecurrent().eval(), torch.randn(6, 5, 3)
    X[0] = 0
    names = {"recurrent": [f"recurrent.{name}" for name, _ in model.recurrent.named_parameters()]}
    batches = as_batches(X, name="given", batch_size=6, device=torch.device("cpu"), dtype=torch.float32)
    found = gradient_features(model, batches, torch.eye(3)[:2], names, max_features=MANY, seed=0)["recurrent"]
    each = [
        torch.cat([rows["recurrent"] for rows in sample_gradients(model, X, d.expand(6, -1), product, names)])
        for d in torch.eye(3)[:2]
    ]
    expected = sum(rows @ rows.T for rows in each)
    np.testing.assert_allclose(found @ found.T, expected, rtol=1e-4, atol=1e-5)
    assert expected.diagonal()[1:].min() > 0


def product(output: Tensor, direction: Tensor) -> Tensor:
    return (output * direction).sum()
