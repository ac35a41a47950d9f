"""What a sweep has to learn: data, classes, splits, and the models that every policy starts from."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from retrainscope.batches import Batches, Label, ordered_classes
from retrainscope.checks import check_number
from retrainscope.dryrun import first_samples
from retrainscope.evaluating import hits_of, mean_of
from retrainscope.exceptions import InvalidDataError, UnsupportedModelError
from retrainscope.heads import (
    check_classes,
    check_new_head,
    collect_head_inputs,
    fitted_head,
    output_places,
    own_places,
    predictions_of,
    with_head,
)
from retrainscope.layers import Layers
from retrainscope.lending import copy_model
from retrainscope.memory import Halving
from retrainscope.predicted import checked_groups
from retrainscope.processes import from_first, n_processes

__all__ = ["MakeOptimizer", "Options", "Task"]

_DRAWS = 50  # of a split into whole groups, of which the nearest to the shares is taken

MakeOptimizer = Callable[[list[nn.Parameter], float], torch.optim.Optimizer]


@dataclass(frozen=True)
class Options:
    """How every policy is trained."""

    steps: int
    batch_size: int
    learning_rates: Sequence[float]
    optimizer: MakeOptimizer
    n_seeds: int
    validation_size: float
    test_size: float | None

    def checked(self) -> "Options":
        """Refuse what cannot be; return the options in Python's own numbers, which can be saved."""
        for name in ("steps", "batch_size", "n_seeds"):
            check_number(name, getattr(self, name), whole=True)
        check_number("validation_size", self.validation_size, whole=False, below=1)
        several = isinstance(self.learning_rates, Iterable) and not isinstance(self.learning_rates, Iterator)
        rates = [*self.learning_rates] if several else []
        if not rates:
            raise InvalidDataError(
                "The 'learning_rates' parameter must be a sequence of at least one number. Got "
                f"{self.learning_rates!r} instead."
            )
        for rate in rates:
            check_number("learning_rates", rate, whole=False)
        if not callable(self.optimizer):
            raise InvalidDataError(
                "The 'optimizer' parameter must be a callable (parameters, learning_rate) -> Optimizer, such as "
                f"torch.optim.SGD. Got {self.optimizer!r} instead."
            )
        return replace(
            self,
            steps=int(self.steps),
            batch_size=int(self.batch_size),
            learning_rates=tuple(float(rate) for rate in rates),
            n_seeds=int(self.n_seeds),
        )


@dataclass(frozen=True)
class Split:
    """Who sees which samples of the unknown data, by their positions."""

    train: NDArray[np.int64]
    validation: NDArray[np.int64]
    test: NDArray[np.int64] | None


@dataclass(frozen=True, eq=False)
class Task:
    """What is to be learnt: data, classes, and the model that every policy starts from, one for each seed."""

    layers: Layers
    known: Batches
    unknown: Batches
    test: Batches
    classes: tuple[Label, ...]  # of the unknown data, in the order of a new head's outputs
    own_places: dict[Label, int] | None  # of these classes among the outputs of the model as given
    known_places: dict[Label, int] | None  # of the known classes among the outputs of the model as given
    known_before: float
    splits: tuple[Split, ...]
    heads: tuple[nn.Linear | None, ...]
    n_samples: tuple[int, int, int, int]  # to train on, to validate and to test, and of the known data
    seed: int
    halving: Halving  # for what is only measured

    @classmethod
    def of(
        cls,
        model: nn.Module,
        layers: Layers,
        known: Batches,
        unknown: Batches,
        test: Batches | None,
        options: Options,
        seed: int,
        groups: Any = None,
    ) -> "Task":
        """Look at the data, refuse what cannot be learnt, split it, and fit the heads."""
        halving = Halving()
        with torch.no_grad():
            ends = [found for _, found in halving.run(known.first(), lambda batch: predictions_of(model, batch.inputs))]
        outputs = torch.cat(ends)
        _check_scores(outputs)
        n_outputs = outputs.shape[1]
        labels, digests = _labels_and_digests(unknown) if groups is None else (_labels(unknown), [])  # copies are one
        known_labels = _labels(known)
        classes, known_classes = ordered_classes(labels), ordered_classes(known_labels)
        check_classes(classes, "unknown")
        if not unknown.indexed and _labels(unknown) != labels:
            raise InvalidDataError(
                "The unknown data comes in another order at every pass, so that test samples cannot be told from those "
                "to train on. Give (X, y), a Dataset, or a DataLoader that shuffles by torch's generators."
            )
        test_labels = [] if test is None else _labels(test)
        if test is not None:
            _check_test_classes(ordered_classes(test_labels), classes)
        members = digests if groups is None else checked_groups(groups, unknown, len(labels))
        splits = tuple(
            _split(labels, members, classes, options, np.random.default_rng([seed, number]))
            for number in range(options.n_seeds)
        )
        own = own_places(n_outputs, known_classes, classes)
        if own is not None and not layers.parameters[layers.head]:
            raise UnsupportedModelError(
                f"The head {layers.head!r} has no parameters to train. Name the last layer that has, with head=."
            )
        heads: tuple[nn.Linear | None, ...] = (None,) * len(splits)
        try:  # refused here, before any training, where a new head does not fit
            features, _ = collect_head_inputs(model, layers.head, unknown, halving)
            heads = tuple(
                _starting_head(model, layers.head, features, labels, classes, split, unknown, own, halving)
                for split in splits
            )
        except UnsupportedModelError:
            if own is None:
                raise
        heads = _same_heads(heads, known.device)
        known_places = output_places(n_outputs, known_classes)
        return cls(
            layers=layers,
            known=known,
            unknown=unknown,
            test=unknown if test is None else test,
            classes=classes,
            own_places=own,
            known_places=known_places,
            known_before=mean_of(None if known_places is None else hits_of(model, known, known_places, halving)),
            splits=splits,
            heads=heads,
            n_samples=(
                len(splits[0].train),
                len(splits[0].validation),
                len(test_labels) if splits[0].test is None else len(splits[0].test),
                len(known_labels),
            ),
            seed=seed,
            halving=halving,
        )

    def start(self, model: nn.Module, number: int) -> nn.Module:
        """Return a copy of the model as every policy starts from it."""
        head = self.heads[number]
        copied = copy_model(model) if head is None else with_head(model, self.layers.head, head)
        for module in copied.modules():
            if isinstance(module, nn.Embedding | nn.EmbeddingBag):
                module.sparse = False  # sparse gradients are of the same values, and few optimizers take them
        return copied

    def places(self, number: int) -> dict[Label, int]:
        """Return which output of the starting model stands for which unknown class."""
        if self.heads[number] is None:
            assert self.own_places is not None
            return self.own_places
        return {label: place for place, label in enumerate(self.classes)}


def _starting_head(
    model: nn.Module,
    head: str,
    features: Tensor,
    labels: list[Label],
    classes: tuple[Label, ...],
    split: Split,
    unknown: Batches,
    own: dict[Label, int] | None,
    halving: Halving,
) -> nn.Linear | None:
    """Fit a new head, or return None where the model's own is no worse on the validation samples."""
    fitted = fitted_head(features[torch.from_numpy(split.train)], [labels[row] for row in split.train], classes)
    renewed = with_head(model, head, fitted)
    check_new_head(renewed, head, len(classes), first_samples(unknown.few().inputs, 2))
    if own is None:
        return fitted
    validation = unknown.subset(split.validation)
    places = {label: place for place, label in enumerate(classes)}
    return (
        None
        if hits_of(model, validation, own, halving).mean() >= hits_of(renewed, validation, places, halving).mean()
        else fitted
    )


def _same_heads(heads: tuple[nn.Linear | None, ...], device: torch.device) -> tuple[nn.Linear | None, ...]:
    """Return the heads that process 0 has fitted: machines may round in other ways."""
    if n_processes() == 1:
        return heads
    found = from_first("the new heads", [None if head is None else head.cpu() for head in heads])
    return tuple(None if head is None else head.to(device) for head in found)


def _labels_and_digests(batches: Batches) -> tuple[list[Label], list[str]]:
    labels, digests = list[Label](), list[str]()
    for batch in batches:
        labels += batch.labels or (None,) * len(batch)
        digests += batch.digests
    return labels, digests


def _labels(batches: Batches) -> list[Label]:
    return [label for batch in batches for label in (batch.labels or (None,) * len(batch))]


def _check_scores(outputs: Tensor) -> None:
    """Refuse probabilities, on which cross-entropy would take the softmax a second time."""
    if outputs.shape[1] > 1 and (outputs >= 0).all() and (outputs.float().sum(dim=1) - 1).abs().max() < 1e-3:
        raise UnsupportedModelError(
            "The model returns probabilities, and cross-entropy takes class scores, as they are before the softmax. "
            "Leave the softmax out of the model: it changes no decision."
        )


def _check_test_classes(test: tuple[Label, ...], unknown: tuple[Label, ...]) -> None:
    if test == (None,):
        raise InvalidDataError("The test data has no labels, and this needs them. Give (X, y).")
    strange = [label for label in test if label not in unknown]
    if strange:
        raise InvalidDataError(
            f"The test data has classes that the unknown data lacks: {', '.join(map(repr, strange[:5]))}. Nothing can "
            "be learnt about them; leave them out."
        )


def _split(
    labels: list[Label],
    groups: Sequence[Label],
    classes: tuple[Label, ...],
    options: Options,
    rng: np.random.Generator,
) -> Split:
    """Divide the samples of each class at random, whole groups at a time, and as near to the shares as some draws come.

    Without groups the first draw has the shares.
    """
    sizes = {label: Counter[Label]() for label in classes}
    for label, group in zip(labels, groups, strict=True):
        sizes[label][group] += 1
    wanted = {label: _wanted(options, sum(mine.values())) for label, mine in sizes.items()}
    best: dict[Label, int] = {}
    least, lacking = np.inf, ""
    for _ in range(_DRAWS):
        part_of: dict[Label, int] = {}  # of each group
        off = 0
        for label, mine in sizes.items():
            found = _filled(mine, wanted[label], part_of, rng)
            off += sum(abs(n - w) for n, w in zip(found, wanted[label], strict=True))
            if not all(n or not w for n, w in zip(found, wanted[label], strict=True)) or not found[-1]:
                lacking = lacking or _too_few(label, mine, wanted[label], found)
                break
        else:
            if off < least:
                best, least = part_of, off
            if off == 0:
                break
    if not best:
        raise InvalidDataError(lacking)
    parts = np.array([best[group] for group in groups])
    test, validation, train = (np.flatnonzero(parts == part) for part in range(3))
    return Split(train=train, validation=validation, test=None if options.test_size is None else test)


def _wanted(options: Options, n_samples: int) -> tuple[int, int, int]:
    """Return how many samples of a class to test on, to validate and, what is left, to train on."""
    n_test = 0 if options.test_size is None else max(1, round(options.test_size * n_samples))
    n_validation = max(1, round(options.validation_size * (n_samples - n_test)))
    return n_test, n_validation, max(0, n_samples - n_test - n_validation)


def _filled(
    sizes: Counter[Label], wanted: tuple[int, int, int], part_of: dict[Label, int], rng: np.random.Generator
) -> list[int]:
    """Fill the parts with the groups of a class, in random order; return how many samples each part has then."""
    units, found = [*sizes], [0, 0, 0]
    for group in units:
        if group in part_of:  # by a class before
            found[part_of[group]] += sizes[group]
    free = [units[place] for place in rng.permutation(len(units)) if units[place] not in part_of]
    for number, group in enumerate(free):
        empty = [part for part in range(3) if wanted[part] and not found[part]]
        short = [part for part in range(2) if found[part] < wanted[part]]
        # The last groups are kept for parts that have none.
        part = empty[0] if empty and len(free) - number <= len(empty) else next(iter(short), 2)
        part_of[group] = part
        found[part] += sizes[group]
    return found


def _too_few(label: Label, sizes: Counter[Label], wanted: tuple[int, int, int], found: list[int]) -> str:
    n_samples, n_groups, (n_test, n_validation, _) = sum(sizes.values()), len(sizes), wanted
    in_groups = "" if n_groups == n_samples else f" in {n_groups} group{'' if n_groups == 1 else 's'}"
    held_out = f"{n_validation} to validate{f' and {n_test} to test' if n_test else ''}"
    samples = f"{n_samples} sample{'' if n_samples == 1 else 's'}{in_groups}"
    # With groups that other classes are in too it may be another part that is left without.
    lacks = "to train on" if not found[2] else "to validate" if not found[1] else "to test"
    return (
        f"The unknown class {label!r} has {samples}: with {held_out} none is left {lacks}. Give at least "
        f"{3 if n_test else 2}{' groups (samples of equal inputs are one)' if in_groups else ''}, better fifty, or "
        "hold out a smaller share."
    )
