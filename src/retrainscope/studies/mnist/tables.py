"""The MNIST study's results next to the paper's, as tables."""

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from retrainscope.scores import LayerScores
from retrainscope.studies.mnist.experiments import KNOWN, LAYERS, N_CHECK, POLICIES, UNKNOWN, SeedResult
from retrainscope.studies.mnist.paper import (
    CLAIMS,
    DECODING,
    INVERSION,
    PAPER_VERDICT,
    columns,
    correlation,
    growth_parted,
    status,
    verdict_margins,
)
from retrainscope.tables import Table

__all__ = ["conv2_gain", "mean_sd", "tables"]

Floats = NDArray[np.float64]


def tables(results: Sequence[SeedResult]) -> dict[str, Table]:
    """Return all tables of the study by name, for the terminal and for the report."""
    return {
        "spread": _spread_table(results),
        "neighbours": _neighbour_table(results),
        "inversion": _inversion_table(results),
        "decoding": _decoding_table(results),
        "verdict": _verdict_table(results),
        "needs": _needs_table(results),
        "check": _check_table(results),
        "sweep": _sweep_table(results),
        "claims": _claims_table(results),
    }


def _spread_table(results: Sequence[SeedResult]) -> Table:
    first = results[0]
    raw = {
        layer: [np.concatenate([r.spread.known_per_class, r.spread.unknown_per_class])[:, i] for r in results]
        for i, layer in enumerate(LAYERS)
    }
    needs = np.concatenate([first.known_spread.per_class, first.spread.per_class])
    ends = np.concatenate([first.known_spread.per_class_interval, first.spread.per_class_interval])
    rows = []
    for digit in (*KNOWN, *UNKNOWN):
        cells = [mean_sd([run[digit] for run in raw[layer]], 2) for layer in LAYERS]
        cells += [
            f"{needs[digit, i]:.2f} [{ends[digit, i, 0]:.2f}, {ends[digit, i, 1]:.2f}]" for i in range(len(LAYERS))
        ]
        rows.append([_digit(digit), *cells])
    return Table(
        "Experiment 1: share of the variance within each digit, and need (nats) with 90 % interval",
        ["digit", *(f"spread {layer}" for layer in LAYERS), *(f"need {layer}" for layer in LAYERS)],
        rows,
        note=f"Needs and intervals of seed {first.seed}; for known digits they are of held-out test images. "
        "Digits differ by themselves (a 1 is compact): all known digits together have a need near 0, a single one not.",
    )


def _neighbour_table(results: Sequence[SeedResult]) -> Table:
    def nearest(layer: str, digit: int) -> str:
        found = [r.neighbours[layer][digit] for r in results]
        counts = sorted(((found.count(known), known) for known in set(found)), key=lambda pair: (-pair[0], pair[1]))
        return ", ".join(f"{known} ({n} of {len(found)})" for n, known in counts)

    return Table(
        "Experiment 1: the known digit whose mean activation is nearest (runs that say so)",
        ["digit", *LAYERS],
        [[str(digit), *(nearest(layer, digit) for layer in LAYERS)] for digit in UNKNOWN],
        note="The paper: 8 sits with 0 at layer 2.",
    )


def _inversion_table(results: Sequence[SeedResult]) -> Table:
    runs = [(columns(r.inversion), columns(r.inversion, reference=True)) for r in results]
    ours = [
        [model["conv1"] for model, _ in runs],
        [model["conv2"] for model, _ in runs],
        [control["conv2"] for _, control in runs],
        [model["fc1"] for model, _ in runs],
        [control["fc1"] for _, control in runs],
    ]
    rows = [
        [
            _digit(digit),
            *(mean_sd([run[digit] for run in column], 2) for column in ours),
            *(f"{INVERSION[digit, place]:.0f}" for place in range(3)),
        ]
        for digit in (*KNOWN, *UNKNOWN)
    ]
    rows.append(
        [
            "correlation with the paper",
            *(mean_sd([correlation(INVERSION[:, place], run) for run in ours[place]], 2) for place in range(3)),
            *[""] * 5,
        ]
    )
    return Table(
        "Experiment 2: squared error of the inverted image, summed over its 784 pixels in [0, 1]",
        ["digit", "conv1", "conv2", "conv2 untrained", "fc1", "fc1 untrained",
         "paper layer 1", "paper layer 2", "paper layer 2 untrained"],
        rows,
        note=f"{results[0].inversion.n_samples[0]} known and {results[0].inversion.n_samples[1]} unknown images a run. "
        f"{_brightness_note(results[0], INVERSION)}",
    )  # fmt: skip


def _decoding_table(results: Sequence[SeedResult]) -> Table:
    runs = [(columns(r.decoding), columns(r.decoding, reference=True)) for r in results]
    rows = []
    for digit in (*KNOWN, *UNKNOWN):
        cells = [mean_sd([run[layer][digit] for run, _ in runs], 1) for layer in LAYERS]
        cells += [mean_sd([control[layer][digit] for _, control in runs], 1) for layer in LAYERS]
        cells += [f"{DECODING[digit, place]:.1f}" for place in range(2)]
        growth = [float(np.log(run["conv2"][digit] / run["conv1"][digit])) for run, _ in runs]
        cells += [mean_sd(growth, 2), f"{np.log(DECODING[digit, 1] / DECODING[digit, 0]):.2f}"]
        rows.append([_digit(digit), *cells])
    agreement = [
        mean_sd([correlation(DECODING[:, place], run[layer]) for run, _ in runs], 2)
        for place, layer in enumerate(("conv1", "conv2"))
    ]
    rows.append(["correlation with the paper", *agreement, *[""] * 8])
    parted = [growth_parted(run["conv1"], run["conv2"]) for run, _ in runs]
    return Table(
        "Experiment 3: squared error of the decoded image, summed over its 784 pixels in [0, 1]",
        ["digit", *LAYERS, *(f"{layer} untrained" for layer in LAYERS),
         "paper layer 1", "paper layer 2", "growth (nats)", "paper growth"],
        rows,
        note=f"Growth: log of the error at conv2 over that at conv1. It is larger for 5, 6 and 8 than for 7 and 9 in "
        f"{sum(value > 0 for value in parted)} of {len(parted)} runs. {_brightness_note(results[0], DECODING)}",
    )  # fmt: skip


def _brightness_note(result: SeedResult, paper: Floats) -> str:
    found = ", ".join(f"{correlation(column, result.brightness):.2f}" for column in paper.T)
    return f"A digit's mean squared brightness, without any network, correlates {found} with the paper's columns."


def _verdict_table(results: Sequence[SeedResult]) -> Table:
    paper = verdict_margins(DECODING[:, 0], DECODING[:, 1])
    ours = [verdict_margins(columns(r.decoding)["conv1"], columns(r.decoding)["conv2"]) for r in results]
    words = {True: "retrain", False: "keep"}
    return Table(
        "Experiment 3: does layer 2 need retraining for a digit?",
        [
            "digit",
            "the paper says",
            "rule on the paper's numbers",
            "margin there",
            "rule on ours",
            "margin (nats)",
            "gain of retraining conv2 (points)",
        ],
        [
            [
                str(digit),
                words[PAPER_VERDICT[digit]],
                words[paper[digit] > 0],
                f"{paper[digit]:.3f}",
                f"retrain in {sum(run[digit] > 0 for run in ours)} of {len(ours)}",
                mean_sd([run[digit] for run in ours], 3),
                mean_sd([conv2_gain(r, digit) for r in results], 2),
            ]
            for digit in UNKNOWN
        ],
        note="The gain is the sweep's: the digit added to 0-4, most samples, on top of retraining fc1 and the head.",
    )


def conv2_gain(result: SeedResult, digit: int) -> float:
    """Return what retraining conv2 on top of fc1 and the head gains for a digit added to 0-4, in points."""
    accuracies = result.sweep[f"0-4 and {digit}"]
    budget = max(accuracies["head"])
    return 100 * (accuracies["head + fc1 + conv2"][budget] - accuracies["head + fc1"][budget])


def _needs_table(results: Sequence[SeedResult]) -> Table:
    estimators: tuple[tuple[str, Callable[[SeedResult], LayerScores]], ...] = (
        ("ActivationSpread", lambda r: r.spread),
        ("GradientInverter", lambda r: r.inversion),
        ("LayerDecoderProbe", lambda r: r.decoding),
    )
    rows = []
    for name, scores_of in estimators:
        for place, layer in enumerate(LAYERS):
            needs = [scores_of(r) for r in results]
            cells = [mean_sd([float(s.values[place]) for s in needs], 2)]
            cells += [mean_sd([float(s.per_class[row, place]) for s in needs], 2) for row in range(len(UNKNOWN))]
            rows.append([f"{name}, {layer}", *cells])
    return Table(
        "Needs (nats) from the three estimators: all unknown digits together, and each",
        ["estimator, layer", "all", *map(str, UNKNOWN)],
        rows,
    )


def _check_table(results: Sequence[SeedResult]) -> Table:
    rows = [
        [
            str(r.seed),
            r.advice.verdict,
            ", ".join(r.advice.layers) or "none",
            *(f"{100 * r.check[policy]:.1f}" for policy in ("head", "advised", "everything")),
            f"{r.advice.cost['parameters']:.0%}",
            f"{r.advice.cost['backward']:.0%}",
            r.null.verdict,
        ]
        for r in results
    ]
    mean = [f"{np.mean([100 * r.check[policy] for r in results]):.1f}" for policy in ("head", "advised", "everything")]
    rows.append(["mean", "", "", *mean, "", "", ""])
    return Table(
        f"The advice and its check: accuracy (%) on test digits 5-9, {N_CHECK} samples of each to retrain on",
        ["seed", "verdict", "layers to retrain", "head only", "advised", "everything", "parameters", "backward work",
         "held-out 0-4"],
        rows,
        note="The head is retrained everywhere. Parameters and backward work are shares of retraining everything. The "
        "last column is the verdict for test digits 0-4, which the network knows: it should be none.",
    )  # fmt: skip


def _sweep_table(results: Sequence[SeedResult]) -> Table:
    rows = []
    for task, policies in results[0].sweep.items():
        for budget in policies["head"]:
            rows.append(
                [
                    f"{task}, {budget} a digit",
                    *(mean_sd([100 * r.sweep[task][policy][budget] for r in results], 1) for policy in POLICIES),
                ]
            )
    return Table("Accuracy (%) on test digits by what is retrained", ["digits, samples", *POLICIES], rows)


def _claims_table(results: Sequence[SeedResult]) -> Table:
    rows = []
    for number, claim in enumerate(CLAIMS, start=1):
        word, n_held = status(claim, results)
        figure = mean_sd([claim.value(r) for r in results], 2)
        reason = f"holds in {n_held} of {len(results)}" + (f"; {claim.remark}" if claim.remark else "")
        rows.append([str(number), claim.experiment, claim.quote, claim.criterion, figure, word, reason])
    return Table(
        "Claims of the paper and what became of them",
        ["no.", "part", "the paper", "measured, and when it holds", "our figure", "result", "reason"],
        rows,
        note="Reproduced: in at least four of five runs; not reproduced: in at most one of five; else it depends.",
        wordy=True,
    )


def _digit(digit: int) -> str:
    return f"{digit} ({'known' if digit in KNOWN else 'unknown'})"


def mean_sd(values: Sequence[float] | Sequence[Floats], digits: int) -> str:
    """Write the mean over runs, and their standard deviation if there are several."""
    mean = f"{np.mean(values):.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ± {np.std(values, ddof=1):.{digits}f}"
