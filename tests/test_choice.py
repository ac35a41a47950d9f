"""choose: from forecasts made by hand to a policy, to none, and to the answer that the data does not decide it."""

import numpy as np
import pytest
from forecasts import forecast_of

from retrainscope.choice import LEAST_SAMPLES, Choice, choose, remarks

NAN = float("nan")
CLEAR = {"none": NAN, "head": 0.40, "head + c1": 0.18, "head + c2": 0.17, "all": 0.10}
POOR = {"none": 0.5}


def test_a_clear_forecast():
    """The policy of fewest parameters within the tolerance is chosen, without a reason to doubt it."""
    forecast = forecast_of(CLEAR, accuracy=POOR, spread=0.05)
    assert choose(forecast, 0.01) == Choice("all")
    assert choose(forecast, 0.1) == Choice("head + c1")
    assert choose(forecast, 0.5) == Choice("head")


def test_a_budget():
    """Among the policies that are allowed the best is chosen, and only they are a reason to doubt it."""
    allowed = np.array([name in ("none", "head", "head + c2") for name in CLEAR])
    assert choose(forecast_of(CLEAR, accuracy=POOR), 0.01, allowed=allowed) == Choice("head + c2")


@pytest.mark.parametrize(
    ("as_is", "policy"), [(0.95, "none"), (0.9, "none"), (0.885, "none"), (0.87, "all"), (0.2, "all")]
)
def test_none_where_the_model_is_as_good(as_is, policy):
    """Nothing is retrained where the chosen policy is forecast to gain no more than two points of accuracy."""
    assert choose(forecast_of(CLEAR, accuracy={"none": as_is}), 0.01) == Choice(policy)


def test_none_where_a_gain_may_be_chance():
    """Nothing is retrained where the gain on the model as it is may be chance."""
    forecast = forecast_of(CLEAR, accuracy={"none": 0.85}, spread=0.05, paired=False)
    assert choose(forecast, 0.01).policy == "all"  # in the same direction at the first and the last
    draws = forecast.accuracy_draws.copy()
    draws[:, 0] = 0.85 + np.linspace(0.1, -0.1, 101)
    assert choose(forecast_of(CLEAR, accuracy={"none": 0.85}, accuracy_draws=draws), 0.01).policy == "none"


@pytest.mark.parametrize(
    ("known", "policy"), [(NAN, "none"), (0.9, "none"), (0.91, "none"), (0.93, "all"), (1.0, "all")]
)
def test_none_needs_the_accuracy_of_the_known_data(known, policy):
    """A model that does worse than on known data, beyond two points, is not left as it is, whatever the forecast."""
    forecast = forecast_of(CLEAR, accuracy={"none": 0.9}, known_accuracy=known)
    assert choose(forecast, 0.01) == Choice(policy)


@pytest.mark.parametrize(("gain", "policy"), [(0.0, "none"), (0.15, "all")])
def test_drawn_classes_are_told_apart_more_easily(gain, policy):
    """Beside the accuracy on known data counts that among all classes, beside other policies that among those drawn."""
    forecast = forecast_of(CLEAR, accuracy={"none": 0.9}, known_accuracy=0.8, drawing_gain=gain)
    assert choose(forecast, 0.01) == Choice(policy)


@pytest.mark.parametrize(
    ("changed", "labels", "said"),
    [
        ({"known_accuracy": 0.9}, {0, 1}, ""),
        ({"known_accuracy": 0.5}, {0, 1}, "the model gets 50.0% of the known data right, no more than by chance"),
        ({"n_classes": 2}, {0, 1, 2}, "The forecast is of 2 of the 3 unknown classes"),
        ({"n_copies": 3}, {0, 1}, "Of the 100 unknown samples that the forecast is of, 3 have the inputs of another"),
    ],
)
def test_remarks(changed, labels, said):
    """What is odd about data and labels is said."""
    told = " ".join(remarks(forecast_of(CLEAR, **changed), labels, {0, 1}, known_chance=0.5))
    assert said in told
    assert bool(told) is bool(said)


def test_a_model_that_cannot_be_judged_as_it_is_is_told():
    """Where known classes have labels that are no places of the outputs, there is no none, and why is said."""
    without = {name: error for name, error in CLEAR.items() if name != "none"}
    told = [*remarks(forecast_of(without), {"a"}, {"a", "b"}, known_chance=0.5)]
    assert len(told) == 1
    assert "The model could not be judged as it is" in told[0]
    assert not [*remarks(forecast_of(without), {"c"}, {"a", "b"}, known_chance=0.5)]  # new classes need a new head


def test_without_none_the_head_is_the_least():
    """Where the model cannot be used as it is, the head is retrained at least."""
    assert choose(forecast_of({"head": 0.1, "head + c1": 0.1, "all": 0.12}), 0.01) == Choice("head")


@pytest.mark.parametrize(("smallest", "policy"), [(LEAST_SAMPLES - 1, None), (LEAST_SAMPLES, "all")])
def test_too_few_samples(smallest, policy):
    """With fewer than five samples of a class nothing is decided, and how many are there and needed is said."""
    choice = choose(forecast_of(CLEAR, accuracy=POOR, smallest_class=smallest), 0.01)
    assert choice.policy == policy
    assert ("has 4 independent samples; at least 5 of every class" in choice.reason) is (policy is None)


def test_one_sample_is_one():
    """Of one sample the reason does not speak as of several."""
    assert "has 1 independent sample; at least 5" in choose(forecast_of(CLEAR, smallest_class=1), 0.01).reason


@pytest.mark.parametrize(
    "changed",
    [
        {"accuracy": dict.fromkeys(CLEAR, 0.55), "spread": 0.1},
        {"accuracy": dict.fromkeys(CLEAR, 0.45)},
        {"accuracy": POOR, "chance_error": 0.10},
        {"accuracy": POOR, "chance_error": 0.12, "spread": 0.05},
    ],
    ids=["accuracy by chance", "below chance", "error of chance", "error near that of chance"],
)
def test_nothing_told_apart(changed):
    """Where classes are not surely told apart better than by chance, by accuracy and by error, nothing is decided."""
    choice = choose(forecast_of(CLEAR, **changed), 0.01)
    assert choice.policy is None
    assert "better than by chance (50%)" in choice.reason


def test_a_model_at_chance_is_not_good_enough():
    """That the model as it is is no worse than a forecast at chance does not show that nothing needs retraining."""
    errors = {"none": NAN, "head": 0.5, "all": 0.51}
    choice = choose(forecast_of(errors, accuracy={"none": 0.5, "head": 0.5, "all": 0.49}), 0.01)
    assert choice.policy is None


def test_doubt():
    """Where in many draws another policy has a far smaller error, nothing is decided, and the nearest is named."""
    errors = {"head": 0.2, "head + c1": 0.21, "all": 0.205}
    assert choose(forecast_of(errors, spread=0.05), 0.01) == Choice("head")  # paired: they move together
    choice = choose(forecast_of(errors, spread=0.05, paired=False), 0.01)
    assert choice.policy is None
    assert "too uncertain to choose between them (100 samples; head is nearest)" in choice.reason


@pytest.mark.parametrize("tolerance", [0.0, 0.05, 0.2])
def test_what_is_tolerated_is_no_doubt(tolerance):
    """A wide tolerance chooses a smaller set, and that larger ones surely have less error is not held against it."""
    errors = {"head": 0.3, "all": 0.3 - 0.9 * tolerance}
    assert choose(forecast_of(errors), tolerance) == Choice("head")
