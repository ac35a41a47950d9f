"""Inside of torch.autocast the network follows it, and all that is made of its outputs is in full precision."""

import contextlib
import functools
import inspect
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from helpers import unchanged
from networks import classifier, samples
from torch import Tensor, nn

import retrainscope as rs
from retrainscope import criteria
from retrainscope.base import LayerEstimator
from retrainscope.criteria.losses import GradientCriterion
from retrainscope.exceptions import CheckpointError
from retrainscope.precision import asked_precision, full_precision, network_precision
from retrainscope.sample_gradients import sample_gradients

CPU = torch.device("cpu")
KNOWN, UNKNOWN = samples(120), samples(120, classes=(3, 4, 5), seed=1)
ESTIMATORS = {
    rs.ActivationSpread: {},
    rs.LayerDecoderProbe: {"max_epochs": 3},
    rs.TangentProbe: {},
    **{
        kind: {}
        for kind in map(criteria.__dict__.get, criteria.__all__)
        if inspect.isclass(kind) and issubclass(kind, LayerEstimator) and not inspect.isabstract(kind)
    },
}
# They see the weights alone, or count errors.
ROUNDED = (criteria.SpectrumSNR, criteria.LinearProbe, criteria.KNNProbe)
every_estimator = pytest.mark.parametrize("kind", ESTIMATORS, ids=lambda kind: kind.__name__)
half = functools.partial(torch.autocast, "cpu", torch.bfloat16)


class Halving(nn.Sequential):
    """A network that computes in half precision by itself, wherever it is called, and keeps no weights that it cast."""

    def forward(self, x: Tensor) -> Tensor:
        """Return what comes of x."""
        with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
            return super().forward(x)


class Tokens(nn.Module):
    """A transformer on the rows of an image, whose keys have biases that change nothing."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Linear(8, 16)
        self.query, self.key, self.value = (nn.Linear(16, 16) for _ in range(3))
        self.norm = nn.LayerNorm(16)
        self.head = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        """Return class scores."""
        x = self.embed(x)
        seen = nn.functional.scaled_dot_product_attention(self.query(x), self.key(x), self.value(x))
        return self.head(self.norm(x + seen).mean(dim=1))


def conv_net() -> nn.Sequential:
    """Convolutions with batch normalisation."""
    torch.manual_seed(0)
    return nn.Sequential(
        *(nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(8, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3)),
    )


def images(classes: tuple[int, ...], *, n: int = 90, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Make images of a bright row each, by class."""
    y = torch.tensor(classes)[torch.arange(n) % len(classes)]
    X = torch.randn(n, 1, 8, 8, generator=torch.Generator().manual_seed(seed))
    X[torch.arange(n), 0, y] += 2
    return X, y


def tokens(classes: tuple[int, ...], **options: int) -> tuple[Tensor, Tensor]:
    """Make sequences of the rows of such images."""
    X, y = images(classes, **options)
    return X[:, 0], y


NETWORKS = {"images": (conv_net, images), "tokens": (Tokens, tokens)}


@functools.cache
def trained(name: str) -> nn.Module:
    """Train a network a little on three classes."""
    make, data = NETWORKS[name]
    model, (X, y) = make(), data((0, 1, 2), n=300, seed=2)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(60):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(X), y).backward()
        optimizer.step()
    return model.eval()


def offset(model: nn.Sequential) -> nn.Sequential:
    """Let all samples share much of a layer's output, which sums in half precision would see alone."""
    with torch.no_grad():
        model[2].bias += 20
    return model


def scored(
    kind: type[LayerEstimator], model: nn.Module, known: object = KNOWN, unknown: object = UNKNOWN
) -> rs.LayerScores:
    """Fit and score."""
    return kind(model, random_state=0, **ESTIMATORS.get(kind, {})).fit(known).score_layers(unknown)


@contextlib.contextmanager
def half_with_casts(model: nn.Module, X: Tensor) -> Iterator[None]:
    """Use autocast as in the middle of a loop: the weights that have been cast are kept until the context ends."""
    with half():
        model(X)
        yield


# ---- Estimators


@every_estimator
def test_scores_are_those_of_a_network_that_computes_so_by_itself(kind):
    """Only what the network puts out carries the rounding: nothing else is in half precision."""
    model = classifier() if issubclass(kind, GradientCriterion) else offset(classifier())  # a loss makes it chaos
    expected = scored(kind, Halving(*model))
    with unchanged(model), half_with_casts(model, KNOWN[0]):
        found = scored(kind, model)
    np.testing.assert_allclose(found.values, expected.values, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(found.interval, expected.interval, rtol=1e-5, atol=1e-6)


@every_estimator
def test_scores_are_near_those_of_full_precision(kind):
    """Without a reason to be coarse the needs are what they are, but for a few hundredths."""
    model = classifier()
    expected = scored(kind, model)
    with half():
        found = scored(kind, model)
    np.testing.assert_allclose(found.values, expected.values, atol=0.05)
    assert (found.values != expected.values).any() or kind in ROUNDED


@pytest.mark.parametrize("kind", [rs.TangentProbe, rs.ActivationSpread, criteria.EmpiricalFisher, criteria.HScore])
@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_networks_with_normalisation(kind, name, dtype):
    """Convolutions, attention and normalisations, which autocast leaves in full precision, give near scores too."""
    model, (_, data) = trained(name), NETWORKS[name]
    known, unknown = data((0, 1, 2)), data((3, 4, 5), seed=1)
    expected = scored(kind, model, known, unknown)
    with unchanged(model), torch.autocast("cpu", dtype):
        found = scored(kind, model, known, unknown)
    np.testing.assert_allclose(found.values, expected.values, atol=0.05)


def test_gradients_need_no_more_passes():
    """A bias whose gradient is nothing but rounding does not send its parameters the slow way."""
    model, (X, y) = trained("tokens"), tokens((0, 1, 2), n=128)
    calls: list[int] = []
    handle = model.embed.register_forward_hook(lambda _module, args, _output: calls.append(len(args[0])))
    probe = rs.TangentProbe(model, random_state=0).fit((X, y))
    n_passes = []
    for context in (contextlib.nullcontext(), half()):
        calls.clear()
        with context:
            probe.score_layers((X, y))
        n_passes.append(sum(calls))
    handle.remove()
    n_chunks = 4
    assert n_passes[1] - n_passes[0] == 4 * n_chunks  # those that tell whether the rules hold


@pytest.mark.parametrize("name", NETWORKS)
def test_gradients_sample_by_sample(name):
    """They are those of full precision, to a few hundredths of their norm."""
    model, (X, y) = trained(name), NETWORKS[name][1]((0, 1, 2), n=12)
    owned = {"all": [name for name, _ in model.named_parameters()]}

    def gradients() -> Tensor:
        with full_precision():
            return torch.cat(
                [rows["all"] for rows in sample_gradients(model, X, y, nn.functional.cross_entropy, owned)]
            )

    expected = gradients()
    with half():
        found = gradients()
    assert found.dtype == torch.float32
    assert float(((found - expected).norm(dim=1) / expected.norm(dim=1)).max()) < 0.05


def test_inversion_does_not_follow():
    """A descent needs all digits: inside of autocast it is what it is outside, unless it is asked for by itself."""
    model = classifier()
    options = {"max_iter": 10, "samples_per_class": 5, "random_state": 0}
    plain = rs.GradientInverter(model, **options).fit(KNOWN).score_layers(UNKNOWN)
    rebuilt = rs.invert_layers(model, KNOWN[0][:4], ["2"], random_state=0)["2"].inputs
    with half():
        there = rs.GradientInverter(model, **options).fit(KNOWN).score_layers(UNKNOWN)
        assert torch.equal(rs.invert_layers(model, KNOWN[0][:4], ["2"], random_state=0)["2"].inputs, rebuilt)
        asked = rs.GradientInverter(model, autocast="bfloat16", **options).fit(KNOWN).score_layers(UNKNOWN)
    np.testing.assert_array_equal(there.values, plain.values)
    assert (asked.values != plain.values).any()


def test_decoders_compute_in_full_precision():
    """Those of the user's own too, in training and in scoring, though some are called in the middle of a pass."""
    seen: set[tuple[bool, bool, torch.dtype]] = set()

    def decoder(activation_shape: tuple[int, ...], input_shape: tuple[int, ...]) -> nn.Module:
        linear = nn.Linear(activation_shape[0], input_shape[0])
        linear.register_forward_hook(
            lambda module, _args, output: seen.add((module.training, torch.is_autocast_enabled("cpu"), output.dtype))
        )
        return linear

    model = classifier()
    with half():
        probe = rs.LayerDecoderProbe(model, decoder=decoder, max_epochs=1, random_state=0).fit(KNOWN)
        probe.score_layers(UNKNOWN)
    assert seen == {(True, False, torch.float32), (False, False, torch.float32)}


def test_layers_compared():
    """A network is like itself in half precision, and little less than before like itself in full."""
    model, other = classifier(), classifier(seed=1)
    plain = criteria.compare_layers(model, other, KNOWN[0])
    with half():
        same, found = (criteria.compare_layers(model, each, KNOWN[0]) for each in (model, other))
    np.testing.assert_allclose(same.values, 1, atol=1e-9)
    np.testing.assert_allclose(found.values, plain.values, atol=0.01)
    assert (found.values != plain.values).all()


# ---- Advice and training


def test_advice_is_the_same_and_tells_of_it():
    """Verdict and layers are those of full precision, and a note says in what the network computed."""
    model, known, unknown = trained("images"), images((0, 1, 2)), images((3, 4, 5), seed=1)
    plain = rs.recommend_layers(model, known, unknown, random_state=0)
    with unchanged(model), half():
        found = rs.recommend_layers(model, known, unknown, random_state=0)
    assert (found.verdict, found.layers) == (plain.verdict, plain.layers)
    assert "The network computed in bfloat16 as torch.autocast has it." in found.notes
    assert not any("bfloat16" in note for note in plain.notes)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_retraining_takes_effect(dtype):
    """Steps of training are seen by the next pass, whatever weights the caller's autocast has kept."""
    model, X = classifier(), torch.randn(400, 4, generator=torch.Generator().manual_seed(0))
    unknown = X, 3 + (X[:, 0] * X[:, 1] > 0).long()  # no head alone can tell them apart
    options = {"steps": 150, "n_seeds": 1, "random_state": 0, "learning_rates": (1e-2,)}
    plain = rs.sweep_layers(model, KNOWN, unknown, **options).mean_accuracy
    with unchanged(model), half_with_casts(model, X), torch.autocast("cpu", dtype):
        found = rs.sweep_layers(model, KNOWN, unknown, **options).mean_accuracy
    assert plain["all"] > plain["head"] + 0.2
    assert found["all"] > found["head"] + 0.2


def test_a_new_head_keeps_the_type_of_the_old():
    """Features in half precision do not make a head in it: the model that is trained is in one type."""
    model, kinds = classifier(), set()
    model[4].register_forward_hook(lambda module, _args, _output: kinds.add(module.weight.dtype))
    with half():
        rs.sweep_layers(model, KNOWN, UNKNOWN, steps=2, n_seeds=1, random_state=0)
    assert kinds == {torch.float32}


def test_steps_that_overflow_are_left_out():
    """In float16 a gradient beyond its range stops no training: the loss is scaled less, and the next step is taken."""
    model = classifier()
    with torch.no_grad():
        model[4].weight *= 300
    kinds, weights = set(), list[Tensor]()

    class Adam(torch.optim.Adam):
        def step(self, closure: object = None) -> None:
            kinds.update(bool(p.grad.isfinite().all()) for group in self.param_groups for p in group["params"])
            weights.append(self.param_groups[0]["params"][0].detach().clone())
            super().step(closure)

    with torch.autocast("cpu", torch.float16):
        sweep = rs.sweep_layers(
            model, KNOWN, samples(120, classes=(1, 0), seed=1), optimizer=Adam, steps=12, n_seeds=1, random_state=0
        )
    assert kinds == {True}
    assert weights
    assert np.isfinite([*sweep.mean_accuracy.values()]).all()


# ---- Checkpoints


def test_a_checkpoint_of_another_precision(tmp_path):
    """What was computed in half precision does not go on in full, or the other way round."""
    model, options = classifier(), {"checkpoint": tmp_path / "advice", "random_state": 0}
    sweep = {"checkpoint": tmp_path / "sweep.json", "steps": 2, "n_seeds": 1, "random_state": 0}
    with half():
        first = rs.recommend_layers(model, KNOWN, UNKNOWN, **options)
        rs.sweep_layers(model, KNOWN, UNKNOWN, **sweep)
        again = rs.recommend_layers(model, KNOWN, UNKNOWN, **options)
        rs.sweep_layers(model, KNOWN, UNKNOWN, **sweep)
    assert [row.need for row in again.table] == [row.need for row in first.table]
    with pytest.raises(CheckpointError, match="advice"):
        rs.recommend_layers(model, KNOWN, UNKNOWN, **options)
    with pytest.raises(CheckpointError, match="no part of this sweep"):
        rs.sweep_layers(model, KNOWN, UNKNOWN, **sweep)


# ---- The caller's autocast


@pytest.mark.parametrize("works", [True, False])
def test_the_callers_autocast_is_left_as_it_was(works):
    """Whether it is on, in what type, and what it has cast is afterwards what it was before, after an error too."""
    model = classifier()
    data = KNOWN if works else (torch.full((60, 4), 3.4e38), [0, 1] * 30)
    with half():
        before = model(KNOWN[0][:3])
        with unchanged(model), contextlib.nullcontext() if works else pytest.raises(ValueError, match="NaN or inf"):
            rs.ActivationSpread(model, random_state=0).fit(data)
        assert torch.is_autocast_enabled("cpu")
        assert torch.get_autocast_dtype("cpu") == torch.bfloat16
        assert torch.is_autocast_cache_enabled()
        assert torch.equal(model(KNOWN[0][:3]), before)
    assert asked_precision(CPU) is None
    assert not torch.is_autocast_enabled("cpu")


def test_what_is_asked_for_is_known_inside():
    """All computes in full precision, calls of the network as asked, and nothing does where it must not."""

    def kind() -> torch.dtype:
        return (torch.ones(2, 2) @ torch.ones(2, 2)).dtype

    with half(), full_precision():
        assert (kind(), asked_precision(CPU)) == (torch.float32, torch.bfloat16)
        with full_precision(), network_precision(CPU):  # as in an estimator of an estimator
            assert kind() == torch.bfloat16
            with full_precision(network=True), network_precision(CPU):
                assert (kind(), asked_precision(CPU)) == (torch.float32, None)
        with network_precision(torch.device("cuda")):  # another kind of device
            assert kind() == torch.float32
        with torch.autocast("cpu", torch.float16), network_precision(CPU):  # a setting of one's own comes first
            assert kind() == torch.float16
    with full_precision(), network_precision(CPU):
        assert kind() == torch.float32
