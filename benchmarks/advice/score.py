"""What the default, each estimator and each published criterion say of every task, and what they take.

    python benchmarks/advice/score.py [--purpose tuning|reporting] [--only PATTERN] [--slow] [--device D] [--out FILE]

The results are written after every task; a second run goes on where the first one stopped. --slow adds the two
estimators that train or descend, with one seed.
"""

import argparse
import json
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sweeps import RESULTS, SETTINGS
from tasks import SEEDS, TASKS, Case, cases
from tqdm import tqdm

import retrainscope as rs
from retrainscope import criteria
from retrainscope.base import LayerEstimator
from retrainscope.exceptions import RetrainscopeError
from retrainscope.saving import write_text

Make = Callable[..., LayerEstimator]
FAST: dict[str, Make] = {
    "TangentProbe": rs.TangentProbe,
    "ActivationSpread": rs.ActivationSpread,
    "RelativeGradientNorm": criteria.RelativeGradientNorm,
    "GradientSignalToNoise": criteria.GradientSignalToNoise,
    "EmpiricalFisher, mean": lambda model, **options: criteria.EmpiricalFisher(model, reduction="mean", **options),
    "EmpiricalFisher, sum": lambda model, **options: criteria.EmpiricalFisher(model, reduction="sum", **options),
    "LogME": criteria.LogME,
    "HScore": criteria.HScore,
    "TransRate": criteria.TransRate,
    "HiddenStateVariability": criteria.HiddenStateVariability,
    "LinearProbe": criteria.LinearProbe,
    "KNNProbe": criteria.KNNProbe,
    "SpectrumSNR": criteria.SpectrumSNR,
}
ADVISED: dict[str, dict[str, bool]] = {
    "default": {},
    "with a trial": {"trial": True},
    "without labels": {"labels": False},
}
SLOW: dict[str, Make] = {
    "GradientInverter": lambda model, **options: rs.GradientInverter(model, samples_per_class=8, **options),
    "LayerDecoderProbe": rs.LayerDecoderProbe,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--purpose", choices=["tuning", "reporting"], help="these tasks alone")
    parser.add_argument("--only", default="", metavar="PATTERN", help="tasks whose name this is found in")
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS, metavar="N")
    parser.add_argument("--default", action="store_true", help="recommend_layers alone")
    parser.add_argument("--slow", action="store_true", help="the slow estimators alone, with the first seed")
    parser.add_argument("--device", metavar="NAME", help="where the slow estimators work")
    parser.add_argument("--out", type=Path, default=RESULTS / "scores.json", metavar="FILE")
    args = parser.parse_args()
    torch.set_num_threads(1)
    done: dict[str, dict[str, Any]] = json.loads(args.out.read_text()) if args.out.exists() else {}
    chosen = [t for t in TASKS if args.purpose in (None, t.purpose) and re.search(args.only, t.key)]
    seeds = args.seeds[:1] if args.slow else args.seeds
    wanted = SLOW if args.slow else {} if args.default else FAST
    own = {} if args.slow else ADVISED
    there = {"device": args.device} if args.slow else {}
    with tqdm(total=len(seeds) * len(chosen)) as bar:
        for seed in seeds:
            left = [t for t in chosen if not {*own, *wanted} <= set(done.get(t.key, {}).get(str(seed), {}))]
            bar.update(len(chosen) - len(left))
            for task, case in cases(left, seed):
                bar.set_postfix_str(f"{task.key}, seed {seed}")
                found = done.setdefault(task.key, {}).setdefault(str(seed), {})
                for name, options in own.items():
                    found[name] = found.get(name) or advised(case, seed, **options)
                for name, make in wanted.items():
                    found[name] = found.get(name) or scored(make, case, seed, **there)
                write_text(args.out, json.dumps(done, indent=0) + "\n")
                bar.update()


def advised(case: Case, seed: int, *, labels: bool = True, trial: bool = False) -> dict[str, Any]:
    """Return what recommend_layers says, as a policy of the sweep; a trial is trained as the sweep is."""
    began = time.perf_counter()
    unknown, groups = (case.unknown, case.groups) if labels else (case.unknown[0], None)
    rec = rs.recommend_layers(
        case.model,
        case.known,
        unknown,
        groups=groups,
        trial=SETTINGS | case.settings if trial else None,
        layers=case.layers,
        random_state=seed,
        progress=False,
    )
    return {
        "seconds": round(time.perf_counter() - began, 3),
        "verdict": rec.verdict,
        "layers": rec.layers,
        "needs": {row.name: _rounded(row.need) for row in rec.table},
        "cost": {name: round(share, 4) for name, share in rec.cost.items()},
        "head": rec.head.verdict,
        "forecast": None if trial or rec.forecast is None else _forecast(rec.forecast),
        "trial": None if rec.trial is None else {p: _rounded(a) for p, a in rec.trial.mean_accuracy.items()},
    }


def _forecast(forecast: rs.Forecast) -> dict[str, Any]:
    """Return what a rule of choice could go by."""
    errors, accuracies = (np.quantile(d, (0.05, 0.95), axis=0) for d in (forecast.draws, forecast.accuracy_draws))
    return {
        "chance": _rounded(forecast.chance),
        "known_accuracy": _rounded(forecast.known_accuracy),
        "policies": {
            policy: {
                "error": [_rounded(x) for x in (forecast.error[row], *errors[:, row])],
                "accuracy": [_rounded(x) for x in (forecast.accuracy[row], *accuracies[:, row])],
            }
            for row, policy in enumerate(forecast.policies)
        },
    }


def scored(make: Make, case: Case, seed: int, **options: Any) -> dict[str, Any]:
    """Return an estimator's needs, and its raw measures of the unknown data."""
    began = time.perf_counter()
    estimator = make(case.model, layers=case.layers, random_state=seed, progress=False, **options)
    try:
        told = {"groups": case.groups} if isinstance(estimator, rs.TangentProbe) else {}
        scores = estimator.fit(case.known).score_layers(case.unknown, **told)
    except RetrainscopeError as error:
        return {"error": f"{type(error).__name__}: {error}"}
    return {
        "seconds": round(time.perf_counter() - began, 3),
        "needs": dict(zip(scores.layers, map(_rounded, scores.values), strict=True)),
        "raw": dict(zip(scores.layers, map(_rounded, scores.unknown), strict=True)),
    }


def _rounded(value: float) -> float | None:
    return float(f"{value:.5g}") if np.isfinite(value) else None


if __name__ == "__main__":
    main()
