"""Trying a forecast's choice out: what overturns it, what does not, and what is said of it."""

import numpy as np
import pytest
import torch
from helpers import unchanged
from networks import classifier, samples
from sweeping import apart
from test_trials import ACCURACY, lost, sweep_of
from torch import nn

import retrainscope as rs
from retrainscope.choice import Choice, confirm
from retrainscope.exceptions import InvalidDataError

QUICK = {"steps": 30, "learning_rates": (1e-2,)}


def moved() -> tuple[torch.Tensor, list[object]]:
    """Return three new classes, eighty samples each, that part along another direction than the known ones."""
    X, labels = samples(240, classes=(5, 6, 7), seed=1)
    return X.flip(1), labels


@pytest.mark.parametrize(("chosen", "kept"), [("c2 and up", True), ("head + f1", False), ("head", False)])
def test_what_is_clearly_better_is_taken(chosen, kept):
    """A policy whose gain lies above 0 with its whole interval takes the place of the choice; the best of several."""
    # In both seeds "c2 and up" is no worse than any other, and better than these but for one of two seeds.
    accuracy = ACCURACY + np.where(np.arange(7) == 5, 0.01, 0)[:, None]
    assert confirm(Choice(chosen), sweep_of(accuracy)) == Choice(chosen if kept else "c2 and up")


def test_what_may_be_chance_is_not_taken():
    """A policy that is better on average, and worse in some draws, does not take the place of the choice."""
    accuracy = np.array([[0.5, 0.9], [0.7, 0.75]])
    sweep = sweep_of(accuracy, policies={"head": (), "all": ("c1", "c2", "f1")})
    assert accuracy[1].mean() > accuracy[0].mean()
    assert confirm(Choice("head"), sweep) == Choice("head")


def test_of_equals_the_smallest_is_taken():
    """Of policies that are better by the same the one with the fewest parameters is taken."""
    accuracy = ACCURACY.copy()
    accuracy[2:] = 0.9  # head + c1, and all that are larger
    assert confirm(Choice("head"), sweep_of(accuracy)) == Choice("head + c1")


def test_what_diverged_is_worse_than_all():
    """A choice by which training diverged is kept, as the rates were wrong; what diverged never takes a place."""
    assert confirm(Choice("c2 and up"), sweep_of(lost("c2 and up"))).policy == "c2 and up"
    assert confirm(Choice("c2 and up"), sweep_of(lost("all"))).policy != "all"
    assert confirm(Choice("none"), sweep_of(lost("c2 and up", "all", "head + f1"))).policy == "head + c2"


def test_a_trial_beside_the_forecast():
    """What is advised, the head alone and everything are trained; the rest of the advice is what it is without."""
    model, known, unknown = classifier(), apart(), moved()
    plain = rs.recommend_layers(model, known, unknown, random_state=0)
    with unchanged(model):
        rec = rs.recommend_layers(model, known, unknown, random_state=0, trial=QUICK)
    assert plain.trial is None
    assert set(rec.trial.policies) == {"head", "all", rec.forecast.policy_of(plain.layers)}
    assert (rec.trial.steps, rec.trial.learning_rates, rec.trial.accuracy.shape[1]) == (30, (1e-2,), 1)
    assert (rec.layers, rec.verdict) == (plain.layers, plain.verdict)
    results = ", ".join(f"{policy} {accuracy:.1%}" for policy, accuracy in rec.trial.mean_accuracy.items())
    assert f"Tried out on {rec.trial.n_samples[2]} samples that were held out: {results}." in rec.notes
    again = rs.recommend_layers(model, known, unknown, random_state=0, trial=QUICK)
    np.testing.assert_array_equal(again.trial.accuracy, rec.trial.accuracy)


def ruinous(parameters: list[nn.Parameter], rate: float) -> torch.optim.Optimizer:
    """Train the head gently, and all that is more with steps that ruin it."""
    return torch.optim.SGD(parameters, lr=rate if len(parameters) == 2 else 1e3 * rate)


def test_a_trial_overturns_the_forecast(tmp_path):
    """Where training as the user does it ruins the layers that the forecast speaks for, the head alone is advised."""
    model, known, unknown = classifier(), apart(), moved()
    plain = rs.recommend_layers(model, known, unknown, random_state=0)
    assert plain.layers
    rec = rs.recommend_layers(model, known, unknown, random_state=0, trial=QUICK | {"optimizer": ruinous})
    assert (rec.layers, rec.verdict, rec.head.verdict) == ((), "head", "retrain")
    assert {row.verdict for row in rec.table} == {"keep"}
    assert rec.cost["parameters"] < plain.cost["parameters"]
    policy = rec.forecast.policy_of(plain.layers)
    assert f"The forecast spoke for {policy}, which was clearly worse." in rec.summary()
    rec.save(tmp_path / "advice.json")
    back = rs.Recommendation.load(tmp_path / "advice.json")
    assert back.summary() == rec.summary()
    np.testing.assert_array_equal(back.trial.draws, rec.trial.draws)


def test_a_trial_keeps_to_the_budget():
    """What the budget rules out is not tried either."""
    rec = rs.recommend_layers(classifier(), apart(), moved(), random_state=0, trial=QUICK, budget={"parameters": 0.6})
    assert "all" not in rec.trial.policies
    assert all(rec.trial.share(policy) <= 0.6 for policy in rec.trial.policies)


def test_nothing_is_tried_where_nothing_is_chosen():
    """An undecided forecast is not tried out."""
    rec = rs.recommend_layers(classifier(), samples(), samples(8, classes=(5, 6), seed=1), random_state=0, trial=QUICK)
    assert (rec.verdict, rec.trial) == ("undecided", None)


def test_a_trial_that_cannot_be_does_not_lose_the_forecast():
    """Where the sweep is refused, the advice is that of the forecast, and why is said."""
    model = nn.Sequential(classifier(), nn.Flatten())
    model[0][4] = nn.Sequential(nn.Linear(6, 3), nn.Identity())
    rec = rs.recommend_layers(model, samples(), samples(classes=(5, 6), seed=1), head="0.4", random_state=0, trial={})
    assert rec.trial is None
    assert rec.forecast is not None
    assert "It could not be tried out: The head '0.4' is a Sequential" in rec.summary()


def test_an_optimizer_that_fails_does_not_lose_the_forecast():
    """What the user's own optimizer raises is a note, after a forecast that took long."""
    known, unknown = samples(), samples(classes=(5, 6), seed=1)
    trial = QUICK | {"optimizer": lambda parameters: torch.optim.SGD(parameters)}
    rec = rs.recommend_layers(classifier(), known, unknown, random_state=0, trial=trial)
    assert rec.trial is None
    assert rec.forecast is not None
    assert "It could not be tried out: TypeError: " in rec.summary()


def test_what_diverges_in_a_trial_is_told():
    """Where the training of what the forecast speaks for diverges, the advice stays, and rates are asked for."""

    def bursting(parameters, rate):
        return torch.optim.SGD(parameters, lr=rate if len(parameters) == 2 else 1e30)

    model, known, unknown = classifier(), apart(), moved()
    plain = rs.recommend_layers(model, known, unknown, random_state=0)
    rec = rs.recommend_layers(model, known, unknown, random_state=0, trial=QUICK | {"optimizer": bursting})
    assert (rec.layers, rec.verdict) == (plain.layers, plain.verdict)
    policy = rec.forecast.policy_of(plain.layers)
    assert f"{policy} diverged" in rec.summary()
    assert "nan" not in rec.summary()
    assert rec.summary().endswith("could not be trained: give smaller learning_rates= in trial=.")


@pytest.mark.parametrize("trial", [{"speed": 1}, {"layers": ["0"]}, {"policies": []}, {"random_state": 1}, ["steps"]])
def test_a_trial_takes_options_of_a_sweep(trial):
    """What is no option of a sweep, or is given to recommend_layers itself, is refused by name, with what there is."""
    message = r"'trial' parameter must be a mapping of options of sweep_layers: steps, batch_size, .*Got"
    with pytest.raises(InvalidDataError, match=message):
        rs.recommend_layers(classifier(), samples(), samples(), trial=trial)


@pytest.mark.parametrize(
    ("trial", "message"),
    [
        (True, "must be a mapping of options of sweep_layers"),
        ([], "must be a mapping of options of sweep_layers"),
        ({"steps": 0}, "'steps'"),
        ({"learning_rates": 1e-3}, "'learning_rates' parameter must be a sequence"),
        ({"learning_rates": iter([1e-3])}, "'learning_rates' parameter must be a sequence"),
        ({"test_size": None}, "'test_size' parameter must be a positive number below 1"),
    ],
)
def test_trials_that_cannot_be(trial, message):
    """What a sweep would refuse is refused before any work."""
    with pytest.raises(InvalidDataError, match=message):
        rs.recommend_layers(classifier(), samples(), samples(classes=(5, 6), seed=1), trial=trial, random_state=0)
