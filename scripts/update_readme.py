"""Put the figure and the table of the MNIST study into the README.

    python scripts/update_readme.py STUDY_FOLDER

The folder is one that ``retrainscope mnist --out`` wrote.
"""

import re
import shutil
import sys
from pathlib import Path

from retrainscope.saving import load_json
from retrainscope.studies.mnist.experiments import SeedResult
from retrainscope.studies.mnist.tables import tables

ROOT = Path(__file__).parents[1]


def main(folder):
    folder = Path(folder)
    images = ROOT / "docs" / "images"
    images.mkdir(parents=True, exist_ok=True)
    shutil.copy(folder / "needs.png", images / "needs.png")
    paths = sorted((folder / "seeds").glob("seed-*.json"), key=lambda path: int(path.stem.partition("-")[2]))
    table = tables([load_json(SeedResult, path) for path in paths])["check"]
    lines = [table.header, ["---"] * len(table.header), *table.rows]
    block = "\n".join(f"| {' | '.join(row)} |" for row in lines)
    readme = ROOT / "README.md"
    text = readme.read_text(encoding="utf-8")
    marked = re.compile(r"(<!-- check: begin.*?-->\n).*?(<!-- check: end -->)", re.DOTALL)
    readme.write_text(marked.sub(lambda m: f"{m[1]}\n{block}\n\n{m[2]}", text), encoding="utf-8")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit(__doc__)
    main(sys.argv[1])
