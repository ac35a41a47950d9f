"""Progress bars: shown on a terminal, quiet elsewhere or when told."""

import warnings
from collections.abc import Iterable
from typing import Any, TypeVar

from tqdm import TqdmWarning

from retrainscope.processes import rank

with warnings.catch_warnings(action="ignore", category=TqdmWarning):  # in notebooks without widgets it draws letters
    from tqdm.auto import tqdm

__all__ = ["progress_bar"]

T = TypeVar("T")


def progress_bar(
    items: Iterable[T] | None = None,
    *,
    what: str,
    progress: bool | None,
    total: int | None = None,
    initial: int = 0,
) -> Any:
    """Wrap an iterable in a bar, or return one to update by hand.

    Parameters
    ----------
    items : iterable, optional
    what : str
        The words before the bar.
    progress : bool or None
        None shows the bar on a terminal only. Of several processes the first alone shows it.
    total : int, optional
    initial : int
        What is done already.
    """
    hidden = True if rank() else None if progress is None else not progress
    return tqdm(items, desc=what, total=total, initial=initial, disable=hidden, leave=False)
