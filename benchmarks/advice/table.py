"""The tables of the advice benchmark: regret, parameters trained, rank correlation and cost of every way to choose.

    python benchmarks/advice/table.py [--purpose reporting] [--page docs/advice.md]

Reads the stored sweeps and scores. Regret is in points of accuracy: the mean accuracy of the task's best policy (over
the seeds) less that of the policies chosen, one a seed. What is undecided counts as retraining everything. The seeds of
scores may be fewer than those of sweeps.
"""

import argparse
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import spearmanr
from sweeps import RESULTS
from tasks import SEEDS, TASKS

from retrainscope.tables import text_table

N_DRAWS = 2000
SPREAD_THRESHOLD = 0.15
# By the name in the table: that of the stored scores.
ADVISED = {
    "recommend_layers": "default",
    "recommend_layers, trial": "with a trial",
    "recommend_layers, no labels": "without labels",
}
CLOSE = 0.5  # points of accuracy within which a policy counts as the best
Record = dict[str, Any]
Pick = Callable[[Record, Record], str | None]  # None: not scored with that seed


@dataclass(frozen=True)
class Run:
    """A task with all seeds: what every policy is worth, and what was said."""

    key: str
    kind: str
    sweeps: list[Record]
    scores: list[Record]  # of the same seeds; empty where there are none

    def pairs(self) -> Iterator[tuple[Record, Record]]:
        return zip(self.sweeps, self.scores, strict=True)

    @property
    def policies(self) -> list[str]:
        return list(self.sweeps[0]["policies"])

    def accuracy(self) -> NDArray[np.float64]:
        """Points of accuracy, of shape (n_seeds, n_policies)."""
        return 100 * np.array([[s["policies"][p]["accuracy"] for p in self.policies] for s in self.sweeps])

    def gains(self) -> NDArray[np.float64]:
        """What each layer gains on the head alone, mean over the seeds, of shape (n_layers,)."""
        means = dict(zip(self.policies, self.accuracy().mean(axis=0), strict=True))
        return np.array([means[policy_for(self.sweeps[0], [layer])] - means["head"] for layer in self.layers])

    @property
    def layers(self) -> list[str]:
        return self.sweeps[0]["layers"]

    def noise(self) -> float:
        """The standard error of a policy's mean accuracy, over the policies."""
        accuracy = self.accuracy()
        return float(np.sqrt(accuracy.var(axis=0, ddof=1).mean() / len(accuracy)))

    def tells_apart(self) -> bool:
        """Whether the layers' gains differ by more than chance in the seeds."""
        return bool(np.ptp(self.gains()) > 4 * self.noise())


def policy_for(sweep: Record, layers: list[str]) -> str:
    """Return the policy that trains these layers and the head, or, if it was not tried, all from the lowest one up."""
    wanted = [name for name in sweep["layers"] if name in layers]
    tried = {tuple(found["trained"]): p for p, found in sweep["policies"].items() if p != "none"}
    upper = sweep["layers"][sweep["layers"].index(wanted[0]) :] if wanted else []
    return tried.get(tuple(wanted)) or tried[tuple(upper)]


def fixed_rules() -> dict[str, Pick]:
    """Return the rules that look at no data."""

    def largest(sweep: Record) -> list[str]:
        return [max(sweep["layers"], key=lambda name: sweep["n_parameters"][name])]

    rules: dict[str, Callable[[Record], list[str]]] = {
        "head alone": lambda _: [],
        "last layer": lambda sweep: sweep["layers"][-1:],
        "first layer": lambda sweep: sweep["layers"][:1],
        "largest layer": largest,
        "upper half": lambda sweep: sweep["layers"][len(sweep["layers"]) // 2 :],
        "all but the first": lambda sweep: sweep["layers"][1:],
        "everything": lambda sweep: sweep["layers"],
    }
    return {name: lambda sweep, _, rule=rule: policy_for(sweep, rule(sweep)) for name, rule in rules.items()}


def advice(name: str) -> Pick:
    """Return the choice of recommend_layers."""

    def pick(sweep: Record, scores: Record) -> str | None:
        if name not in scores:
            return None
        said = scores[name]
        if said["verdict"] == "undecided":
            return policy_for(sweep, sweep["layers"])
        return (
            "none" if said["verdict"] == "none" and "none" in sweep["policies"] else policy_for(sweep, said["layers"])
        )

    return pick


def top(name: str, what: str, *, up: bool) -> Pick:
    """Return the rule to retrain the layer that scores highest, or everything from it up."""

    def pick(sweep: Record, scores: Record) -> str | None:
        if name not in scores:
            return None
        values = {layer: value for layer, value in scores[name].get(what, {}).items() if value is not None}
        if not values:
            return policy_for(sweep, sweep["layers"])
        best = max(values, key=lambda layer: values[layer])
        layers = sweep["layers"]
        return policy_for(sweep, layers[layers.index(best) :] if up else [best])

    return pick


def spread_rule(sweep: Record, scores: Record) -> str | None:
    """Retrain from the first layer whose need passes the threshold."""
    if "ActivationSpread" not in scores:
        return None
    needs, layers = scores["ActivationSpread"]["needs"], sweep["layers"]
    first = next((n for n, name in enumerate(layers) if (needs[name] or 0) > SPREAD_THRESHOLD), len(layers))
    return policy_for(sweep, layers[first:])


def ways(names: Iterable[str]) -> dict[str, Pick]:
    """Return every way to choose, by name."""
    found = {way: advice(name) for way, name in ADVISED.items()}
    found["ActivationSpread > 0.15 and up"] = spread_rule
    for name in names:
        if name not in ADVISED.values():
            found[f"{name}: top"] = top(name, "needs", up=False)
            found[f"{name}: top and up"] = top(name, "needs", up=True)
            if name not in ("TangentProbe", "ActivationSpread", "GradientInverter", "LayerDecoderProbe", "SpectrumSNR"):
                found[f"{name}, unknown data alone: top"] = top(name, "raw", up=False)
    return found | fixed_rules()


def measured(run: Run, pick: Pick) -> tuple[float, float, float]:
    """Return regret, share of the parameters, and how often the choice is as good as the best."""
    means = dict(zip(run.policies, run.accuracy().mean(axis=0), strict=True))
    best = max(means.values())
    chosen = [p for p in (pick(*pair) for pair in run.pairs()) if p is not None]
    shares = [run.sweeps[0]["policies"][p]["share"] for p in chosen]
    regrets = [best - means[p] for p in chosen]
    return float(np.mean(regrets)), float(np.mean(shares)), float(np.mean([regret <= CLOSE for regret in regrets]))


def noise_floor(run: Run) -> float:
    """Return the regret of the policy that was best under the other seeds."""
    accuracy = run.accuracy()
    others = [np.delete(accuracy, seed, axis=0).mean(axis=0).argmax() for seed in range(len(accuracy))]
    return float(accuracy.mean(axis=0).max() - np.mean([accuracy[seed, p] for seed, p in enumerate(others)]))


def correlation(run: Run, name: str, what: str) -> float:
    """Return Spearman's correlation of score and measured gain of the layers, mean over the seeds."""
    found = []
    for scores in run.scores:
        values = scores.get(name, {}).get(what)
        if values is None or any(values[layer] is None for layer in run.layers):
            continue
        ordered = [values[layer] for layer in run.layers]
        found.append(spearmanr(ordered, run.gains()).statistic if np.ptp(ordered) > 0 else 0.0)
    return float(np.mean(found)) if found else np.nan


def interval(values: NDArray[np.float64]) -> str:
    """Return the 90 % bootstrap interval of a mean over tasks, as text."""
    drawn = np.random.default_rng(0).choice(values, (N_DRAWS, len(values))).mean(axis=1)
    low, high = np.quantile(drawn, [0.05, 0.95])
    return f"[{low:.2f}, {high:.2f}]"


def runs(purpose: str) -> list[Run]:
    """Read what is stored."""
    sweeps, scores = (json.loads((RESULTS / f"{name}.json").read_text()) for name in ("sweeps", "scores"))
    found = []
    for task in TASKS:
        if task.purpose == purpose and task.key in sweeps and task.key in scores:
            swept, scored = sweeps[task.key], scores[task.key]
            seeds = sorted(
                swept, key=lambda seed: (-len(scored.get(seed, {})), seed)
            )  # what is scored most comes first
            found.append(Run(task.key, task.kind, [swept[s] for s in seeds], [scored.get(s, {}) for s in seeds]))
    return found


HEADER = ["way to choose", "regret", "90 % interval", "parameters", "hits", "rho", "rho, apart", "seconds"]


def tables(purpose: str) -> Iterator[tuple[str, list[str], list[list[str]]]]:
    """Yield the tables with their titles."""
    found = runs(purpose)
    names = dict.fromkeys(name for run in found for scores in run.scores for name in scores)
    every = ways(names)
    scored = {way: [run for run in found if any(pick(*pair) for pair in run.pairs())] for way, pick in every.items()}
    apart = sum(run.tells_apart() for run in found)
    n_seeds = min(len(run.sweeps) for run in found)
    title = f"{len(found)} {purpose} tasks, {n_seeds} seeds; {apart} of them tell the layers apart"
    yield title, HEADER, _ranked({way: pick for way, pick in every.items() if scored[way] == found}, found)
    some = {way: pick for way, pick in every.items() if scored[way] != found}
    if some:
        fewest = min((scored[way] for way in some), key=len)
        beside = {
            way: every[way] for way in ("recommend_layers", "recommend_layers, trial", "everything", "head alone")
        }
        title = f"{len(fewest)} of these tasks, on which these ways are scored too"
        yield title, HEADER, _ranked(some | beside, fewest)
    yield from _by_network(found)
    yield "Checks", ["check", "recommend_layers", "with a trial"], _checks(found)


def _ranked(picks: dict[str, Pick], found: list[Run]) -> list[list[str]]:
    """Return a row for each way to choose, by regret, and one for the noise floor."""
    rows = [_row(way, pick, found) for way, pick in picks.items()]
    floor = np.array([noise_floor(run) for run in found])
    rows.append((floor.mean(), ["(best under the other seeds)", f"{floor.mean():.2f}", interval(floor), *["-"] * 5]))
    return [row for _, row in sorted(rows, key=lambda row: row[0])]


def _row(way: str, pick: Pick, found: list[Run]) -> tuple[float, list[str]]:
    numbers = np.array([measured(run, pick) for run in found])
    estimator, _, how = way.partition(":")
    what = "raw" if "unknown data alone" in way else "needs"
    key = ADVISED.get(estimator, estimator.removesuffix(", unknown data alone"))
    said = [s[key] for run in found for s in run.scores if key in s] if how in ("", " top") else []
    rho = ["-", "-"]
    if said and key not in ("with a trial", "without labels"):
        apart = [run for run in found if run.tells_apart()]
        rho = [f"{np.nanmean([correlation(run, key, what) for run in some]):.2f}" for some in (found, apart)]
    seconds = [record["seconds"] for record in said if "seconds" in record]
    return numbers[:, 0].mean(), [
        way,
        f"{numbers[:, 0].mean():.2f}",
        interval(numbers[:, 0]),
        f"{numbers[:, 1].mean():.0%}",
        f"{numbers[:, 2].mean():.0%}",
        *rho,
        f"{np.median(seconds):.2f}" if seconds else "-",
    ]


def _by_network(found: list[Run]) -> Iterator[tuple[str, list[str], list[list[str]]]]:
    names = list(dict.fromkeys(run.key.split("/")[0] for run in found))
    picks = {way: advice(name) for way, name in ADVISED.items()} | fixed_rules()
    rows = [
        [way, *(f"{np.mean([measured(r, pick)[0] for r in found if r.key.startswith(n + '/')]):.2f}" for n in names)]
        for way, pick in picks.items()
    ]
    floor = [f"{np.mean([noise_floor(r) for r in found if r.key.startswith(n + '/')]):.2f}" for n in names]
    yield "Regret by network", ["way to choose", *names], [*rows, ["(best under the other seeds)", *floor]]
    rows = []
    for run in found:
        words = [
            advice("default")(sweep, scores) if scores["default"]["verdict"] != "undecided" else "undecided"
            for sweep, scores in run.pairs()
            if "default" in scores
        ]
        best = run.policies[int(run.accuracy().mean(axis=0).argmax())]
        rows.append(
            [
                run.key,
                best,
                "; ".join(dict.fromkeys(words)),
                f"{measured(run, advice('default'))[0]:.1f}",
                f"{np.ptp(run.accuracy().mean(axis=0)[1:]):.1f}",
            ]
        )
    yield "Task by task", ["task", "best policy", "advised", "regret", "range of policies"], rows


def _checks(found: list[Run]) -> list[list[str]]:
    """Return what the advice must keep to, without and with a trial."""
    by_way = [_checks_of(found, name) for way, name in ADVISED.items() if way != "recommend_layers, no labels"]
    return [[check, *(column[check] for column in by_way)] for check in by_way[0]]


def _checks_of(found: list[Run], name: str) -> dict[str, str]:
    said = [(run, sweep, scores[name]) for run in found for sweep, scores in run.pairs() if name in scores]
    null = [record["verdict"] == "none" for run, _, record in said if run.kind == "null"]
    undecided = [record["verdict"] == "undecided" for _, _, record in said]
    contains = []
    for run, _, record in said:
        best = run.policies[int(run.accuracy().mean(axis=0).argmax())]
        block = run.key.split()[-1]
        if run.kind == "damage" and block in run.sweeps[0]["policies"][best]["trained"]:
            contains.append(block in record["layers"] and len(record["layers"]) < len(run.layers))
    times = json.loads((RESULTS / "times.json").read_text())
    key = {"default": "default", "with a trial": "trial"}[name]
    networks = dict.fromkeys(run.key.split("/")[0] for run in found)
    shares = {network: times[network][key] / times[network]["sweep"] for network in networks}
    return {
        "held-out known data gets the verdict none": f"{sum(null)} of {len(null)}",
        "the damaged layer is advised, not everything, where the best policy has it": f"{sum(contains)} of "
        f"{len(contains)}",
        "undecided": f"{sum(undecided)} of {len(undecided)}",
        **{
            f"time, as a share of a sweep with {len(SEEDS)} seeds: {network}": f"{share:.1%}"
            for network, share in shares.items()
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--purpose", choices=["tuning", "reporting"], default="reporting")
    parser.add_argument("--page", type=Path, metavar="FILE", help="put the tables between the marks of this page")
    args = parser.parse_args()
    parts = []
    for title, header, rows in tables(args.purpose):
        text = text_table(header, rows)
        print(f"{title}\n\n{text}\n")
        parts.append(f"**{title}**\n\n```\n{text}\n```\n")
    if args.page:
        text = args.page.read_text()
        begin, end = f"<!-- {args.purpose} tables -->", f"<!-- end of {args.purpose} tables -->"
        head, tail = text.split(begin)[0], text.split(end)[1]
        args.page.write_text(head + begin + "\n\n" + "\n".join(parts) + "\n" + end + tail)


if __name__ == "__main__":
    main()
