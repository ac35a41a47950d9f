"""Classifiers fitted to a layer's features, as estimators: how often they are wrong."""

from abc import abstractmethod
from collections.abc import Iterable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.base import ClassifierMixin
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedKFold, cross_val_predict
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import nn

from retrainscope.checks import check_number
from retrainscope.criteria.criterion import FeatureCriterion, Features, joined
from retrainscope.criteria.sampling import Draw

__all__ = ["KNNProbe", "LinearProbe"]

Floats = NDArray[np.float64]
Places = NDArray[np.int64]


class _Probe(FeatureCriterion):
    """A classifier fitted to the features; its errors are those on samples that it was not fitted to."""

    n_folds: int
    _floor = 0.5  # half an error: none among so many samples is not none at all

    @abstractmethod
    def _classifier(self, n_samples: int) -> ClassifierMixin:
        """Return an unfitted classifier for at least so many samples."""

    def _check_parameters(self) -> None:
        super()._check_parameters()
        check_number("n_folds", self.n_folds, whole=True, least=2)

    def _resampled(self, features: Features, plan: Sequence[Sequence[Draw]]) -> Floats:
        errors, times = ([np.zeros(len(rows)) for rows in features] for _ in range(2))
        for draw in plan[0]:
            wrong = self._wrong(*joined(features, draw)).reshape(len(draw), -1)
            for (c, rows), found in zip(draw, wrong, strict=True):
                errors[c][rows] += found
                times[c][rows] += 1
        rates = [error / n for error, n in zip(errors, times, strict=True)]
        values = np.full((len(plan), len(features)), np.nan)
        for place, draws in enumerate(plan):
            for c in range(len(features)):
                rows = np.unique(np.concatenate([found for draw in draws for k, found in draw if k == c]))
                values[place, c] = rates[c][rows].mean() if len(rows) > 1 else np.nan
        return values

    def _wrong(self, features: Floats, labels: Places) -> NDArray[np.bool_]:
        """Tell which samples a classifier gets wrong that was fitted to the other folds."""
        n_folds = min(self.n_folds, int(np.bincount(labels).min()))
        classifier = self._classifier(len(labels) // 2)
        found: NDArray[np.bool_] = (
            cross_val_predict(classifier, features, labels, cv=StratifiedKFold(n_folds)) != labels
        )
        return found


class LinearProbe(_Probe):
    """Score layers by the error of a linear classifier of their features.

    Measured is the share of samples that logistic regression on the standardised features gets wrong, fitted to the
    other folds: from 0 to 1, larger is worse. The need is the logarithm of how many times larger it is for the unknown
    data than for the known, less the same at the input; half an error counts as none. Of a class it is the error
    of its samples.

    It needs labels, and two classes, of known and of unknown data; no gradients of the network. An error that grows
    with depth on the unknown classes marks where information about them is lost; one that falls is what layers do by
    themselves, so what counts is the contrast. Where both sides make hardly an error it says nothing, and intervals
    are wide.

    Parameters
    ----------
    model : nn.Module
        The trained network. It is only borrowed.
    samples_per_class, pool, max_features, n_resamples
        How many samples and features are measured, and how often for the intervals; see `FeatureCriterion`.
    n_folds : int
        Of the stratified cross-validation; no more than a class has samples.
    layers, head, input_layer, calls, batch_size, device, random_state, progress
        As those of `ActivationSpread`.

    Attributes
    ----------
    layers_ : Layers
        The layers measured.
    sample_ : ClassSample
        Features of the known samples by layer; under ``""`` those of the input.

    Notes
    -----
    Each fold is fitted once, and the intervals are those of the errors: halves of the samples of each class, without
    fitting anew. What differs from fit to fit is not in them.

    The cost is that of n_folds logistic regressions a layer and side: for 10 classes of 100 samples and 12 layers
    about 8 to 15 seconds on one core. Memory and the matching of samples and classes: see `FeatureCriterion`.

    References
    ----------
    G. Alain, Y. Bengio, "Understanding intermediate layers using linear classifier probes", 2016, arXiv 1610.01644.

    Examples
    --------
    >>> import torch
    >>> from retrainscope.criteria import LinearProbe
    >>> _ = torch.manual_seed(0)
    >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
    >>> X, y = torch.randn(100, 4), torch.arange(100) % 2
    >>> known, unknown = (X + 3 * y[:, None], y), (X - 3 * y[:, None], y)
    >>> LinearProbe(model, random_state=0).fit(known).score_layers(unknown).layers
    ('0',)
    """

    _measure, _unit = "error of a linear probe", "share of samples"

    def __init__(
        self,
        model: nn.Module,
        *,
        layers: Iterable[str | type[nn.Module]] | None = None,
        head: str | None = None,
        input_layer: str | None = None,
        calls: str | None = None,
        n_folds: int = 5,
        samples_per_class: int = 100,
        pool: bool = True,
        max_features: int = 1024,
        n_resamples: int = 20,
        batch_size: int = 256,
        device: str | torch.device | None = None,
        random_state: int | np.random.RandomState | None = None,
        progress: bool | None = None,
    ) -> None:
        super().__init__(
            model,
            layers=layers,
            head=head,
            input_layer=input_layer,
            calls=calls,
            samples_per_class=samples_per_class,
            pool=pool,
            max_features=max_features,
            n_resamples=n_resamples,
            batch_size=batch_size,
            device=device,
            random_state=random_state,
            progress=progress,
        )
        self.n_folds = n_folds

    def _classifier(self, n_samples: int) -> ClassifierMixin:  # noqa: ARG002
        return make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))


class KNNProbe(_Probe):
    """Score layers by the error of a nearest-neighbour classifier of their features.

    Measured is the share of samples whose class is not that of most of the nearest samples of the other folds, by
    the cosine of the angle between features: from 0 to 1, larger is worse. The need is the logarithm of how many times
    larger it is for the unknown data than for the known, less the same at the input; half an error counts as none. Of
    a class it is the error of its samples.

    It needs labels, and two classes, of known and of unknown data; no gradients and no training. Other than
    `LinearProbe` it sees classes of any form, and it suffers from features that have nothing to do with the classes.
    The error falls with depth by itself, so what counts is the contrast. Where both sides make hardly an error it says
    nothing, and intervals are wide.

    Parameters
    ----------
    model : nn.Module
        The trained network. It is only borrowed.
    samples_per_class, pool, max_features, n_resamples
        How many samples and features are measured, and how often for the intervals; see `FeatureCriterion`.
    n_neighbors : int
        That vote; no more than half of the samples.
    n_folds : int
        Of the stratified cross-validation; no more than a class has samples.
    layers, head, input_layer, calls, batch_size, device, random_state, progress
        As those of `ActivationSpread`.

    Attributes
    ----------
    layers_ : Layers
        The layers measured.
    sample_ : ClassSample
        Features of the known samples by layer; under ``""`` those of the input.

    Notes
    -----
    The intervals are those of the errors: halves of the samples of each class, with the neighbours as they were.

    For 10 classes of 100 samples and 12 layers about 2 seconds on one core. Memory and the matching of samples and
    classes: see `FeatureCriterion`.

    References
    ----------
    T. Cover, P. Hart, "Nearest neighbor pattern classification", IEEE Transactions on Information Theory 13, 1967.

    Examples
    --------
    >>> import torch
    >>> from retrainscope.criteria import KNNProbe
    >>> _ = torch.manual_seed(0)
    >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
    >>> X, y = torch.randn(100, 4), torch.arange(100) % 2
    >>> known, unknown = (X + 3 * y[:, None], y), (X - 3 * y[:, None], y)
    >>> KNNProbe(model, random_state=0).fit(known).score_layers(unknown).layers
    ('0',)
    """

    _measure, _unit = "error of a nearest-neighbour probe", "share of samples"

    def __init__(
        self,
        model: nn.Module,
        *,
        layers: Iterable[str | type[nn.Module]] | None = None,
        head: str | None = None,
        input_layer: str | None = None,
        calls: str | None = None,
        n_neighbors: int = 5,
        n_folds: int = 5,
        samples_per_class: int = 100,
        pool: bool = True,
        max_features: int = 1024,
        n_resamples: int = 20,
        batch_size: int = 256,
        device: str | torch.device | None = None,
        random_state: int | np.random.RandomState | None = None,
        progress: bool | None = None,
    ) -> None:
        super().__init__(
            model,
            layers=layers,
            head=head,
            input_layer=input_layer,
            calls=calls,
            samples_per_class=samples_per_class,
            pool=pool,
            max_features=max_features,
            n_resamples=n_resamples,
            batch_size=batch_size,
            device=device,
            random_state=random_state,
            progress=progress,
        )
        self.n_neighbors = n_neighbors
        self.n_folds = n_folds

    def _check_parameters(self) -> None:
        super()._check_parameters()
        check_number("n_neighbors", self.n_neighbors, whole=True)

    def _classifier(self, n_samples: int) -> ClassifierMixin:
        return KNeighborsClassifier(min(self.n_neighbors, n_samples), metric="cosine")
