"""compare_layers and unbiased_hsic: known values, a naive computation, and what must not matter."""

import copy
import itertools

import numpy as np
import pytest
import torch
from helpers import unchanged
from networks import TokenNet, classifier, samples
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from retrainscope.criteria import LayerSimilarity, compare_layers, unbiased_hsic
from retrainscope.exceptions import InvalidDataError, LayerNotFoundError, ResultFormatError

i = np.arange(12)
F = np.stack([np.sin(i), np.cos(0.7 * i), 0.5 * (i % 3) + 0.1 * np.sin(3 * i)], axis=1)
Z = np.stack([np.sin(i + 1), np.cos(2 * i), 0.3 * (i % 3)], axis=1)


def naive_hsic(K: np.ndarray, L: np.ndarray) -> float:
    """Average over all ordered quadruples of samples: K_ij L_ij + K_ij L_kl - 2 K_ij L_ik, from the definition."""
    terms = [K[a, b] * (L[a, b] + L[c, d] - 2 * L[a, c]) for a, b, c, d in itertools.permutations(range(len(K)), 4)]
    return float(np.mean(terms))


def cka(X: np.ndarray, Y: np.ndarray) -> float:
    """Compute the alignment of two sets of features in one batch."""
    K, L = X @ X.T, Y @ Y.T
    return unbiased_hsic(K, L) / np.sqrt(unbiased_hsic(K, K) * unbiased_hsic(L, L))


def linear(weight: torch.Tensor, bias: float = 0.0) -> nn.Linear:
    """Return a linear layer of these weights."""
    layer = nn.Linear(weight.shape[1], weight.shape[0]).to(weight.dtype)
    with torch.no_grad():
        layer.weight.copy_(weight)
        layer.bias.fill_(bias)
    return layer


def activations(model: nn.Sequential, X: torch.Tensor, depth: int) -> np.ndarray:
    """Return what the first layers of a model put out."""
    with torch.no_grad():
        return model[:depth](X.to(model[0].weight.dtype)).double().numpy()


# unbiased_hsic


def test_known_value():
    """Of two small sets it is the published formula's value, as is the alignment."""
    np.testing.assert_allclose(unbiased_hsic(F @ F.T, Z @ Z.T), 0.1299918982, atol=1e-10)
    np.testing.assert_allclose(cka(F, Z), 0.1938703424, atol=1e-10)


@pytest.mark.parametrize("n", [4, 5, 7])
def test_hsic_is_the_mean_over_quadruples(n):
    """The closed form is the mean over all quadruples of different samples, for kernels of any kind."""
    rng = np.random.default_rng(n)
    K, L = (kernel + kernel.T for kernel in rng.standard_normal((2, n, n)))
    np.testing.assert_allclose(unbiased_hsic(K, L), naive_hsic(K, L), rtol=1e-9)


def test_hsic_of_independent_features_is_zero_on_average():
    """Of independent features the mean over many draws is 0 within three standard errors."""
    rng = np.random.default_rng(0)
    values = [unbiased_hsic(X @ X.T, Y @ Y.T) for X, Y in rng.standard_normal((2000, 2, 6, 3))]
    assert abs(np.mean(values)) < 3 * np.std(values) / np.sqrt(len(values))


def test_hsic_leaves_its_arguments_alone():
    """The kernels that are given are not written to."""
    K = F @ F.T
    before = K.copy()
    unbiased_hsic(K, K)
    np.testing.assert_array_equal(K, before)


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        (
            ((5, 5), (6, 6)),
            r"same shape \(n_samples, n_samples\). Got \(5, 5\) and \(6, 6\). The samples of two data sets",
        ),
        (((5, 3), (5, 3)), r"Got \(5, 3\) and \(5, 3\)"),
        (((3, 3), (3, 3)), "At least 4 samples are needed. Got 3"),
    ],
)
def test_kernels_that_do_not_fit(shapes, message):
    """Kernels of different samples, such as known and unknown ones, or of too few, are refused."""
    with pytest.raises(InvalidDataError, match=message):
        unbiased_hsic(*(np.ones(shape) for shape in shapes))


# compare_layers


def test_a_network_is_like_itself():
    """Compared with itself, or with a copy, every layer has the value 1."""
    model = classifier(dtype=torch.float64)
    for other in (model, copy.deepcopy(model)):
        found = compare_layers(model, other, samples())
        assert found.layers == ("0", "2")
        np.testing.assert_allclose(found.values, 1.0, rtol=1e-12)
        assert found.reasons == ("", "")


def test_values_by_definition():
    """Values are those of the features that each network puts out, computed from the definition."""
    one, two = classifier(dtype=torch.float64), classifier(seed=1, dtype=torch.float64)
    X = samples()[0]
    found = compare_layers(one, two, X)
    expected = [cka(activations(one, X, depth), activations(two, X, depth)) for depth in (1, 3)]
    np.testing.assert_allclose(found.values, expected, rtol=1e-9)
    assert (found.n_samples, found.n_batches) == (60, 1)
    np.testing.assert_allclose(compare_layers(two, one, X).values, found.values, rtol=1e-12)


def test_rotation_scale_and_shift_do_not_matter():
    """A layer that is turned, scaled and shifted has the value 1; one that is stretched along an axis has not."""
    turned = torch.from_numpy(np.linalg.qr(np.random.default_rng(0).standard_normal((4, 4)))[0])
    head = linear(torch.ones(2, 4, dtype=torch.float64))
    plain = nn.Sequential(linear(torch.eye(4, dtype=torch.float64)), head)
    moved = nn.Sequential(linear(-3 * turned, bias=50.0), head)
    stretched = nn.Sequential(linear(torch.diag(torch.tensor([9.0, 1, 1, 1], dtype=torch.float64))), head)
    X = samples()[0]
    np.testing.assert_allclose(compare_layers(plain, moved, X).values, [1.0], rtol=1e-9)
    assert compare_layers(plain, stretched, X).values[0] < 0.9


def test_only_layers_from_a_change_on_differ():
    """After a change of one layer those below are as before, bit for bit, and it is not."""
    model = classifier(dtype=torch.float64)
    changed = copy.deepcopy(model)
    nn.init.normal_(changed[2].weight)
    below, at = compare_layers(model, changed, samples()).values
    np.testing.assert_allclose(below, 1.0, rtol=1e-12)
    assert at < 0.99


def test_mini_batches_by_definition():
    """Over several batches the three sums are taken first, each batch weighed by its samples, and divided then."""
    one, two = classifier(dtype=torch.float64), classifier(seed=1, dtype=torch.float64)
    X = samples(50)[0]
    found = compare_layers(one, two, X, layers=["2"], batch_size=20)
    sums = np.zeros(3)
    for part in (X[:20], X[20:40], X[40:]):
        Y, W = activations(one, part, 3), activations(two, part, 3)
        K, L = Y @ Y.T, W @ W.T
        sums += [len(part) * unbiased_hsic(*pair) for pair in ((K, L), (K, K), (L, L))]
    np.testing.assert_allclose(found.values, sums[0] / np.sqrt(sums[1] * sums[2]), rtol=1e-9)
    assert (found.n_samples, found.n_batches) == (50, 3)


def test_a_small_last_batch_is_left_out():
    """Fewer than four samples have no estimate: such a batch is not measured, and the result says how many were."""
    one, two = classifier(dtype=torch.float64), classifier(seed=1, dtype=torch.float64)
    X = samples(43)[0]
    found = compare_layers(one, two, X, batch_size=20)
    np.testing.assert_array_equal(found.values, compare_layers(one, two, X[:40], batch_size=20).values)
    assert (found.n_samples, found.n_batches) == (40, 2)
    with pytest.raises(InvalidDataError, match="No batch of the given data has 4 samples"):
        compare_layers(one, two, X, batch_size=3)


def test_forms_of_data():
    """Loaders and mappings of the same samples give the same values."""
    one, two = classifier(), classifier(seed=1)
    X, y = samples()
    expected = compare_layers(one, two, X, batch_size=20).values
    loader = DataLoader(TensorDataset(X, torch.tensor(y)), batch_size=20)
    for data, batch_size in ((loader, 7), ({"input": X, "labels": y}, 20), ((X.numpy(), y), 20)):
        np.testing.assert_allclose(compare_layers(one, two, data, batch_size=batch_size).values, expected, rtol=1e-6)


def test_networks_of_different_precision():
    """Each network gets the samples in its own precision."""
    single = classifier()
    double = copy.deepcopy(single).double()
    np.testing.assert_allclose(compare_layers(single, double, samples()[0]).values, 1.0, rtol=1e-5)


def test_a_layer_that_says_nothing():
    """A layer that puts out the same for every sample has no value, and the reason tells which network's it is."""
    model = classifier()
    dead = copy.deepcopy(model)
    nn.init.zeros_(dead[2].weight)
    found = compare_layers(model, dead, samples())
    assert np.isnan(found.values[1])
    assert np.isfinite(found.values[0])
    assert found.reasons == ("", "the other network says the same of every sample")
    assert compare_layers(dead, model, samples()).reasons[1] == "the first network says the same of every sample"
    assert "2: the other network says the same of every sample" in str(found)


def test_samples_that_are_all_equally_unlike():
    """Where no two samples are more alike than others there is nothing to align: no value, whatever rounding leaves."""
    model = nn.Sequential(linear(torch.eye(6)), nn.Linear(6, 2))
    for X in (torch.eye(6), 0.1 * torch.eye(6) + 0.3):
        found = compare_layers(model, model, X)
        assert np.isnan(found.values[0])
        assert (
            found.reasons[0]
            == "to the first network all samples of a batch are equally unlike; give more, or larger batches"
        )


def test_unlike_networks_may_have_negative_values():
    """The estimate is 0 on average for networks that have nothing to do with each other, so some values are below."""
    model = nn.Sequential(linear(torch.tensor([[1.0, 0.0]])), nn.Linear(1, 2))
    other = nn.Sequential(linear(torch.tensor([[0.0, 1.0]])), nn.Linear(1, 2))
    generator = torch.Generator().manual_seed(0)
    values = [compare_layers(model, other, torch.randn(8, 2, generator=generator)).values[0] for _ in range(100)]
    assert min(values) < 0 < max(values)
    assert abs(np.mean(values)) < 4 * np.std(values) / 10


def test_padding_does_not_count():
    """Where the data tells what is padding, what it holds and how long it is changes nothing."""

    class Masked(TokenNet):
        def forward(self, ids, attention_mask):
            return super().forward(ids)

    torch.manual_seed(0)
    one, two = Masked(), Masked()
    ids = torch.randint(0, 10, (30, 5))
    mask = torch.ones(30, 5, dtype=torch.long)
    mask[::2, 3:] = 0
    values = []
    for filled in (0, 9):
        data = {"ids": torch.where(mask == 1, ids, filled), "attention_mask": mask}
        values.append(compare_layers(one, two, data, layers=["mix"], input_layer="embedding").values)
    np.testing.assert_array_equal(values[0], values[1])
    assert 0 < values[0][0] < 1


def test_both_networks_are_left_alone():
    """After a comparison, also one that failed, both networks and the global random states are as before."""
    one, two = classifier(), classifier(seed=1)
    with unchanged(one), unchanged(two):
        compare_layers(one, two, samples())
        compare_layers(one, one, samples())
        with pytest.raises(InvalidDataError):
            compare_layers(one, two, samples()[0][:3])


def test_layers_that_the_other_network_lacks():
    """The networks must have layers of the same names; one that is missing is named, with the nearest ones."""
    one, two = nn.Sequential(), nn.Sequential()
    for model, name in ((one, "conv1"), (two, "conv2")):
        model.add_module(name, nn.Linear(4, 4))
        model.add_module("head", nn.Linear(4, 2))
    with pytest.raises(LayerNotFoundError, match=r"no layer named 'conv1'. Did you mean 'conv2'"):
        compare_layers(one, two, samples())


# LayerSimilarity


def test_result_comes_back_from_a_file(tmp_path):
    """A result that was saved and loaded is the same, also where there is no value."""
    model, dead = classifier(), classifier()
    nn.init.zeros_(dead[2].weight)
    found = compare_layers(model, dead, samples())
    found.save(tmp_path / "similarity.json")
    back = LayerSimilarity.load(tmp_path / "similarity.json")
    np.testing.assert_array_equal(back.values, found.values)
    assert (back.layers, back.reasons, back.n_samples) == (found.layers, found.reasons, found.n_samples)
    assert str(back) == str(found)
    (tmp_path / "other.json").write_text("{}")
    with pytest.raises(ResultFormatError, match="holds no LayerSimilarity"):
        LayerSimilarity.load(tmp_path / "other.json")


def test_result_as_table():
    """The table names the layers and their values, in text, in HTML and as a frame."""
    found = LayerSimilarity(("a", "b"), np.array([0.5, np.nan]), ("", "it is dead"), 40, 2)
    assert str(found).splitlines() == [
        "Similarity of two networks: unbiased CKA, 1 is alike; 40 samples in 2 batches",
        "layer     CKA",
        "-----  ------",
        "a      0.5000",
        "b           -",
        "b: it is dead",
    ]
    assert "<td>0.5000</td>" in found._repr_html_()
    frame = found.to_frame()
    assert list(frame.columns) == ["layer", "cka", "reason"]
    assert frame["cka"][0] == 0.5
