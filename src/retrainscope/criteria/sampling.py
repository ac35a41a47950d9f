"""Samples of each class drawn at random in one pass, and dealt out so that two sets can be compared."""

import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil

import numpy as np
from numpy.typing import NDArray

from retrainscope.batches import Label, ordered_classes

__all__ = ["ClassSample", "Draw", "Reservoir", "deal", "halved"]

_MOST_SAMPLES = 2**14  # of all classes together

Draw = tuple[tuple[int, NDArray[np.int64]], ...]  # for each of some classes its place, and the rows of its samples


@dataclass(frozen=True)
class ClassSample:
    """Features of samples that were drawn at random from each class.

    Attributes
    ----------
    classes : tuple of n_classes labels
    features : dict of str to list of n_classes ndarray
        By layer, of shape (n_samples of the class, n_features), in random order and for all layers the same.
    """

    classes: tuple[Label, ...]
    features: dict[str, list[NDArray[np.floating]]]

    @property
    def sizes(self) -> NDArray[np.int64]:
        """Samples of each class, shape (n_classes,)."""
        return np.array([len(rows) for rows in next(iter(self.features.values()))])

    def only(self, classes: tuple[Label, ...]) -> "ClassSample":
        """Return these classes alone, in this order."""
        places = [self.classes.index(label) for label in classes]
        return ClassSample(classes, {name: [found[i] for i in places] for name, found in self.features.items()})

    def first(self, most: int) -> "ClassSample":
        """Return at most so many samples of each class."""
        return ClassSample(self.classes, {name: [rows[:most] for rows in f] for name, f in self.features.items()})


class Reservoir:
    """Chooses a random sample of each class in one pass, the same however the samples come in batches.

    Each sample gets a random key, and those with the smallest keys of their class stay. With more classes than leave
    room for `per_class` samples each, fewer of each stay, though never less than two.

    Parameters
    ----------
    per_class : int
        The most samples of a class.
    rng : numpy.random.Generator
    most : int
        The most samples of all classes together.
    """

    def __init__(self, per_class: int, rng: np.random.Generator, *, most: int = _MOST_SAMPLES) -> None:
        self._per_class, self._rng, self._most = per_class, rng, most
        self._heaps: dict[Label, list[tuple[float, int]]] = {}  # the largest key first, so negated

    @property
    def chosen(self) -> dict[Label, list[int]]:
        """Positions of the samples that stay by class, in random order; classes sorted where they compare."""
        return {
            label: [position for _, position in sorted(self._heaps[label], reverse=True)]
            for label in ordered_classes(self._heaps)
        }

    def offer(self, labels: Sequence[Label], positions: NDArray[np.int64]) -> tuple[NDArray[np.int64], set[int]]:
        """Take in the next samples.

        Parameters
        ----------
        labels : sequence of n_samples labels
        positions : ndarray of shape (n_samples,)
            By which a sample is known; each is offered once.

        Returns
        -------
        stay : ndarray of int
            The rows of those samples that stay.
        leave : set of int
            The positions of those that leave: what is kept of them can go.
        """
        keys = self._rng.random(len(labels))
        left: set[int] = set()
        for label, position, key in zip(labels, positions.tolist(), keys.tolist(), strict=True):
            if label not in self._heaps:
                self._heaps[label] = []
                left |= self._make_room()
            heap, entry = self._heaps[label], (-key, position)
            if len(heap) < self._quota:
                heapq.heappush(heap, entry)
            else:
                left.add(heapq.heappushpop(heap, entry)[1])
        stay = np.array(
            [row for row, position in enumerate(positions.tolist()) if position not in left], dtype=np.int64
        )
        return stay, left

    @property
    def _quota(self) -> int:
        return max(2, min(self._per_class, self._most // len(self._heaps)))

    def _make_room(self) -> set[int]:
        return {heapq.heappop(heap)[1] for heap in self._heaps.values() for _ in range(max(0, len(heap) - self._quota))}


def deal(
    rows: Sequence[NDArray[np.int64]], order: Sequence[int], *, n_classes: int, n: int, n_rounds: int
) -> list[Draw]:
    """Deal samples into draws of equally many classes with equally many samples.

    Many measures depend on the number of classes and of samples; what two sets give is to be compared only if both
    numbers agree. The set with more of them is measured on several draws, of which each class is in at least one.

    Parameters
    ----------
    rows : sequence of ndarray
        Of each class, at least n of them.
    order : sequence of int
        The classes in the order in which they meet in draws.
    n_classes, n : int
        Of a draw: classes, and samples of each.
    n_rounds : int
        How often each class is dealt at least; every time its next n rows, from the start again after the last.

    Returns
    -------
    list of Draw
    """
    dealt, draws, place = [0] * len(rows), list[Draw](), 0
    for _ in range(n_rounds * ceil(len(rows) / n_classes)):
        chosen = sorted(order[(place + step) % len(rows)] for step in range(n_classes))
        draws.append(tuple((c, rows[c][(dealt[c] + np.arange(n)) % len(rows[c])]) for c in chosen))
        place += n_classes
        for c in chosen:
            dealt[c] += n
    return draws


def halved(sizes: NDArray[np.int64], n: int, rng: np.random.Generator) -> tuple[list[NDArray[np.int64]], int]:
    """Draw a random half of each class without replacement, and say how many samples of it make a draw.

    The half-sample bootstrap of `half_samples`, sample by sample: no sample is repeated, which would look like scatter
    of its own or, on two sides of a cross-validation, give the answer away.

    Parameters
    ----------
    sizes : ndarray of shape (n_classes,)
    n : int
        Samples of a class in a draw from the whole.
    rng : numpy.random.Generator

    Returns
    -------
    rows : list of n_classes ndarray
    n : int
        Half of what it was, rounded up or down at random.
    """
    up = int(rng.integers(2))
    return [rng.permutation(size)[: (size + up) // 2] for size in sizes], (n + up) // 2
