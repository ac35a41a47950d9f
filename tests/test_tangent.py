"""TangentProbe: kernels from explicit Jacobians, the whole forecast recomputed, known truths, and what is refused."""

from functools import partial

import numpy as np
import pytest
import torch
from helpers import Apply, Counted, Read, unchanged
from networks import Failing, TokenNet, classifier, samples
from sklearn.exceptions import NotFittedError
from sklearn.kernel_ridge import KernelRidge
from torch import nn
from torch.func import functional_call
from torch.utils.data import DataLoader, TensorDataset

import retrainscope as rs
from retrainscope.exceptions import InvalidDataError, LayerNotFoundError, NonFiniteError, UnsupportedModelError
from retrainscope.gradient_features import _folded
from retrainscope.gradient_rules import random_signs
from retrainscope.predicted import bootstrap
from retrainscope.ridge import RIDGES


def conv_net() -> nn.Sequential:
    """Convolutions, group norm, dropout; the head is "8" on 6 features."""
    return nn.Sequential(
        *(nn.Conv2d(1, 4, 3), nn.GroupNorm(2, 4), nn.ReLU(), nn.Dropout(0.5)),
        *(nn.Conv2d(4, 6, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 3)),
    ).double()


def linear_net() -> nn.Sequential:
    """Two layers and a head, with dropout."""
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Dropout(0.5), nn.Linear(8, 5), nn.Linear(5, 2)).double()


NETS = {"linear": (linear_net, (4,), ("0", "3")), "convolutions": (conv_net, (1, 8, 8), ("0", "1", "4"))}


def data_for(shape: tuple[int, ...], n: int = 24, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Make samples of two classes."""
    y = torch.arange(n) % 2
    X = torch.randn(n, *shape, generator=torch.Generator().manual_seed(seed)).double()
    return X + y.reshape(-1, *(1,) * len(shape)), y


def explicit(model: nn.Sequential, X: torch.Tensor, layers: tuple[str, ...]) -> tuple[np.ndarray, dict]:
    """Return the head's inputs, and each layer's kernel over all features from full Jacobians, a sample at a time."""
    body = nn.Sequential(*list(model)[:-1]).eval()
    parameters = {name: p.detach() for name, p in body.named_parameters()}
    kernels = {}
    for layer in layers:
        owned = {name: p for name, p in parameters.items() if name.split(".")[0] == layer}
        rows = []
        for sample in X:

            def features(*weights, sample=sample, names=tuple(owned)):
                changed = dict(zip(names, weights, strict=True))
                return functional_call(body, parameters | changed, (sample[None],))[0]

            jacobians = torch.autograd.functional.jacobian(features, tuple(owned.values()))
            rows.append(torch.cat([j.flatten(1) for j in jacobians], dim=1))
        kernels[layer] = torch.einsum("ifp,jfp->ij", *[torch.stack(rows)] * 2).numpy()
    with torch.no_grad():
        return body(X).numpy(), kernels


def kernels_of(probe: rs.TangentProbe, X: torch.Tensor) -> tuple[np.ndarray, dict]:
    """Return what a fitted probe measures."""
    with probe._lent(X) as (model, batches):
        features, _, kernels = probe._kernels(model, batches)
    return features, kernels


@pytest.mark.parametrize("net", NETS)
@pytest.mark.parametrize("batch_size", [5, 256])
def test_kernels_equal_explicit_jacobians(net, batch_size):
    """With a direction for every feature, a layer's kernel is the product of the features' full Jacobians."""
    make, shape, layers = NETS[net]
    model, (X, y) = make(), data_for(shape)
    probe = rs.TangentProbe(model, layers=layers, n_directions=99, batch_size=batch_size, random_state=0).fit((X, y))
    features, kernels = kernels_of(probe, X)
    expected, by_layer = explicit(model, X, layers)
    np.testing.assert_allclose(features, expected, rtol=1e-10)
    for name, kernel in by_layer.items():
        np.testing.assert_allclose(kernels[name], kernel, rtol=1e-5, atol=1e-5 * np.abs(kernel).max())


def test_forecast_equals_one_by_hand():
    """The errors and accuracies are those of scikit-learn's ridge on kernels from Jacobians, each sample left out."""
    model, (X, y) = linear_net(), data_for((4,))
    probe = rs.TangentProbe(model, n_directions=99, random_state=0).fit((X, y))
    forecast = probe.forecast((X, y), policies=[["0"], ["0", "3"]])
    features, kernels = explicit(model, X, ("0", "3"))
    base = features @ features.T + 1
    sizes = {"0": 40, "3": 45}
    adapted = {name: k / np.sqrt(np.trace(k) / len(k) / sizes[name]) for name, k in kernels.items()}
    factor = 0.01 * np.trace(base) / np.mean([np.trace(k) for k in adapted.values()])
    adapted = {name: factor * k for name, k in adapted.items()}
    unit = np.trace(base + sum(adapted.values())) / len(X)
    truth, found = np.eye(2)[y] - 0.5, {}
    for ridge in RIDGES:
        for names in ((), ("0",), ("3",), ("0", "3")):
            kernel, predicted = base + sum(adapted[name] for name in names), []
            for row in range(len(X)):
                others = np.delete(np.arange(len(X)), row)
                fitted = KernelRidge(alpha=ridge * unit, kernel="precomputed")
                fitted.fit(kernel[np.ix_(others, others)], truth[others])
                predicted.append(fitted.predict(kernel[[row]][:, others])[0])
            found[ridge, names] = np.array(predicted)

    def error(ridge, names):
        return np.square(found[ridge, names] - truth).sum(axis=1).mean()

    chosen, _ = min(found, key=lambda pair: error(*pair))
    assert forecast.policies == ("none", "head", "head + 0", "all")
    np.testing.assert_allclose(forecast.error[1:], [error(chosen, n) for n in ((), ("0",), ("0", "3"))], rtol=1e-4)
    hits = [(found[chosen, n].argmax(axis=1) == y.numpy()).mean() for n in ((), ("0",), ("0", "3"))]
    np.testing.assert_allclose(forecast.accuracy[1:], hits)
    assert forecast.accuracy[0] == (model.eval()(X).argmax(dim=1) == y).double().mean()
    assert np.isnan(forecast.error[0])
    needs = np.log(error(chosen, ()) / np.array([error(chosen, ("0",)), error(chosen, ("3",))]))
    np.testing.assert_allclose(probe.score_layers((X, y)).values, needs, rtol=1e-3, atol=1e-5)
    assert forecast.chance == forecast.chance_error == 0.5
    assert (forecast.n_samples, forecast.n_classes, forecast.smallest_class) == (24, 2, 12)


def test_sketch_is_unbiased():
    """Over many draws of signs the products of sketched gradients are on average those of the gradients.

    Products of sketches of length 64 have a standard error below sqrt(2 / 64 / 400) = 0.009 of the norms.
    """
    rows = torch.randn(5, 300, dtype=torch.float64)
    rows /= rows.norm(dim=1, keepdim=True)
    sketched = torch.stack([_folded(rows, 64, partial(random_signs, seed=seed)) for seed in range(400)])
    assert sketched.shape == (400, 5, 64)
    products = sketched @ sketched.transpose(1, 2)
    np.testing.assert_allclose(products.mean(dim=0), rows @ rows.T, atol=0.036)
    spread = (products - rows @ rows.T).square().mean(dim=0).sqrt()
    assert spread.max() < 1.2 * np.sqrt(2 / 64)


def test_a_small_layer_is_not_sketched():
    """Up to the limit gradients are exact, in their own order."""
    rows = torch.randn(3, 64)
    assert torch.equal(_folded(rows, 64, partial(random_signs, seed=0)), rows)


def test_kernel_of_a_large_layer_is_close_to_exact():
    """A layer larger than max_features has a kernel with a relative error of about sqrt(2 / max_features)."""
    X, y = data_for((64,), n=20)
    model = nn.Sequential(nn.Linear(64, 50), nn.Tanh(), nn.Linear(50, 4), nn.Linear(4, 2)).double()
    exact = kernels_of(rs.TangentProbe(model, max_features=10_000, random_state=0).fit((X, y)), X)[1]
    rough = kernels_of(rs.TangentProbe(model, max_features=512, random_state=0).fit((X, y)), X)[1]
    np.testing.assert_array_equal(rough["2"], exact["2"])  # 204 parameters
    norms = np.sqrt(np.outer(np.diag(exact["0"]), np.diag(exact["0"])))
    relative = np.abs(rough["0"] - exact["0"]) / norms
    assert 0 < np.sqrt(np.square(relative).mean()) < 1.5 * np.sqrt(2 / 512)


def copies() -> tuple[torch.Tensor, torch.Tensor, list[str]]:
    """Make eight samples of four near copies each, with labels that mean nothing."""
    X = torch.randn(8, 4, generator=torch.Generator().manual_seed(4)).repeat_interleave(4, dim=0).double()
    X = X + 0.01 * torch.randn(X.shape, generator=torch.Generator().manual_seed(5))
    return X, (torch.arange(8) % 2).repeat_interleave(4), [f"video {n // 4}" for n in range(32)]


def test_near_copies_are_seen_through_by_their_groups():
    """Labels of near copies are foretold by the copies; left out together, no better than by chance."""
    X, y, groups = copies()
    probe = rs.TangentProbe(linear_net(), random_state=0).fit((X, y))
    blind, told = probe.forecast((X, y)), probe.forecast((X, y), groups=groups)
    assert blind.accuracy[-1] == 1
    assert told.accuracy[-1] < 0.7
    assert (blind.smallest_class, told.smallest_class) == (16, 4)


def test_groups_are_drawn_as_wholes():
    """A bootstrap draw has all samples of a class's group equally often, and each class as much as there is of it."""
    targets, groups = np.repeat([0, 1], [9, 6]), np.array([0, 0, 0, 0, 1, 1, 2, 3, 4, 5, 5, 4, 6, 6, 0])
    weights = bootstrap(targets, groups, np.random.default_rng(0))
    for target in (0, 1):
        np.testing.assert_allclose(weights[:, targets == target].sum(axis=1), (targets == target).mean())
        for group in np.unique(groups):
            mine = weights[:, (targets == target) & (groups == group)]
            assert (mine == mine[:, :1]).all()
    assert len(np.unique(weights[:, 0])) > 3
    assert (weights[:, 0] != weights[:, -1]).any()  # a group that is in two classes is drawn in each for itself


def test_every_sample_a_group_is_no_groups():
    """Groups of one sample each, whatever they are called, change nothing."""
    X, y = data_for((4,))
    probe = rs.TangentProbe(linear_net(), random_state=0).fit((X, y))
    names = np.random.default_rng(0).permutation(len(y)).astype(str)
    plain, grouped = probe.score_layers((X, y)), probe.score_layers((X, y), groups=names)
    np.testing.assert_allclose(grouped.values, plain.values, rtol=1e-9)
    assert grouped.interval.shape == plain.interval.shape


def test_groups_follow_the_samples_that_are_drawn():
    """Where samples are drawn, the groups of just these count: of shuffled data as of sorted."""
    X, y, groups = copies()
    probe = rs.TangentProbe(linear_net(), samples_per_class=15, random_state=0).fit((X, y))
    order = np.random.default_rng(1).permutation(32)
    shuffled = probe.forecast((X[order], y[order]), groups=[groups[row] for row in order])
    assert shuffled.n_samples == 30
    assert shuffled.accuracy[-1] < 0.7


@pytest.mark.parametrize(
    ("groups", "got"),
    [
        ([0, 1], "2 entries"),
        ("video", "str"),
        ([[0], [1]] * 16, r"\[0\] at place 0"),
        ([0.0] * 31 + [np.nan], "nan at place 31"),
        (["a", None] * 16, "None at place 1"),
        (7, "int"),
        (np.arange(33), "33 entries"),
    ],
)
def test_groups_that_do_not_fit(groups, got):
    """Groups must be as many as the samples, each with its own entry."""
    X, y, _ = copies()
    probe = rs.TangentProbe(linear_net(), random_state=0).fit((X, y))
    with pytest.raises(InvalidDataError, match=f"'groups' parameter must have one entry for each of the 32.*Got {got}"):
        probe.forecast((X, y), groups=groups)


def test_samples_of_a_class_are_capped():
    """No more samples of a class are used than asked for, smaller classes whole, and no more than 600 in all."""
    X, y = torch.randn(90, 4), torch.tensor([0] * 60 + [1] * 25 + [2] * 5)
    probe = rs.TangentProbe(classifier(), samples_per_class=20, n_directions=1, random_state=0).fit((X, y))
    forecast = probe.forecast((X, y))
    assert (forecast.n_samples, forecast.smallest_class) == (45, 5)
    assert forecast.chance == 20 / 45
    np.testing.assert_allclose(forecast.chance_error, 1 - (20**2 + 20**2 + 5**2) / 45**2)
    X, y = torch.randn(1000, 4), torch.arange(1000) % 40
    probe = rs.TangentProbe(classifier(), n_directions=1, layers=["2"], random_state=0).fit((X, y))
    assert probe.forecast((X, y), policies=[]).n_samples == 600


FORMS = {
    "loader": lambda X, y: DataLoader(TensorDataset(X, y), batch_size=7),
    "data set": TensorDataset,
    "mapping": lambda X, y: {"input": X, "labels": y},
    "arrays": lambda X, y: (X.numpy(), y.numpy()),
    "batches": lambda X, y: [(X[:31], y[:31]), (X[31:], y[31:])],
}


@pytest.mark.parametrize("form", [*FORMS, 1, 7, 1000])
def test_form_and_batch_size_do_not_matter(form):
    """The same samples give the same forecast in whatever form they come, and by how many at a time."""
    model, (X, y) = linear_net(), data_for((4,), n=80)
    options = {"samples_per_class": 25, "random_state": 0}
    expected = rs.TangentProbe(model, **options).fit((X, y)).forecast((X, y))
    data = FORMS[form](X, y) if form in FORMS else (X, y)
    batch_size = form if isinstance(form, int) else 20
    forecast = rs.TangentProbe(model, batch_size=batch_size, **options).fit(data).forecast(data)
    np.testing.assert_allclose(forecast.error, expected.error, rtol=1e-7)
    np.testing.assert_allclose(forecast.draws, expected.draws, rtol=1e-7)


def test_a_shuffled_loader_keeps_samples_and_labels_together():
    """Whatever the order of a stream, a class that is told apart without error is."""
    X, y = data_for((4,), n=60)
    X[:, 0] += 20 * y
    loader = DataLoader(TensorDataset(X, y), batch_size=7, shuffle=True)
    forecast = rs.TangentProbe(linear_net(), samples_per_class=20, random_state=0).fit(loader).forecast(loader)
    assert forecast.accuracy[forecast.row_of("head")] > 0.95


def normed_net():
    """Return a network with batch statistics to be renewed, for each choice of layers."""
    torch.manual_seed(0)
    return nn.Sequential(
        *(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 6), nn.BatchNorm1d(6), nn.ReLU()),
        nn.Linear(6, 2),
    ).eval()


@pytest.mark.parametrize("loaded", [False, True])
def test_samples_are_read_a_few_times_and_in_whole_batches(loaded):
    """However many passes over the samples drawn it takes, and however few of a loader's batch they are."""
    X, y = data_for((4,), n=400)
    options = {"samples_per_class": 20, "random_state": 0}
    probe = rs.TangentProbe(normed_net(), **options).fit((X, y))
    expected, data = probe.forecast((X, y)), Read(X, y)
    found = probe.forecast(DataLoader(data, batch_size=5) if loaded else data)
    assert data.times[10:].max() == 2  # for the labels, and to be held; the first few also before
    np.testing.assert_allclose(found.error, expected.error, rtol=1e-6)


def test_samples_that_take_too_much_memory_are_read_again(monkeypatch):
    """Nothing is held that would not fit, and the forecast is the same."""
    X, y = data_for((4,), n=100)
    options = {"samples_per_class": 20, "random_state": 0}
    probe = rs.TangentProbe(normed_net(), **options).fit((X, y))
    expected, data = probe.forecast((X, y)), Read(X, y)
    monkeypatch.setattr("retrainscope.shares._MOST_HELD", 40 * X[0].float().nbytes - 1)
    np.testing.assert_allclose(probe.forecast(data).error, expected.error, rtol=1e-12)
    assert data.times.max() > 4


def test_the_random_state_decides_all():
    """The same random state gives the same forecast bit for bit, another one another."""
    model, (X, y) = linear_net(), data_for((4,), n=80)

    def drawn(seed):
        options = {"samples_per_class": 20, "n_directions": 2, "random_state": seed}
        return rs.TangentProbe(model, **options).fit((X, y)).forecast((X, y))

    first, again, other = drawn(0), drawn(0), drawn(1)
    np.testing.assert_array_equal(first.draws, again.draws)
    np.testing.assert_array_equal(first.error, again.error)
    assert not np.array_equal(first.error, other.error)


class MaskedTokens(nn.Module):
    """A TokenNet whose head sees the mean over the tokens that are no padding."""

    def __init__(self):
        super().__init__()
        self.embedding, self.mix, self.head = nn.Embedding(10, 4), nn.Linear(4, 5), nn.Linear(5, 2)

    def forward(self, input_ids, attention_mask):
        mixed = torch.relu(self.mix(self.embedding(input_ids))) * attention_mask[..., None]
        return self.head(mixed.sum(dim=1) / attention_mask.sum(dim=1, keepdim=True))


def test_padding_counts_for_nothing():
    """Tokens that the model's mask leaves out change no forecast, whatever stands in them."""
    ids, y = torch.randint(0, 10, (40, 5)), torch.arange(40) % 2
    lengths = torch.arange(40) % 4 + 2
    mask = (torch.arange(5) < lengths[:, None]).long()
    model, found = MaskedTokens(), []
    for filler in (0, 9):
        data = {"input_ids": torch.where(mask == 1, ids, filler), "attention_mask": mask, "labels": y}
        probe = rs.TangentProbe(model, random_state=0, input_layer="embedding").fit(data)
        found.append(probe.forecast(data))
    np.testing.assert_allclose(found[0].error, found[1].error, rtol=1e-6)
    assert found[0].policies == ("none", "head", "all")


def test_token_ids():
    """A model of token ids has a forecast."""
    data = torch.randint(0, 10, (40, 3)), torch.arange(40) % 2
    forecast = rs.TangentProbe(TokenNet(), input_layer="embedding", random_state=0).fit(data).forecast(data)
    assert forecast.layers == ("mix",)
    assert np.isfinite(forecast.draws[:, 1:]).all()


@pytest.mark.parametrize(
    ("known", "unknown", "as_is"),
    [((0, 1), (0, 1), True), ((0, 1), (1, 5), False), (("a", "b"), ("a", "b"), False), ((5, 6), (5, 6), False)],
)
def test_the_model_as_it_is(known, unknown, as_is):
    """The model can be used as it is where the unknown classes are known ones and the labels places of outputs."""
    model, data = classifier(), samples(classes=unknown, seed=1)
    forecast = rs.TangentProbe(model, random_state=0).fit(samples(classes=known)).forecast(data)
    assert ("none" in forecast.policies) is as_is
    if as_is:
        assert forecast.trained[0] == ()
        hits = model(data[0]).argmax(dim=1) == torch.tensor(data[1])
        assert forecast.accuracy[0] == hits.double().mean()


@pytest.mark.parametrize("labelled", [True, False])
def test_scores_tell_the_known_classes(labelled):
    """The scores name the known classes and their sizes, and none where the known data has no labels."""
    known = samples(61, classes=("a", "b"))
    scores = rs.TangentProbe(classifier(), random_state=0).fit(known if labelled else known[0]).score_layers(samples())
    assert scores.known_classes == (("a", "b") if labelled else ())
    assert scores.known_per_class.shape == ((2, 2) if labelled else (0, 2))
    assert scores.n_samples == (61, 60)
    assert scores.class_sizes[0] == ((30, 31) if labelled else (61, 61))
    assert scores.classes == (0, 1)


# Known truths


def trained(X: torch.Tensor, y: torch.Tensor, n_classes: int = 2) -> nn.Sequential:
    """Train a network of three layers and a head."""
    torch.manual_seed(0)
    model = nn.Sequential(
        *(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 12), nn.Tanh()),
        *(nn.Linear(12, 10), nn.Tanh(), nn.Linear(10, n_classes)),
    )
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(300):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(X), y).backward()
        optimizer.step()
    return model


def parity(n: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Make a task that no head on random features solves: the sign of a product, among six inputs of noise."""
    X = torch.randn(n, 8, generator=torch.Generator().manual_seed(seed))
    return X, (X[:, 0] * X[:, 1] > 0).long()


def test_a_shuffled_layer_is_found():
    """Where the first layer of a trained network was shuffled, training it is forecast to beat the head alone."""
    known = parity(600, 0)
    model = trained(*known)
    order = torch.randperm(16 * 8, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        model[0].weight.copy_(model[0].weight.flatten()[order].view(16, 8))
    forecast = rs.TangentProbe(model, samples_per_class=150, random_state=0).fit(known).forecast(parity(400, 1))
    error = dict(zip(forecast.policies, forecast.error, strict=True))
    assert error["head + 0"] < error["head"] - 0.03
    with_first = [error[p] for p, t in zip(forecast.policies, forecast.trained, strict=True) if "0" in t]
    assert min(with_first) == min(e for e in error.values() if np.isfinite(e))


def test_for_permuted_labels_the_head_is_enough():
    """Where the classes only swapped their numbers, the head alone is nearly as good as anything, and none is not.

    The ridge of the head is no logistic regression, so that its squared error leaves something to be gained.
    """
    known, (X, y) = parity(600, 0), parity(200, 1)
    forecast = rs.TangentProbe(trained(*known), random_state=0).fit(known).forecast((X, 1 - y))
    assert forecast.best_within(0.05) == "head"
    assert forecast.accuracy[forecast.row_of("head")] > forecast.accuracy.max() - 0.05
    accuracy = dict(zip(forecast.policies, forecast.accuracy, strict=True))
    assert accuracy["head"] > 0.85
    assert accuracy["none"] < 0.15


def test_the_order_of_hidden_units_does_not_matter():
    """Networks that differ in the order of their hidden units compute the same, and have the same forecast."""
    plain, (X, y) = linear_net(), data_for((4,), n=40)
    permuted = linear_net()
    permuted.load_state_dict(plain.state_dict())
    first, last = torch.randperm(8), torch.randperm(5)
    with torch.no_grad():
        permuted[0].weight.copy_(plain[0].weight[first])
        permuted[0].bias.copy_(plain[0].bias[first])
        permuted[3].weight.copy_(plain[3].weight[last][:, first])
        permuted[3].bias.copy_(plain[3].bias[last])
        permuted[4].weight.copy_(plain[4].weight[:, last])
    one, other = (
        rs.TangentProbe(m, n_directions=5, random_state=0).fit((X, y)).forecast((X, y)) for m in (plain, permuted)
    )
    np.testing.assert_allclose(one.error, other.error, rtol=1e-5)
    np.testing.assert_array_equal(one.accuracy, other.accuracy)


def test_the_scale_of_the_features_does_not_matter():
    """Features twice as large, by a layer before the head, leave the shares of kernels against one another as they are.

    The constant of the head's kernel is not scaled, so a small difference is left.
    """
    X, y = data_for((4,), n=40)
    plain = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 2)).double()
    scaled = nn.Sequential(*list(plain)[:4], Apply(lambda x: 1024 * x), plain[4])
    probes = [rs.TangentProbe(m, layers=["0", "2"], random_state=0).fit((X, y)) for m in (plain, scaled)]
    (f, k), (g, h) = (kernels_of(probe, X) for probe in probes)
    np.testing.assert_allclose(g, 1024 * f)
    for name in k:
        np.testing.assert_allclose(h[name], 1024.0**2 * k[name], rtol=1e-9)


# What is borrowed is given back


@pytest.mark.parametrize("error", [RuntimeError("boom"), KeyboardInterrupt("boom")], ids=lambda e: type(e).__name__)
@pytest.mark.parametrize("at", [1, 3, 4, 5, 6])
def test_the_model_is_given_back_after_an_error(error, at):
    """Wherever the model fails, the error comes through and the model is as it was, with its modes and gradients."""
    model = nn.Sequential(
        nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), Failing(at, error), nn.Linear(8, 6), nn.Linear(6, 3)
    )
    model[0].weight.grad = torch.ones(8, 4)
    model[4].requires_grad_(False)
    with unchanged(model), pytest.raises(type(error), match="boom"):
        rs.TangentProbe(model, batch_size=20, random_state=0).fit(samples()).forecast(samples(seed=1))


def test_the_model_is_given_back():
    """After a forecast the model and the global random states are bit for bit what they were."""
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 6), nn.Linear(6, 3))
    model[3].requires_grad_(False)
    with unchanged(model):
        rs.TangentProbe(model, random_state=0).fit(samples()).forecast(samples(seed=1))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype):
    """A model in half precision has about the forecast that it has in full precision."""
    known, unknown = samples(), samples(classes=(3, 4), seed=1)
    full, half = (
        rs.TangentProbe(classifier(dtype=d), random_state=0).fit(known).forecast(unknown)
        for d in (torch.float32, dtype)
    )
    np.testing.assert_allclose(half.error, full.error, atol=0.03)


def test_overflow_is_refused():
    """Where gradients or features leave the range of half precision, the error says what to do."""
    model = classifier(dtype=torch.float16)
    with torch.no_grad():
        model[2].weight.fill_(60000.0)
        model[2].bias.zero_()
    probe = rs.TangentProbe(model, random_state=0).fit((samples()[0] / 1e6, samples()[1]))
    X, y = samples()
    with pytest.raises(NonFiniteError, match=r"NaN or infinity.*give model.float\(\)"):
        probe.forecast((X.abs() + 5, y))


def test_infinity_in_the_network():
    """A sample of the unknown data that overflows in the network is refused; NaN weights are when fitted, by layer."""
    summing, (X, y) = classifier(), samples()
    with torch.no_grad():
        summing[0].weight.fill_(1.0)
    probe = rs.TangentProbe(summing, random_state=0).fit((X, y))
    with pytest.raises(NonFiniteError, match="What goes into the head has NaN or infinity for the unknown data"):
        probe.forecast((torch.cat([X[:-1], torch.full((1, 4), 3e38)]), y))
    with torch.no_grad():
        summing[2].weight[0, 0] = float("nan")
    with pytest.raises(NonFiniteError, match="The layer '2' puts out NaN or infinity"):
        rs.TangentProbe(summing, random_state=0).fit((X, y))


# What is refused


@pytest.mark.parametrize(
    ("unknown", "message"),
    [
        (samples()[0], r"unknown data has no labels, and this needs them. Give \(X, y\)"),
        (samples(classes=("x",)), r"unknown data has one class \('x'\); at least two are needed"),
        ((samples()[0], [0] * 59 + [1]), r"unknown class 1 has 1 sample; at least 2 a class are needed"),
    ],
)
def test_unknown_data_must_have_classes(unknown, message):
    """Unknown data without labels, of one class, or with a lonely sample is refused before the model is run."""
    counted = Counted()
    probe = rs.TangentProbe(nn.Sequential(counted, *classifier()), random_state=0).fit(samples())
    before = counted.calls
    with pytest.raises(InvalidDataError, match=message):
        probe.forecast(unknown)
    assert counted.calls == before


class HeadOnTokens(nn.Module):
    """A network whose head runs at every token."""

    def __init__(self):
        super().__init__()
        self.mix, self.head = nn.Linear(2, 5), nn.Linear(5, 2)

    def forward(self, x):
        return self.head(self.mix(x).reshape(-1, 5)).reshape(len(x), 2, 2).mean(dim=1)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 4), nn.Unflatten(1, (2, 2))), "one row of class scores a sample"),
        (nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 2), Apply(lambda x: x.sum())), None),
        (nn.Sequential(nn.Unflatten(1, (2, 2)), HeadOnTokens()), "must take one tensor with one row a sample"),
    ],
    ids=["two axes", "no samples", "head on tokens"],
)
def test_models_without_a_row_a_sample(model, message):
    """A model that gives no row of scores a sample, or whose head takes none, is refused when fitted."""
    with pytest.raises(UnsupportedModelError, match=message):
        rs.TangentProbe(model, random_state=0).fit(samples())


@pytest.mark.parametrize("option", ["samples_per_class", "n_directions", "max_features"])
@pytest.mark.parametrize("value", [0, 2.5, "4", True])
def test_options_must_be_whole_numbers(option, value):
    """What counts samples, directions and features is a positive integer; refused before the model is run."""
    with pytest.raises(InvalidDataError, match=f"'{option}' parameter must be a positive integer"):
        rs.TangentProbe(classifier(), **{option: value}).fit(samples())


def test_a_misspelt_policy():
    """A policy of a layer that is not measured is refused, with the nearest that is, before gradients are taken."""
    probe = rs.TangentProbe(classifier(), random_state=0).fit(samples())
    with pytest.raises(LayerNotFoundError, match="no measured layer named '3'"):
        probe.forecast(samples(), policies=[["0", "3"]])


def test_a_forecast_needs_fit():
    """Before fit there is no forecast, by scikit-learn's error."""
    with pytest.raises(NotFittedError):
        rs.TangentProbe(classifier()).forecast(samples())


def test_layers_that_change_nothing():
    """Where no layer's weights reach the head there is nothing to forecast, and that is said."""
    model = nn.Sequential(nn.Linear(4, 6), Apply(lambda x: x.detach()), nn.Linear(6, 3))
    with pytest.raises(UnsupportedModelError, match="nothing can be forecast"):
        rs.TangentProbe(model, random_state=0).fit(samples()).forecast(samples())
    rec = rs.recommend_layers(model, samples(), samples(seed=1), random_state=0)
    assert rec.forecast is None
    assert rec.notes[0].startswith("There is no forecast: No layer's weights change")
    assert [one.estimator for one in rec.scores] == ["ActivationSpread"]


def test_many_classes_are_drawn_from():
    """Of more than 60 classes ten samples each of 60 are looked at, and the result says so; what fits is as it was."""
    torch.manual_seed(0)
    y = torch.arange(1600) % 80
    X = torch.randn(1600, 4) + 3 * torch.randn(80, 4, generator=torch.Generator().manual_seed(1))[y]
    model, known = classifier(), samples()
    probe = rs.TangentProbe(model, random_state=0, progress=False).fit(known)
    forecast = probe.forecast((X, y + 100))
    assert (forecast.n_samples, forecast.n_classes, forecast.smallest_class) == (600, 60, 10)
    again = rs.TangentProbe(model, random_state=0, progress=False, samples_per_class=5).fit(known)
    assert again.forecast((X, y + 100)).n_classes == 80
    rec = rs.recommend_layers(model, known, (X, y + 100), random_state=0, progress=False)
    assert "The forecast is of 60 of the 80 unknown classes, drawn at random." in rec.notes
    np.testing.assert_array_equal(rec.forecast.error, forecast.error)


def test_a_model_that_knows_many_classes_is_left_as_it_is():
    """Where classes are drawn the model as it is tells these apart too, so that it is not behind for the others."""
    rng = torch.Generator().manual_seed(0)
    centres = 1.3 * torch.randn(100, 8, generator=rng)

    def drawn(n):
        y = torch.arange(100 * n) % 100
        return centres[y] + 0.9 * torch.randn(100 * n, 8, generator=rng), y

    model = nn.Sequential(nn.Linear(8, 24), nn.ReLU(), nn.Linear(24, 100))
    optimizer, (X, y) = torch.optim.Adam(model.parameters(), lr=0.02), drawn(30)
    for _ in range(300):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(X), y).backward()
        optimizer.step()
    model.zero_grad(set_to_none=True)
    rec = rs.recommend_layers(model, drawn(12), drawn(12), random_state=0, progress=False)
    accuracy = dict(zip(rec.forecast.policies, rec.forecast.accuracy, strict=True))
    assert rec.forecast.drawing_gain > 0.03
    assert abs(accuracy["none"] - rec.forecast.drawing_gain - rec.forecast.known_accuracy) < 0.05
    assert rec.verdict == "none"


def test_copies_count_as_one():
    """Samples that come more than once do not foretell each other: noise stays noise, and how many is said."""
    rng = torch.Generator().manual_seed(0)
    X, y = torch.randn(60, 4, generator=rng), torch.arange(60) % 3
    once = rs.TangentProbe(classifier(), random_state=0).fit(samples()).forecast((X, y + 5))
    loader = DataLoader(
        TensorDataset(X, y + 5),
        batch_size=32,
        sampler=torch.utils.data.WeightedRandomSampler(torch.ones(60), 150, generator=rng),
    )
    rec = rs.recommend_layers(classifier(), samples(), loader, random_state=0)
    assert once.n_copies == 0
    assert rec.forecast.n_copies > 60
    assert rec.forecast.smallest_class < 21
    assert rec.forecast.accuracy.max() < 0.6
    assert rec.verdict == "undecided"
    assert any("as where a loader draws with replacement" in note for note in rec.notes)
    own = rs.TangentProbe(classifier(), random_state=0).fit(samples())
    grouped = own.forecast((X.repeat(2, 1), y.repeat(2) + 5), groups=[*range(60)] * 2)
    alone = own.forecast((X.repeat(2, 1), y.repeat(2) + 5))
    np.testing.assert_array_equal(grouped.error, alone.error)
    assert alone.smallest_class == 20


def test_groups_beside_a_sampler_of_batches():
    """A sampler of batches of one's own may draw as it likes, so that groups cannot be told; the usual one is taken."""
    X, y, groups = copies()
    probe = rs.TangentProbe(linear_net(), random_state=0).fit((X, y))
    data, batches = TensorDataset(X, y), [[*range(16, 32)], [*range(16)]]
    with pytest.raises(InvalidDataError, match="which the sampler of the unknown data changes"):
        probe.forecast(DataLoader(data, batch_sampler=batches), groups=groups)
    told = probe.forecast(DataLoader(data, batch_size=16), groups=groups)
    np.testing.assert_allclose(told.error, probe.forecast((X, y), groups=groups).error)


def test_novel_classes_that_are_not_drawn_count():
    """A model cannot be used as it is where a class is new to it, drawn or not."""
    torch.manual_seed(0)
    y = torch.arange(700) % 70
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 70))
    known = torch.randn(700, 4), y
    for last, expected in ((69, True), (70, False)):
        labels = torch.where(y == 69, last, y)
        rec = rs.recommend_layers(model, known, (torch.randn(700, 4), labels), random_state=0, progress=False)
        assert ("none" in rec.forecast.policies) == expected


class Restless(torch.utils.data.Sampler):
    """Draws an order of its own at every pass, from a generator that nobody else knows."""

    def __init__(self, n):
        self.n, self.rng = n, np.random.default_rng(0)

    def __len__(self):
        return self.n

    def __iter__(self):
        return iter(self.rng.permutation(self.n).tolist())


def numbered_data(n=40):
    """Return a data set whose labels are its places' parities."""
    X, y = samples(n)
    return TensorDataset(X, torch.tensor(y))


def test_another_order_at_every_pass_is_refused():
    """Labels of one pass are not brought together with samples of another."""
    data = numbered_data()
    loader = DataLoader(data, 8, sampler=Restless(len(data)))
    with pytest.raises(InvalidDataError, match="comes in another order at every pass, so that labels and samples"):
        rs.TangentProbe(classifier(), random_state=0).fit(samples()).forecast(loader)
    for same in (DataLoader(data, 8, shuffle=True), DataLoader(data, 8)):
        rs.TangentProbe(classifier(), random_state=0).fit(samples()).forecast(same)


def test_groups_of_a_loader_that_shuffles_are_refused():
    """Groups in the order of the data set are not those of a loader that has another; tensors one by one are values."""
    data, groups = numbered_data(), torch.arange(40) // 4
    probe, message = rs.TangentProbe(classifier(), random_state=0).fit(samples()), "which the sampler of the unknown"
    for loader in (
        DataLoader(data, 8, shuffle=True),
        DataLoader(data, batch_sampler=DataLoader(data, 8, shuffle=True).batch_sampler),
    ):
        with pytest.raises(InvalidDataError, match=message):
            probe.forecast(loader, groups=groups)
    expected = probe.forecast(data, groups=groups)
    for same in ([*groups], [*groups.numpy()], groups.tolist()):
        np.testing.assert_array_equal(probe.forecast(data, groups=same).draws, expected.draws)
    np.testing.assert_array_equal(probe.forecast(DataLoader(data, 8), groups=groups).error, expected.error)


def test_a_small_last_batch_does_not_count_as_a_whole_one(monkeypatch):
    """Statistics are renewed from batches of about equal size, where the last would be a small one."""
    sizes = []

    def noted(x):
        if model[1].training:
            sizes.append(len(x))
        return x

    model = nn.Sequential(Apply(noted), nn.BatchNorm1d(4), nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 3))
    for n, expected in ((34, {17}), (40, {16, 24}), (48, {24}), (20, {20})):
        sizes.clear()
        probe = rs.TangentProbe(model, layers=["2"], random_state=0, batch_size=24).fit(samples())
        probe.forecast(samples(n, seed=1), policies=[["2"]])
        assert set(sizes) <= expected
