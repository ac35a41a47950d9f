"""Put the figures and the tables of the MNIST study into the README and docs/study.md.

    python scripts/update_readme.py STUDY_FOLDER

The folder is one that ``retrainscope mnist --out`` wrote.
"""

import shutil
import sys
from pathlib import Path

from overview import draw_overview
from pages import ROOT, put_table

from retrainscope.saving import load_json
from retrainscope.studies.mnist.experiments import SeedResult
from retrainscope.studies.mnist.tables import tables


def main(folder):
    folder = Path(folder)
    images = ROOT / "docs" / "images"
    images.mkdir(parents=True, exist_ok=True)
    shutil.copy(folder / "needs.png", images / "needs.png")
    paths = sorted((folder / "seeds").glob("seed-*.json"), key=lambda path: int(path.stem.partition("-")[2]))
    results = [load_json(SeedResult, path) for path in paths]
    draw_overview(results, images / "overview.png")
    made = tables(results)
    put_table(ROOT / "README.md", "check", made["check"].header, made["check"].rows)
    for name in ("check", "claims", "spread", "inversion", "decoding", "verdict", "needs", "sweep"):
        put_table(ROOT / "docs" / "study.md", name, made[name].header, made[name].rows)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit(__doc__)
    main(sys.argv[1])
