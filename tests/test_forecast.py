"""Forecast: the smallest set that is good enough, doubt, and what is written and read."""

import sys
from dataclasses import fields

import numpy as np
import pytest
from forecasts import forecast_of

import retrainscope as rs
from retrainscope.exceptions import InvalidDataError, MissingExtraError, ResultFormatError

NAN = float("nan")
ERRORS = {"none": NAN, "head": 0.30, "head + c1": 0.25, "head + c2": 0.21, "head + f1": 0.28, "all": 0.20}


@pytest.mark.parametrize(
    ("tolerance", "policy"),
    [(0.0, "all"), (0.005, "all"), (0.0101, "head + c2"), (0.0501, "head + c1"), (0.1001, "head"), (9.0, "head")],
)
def test_fewest_parameters_within_the_tolerance(tolerance, policy):
    """Of the policies whose error is at most that above the smallest, the one of fewest parameters is chosen."""
    assert forecast_of(ERRORS).best_within(tolerance) == policy


def test_of_equally_many_parameters_the_better():
    """Where two policies train equally many parameters, the one of the smaller error is chosen."""
    sizes = {"c1": 10, "c2": 10, "f1": 50, "head": 10}
    assert forecast_of(ERRORS, n_parameters=sizes).best_within(0.06) == "head + c2"


@pytest.mark.parametrize(
    ("allowed", "tolerance", "policy"),
    [
        (("head", "head + c1"), 0.0, "head + c1"),
        (("none", "head"), 0.0, "head"),
        (("head", "head + c1", "head + f1"), 0.01, "head + c1"),
        (("head", "head + c1", "head + f1"), 0.06, "head"),
    ],
)
def test_the_best_of_those_allowed(allowed, tolerance, policy):
    """With a budget the tolerance is counted from the best of the policies that are allowed."""
    mask = np.array([name in allowed for name in ERRORS])
    assert forecast_of(ERRORS).best_within(tolerance, allowed=mask) == policy


def test_doubt_is_a_share_of_draws():
    """Doubt is how often a policy's error is more than the excess above the best error of the same draw."""
    draws = np.array([[NAN, 0.3, 0.2], [NAN, 0.3, 0.29], [NAN, 0.2, 0.3], [NAN, 0.5, 0.1]])
    forecast = forecast_of({"none": NAN, "head": 0.325, "all": 0.2225}, draws=draws)
    assert forecast.doubt("head", 0.05) == 0.5
    assert forecast.doubt("head", 0.2) == 0.25
    assert forecast.doubt("all", 0.05) == 0.25
    assert forecast.doubt("head", 0.0, allowed=np.array([True, True, False])) == 0.0


def test_a_policy_that_is_not_there():
    """A policy that was not forecast is refused with those that were."""
    with pytest.raises(InvalidDataError, match=r"no policy 'f1 and up'\. There are 'none', 'head', 'head"):
        forecast_of(ERRORS).doubt("f1 and up", 0.0)


def test_a_saved_forecast_comes_back(tmp_path):
    """What was saved is loaded again, field by field, with NaN as it was; and is no other result."""
    forecast = forecast_of(ERRORS, spread=0.1)
    forecast.save(tmp_path / "forecast.json")
    back = rs.Forecast.load(tmp_path / "forecast.json")
    for field in fields(forecast):
        np.testing.assert_equal(getattr(back, field.name), getattr(forecast, field.name))
    assert str(back) == str(forecast)
    with pytest.raises(ResultFormatError, match=r"holds no LayerSweep \(found: Forecast\)"):
        rs.LayerSweep.load(tmp_path / "forecast.json")


def test_text_has_a_row_a_policy():
    """The table shows each policy's share of the parameters, error with interval, and accuracy."""
    lines = str(forecast_of(ERRORS, spread=0.1)).split("\n")
    assert lines[0] == "Forecast for 100 samples of 2 classes"
    rows = [line.split() for line in lines[3:9]]
    assert rows[1] == ["head", "10.0%", "0.300", "[0.210,", "0.390]", "70.0%"]
    assert rows[3] == ["head", "+", "c2", "40.0%", "0.210", "[0.120,", "0.300]", "79.0%"]
    assert rows[0][:3] == ["none", "0.0%", "-"]


def test_html_escapes():
    """A layer's name cannot bring markup into a notebook."""
    forecast = forecast_of(ERRORS, policies=("none", "head", "head + <script>", "head + c2", "head + f1", "all"))
    page = forecast._repr_html_()
    assert "<script" not in page
    assert "&lt;script&gt;" in page


def test_frame_has_a_row_a_policy(monkeypatch):
    """The frame has the policies in their order; without pandas the error names the extra."""
    frame = forecast_of(ERRORS, spread=0.1).to_frame()
    assert frame["policy"].tolist() == list(ERRORS)
    np.testing.assert_allclose(frame["share"], [0, 0.1, 0.2, 0.4, 0.6, 1])
    np.testing.assert_array_equal(frame["error"], list(ERRORS.values()))
    np.testing.assert_allclose(frame["error_high"] - frame["error_low"], [NAN, *[0.18] * 5])
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(MissingExtraError, match=r"retrainscope\[frame\]"):
        forecast_of(ERRORS).to_frame()
