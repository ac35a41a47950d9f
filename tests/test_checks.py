"""Checks of single parameters."""

from fractions import Fraction

import numpy as np
import pytest
import torch

from retrainscope.checks import check_choice, check_device, check_number, reason_of
from retrainscope.exceptions import InvalidDataError


@pytest.mark.parametrize("value", [1, 10**9, np.int64(3), np.uint8(1)])
def test_positive_integers_pass(value):
    """Integers above zero pass as whole numbers, also those of numpy."""
    check_number("count", value, whole=True)
    check_number("count", value, whole=False)


@pytest.mark.parametrize("value", [1e-300, 0.5, Fraction(1, 3), np.float32(2), np.float64(1e300)])
def test_positive_numbers_pass(value):
    """Real numbers above zero pass, also those of numpy and fractions."""
    check_number("weight", value, whole=False)


@pytest.mark.parametrize("value", [0, 0.0, -0.0, -1, -0.5, float("nan"), float("inf"), True, "1", None, [1], 1j])
def test_no_positive_number(value):
    """Zero, negative, endless or missing numbers, truth values and texts are refused as they were given."""
    with pytest.raises(InvalidDataError, match=r"The 'weight' parameter must be a positive number\. Got ") as caught:
        check_number("weight", value, whole=False)
    assert f"Got {value!r} instead." in str(caught.value)


@pytest.mark.parametrize("value", [0, -1, 2.0, 2.5, True, "many", None, np.float64(3)])
def test_no_positive_integer(value):
    """Fractions and floats are no counts, even whole ones."""
    with pytest.raises(InvalidDataError, match=r"The 'count' parameter must be a positive integer\. Got "):
        check_number("count", value, whole=True)


@pytest.mark.parametrize(("whole", "word"), [(True, "integer"), (False, "number")])
def test_zero_where_it_is_allowed(whole, word):
    """With `zero`, zero passes and a negative number does not."""
    check_number("weight", 0, whole=whole, zero=True)
    check_number("weight", 1, whole=whole, zero=True)
    message = rf"The 'weight' parameter must be zero or a positive {word}\. Got -1 instead\."
    with pytest.raises(InvalidDataError, match=message):
        check_number("weight", -1, whole=whole, zero=True)


def test_a_limit_is_not_reached():
    """With `below`, the limit itself is refused, and the error names it."""
    check_number("share", 0.99, whole=False, below=1)
    with pytest.raises(InvalidDataError, match=r"must be a positive number below 1\. Got 1 instead\."):
        check_number("share", 1, whole=False, below=1)
    with pytest.raises(InvalidDataError, match=r"must be zero or a positive number below 0\.5\. Got 0\.5 instead\."):
        check_number("share", 0.5, whole=False, below=0.5, zero=True)


def test_one_of_the_words_allowed():
    """A word of the choices passes; the error for another lists them all."""
    check_choice("colour", "red", ("red", "green", "blue"))
    with pytest.raises(InvalidDataError, match=r"The 'colour' parameter must be 'red' or 'green' or 'blue'\. Got 'Re"):
        check_choice("colour", "Red", ("red", "green", "blue"))
    with pytest.raises(InvalidDataError, match=r"The 'colour' parameter must be 'red'\. Got None instead\."):
        check_choice("colour", None, ("red",))


@pytest.mark.parametrize("device", ["nonsense", "cpu:x", 3.5])
def test_devices_must_be_there(device):
    """A device that torch does not know, or that is not here, is refused with what it got."""
    assert check_device("cpu") == torch.device("cpu")
    message = rf"'device' parameter must be a device that this machine has, such as 'cpu'. Got {device!r} \("
    with pytest.raises(InvalidDataError, match=message):
        check_device(device)


def test_the_reason_of_an_error():
    """The first line of a message is the reason, and the class where there is none."""
    assert reason_of(ValueError("one\ntwo")) == "one"
    assert reason_of(EOFError()) == "EOFError"
