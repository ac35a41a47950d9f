"""`LayerScores`: what an estimator says of every layer."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from numpy.typing import NDArray

from retrainscope.batches import Label
from retrainscope.saving import load_json, save_json
from retrainscope.tables import Shown, Table, interval_text, number_text

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["CONFIDENCE", "TAILS", "LayerScores", "Measured", "score"]

CONFIDENCE = 0.9
TAILS = (1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2
_MOST_COLUMNS = 12
_FOR_INTERVAL = 4  # samples of a class, so that a half of them still varies

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Measured:
    """A measure of one set of samples, with its resamples.

    Attributes
    ----------
    values : ndarray of shape (1 + n_resamples, 1 + n_classes, n_layers)
        Positive, larger is worse. First row: the whole sample. First column: all classes together.
    reference : ndarray of the same shape, or with one layer; or None
        The measure where there is nothing to learn: at the input, or at the same layer of the control. None: the
        measure has no such place, and needs are plain contrasts.
    classes : tuple of n_classes labels
    counts : ndarray of shape (n_classes,)
        Samples of each class.
    floor : float
        Added to every measure before its logarithm is taken: what is far below it is as good as nothing, and
        the ratio of two such values is noise.
    in_nats : bool
        Whether the measure is a logarithm by itself (an evidence, a coding rate), of any sign.
    """

    values: Floats
    reference: Floats | None
    classes: tuple[Label, ...]
    counts: Floats
    floor: float = 0.0
    in_nats: bool = False

    def logs(self) -> tuple[Floats, Floats]:
        """Return values and reference in nats; without a reference, zeros."""
        reference = np.zeros_like(self.values) if self.reference is None else self.reference
        if self.in_nats:
            return self.values, reference
        with np.errstate(divide="ignore", invalid="ignore"):
            logs = np.log(self.values + self.floor)
            return logs, (reference if self.reference is None else np.log(reference + self.floor))

    def reference_by_layer(self) -> Floats:
        """Return the reference of the whole sample, of shape (1 + n_classes, n_layers); NaN where there is none."""
        whole = np.full_like(self.values[0], np.nan) if self.reference is None else self.reference[0]
        return np.ascontiguousarray(np.broadcast_to(whole, self.values.shape[1:]))


@dataclass(frozen=True, eq=False, repr=False)
class LayerScores(Shown):
    """How much worse the unknown data fares than the known, layer by layer.

    need = [log m(unknown) - log m(known)] - [the same at the reference], in nats, for a measure m where
    larger is worse. 0 is no evidence, higher is more in need of retraining. NaN: not to be measured.

    Attributes
    ----------
    estimator : str
        The class that measured.
    measure : str
        What was measured, in words.
    unit : str
        Of the raw measures.
    reference_name : str
        ``"input"``, ``"control"``, or ``""`` where the measure has no reference.
    layers : tuple of str
        In the order of execution.
    values : ndarray of shape (n_layers,)
        Need, in nats.
    interval : ndarray of shape (n_layers, 2)
        90 % bootstrap interval of the need.
    classes : tuple of labels
        The classes of the unknown data; empty without labels.
    per_class : ndarray of shape (n_classes, n_layers)
        Need of each class of the unknown data against all known data.
    per_class_interval : ndarray of shape (n_classes, n_layers, 2)
    known, unknown : ndarray of shape (n_layers,)
        The raw measures.
    known_reference, unknown_reference : ndarray of shape (n_layers,)
        The raw measures at the reference.
    known_classes : tuple of labels
    known_per_class, unknown_per_class : ndarray of shape (n_classes, n_layers)
        The raw measures class by class.
    known_per_class_reference, unknown_per_class_reference : ndarray of shape (n_classes, n_layers)
        The same at the reference.
    n_samples : tuple of (int, int)
        Samples measured, known and unknown.
    class_sizes : tuple of ((int, int), (int, int))
        The fewest and the most samples of a class, known and unknown.
    one_sided : bool
        Whether only a high need tells something: a low one does not show that a layer can be kept.

    Examples
    --------
    >>> import torch
    >>> import retrainscope as rs
    >>> _ = torch.manual_seed(0)
    >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3))
    >>> X, y = torch.randn(90, 4), torch.arange(90) % 3
    >>> X[:, 0] += 3.0 * y
    >>> scores = rs.ActivationSpread(model, random_state=0).fit((X, y)).score_layers((X.roll(1, dims=1), y + 3))
    >>> scores.layers, scores.classes, scores.values.shape, scores.per_class.shape
    (('0',), (3, 4, 5), (1,), (3, 1))
    >>> print(scores)
    ActivationSpread: ...
    """

    estimator: str
    measure: str
    unit: str
    reference_name: str
    layers: tuple[str, ...]
    values: Floats
    interval: Floats
    classes: tuple[Label, ...]
    per_class: Floats
    per_class_interval: Floats
    known: Floats
    unknown: Floats
    known_reference: Floats
    unknown_reference: Floats
    known_classes: tuple[Label, ...]
    known_per_class: Floats
    unknown_per_class: Floats
    known_per_class_reference: Floats
    unknown_per_class_reference: Floats
    n_samples: tuple[int, int]
    one_sided: bool
    class_sizes: tuple[tuple[int, int], tuple[int, int]] = ((0, 0), (0, 0))

    def to_frame(self) -> "pd.DataFrame":
        """Return one row a layer as a pandas DataFrame.

        Raises
        ------
        MissingExtraError
            If pandas is not installed.
        """
        from retrainscope.saving import import_pandas

        columns: dict[str, Any] = {
            "layer": list(self.layers),
            "need": self.values,
            "need_low": self.interval[:, 0],
            "need_high": self.interval[:, 1],
            "known": self.known,
            "unknown": self.unknown,
            "known_reference": self.known_reference,
            "unknown_reference": self.unknown_reference,
        }
        columns |= {f"need[{label}]": row for label, row in zip(self.classes, self.per_class, strict=True)}
        frame: pd.DataFrame = import_pandas().DataFrame(columns)
        return frame

    def save(self, path: str | Path) -> None:
        """Write the scores to a JSON file.

        Raises
        ------
        ResultFormatError
            If a class label is no string, number, boolean, None or tuple of these.
        """
        save_json(self, path)

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read scores that `save` wrote.

        Raises
        ------
        ResultFormatError
            If the file holds something else, or was written by a newer version.
        """
        return load_json(cls, path)

    def as_table(self) -> Table:
        """Return the scores as a table: one row a layer, one column for each class of the unknown data.

        Of more than 12 classes those with the greatest needs have a column.
        """
        known, unknown = self.n_samples
        shown = np.arange(len(self.classes))
        if len(shown) > _MOST_COLUMNS:
            greatest = np.nan_to_num(self.per_class, nan=-np.inf).max(axis=1)
            shown = np.sort(np.argsort(-greatest, kind="stable")[:_MOST_COLUMNS])
        rows = [
            [
                layer,
                f"{self.known[i]:.4g}",
                f"{self.unknown[i]:.4g}",
                number_text(self.values[i]),
                interval_text(self.interval[i]),
                *(number_text(need) for need in self.per_class[shown, i]),
            ]
            for i, layer in enumerate(self.layers)
        ]
        return Table(
            f"{self.estimator}: {self.measure} ({self.unit}); {known} known and {unknown} unknown samples; "
            f"need in nats{f' against the {self.reference_name}' if self.reference_name else ''}",
            ["layer", "known", "unknown", "need", "90 % interval", *(str(self.classes[place]) for place in shown)],
            rows,
            note=self._note(len(shown)),
        )

    def _note(self, n_shown: int) -> str:
        """Say how many classes there are, and where they are too many or too small."""
        sides = zip(("known", "unknown"), (self.known_classes, self.classes), self.class_sizes, strict=True)
        notes = [
            f"{len(classes):,} {side} classes of {fewest}{f' to {most}' if most > fewest else ''} samples"
            for side, classes, (fewest, most) in sides
            if classes
        ]
        if n_shown < len(self.classes):
            notes.append(f"shown are the {n_shown} of the greatest need")
        if 0 < min(fewest for fewest, _ in self.class_sizes) < _FOR_INTERVAL and np.isnan(self.interval).any():
            notes.append(f"a class of fewer than {_FOR_INTERVAL} samples leaves no interval")
        return f"{'; '.join(notes)}." if notes else ""


def score(
    known: Measured,
    unknown: Measured,
    *,
    layers: tuple[str, ...],
    labelled: bool,
    one_sided: bool = False,
    **described: str,
) -> LayerScores:
    """Turn the measures of known and unknown data into needs.

    Parameters
    ----------
    known, unknown : Measured
        With equally many resamples.
    layers : tuple of str
    labelled : bool
        Whether the classes are the user's; without labels there is no table by class.
    one_sided : bool
        Whether a low need tells nothing.
    **described
        estimator, measure, unit and reference_name of the result.

    Returns
    -------
    LayerScores
    """
    (known_logs, known_expected), (unknown_logs, unknown_expected) = known.logs(), unknown.logs()
    with np.errstate(invalid="ignore"):
        need = unknown_logs - known_logs[:, :1] - (unknown_expected - known_expected[:, :1])
    need = np.where(np.isfinite(need), need, np.nan)
    interval = np.moveaxis(np.quantile(need[1:], TAILS, axis=0), 0, -1)
    novel = slice(1, None) if labelled else slice(1, 1)
    known_reference, unknown_reference = known.reference_by_layer(), unknown.reference_by_layer()
    return LayerScores(
        layers=layers,
        values=need[0, 0],
        interval=interval[0],
        classes=unknown.classes if labelled else (),
        per_class=need[0, novel],
        per_class_interval=interval[novel],
        known=known.values[0, 0],
        unknown=unknown.values[0, 0],
        known_reference=known_reference[0],
        unknown_reference=unknown_reference[0],
        known_classes=known.classes if labelled else (),
        known_per_class=known.values[0, novel],
        unknown_per_class=unknown.values[0, novel],
        known_per_class_reference=known_reference[novel],
        unknown_per_class_reference=unknown_reference[novel],
        n_samples=(int(known.counts.sum()), int(unknown.counts.sum())),
        class_sizes=(_sizes(known.counts), _sizes(unknown.counts)),
        one_sided=one_sided,
        **described,
    )


def _sizes(counts: Floats) -> tuple[int, int]:
    return int(counts.min()), int(counts.max())
