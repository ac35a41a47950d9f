"""Statistics of batch normalisation, re-estimated for a while: against training mode, and given back."""

import numpy as np
import pytest
import torch
from helpers import unchanged
from networks import Failing
from torch import nn

import retrainscope as rs
from retrainscope.batches import Batches, as_batches
from retrainscope.normalisation import renewed_statistics, running_norms


def network() -> nn.Sequential:
    """Two dense layers with batch normalisation and a head ("5"), which have seen data of mean 0."""
    model = nn.Sequential(
        *(nn.Linear(3, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    )
    model(torch.randn(64, 3))
    return model.eval()


def batches_of(X: torch.Tensor, batch_size: int = 256) -> Batches:
    return as_batches(X, name="known", batch_size=batch_size, device=torch.device("cpu"), dtype=torch.float32)


class FrozenNorm(nn.BatchNorm1d):
    """Stays in evaluation mode."""

    def train(self, _mode: bool = True) -> "FrozenNorm":
        return super().train(False)


class DropNorm(nn.BatchNorm1d):
    """Has another module inside, as the ones of timm have their activation."""

    def __init__(self, n: int) -> None:
        super().__init__(n)
        self.drop = nn.Dropout(0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.drop(super().forward(x))


def buffers_of(model: nn.Module) -> list[str]:
    return [name for name, _ in model.named_buffers()]


def test_outputs_are_those_of_training_mode():
    """With the statistics of one batch, evaluation gives what training mode gives but for Bessel's correction."""
    model, X = network(), 3 + 2 * torch.randn(2000, 3)
    with renewed_statistics(model, running_norms(model, buffers_of(model)), batches_of(X, 2000)), torch.no_grad():
        found = model(X)
        assert not any(module.training for module in model.modules())
        np.testing.assert_allclose(model[1].running_mean, model[0](X).mean(dim=0), atol=1e-5)
        np.testing.assert_allclose(model[1].running_var, model[0](X).var(dim=0), rtol=1e-4)
    with torch.no_grad():
        before, trained = model(X), model.train()(X)
    np.testing.assert_allclose(found, trained, atol=0.01)
    assert (before - trained).abs().max() > 0.5


def test_only_the_norms_that_are_named():
    """The others keep their statistics, also while the pass goes through them."""
    model, X = network(), 3 + torch.randn(100, 3)
    mean = model[1].running_mean.clone()
    with renewed_statistics(model, running_norms(model, ["4.running_mean"]), batches_of(X)), torch.no_grad():
        torch.testing.assert_close(model[1].running_mean, mean)
        np.testing.assert_allclose(model[4].running_mean, model[:4](X).mean(dim=0), atol=1e-5)


def test_batches_are_averaged():
    """The statistics are the mean of those of the batches; a batch of one sample has no variance and is left out."""
    model, X = network(), torch.randn(9, 3)
    with renewed_statistics(model, running_norms(model, ["1.running_var"]), batches_of(X, 4)), torch.no_grad():
        hidden = model[0](X)
        np.testing.assert_allclose(model[1].running_var, (hidden[:4].var(0) + hidden[4:8].var(0)) / 2, rtol=1e-5)


def test_batches_of_one_change_nothing():
    """Where all batches have one sample, the statistics stay as they are."""
    model = network()
    mean = model[1].running_mean.clone()
    with renewed_statistics(model, running_norms(model, buffers_of(model)), batches_of(torch.randn(5, 3), 1)):
        torch.testing.assert_close(model[1].running_mean, mean)
        assert not model[1].training


@pytest.mark.parametrize("where", ["pass", "context"])
def test_given_back_after_an_error(where):
    """An error during the pass or in the context leaves buffers, their identity, momentum and flags as they were."""
    at = 2 if where == "pass" else 99
    model = nn.Sequential(*network()[:5], Failing(at, KeyboardInterrupt())).eval()
    norms, table, batches = (
        running_norms(model, buffers_of(model)),
        dict(model[1]._buffers),
        batches_of(torch.ones(8, 3), 4),
    )

    def interrupted() -> None:
        with renewed_statistics(model, norms, batches):
            raise KeyboardInterrupt

    with unchanged(model), pytest.raises(KeyboardInterrupt):
        interrupted()
    assert model[1].momentum == 0.1
    assert all(model[1]._buffers[name] is buffer for name, buffer in table.items())


@pytest.mark.parametrize(
    "norm",
    [FrozenNorm(6), nn.BatchNorm1d(6, track_running_stats=False), nn.GroupNorm(2, 6), nn.InstanceNorm1d(6)],
    ids=["frozen", "untracked", "group", "instance"],
)
def test_norms_that_training_does_not_renew(norm):
    """Norms that keep no statistics, or stay in evaluation mode when they are told to train, are none of these."""
    model = nn.Sequential(nn.Linear(3, 6), norm).eval()
    with unchanged(model):
        assert running_norms(model, ["1.running_mean"]) == ()


def test_what_is_inside_a_norm_stays_in_evaluation():
    """The pass is without dropout, also in modules inside a norm."""
    model = nn.Sequential(DropNorm(3), nn.BatchNorm1d(3)).eval()
    with renewed_statistics(model, running_norms(model, buffers_of(model)), batches_of(torch.randn(50, 3))):
        assert not model[0].drop.training
        np.testing.assert_allclose(model[1].running_var, torch.ones(3), rtol=0.05)  # dropout would double it


def test_other_buffers_of_a_norm_stay():
    """What a norm keeps beside its statistics is the same during the pass and in the context."""

    class Gated(nn.BatchNorm1d):
        def __init__(self, n: int) -> None:
            super().__init__(n)
            self.register_buffer("gate", torch.tensor([0.0, 2.0, 3.0]))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.gate * super().forward(x)

    model = nn.Sequential(Gated(3), nn.BatchNorm1d(3)).eval()
    with renewed_statistics(model, running_norms(model, buffers_of(model)), batches_of(torch.randn(500, 3))):
        np.testing.assert_array_equal(model[0].gate, [0, 2, 3])
        np.testing.assert_allclose(model[1].running_var, [0, 4, 9], rtol=0.01)


def test_forecast_sees_renewed_statistics():
    """Inputs that are shifted out of a saturating layer's range are seen again once its statistics are renewed.

    The weights have nothing to do with it: a norm without scale and shift gets its statistics alone.
    """
    model = nn.Sequential(
        *(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Hardtanh(), nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Hardtanh()),
        nn.Linear(8, 2),
    )
    y = torch.arange(200) % 2
    X = torch.randn(200, 4) + 1.5 * y[:, None]
    model(X)
    probe = rs.TangentProbe(model.eval(), layers=["0", "3"], random_state=0).fit((X, y))
    with unchanged(model):
        forecast = probe.forecast((X + 30, y), policies=[["0"], ["3"]])
    head, first, second = (forecast.accuracy[forecast.row_of(name)] for name in ("head", "head + 0", "head + 3"))
    assert head < 0.6
    assert second < 0.6
    assert first > 0.85
