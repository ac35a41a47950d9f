"""Put the results of `make bench-speed` into docs/speed.md, and the figure of growth beside it.

    python scripts/update_speed_page.py RESULTS_FOLDER

The folder holds ratios.json, growth.json, growth.png, processes.json and killed.json. The numbers are kept in
benchmarks/results/speed.
"""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
from pages import ROOT, put_table

PAGE = ROOT / "docs" / "speed.md"
KEPT = ROOT / "benchmarks" / "results" / "speed"
LAST = 3  # points that the exponent is fitted to


def main(folder: Path) -> None:
    KEPT.mkdir(parents=True, exist_ok=True)
    ratios, growth = read(folder, "ratios"), read(folder, "growth")
    rows = [
        [
            *(row["ours"], row["against"], f"{row['our_seconds']:.3g}", f"{row['their_seconds']:.3g}"),
            *(f"{row['value']:.2f} [{row['low']:.2f}, {row['high']:.2f}]", row["aim"], row["note"]),
        ]
        for some in ratios["rows"].values()
        for row in some
    ]
    put_table(PAGE, "ratios", ["ours", "against", "seconds", "their seconds", "ratio [range]", "aim", "note"], rows)
    machine = [[name, str(value)] for name, value in ratios["machine"].items()]
    put_table(PAGE, "machine", ["what", "value"], machine)
    put_table(PAGE, "growth", ["along", "from", "to", *next(iter(growth["seconds"].values()))], exponents(growth))
    several = [
        [
            *(row["what"], f"{row['one_seconds']:.3g}", f"{row['seconds']:.3g}"),
            f"{row['ratio']:.2f} [{row['low']:.2f}, {row['high']:.2f}]",
            *(f"{row['computing_ratio']:.2f}", f"{row['difference']:.1e}"),
        ]
        for row in read(folder, "processes")["rows"]
    ]
    times = ["one process (s)", "two processes (s)", "ratio [range], aim ≤ 0.6", "of computing"]
    header = ["what", *times, "largest difference"]
    put_table(PAGE, "processes", header, several)
    killed = read(folder, "killed")
    put_table(PAGE, "killed", killed["header"], killed["rows"])
    shutil.copy(folder / "growth.png", ROOT / "docs" / "images" / "growth.png")


def exponents(growth: dict[str, Any]) -> list[list[str]]:
    rows = []
    for what, sizes in growth["sizes"].items():
        slopes = []
        for times in growth["seconds"][what].values():
            tried = sizes[: len(times)]
            slope = np.polyfit(np.log(tried[-LAST:]), np.log(times[-LAST:]), 1)[0]
            slopes.append(f"{slope:.2f}" + ("" if tried == sizes else f" (to {tried[-1]})"))
        rows.append([what, str(sizes[0]), str(sizes[-1]), *slopes])
    return rows


def read(folder: Path, name: str) -> dict[str, Any]:
    path = folder / f"{name}.json"
    shutil.copy(path, KEPT / path.name)
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit(__doc__)
    main(Path(sys.argv[1]))
