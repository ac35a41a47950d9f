"""What the paper printed and claimed about MNIST, its verdict as a rule, and each claim as a test.

The paper: R. D. Sharma, "Better techniques for transfer learning".
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from retrainscope.scores import LayerScores
from retrainscope.studies.mnist.experiments import KNOWN, UNKNOWN, SeedResult

__all__ = [
    "CLAIMS",
    "DECODING",
    "INVERSION",
    "PAPER_VERDICT",
    "Claim",
    "columns",
    "correlation",
    "growth_parted",
    "status",
    "verdict_margins",
]

Floats = NDArray[np.float64]

# Experiment 2, a row a digit: layer 1, layer 2, layer 2 of the untrained network.
INVERSION: Floats = np.array(
    [
        [8018.10351562, 10714.22363281, 11414.13769531],
        [5083.41992188, 7549.57910156, 8240.32128906],
        [7755.01660156, 10549.84765625, 10980.546875],
        [7366.31933594, 10222.41210938, 10769.54296875],
        [6782.44726562, 9637.2109375, 10000.38964844],
        [6271.58544922, 8856.26660156, 9862.296875],
        [7448.06396484, 10270.82226562, 10581.93261719],
        [6603.953125, 9235.93261719, 9618.20898438],
        [8119.54541016, 10832.08398438, 11293.93554688],
        [6839.11328125, 9510.26074219, 10074.81542969],
    ]
)

# Experiment 3, a row a digit: layer 1, layer 2.
DECODING: Floats = np.array(
    [
        [76.24341583, 144.20317078],
        [37.76148605, 71.99356079],
        [89.99630737, 175.07717896],
        [87.36468506, 167.58268738],
        [84.15545654, 157.71461487],
        [88.88010406, 184.75756836],
        [76.63885498, 170.90098572],
        [63.3898735, 118.9193573],
        [98.47270966, 213.88096619],
        [71.3926239, 143.69009399],
    ]
)

# Whether "we might require retraining of layer 2" for a digit, or "no retraining is required".
PAPER_VERDICT = {5: True, 6: True, 7: False, 8: True, 9: False}


def verdict_margins(layer_1: Floats, layer_2: Floats) -> dict[int, float]:
    """Apply the paper's verdict on layer 2 as a rule to the decoders' errors.

    The paper gives two reasons for retraining layer 2 for a digit: its error there is "higher than known
    patterns", and it overtakes digits that it was below in layer 1. So layer 2 needs retraining for a digit if

    - its error at layer 2 is above that of the typical known digit, the median of 0-4, and
    - its error grows more from layer 1 to layer 2 than that of every known digit.

    Parameters
    ----------
    layer_1, layer_2 : ndarray of shape (10,)
        Squared error of each digit.

    Returns
    -------
    dict of digit to float
        The smaller of the two log ratios that the rule compares with 0; positive: retrain layer 2.
    """
    known = list(KNOWN)
    growth = np.log(layer_2 / layer_1)
    level = np.log(layer_2 / np.median(layer_2[known]))
    return {digit: float(min(level[digit], growth[digit] - growth[known].max())) for digit in UNKNOWN}


def growth_parted(layer_1: Floats, layer_2: Floats) -> float:
    """Return by how much the least growth of 5, 6, 8 exceeds the greatest of 7 and 9, in nats."""
    growth = np.log(layer_2 / layer_1)
    needy = [digit for digit, needs in PAPER_VERDICT.items() if needs]
    others = [digit for digit, needs in PAPER_VERDICT.items() if not needs]
    return float(growth[needy].min() - growth[others].max())


def columns(scores: LayerScores, *, reference: bool = False) -> dict[str, Floats]:
    """Return the raw measure of all ten digits by layer, or that at the reference."""
    if reference:
        stacked = np.concatenate([scores.known_per_class_reference, scores.unknown_per_class_reference])
    else:
        stacked = np.concatenate([scores.known_per_class, scores.unknown_per_class])
    return {layer: stacked[:, place] for place, layer in enumerate(scores.layers)}


def correlation(a: Floats, b: Floats) -> float:
    """Return Pearson's correlation."""
    return float(np.corrcoef(a, b)[0, 1])


@dataclass(frozen=True)
class Claim:
    """A claim of the paper as a test.

    Attributes
    ----------
    experiment : str
    quote : str
        The paper's words or numbers.
    criterion : str
        What is measured, and when the claim holds.
    value : callable (SeedResult) -> float
        The measured figure.
    holds : callable (float) -> bool
    remark : str
        Why, where the figures alone do not tell.
    """

    experiment: str
    quote: str
    criterion: str
    value: Callable[[SeedResult], float]
    holds: Callable[[float], bool]
    remark: str = ""


def status(claim: Claim, results: Sequence[SeedResult]) -> tuple[str, int]:
    """Say whether a claim was reproduced, and in how many runs it held: in four of five, or one of five."""
    n_held = sum(claim.holds(claim.value(result)) for result in results)
    share = n_held / len(results)
    word = "reproduced" if share >= 0.8 else "not reproduced" if share <= 0.2 else "depends"
    return word, n_held


def _positive(value: float) -> bool:
    return value > 0


def _like_the_paper(value: float) -> bool:
    return value >= 0.85


def _least_growth(scores: LayerScores) -> float:
    errors = columns(scores)
    return float(np.log(errors["conv2"] / errors["conv1"]).min())


def _known_share_above(scores: LayerScores, layer: str) -> float:
    """Return how often an unknown digit's error is above a known one's: 0.5 tells nothing, 1 parts them."""
    errors = columns(scores)[layer]
    return float(np.mean(errors[list(UNKNOWN)][:, None] > errors[list(KNOWN)][None, :]))


def _margin(result: SeedResult, digits: Sequence[int], sign: int) -> float:
    errors = columns(result.decoding)
    margins = verdict_margins(errors["conv1"], errors["conv2"])
    return min(sign * margins[digit] for digit in digits)


def _inversion_correlation(column: int, layer: str, control: bool) -> Callable[[SeedResult], float]:
    return lambda r: correlation(INVERSION[:, column], columns(r.inversion, reference=control)[layer])


def _decoding_correlation(column: int, layer: str) -> Callable[[SeedResult], float]:
    return lambda r: correlation(DECODING[:, column], columns(r.decoding)[layer])


def _overtaking(result: SeedResult) -> float:
    errors = columns(result.decoding)
    lead_1 = errors["conv1"] / errors["conv1"][6] - 1
    lead_2 = errors["conv2"] / errors["conv2"][6] - 1
    return float(min(lead_1[3], lead_1[4], -lead_2[3], -lead_2[4]))


def _conv2_spread(result: SeedResult, digit: int) -> float:
    place = result.spread.layers.index("conv2")
    return float(result.spread.unknown_per_class[result.spread.classes.index(digit), place])


def _largest_budget_gain(result: SeedResult, task: str, better: str, worse: str) -> float:
    accuracies = result.sweep[task]
    budget = max(accuracies[better])
    return 100 * (accuracies[better][budget] - accuracies[worse][budget])


def _rank_agreement(result: SeedResult) -> float:
    spreads = [_conv2_spread(result, digit) for digit in UNKNOWN]
    errors = columns(result.decoding)["conv2"][list(UNKNOWN)]
    ranks = [np.argsort(np.argsort(values)).astype(np.float64) for values in (spreads, errors)]
    return correlation(*ranks)  # of ranks: Spearman's


CLAIMS: tuple[Claim, ...] = (
    Claim(
        "experiment 1",
        "for known patterns activations are pretty much clustered but for unknown patterns activations are more spread",
        "spread at conv 2: log ratio unknown to known digits > 0",
        lambda r: float(np.log(r.spread.unknown[1] / r.spread.known[1])),
        _positive,
    ),
    Claim(
        "experiment 1",
        "as we go deep layer wise for unknown patterns their clustering is becoming more spreaded",
        "spread of the unknown digits: that at conv 2 less that at conv 1 > 0",
        lambda r: float(r.spread.unknown[1] - r.spread.unknown[0]),
        _positive,
        "the spread falls with depth for all digits, less for unknown ones: their need grows, see the table of needs",
    ),
    Claim(
        "experiment 1",
        "digit 8 is highly spread whereas for digit 9 and digit 7 they are still clustered",
        "spread at conv 2: that of 8 less the larger of 7 and 9 > 0",
        lambda r: _conv2_spread(r, 8) - max(_conv2_spread(r, 7), _conv2_spread(r, 9)),
        _positive,
        "the raw spread, as in a map",
    ),
    Claim(
        "experiment 1",
        "network is associating digit 8 with known pattern digit 0",
        "the known digit whose mean at conv 2 is nearest to that of 8 is 0 (1: yes, 0: no)",
        lambda r: float(r.neighbours["conv2"][8] == 0),
        lambda value: value == 1,
    ),
    Claim(
        "experiment 2",
        "as depth is increasing error is increasing",
        "least log ratio of conv 2 to conv 1 over the ten digits > 0",
        lambda r: _least_growth(r.inversion),
        _positive,
    ),
    Claim(
        "experiment 2",
        "these results does not differentiate between known and unknown patterns",
        "share of pairs with the unknown digit's error above the known one's at conv 2, within 0.25 to 0.75",
        lambda r: _known_share_above(r.inversion, "conv2"),
        lambda value: 0.25 <= value <= 0.75,
    ),
    Claim(
        "experiment 2",
        "reconstruction error for fully random layer 2 and trained layer are similar",
        "ratio untrained to trained at conv 2, within 0.8 to 1.25 (in the paper 1.06)",
        lambda r: float(columns(r.inversion, reference=True)["conv2"].mean() / columns(r.inversion)["conv2"].mean()),
        lambda value: 0.8 <= value <= 1.25,
    ),
    *(
        Claim(
            "experiment 2",
            f"table 1, column {place + 1}: error at {name}",
            "Pearson correlation with our column over the ten digits >= 0.85",
            _inversion_correlation(place, layer, control),
            _like_the_paper,
            "compare what brightness alone gives, under the table",
        )
        for place, (name, layer, control) in enumerate(
            (("layer 1", "conv1", False), ("layer 2", "conv2", False), ("layer 2, untrained", "conv2", True))
        )
    ),
    *(
        Claim(
            "experiment 3",
            f"table 2, column {place + 1}: error at layer {place + 1}",
            "Pearson correlation with our column over the ten digits >= 0.85",
            _decoding_correlation(place, layer),
            _like_the_paper,
            "compare what brightness alone gives, under the table",
        )
        for place, layer in enumerate(("conv1", "conv2"))
    ),
    Claim(
        "experiment 3",
        "as depth is increasing reconstruction error is also increasing",
        "least log ratio of conv 2 to conv 1 over the ten digits > 0",
        lambda r: _least_growth(r.decoding),
        _positive,
    ),
    Claim(
        "experiment 3",
        "in layer 1 reconstruction error of digits 3 and 4 is greater than digit 6, whereas in layer 2 it is "
        "vice versa",
        "the least of these four differences, as a share of digit 6's error, > 0",
        _overtaking,
        _positive,
    ),
    Claim(
        "experiment 3",
        "for digits 5,6 and 8 we might require retraining of layer 2",
        "least margin of the verdict's rule over 5, 6, 8 (nats) > 0",
        lambda r: _margin(r, (5, 6, 8), 1),
        _positive,
    ),
    Claim(
        "experiment 3",
        "for digits 7 and 9 no retraining is required",
        "least margin of the rule against retraining over 7 and 9 (nats) > 0",
        lambda r: _margin(r, (7, 9), -1),
        _positive,
    ),
    Claim(
        "experiment 3",
        "(derived from both) the errors of 5, 6 and 8 grow more from layer 1 to layer 2 than those of 7 and 9",
        "least growth of 5, 6, 8 less the greatest of 7, 9 (nats) > 0",
        lambda r: growth_parted(columns(r.decoding)["conv1"], columns(r.decoding)["conv2"]),
        _positive,
    ),
    Claim(
        "experiment 3",
        "high reconstruction error for digit 8 shows that digit 8 will certainly need more retraining",
        "error of 8 at conv 2 less the largest of the others, as a share > 0",
        lambda r: float(1 - np.delete(columns(r.decoding)["conv2"], 8).max() / columns(r.decoding)["conv2"][8]),
        _positive,
    ),
    Claim(
        "experiment 3",
        "Higher reconstruction error for digit 5,6 and 8 is consistent with clustering results",
        "Spearman correlation of spread and decoder's error over 5-9 at conv 2 >= 0.5",
        _rank_agreement,
        lambda value: value >= 0.5,
    ),
    Claim(
        "conclusion",
        "Autoencoder based networks gave best results",
        "share of pairs with the unknown digit's error above the known one's at conv 2: decoders less inversion > 0",
        lambda r: _known_share_above(r.decoding, "conv2") - _known_share_above(r.inversion, "conv2"),
        _positive,
    ),
    Claim(
        "conclusion",
        "layer 1 does not need further retraining",
        "all ten digits: gain of also retraining conv 1 (points of accuracy) < 0.5",
        lambda r: _largest_budget_gain(r, "0-9", "everything", "head + fc1 + conv2"),
        lambda value: value < 0.5,
        "retrained, not inferred: the paper never did",
    ),
    Claim(
        "conclusion",
        "but layer 2 may need some",
        "all ten digits: gain of retraining conv 2 on top of fc1 and the head (points) >= 0.5",
        lambda r: _largest_budget_gain(r, "0-9", "head + fc1 + conv2", "head + fc1"),
        lambda value: value >= 0.5,
    ),
    Claim(
        "conclusion",
        "for some unknown patterns we may not need retraining at all",
        "least gain of retraining fc1 on top of the head over the unknown digits (points) < 0.5",
        lambda r: min(_largest_budget_gain(r, f"0-4 and {d}", "head + fc1", "head") for d in UNKNOWN),
        lambda value: value < 0.5,
    ),
)
