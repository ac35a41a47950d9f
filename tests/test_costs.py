"""What work costs: seconds, samples through the model, memory."""

import sys
import threading
import time

import numpy as np
import pytest
import torch
from networks import classifier, samples

import retrainscope as rs
from retrainscope.costs import Cost, costing, count_samples
from retrainscope.report import _cost_text

CPU = torch.device("cpu")


def test_time_and_samples_add_up():
    """Several contexts add to one cost; what is counted outside of them is nobody's."""
    cost = Cost()
    for n in (3, 4):
        with costing(CPU, cost):
            count_samples(n)
            time.sleep(0.02)
        count_samples(100)
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


def test_memory_that_is_not_told(monkeypatch):
    """Where the system does not tell its memory the peak is NaN, and no line of the report."""
    cost = Cost()
    monkeypatch.setattr("sys.platform", "darwin")
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
        count_samples(5)
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
    ]
    for estimator in estimators:
        seen = []
        first = next(module for module in model.modules() if not [*module.children()])
        with first.register_forward_pre_hook(lambda _, args, seen=seen: seen.append(len(args[0]))):
            rec = rs.recommend_layers(model, known, unknown, estimators=[estimator])
        (passes,) = rec.passes.values()
        n_measured = sum(rec.scores[0].n_samples)
        assert passes * n_measured == pytest.approx(sum(seen), rel=0.1), type(estimator).__name__
