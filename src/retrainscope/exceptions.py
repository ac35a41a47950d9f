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
    """Base class of every error that this library raises on purpose.

    Examples
    --------
    >>> import torch
    >>> import retrainscope as rs
    >>> from retrainscope.exceptions import RetrainscopeError
    >>> model = torch.nn.Sequential(torch.nn.Linear(3, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
    >>> try:
    ...     rs.find_layers(model, torch.zeros(4, 3), layers=["conv1"])
    ... except RetrainscopeError as error:
    ...     print(error)
    The model has no layer named 'conv1'. It has '0', '1', '2'.
    """


class InvalidDataError(RetrainscopeError, ValueError):
    """The known or unknown data, or a parameter, is not what it must be.

    Give what the message asks for.

    Examples
    --------
    >>> import torch
    >>> import retrainscope as rs
    >>> model = torch.nn.Sequential(torch.nn.Linear(3, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
    >>> rs.ActivationSpread(model).fit((torch.randn(4, 3), [0, 1]))
    Traceback (most recent call last):
    retrainscope.exceptions.InvalidDataError: The known data has 4 samples but 2 labels.
    """


class CheckpointError(InvalidDataError):
    """A checkpoint is damaged, another run's, or cannot be written.

    Name another file or folder with checkpoint=.

    Examples
    --------
    >>> from pathlib import Path
    >>> from tempfile import TemporaryDirectory
    >>> import torch
    >>> import retrainscope as rs
    >>> model = torch.nn.Sequential(torch.nn.Linear(1, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
    >>> known = unknown = (torch.randn(20, 1), [0, 1] * 10)
    >>> with TemporaryDirectory() as folder:
    ...     _ = Path(folder, "run.json").write_text("no checkpoint")
    ...     rs.recommend_layers(model, known, unknown, checkpoint=folder, random_state=0)
    Traceback (most recent call last):
    retrainscope.exceptions.CheckpointError: The folder ... holds something else (run.json), and no manifest.json. ...
    """


class NonFiniteError(InvalidDataError):
    """NaN or infinity in the inputs or in a layer's activations.

    Remove the samples that cause it or, if the model is in half precision, give model.float().

    Examples
    --------
    >>> import torch
    >>> import retrainscope as rs
    >>> model = torch.nn.Sequential(torch.nn.Linear(1, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
    >>> rs.ActivationSpread(model).fit((torch.tensor([[1.0], [torch.nan]]), [0, 1]))
    Traceback (most recent call last):
    retrainscope.exceptions.NonFiniteError: The known data has NaN or infinity in batch 0, first in sample 1 (...
    """


class DataUnavailableError(RetrainscopeError, OSError):
    """A data set is neither on this machine nor to be fetched, or its files are damaged.

    Put the file there, or name another one.

    Examples
    --------
    >>> from retrainscope.data import read_idx
    >>> read_idx("nowhere.gz")
    Traceback (most recent call last):
    retrainscope.exceptions.DataUnavailableError: nowhere.gz cannot be read (No such file or directory).
    """


class LayerNotFoundError(RetrainscopeError, LookupError):
    """A layer was named that the model does not have.

    Name one of those in model.named_modules().

    Examples
    --------
    >>> import torch
    >>> import retrainscope as rs
    >>> model = torch.nn.Sequential()
    >>> for name in ("conv1", "fc1"):
    ...     model.add_module(name, torch.nn.Linear(3, 3))
    >>> rs.find_layers(model, torch.zeros(4, 3), layers=["conv"])
    Traceback (most recent call last):
    retrainscope.exceptions.LayerNotFoundError: The model has no layer named 'conv'. Did you mean 'conv1'?
    """

    @classmethod
    def for_name(cls, name: str, known: Iterable[str], *, what: str = "layer") -> "LayerNotFoundError":
        """Build the message for a name that fits no module, with the nearest names that do."""
        names = [n for n in known if n]
        near = difflib.get_close_matches(str(name), names, n=3, cutoff=0.5)
        hint = f"Did you mean {' or '.join(repr(n) for n in near)}?" if near else f"It has {_some(names)}."
        return cls(f"The model has no {what} named {name!r}. {hint}")


class LayerNotRunError(RetrainscopeError, RuntimeError):
    """A layer that was asked for does not run in the forward pass.

    Name one that does.

    Examples
    --------
    >>> import torch
    >>> import retrainscope as rs
    >>> model = torch.nn.Sequential(torch.nn.Linear(3, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
    >>> model[1].spare = torch.nn.Linear(3, 3)
    >>> rs.find_layers(model, torch.zeros(4, 3), layers=["1.spare"])
    Traceback (most recent call last):
    retrainscope.exceptions.LayerNotRunError: The layer '1.spare' does not run in the forward pass. Leave it out, ...
    """


class ReusedLayerError(RetrainscopeError, RuntimeError):
    """A layer that was asked for runs more than once in one forward pass.

    Name the modules around it that run once, or say with calls= which call counts.

    Examples
    --------
    >>> import torch
    >>> import retrainscope as rs
    >>> same = torch.nn.Linear(3, 3)
    >>> model = torch.nn.Sequential(same, torch.nn.ReLU(), same, torch.nn.Linear(3, 2))
    >>> rs.find_layers(model, torch.zeros(4, 3), layers=["0"])
    Traceback (most recent call last):
    retrainscope.exceptions.ReusedLayerError: The layer '0' runs 2 times in one forward pass, so its output is not ...
    """


class UnsupportedModelError(RetrainscopeError, TypeError):
    """The model, or what one of its layers returns, cannot be measured.

    Give a model that does what the message says it must, or name other layers.

    Examples
    --------
    >>> import torch
    >>> import retrainscope as rs
    >>> rs.find_layers(torch.nn.Flatten(), torch.zeros(4, 3))
    Traceback (most recent call last):
    retrainscope.exceptions.UnsupportedModelError: The model has no parameters, so there is nothing to retrain.
    """


class ProcessError(RetrainscopeError, RuntimeError):
    """Another of several processes has failed, ended, or is not where this one is.

    Look at the messages of the other processes; all of them have to make the same calls.

    Examples
    --------
    >>> from retrainscope.exceptions import ProcessError
    >>> raise ProcessError("Process 1 has waited for 60 seconds, and process 0 has not made the same call.")
    Traceback (most recent call last):
    retrainscope.exceptions.ProcessError: Process 1 has waited for 60 seconds, and process 0 has not made the same call.
    """


class MissingExtraError(RetrainscopeError, ImportError):
    """An optional dependency is not installed.

    Install it with pip.

    Examples
    --------
    >>> from retrainscope.exceptions import MissingExtraError
    >>> raise MissingExtraError.for_package("pandas", "frame")
    Traceback (most recent call last):
    retrainscope.exceptions.MissingExtraError: pandas is needed for this. Install it with: pip install ...
    """

    @classmethod
    def for_package(cls, package: str, extra: str) -> "MissingExtraError":
        """Build the message that names the package and the extra that brings it."""
        return cls(f"{package} is needed for this. Install it with: pip install 'retrainscope[{extra}]'")


class ResultFormatError(RetrainscopeError, ValueError):
    """A saved result cannot be read, or a result cannot be saved as it is.

    Give a file that the same kind of result was saved to by this version or an older one.

    Examples
    --------
    >>> import tempfile
    >>> from pathlib import Path
    >>> import retrainscope as rs
    >>> path = Path(tempfile.mkdtemp()) / "advice.json"
    >>> _ = path.write_text("{}")
    >>> rs.Recommendation.load(path)
    Traceback (most recent call last):
    retrainscope.exceptions.ResultFormatError: ...advice.json holds no Recommendation (found: something else).
    """


class OutOfMemoryError(RetrainscopeError, MemoryError):
    """A device has no room for what is to be computed.

    Give a smaller batch_size, or another device.

    Examples
    --------
    It can be caught as what it is, or as Python's own:

    >>> from retrainscope.exceptions import OutOfMemoryError
    >>> issubclass(OutOfMemoryError, MemoryError)
    True
    """


class OutputError(RetrainscopeError, OSError):
    """An output folder cannot be used, or is not there.

    Name another folder.

    Examples
    --------
    On the command line it ends the run with its message and the exit status 2. In Python it is an OSError too:

    >>> from retrainscope.exceptions import OutputError
    >>> issubclass(OutputError, OSError)
    True
    """


def _some(names: list[str], most: int = 12) -> str:
    """Write a list of names, cut short when it is long."""
    if not names:
        return "no named modules"
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(repr(n) for n in names[:most]) + more
