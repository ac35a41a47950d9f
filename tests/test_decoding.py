"""LayerDecoderProbe: the split, what decoders learn, and what stops them."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import TokenNet, classifier, samples
from sklearn.exceptions import NotFittedError
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import retrainscope as rs
from retrainscope.exceptions import InvalidDataError, LayerNotFoundError, NonFiniteError
from retrainscope.holding_out import split_positions


class Mixed:
    """Batches that come in another order at every pass, drawn from a source of its own."""

    def __init__(self, X: Tensor, labels: list[object]) -> None:
        self.X, self.labels, self.rng = X, np.array(labels), np.random.default_rng(0)

    def __iter__(self):
        order = self.rng.permutation(len(self.X))
        for rows in np.array_split(order, 4):
            yield self.X[torch.from_numpy(rows)], self.labels[rows]


def probe(model: nn.Module | None = None, **options: object) -> rs.LayerDecoderProbe:
    """Make a probe that learns little and soon."""
    return rs.LayerDecoderProbe(model or classifier(), **({"max_epochs": 2, "random_state": 0} | options))


@given(
    sizes=st.lists(st.integers(5, 40), min_size=1, max_size=5),
    holdout=st.floats(0.01, 0.99),
    seed=st.integers(0, 100),
)
@settings(deadline=None, max_examples=60)
def test_split_is_disjoint_complete_and_stratified(sizes, holdout, seed):
    """Every sample is either learnt from or measured, and each class gives its share, two samples at least, to both."""
    labels = [label for label, n in enumerate(sizes) for _ in range(n)]
    labels = list(np.random.default_rng(seed).permutation(labels))
    fitted, held_out = split_positions(labels, holdout, np.random.default_rng(seed))
    assert sorted([*fitted, *held_out]) == list(range(len(labels)))
    assert (np.diff(fitted) > 0).all()
    assert (np.diff(held_out) > 0).all()
    for label, n in enumerate(sizes):
        n_held = sum(labels[position] == label for position in held_out)
        assert 2 <= n_held <= n - 2
        assert abs(n_held - holdout * n) <= 2


def test_split_is_drawn():
    """Which samples are held out depends on the generator, and on it alone."""
    labels = [0, 1] * 20
    first, again, other = (split_positions(labels, 0.2, np.random.default_rng(seed))[1].tolist() for seed in (0, 0, 1))
    assert first == again != other


@pytest.mark.parametrize("labelled", [True, False])
def test_four_samples_of_a_class_are_too_few(labelled):
    """Less than five known samples cannot be split into some to learn from and some to measure."""
    X, _ = samples(16)
    if labelled:
        known, message = (X, ["a"] * 4 + ["b"] * 12), r"known class 'a' has 4 samples; at least 5 a class are needed"
    else:
        known, message = X[:4], r"known data has 4 samples; at least 5 a class"
    with pytest.raises(InvalidDataError, match=message):
        probe().fit(known)


def test_one_unknown_sample_of_a_class_is_too_few():
    """The unknown data needs two samples a class."""
    X, labels = samples(20)
    with pytest.raises(InvalidDataError, match=r"unknown class 'lonely' has 1 sample; at least 2"):
        probe().fit((X, labels)).score_layers((X, ["lonely", *["b"] * 19]))


def test_held_out_samples_are_the_known_measure():
    """The known error is that of reconstruct, averaged over the samples that no decoder saw."""
    X, labels = samples(50)
    fitted = probe(holdout=0.3).fit((X, labels))
    _, held_out = split_positions(labels, 0.3, np.random.default_rng(fitted._seed))
    scores = fitted.score_layers((X[held_out], [labels[row] for row in held_out]))
    assert fitted.known_errors_.class_counts.sum() == len(held_out) == scores.n_samples[0]
    for place, layer in enumerate(("0", "2")):
        for control, measured in ((False, scores.known), (True, scores.known_reference)):
            rebuilt = fitted.reconstruct(X[held_out], layer, control=control)
            errors = (rebuilt - X[held_out]).double().square().sum(dim=1)
            np.testing.assert_allclose(measured[place], errors.mean(), rtol=1e-5)
    # The same samples as unknown data: nothing is worse.
    np.testing.assert_allclose(scores.values, 0.0, atol=1e-12)


def test_an_error_of_a_hundredth_of_the_variance_counts_as_none():
    """Needs are of the errors with a hundredth of the variance learnt from added, summed over the input's elements."""
    (X, labels), unknown = samples(40), samples(40, seed=1)
    fitted = probe().fit((X, labels))
    scores = fitted.score_layers(unknown)
    learnt, _ = split_positions(labels, 0.2, np.random.default_rng(fitted._seed))
    floor = 0.01 * X[learnt].double().numpy().var() * 4
    contrast = np.log((scores.unknown + floor) / (scores.known + floor))
    expected = np.log((scores.unknown_reference + floor) / (scores.known_reference + floor))
    np.testing.assert_allclose(scores.values, contrast - expected, atol=1e-5)


def test_decoders_learn_what_can_be_learnt():
    """From a layer that keeps the input a decoder rebuilds it; from one that keeps nothing, just the mean."""
    keeping, dropping = nn.Linear(4, 4, bias=False), nn.Linear(4, 4)
    with torch.no_grad():
        keeping.weight.copy_(torch.eye(4))
        dropping.weight.zero_()
    model = nn.Sequential(keeping, dropping, nn.Linear(4, 2))
    X, labels = samples(200)
    fitted = probe(model, max_epochs=40, batch_size=32).fit((X, labels))
    scores = fitted.score_layers(samples(100, seed=1))
    variance = X.var(dim=0).sum().item()
    assert scores.known[0] < 0.05 * variance
    assert scores.unknown[0] < 0.05 * variance
    np.testing.assert_allclose(scores.known[1], variance, rtol=0.3)
    assert fitted.losses_.shape == (40, 2)
    assert (fitted.losses_[-5:, 0] < 0.1 * fitted.losses_[0, 0]).all()
    np.testing.assert_allclose(fitted.losses_[-1, 1], 1.0, atol=0.3)  # in units of the input's variance


def test_need_rises_where_the_unknown_varies_in_what_the_layer_drops():
    """A layer that drops two inputs is in need for data that varies in those."""
    dropping = nn.Linear(4, 2, bias=False)
    with torch.no_grad():
        dropping.weight.copy_(torch.eye(4)[:2])
    model = nn.Sequential(dropping, nn.Linear(2, 2))
    narrow, wide = torch.randn(200, 4), torch.randn(200, 4)
    narrow[:, 2:] *= 0.1
    wide[:, :2] *= 0.1
    labels = ["a", "b"] * 100
    scores = probe(model, max_epochs=20).fit((narrow, labels)).score_layers((wide, labels))
    assert scores.interval[0, 0] > 0


def test_decoders_are_frozen_and_kept_by_network():
    """The decoders of the model and of the control are kept, in evaluation mode and without gradients."""
    fitted = probe(decoder=lambda a, b: nn.Sequential(nn.Linear(a[0], b[0]), nn.Dropout())).fit(samples())
    assert set(fitted.decoders_) == {"model", "control"}
    for chain in fitted.decoders_.values():
        assert len(chain) == 2
        assert not any(module.training for module in chain.modules())
        assert not any(parameter.requires_grad for parameter in chain.parameters())


def test_custom_decoder():
    """The user's callable gets both shapes of one sample, once a layer and network, and its modules are trained."""
    asked = []

    def linear(activation_shape, input_shape):
        asked.append((activation_shape, input_shape))
        layer = nn.Linear(activation_shape[0], input_shape[0])
        nn.init.zeros_(layer.weight)
        return layer

    fitted = probe(decoder=linear).fit(samples())
    assert asked == [((8,), (4,)), ((8,), (4,)), ((6,), (4,)), ((6,), (4,))]
    assert isinstance(fitted.decoders_["model"][0][1], nn.Linear)
    assert fitted.decoders_["model"][0][1].weight.abs().sum() > 0


def test_the_two_decoders_of_a_layer_start_alike():
    """The model's and the control's decoder of a layer are initialised the same, so that only networks differ."""
    starts = []

    def linear(activation_shape, input_shape):
        layer = nn.Linear(activation_shape[0], input_shape[0])
        starts.append(layer.weight.detach().clone())
        return layer

    probe(decoder=linear).fit(samples())
    assert torch.equal(starts[0], starts[1])
    assert torch.equal(starts[2], starts[3])


def test_a_decoder_of_the_wrong_shape():
    """A decoder that does not lead to the input is refused, not broadcast."""
    message = r"A decoder turns \(48, 8\) into \(48, 1\), and the inputs have the shape \(48, 4\)"
    with pytest.raises(InvalidDataError, match=message):
        probe(decoder=lambda a, _: nn.Linear(a[0], 1)).fit(samples())


@pytest.mark.parametrize("bad", ["model", "control"])
def test_diverging_decoders(bad):
    """Decoders that diverge, of the model or of the control, are an error that names the learning rate."""
    made = []

    class Overflowing(nn.Linear):
        def forward(self, x):
            return super().forward(x) * float("inf")

    def decoder(activation_shape, input_shape):
        made.append(None)
        kind = Overflowing if len(made) % 2 == (1 if bad == "model" else 0) else nn.Linear
        return kind(activation_shape[0], input_shape[0])

    with pytest.raises(NonFiniteError, match=r"decoders diverged in epoch 0. Give a smaller learning_rate than 0\.5"):
        probe(decoder=decoder, learning_rate=0.5).fit(samples())


def test_too_large_a_learning_rate():
    """A learning rate that is far too large is told, not measured with."""
    with pytest.raises(NonFiniteError, match="diverged in epoch"):
        probe(learning_rate=1e30, max_epochs=5).fit(samples())


@pytest.mark.parametrize("value", [0, -1, 1.5, None])
def test_epochs_must_be_a_positive_integer(value):
    """Epochs are counted, and the error repeats what it got."""
    with pytest.raises(InvalidDataError, match=rf"'max_epochs' parameter must be a positive integer. Got {value!r}"):
        probe(max_epochs=value).fit(samples())


def test_epochs_may_come_from_numpy():
    """An integer of numpy is an integer."""
    assert probe(max_epochs=np.int64(2)).fit(samples()).losses_.shape == (2, 2)


@pytest.mark.parametrize("value", [0, 1, -0.2, 1.5, float("nan")])
def test_holdout_must_lie_between_0_and_1(value):
    """A share is neither nothing nor all, and the error repeats what it got."""
    with pytest.raises(
        InvalidDataError, match=rf"'holdout' parameter must be a positive number below 1. Got {value!r}"
    ):
        probe(holdout=value).fit(samples())


@pytest.mark.parametrize("value", [0.0, 0.1])
def test_constant_inputs(value):
    """Inputs that are all equal leave nothing to rebuild."""
    with pytest.raises(InvalidDataError, match="known inputs are all equal, so there is nothing to rebuild"):
        probe().fit((torch.full((20, 4), value), samples(20)[1]))


def test_a_source_in_another_order_at_every_pass():
    """Where the order changes from pass to pass the split would leak: that is refused."""
    with pytest.raises(
        InvalidDataError, match=r"comes in another order at every pass.*Give a Dataset, or a DataLoader"
    ):
        probe().fit(Mixed(*samples(60, classes=(0, 1, 2))))


def test_a_loader_that_shuffles():
    """A DataLoader that shuffles is brought to repeat its order, and so can be split."""
    X, labels = samples(60)
    loader = DataLoader(TensorDataset(X, torch.tensor(labels)), batch_size=7, shuffle=True)
    scores = probe().fit(loader).score_layers(loader)
    assert scores.n_samples == (12, 60)
    np.testing.assert_array_equal(scores.values, probe().fit(loader).score_layers(loader).values)


def test_samples_are_mixed_anew_at_every_epoch():
    """Batches are drawn anew at every epoch: hardly one comes twice."""

    class Noting(nn.Module):
        def forward(self, x):
            seen.append(frozenset(x[:, 1].tolist()))
            return x

    seen = []
    probe(nn.Sequential(Noting(), *classifier()), max_epochs=4, batch_size=12).fit(samples(60))
    fitted = [rows for rows in seen if len(rows) == 12 and seen.count(rows) == 2]  # once for each network
    assert len(set(fitted)) >= 4 * (48 // 12)


@pytest.mark.parametrize("size", [2, 60])
def test_the_schedule_ends_with_the_last_step(monkeypatch, size):
    """The learning rate falls to 0 at the last step, whatever batches a loader brings."""
    schedules = []

    class Noted(torch.optim.lr_scheduler.CosineAnnealingLR):
        def __init__(self, *args, **options):
            super().__init__(*args, **options)
            schedules.append(self)

    monkeypatch.setattr(torch.optim.lr_scheduler, "CosineAnnealingLR", Noted)
    X, labels = samples(60)
    for known in ((X, labels), DataLoader(TensorDataset(X, torch.tensor(labels)), batch_size=size)):
        probe(batch_size=16).fit(known)
        assert schedules[-1].last_epoch == schedules[-1].T_max
        assert schedules[-1].get_last_lr() == [0.0]


def test_every_layer_learns_as_if_alone():
    """That other layers are measured too does not change a layer's decoder: only the start of a batch is shared."""
    known, unknown = samples(), samples(seed=1)
    both = probe().fit(known).score_layers(unknown)
    alone = probe(layers=["2"]).fit(known).score_layers(unknown)
    np.testing.assert_allclose(both.unknown[1], alone.unknown[0], rtol=1e-6)
    np.testing.assert_allclose(both.values[1], alone.values[0], rtol=1e-6)


def test_reconstruct_keeps_the_order():
    """Samples come back in the order of X, each the same in every batch size."""
    X, labels = samples(30)
    fitted = probe().fit((X, labels))
    rebuilt = fitted.reconstruct(X, "2")
    assert rebuilt.shape == X.shape
    assert not rebuilt.requires_grad
    np.testing.assert_allclose(fitted.set_params(batch_size=7).reconstruct((X, labels), "2"), rebuilt, atol=1e-6)
    np.testing.assert_allclose(fitted.reconstruct(X.flip(0), "2"), rebuilt.flip(0), atol=1e-6)


def test_reconstruct_from_the_control():
    """The control and its decoder rebuild other inputs."""
    X, labels = samples(30)
    fitted = probe().fit((X, labels))
    assert not torch.equal(fitted.reconstruct(X, "2", control=True), fitted.reconstruct(X, "2"))


def test_reconstruct_of_a_layer_that_was_not_measured():
    """Only measured layers have a decoder, and the error has the names."""
    with pytest.raises(LayerNotFoundError, match=r"no measured layer named '1'. It has '0', '2'"):
        probe().fit(samples()).reconstruct(samples()[0], "1")


def test_reconstruct_needs_fit():
    """Before fit there is no decoder."""
    with pytest.raises(NotFittedError, match="not fitted"):
        probe().reconstruct(samples()[0], "0")


def test_input_layer_is_rebuilt():
    """With an input layer its output is the target, the same for both networks."""
    model = TokenNet()
    ids, labels = torch.randint(0, 10, (100, 3)), torch.arange(100) % 2
    fitted = probe(model, input_layer="embedding", max_epochs=40, batch_size=16).fit((ids, labels))
    with torch.no_grad():
        target = model.embedding(ids)
    for control in (False, True):
        rebuilt = fitted.reconstruct(ids, "mix", control=control)
        assert rebuilt.shape == (100, 3, 4)
        assert (rebuilt - target).square().mean() < 0.3 * target.var()


def test_maps_are_decoded():
    """Maps are rebuilt as maps, from layers of any size."""
    model = nn.Sequential(
        nn.Conv2d(1, 3, 3, stride=2), nn.ReLU(), nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(4 * 2 * 2, 2)
    )
    X, labels = torch.randn(30, 1, 9, 9), torch.arange(30) % 2
    fitted = probe(model).fit((X, labels))
    assert fitted.reconstruct(X, "0").shape == fitted.reconstruct(X, "2").shape == X.shape
    assert np.isfinite(fitted.score_layers((X, labels)).values).all()


def test_unlabelled_data_in_another_order_at_every_pass_is_refused():
    """Samples are told apart by what they are, so a stream that reshuffles itself is found out without labels too."""

    class Reshuffled:
        def __init__(self):
            self.rng = np.random.default_rng(0)
            self.X = torch.randn(40, 4)

        def __iter__(self):
            return iter(self.X[self.rng.permutation(40)].split(10))

    with pytest.raises(InvalidDataError, match="comes in another order at every pass"):
        probe().fit(Reshuffled())
