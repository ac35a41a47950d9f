"""Settings written down: for people, and so that another process can tell whether they are its own."""

from functools import partial

import numpy as np
import pytest
import torch
from networks import classifier

import retrainscope as rs
from retrainscope.settings import listed, settings_text, told, told_apart


def halved(activation_shape, input_shape):
    """Stand for a decoder of the user's own."""
    return torch.nn.Identity()


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ({"b": 1, 2: {"z": 0, "a": None}}, [("2", [("a", None), ("z", 0)]), ("b", 1)]),
        ({"c", "a", "b"}, ["'a'", "'b'", "'c'"]),
        (frozenset({1, 2.5}), ["1", "2.5"]),
        ((1, [2, "x"]), [1, [2, "x"]]),
        (np.array([[1, 2], [3, 4]]), [[1, 2], [3, 4]]),
        (torch.tensor([0.5, 1.5]), [0.5, 1.5]),
        (np.float32(0.5), 0.5),
        (np.array(3), 3),
        (torch.tensor(0.5), 0.5),
        (halved, "halved"),
        (partial(halved, input_shape=(1,)), "halved(){'input_shape': (1,)}"),
        ([torch.nn.Linear], ["Linear"]),
        ({"optimizer": {"Adam": torch.optim.Adam}}, [("optimizer", [("Adam", "Adam")])]),
        ("adam", "adam"),
        (None, None),
    ],
)
def test_what_is_written_down_of_a_setting(value, expected):
    """Mappings and sets in an order of their own, arrays as lists, NumPy's numbers as Python's, functions by name."""
    found = told(value)
    assert found == expected
    assert type(found) is type(expected)
    assert not isinstance(found, np.generic)


def test_what_is_listed():
    """Arrays and sequences become lists, and nothing stays nothing."""
    assert listed(np.array(["a", "b"])) == ["a", "b"]
    assert listed(torch.tensor([1, 2])) == [1, 2]
    assert listed(range(3)) == [0, 1, 2]
    assert listed(None) is None


def test_an_estimator_as_it_is_written():
    """The name and all settings, but for the model and the progress bar; functions by name, not by address."""
    spread = rs.ActivationSpread(classifier(), layers=["0"], batch_size=7, random_state=3)
    assert settings_text(spread) == (
        "ActivationSpread(batch_size=7, calls=None, device=None, head=None, input_layer=None, layers=['0'], "
        "max_features=4096, random_state=3)"
    )
    assert "decoder=halved, " in settings_text(rs.LayerDecoderProbe(classifier(), decoder=halved))


def test_estimators_are_told_apart():
    """By their kind and by every setting, but not by the model and the progress bar."""
    plain = rs.ActivationSpread(classifier(), random_state=3)
    kind, settings = told_apart(plain)
    assert kind == "ActivationSpread"
    assert ("batch_size", 256) in settings
    assert not {"model", "progress"} & {name for name, _ in settings}
    assert told_apart(rs.ActivationSpread(classifier(seed=1), random_state=3, progress=False)) == told_apart(plain)
    assert told_apart(rs.ActivationSpread(classifier(), random_state=4)) != told_apart(plain)
    assert told_apart(rs.TangentProbe(classifier(), random_state=3))[0] == "TangentProbe"
