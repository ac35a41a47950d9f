"""Plain-text and HTML tables, and numbers as people read them."""

import html
import math
from collections.abc import Sequence

__all__ = ["html_table", "interval_text", "number_text", "text_table"]


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
    """Write a number with fixed digits; a dash where there is none."""
    return f"{value:.{digits}f}" if math.isfinite(value) else "-"


def interval_text(interval: Sequence[float], digits: int = 2) -> str:
    """Write an interval as "[low, high]"; a dash where there is none."""
    low, high = interval
    return f"[{low:.{digits}f}, {high:.{digits}f}]" if math.isfinite(low) and math.isfinite(high) else "-"
