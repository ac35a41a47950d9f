"""Put the results of the zoo into docs/zoo.md.

    python scripts/update_zoo_page.py ZOO_JSON

The file is one that ``benchmarks/zoo/run.py`` wrote; it is kept in benchmarks/results.
"""

import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

from pages import ROOT, put_table

PAGE = ROOT / "docs" / "zoo.md"
OUTCOMES = ("works", "refused", "fails", "not built")

Models = dict[str, dict[str, Any]]


def main(file: str) -> None:
    found = json.loads(Path(file).read_text(encoding="utf-8"))
    (ROOT / "benchmarks" / "results" / "zoo.json").write_text(json.dumps(found) + "\n", encoding="utf-8")
    models: Models = found["models"]
    libraries = list(dict.fromkeys(name.partition("/")[0] for name in models))
    totals = [total(library, found["versions"].get(library, ""), models) for library in libraries]
    totals.append(total("", "", models))
    put_table(PAGE, "totals", ["library", "built", *OUTCOMES, "share that works", "minutes"], totals)
    others = [[name, one["outcome"], cell(one["reason"])] for name, one in models.items() if one["outcome"] != "works"]
    put_table(PAGE, "others", ["model", "outcome", "why"], others)
    for library in libraries:
        of = {name: one for name, one in models.items() if name.startswith(f"{library}/") and one["layers"]}
        rows = [
            [
                name.partition("/")[2],
                f"{one['parameters'] / 1e6:.3g}",
                str(one["layers"]),
                f"`{one['first']}`",
                f"`{one['last']}`",
                f"`{one['head']}`",
                f"{one['seconds']:.1f}",
            ]
            for name, one in of.items()
        ]
        header = ["model", "parameters (M)", "layers", "first layer", "last layer", "head", "seconds"]
        put_table(PAGE, library, header, rows)


def total(library: str, version: str, models: Models) -> list[str]:
    """Sum up one library, or all of them."""
    of = [one for name, one in models.items() if name.startswith(f"{library}/" if library else "")]
    counts = Counter(one["outcome"] for one in of)
    built = len(of) - counts["not built"]
    minutes = sum(one["seconds"] for one in of) / 60
    outcomes = [str(counts[outcome]) for outcome in OUTCOMES]
    name = f"{library} {version.partition('+')[0]}" if library else "all"
    return [name, str(built), *outcomes, f"{counts['works'] / built:.1%}", f"{minutes:.0f}"]


def cell(text: str) -> str:
    return text.replace("|", "\\|")


if __name__ == "__main__":
    main(*sys.argv[1:])
