"""Put tables into marked places of a page, so that words are written by hand and figures are not."""

import re
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parents[1]


def put_table(page: Path, name: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Replace what stands between ``<!-- name: begin ... -->`` and ``<!-- name: end -->``."""
    lines = [header, ["---"] * len(header), *rows]
    block = "\n".join(f"| {' | '.join(row)} |" for row in lines)
    text = page.read_text(encoding="utf-8")
    marked = re.compile(rf"(<!-- {re.escape(name)}: begin.*?-->\n).*?(<!-- {re.escape(name)}: end -->)", re.DOTALL)
    text, n_found = marked.subn(lambda m: f"{m[1]}\n{block}\n\n{m[2]}", text)
    if n_found != 1:
        raise SystemExit(f"{page} has {n_found} places marked {name}; one is needed.")
    page.write_text(text, encoding="utf-8")
