"""Plain-text and HTML tables, and numbers as people read them."""

import html
import math
import textwrap
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace

__all__ = ["Shown", "Table", "html_table", "interval_text", "number_text", "text_table"]


def text_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Lay out cells in columns: the first flush left, the others flush right."""
    cells = [list(header), *[list(row) for row in rows]]
    widths = [max(len(row[column]) for row in cells) for column in range(len(header))]

    def line(row: Sequence[str]) -> str:
        parts = [row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))]
        return "  ".join(parts).rstrip()

    rule = "  ".join("-" * width for width in widths)
    return "\n".join([line(cells[0]), rule, *(line(row) for row in cells[1:])])


def html_table(header: Sequence[str], rows: Sequence[Sequence[str]], *, caption: str = "") -> str:
    """Write the same cells as an HTML table, every text escaped."""

    def row_of(tag: str, row: Sequence[str]) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in row) + "</tr>"

    title = f"<caption>{html.escape(caption)}</caption>" if caption else ""
    body = "".join(row_of("td", row) for row in rows)
    return f"<table>{title}<thead>{row_of('th', header)}</thead><tbody>{body}</tbody></table>"


def number_text(value: float, digits: int = 2) -> str:
    """Write a number with fixed digits, without the sign of a zero; a dash where there is none."""
    return f"{value:z.{digits}f}" if math.isfinite(value) else "-"


def interval_text(interval: Sequence[float], digits: int = 2) -> str:
    """Write an interval as "[low, high]"; a dash where there is none."""
    low, high = interval
    return f"[{low:z.{digits}f}, {high:z.{digits}f}]" if math.isfinite(low) and math.isfinite(high) else "-"


class Shown(ABC):
    """A result that people look at: its table, and a summary if it has one, in a terminal and in a notebook."""

    @abstractmethod
    def as_table(self) -> "Table":
        """Return what is to be shown as a table."""

    def summary(self) -> str:
        """Say it in a few sentences; empty where the table says it all."""
        return ""

    def __str__(self) -> str:
        return "\n\n".join(filter(None, (str(self.as_table()), self.summary())))

    def __repr__(self) -> str:
        return str(self)

    def _repr_html_(self) -> str:
        table = self.as_table()
        return replace(table, title=self.summary() or table.title)._repr_html_()


@dataclass(frozen=True)
class Table:
    """A table as data, for a terminal, a notebook or a page.

    Attributes
    ----------
    title : str
    header : sequence of str
    rows : sequence of sequence of str
    note : str
        Said under the table.
    wordy : bool
        Whether the cells are sentences, which wrap, rather than numbers.
    """

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""
    wordy: bool = False

    def __str__(self) -> str:
        body = self._paragraphs() if self.wordy else text_table(self.header, self.rows)
        return "\n".join(part for part in (self.title, body, self.note) if part)

    def _repr_html_(self) -> str:
        note = f"<p>{html.escape(self.note)}</p>" if self.note else ""
        return html_table(self.header, self.rows, caption=self.title) + note

    def _paragraphs(self) -> str:
        """Lay out sentences below each other, as they do not fit side by side."""
        lines = []
        for row in self.rows:
            lines.append("  ".join(row[:2]))
            for name, cell in list(zip(self.header, row, strict=True))[2:]:
                lines += textwrap.wrap(f"{name}: {cell}", 100, initial_indent="   ", subsequent_indent="     ")
        return "\n".join(lines)
