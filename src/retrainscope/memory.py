"""When a device runs out of memory: smaller batches where they change nothing, and a remedy where they would."""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import numpy as np
import torch

from retrainscope.batches import Batch
from retrainscope.exceptions import OutOfMemoryError

__all__ = ["Halving", "memory_needed"]

T = TypeVar("T")


class Halving:
    """Works on batches; once memory has run out, on half as many samples at a time, and says so once."""

    def __init__(self) -> None:
        self._most: int | None = None

    def run(self, batch: Batch, work: Callable[[Batch], T]) -> Iterator[tuple[Batch, T]]:
        """Yield the pieces of a batch, in order, with what the work on each returns.

        Parameters
        ----------
        batch : Batch
        work : callable (Batch) -> result
            Does the same again when called again: what it is to change outside is changed by the caller, with the
            result. The result of several samples must be that of each alone.

        Raises
        ------
        OutOfMemoryError
            If there is no room for one sample.
        """
        start = 0
        while start < len(batch):
            n = min(len(batch) - start, self._most or len(batch))
            piece = batch if n == len(batch) else batch.take(np.arange(start, start + n))
            try:
                result = work(piece)
            except torch.OutOfMemoryError as error:
                if n == 1:
                    raise OutOfMemoryError(
                        f"There is no room on {batch.device} for one sample ({error}). Free memory there, or choose "
                        "another device with device=."
                    ) from error
            else:
                yield piece, result
                start += n
                continue
            # Only here, after the error is gone and with it the frames that held what was computed.
            if self._most is None:
                warnings.warn(
                    f"Out of memory on {batch.device} with {n} samples at once: from here on fewer are taken, which "
                    "changes no result. A smaller batch_size= saves the attempt.",
                    UserWarning,
                    stacklevel=1,
                )
            self._most = -(-n // 2)
            if batch.device.type == "cuda":
                torch.cuda.empty_cache()


@contextmanager
def memory_needed(what: str, batch_size: int) -> Iterator[None]:
    """Say what to do where memory runs out and a smaller batch would be another result."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise OutOfMemoryError(
            f"Out of memory {what} with up to {batch_size} samples at once. It is not done with fewer by itself, since "
            "that would be another result: give a smaller batch_size=, or a loader of smaller batches."
        ) from error
