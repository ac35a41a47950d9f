"""Put the results of the inversion benchmarks into docs/inversion.md, and their figures beside it.

    python scripts/update_inversion_page.py RESULTS_FOLDER

The folder is one that ``make bench-inversion`` filled. The figures' numbers are kept in benchmarks/results.
"""

import json
import shutil
import sys
from pathlib import Path

from pages import ROOT, put_table

PAGE = ROOT / "docs" / "inversion.md"
FIGURES = (
    "vgg16-contrasts",
    "vgg16-astronaut",
    "vgg16-tv-astronaut",
    "efficientnet-lite0-contrasts",
    "efficientnet-lite0-astronaut",
    "inversion-needs",
    "priors-china",
)


def main(folder: str) -> None:
    results, images = ROOT / "benchmarks" / "results", ROOT / "docs" / "images"
    results.mkdir(exist_ok=True)
    for network in ("vgg16", "vgg16-tv", "efficientnet-lite0"):
        for place, table in enumerate(read(folder, network, results)["tables"]):
            put_table(PAGE, f"{network} {place}", table["header"], table["rows"])
    for name in ("inversion-needs", "priors"):
        table = read(folder, name, results)
        put_table(PAGE, name, table["header"], table["rows"])
    speed = read(folder, "inversion-speed", results)["rows"]
    put_table(PAGE, "speed", list(speed[0]), [[str(value) for value in row.values()] for row in speed])
    for name in FIGURES:
        shutil.copy(Path(folder) / f"{name}.png", images / f"{name}.png")


def read(folder: str, name: str, results: Path) -> dict:
    path = Path(folder) / f"{name}.json"
    shutil.copy(path, results / path.name)
    return json.loads(path.read_text(encoding="utf-8"))


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit(__doc__)
    main(sys.argv[1])
