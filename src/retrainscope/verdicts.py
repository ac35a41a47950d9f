"""From scores, or a forecast and what it speaks for, to a `Recommendation`."""

import importlib.metadata
import platform
from collections.abc import Mapping, Sequence
from dataclasses import replace
from numbers import Real

import numpy as np
from numpy.typing import NDArray

from retrainscope.advice import KEEP, RETRAIN, UNDECIDED, LayerAdvice, Recommendation
from retrainscope.choice import Choice
from retrainscope.exceptions import InvalidDataError
from retrainscope.forecast import Forecast
from retrainscope.layers import Layers
from retrainscope.policies import NONE
from retrainscope.scores import LayerScores

__all__ = ["advise", "allowed_policies", "check_affordable", "checked_budget", "combine"]

_FEWEST_RANKED = 4  # layers, below which one order or another means nothing
_AS_SIZES = (
    "Note: the needs rank the layers exactly as their parameter counts do, so that they say no more than "
    "that larger layers can learn more."
)


def combine(
    scores: Sequence[LayerScores],
    layers: Layers,
    *,
    novel: bool | None,
    threshold: float,
    estimators: tuple[str, ...] = (),
) -> Recommendation:
    """Turn scores into advice.

    Parameters
    ----------
    scores : sequence of LayerScores
        Of the same layers; one an estimator.
    layers : Layers
        What each layer owns.
    novel : bool or None
        Whether the unknown data has classes that the known data lacks; None without labels.
    threshold : float
        In nats.
    estimators : tuple of str
        Their settings, to be kept with the result.

    Returns
    -------
    Recommendation
    """
    needs, intervals = _pooled([s.values for s in scores], [s.interval for s in scores])
    one_sided = all(s.one_sided for s in scores)
    verdicts = []
    for place, interval in enumerate(intervals):
        single = {_verdict(s.interval[place], threshold) for s in scores}
        verdict = UNDECIDED if {KEEP, RETRAIN} <= single else _verdict(interval, threshold)
        verdicts.append(UNDECIDED if verdict == KEEP and one_sided else verdict)
    if novel or RETRAIN in verdicts:
        head_verdict = RETRAIN
    elif novel is None or UNDECIDED in verdicts:
        head_verdict = UNDECIDED
    else:
        head_verdict = KEEP
    advice = _recommendation(
        scores,
        layers,
        verdicts=verdicts,
        head_verdict=head_verdict,
        verdict=_whole_verdict(verdicts, novel),
        needs=needs,
        intervals=intervals,
        threshold=threshold,
        estimators=estimators,
        judged=scores,
    )
    return replace(advice, reason=_reason(advice, one_sided)) if advice.verdict == UNDECIDED else advice


def advise(
    scores: Sequence[LayerScores],
    layers: Layers,
    forecast: Forecast,
    choice: Choice,
    *,
    novel: bool | None,
    threshold: float,
    estimators: tuple[str, ...] = (),
) -> Recommendation:
    """Turn what a forecast speaks for into advice.

    Parameters
    ----------
    scores : sequence of LayerScores
        First those of the forecast, then others of the same layers.
    layers : Layers
        What each layer owns.
    forecast : Forecast
    choice : Choice
    novel : bool or None
        Whether the unknown data has classes that the known data lacks; None if that cannot be told.
    threshold : float
        In nats, for the agreement of the estimators.
    estimators : tuple of str
        Their settings, to be kept with the result.

    Returns
    -------
    Recommendation
    """
    if choice.policy is None:
        verdicts = [UNDECIDED] * len(layers.names)
        head_verdict, verdict = RETRAIN if novel else UNDECIDED, UNDECIDED
    else:
        trained = forecast.trained[forecast.row_of(choice.policy)]
        verdicts = [RETRAIN if name in trained else KEEP for name in layers.names]
        head_verdict = KEEP if choice.policy == NONE else RETRAIN
        verdict = NONE if choice.policy == NONE else _whole_verdict(verdicts, True)
    advice = _recommendation(
        scores,
        layers,
        verdicts=verdicts,
        head_verdict=head_verdict,
        verdict=verdict,
        needs=scores[0].values,
        intervals=scores[0].interval,
        threshold=threshold,
        estimators=estimators,
        judged=scores[1:],
    )
    notes = (_AS_SIZES,) if _ranks_as_sizes(scores[0], layers) else ()
    return replace(advice, forecast=forecast, reason=choice.reason, notes=notes)


def _recommendation(
    scores: Sequence[LayerScores],
    layers: Layers,
    *,
    verdicts: Sequence[str],
    head_verdict: str,
    verdict: str,
    needs: NDArray[np.float64],
    intervals: NDArray[np.float64],
    threshold: float,
    estimators: tuple[str, ...],
    judged: Sequence[LayerScores],
) -> Recommendation:
    """Put the table together; agreement is that of the scores that are judged."""
    names = _unique([s.estimator for s in scores])
    total = sum(layers.n_parameters.values())
    retrained = tuple(name for name, word in zip(layers.names, verdicts, strict=True) if word == RETRAIN)

    def advice(name: str, word: str, place: int | None) -> LayerAdvice:
        measured = [] if place is None else list(zip(names, scores, strict=True))
        single = [] if place is None else [_verdict(s.interval[place], threshold) for s in judged]
        return LayerAdvice(
            name=name,
            verdict=word,
            need=np.nan if place is None else float(needs[place]),
            interval=(np.nan, np.nan) if place is None else _pair(intervals[place]),
            needs={n: float(s.values[place]) for n, s in measured},
            intervals={n: _pair(s.interval[place]) for n, s in measured},
            n_parameters=layers.n_parameters[name],
            share=layers.n_parameters[name] / total,
            parameters=layers.parameters[name],
            buffers=layers.buffers[name],
            agreement=float(np.mean([one == word for one in single])) if single and word != UNDECIDED else np.nan,
        )

    classes = max((s.classes for s in scores), key=len)
    split = [s for s in scores if s.classes == classes]  # some tell classes apart only where the known data has labels
    _, class_intervals = _pooled([s.per_class for s in split], [s.per_class_interval for s in split])
    return Recommendation(
        layers=retrained,
        head=advice(layers.head, head_verdict, None),
        verdict=verdict,
        per_class={
            label: tuple(
                name
                for name, interval in zip(layers.names, class_intervals[row], strict=True)
                if _verdict(interval, threshold) == RETRAIN
            )
            for row, label in enumerate(classes)
        },
        table=tuple(
            advice(name, word, place) for place, (name, word) in enumerate(zip(layers.names, verdicts, strict=True))
        ),
        scores=tuple(scores),
        cost=_cost(layers, retrained, with_head=head_verdict == RETRAIN),
        head_cost=_cost(layers, (), with_head=True),
        threshold=threshold,
        estimators=estimators,
        versions={
            **{name: importlib.metadata.version(name) for name in ("retrainscope", "torch", "numpy", "scikit-learn")},
            "python": platform.python_version(),
        },
    )


def _reason(advice: Recommendation, one_sided: bool) -> str:
    """Say why needs leave it undecided, and what helps."""
    threshold = advice.threshold
    contradicted = [
        row.name
        for row in advice.table
        if {KEEP, RETRAIN} <= {_verdict(np.array(interval), threshold) for interval in row.intervals.values()}
    ]
    if contradicted:
        return (
            f"The estimators contradict each other on {', '.join(contradicted)} (the table has the need by each), "
            "which more samples do not settle: they ask different questions. Decide by one of them, or try it out."
        )
    if one_sided and all(row.interval[1] < threshold for row in advice.table):
        return (
            "No layer's need is high, but where nothing tells two classes apart a low one does not show that a layer "
            "can be kept. Give labels of at least two classes on both sides, a few samples of each, or try it out."
        )
    return (
        "No layer's need is clearly above the threshold and at least one may be: give more samples (an interval takes "
        "at least four of every class), or try the layers marked undecided."
    )


def _verdict(interval: NDArray[np.float64], threshold: float) -> str:
    low, high = interval
    if low > threshold:
        return RETRAIN
    return KEEP if high < threshold else UNDECIDED


def _whole_verdict(verdicts: Sequence[str], novel: bool | None) -> str:
    """Name the region of the network that the layers to retrain lie in: all from one up, or by their mean place."""
    places = [place for place, verdict in enumerate(verdicts) if verdict == RETRAIN]
    if not places:
        return UNDECIDED if UNDECIDED in verdicts else "head" if novel else "none"
    if len(places) == len(verdicts):
        return "all"
    if places == [*range(places[0], len(verdicts))]:
        return "upper"
    middle = float(np.mean(places)) / (len(verdicts) - 1)
    return "lower" if middle < 1 / 3 else "upper" if middle > 2 / 3 else "middle"


def _cost(layers: Layers, retrained: tuple[str, ...], *, with_head: bool) -> dict[str, float]:
    """Compare parameters and backward work with training everything.

    Backward, every trained layer costs its forward work once for its weights, and every layer above the
    lowest trained one once more for the gradient that passes through it.
    """
    order = [*layers.names, layers.head]
    trained = set(retrained) | ({layers.head} if with_head else set())

    def backward(chosen: set[str]) -> int:
        places = [place for place, name in enumerate(order) if name in chosen]
        weights = sum(layers.flops[name] for name in chosen)
        return weights + sum(layers.flops[name] for name in order[min(places) + 1 :]) if places else 0

    everything = set(order)
    return {
        "parameters": sum(layers.n_parameters[name] for name in trained) / sum(layers.n_parameters.values()),
        "backward": backward(trained) / max(1, backward(everything)),
    }


def checked_budget(budget: Mapping[str, float] | None) -> dict[str, float]:
    """Return the limits of a budget, each a share of training everything; none for None."""
    if budget is None:
        return {}
    if not isinstance(budget, Mapping) or not budget or set(budget) - {"parameters", "backward"}:
        raise InvalidDataError(
            "The 'budget' parameter must be a mapping with 'parameters', 'backward' or both, such as "
            f"{{'parameters': 0.2}}. Got {budget!r} instead."
        )
    for name, share in budget.items():
        if not (isinstance(share, Real) and not isinstance(share, bool) and 0 < share <= 1):
            raise InvalidDataError(
                f"The budget for {name!r} must be a share of training everything, above 0 and at most 1. Got {share!r}."
            )
    return {name: float(share) for name, share in budget.items()}


def allowed_policies(forecast: Forecast, layers: Layers, limits: dict[str, float]) -> NDArray[np.bool_] | None:
    """Tell which policies keep within a budget."""
    if not limits:
        return None
    costs = [_cost(layers, trained, with_head=True) for trained in forecast.trained]
    return np.array([all(cost[name] <= most for name, most in limits.items()) for cost in costs])


def check_affordable(layers: Layers, limits: dict[str, float]) -> None:
    """Refuse a budget that is less than the head alone takes."""
    least = _cost(layers, (), with_head=True)
    if any(least[name] > most for name, most in limits.items()):
        told = {"parameters": "parameters", "backward": "backward work"}
        raise InvalidDataError(
            f"The budget {limits} leaves nothing to train: the head alone takes "
            f"{', '.join(f'{least[name]:.2%} of the {told[name]}' for name in limits)}. Give more."
        )


def _ranks_as_sizes(scores: LayerScores, layers: Layers) -> bool:
    """Tell whether the needs put the layers in the same order as their parameter counts."""
    sizes = np.array([layers.n_parameters[name] for name in scores.layers])
    if len(sizes) < _FEWEST_RANKED or len(set(sizes.tolist())) < len(sizes):
        return False
    return bool((np.argsort(scores.values) == np.argsort(sizes)).all())


def _pooled(
    needs: Sequence[NDArray[np.float64]], intervals: Sequence[NDArray[np.float64]]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Average over the estimators, the surer ones weighing more; an estimator without a value has no say."""
    stacked = np.concatenate([np.stack(needs)[..., None], np.stack(intervals)], axis=-1)
    width = np.maximum(stacked[..., 2] - stacked[..., 1], 1e-6)
    there = np.isfinite(stacked).all(axis=-1)
    weights = np.where(there, 1 / np.square(width), 0)[..., None]
    with np.errstate(invalid="ignore"):
        pooled = (weights * np.where(there[..., None], stacked, 0)).sum(axis=0) / weights.sum(axis=0)
    return pooled[..., 0], pooled[..., 1:]


def _unique(names: Sequence[str]) -> list[str]:
    return [name if names.count(name) == 1 else f"{name}-{i + 1}" for i, name in enumerate(names)]


def _pair(interval: NDArray[np.float64]) -> tuple[float, float]:
    return float(interval[0]), float(interval[1])
