"""What a long run has done, kept in a file, so that it can be stopped and go on."""

import functools
import hashlib
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from retrainscope.batches import Batches, items_of
from retrainscope.checks import reason_of
from retrainscope.exceptions import CheckpointError, InvalidDataError
from retrainscope.precision import asked_precision
from retrainscope.processes import digest_of, from_first, gather, rank
from retrainscope.saving import write_text
from retrainscope.trials import Trial

__all__ = [
    "Checkpoint",
    "check_checkpoint",
    "check_integer",
    "fingerprint",
    "name_of",
    "read_trials",
]

_WAY_OUT = "Name another file with checkpoint=, or remove this one."


def fingerprint(model: nn.Module, data: Iterable[Batches], settings: str) -> str:
    """Tell runs apart by the model and its state, the samples with their labels, and the settings as text."""
    digest = hashlib.sha256()
    for name, module in model.named_modules():
        digest.update(repr((name, type(module).__qualname__, module.extra_repr())).encode())
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        digest.update(digest_of([tensor], name).encode())
    for batches in data:
        precision = asked_precision(batches.device)
        digest.update(b"" if precision is None else repr(precision).encode())
        for batch in batches:
            keys, tensors = zip(*items_of(batch.inputs), strict=True)
            digest.update(digest_of(tensors, keys, batch.labels).encode())
    found = set(gather("the fingerprint", digest.hexdigest()))
    if len(found) > 1:  # as where a DistributedSampler deals the data
        digest = hashlib.sha256(repr(sorted(found)).encode())
    digest.update(from_first("the settings", settings).encode())
    return digest.hexdigest()


def check_checkpoint(path: Path, random_state: Any) -> None:
    """Refuse, before any work, a file that could not be written, and a run that could not be told to be the same."""
    check_integer(random_state)
    if rank() == 0 and (path.is_dir() or not path.parent.is_dir()):
        raise InvalidDataError(
            f"The 'checkpoint' parameter must name a file in a folder that exists. Got {str(path)!r} instead."
        )


def check_integer(random_state: Any) -> None:
    """Refuse a random state that another process could not start from."""
    if not isinstance(random_state, int | np.integer):
        raise InvalidDataError(
            "With 'checkpoint' give an integer random_state, so that the run that goes on is the same one."
        )


def read_trials(path: Path) -> tuple[str, dict[str, Trial]]:
    """Return the fingerprint and the trials that a file holds; where there is none yet, none."""
    if not path.exists():
        return "", {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        return str(found["fingerprint"]), {key: Trial.from_plain(plain) for key, plain in found["trials"].items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{path} is no checkpoint of a sweep, or a damaged one ({reason_of(error)}). {_WAY_OUT}"
        ) from error


class Checkpoint:
    """The trials that are done, in a file of JSON that is written whole after each; without a path, in memory."""

    def __init__(self, path: str | Path | None, fingerprint: str) -> None:
        self._path = None if path is None else Path(path)
        self._fingerprint = fingerprint
        self._trials: dict[str, Trial] = {}
        if self._path is None or not self._path.exists():
            return
        found, self._trials = read_trials(self._path)
        if found != fingerprint:
            raise CheckpointError(
                f"{path} holds no part of this sweep: model, data, settings and random_state must be the same. "
                f"{_WAY_OUT}"
            )

    def get(self, trained: tuple[str, ...] | None, number: int) -> Trial | None:
        """Return what came of a policy with a seed, or None where it is still to be tried."""
        return self._trials.get(_key(trained, number))

    def put(self, trained: tuple[str, ...] | None, number: int, trial: Trial) -> None:
        """Keep what came of a policy with a seed."""
        self._trials[_key(trained, number)] = trial
        if self._path is not None:
            trials = {key: trial.to_plain() for key, trial in self._trials.items()}
            try:
                write_text(self._path, json.dumps({"fingerprint": self._fingerprint, "trials": trials}))
            except OSError as error:
                raise CheckpointError(
                    f"{self._path} cannot be written ({error.strerror or error}), so nothing more can be kept. Make "
                    "room, or name another file with checkpoint=; what is there already is whole."
                ) from error


def _key(trained: tuple[str, ...] | None, number: int) -> str:
    return json.dumps([trained, number])


def name_of(make: Callable[..., Any]) -> str:
    """Name a callable; a partial one with what it was given."""
    if isinstance(make, functools.partial):
        return f"{name_of(make.func)}{make.args}{make.keywords}"
    return getattr(make, "__qualname__", type(make).__qualname__)
