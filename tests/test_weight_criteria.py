"""The criterion on weights alone: known by hand, against plain numpy, and what it does not see."""

import copy

import numpy as np
import pytest
import torch
from helpers import unchanged
from networks import TokenNet, classifier, samples
from sklearn.exceptions import NotFittedError
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import retrainscope as rs
from retrainscope.criteria import SpectrumSNR, spectrum_snr
from retrainscope.exceptions import InvalidDataError


def by_eigenvalues(weight: np.ndarray) -> float:
    """Compute the ratio from the eigenvalues of W Wᵀ, with sorted values and interpolated quartiles."""
    small = weight if weight.shape[0] <= weight.shape[1] else weight.T
    values = np.sort(np.sqrt(np.clip(np.linalg.eigvalsh(small @ small.T), 0, None)))
    places = np.arange(len(values))
    low, high = (np.interp(share * (len(values) - 1), places, values) for share in (0.25, 0.75))
    edge = (high - low) / 1.349 * (1 + np.sqrt(small.shape[0] / small.shape[1]))
    return values[values > edge].sum() / values[values <= edge].sum() / values[-1]


def ratio(weight: Tensor) -> float:
    """Compute the ratio of a weight with the outputs first."""
    return spectrum_snr(weight.detach().flatten(1).numpy())


def needs(model: nn.Module, X: Tensor, **options: object) -> rs.LayerScores:
    """Fit and score on the same inputs."""
    return SpectrumSNR(model, **options).fit(X).score_layers(X)


# The maths


def test_known_by_hand():
    """Singular values 5, 2, 1, 0: quartiles 0.75 and 2.75, so 5 is signal and 3 noise, and the ratio 5 / 3 / 5."""
    assert spectrum_snr(np.diag([1.0, 0.0, 5.0, -2.0])) == pytest.approx(1 / 3)


def test_the_edge_depends_on_the_shape():
    """Columns of zeros make the edge lower: with 4 by 64 it is 2.20 instead of 3.52, and 2.5 becomes signal."""
    square = np.diag([5.0, 2.5, 1.0, 0.0])
    quartiles = (0.75, 3.125)
    edges = [(quartiles[1] - quartiles[0]) / 1.349 * (1 + np.sqrt(b)) for b in (1, 1 / 16)]
    assert edges[1] < 2.5 < edges[0]
    assert spectrum_snr(square) == pytest.approx(5 / 3.5 / 5)
    assert spectrum_snr(np.hstack([square, np.zeros((4, 60))])) == pytest.approx(7.5 / 1 / 5)


@pytest.mark.parametrize("shape", [(40, 40), (40, 44), (44, 40)])
def test_against_eigenvalues(shape):
    """It is what the eigenvalues of W Wᵀ give, for noise and for noise with a signal."""
    rng = np.random.default_rng(0)
    noise = rng.normal(size=shape)
    for weight in (noise, noise + 5 * np.outer(rng.normal(size=shape[0]), rng.normal(size=shape[1]))):
        assert spectrum_snr(weight) == pytest.approx(by_eigenvalues(weight))
        assert spectrum_snr(weight.T) == pytest.approx(by_eigenvalues(weight))


def test_scale_is_not_free():
    """Twice the weights have half the ratio: a limit that the documentation states."""
    weight = np.random.default_rng(0).normal(size=(30, 30))
    assert spectrum_snr(2 * weight) == pytest.approx(spectrum_snr(weight) / 2)


def test_a_stronger_direction_lowers_it():
    """As it is divided by the largest singular value, a stronger single direction counts for less.

    A limit of the criterion, which its documentation states.
    """
    small = np.arange(1.0, 9.0)
    edge = (small[6] - small[2]) / 1.349 * 2  # the quartiles are the third and the seventh of nine
    noise = small[small <= edge].sum()
    for strength in (20.0, 200.0):
        expected = (strength + small[small > edge].sum()) / noise / strength
        assert spectrum_snr(np.diag([*small, strength])) == pytest.approx(expected)
    assert spectrum_snr(np.diag([*small, 200.0])) < spectrum_snr(np.diag([*small, 20.0]))


def test_where_all_or_nothing_is_noise():
    """Equal singular values leave no noise, a matrix of zeros tells nothing."""
    assert spectrum_snr(np.eye(4)) == np.inf
    assert np.isnan(spectrum_snr(np.zeros((3, 4))))
    assert np.isnan(spectrum_snr(np.zeros((3, 0))))


# The layers


def test_needs_are_against_the_median_of_the_kind():
    """The need is the log of the ratio less the median of the logs among layers of the same kind of module."""
    torch.manual_seed(0)
    model = nn.Sequential(
        *(nn.Conv2d(8, 32, 2, padding=1), nn.ReLU(), nn.Conv2d(32, 128, 2), nn.ReLU(), nn.AdaptiveAvgPool2d(1)),
        *(nn.Flatten(), nn.Linear(128, 96), nn.ReLU(), nn.Linear(96, 96), nn.ReLU(), nn.Linear(96, 96), nn.ReLU()),
        nn.Linear(96, 3),
    )
    scores = needs(model, torch.randn(4, 8, 6, 6), layers=["0", "2", "6", "8", "10"])
    logs = np.log([ratio(model[int(name)].weight) for name in scores.layers])
    medians = np.array([np.median(logs[:2])] * 2 + [np.median(logs[2:])] * 3)
    np.testing.assert_allclose(scores.values, logs - medians)
    np.testing.assert_allclose(np.log(scores.unknown), logs)
    np.testing.assert_allclose(np.log(scores.unknown / scores.known), scores.values)


def test_convolutions_have_their_outputs_first():
    """A transposed convolution, whose weight has the inputs first, is brought to the same form as a convolution."""
    torch.manual_seed(0)
    up = nn.ConvTranspose1d(5, 8, 3)
    model = nn.Sequential(up, nn.Flatten(), nn.Linear(8 * 6, 2))
    criterion = SpectrumSNR(model).fit(torch.randn(4, 5, 4))
    assert criterion.ratios_ == {"0.weight": ratio(up.weight.transpose(0, 1))}


def test_layers_with_several_matrices_have_the_mean():
    """A block counts as the mean of the needs of its matrices, and biases and normalisation not at all."""
    torch.manual_seed(0)
    block = nn.Sequential(nn.Linear(24, 24), nn.LayerNorm(24), nn.Tanh(), nn.Linear(24, 24))
    model = nn.Sequential(block, nn.Linear(24, 24), nn.Linear(24, 2))
    scores = needs(model, torch.randn(4, 24), layers=["0", "1"])
    logs = np.log([ratio(module.weight) for module in (block[0], block[3], model[1])])
    np.testing.assert_allclose(scores.values, [logs[:2].mean() - np.median(logs), logs[2] - np.median(logs)])


def test_layers_without_a_value():
    """A layer without a matrix, or whose matrix has no noise, has NaN and does not shift the others."""
    model = nn.Sequential(nn.Linear(4, 24), nn.Sequential(nn.LayerNorm(24), nn.Tanh()), nn.Linear(24, 24))
    model.extend([nn.Linear(24, 24), nn.Linear(24, 2)])
    with torch.no_grad():
        model[2].weight.copy_(torch.eye(24))
    scores = needs(model, torch.randn(4, 4), layers=["1", "2", "3"])
    assert np.isnan(scores.values).tolist() == [True, True, False]
    assert scores.values[2] == 0.0


# The estimator


def test_no_data_is_needed():
    """All data has the same answer, with or without labels; intervals have no width, and there is nothing by class."""
    model = classifier()
    criterion = SpectrumSNR(model).fit(samples()[0])
    first, second = criterion.score_layers(samples()[0]), criterion.score_layers(samples(classes=("a", "b"), seed=1))
    np.testing.assert_array_equal(first.values, second.values)
    np.testing.assert_array_equal(first.interval, np.stack([first.values, first.values], axis=1))
    assert second.classes == ()
    assert second.per_class.shape == (0, 2)
    assert second.n_samples == (0, 0)


def test_the_layers_need_data_of_the_right_shape():
    """Scores need fit first, and unknown data of the shape of the known."""
    criterion = SpectrumSNR(classifier())
    with pytest.raises(NotFittedError):
        criterion.score_layers(samples())
    with pytest.raises(InvalidDataError, match="must have the same shape"):
        criterion.fit(samples()).score_layers(torch.zeros(4, 5))


def test_token_models():
    """With an input layer named, models of token ids are measured."""
    scores = needs(TokenNet(), torch.randint(0, 10, (6, 3)), input_layer="embedding")
    assert scores.layers == ("mix",)


def test_scores_come_back_from_a_file(tmp_path):
    """Scores that were saved and loaded are the same, and can be printed."""
    scores = needs(classifier(), samples()[0])
    scores.save(tmp_path / "scores.json")
    back = rs.LayerScores.load(tmp_path / "scores.json")
    np.testing.assert_array_equal(back.values, scores.values)
    assert str(back) == str(scores)
    assert "SpectrumSNR" in str(back)


def test_model_is_left_alone():
    """The model is as it was."""
    model, (X, _) = classifier(), samples()
    with unchanged(model):
        needs(model, X)


def test_parametrised_weights_are_taken_whole():
    """Of a weight that is made from others, what is made counts, as of any of its kind."""
    torch.manual_seed(0)
    plain = nn.Sequential(*[part for _ in range(3) for part in (nn.Linear(8, 8), nn.ReLU())], nn.Linear(8, 3))
    model, X = copy.deepcopy(plain), torch.randn(4, 8)
    parametrizations.weight_norm(model[2])
    expected, found = needs(plain, X), needs(model, X)
    assert found.layers == expected.layers
    np.testing.assert_allclose(found.values, expected.values, rtol=1e-5)
    assert set(SpectrumSNR(model).fit(X).ratios_) == {f"{name}.weight" for name in found.layers}
