"""What figures are made of: axes, colours, files, and names that fit. Nothing touches pyplot's global state."""

from collections.abc import Sequence
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from retrainscope.exceptions import MissingExtraError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["INCHES_A_LETTER", "MARKERS", "PALETTE", "new_figure", "save_figure", "short_name", "short_names"]

# Okabe and Ito's colours, which the colour-blind tell apart; grey for their yellow, which is hard to see on white.
PALETTE = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#7F7F7F", "#000000")
MARKERS = ("o", "s", "^", "D", "v")
INCHES_A_LETTER = 0.085
_MOST_LETTERS = 32


def new_figure(
    width: float,
    height: float,
    *,
    n_rows: int = 1,
    n_columns: int = 1,
    height_ratios: Sequence[float] | None = None,
) -> tuple["Figure", Any]:
    """Make a figure with axes, or name the extra that brings matplotlib.

    Parameters
    ----------
    width, height : float
        In inches.
    n_rows, n_columns : int
    height_ratios : sequence of n_rows floats, optional
        Relative heights of the rows; None: all the same.

    Returns
    -------
    (Figure, ndarray of Axes of shape (n_rows, n_columns))

    Raises
    ------
    MissingExtraError
        If matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingExtraError.for_package("matplotlib", "plot") from error
    figure = Figure(figsize=(width, height), layout="constrained", facecolor="white")
    return figure, figure.subplots(n_rows, n_columns, squeeze=False, height_ratios=height_ratios)


def save_figure(figure: "Figure", folder: str | Path, name: str) -> tuple[Path, Path]:
    """Write a figure as PNG and as SVG, and return both paths."""
    png, svg = Path(folder) / f"{name}.png", Path(folder) / f"{name}.svg"
    figure.savefig(png, dpi=150)
    figure.savefig(svg)
    return png, svg


def short_name(text: object, most: int = _MOST_LETTERS) -> str:
    """Cut a long name in the middle; a dollar sign is text, not mathematics, and what cannot be printed is escaped."""
    return _escaped(_cut(_printable(str(text)), most))


def short_names(texts: Sequence[object], most: int = _MOST_LETTERS) -> list[str]:
    """Cut long names so that they stay apart: first what all begin with; what is alike afterwards is numbered.

    Parameters
    ----------
    texts : sequence
        Different ones.
    most : int
        Letters.

    Returns
    -------
    list of str

    Examples
    --------
    >>> short_names(["encoder.layers.0.attention.dense", "encoder.layers.1.attention.dense"], most=20)
    ['…0.attention.dense', '…1.attention.dense']
    """
    names = [_printable(str(text)) for text in texts]
    if len(names) > 1 and max(map(len, names)) > most:
        parts = [name.split(".") for name in names]
        alike = [*takewhile(lambda column: len(set(column)) == 1, zip(*parts, strict=False))]
        n_common = min(len(alike), min(map(len, parts)) - 1)
        if n_common:
            names = [f"…{'.'.join(part[n_common:])}" for part in parts]
    short = [_cut(name, most) for name in names]
    if len(set(short)) < len(short):
        short = [f"{place}: {name}" for place, name in enumerate(short, start=1)]
    return [_escaped(name) for name in short]


def _printable(text: str) -> str:
    return "".join(letter if letter.isprintable() else letter.encode("unicode_escape").decode() for letter in text)


def _cut(text: str, most: int) -> str:
    return text if len(text) <= most else f"{text[: most // 2 - 1]}…{text[-(most // 2) :]}"


def _escaped(text: str) -> str:
    return text.replace("$", r"\$")
