"""Samples predicted by the others with each set of layers: the forecast and the scores that come of it."""

from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from retrainscope.batches import Batches, Label
from retrainscope.comparing import N_RESAMPLES
from retrainscope.exceptions import InvalidDataError
from retrainscope.forecast import Forecast
from retrainscope.layers import Layers
from retrainscope.policies import NONE, policy_name
from retrainscope.ridge import LeftOut
from retrainscope.scores import LayerScores, Measured, score

__all__ = ["Predicted", "bootstrap", "checked_groups"]

Floats = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Predicted:
    """Samples predicted by the others with each set of layers."""

    found: LeftOut
    sets: tuple[tuple[str, ...], ...]
    classes: tuple[Label, ...]
    targets: NDArray[np.int64]  # places among the classes
    groups: NDArray[np.int64]
    weights: Floats  # of the samples in each bootstrap draw

    def forecast(self, layers: Layers, as_is: NDArray[np.bool_] | None, **told: Any) -> Forecast:
        """Return the expected errors; `as_is` tells which samples the model gets right as it is, if it can be used.

        `told` is what the forecast says besides: ``known_accuracy``, ``n_copies``, ``drawing_gain``.
        """
        targets, errors, hits = self.targets, self.found.errors, self.found.hits.astype(np.float64)
        trained = self.sets
        names = tuple(policy_name(policy, layers.names) for policy in trained)
        if as_is is not None:
            errors = np.concatenate([np.full((1, len(targets)), np.nan), errors])
            hits, trained, names = np.concatenate([as_is[None], hits]), ((), *trained), (NONE, *names)
        counts = np.bincount(targets)
        independent = [len(np.unique(self.groups[targets == target])) for target in range(len(counts))]
        return Forecast(
            policies=names,
            trained=trained,
            layers=layers.names,
            head=layers.head,
            n_parameters=layers.n_parameters,
            error=errors.mean(axis=1),
            accuracy=hits.mean(axis=1),
            draws=self.weights @ errors.T,
            accuracy_draws=self.weights @ hits.T,
            chance=float(counts.max() / counts.sum()),
            chance_error=float(1 - np.square(counts / counts.sum()).sum()),
            n_samples=len(targets),
            n_classes=len(counts),
            smallest_class=min(independent),
            **told,
        )

    def scores(self, layers: Layers, known_classes: tuple[Label, ...], known: Floats, estimator: str) -> LayerScores:
        """Compare the error with the head alone to that with each layer, overall and for each class."""
        found, sets, classes, targets = self.found, self.sets, self.classes, self.targets
        weights = np.concatenate([np.full((1, len(targets)), 1 / len(targets)), self.weights])
        inside = np.eye(len(classes))[targets]
        split = np.concatenate([np.ones((len(targets), 1)), inside], axis=1)

        def means(errors: Floats) -> Floats:
            """Return weighted means of shape (n_draws, 1 + n_classes, n_sets)."""
            sums = np.einsum("dn,nc,sn->dcs", weights, split, errors)
            averages: Floats = sums / (weights @ split)[..., None]
            return averages

        frozen = means(found.errors[[sets.index(())]])
        retrained = means(found.errors[[sets.index((name,)) for name in layers.names]])
        ratio = frozen / retrained
        counts = np.bincount(targets).astype(np.float64)
        unit = np.ones((len(ratio), 1 + len(known_classes), ratio.shape[-1]))
        return score(
            Measured(values=unit, reference=None, classes=known_classes, counts=known),
            Measured(values=ratio, reference=None, classes=classes, counts=counts),
            layers=layers.names,
            labelled=True,
            estimator=estimator,
            measure="forecast error with the layer frozen over that with it retrained",
            unit="ratio",
            reference_name="",
        )


def checked_groups(groups: Any, batches: Batches, n_samples: int | None = None) -> Sequence[Label]:
    """Return what each sample is a part of, in plain values.

    Parameters
    ----------
    groups : array or other sequence
    batches : Batches
        The data, whose samples must keep their order.
    n_samples : int, optional
        Of the data, where that is known.

    Raises
    ------
    InvalidDataError
        If there is not one for each sample, or the data comes in another order than they do.
    """
    if batches.reordered:
        raise InvalidDataError(
            f"The 'groups' parameter is in the order of the data, which the sampler of the {batches.name} data "
            "changes. Give the data set itself, or a DataLoader that does not shuffle; under torch.distributed one "
            "without a sampler for every process, as the work is shared all the same."
        )
    listed = groups.tolist() if isinstance(groups, np.ndarray | Tensor) else groups
    fits = isinstance(listed, Iterable) and not isinstance(listed, str | bytes | Mapping)
    given = [*listed] if fits else []
    plain = [one.item() if isinstance(one, np.generic | Tensor) and one.ndim == 0 else one for one in given]
    wanted = "each sample" if n_samples is None else f"each of the {n_samples} samples"
    what = f"The 'groups' parameter must have one entry for {wanted} of the {batches.name} data, in their order."
    if not fits or (n_samples is not None and len(plain) != n_samples):
        raise InvalidDataError(f"{what} Got {f'{len(plain)} entries' if fits else type(groups).__name__}.")
    for place, one in enumerate(plain):
        if one is None or not isinstance(one, Hashable) or isinstance(one, Tensor) or one != one:
            raise InvalidDataError(f"{what} Got {one!r} at place {place}; give numbers or strings.")
    return plain


def bootstrap(targets: NDArray[np.int64], groups: NDArray[np.int64], rng: np.random.Generator) -> Floats:
    """Draw the groups of each class with replacement, as many as there are; return weights, which sum to one."""
    weights = np.zeros((N_RESAMPLES, len(targets)))
    for target in range(int(targets.max()) + 1):
        rows = np.flatnonzero(targets == target)
        units, unit = np.unique(groups[rows], return_inverse=True)
        drawn = rng.multinomial(len(units), np.full(len(units), 1 / len(units)), size=N_RESAMPLES)[:, unit]
        weights[:, rows] = drawn * (len(rows) / drawn.sum(axis=1, keepdims=True))
    return weights / len(targets)
