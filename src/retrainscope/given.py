"""What a recommendation is made of, looked at before the work: data, labels, estimators."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np
import torch
from torch import nn

from retrainscope.base import LayerEstimator
from retrainscope.batches import Batch, Batches, Label, as_batches, input_shapes
from retrainscope.exceptions import InvalidDataError, UnsupportedModelError
from retrainscope.heads import predictions_of
from retrainscope.lending import autograd_on, borrow, model_place
from retrainscope.processes import gather
from retrainscope.reference import check_same_shape
from retrainscope.sources import Indexed

__all__ = ["Given", "check_estimators", "check_same_layers", "check_together", "checked_data", "refusal_of"]


@dataclass(frozen=True)
class Given:
    """What the model knows and what it does not, checked; the labels are those of the first batches."""

    known: Batches
    unknown: Batches
    labels: tuple[tuple[Label, ...] | None, tuple[Label, ...] | None]
    first: Batch  # of the known data
    has_classes: bool  # whether the unknown data has at least two


def checked_data(model: nn.Module, known: Any, unknown: Any, batch_size: int) -> Given:
    """Look at the first samples, and refuse data that a recommendation cannot be made of."""
    home, dtype = model_place(model)
    ours, theirs = (
        as_batches(data, name=name, batch_size=batch_size, device=home, dtype=dtype)
        for data, name in ((known, "known"), (unknown, "unknown"))
    )
    with borrow(model, in_pieces=True):
        first, other = ours.few(), theirs.few()
        check_same_shape(input_shapes(first.inputs), other)
        _check_labels(first, other)
        return Given(ours, theirs, (first.labels, other.labels), first, _has_classes(other, theirs))


def check_together(estimators: Sequence[LayerEstimator], data: Given) -> None:
    """Refuse, before any is fitted, estimators of different layers, and data without the labels that one needs."""
    for estimator, (labels, name) in product(estimators, zip(data.labels, ("known", "unknown"), strict=True)):
        estimator._check_labels(labels, name)
    # An iterator can be gone through only once, which is for `fit`.
    if len(estimators) > 1 and not any(isinstance(estimator.layers, Iterator) for estimator in estimators):
        with autograd_on(), borrow(estimators[0].model, in_pieces=True) as model:
            check_same_layers([estimator._find_layers(model, data.first).names for estimator in estimators])


def check_same_layers(found: Sequence[tuple[str, ...]]) -> None:
    """Refuse estimators whose layers, which are given for each, are not the same."""
    for names in found:
        if names != found[0]:
            raise InvalidDataError(
                f"The estimators measure different layers: {', '.join(found[0])} and {', '.join(names)}. Give them the "
                "same layers=."
            )


def refusal_of(model: nn.Module, first: Batch) -> UnsupportedModelError | None:
    """Tell why a model gives a forecast no class scores, if it does not, from the first samples."""
    try:
        with borrow(model), torch.no_grad():
            predictions_of(model, first.inputs)
    except UnsupportedModelError as error:
        return error
    return None


def _has_classes(first: Batch, batches: Batches) -> bool:
    """Tell whether data has labels of at least two classes; in all processes together."""
    seen = set(first.labels or ())
    if len(seen) == 1 and isinstance(batches.source, Indexed):  # sorted by class, it would be read to the second
        seen |= set(batches.subset(np.array([batches.source.n_samples - 1])).first().labels or ())
    for batch in batches if len(seen) == 1 else ():
        seen |= set(batch.labels or ())
        if len(seen) > 1:
            break
    return len(set().union(*gather("classes", seen))) > 1


def _check_labels(known: Batch, unknown: Batch) -> None:
    """Refuse labels of different types, by which no class could be told to be novel."""
    kinds = [sorted({type(label).__name__ for label in batch.labels or ()}) for batch in (known, unknown)]
    if all(kinds) and not set(kinds[0]) & set(kinds[1]):
        raise InvalidDataError(
            f"The known labels are {' and '.join(kinds[0])}, the unknown ones {' and '.join(kinds[1])}, so it cannot "
            "be told which classes are novel. Give labels of one type."
        )


def check_estimators(estimators: Sequence[LayerEstimator], model: nn.Module) -> None:
    """Refuse what is no list of estimators of this model."""
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
