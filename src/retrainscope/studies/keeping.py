"""A folder that keeps what a study has finished, so that a run that was stopped goes on."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from retrainscope.checks import reason_of
from retrainscope.exceptions import OutputError, ResultFormatError
from retrainscope.saving import load_json, save_json

__all__ = ["kept_folder", "reading"]


def kept_folder(out: str | Path, settings: Any, name: str) -> Path:
    """Return the folder of that name in `out`, made if need be, for runs of these settings only.

    Parameters
    ----------
    out : path
    settings : dataclass
        What makes two runs comparable; written to ``settings.json`` in `out`.
    name : str

    Raises
    ------
    OutputError
        If the folder cannot be written or holds a run with other settings.
    """
    out = Path(out)
    try:
        (out / name).mkdir(parents=True, exist_ok=True)
        _check_settings(out / "settings.json", settings)
    except OSError as error:
        if isinstance(error, OutputError):
            raise
        raise OutputError(f"{out} cannot be written ({error.strerror}). Name another folder.") from error
    return out / name


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Name the file, and the remedy, if reading it fails; what a damaged archive raises is not to be foreseen."""
    try:
        yield
    except Exception as error:
        raise OutputError(f"{path} is a damaged file ({reason_of(error)}). Delete it to run it again.") from error


def _check_settings(path: Path, settings: Any) -> None:
    if not path.exists():
        save_json(settings, path)
        return
    try:
        found = load_json(type(settings), path)
    except ResultFormatError as error:
        raise OutputError(f"{error} Name another folder, or empty this one.") from error
    if found != settings:
        names = [name for name in asdict(settings) if getattr(found, name) != getattr(settings, name)]
        differing = ", ".join(f"{n} was {getattr(found, n)}, now {getattr(settings, n)}" for n in names)
        raise OutputError(f"{path.parent} holds a run with other settings ({differing}). Name another folder.")
