"""The errors of this library: one base class, and for each kind a builtin as second parent."""

import difflib
from collections.abc import Iterable

__all__ = [
    "CheckpointError",
    "DataUnavailableError",
    "InvalidDataError",
    "LayerNotFoundError",
    "LayerNotRunError",
    "MissingExtraError",
    "NonFiniteError",
    "OutOfMemoryError",
    "OutputError",
    "ProcessError",
    "ResultFormatError",
    "RetrainscopeError",
    "ReusedLayerError",
    "UnsupportedModelError",
]


class RetrainscopeError(Exception):
    """Base class of every error that this library raises on purpose."""


class InvalidDataError(RetrainscopeError, ValueError):
    """The known or unknown data cannot be measured as it was given."""


class CheckpointError(InvalidDataError):
    """A checkpoint is damaged, another run's, or cannot be written."""


class NonFiniteError(InvalidDataError):
    """NaN or infinity in the inputs or in a layer's activations."""


class DataUnavailableError(RetrainscopeError, OSError):
    """A data set is neither on this machine nor to be fetched, or its files are damaged."""


class LayerNotFoundError(RetrainscopeError, LookupError):
    """A layer was named that the model does not have."""

    @classmethod
    def for_name(cls, name: str, known: Iterable[str], *, what: str = "layer") -> "LayerNotFoundError":
        """Build the message for a name that fits no module, with the nearest names that do."""
        names = [n for n in known if n]
        near = difflib.get_close_matches(str(name), names, n=3, cutoff=0.5)
        hint = f"Did you mean {' or '.join(repr(n) for n in near)}?" if near else f"It has {_some(names)}."
        return cls(f"The model has no {what} named {name!r}. {hint}")


class LayerNotRunError(RetrainscopeError, RuntimeError):
    """A layer that was asked for does not run in the forward pass."""


class ReusedLayerError(RetrainscopeError, RuntimeError):
    """A layer that was asked for runs more than once in one forward pass."""


class UnsupportedModelError(RetrainscopeError, TypeError):
    """The model, or what one of its layers returns, cannot be measured."""


class ProcessError(RetrainscopeError, RuntimeError):
    """Another of several processes has failed, ended, or is not where this one is."""


class MissingExtraError(RetrainscopeError, ImportError):
    """An optional dependency is not installed."""

    @classmethod
    def for_package(cls, package: str, extra: str) -> "MissingExtraError":
        """Build the message that names the package and the extra that brings it."""
        return cls(f"{package} is needed for this. Install it with: pip install 'retrainscope[{extra}]'")


class ResultFormatError(RetrainscopeError, ValueError):
    """A saved result cannot be read, or a result cannot be saved as it is."""


class OutOfMemoryError(RetrainscopeError, MemoryError):
    """A device has no room for what is to be computed."""


class OutputError(RetrainscopeError, OSError):
    """An output folder cannot be used."""


def _some(names: list[str], most: int = 12) -> str:
    """Write a list of names, cut short when it is long."""
    if not names:
        return "no named modules"
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(repr(n) for n in names[:most]) + more
