"""What work costs: seconds, samples through the model, memory."""

import sys
import threading
import time

import numpy as np
import pytest
import torch
from networks import classifier, samples
from torch import nn

import retrainscope as rs
from retrainscope import costs
from retrainscope.costs import Cost, costing, passing
from retrainscope.report import _cost_text
from retrainscope.sample_gradients import sample_gradients
from retrainscope.tracing import call_model

CPU = torch.device("cpu")


def test_time_and_samples_add_up():
    """Several contexts add to one cost; what is counted outside of them is nobody's."""
    cost = Cost()
    for n in (3, 4):
        with costing(CPU, cost), passing(n):
            time.sleep(0.02)
        with passing(100):
            pass
    assert cost.n_forward == 7
    assert 0.04 <= cost.seconds < 2


@pytest.mark.skipif(sys.platform != "linux", reason="the resident memory is read from /proc")
def test_the_peak_of_memory():
    """Memory that is given back before the end counts, and what was there before does not."""
    there, cost = torch.ones(25_000_000), Cost()
    with costing(CPU, cost):
        taken = torch.ones(50_000_000)  # 200 MB
        time.sleep(0.1)
        del taken
    assert 190e6 < cost.peak_memory < 260e6
    assert len(there) == 25_000_000


@pytest.mark.skipif(sys.platform != "linux", reason="the resident memory is read from /proc")
def test_what_is_kept_between_contexts_counts():
    """The peak is above what was in use when the work first began, so what fitting has kept counts in scoring."""
    cost = Cost()
    with costing(CPU, cost):
        kept = torch.ones(25_000_000)  # 100 MB
    with costing(CPU, cost):
        more = torch.ones(25_000_000)
        time.sleep(0.1)
        del more
    assert 190e6 < cost.peak_memory < 260e6
    assert len(kept) == 25_000_000


def test_memory_that_is_not_told(monkeypatch, tmp_path):
    """Where the system does not tell its memory the peak is NaN, and no line of the report."""
    cost = Cost()
    monkeypatch.setattr(costs, "_STATM", tmp_path / "none")
    for _ in range(2):
        with costing(CPU, cost):
            pass
    assert np.isnan(cost.peak_memory)
    rec = rs.recommend_layers(classifier(), samples(80), samples(80, classes=(5, 6), seed=1), random_state=0)
    assert {*map(np.isnan, rec.peak_memory.values())} == {True}
    assert "MB" not in _cost_text(rec, "TangentProbe")


def test_nothing_is_left_running():
    """After an error or Ctrl-C no thread goes on, and nothing more is counted."""
    for error in (ValueError, KeyboardInterrupt):
        cost = Cost()
        with pytest.raises(error), costing(CPU, cost):
            raise error
        with passing(5):
            pass
        assert cost.n_forward == 0
        assert cost.seconds > 0
        assert not [thread for thread in threading.enumerate() if thread.name == "retrainscope-memory"]


def test_every_pass_is_counted():
    """What an estimator passes is what a hook on the model sees, over the samples that it measured."""
    model, known, unknown = classifier(), samples(80), samples(80, classes=(5, 6), seed=1)
    estimators = [
        rs.ActivationSpread(model, batch_size=7, random_state=0),
        rs.GradientInverter(model, samples_per_class=2, max_iter=5, random_state=0),
        rs.LayerDecoderProbe(model, max_epochs=2, random_state=0),
        rs.TangentProbe(model, random_state=0),
    ]
    for estimator in estimators:
        seen = []
        first = next(module for module in model.modules() if not [*module.children()])
        with first.register_forward_pre_hook(lambda _, args, seen=seen: seen.append(len(args[0]))):
            rec = rs.recommend_layers(model, known, unknown, estimators=[estimator])
        (passes,) = rec.passes.values()
        n_measured = sum(rec.scores[0].n_samples)
        assert passes * n_measured == pytest.approx(sum(seen)), type(estimator).__name__


class Wrapped(nn.Module):
    """A model that calls another one as the library does."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, X: torch.Tensor) -> torch.Tensor:
        return call_model(self.model, X)


def test_a_model_inside_of_a_model_counts_once():
    """A pass through a model that calls another one is one pass, and the next one counts again."""
    cost = Cost()
    with costing(CPU, cost):
        for _ in range(2):
            call_model(Wrapped(Wrapped(nn.Linear(3, 2))), torch.ones(5, 3))
    assert cost.n_forward == 10


def test_gradients_of_many_samples_count_each():
    """Samples whose gradients are taken together count each, and the first twice more.

    Once to see what memory it takes, and once to compare its gradients.
    """
    X, cost = torch.randn(70, 3, generator=torch.Generator().manual_seed(0)), Cost()
    with costing(CPU, cost):
        for model in (nn.Linear(3, 2), Wrapped(nn.Linear(3, 2))):
            names = {"all": [name for name, _ in model.named_parameters()]}
            found = [*sample_gradients(model, X, torch.ones(70, 2), lambda out, target: (out * target).sum(), names)]
            assert sum(len(rows["all"]) for rows in found) == 70
    assert cost.n_forward == 2 * 72


def test_a_device_that_is_not_there_is_refused_as_ever():
    """To look at the memory changes no error: a device that this machine does not have is named."""
    model, known = classifier(), samples(80)
    with pytest.raises(rs.exceptions.InvalidDataError, match="must be a device that this machine has"):
        rs.recommend_layers(model, known, known, random_state=0, device="nowhere")
