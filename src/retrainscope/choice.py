"""From a forecast to one policy, or to the answer that the data does not decide it."""

from collections.abc import Iterator, Set
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from retrainscope.batches import Label
from retrainscope.drawing import MOST_SAMPLES
from retrainscope.forecast import Forecast
from retrainscope.policies import NONE
from retrainscope.scores import CONFIDENCE, TAILS
from retrainscope.trials import LayerSweep

__all__ = ["DEFAULT_TOLERANCE", "LEAST_SAMPLES", "Choice", "choose", "confirm", "remarks"]

# Chosen on the tuning tasks of the benchmark; see docs/advice.md.
DEFAULT_TOLERANCE = 0.01  # of the squared error: a smaller set that is no worse than that is good enough
_DOUBTFUL = 0.02  # of the squared error: what the choice must not leave lying beyond the tolerance
_WORTH = 0.02  # of accuracy: what retraining must gain on the model as it is
_MANY_SAMPLES = 50  # of a class, as many as the forecast takes by default
LEAST_SAMPLES = 5  # of a class; of samples in groups, groups


@dataclass(frozen=True)
class Choice:
    """What a forecast speaks for.

    Attributes
    ----------
    policy : str or None
        None where the forecast does not decide it.
    reason : str
        Why not, in a sentence; else empty.
    """

    policy: str | None
    reason: str = ""


def choose(forecast: Forecast, tolerance: float, *, allowed: NDArray[np.bool_] | None = None) -> Choice:
    """Choose the policy that trains the fewest parameters among those forecast to be nearly as good as the best.

    Parameters
    ----------
    forecast : Forecast
    tolerance : float
        How much larger its squared error may be than the best one's.
    allowed : ndarray of shape (n_policies,), bool, optional
        The policies to choose from.

    Returns
    -------
    Choice
        ``"none"`` where the model as it is does as well as what would be chosen, and as well as on the known data;
        undecided where a class has too few samples, where nothing is forecast to be learnt, and where chance in the
        samples may have made the choice.
    """
    if forecast.smallest_class < LEAST_SAMPLES:
        samples = "sample" if forecast.smallest_class == 1 else "samples"
        return Choice(
            None,
            f"A class of the unknown data has {forecast.smallest_class} independent {samples}; at least "
            f"{LEAST_SAMPLES} of every class are needed for a forecast, better fifty.",
        )
    policy = forecast.best_within(tolerance, allowed=allowed)
    row = forecast.row_of(policy)
    low, high = TAILS
    if NONE in forecast.policies:
        none = forecast.row_of(NONE)
        gains = forecast.accuracy_draws[:, row] - forecast.accuracy_draws[:, none]
        small = forecast.accuracy[row] - forecast.accuracy[none] <= _WORTH or np.quantile(gains, low) <= 0
        # A model that does worse than on what it knows lacks something, whatever the forecast can see of it.
        among_all = forecast.accuracy_draws[:, none] - forecast.drawing_gain
        worse = np.quantile(among_all, high) < forecast.known_accuracy - _WORTH
        if small and not worse:
            policy, row = NONE, none
    # By luck the best of several policies may name more classes than chance does; its error is then seldom lower too.
    lucky = policy != NONE and np.quantile(forecast.draws[:, row], high) >= forecast.chance_error
    if lucky or np.quantile(forecast.accuracy_draws[:, row], low) <= forecast.chance:
        return Choice(
            None,
            "By no policy are the classes forecast to be told apart better than by chance "
            f"({forecast.chance:.0%}). Give more samples, and check the labels.",
        )
    if policy == NONE:
        return Choice(NONE)
    doubt = forecast.doubt(policy, tolerance + _DOUBTFUL, allowed=allowed)
    if doubt > 1 - CONFIDENCE:
        return Choice(
            None,
            f"The forecasts of the policies are too uncertain to choose between them ({forecast.n_samples} samples; "
            f"{policy} is nearest). {_what_helps(forecast)}",
        )
    return Choice(policy)


def _what_helps(forecast: Forecast) -> str:
    if forecast.smallest_class < min(_MANY_SAMPLES, MOST_SAMPLES // forecast.n_classes):
        return "Give more samples, better fifty of every class."
    return "It looks at no more samples than that: give a larger tolerance=, or try the policies out by sweep_layers."


def remarks(forecast: Forecast, labels: Set[Label], known: Set[Label], *, known_chance: float) -> Iterator[str]:
    """Yield what is to be known of the data and the labels that a forecast is of.

    Parameters
    ----------
    forecast : Forecast
    labels, known : set of labels
        All of the unknown and of the known data.
    known_chance : float
        The accuracy of always naming the largest known class; NaN without labels.
    """
    if forecast.n_classes < len(labels):
        yield f"The forecast is of {forecast.n_classes} of the {len(labels)} unknown classes, drawn at random."
    if forecast.n_copies:
        yield (
            f"Of the {forecast.n_samples} unknown samples that the forecast is of, {forecast.n_copies} have the inputs "
            "of another one, as where a loader draws with replacement. They count as one with it, unless groups= says "
            "otherwise."
        )
    if labels <= known and NONE not in forecast.policies:
        yield (
            "The model could not be judged as it is, since the labels are not the places of its outputs (whole numbers "
            "from 0); so the answer is never to leave it as it is."
        )
    if forecast.known_accuracy <= known_chance:
        yield (
            f"By the labels the model gets {forecast.known_accuracy:.1%} of the known data right, no more than by "
            "chance. See that the labels are the places of its outputs, and that it is trained."
        )


def confirm(choice: Choice, sweep: LayerSweep) -> Choice:
    """Keep a choice unless another policy was clearly better when both were tried.

    Parameters
    ----------
    choice : Choice
        Of a policy that the sweep tried.
    sweep : LayerSweep

    Returns
    -------
    Choice
        Of those whose gain in accuracy has its whole 90 % interval above 0 the best; of equal ones the smallest. Where
        the training of the choice diverged, the learning rates were wrong, and nothing is said against it.
    """
    assert choice.policy is not None
    own = sweep.draws[:, [sweep.row_of(choice.policy)]]
    if np.isnan(own).all():
        return choice
    draws = np.nan_to_num(sweep.draws, nan=-1.0)  # diverged: worse than all others
    gains = draws - np.nan_to_num(own, nan=-1.0)
    better = np.flatnonzero(np.quantile(gains, TAILS[0], axis=0) > 0)
    best = max(better, key=lambda row: (gains[:, row].mean(), -sweep.share(sweep.policies[row])), default=None)
    return choice if best is None else Choice(sweep.policies[best])
