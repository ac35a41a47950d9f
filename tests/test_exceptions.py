"""The tree of errors, and the messages that are built in one place."""

import pytest

from retrainscope import exceptions
from retrainscope.exceptions import LayerNotFoundError, MissingExtraError, RetrainscopeError

BUILTIN_PARENTS = {
    "CheckpointError": ValueError,
    "DataUnavailableError": OSError,
    "InvalidDataError": ValueError,
    "LayerNotFoundError": LookupError,
    "LayerNotRunError": RuntimeError,
    "MissingExtraError": ImportError,
    "NonFiniteError": ValueError,
    "OutOfMemoryError": MemoryError,
    "OutputError": OSError,
    "ProcessError": RuntimeError,
    "ResultFormatError": ValueError,
    "ReusedLayerError": RuntimeError,
    "UnsupportedModelError": TypeError,
}


def test_public_names_are_pinned():
    """The module's public names are the base class and the errors of the list, sorted."""
    assert exceptions.__all__ == sorted([*BUILTIN_PARENTS, "RetrainscopeError"])


@pytest.mark.parametrize(("name", "builtin"), BUILTIN_PARENTS.items())
def test_every_error_has_two_parents(name, builtin):
    """Every error can be caught by the library's base class and by a builtin one."""
    error = getattr(exceptions, name)
    assert issubclass(error, RetrainscopeError)
    assert issubclass(error, builtin)


def test_base_class_catches_nothing_foreign():
    """The base class is a plain Exception, so that catching it catches only this library's errors."""
    assert RetrainscopeError.__bases__ == (Exception,)


def test_non_finite_data_is_invalid_data():
    """NaN in the data can be caught as invalid data."""
    assert issubclass(exceptions.NonFiniteError, exceptions.InvalidDataError)


def test_near_names_are_offered():
    """A misspelt name is answered with the names nearest to it."""
    error = LayerNotFoundError.for_name("conv_1", ["", "conv1", "conv2", "head"])
    assert str(error) == "The model has no layer named 'conv_1'. Did you mean 'conv1' or 'conv2'?"


def test_all_names_are_offered_where_none_is_near():
    """A name that resembles none is answered with those that there are, up to twelve."""
    error = LayerNotFoundError.for_name("zzz", ["", *(f"layer{n}" for n in range(14))], what="head")
    assert str(error).startswith("The model has no head named 'zzz'. It has 'layer0', 'layer1', ")
    assert str(error).endswith("'layer11' and 2 more.")


def test_a_short_list_of_names_is_whole():
    """Twelve names or fewer are all written."""
    assert str(LayerNotFoundError.for_name("zzz", ["a", "b"])).endswith("It has 'a', 'b'.")


def test_no_names_at_all_are_said_to_be_none():
    """A model without named modules is said to have none."""
    assert str(LayerNotFoundError.for_name("fc", [""])).endswith("It has no named modules.")


def test_a_name_of_another_type_is_answered_too():
    """A layer given by its number is answered like a misspelt name."""
    assert "no layer named 0. Did you mean '0'?" in str(LayerNotFoundError.for_name(0, ["0", "1"]))


def test_missing_extra_tells_how_to_install_it():
    """The error about an optional package names the package and the command that brings it."""
    error = MissingExtraError.for_package("pandas", "frame")
    assert str(error) == "pandas is needed for this. Install it with: pip install 'retrainscope[frame]'"
