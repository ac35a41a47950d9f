"""Which samples a forecast is of: some of each class, or of some classes where there are many."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from retrainscope.answers import Answers
from retrainscope.batches import Batches, Label
from retrainscope.exceptions import InvalidDataError
from retrainscope.predicted import checked_groups
from retrainscope.processes import agree, digest_of, n_processes
from retrainscope.shares import held

__all__ = ["MOST_SAMPLES", "Drawn", "draw_samples"]

MOST_SAMPLES = 600  # of the unknown data: time grows with the cube of them, memory with the square
_FEWEST_SAMPLES = 10  # of a class, the fewest that the benchmark has: of many classes some are drawn instead


@dataclass(frozen=True, eq=False)
class Drawn:
    """The samples that a forecast is of.

    Attributes
    ----------
    samples : Batches
        Held, if they are not too large.
    labels : list of n_samples labels
        In the order that the samples come in.
    groups : ndarray of shape (n_samples,)
        Of each sample the number of its group; samples of equal inputs are one group, unless groups were given.
    n_copies : int
        Samples with the inputs of an earlier one.
    every_class : tuple of labels
        Of all data, drawn or not.
    """

    samples: Batches
    labels: list[Label]
    groups: NDArray[np.int64]
    n_copies: int
    every_class: tuple[Label, ...]


def draw_samples(answers: Answers, batches: Batches, groups: Any, *, per_class: int, seed: int) -> Drawn:
    """Draw samples of each class, or of some where there are many.

    Parameters
    ----------
    answers : Answers
        What a pass over the data told.
    batches : Batches
    groups : sequence of n_samples labels, or None
        As `TangentProbe.score_layers` takes them.
    per_class : int
        The most of a class.
    seed : int

    Raises
    ------
    InvalidDataError
        If the groups do not fit, or the data comes in another order now.
    """
    rows = dict[Label, list[int]]()
    for label, position in zip(answers.labels, answers.positions, strict=True):
        rows.setdefault(label, []).append(position)
    named = None if groups is None else checked_groups(groups, batches, sum(map(len, rows.values())))
    if n_processes() > 1:
        agree({"groups": digest_of([], named)})
    every_class, rng = tuple(rows), np.random.default_rng(seed)
    most_classes = MOST_SAMPLES // min(_FEWEST_SAMPLES, per_class)
    if len(rows) > most_classes:
        kept = set(rng.choice(len(rows), most_classes, replace=False).tolist())
        rows = {label: mine for place, (label, mine) in enumerate(rows.items()) if place in kept}
    most = min(per_class, MOST_SAMPLES // len(rows))
    drawn = {p: label for label, mine in rows.items() for p in rng.permutation(mine)[:most].tolist()}
    positions = sorted(drawn)
    labels, samples = [drawn[position] for position in positions], held(batches.subset(np.array(positions)))
    found, digests = list[Label](), list[str]()
    for batch in samples:
        found += batch.labels or (None,) * len(batch)
        digests += batch.digests
    if found != labels:
        raise InvalidDataError(
            "The unknown data comes in another order at every pass, so that labels and samples cannot be brought "
            "together. Give (X, y), a Dataset, or a DataLoader that shuffles by torch's generators."
        )
    numbers: dict[Label, int] = {}
    of_one = digests if named is None else [named[position] for position in positions]
    members = np.array([numbers.setdefault(one, len(numbers)) for one in of_one])
    return Drawn(samples, labels, members, len(digests) - len(set(digests)), every_class)
