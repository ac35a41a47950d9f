"""`recommend_layers`: from the scores to advice."""

import importlib.metadata
import platform
from collections.abc import Iterable, Sequence
from numbers import Real
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from retrainscope.advice import KEEP, RETRAIN, UNDECIDED, LayerAdvice, Recommendation
from retrainscope.base import LayerEstimator, check_same_shape
from retrainscope.batches import Batch, as_batches, input_shapes
from retrainscope.exceptions import InvalidDataError
from retrainscope.layers import Layers
from retrainscope.lending import borrow, model_place
from retrainscope.scores import LayerScores
from retrainscope.spread import ActivationSpread

__all__ = ["DEFAULT_THRESHOLD", "combine", "recommend_layers"]

# In nats, for the spread: the rule that came nearest to the best choice on ten MNIST tasks.
DEFAULT_THRESHOLD = 0.15


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
    batch_size: int = 256,
    device: str | torch.device | None = None,
    random_state: int | np.random.RandomState | None = None,
    progress: bool | None = None,
) -> Recommendation:
    """Advise which layers to retrain for unknown data, and which to keep frozen.

    A layer is to be retrained if the whole 90 % interval of its need lies above the threshold, to be kept if
    it lies below, and undecided otherwise; also where two estimators contradict each other, and where a low
    need tells nothing (data without labels, or of one class, measured by the spread alone).

    Parameters
    ----------
    model : nn.Module
        The trained network. It is only borrowed: afterwards it is bit for bit what it was.
    known, unknown : Tensor, array, (X, y), Dataset, DataLoader, or a re-iterable of batches
        Data that the model knows, best not its training data, and data that it does not. Of the same
        shape; at least two samples of every class, four for an interval (below that the verdict is
        undecided), better fifty. Without labels less can be said.
    estimators : sequence of unfitted LayerEstimator, optional
        Made for the same model. None measures with `ActivationSpread` alone, which is fast.
    layers, head, input_layer, calls
        What to measure; see `find_layers`. With `estimators`, give these to the estimators.
    threshold : float, optional
        In nats. None is 0.15.
    batch_size, device, random_state, progress
        As in `ActivationSpread`, for the default estimator. Estimators that are given keep their own.

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
    ()
    """
    if threshold is not None and not (isinstance(threshold, Real) and np.isfinite(threshold)):
        raise InvalidDataError(f"The 'threshold' parameter must be a finite number of nats. Got {threshold!r}.")
    if estimators is None:
        estimators = [
            ActivationSpread(
                model,
                layers=layers,
                head=head,
                input_layer=input_layer,
                calls=calls,
                batch_size=batch_size,
                device=device,
                random_state=random_state,
                progress=progress,
            )
        ]
    elif any(option is not None for option in (layers, head, input_layer, calls)):
        raise InvalidDataError(
            "With estimators=, give layers, head, input_layer and calls to the estimators themselves."
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
    scores, found = [], []
    for estimator in estimators:
        estimator.fit(known)
        found.append(estimator.layers_)
        if found[-1].names != found[0].names:
            raise InvalidDataError(
                "The estimators measure different layers: "
                f"{', '.join(found[0].names)} and {', '.join(found[-1].names)}. Give them the same layers=."
            )
        scores.append(estimator.score_layers(unknown))
    labels = set(scores[0].classes)
    return combine(
        scores,
        found[0],
        novel=bool(labels - set(scores[0].known_classes)) if labels else None,
        threshold=DEFAULT_THRESHOLD if threshold is None else float(threshold),
        estimators=tuple(_settings(estimator) for estimator in estimators),
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
    retrained = tuple(name for name, verdict in zip(layers.names, verdicts, strict=True) if verdict == RETRAIN)
    names = _unique([s.estimator for s in scores])
    total = sum(layers.n_parameters.values())

    def advice(name: str, verdict: str, place: int | None) -> LayerAdvice:
        measured = [] if place is None else list(zip(names, scores, strict=True))
        return LayerAdvice(
            name=name,
            verdict=verdict,
            need=np.nan if place is None else float(needs[place]),
            interval=(np.nan, np.nan) if place is None else _pair(intervals[place]),
            needs={n: float(s.values[place]) for n, s in measured},
            intervals={n: _pair(s.interval[place]) for n, s in measured},
            n_parameters=layers.n_parameters[name],
            share=layers.n_parameters[name] / total,
            parameters=layers.parameters[name],
            buffers=layers.buffers[name],
        )

    if novel or retrained:
        head_verdict = RETRAIN
    elif novel is None or UNDECIDED in verdicts:
        head_verdict = UNDECIDED
    else:
        head_verdict = KEEP
    head = advice(layers.head, head_verdict, None)
    classes = scores[0].classes
    _, class_intervals = _pooled([s.per_class for s in scores], [s.per_class_interval for s in scores])
    return Recommendation(
        layers=retrained,
        head=head,
        verdict=_whole_verdict(verdicts, novel),
        per_class={
            label: tuple(
                name
                for name, interval in zip(layers.names, class_intervals[row], strict=True)
                if _verdict(interval, threshold) == RETRAIN
            )
            for row, label in enumerate(classes)
        },
        table=tuple(
            advice(name, verdict, place)
            for place, (name, verdict) in enumerate(zip(layers.names, verdicts, strict=True))
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
    """Name the region of the network that the layers to retrain lie in, by their mean place."""
    places = [place for place, verdict in enumerate(verdicts) if verdict == RETRAIN]
    if not places:
        return UNDECIDED if UNDECIDED in verdicts else "head" if novel else "none"
    if len(places) == len(verdicts):
        return "all"
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
