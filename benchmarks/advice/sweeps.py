"""What each retraining policy is worth on every task: the truth that advice is held against.

    python benchmarks/advice/sweeps.py [--purpose tuning|reporting] [--only PATTERN] [--out FILE]

The results are written after every task; a second run goes on where the first one stopped.
"""

import argparse
import json
import re
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tasks import SEEDS, TASKS, Case, cases
from tqdm import tqdm

import retrainscope as rs
from retrainscope.saving import write_text

RESULTS = Path(__file__).parents[1] / "results" / "advice"
SETTINGS = {
    "steps": 120,
    "batch_size": 32,
    "learning_rates": (1e-3, 4e-3),
    "n_seeds": 1,
    "optimizer": partial(torch.optim.Adam, fused=True),  # in small networks a third of the time goes into Adam
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--purpose", choices=["tuning", "reporting"], help="these tasks alone")
    parser.add_argument("--only", default="", metavar="PATTERN", help="tasks whose name this is found in")
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS, metavar="N")
    parser.add_argument("--out", type=Path, default=RESULTS / "sweeps.json", metavar="FILE")
    args = parser.parse_args()
    args.out.parent.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    done: dict[str, dict[str, Any]] = json.loads(args.out.read_text()) if args.out.exists() else {}
    chosen = [t for t in TASKS if args.purpose in (None, t.purpose) and re.search(args.only, t.key)]
    with tqdm(total=len(args.seeds) * len(chosen)) as bar:
        for seed in args.seeds:
            left = [task for task in chosen if str(seed) not in done.get(task.key, {})]
            bar.update(len(chosen) - len(left))
            for task, case in cases(left, seed):
                bar.set_postfix_str(f"{task.key}, seed {seed}")
                done.setdefault(task.key, {})[str(seed)] = swept(case, seed)
                write_text(args.out, json.dumps(done, indent=0) + "\n")
                bar.update()


def swept(case: Case, seed: int, *, n_seeds: int = 1) -> dict[str, Any]:
    """Retrain by every policy, and return what is kept of it: the first of the seeds."""
    sweep = rs.sweep_layers(
        case.model,
        case.known,
        case.unknown,
        test=case.test,
        layers=case.layers,
        random_state=seed,
        progress=False,
        **(SETTINGS | case.settings | {"n_seeds": n_seeds}),
    )
    return {
        "layers": sweep.layers,
        "n_parameters": sweep.n_parameters,
        "head": sweep.head,
        "known_before": round(sweep.known_before, 4),
        "policies": {
            policy: {
                "trained": sweep.trained[row],
                "accuracy": round(float(sweep.accuracy[row, 0]), 5),
                "known": round(float(sweep.known_accuracy[row, 0]), 4),
                "share": round(sweep.share(policy), 5),
                "seconds": round(float(sweep.seconds[row, 0]), 2),
            }
            for row, policy in enumerate(sweep.policies)
        },
    }


if __name__ == "__main__":
    main()
