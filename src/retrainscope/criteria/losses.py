"""What the criteria on gradients share: the samples and the head whose loss is differentiated, and the comparison."""

from abc import abstractmethod
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from retrainscope.base import LayerEstimator
from retrainscope.batches import Batch, Batches, Label, ordered_classes
from retrainscope.checks import check_number
from retrainscope.comparing import baseline_classes, check_class_counts
from retrainscope.dryrun import first_samples
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
from retrainscope.moments import ClassMoments, GroupCounter, RunningMoments
from retrainscope.processes import n_processes, rank
from retrainscope.progress import progress_bar
from retrainscope.sample_gradients import sample_gradients
from retrainscope.scores import LayerScores, Measured, score
from retrainscope.shares import dealt, held, merged, together
from retrainscope.tracing import run_layers

__all__ = [
    "GradientCriterion",
    "HeadedSample",
    "LabelledSample",
    "Resampled",
    "batches_of",
    "mini_batches",
    "sample_loss",
]

Floats = NDArray[np.float64]
_N_FOLDS = 2  # of a new head: those that fit it, and those whose loss is taken


@dataclass(frozen=True)
class LabelledSample:
    """Chosen samples of labelled data.

    Attributes
    ----------
    batches : Batches
        Of these samples alone.
    positions : ndarray of shape (n_samples,)
        Their places in the whole data, ascending, which is the order that they come in.
    labels : tuple of n_samples labels
    """

    batches: Batches
    positions: NDArray[np.int64]
    labels: tuple[Label, ...]

    @property
    def classes(self) -> tuple[Label, ...]:
        """The classes in order."""
        return ordered_classes(self.labels)

    @property
    def class_counts(self) -> Floats:
        """Samples of each class, shape (n_classes,)."""
        counts = Counter(self.labels)
        return np.array([counts[label] for label in self.classes], dtype=np.float64)

    def take(self, rows: NDArray[np.int64]) -> "LabelledSample":
        """Return some of the samples, given by their numbers among these, ascending."""
        positions = self.positions[rows]
        return LabelledSample(self.batches.subset(positions), positions, tuple(self.labels[row] for row in rows))

    def only(self, classes: tuple[Label, ...]) -> "LabelledSample":
        """Return the samples of these classes."""
        wanted = set(classes)
        return self.take(np.flatnonzero([label in wanted for label in self.labels]))


@dataclass(frozen=True)
class HeadedSample:
    """Samples with the network that their loss is of, and its output for each class."""

    network: nn.Module
    sample: LabelledSample
    places: dict[Label, int]

    def targets(self, batch: Batch) -> Tensor:
        """Return the output that stands for each sample's class, of shape (n_samples,)."""
        return torch.tensor([self.places[label] for label in batch.labels or ()], device=batch.device)


@dataclass(frozen=True)
class Resampled:
    """A measure of every layer with its resamples; first row: the whole sample.

    Attributes
    ----------
    overall : ndarray of shape (1 + n_resamples, n_layers)
    by_class : ndarray of shape (1 + n_resamples, n_classes, n_layers)
        Of each class by itself.
    """

    overall: Floats
    by_class: Floats


def sample_loss(output: Tensor, target: Tensor) -> Tensor:
    """Compute the cross-entropy of one sample, in single precision at least."""
    return cross_entropy(output.to(torch.promote_types(output.dtype, torch.float32)), target)


class GradientCriterion(LayerEstimator):
    """What the criteria on gradients share: a random sample of each class, a head, and the comparison.

    One pass over the data without gradients checks it and draws at most `samples_per_class` samples of each class; only
    these are differentiated. The loss is the cross-entropy of the model's own outputs where they stand for the
    classes of both sides (the unknown classes are known ones, and labels are numbers of outputs); so the model must
    return class scores before a softmax, or their logarithm after it. Else it is that of a new linear head, fitted to
    the frozen features by logistic regression, for known and unknown data alike, so that they differ in the data alone:
    each half of the samples has the head fitted to the other half, as a head's loss on what it was fitted to is too
    low. The known data is then measured again by `score_layers`; it is kept by reference.

    The needs of the layers compare all classes together, those by class each unknown class with the mean of single
    known classes. Intervals are about samples (random halves of ten groups of samples or mini-batches) and take a new
    head as given. If every unknown class is a known one, the known data is measured on those classes alone.
    """

    _takes_shares: ClassVar[bool] = True
    _needs_labels: ClassVar[bool] = True
    _measure: ClassVar[str]
    _unit: ClassVar[str]

    def __init__(
        self,
        model: nn.Module,
        *,
        layers: Iterable[str | type[nn.Module]] | None = None,
        head: str | None = None,
        input_layer: str | None = None,
        calls: str | None = None,
        samples_per_class: int = 50,
        batch_size: int = 256,
        device: str | torch.device | None = None,
        random_state: int | np.random.RandomState | None = None,
        progress: bool | None = None,
    ) -> None:
        self.model = model
        self.layers = layers
        self.head = head
        self.input_layer = input_layer
        self.calls = calls
        self.samples_per_class = samples_per_class
        self.batch_size = batch_size
        self.device = device
        self.random_state = random_state
        self.progress = progress

    @abstractmethod
    def _gradients(self, parts: Iterable[HeadedSample]) -> Any:
        """Differentiate the samples and keep what `_resampled` needs of the gradients."""

    @abstractmethod
    def _resampled(self, gradients: Any, rng: np.random.Generator) -> Resampled:
        """Compute the measure; larger is worse."""

    def _sizes(self) -> tuple[int, ...]:
        """Return how many samples are differentiated together, where that matters."""
        return ()

    def _described(self) -> str:
        """Say what is measured."""
        return self._measure

    def _measure_known(self, model: nn.Module, batches: Batches) -> None:
        check_number("samples_per_class", self.samples_per_class, whole=True, least=2)
        with torch.no_grad():
            self._n_outputs = predictions_of(model, first_samples(batches.few().inputs, 2)).shape[1]
        self._known, self._done = self._sample(model, batches), dict[Any, Any]()
        own = output_places(self._n_outputs, self._known.classes) is not None
        self._match(self._known)
        self._known_gradients(model, self._known, own)

    def _score(self, model: nn.Module, batches: Batches, rng: np.random.Generator) -> LayerScores:
        unknown = self._sample(model, batches)
        own = own_places(self._n_outputs, self._known.classes, unknown.classes) is not None
        known = self._known.only(baseline_classes(self._known.classes, unknown.classes))
        self._match(known, unknown)
        ours = self._resampled(self._known_gradients(model, known, own), rng)
        theirs = self._resampled(self._gradients(self._headed(model, unknown, own)), rng)
        return self._compared((known, ours), (unknown, theirs))

    def _match(self, *sides: LabelledSample) -> None:
        """Note the size of the smaller side, and of the smallest class, so that both are measured alike."""
        self._n_fewest = min(len(side.labels) for side in sides)
        self._n_smallest = min(int(side.class_counts.min()) for side in sides)

    def _known_gradients(self, model: nn.Module, known: LabelledSample, own: bool) -> Any:
        """Differentiate the known samples, unless that was done in the same way the last time."""
        way = (own, known.classes, self._sizes())
        if way not in self._done:
            self._done = {way: self._gradients(self._headed(model, known, own))}
        return self._done[way]

    def _sample(self, model: nn.Module, batches: Batches) -> LabelledSample:
        """Look at all samples, and draw some of each class."""
        name, rows = batches.name, dict[Label, list[int]]()
        total = None if batches.n_batches is None else -(-batches.n_batches // n_processes())
        steps = progress_bar(together(batches), what=f"layers of {name}", progress=self.progress, total=total)
        for step, (batch, told) in enumerate(steps):
            for one in told:
                self._check_labels(one.labels, name)
                for label, position in zip(one.labels, one.positions.tolist(), strict=True):
                    rows.setdefault(label, []).append(position)
            if batch is not None:
                where = f"batch {step * n_processes() + rank()} of the {name} data"
                options: dict[str, Any] = {"calls": self.calls, "token_axes": self._token_axes, "where": where}
                with torch.no_grad():
                    run_layers(model, batch.inputs, self.layers_.names, lambda *_: None, **options)
        classes = ordered_classes(rows)
        check_class_counts(classes, np.array([len(rows[label]) for label in classes], dtype=np.float64), name)
        rng = np.random.default_rng(self._seed)
        drawn = {
            int(position): label
            for label in classes
            for position in rng.permutation(rows[label])[: self.samples_per_class]
        }
        positions = np.array(sorted(drawn))
        labels = tuple(drawn[int(position)] for position in positions)
        return LabelledSample(held(batches.subset(positions)), positions, labels)

    def _headed(self, model: nn.Module, sample: LabelledSample, own: bool) -> Iterator[HeadedSample]:
        """Yield all samples with the model, or each half with a new head fitted to the other."""
        classes = sample.classes
        if own:
            yield HeadedSample(model, sample, output_places(self._n_outputs, classes) or {})
            return
        check_classes(classes, sample.batches.name)
        head = self.layers_.head
        features, labels = collect_head_inputs(model, head, sample.batches, self._halving)
        places = {label: place for place, label in enumerate(classes)}
        turns = dict.fromkeys(classes, 0)
        folds = np.empty(len(labels), dtype=np.int64)
        for row, label in enumerate(labels):
            folds[row] = turns[label] % _N_FOLDS
            turns[label] += 1
        for held_out in range(_N_FOLDS):
            fitting = np.flatnonzero(folds != held_out)
            linear = fitted_head(features[torch.from_numpy(fitting)], [labels[row] for row in fitting], classes)
            held = sample.take(np.flatnonzero(folds == held_out))
            renewed = with_head(model, head, linear)
            check_new_head(renewed, head, len(classes), first_samples(held.batches.few().inputs, 2))
            yield HeadedSample(renewed, held, places)

    def _moments(self, parts: Iterable[HeadedSample], features: Callable[[Tensor], Tensor]) -> dict[str, ClassMoments]:
        """Sum up features(gradients) of all samples for each layer, of gradients of shape (n_samples, n_parameters)."""
        counter, moments = GroupCounter(), defaultdict[str, RunningMoments](RunningMoments)
        owned = {layer: self.layers_.parameters[layer] for layer in self.layers_.names}
        with progress_bar(what="gradients of samples", progress=self.progress) as bar:
            for part in parts:
                sample = part.sample
                groups = counter.deal(sample.labels)
                for batch in dealt(sample.batches):
                    labels, places = batch.labels or (), np.searchsorted(sample.positions, batch.positions)
                    targets = part.targets(batch)
                    for rows in sample_gradients(part.network, batch.inputs, targets, sample_loss, owned):
                        n = len(next(iter(rows.values())))
                        for layer, gradients in rows.items():
                            moments[layer].add(features(gradients), labels[:n], groups[places[:n]])
                        labels, places = labels[n:], places[n:]
                        bar.update(n)
        sums = {layer: running.moments() for layer, running in moments.items()}
        found = {layer: merged(f"gradients of {layer!r}", sums.get(layer)) for layer in owned}
        return {layer: each.only(counter.classes).ordered() for layer, each in found.items()}

    def _compared(
        self, known: tuple[LabelledSample, Resampled], unknown: tuple[LabelledSample, Resampled]
    ) -> LayerScores:
        """Compare all classes together with all together, and each unknown class with the mean of single known ones."""

        def measured(side: tuple[LabelledSample, Resampled], *, together: bool) -> Measured:
            sample, found = side
            first = found.overall if together else found.by_class.mean(axis=1)
            values = np.concatenate([first[:, None], found.by_class], axis=1)
            values = np.where(values > 0, values, np.nan)  # no gradient: nothing was measured
            return Measured(values=values, reference=None, classes=sample.classes, counts=sample.class_counts)

        def scored(*, together: bool) -> LayerScores:
            return score(
                measured(known, together=together),
                measured(unknown, together=together),
                layers=self.layers_.names,
                labelled=True,
                estimator=type(self).__name__,
                measure=self._described(),
                unit=self._unit,
                reference_name="",
            )

        apart = scored(together=False)
        return replace(scored(together=True), per_class=apart.per_class, per_class_interval=apart.per_class_interval)


def mini_batches(
    sample: LabelledSample, sizes: tuple[int, ...], rng: np.random.Generator
) -> list[tuple[Label, NDArray[np.int64]]]:
    """Deal the samples at random to mini-batches of all classes (None), and again to those of each class."""
    together, of_class = sizes
    groups: list[tuple[Label, NDArray[np.int64]]] = []
    for label in (None, *sample.classes):
        rows = np.array([row for row, mine in enumerate(sample.labels) if label is None or mine == label])
        size = together if label is None else of_class
        dealt = rng.permutation(rows)
        groups += [(label, np.sort(dealt[at : at + size])) for at in range(0, len(rows) - size + 1, size)]
    return groups


def batches_of(sample: LabelledSample) -> Callable[[NDArray[np.int64]], list[Batch]]:
    """Return what reads samples by their numbers: in one batch, or, of a stream, in parts of those that it comes in."""
    kept = [] if sample.batches.indexed else list(sample.batches)

    def read(rows: NDArray[np.int64]) -> list[Batch]:
        wanted = sample.positions[rows]
        if sample.batches.indexed:
            return [replace(sample.batches.subset(wanted), batch_size=len(wanted)).first()]
        places = [(batch, np.flatnonzero(np.isin(batch.positions, wanted))) for batch in kept]
        return [batch.take(inside) for batch, inside in places if len(inside)]

    return read
