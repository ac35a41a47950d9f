"""`recommend_layers`: from the scores to advice."""

import importlib.metadata
import platform
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from retrainscope.base import LayerEstimator, check_same_shape
from retrainscope.batches import Batches, Label, as_batches, input_shapes
from retrainscope.exceptions import InvalidDataError
from retrainscope.layers import Layers
from retrainscope.saving import import_pandas, load_json, save_json
from retrainscope.scores import LayerScores
from retrainscope.spread import ActivationSpread
from retrainscope.tables import html_table, interval_text, number_text, text_table
from retrainscope.tracing import borrow, model_place

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["DEFAULT_THRESHOLD", "LayerAdvice", "Recommendation", "recommend_layers"]

# In nats, for the spread: the rule that came nearest to the best choice on ten MNIST tasks.
DEFAULT_THRESHOLD = 0.15

KEEP, RETRAIN, UNDECIDED = "keep", "retrain", "undecided"


@dataclass(frozen=True)
class LayerAdvice:
    """The advice for one layer, or for the head.

    Attributes
    ----------
    name : str
    verdict : str
        ``"keep"``, ``"retrain"`` or ``"undecided"``.
    need : float
        Mean of the estimators' needs, in nats, each weighted by one over its interval's squared width, so that
        an estimator counts less where it is less sure. NaN for the head, which is not measured.
    interval : tuple of (float, float)
        The same mean of the estimators' 90 % intervals.
    needs : dict of str to float
        Need by estimator.
    intervals : dict of str to tuple
        Interval by estimator.
    n_parameters : int
        Scalars in the parameters it owns.
    share : float
        That number as a share of all parameters that are used.
    parameters, buffers : tuple of str
        The names of what it owns.
    """

    name: str
    verdict: str
    need: float
    interval: tuple[float, float]
    needs: dict[str, float]
    intervals: dict[str, tuple[float, float]]
    n_parameters: int
    share: float
    parameters: tuple[str, ...]
    buffers: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class Recommendation:
    """Which layers to retrain, and why.

    Attributes
    ----------
    layers : tuple of str
        The layers to retrain, in the order of execution; the head is not among them.
    head : LayerAdvice
        The module that produces the output. With novel classes it is always to be retrained.
    verdict : str
        ``"none"``, ``"head"``, ``"upper"``, ``"middle"``, ``"lower"``, ``"all"`` or ``"undecided"``.
    per_class : dict of label to tuple of str
        The layers that each class of the unknown data alone would call for.
    table : tuple of LayerAdvice
        One a layer, in the order of execution.
    scores : tuple of LayerScores
        What the estimators measured.
    cost : dict of str to float
        ``"parameters"``: the share of all parameters that the advice trains; ``"backward"``: the share of the
        backward pass's work, against training everything.
    threshold : float
        The need, in nats, from which a layer is to be retrained.
    estimators : tuple of str
        The estimators and their settings, as text.
    versions : dict of str to str
        Of retrainscope, torch, numpy, scikit-learn and Python.
    """

    layers: tuple[str, ...]
    head: LayerAdvice
    verdict: str
    per_class: dict[Label, tuple[str, ...]]
    table: tuple[LayerAdvice, ...]
    scores: tuple[LayerScores, ...]
    cost: dict[str, float]
    threshold: float
    estimators: tuple[str, ...]
    versions: dict[str, str]

    def __str__(self) -> str:
        return f"{text_table(*self._cells())}\n\n{self.summary()}"

    def _repr_html_(self) -> str:
        return html_table(*self._cells(), caption=self.summary())

    def summary(self) -> str:
        """Say the advice in a sentence or two."""
        trained = [*self.layers, *([self.head.name] if self.head.verdict == RETRAIN else [])]
        text = f"Verdict: {self.verdict}. "
        if self.verdict == UNDECIDED:
            return text + (
                "No layer's need is clearly above the threshold and at least one may be: give more samples, or "
                "try the layers marked undecided."
            )
        if not trained:
            return text + "Nothing needs retraining for this data."
        return text + (
            f"Retrain {', '.join(trained)}: {self.cost['parameters']:.1%} of the parameters, "
            f"{self.cost['backward']:.0%} of the backward work of training everything."
        )

    def to_frame(self) -> "pd.DataFrame":
        """Return one row a layer, the head last, as a pandas DataFrame.

        Raises
        ------
        MissingExtraError
            If pandas is not installed.
        """
        rows = [
            {
                "layer": row.name,
                "parameters": row.n_parameters,
                "share": row.share,
                **{f"need[{name}]": need for name, need in row.needs.items()},
                "need": row.need,
                "need_low": row.interval[0],
                "need_high": row.interval[1],
                "verdict": row.verdict,
            }
            for row in (*self.table, self.head)
        ]
        frame: pd.DataFrame = import_pandas().DataFrame(rows)
        return frame

    def save(self, path: str | Path) -> None:
        """Write the recommendation to a JSON file.

        Raises
        ------
        ResultFormatError
            If a class label is no string, number, boolean or None.
        """
        save_json(self, path)

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read a recommendation that `save` wrote.

        Raises
        ------
        ResultFormatError
            If the file holds something else, or was written by a newer version.
        """
        return load_json(cls, path)

    def _cells(self) -> tuple[list[str], list[list[str]]]:
        names = [scores.estimator for scores in self.scores]
        several = names if len(names) > 1 else []
        header = ["layer", "parameters", "share", *several, "need", "90 % interval", "verdict"]
        rows = [
            [
                row.name,
                f"{row.n_parameters:,}",
                f"{row.share:.1%}",
                *(number_text(row.needs.get(name, np.nan)) for name in several),
                number_text(row.need),
                interval_text(row.interval),
                row.verdict,
            ]
            for row in (*self.table, self.head)
        ]
        rows[-1][0] += " (head)"
        return header, rows


def recommend_layers(
    model: nn.Module,
    known: Any,
    unknown: Any,
    *,
    estimators: Sequence[LayerEstimator] | None = None,
    layers: Iterable[str] | None = None,
    head: str | None = None,
    input_layer: str | None = None,
    threshold: float | None = None,
    batch_size: int = 256,
    device: str | torch.device | None = None,
    random_state: int | np.random.RandomState | None = None,
    progress: bool | None = None,
) -> Recommendation:
    """Advise which layers to retrain for unknown data, and which to keep frozen.

    A layer is to be retrained if the whole 90 % interval of its need lies above the threshold, to be kept if
    it lies below, and undecided otherwise.

    Parameters
    ----------
    model : nn.Module
        The trained network. It is only borrowed: afterwards it is bit for bit what it was.
    known, unknown : Tensor, array, (X, y), Dataset, DataLoader, or a re-iterable of batches
        Data that the model knows, best not its training data, and data that it does not. Of the same
        shape; at least two samples a class, better fifty. Without labels less can be said.
    estimators : sequence of unfitted LayerEstimator, optional
        Made for the same model. None measures with `ActivationSpread` alone, which is fast.
    layers, head, input_layer
        What to measure; see `find_layers`. With `estimators`, give these to the estimators.
    threshold : float, optional
        In nats. None is 0.15.
    batch_size : int
        Samples a forward pass, for data that is not batched.
    device : device, optional
        Where to measure; None: where the model lies.
    random_state : int, RandomState or None
        For everything that is drawn.
    progress : bool or None
        None shows bars on a terminal only.

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
    if threshold is not None and not np.isfinite(threshold):
        raise InvalidDataError(f"The 'threshold' parameter must be a finite number of nats. Got {threshold!r}.")
    if estimators is None:
        estimators = [
            ActivationSpread(
                model,
                layers=layers,
                head=head,
                input_layer=input_layer,
                batch_size=batch_size,
                device=device,
                random_state=random_state,
                progress=progress,
            )
        ]
    elif layers is not None or head is not None or input_layer is not None:
        raise InvalidDataError("With estimators=, give layers, head and input_layer to the estimators themselves.")
    _check_estimators(estimators, model)
    home, dtype = model_place(model)
    known_batches, unknown_batches = (
        as_batches(data, name=name, batch_size=batch_size, device=home, dtype=dtype)
        for data, name in ((known, "known"), (unknown, "unknown"))
    )
    with borrow(model):
        check_same_shape(input_shapes(known_batches.first().inputs), unknown_batches.first())
        novel = _novel_classes(known_batches, unknown_batches)
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
    return combine(
        scores,
        found[0],
        novel=novel,
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
    verdicts = [_verdict(interval, threshold) for interval in intervals]
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


def _novel_classes(known: Batches, unknown: Batches) -> bool | None:
    """Tell whether the unknown data has classes that the known data lacks; None without labels."""
    seen = []
    for batches in (known, unknown):
        labels: set[Label] = set()
        for batch in batches:
            if batch.labels is None:
                return None
            labels.update(batch.labels)
        seen.append(labels)
    return bool(seen[1] - seen[0])


def _check_estimators(estimators: Sequence[LayerEstimator], model: nn.Module) -> None:
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
