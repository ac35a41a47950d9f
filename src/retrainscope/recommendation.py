"""`recommend_layers`: from the scores to advice."""

import importlib.metadata
import platform
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from numbers import Real
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from retrainscope.advice import KEEP, RETRAIN, UNDECIDED, LayerAdvice, Recommendation
from retrainscope.base import LayerEstimator, check_same_shape
from retrainscope.batches import Batch, Batches, Label, as_batches, input_shapes
from retrainscope.checks import check_number
from retrainscope.choice import DEFAULT_TOLERANCE, Choice, choose
from retrainscope.exceptions import InvalidDataError, UnsupportedModelError
from retrainscope.forecast import Forecast
from retrainscope.layers import Layers
from retrainscope.lending import borrow, model_place
from retrainscope.policies import NONE
from retrainscope.scores import LayerScores
from retrainscope.spread import ActivationSpread
from retrainscope.tangent import TangentProbe

__all__ = ["DEFAULT_THRESHOLD", "advise", "combine", "recommend_layers"]

# In nats, for the spread: the rule that came nearest to the best choice on ten MNIST tasks.
DEFAULT_THRESHOLD = 0.15
_FEWEST_RANKED = 4  # layers, below which one order or another means nothing
_AS_SIZES = (
    "Note: the needs rank the layers exactly as their parameter counts do, so that they say no more than "
    "that larger layers can learn more."
)


def recommend_layers(
    model: nn.Module,
    known: Any,
    unknown: Any,
    *,
    estimators: Sequence[LayerEstimator] | None = None,
    layers: Iterable[str | type[nn.Module]] | None = None,
    head: str | None = None,
    input_layer: str | None = None,
    calls: str | None = None,
    threshold: float | None = None,
    tolerance: float | None = None,
    budget: Mapping[str, float] | None = None,
    groups: Sequence[Label] | NDArray[Any] | None = None,
    batch_size: int = 256,
    device: str | torch.device | None = None,
    random_state: int | np.random.RandomState | None = None,
    progress: bool | None = None,
) -> Recommendation:
    """Advise which layers to retrain for unknown data, and which to keep frozen.

    By default `TangentProbe` forecasts the error of retraining the head alone, each layer with it, and everything from
    a layer up; advised is the set with the fewest parameters that is forecast to be nearly as good as the best, nothing
    where the model as it is does as well, and undecided where the samples do not tell. `ActivationSpread` measures the
    same layers as a second opinion. Without labels, with one unknown class, and where a model's output is not
    one row of class scores a sample, there is no forecast, and the spread decides alone.

    Estimators that are given decide by their needs: a layer is to be retrained if the whole 90 % interval of its
    need lies above the threshold, to be kept if it lies below, and undecided otherwise; also where two estimators
    contradict each other, and where a low need tells nothing (data without labels, or of one class, measured by the
    spread).

    Parameters
    ----------
    model : nn.Module
        The trained network. It is only borrowed: afterwards it is bit for bit what it was.
    known, unknown : Tensor, array, (X, y), Dataset, DataLoader, or a re-iterable of batches
        Data that the model knows, best not its training data, and data that it does not. Of the same
        shape; at least five samples of every unknown class, better fifty. Without labels less can be said.
    estimators : sequence of unfitted LayerEstimator, optional
        Made for the same model, to decide instead of the forecast.
    layers, head, input_layer, calls
        What to measure; see `find_layers`. With `estimators`, give these to the estimators.
    threshold : float, optional
        In nats, for needs. None is 0.15.
    tolerance : float, optional
        For the forecast: how much larger the squared error of a smaller set may be than the best one's. None is 0.01.
    budget : mapping of str to float, optional
        For the forecast: the most that may be trained, as ``{"parameters": share}``, ``{"backward": share}`` or both,
        each a share of training everything as in ``Recommendation.cost``. Advised is the best set within it.
    groups : sequence of n_samples labels, optional
        For the forecast: what each sample of the unknown data is a part of (a video, a patient, a photograph), in the
        order of the data. Near copies foretell each other, so that without it too little is advised.
    batch_size, device, random_state, progress
        As in `TangentProbe`, for the default estimators. Estimators that are given keep their own.

    Returns
    -------
    Recommendation

    Raises
    ------
    InvalidDataError, LayerNotFoundError, ReusedLayerError, UnsupportedModelError
        Before any work, where model, data and layers do not fit together.

    Examples
    --------
    >>> import torch
    >>> import retrainscope as rs
    >>> _ = torch.manual_seed(0)
    >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
    >>> y = torch.arange(200) % 2
    >>> X = torch.randn(200, 4) + y[:, None]
    >>> rs.recommend_layers(model, (X[:100], y[:100]), (X[100:], y[100:]), random_state=0).layers
    ('0',)
    """
    if threshold is not None and not (isinstance(threshold, Real) and np.isfinite(threshold)):
        raise InvalidDataError(f"The 'threshold' parameter must be a finite number of nats. Got {threshold!r}.")
    if tolerance is not None:
        check_number("tolerance", tolerance, whole=False, zero=True)
    limits = _checked_budget(budget)
    chosen = (layers, head, input_layer, calls)
    if estimators is not None:
        if any(option is not None for option in chosen):
            raise InvalidDataError(
                "With estimators=, give layers, head, input_layer and calls to the estimators themselves."
            )
        if tolerance is not None or limits or groups is not None:
            raise InvalidDataError(
                "tolerance=, budget= and groups= are for the forecast. Leave them out with estimators=."
            )
        _check_estimators(estimators, model)
    home, dtype = model_place(model)
    known_batches, unknown_batches = (
        as_batches(data, name=name, batch_size=batch_size, device=home, dtype=dtype)
        for data, name in ((known, "known"), (unknown, "unknown"))
    )
    with borrow(model):
        known_first, unknown_first = known_batches.first(), unknown_batches.first()
        check_same_shape(input_shapes(known_first.inputs), unknown_first)
        _check_labels(known_first, unknown_first)
        several = estimators is None and _has_classes(unknown_batches)
    notes: list[str] = []
    probe: TangentProbe | None = None
    if estimators is None:
        options: dict[str, Any] = dict(
            zip(("layers", "head", "input_layer", "calls"), chosen, strict=True),
            batch_size=batch_size,
            device=device,
            random_state=random_state,
            progress=progress,
        )
        estimators = [ActivationSpread(model, **options)]
        if several:
            try:
                probe = TangentProbe(model, **options).fit(known)
                estimators = [probe, *estimators]
            except UnsupportedModelError as error:
                notes.append(f"There is no forecast: {error}")
        else:
            notes.append("There is no forecast, which needs unknown data with labels of at least two classes.")
        if probe is None and (limits or groups is not None):
            raise InvalidDataError(
                "budget= and groups= are for the forecast, which needs unknown data with labels of at least two "
                "classes and a model that returns one row of class scores a sample. Leave them out."
            )
    scores, found = [], []
    for estimator in estimators:
        if estimator is not probe:
            estimator.fit(known)
        found.append(estimator.layers_)
        if found[-1].names != found[0].names:
            raise InvalidDataError(
                "The estimators measure different layers: "
                f"{', '.join(found[0].names)} and {', '.join(found[-1].names)}. Give them the same layers=."
            )
        scores.append(
            probe.score_layers(unknown, groups=groups) if estimator is probe else estimator.score_layers(unknown)
        )
    settings = tuple(_settings(estimator) for estimator in estimators)
    threshold = DEFAULT_THRESHOLD if threshold is None else float(threshold)
    labels, known_labels = set(scores[0].classes), set(scores[-1].known_classes)
    novel = bool(labels - known_labels) if labels and known_labels else None
    if probe is None:
        advice = combine(scores, found[0], novel=novel, threshold=threshold, estimators=settings)
    else:
        tolerance = DEFAULT_TOLERANCE if tolerance is None else float(tolerance)
        forecast = probe.forecast_
        choice = choose(forecast, tolerance, allowed=_allowed(forecast, found[0], limits))
        advice = advise(scores, found[0], forecast, choice, novel=novel, threshold=threshold, estimators=settings)
    return replace(advice, notes=(*notes, *advice.notes))


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
    return _recommendation(
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
        threshold=threshold,
        estimators=estimators,
        versions={
            **{name: importlib.metadata.version(name) for name in ("retrainscope", "torch", "numpy", "scikit-learn")},
            "python": platform.python_version(),
        },
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


def _checked_budget(budget: Mapping[str, float] | None) -> dict[str, float]:
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


def _allowed(forecast: Forecast, layers: Layers, limits: dict[str, float]) -> NDArray[np.bool_] | None:
    """Tell which policies keep within a budget."""
    if not limits:
        return None
    costs = [_cost(layers, trained, with_head=True) for trained in forecast.trained]
    allowed = np.array([all(cost[name] <= most for name, most in limits.items()) for cost in costs])
    if not allowed.any():
        least = {name: min(cost[name] for cost in costs) for name in limits}
        raise InvalidDataError(
            f"The budget {limits} leaves nothing to train: the head alone takes "
            f"{', '.join(f'{share:.2%} of the {name}' for name, share in least.items())}. Give more."
        )
    return allowed


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


def _has_classes(batches: Batches) -> bool:
    """Tell whether data has labels of at least two classes."""
    seen: set[Label] = set()
    for batch in batches:
        seen |= set(batch.labels or ())
        if batch.labels is None or len(seen) > 1:
            break
    return len(seen) > 1


def _check_labels(known: Batch, unknown: Batch) -> None:
    """Refuse labels of different types, by which no class could be told to be novel."""
    kinds = [sorted({type(label).__name__ for label in batch.labels or ()}) for batch in (known, unknown)]
    if all(kinds) and not set(kinds[0]) & set(kinds[1]):
        raise InvalidDataError(
            f"The known labels are {' and '.join(kinds[0])}, the unknown ones {' and '.join(kinds[1])}, so it cannot "
            "be told which classes are novel. Give labels of one type."
        )


def _check_estimators(estimators: Sequence[LayerEstimator], model: nn.Module) -> None:
    if not isinstance(estimators, Sequence):
        raise InvalidDataError(
            f"The 'estimators' parameter must be a list of estimators. Got {type(estimators).__name__} instead."
        )
    if not estimators:
        raise InvalidDataError("The 'estimators' parameter is empty. Give at least one estimator, or None.")
    for estimator in estimators:
        if not isinstance(estimator, LayerEstimator):
            raise InvalidDataError(
                f"The 'estimators' parameter must hold estimators such as ActivationSpread(model). Got "
                f"{type(estimator).__name__} instead."
            )
        if estimator.model is not model:
            raise InvalidDataError(f"{type(estimator).__name__} was made for another model than the one given.")


def _settings(estimator: LayerEstimator) -> str:
    settings = {k: v for k, v in estimator.get_params(deep=False).items() if k not in ("model", "progress")}
    return f"{type(estimator).__name__}({', '.join(f'{k}={v!r}' for k, v in settings.items())})"


def _unique(names: Sequence[str]) -> list[str]:
    return [name if names.count(name) == 1 else f"{name}-{i + 1}" for i, name in enumerate(names)]


def _pair(interval: NDArray[np.float64]) -> tuple[float, float]:
    return float(interval[0]), float(interval[1])
