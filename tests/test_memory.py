"""Devices that run out of memory: a model that really raises the error, above so many samples at once."""

import numpy as np
import pytest
import torch
from helpers import unchanged
from networks import classifier, samples
from test_contract import BATCH_FREE, made
from torch import Tensor, nn
from torch.utils.data import DataLoader

import retrainscope as rs
from retrainscope.exceptions import OutOfMemoryError


class Hungry(nn.Module):
    """Passes its input on, and has no room for more than so many samples."""

    def __init__(self, most: int) -> None:
        super().__init__()
        self.most = most
        self.kept: tuple[list[int]] = ([],)  # what a module holds itself is given back

    def forward(self, x: Tensor) -> Tensor:
        """Return x."""
        self.kept[0].append(len(x))
        if len(x) > self.most:
            raise torch.OutOfMemoryError(f"no room for {len(x)} samples")
        return x


def hungry(most: int, **options: object) -> nn.Sequential:
    """Return a classifier with room for so many samples between its layers."""
    first, *others = classifier(**({"dtype": torch.float64} | options))
    return nn.Sequential(first, Hungry(most), *others)


def loader(data: tuple[Tensor, list[object]], size: int) -> DataLoader:
    """Return data that comes in batches of its own."""
    return DataLoader([*zip(*data, strict=True)], batch_size=size)


@pytest.mark.parametrize("streamed", [False, True], ids=["indexed", "streamed"])
@pytest.mark.parametrize("kind", BATCH_FREE, ids=lambda kind: kind.__name__)
def test_the_batch_is_halved(kind, streamed):
    """Where there is no room for a batch it is halved, until there is, which is said once and changes no result."""
    known, unknown = samples(), samples(classes=(3, 4, 5), seed=1)
    model = hungry(7)
    small = made(kind, hungry(1000), batch_size=7).fit(known).score_layers(unknown)
    if streamed:
        known, unknown = loader(known, 60), loader(unknown, 60)
    estimator = made(kind, model)
    with (
        unchanged(model),
        pytest.warns(UserWarning, match=r"Out of memory on cpu with \d+ samples at once.*changes no result") as said,
    ):
        scores = estimator.fit(known).score_layers(unknown)
    assert len(said) == 1
    assert max(model[1].kept[0]) > 7
    for name in scores.__dataclass_fields__:
        one, other = getattr(scores, name), getattr(small, name)
        if isinstance(one, np.ndarray):
            np.testing.assert_allclose(one, other, rtol=1e-6, atol=1e-9, err_msg=name)
        else:
            assert one == other, name


def test_the_smaller_batch_stays():
    """What there is no room for is not tried again and again."""
    model = hungry(7)
    with pytest.warns(UserWarning, match="Out of memory"):
        made(rs.ActivationSpread, model, batch_size=20).fit(samples(400))
    assert sum(n > 7 for n in model[1].kept[0]) == 2
    assert sum(n for n in model[1].kept[0] if n <= 7) >= 400


def test_errors_of_decoders():
    """The errors of decoders do not depend on the batches that they are measured in, nor what they rebuild."""
    X, labels = samples()
    plain, model = hungry(1000), hungry(1000)
    probes = [rs.LayerDecoderProbe(each, max_epochs=2, random_state=0).fit((X, labels)) for each in (plain, model)]
    model[1].most = 7
    with pytest.warns(UserWarning, match="Out of memory"):
        scores = probes[1].score_layers((X, labels))
    np.testing.assert_allclose(scores.values, probes[0].score_layers((X, labels)).values, rtol=1e-6, atol=1e-9)
    rebuilt = [probe.reconstruct(X, "3") for probe in probes]
    torch.testing.assert_close(*rebuilt)


def test_inversions():
    """Inversions keep their order in smaller batches, several layers at once."""
    X = samples(30)[0].double()
    options = {"layers": ["0", "3"], "low": -3, "high": 3, "random_state": 0}
    with pytest.warns(UserWarning, match="Out of memory") as said:
        found = rs.invert_layers(hungry(7), X, **options)
    assert len(said) == 1
    for layer, inversion in rs.invert_layers(hungry(1000), X, batch_size=7, **options).items():
        torch.testing.assert_close(found[layer].inputs, inversion.inputs, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(found[layer].n_iter, inversion.n_iter)


def test_a_smaller_step_would_be_another_result():
    """Decoders do not learn from smaller batches by themselves; the error says what to give."""
    model = hungry(7)
    with (
        unchanged(model),
        pytest.raises(OutOfMemoryError, match=r"Out of memory in training decoders with up to 64.*smaller batch_size="),
    ):
        rs.LayerDecoderProbe(model, max_epochs=2, random_state=0).fit(samples())


def test_batch_statistics_are_not_renewed_on_smaller_batches():
    """Batch statistics depend on the batch; the error says what to give."""
    model = nn.Sequential(*hungry(7, dtype=torch.float32)[:3], nn.BatchNorm1d(8), *classifier()[2:])
    probe = rs.TangentProbe(model, random_state=0)
    with (
        unchanged(model),
        pytest.raises(OutOfMemoryError, match=r"in renewing batch statistics with up to 256 .*batch_size="),
        pytest.warns(UserWarning, match="Out of memory"),
    ):
        probe.fit(samples()).score_layers(samples(classes=(3, 4, 5)))
    assert rs.TangentProbe(model, batch_size=7, random_state=0).fit(samples()).forecast(samples()).n_samples == 60


def test_no_room_at_all():
    """Where there is no room for one sample, the error says so."""
    model = hungry(1000)
    spread = rs.ActivationSpread(model, layers=["0", "3"], random_state=0).fit(samples())
    model[1].most = 0
    with (
        unchanged(model),
        pytest.raises(OutOfMemoryError, match=r"no room on cpu for one sample \(no room for 1 samples\).*device="),
        pytest.warns(UserWarning, match="Out of memory"),
    ):
        spread.score_layers(samples())


def test_a_sweep_does_not_train_on_smaller_batches():
    """Retraining takes the batches that it was asked for; the error says what to give. Measuring takes smaller ones."""
    model, options = hungry(7), {"steps": 2, "n_seeds": 1, "learning_rates": (1e-2,), "random_state": 0}
    with (
        unchanged(model),
        pytest.raises(OutOfMemoryError, match=r"in retraining with up to 32 samples at once.*batch_size="),
        pytest.warns(UserWarning, match="Out of memory"),
    ):
        rs.sweep_layers(model, samples(), samples(classes=(3, 4, 5)), **options)
    with pytest.warns(UserWarning, match="Out of memory"):
        sweep = rs.sweep_layers(model, samples(), samples(classes=(3, 4, 5)), batch_size=7, **options)
    plain = rs.sweep_layers(hungry(1000), samples(), samples(classes=(3, 4, 5)), batch_size=7, **options)
    np.testing.assert_array_equal(sweep.accuracy, plain.accuracy)


def test_advice():
    """Advice on a device with little room is that of one with much."""
    data = samples(120), samples(120, classes=(3, 4, 5), seed=1)
    with pytest.warns(UserWarning, match="Out of memory"):
        advice = rs.recommend_layers(hungry(7), *data, random_state=0)
    assert advice.layers == rs.recommend_layers(hungry(1000), *data, random_state=0).layers
