"""`recommend_layers`: from the scores to advice."""

import inspect
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from functools import partial
from numbers import Real
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from retrainscope.advice import Recommendation
from retrainscope.answers import Answers
from retrainscope.base import LayerEstimator
from retrainscope.batches import Label
from retrainscope.checkpoints import check_integer, fingerprint, read_trials
from retrainscope.checks import check_number
from retrainscope.choice import DEFAULT_TOLERANCE, choose, remarks
from retrainscope.costs import Cost, costing
from retrainscope.exceptions import InvalidDataError, UnsupportedModelError
from retrainscope.given import Given, check_estimators, check_same_layers, check_together, checked_data, refusal_of
from retrainscope.lending import borrow, model_place
from retrainscope.parts import NOTHING_KEPT, Parts, check_folder
from retrainscope.predicted import checked_groups
from retrainscope.processes import agree, from_first, gather, in_step, rank
from retrainscope.reference import input_axes
from retrainscope.saving import to_plain
from retrainscope.scores import LayerScores
from retrainscope.settings import listed, settings_text, told, told_apart
from retrainscope.spread import ActivationSpread
from retrainscope.tangent import TangentProbe
from retrainscope.trying_out import check_trial, try_out
from retrainscope.verdicts import advise, allowed_policies, check_affordable, checked_budget, combine

__all__ = ["DEFAULT_THRESHOLD", "recommend_layers"]

# In nats, for the spread: the rule that came nearest to the best choice on ten MNIST tasks.
DEFAULT_THRESHOLD = 0.15
_TRIALS = "trial.json"  # in the checkpoint's folder
_NO_FORECAST = (
    "budget=, groups= and trial= are for the forecast, which needs unknown data with labels of at least two classes "
    "and a model that returns one row of class scores a sample. Leave them out"
)


@in_step()
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
    trial: Mapping[str, Any] | None = None,
    checkpoint: str | Path | None = None,
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
    trial : mapping, optional
        Try the forecast's choice out: options of `sweep_layers` such as ``{"steps": 300, "learning_rates": (1e-3,)}``,
        best those of your own training; ``{}`` takes its defaults, and one seed. A part of the unknown data is held
        out, and copies of the model are trained on the rest: by what is advised, by the head alone and by everything.
        Advised is then what was clearly better, if anything was. Costs these three trainings for each learning rate.
    checkpoint : path, optional
        A folder, made if it is missing, that every finished part is written to (also parts of long estimators: epochs
        of decoders, inverted batches, gradients), so that after an interruption, also ``kill -9``, the same call goes
        on and gives the same result, on one device bit for bit. Needs an integer `random_state`, of the estimators too
        where they are given. Model, data, estimators, groups and trial must be the same; functions are told apart by
        their names. One folder is for one run at a time, and may be removed when the advice is there.
    batch_size, device, random_state, progress
        As in `TangentProbe`, for the default estimators. Estimators that are given keep their own.

    Returns
    -------
    Recommendation

    Raises
    ------
    InvalidDataError, LayerNotFoundError, ReusedLayerError, UnsupportedModelError
        Before any work, where model, data and layers do not fit together, and where the checkpoint is another run's,
        damaged, or cannot be written.
    OutOfMemoryError
        Where a device has no room for one sample, or for a batch that may not be smaller. Elsewhere the batch is
        halved, once said in a warning.

    Notes
    -----
    Where ``torch.distributed`` is initialised all processes must make the same call; each measures its share of the
    data, and all return the same advice; process 0 alone reads and writes a checkpoint (docs/processes.md).

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
    limits = checked_budget(budget)
    check_trial(trial, own=inspect.signature(recommend_layers).parameters)
    places = {"layers": layers, "head": head, "input_layer": input_layer, "calls": calls}
    if estimators is not None:
        if any(place is not None for place in places.values()):
            raise InvalidDataError(
                "With estimators=, give layers, head, input_layer and calls to the estimators themselves."
            )
        if tolerance is not None or limits or groups is not None or trial is not None:
            raise InvalidDataError(
                "tolerance=, budget=, groups= and trial= are for the forecast. Leave them out with estimators=."
            )
        check_estimators(estimators, model)
    if isinstance(layers, Iterable) and not isinstance(layers, str):
        places["layers"] = layers = [*layers]  # which several estimators go through
    kinds = None if estimators is None else [type(estimator).__name__ for estimator in estimators]
    decisive = {"threshold": threshold, "tolerance": tolerance, "budget": limits, "trial": told(trial)}
    agree({name: repr(value) for name, value in ({"estimators": kinds} | decisive).items()})
    if checkpoint is not None:
        for each in (random_state,) if estimators is None else [e.random_state for e in estimators]:
            check_integer(each)
        checkpoint = check_folder(checkpoint)
    data = checked_data(model, known, unknown, batch_size)
    if estimators is not None:
        check_together(estimators, data)
    if estimators is None and input_layer is None:
        input_axes(data.first.inputs)  # refused before the model is run
    options: dict[str, Any] = places | {"device": device, "random_state": random_state, "progress": progress}
    notes: list[str] = []
    probe: TangentProbe | None = None
    if estimators is None:
        spread = ActivationSpread(model, batch_size=batch_size, **options)
        estimators = [spread]
        if data.has_classes:
            probe = TangentProbe(model, batch_size=batch_size, **options)
            estimators = [spread, probe]
        else:
            notes.append("There is no forecast, which needs unknown data with labels of at least two classes.")
    only_for_forecasts = bool(limits) or groups is not None or trial is not None
    if only_for_forecasts and probe is None:
        raise InvalidDataError(f"{_NO_FORECAST}.")
    if groups is not None:
        groups = checked_groups(groups, data.unknown, data.unknown.n_samples)
    parts = NOTHING_KEPT if checkpoint is None else _opened(checkpoint, model, data, estimators, groups, trial)
    if probe is not None:
        refusal = refusal_of(model, data.first)
        if refusal is None:  # the pass of the spread, which comes first, notes what the forecast needs to know
            spread._noting = probe._noted = {"known": Answers(of_model=True), "unknown": Answers(of_model=False)}
        elif only_for_forecasts:
            raise InvalidDataError(f"{_NO_FORECAST}: {refusal}") from refusal
        else:
            notes.append(f"There is no forecast: {refusal}")
            probe, estimators = None, estimators[:1]
    with _keeping(estimators, parts):
        costs, scores = [Cost() for _ in estimators], list[LayerScores]()
        for measure in (partial(_fit, known, limits), partial(_score, scores, unknown, groups)):
            for estimator, cost in zip(estimators, costs, strict=True):
                try:
                    with _costing(estimator, cost):
                        measure(estimator)
                except UnsupportedModelError as error:
                    if estimator is not probe:
                        raise
                    if only_for_forecasts:
                        raise InvalidDataError(f"{_NO_FORECAST}: {error}") from error
                    notes.append(f"There is no forecast: {error}")
                    probe, estimators, costs = None, estimators[:1], costs[:1]
            check_same_layers([estimator.layers_.names for estimator in estimators])
        asked = {str(dtype).removeprefix("torch.") for e in estimators if (dtype := e._autocast) is not None}
        notes += [f"The network computed in {dtype} as torch.autocast has it." for dtype in sorted(asked)]
    measured = estimators[0].layers_
    if probe is not None:  # which decides, so it comes first
        scores, costs = scores[::-1], costs[::-1]
        estimators = estimators[::-1]
    labels, known_labels = {label for one in scores for label in one.classes}, set(scores[-1].known_classes)
    rules: dict[str, Any] = {
        "novel": bool(labels - known_labels) if labels and known_labels else None,
        "threshold": DEFAULT_THRESHOLD if threshold is None else float(threshold),
        "estimators": tuple(settings_text(estimator) for estimator in estimators),
    }
    if probe is None:
        advice = combine(scores, measured, **rules)
    else:
        forecast, sweep = probe.forecast_, None
        notes += remarks(forecast, labels, known_labels, known_chance=probe._known_chance)
        allowed = allowed_policies(forecast, measured, limits)
        choice = choose(forecast, DEFAULT_TOLERANCE if tolerance is None else float(tolerance), allowed=allowed)
        if trial is not None and choice.policy is not None:
            options |= {"layers": measured.names, "head": measured.head, "groups": groups}
            options |= {"batch_size": 32, "n_seeds": 1, **trial}
            if checkpoint is not None:
                options["checkpoint"] = Path(checkpoint, _TRIALS)
            choice, sweep, note = try_out(model, known, unknown, choice, forecast, allowed=allowed, options=options)
            notes.append(note)
        advice = replace(advise(scores, measured, forecast, choice, **rules), trial=sweep)
    advice = replace(advice, notes=(*notes, *advice.notes), **_told_costs([*advice.table[0].needs], scores, costs))
    return from_first("the advice", advice)


def _opened(
    folder: Path, model: nn.Module, data: Given, estimators: Sequence[LayerEstimator], groups: Any, trial: Any
) -> Parts:
    """Open a checkpoint's folder for this run, or refuse it if it is of another one."""
    to_plain(data.labels)  # refused here if they cannot be kept
    told_all = (
        str(data.known.device),
        [told_apart(estimator) for estimator in estimators],
        listed(groups),
        told(trial),
    )
    with borrow(model):
        parts = Parts.open(folder, fingerprint(model, (data.known, data.unknown), repr(told_all)))
    if rank() == 0:
        read_trials(folder / _TRIALS)  # refused here if it is damaged
    return parts


def _fit(known: Any, limits: dict[str, float], estimator: LayerEstimator) -> None:
    """Measure the known data; refuse a budget that leaves nothing, as soon as it is known what layers own."""
    estimator.fit(known)
    check_affordable(estimator.layers_, limits)


def _score(scores: list[LayerScores], unknown: Any, groups: Any, estimator: LayerEstimator) -> None:
    """Measure the unknown data, and add the scores."""
    own = {"groups": groups} if isinstance(estimator, TangentProbe) else {}
    scores.append(estimator.score_layers(unknown, **own))


def _costing(estimator: LayerEstimator, cost: Cost) -> AbstractContextManager[None]:
    """Add to a cost what an estimator takes in the context, with the memory of where it measures."""
    try:
        place = estimator._place()
    except InvalidDataError:  # no such device, which `fit` says, to all processes
        place = model_place(estimator.model)[0]
    return costing(place, cost)


def _told_costs(names: Sequence[str], scores: Sequence[LayerScores], costs: Sequence[Cost]) -> dict[str, Any]:
    """Return what a recommendation says of the costs, by estimator."""
    n_forward = np.sum(gather("the passes", [cost.n_forward for cost in costs]), axis=0)
    passes = [n / sum(one.n_samples) for n, one in zip(n_forward.tolist(), scores, strict=True)]
    return {
        "seconds": dict(zip(names, [cost.seconds for cost in costs], strict=True)),
        "passes": dict(zip(names, passes, strict=True)),
        "peak_memory": dict(zip(names, [cost.peak_memory for cost in costs], strict=True)),
    }


@contextmanager
def _keeping(estimators: Sequence[LayerEstimator], parts: Parts) -> Iterator[None]:
    """Let estimators keep what they finish, each under a name of its own, for as long as the context lasts."""
    if parts is NOTHING_KEPT:
        yield
        return
    try:
        for number, estimator in enumerate(estimators):
            estimator._parts = parts.under(f"{number}-{type(estimator).__name__}")
        yield
    finally:
        for estimator in estimators:
            estimator.__dict__.pop("_parts", None)
