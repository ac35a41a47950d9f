"""Published formulas on features as estimators: how well a layer's features tell the classes apart."""

from abc import abstractmethod
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from retrainscope.criteria.criterion import FeatureCriterion, Features, joined
from retrainscope.criteria.sampling import Draw
from retrainscope.criteria.transferability import class_evidences, class_explained, class_rates, class_variabilities

__all__ = ["HScore", "HiddenStateVariability", "LogME", "TransRate"]

_LEAST_SHARE = 1e-6
_ROUNDING = 1e-6  # of a standard deviation, next to the values themselves

Floats = NDArray[np.float64]
Places = NDArray[np.int64]


class _Formula(FeatureCriterion):
    """A criterion that is computed anew from every draw."""

    @abstractmethod
    def _by_class(self, features: Floats, labels: Places) -> Floats:
        """Measure each class, larger is worse.

        Parameters
        ----------
        features : ndarray of shape (n_samples, n_features)
        labels : ndarray of shape (n_samples,)
            From 0 to n_classes - 1, equally often.

        Returns
        -------
        ndarray of shape (n_classes,)
        """

    def _resampled(self, features: Features, plan: Sequence[Sequence[Draw]]) -> Floats:
        values = np.zeros((len(plan), len(features)))
        for row, draws in zip(values, plan, strict=True):
            times = np.zeros(len(features))
            for draw in draws:
                classes = [c for c, _ in draw]
                row[classes] += self._by_class(*joined(features, draw)) if len(draw[0][1]) > 1 else np.nan
                times[classes] += 1
            row /= times
        return values


class LogME(_Formula):
    """Score layers by LogME: how badly a linear model of their features, at its best, explains the classes.

    Measured is the negative of the evidence, `log_me`, in nats per sample: larger is worse, of any sign. The need is by
    how much more it is for the unknown data than for the known, less the same at the input; positive where the layer
    does less for the unknown classes. Of a class it is the evidence of that class against the others.

    It needs labels, and two classes, of known and of unknown data; no gradients and no training. It was made to choose
    between networks. By itself it changes with depth, on the classes of the training most, so one value tells only how
    deep a layer is: what counts is the contrast with the known data and the input. It sees linear structure alone,
    and does not tell whether the layers that follow can use what is there.

    Parameters
    ----------
    model : nn.Module
        The trained network. It is only borrowed.
    samples_per_class, pool, max_features, n_resamples
        How many samples and features are measured, and how often for the intervals; see `FeatureCriterion`.
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
    Features are brought to a mean squared length of 1 first, since the guard of the fixed point is not free of scale.

    The cost is that of an eigenvalue decomposition for each layer, resample and side: for 10 classes of 100 samples
    and 12 layers about 8 seconds on one core with 256 features a layer, 30 with 1,024. Memory and the matching of
    samples and classes: see `FeatureCriterion`.

    References
    ----------
    K. You, Y. Liu, J. Wang, M. Long, "LogME: practical assessment of pre-trained models for transfer learning", ICML
    2021, arXiv 2102.11005.

    Examples
    --------
    >>> import torch
    >>> from retrainscope.criteria import LogME
    >>> _ = torch.manual_seed(0)
    >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
    >>> X, y = torch.randn(100, 4), torch.arange(100) % 2
    >>> known, unknown = (X + 3 * y[:, None], y), (X - 3 * y[:, None], y)
    >>> LogME(model, random_state=0).fit(known).score_layers(unknown).layers
    ('0',)
    """

    _measure, _unit, _in_nats = "negative evidence of the classes", "nats per sample", True

    def _by_class(self, features: Floats, labels: Places) -> Floats:
        length = np.sqrt(np.square(features).sum(axis=1).mean())
        return -class_evidences(features / length if length > 0 else features, labels)


class HScore(_Formula):
    """Score layers by the H-score: the share of what class a sample is of that their features leave unexplained.

    Measured is 1 - H / (n_classes - 1) with the regularised `h_score`: from 0 (the features tell the classes apart
    without error) to 1 (not at all), larger is worse, and at least 1e-6. The need is the logarithm of how many times
    larger it is for the unknown data than for the known, less the same at the input. Of a class it is the share left
    unexplained of being of that class (1 - R squared).

    It needs labels, and two classes, of known and of unknown data; no gradients and no training. It was made to choose
    between networks; one value tells mostly how deep a layer is, what counts is the contrast. Means and one
    covariance for all samples are all that it sees. With more features than samples the covariance is shrunk much, and
    values come near to 1.

    Parameters
    ----------
    model : nn.Module
        The trained network. It is only borrowed.
    samples_per_class, pool, max_features, n_resamples
        How many samples and features are measured, and how often for the intervals; see `FeatureCriterion`.
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
    The variance between classes is divided by n_samples as that of the features is, so that no share exceeds 1;
    `h_score` itself is n / (n - 1) times larger.

    The cost is that of an eigenvalue decomposition and of the Ledoit-Wolf shrinkage for each layer, resample and
    side: for 10 classes of 100 samples and 12 layers about 10 seconds on one core with 256 features a layer, 70
    with 1,024. Memory and the matching of samples and classes: see `FeatureCriterion`.

    References
    ----------
    Y. Bao et al., "An information-theoretic approach to transferability in task transfer learning", ICIP 2019.
    S. Ibrahim, N. Ponomareva, R. Mazumder, "Newer is not always better: rethinking transferability metrics, their
    peculiarities, stability and performance", 2021, arXiv 2110.06893.

    Examples
    --------
    >>> import torch
    >>> from retrainscope.criteria import HScore
    >>> _ = torch.manual_seed(0)
    >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
    >>> X, y = torch.randn(100, 4), torch.arange(100) % 2
    >>> known, unknown = (X + 3 * y[:, None], y), (X - 3 * y[:, None], y)
    >>> HScore(model, random_state=0).fit(known).score_layers(unknown).layers
    ('0',)
    """

    _measure, _unit = "what the H-score leaves unexplained", "share"

    def _by_class(self, features: Floats, labels: Places) -> Floats:
        return np.maximum(1 - class_explained(features, labels), _LEAST_SHARE)


class TransRate(_Formula):
    """Score layers by TransRate: how little knowing the class shortens the code for their features.

    Measured is the negative of `trans_rate`, in nats per sample and dimension: larger is worse, at most 0 but for
    rounding. The need is by how much more it is for the unknown data than for the known, less the same at the input. Of
    a class it is what the code for that class is shorter.

    It needs labels, and two classes, of known and of unknown data; no gradients and no training. It was made to choose
    between networks; one value tells mostly how deep and how wide a layer is, what counts is the contrast.
    Where a class has fewer samples than there are features, much of the value is due to that, on both sides alike. All
    dimensions count alike in the logarithm: noise where the input hardly varied before, as at the margins of images,
    changes the value of the input by much, and with it every layer's need.
    Two classes of equal spread cannot be told apart by it, near or far: each scatters around the common centre as the
    whole does. With two classes on a side a low need does not show that a layer can be kept (``one_sided``).

    Parameters
    ----------
    model : nn.Module
        The trained network. It is only borrowed.
    samples_per_class, pool, max_features, n_resamples
        How many samples and features are measured, and how often for the intervals; see `FeatureCriterion`.
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
    The published value depends on the scale of the features and grows with their number. So here features are centred
    and brought to a mean square of 1 first, known and unknown ones by themselves, and the rate is divided by the
    dimensions that the features can have, the lesser of n_features and n_samples - 1.

    The cost is that of a determinant for each layer, class, resample and side: for 10 classes of 100 samples and 12
    layers about 4 seconds on one core with 256 features a layer, 15 with 1,024. Memory and the matching of samples
    and classes: see `FeatureCriterion`.

    References
    ----------
    L.-K. Huang et al., "Frustratingly easy transferability estimation", ICML 2022, arXiv 2106.09362.

    Examples
    --------
    >>> import torch
    >>> from retrainscope.criteria import TransRate
    >>> _ = torch.manual_seed(0)
    >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
    >>> X, y = torch.randn(100, 4), torch.arange(100) % 2
    >>> known, unknown = (X + 3 * y[:, None], y), (X - 3 * y[:, None], y)
    >>> TransRate(model, random_state=0).fit(known).score_layers(unknown).layers
    ('0',)
    """

    _measure, _unit, _in_nats = "negative TransRate", "nats per sample and dimension", True
    _least_classes = 3

    def _by_class(self, features: Floats, labels: Places) -> Floats:
        centred = features - features.mean(axis=0)
        scale = np.sqrt(np.square(centred).mean())
        if not scale > _ROUNDING * np.abs(features).max():
            return np.full(labels.max() + 1, np.nan)
        dimensions = min(features.shape[1], len(features) - 1)
        rates: Floats = class_rates(centred / scale, labels) / dimensions
        return -rates


class HiddenStateVariability(_Formula):
    """Score layers by the variability of their features within classes, relative to that between the classes.

    Measured is nu, `hidden_variability`: from 0 upwards, larger is worse. The need is the logarithm of how many times
    larger it is for the unknown data than for the known, less the same at the input. Of a class it is the scatter
    of that class.

    It needs labels, and two classes, of known and of unknown data; no gradients and no training. It looks only along
    the n_classes - 1 axes that part the class means, and the closest pair of classes dominates it: two unknown
    classes that nearly coincide make it large, whatever the others do. `ActivationSpread` weighs all axes alike
    instead. One value falls with depth by itself; what counts is the contrast. With few samples a class the class means
    look further apart than they are, on both sides alike.

    Parameters
    ----------
    model : nn.Module
        The trained network. It is only borrowed.
    samples_per_class, pool, max_features, n_resamples
        How many samples and features are measured, and how often for the intervals; see `FeatureCriterion`.
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
    The cost is that of a singular value decomposition of the class means for each layer, resample and side: for 10
    classes of 100 samples and 12 layers about 2 seconds on one core with 256 features a layer, 6 with 1,024. Memory
    and the matching of samples and classes: see `FeatureCriterion`.

    References
    ----------
    S. Xie et al., "Hidden state variability of pretrained language models can guide computation reduction for transfer
    learning", Findings of EMNLP 2022, arXiv 2210.10041.

    Examples
    --------
    >>> import torch
    >>> from retrainscope.criteria import HiddenStateVariability
    >>> _ = torch.manual_seed(0)
    >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
    >>> X, y = torch.randn(100, 4), torch.arange(100) % 2
    >>> known, unknown = (X + 3 * y[:, None], y), (X - 3 * y[:, None], y)
    >>> HiddenStateVariability(model, random_state=0).fit(known).score_layers(unknown).layers
    ('0',)
    """

    _measure, _unit = "variability within classes", "of that between classes"

    def _by_class(self, features: Floats, labels: Places) -> Floats:
        return class_variabilities(features, labels)
