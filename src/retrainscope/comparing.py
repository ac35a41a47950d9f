"""What the estimators share in comparing unknown with known data: which classes, of which size, and errors."""

import numpy as np
from numpy.typing import NDArray

from retrainscope.batches import Label
from retrainscope.exceptions import InvalidDataError
from retrainscope.moments import ClassMoments, class_means, half_samples
from retrainscope.scores import LayerScores, Measured, score

__all__ = ["N_RESAMPLES", "baseline_classes", "check_class_counts", "score_errors"]

N_RESAMPLES = 400
_NEGLIGIBLE = 0.01


def check_class_counts(classes: tuple[Label, ...], counts: NDArray[np.float64], name: str, least: int = 2) -> None:
    """Refuse classes that are too small to be measured."""
    small = [(label, int(n)) for label, n in zip(classes, counts, strict=True) if n < least]
    if small:
        label, n = small[0]
        more = f", and {len(small) - 1} more classes are as small" if len(small) > 1 else ""
        which = "data has" if label is None else f"class {label!r} has"
        raise InvalidDataError(
            f"The {name} {which} {n} sample{'' if n == 1 else 's'}{more}; at least {least} a class are needed. Add "
            "samples, or leave the class out."
        )


def baseline_classes(known: tuple[Label, ...], unknown: tuple[Label, ...]) -> tuple[Label, ...]:
    """Return the known classes to compare with: if all unknown classes are known ones, just those.

    Classes differ by themselves; the same classes in another domain are compared with themselves.
    """
    return unknown if set(unknown) <= set(known) else known


def score_errors(
    known: ClassMoments,
    unknown: ClassMoments,
    *,
    layers: tuple[str, ...],
    estimator: str,
    measure: str,
    variance: float,
    rng: np.random.Generator,
    unit: str = "input units squared, summed",
) -> LayerScores:
    """Compare the reconstruction errors of known and unknown samples, against those with the control.

    Parameters
    ----------
    known, unknown : ClassMoments
        Of 2 * n_layers features: each layer's error with the model, then each layer's with the control.
    layers : tuple of n_layers str
    estimator, measure : str
        For the result.
    variance : float
        Of what is rebuilt, for known data: of the inputs, summed over their elements. An error of a hundredth of
        it counts as none: needs compare errors with that added.
    rng : numpy.random.Generator
        For the resampling.
    unit : str
        Of the errors.

    Returns
    -------
    LayerScores
    """
    labelled = None not in known.classes and None not in unknown.classes
    if labelled:
        known = known.only(baseline_classes(known.classes, unknown.classes))
    else:
        known, unknown = known.pooled(), unknown.pooled()

    def measured(errors: ClassMoments, name: str) -> Measured:
        check_class_counts(errors.classes, errors.class_counts, name)
        means = class_means(errors, half_samples(errors.counts, N_RESAMPLES, rng))
        return Measured(
            values=means[..., : len(layers)],
            reference=means[..., len(layers) :],
            classes=errors.classes,
            counts=errors.class_counts,
            floor=_NEGLIGIBLE * variance,
        )

    return score(
        measured(known, "known"),
        measured(unknown, "unknown"),
        layers=layers,
        labelled=labelled,
        estimator=estimator,
        measure=measure,
        unit=unit,
        reference_name="control",
    )
