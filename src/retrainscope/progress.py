"""Progress bars: shown on a terminal, quiet elsewhere or when told."""

from collections.abc import Iterable
from typing import Any, TypeVar

from tqdm.auto import tqdm

__all__ = ["progress_bar"]

T = TypeVar("T")


def progress_bar(
    items: Iterable[T] | None = None, *, what: str, progress: bool | None, total: int | None = None
) -> Any:
    """Wrap an iterable in a bar, or return one to update by hand.

    Parameters
    ----------
    items : iterable, optional
    what : str
        The words before the bar.
    progress : bool or None
        None shows the bar on a terminal only.
    total : int, optional
    """
    return tqdm(items, desc=what, total=total, disable=None if progress is None else not progress, leave=False)
