"""What the advice takes beside the sweep that it replaces: one after the other, on one thread of one machine.

    python benchmarks/advice/times.py [--only PATTERN] [--out FILE]

The task of new classes of each network, with the first network of it; the sweep with three seeds, as everywhere in the
benchmark. Nothing else should run on that core.
"""

import argparse
import json
import re
import time
from pathlib import Path
from typing import Any

import torch
from score import advised
from sweeps import RESULTS, swept
from tasks import SEEDS, TASKS, cases

from retrainscope.saving import write_text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", metavar="PATTERN", help="networks whose name this is found in")
    parser.add_argument("--out", type=Path, default=RESULTS / "times.json", metavar="FILE")
    args = parser.parse_args()
    torch.set_num_threads(1)
    times: dict[str, dict[str, Any]] = json.loads(args.out.read_text()) if args.out.exists() else {}
    for task, case in cases([t for t in TASKS if t.name == "novel" and re.search(args.only, t.network)], seed=0):
        advised(case, 0)  # what is loaded and compiled at the first call is nobody's
        took = {name: advised(case, 0, trial=trial)["seconds"] for name, trial in (("default", False), ("trial", True))}
        began = time.perf_counter()
        swept(case, 0, n_seeds=len(SEEDS))
        times[task.network] = took | {"sweep": round(time.perf_counter() - began, 3)}
        write_text(args.out, json.dumps(times, indent=0) + "\n")
        print(task.network, times[task.network], flush=True)


if __name__ == "__main__":
    main()
