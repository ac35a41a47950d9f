"""`FeatureCriterion`: features of a random sample of each class, and their comparison."""

from abc import abstractmethod
from collections.abc import Iterable, Sequence
from math import ceil
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from retrainscope.base import LayerEstimator
from retrainscope.batches import Batch, Batches
from retrainscope.checks import check_number
from retrainscope.comparing import baseline_classes, check_class_counts
from retrainscope.criteria.pooling import channel_axis, pooled
from retrainscope.criteria.sampling import ClassSample, Draw, Reservoir, deal, halved
from retrainscope.exceptions import InvalidDataError
from retrainscope.padding import mean_over_tokens
from retrainscope.processes import gather, in_turns, n_processes, rank
from retrainscope.progress import progress_bar
from retrainscope.reference import reference_inputs
from retrainscope.scores import LayerScores, Measured, score
from retrainscope.shares import together
from retrainscope.tracing import run_layers

__all__ = ["FeatureCriterion", "Features", "joined"]

_INPUT = ""  # the input's key among the layers' features
_MOST_ROUNDS = 5  # draws of the samples of a class that has more than a draw takes

Floats = NDArray[np.float64]
Row = NDArray[np.floating]
Features = Sequence[NDArray[np.floating]]  # of each class, of shape (n_samples, n_features)


class FeatureCriterion(LayerEstimator):
    """Base class of the criteria on features, which need labels and at least two classes on both sides.

    In one pass over the data at most `samples_per_class` random samples of each class go through the model, and their
    features are kept in main memory, in single precision unless the model has double. That is 4 bytes for each sample,
    feature and layer: 4 MB a layer for 10 classes with the default settings, and never more than 64 MiB, as with more
    than 163 classes fewer samples of each are kept.

    Both sides are measured with equally many classes and equally many samples of each: the number of classes of the
    side that has fewer, the size of the smallest class of all. The side with more is measured on several draws that
    together use every class (and up to five times as many samples), and the mean over the draws counts. If every
    unknown class is a known one, the known data is measured on those classes alone.

    The input is measured in the same way, as it is (not averaged over places), and is the reference.

    Intervals come from random halves of each class. Half as many samples give another value of most measures, so the
    values of the halves are shifted to have the mean of the whole: only their spread counts. What the other half would
    give, about as much on the other side, is taken as measured too, so intervals lie evenly around the need.

    Parameters
    ----------
    model : nn.Module
        The trained network. It is only borrowed.
    layers : iterable of str, optional
        What to measure; see `find_layers`.
    head : str, optional
        The module that produces the output.
    input_layer : str, optional
        The module whose output stands for the input where that is discrete (an embedding).
    calls : {"first", "last", "sum"}, optional
        What counts of a layer that runs several times; see `find_layers`.
    samples_per_class : int
        The most samples of a class, drawn at random.
    pool : bool
        Average maps over space and sequences over tokens, so that the channels are the features. Where it cannot be
        told which axis the channels are, and with False, all values are features. Padding never counts.
    max_features : int
        A layer with more features is measured on that many of them, drawn once at random.
    n_resamples : int
        Halves drawn for the intervals.
    batch_size : int
        Samples a forward pass, for data that is not batched. It does not change the result.
    device : device, optional
        Where the model runs; None: where it lies.
    random_state : int, RandomState or None
        For the samples and features drawn and for the intervals.
    progress : bool or None
        None shows a bar on a terminal only.

    Attributes
    ----------
    layers_ : Layers
        The layers measured.
    sample_ : ClassSample
        Features of known samples by layer; under ``""`` those of the input.
    """

    _takes_shares: ClassVar[bool] = True
    _needs_labels: ClassVar[bool] = True
    _takes_pieces: ClassVar[bool] = True
    _measure: ClassVar[str]
    _unit: ClassVar[str]
    _in_nats: ClassVar[bool] = False
    _least_classes: ClassVar[int] = 2  # with fewer the measure says little of whether classes part
    _floor: ClassVar[float] = 0.0  # what is as good as nothing, times the samples of a draw

    def __init__(
        self,
        model: nn.Module,
        *,
        layers: Iterable[str | type[nn.Module]] | None = None,
        head: str | None = None,
        input_layer: str | None = None,
        calls: str | None = None,
        samples_per_class: int = 100,
        pool: bool = True,
        max_features: int = 1024,
        n_resamples: int = 20,
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
        self.pool = pool
        self.max_features = max_features
        self.n_resamples = n_resamples
        self.batch_size = batch_size
        self.device = device
        self.random_state = random_state
        self.progress = progress

    @abstractmethod
    def _resampled(self, features: Features, plan: Sequence[Sequence[Draw]]) -> Floats:
        """Measure each class, larger is worse; the mean over the classes is the measure.

        Parameters
        ----------
        features : sequence of n_classes ndarray
        plan : sequence of 1 + n_resamples lists of Draw
            First of the whole sample, then of halves of it.

        Returns
        -------
        ndarray of shape (1 + n_resamples, n_classes)
        """

    def _check_parameters(self) -> None:
        check_number("samples_per_class", self.samples_per_class, whole=True, least=2)
        check_number("max_features", self.max_features, whole=True)
        check_number("n_resamples", self.n_resamples, whole=True)

    def _measure_known(self, model: nn.Module, batches: Batches) -> None:
        self._check_parameters()
        self._channel_axes: dict[str, int | None] = {}
        self.sample_ = self._sample(model, batches)

    def _score(self, model: nn.Module, batches: Batches, rng: np.random.Generator) -> LayerScores:
        unknown = self._sample(model, batches)
        known = self.sample_.only(baseline_classes(self.sample_.classes, unknown.classes))
        n_classes = min(len(known.classes), len(unknown.classes))
        n = int(min(known.sizes.min(), unknown.sizes.min()))
        return score(
            self._measured(known, n_classes, n, rng, "known"),
            self._measured(unknown, n_classes, n, rng, "unknown"),
            layers=self.layers_.names,
            labelled=True,
            one_sided=n_classes < self._least_classes,
            estimator=type(self).__name__,
            measure=f"{self._measure}, from {self._features_text()}",
            unit=self._unit,
            reference_name="input",
        )

    def _measured(self, sample: ClassSample, n_classes: int, n: int, rng: np.random.Generator, name: str) -> Measured:
        sample = sample.first(_MOST_ROUNDS * n)
        sizes, order = sample.sizes, rng.permutation(len(sample.classes)).tolist()
        n_rounds = ceil(sizes.max() / n)
        plan = [deal([np.arange(size) for size in sizes], order, n_classes=n_classes, n=n, n_rounds=n_rounds)]
        for _ in range(self.n_resamples):
            rows, n_half = halved(sizes, n, rng)
            plan.append(deal(rows, order, n_classes=n_classes, n=n_half, n_rounds=n_rounds))
        what = f"{type(self).__name__} of {name}"
        places = (_INPUT, *self.layers_.names)
        found = in_turns(what, places, lambda place: self._resampled(sample.features[place], plan))
        by_class = np.stack([*progress_bar(found, what=what, progress=self.progress, total=len(places))], axis=-1)
        floor = self._floor / (n_classes * n)
        values = np.concatenate([by_class.mean(axis=1, keepdims=True), by_class], axis=1)
        values = _mirrored(values, floor=floor, in_nats=self._in_nats)
        return Measured(
            values=values[..., 1:],
            reference=values[..., :1],
            classes=sample.classes,
            counts=sizes.astype(np.float64),
            floor=floor,
            in_nats=self._in_nats,
        )

    def _sample(self, model: nn.Module, batches: Batches) -> ClassSample:
        """Keep the features of a random sample of each class at every layer and at the input, in one pass."""
        reservoir = Reservoir(self.samples_per_class, np.random.default_rng(self._seed))
        names = self.layers_.names if self.input_layer is None else (self.input_layer, *self.layers_.names)
        kept: dict[str, dict[int, Row]] = {name: {} for name in (_INPUT, *self.layers_.names)}
        total = None if batches.n_batches is None else -(-batches.n_batches // n_processes())
        steps = progress_bar(together(batches), what=f"features of {batches.name}", progress=self.progress, total=total)
        for step, (batch, told) in enumerate(steps):
            labels = [label for one in told for label in one.labels]
            self._check_labels(labels, batches.name)
            _, leave = reservoir.offer(labels, np.concatenate([one.positions for one in told]))
            for rows in kept.values():
                for position in leave:
                    rows.pop(position, None)
            stay = [] if batch is None else [row for row, p in enumerate(batch.positions.tolist()) if p not in leave]
            if batch is None or not stay:
                self._keep_pace(model, batches, batch)
                continue

            def keep(piece: Batch, number: int = step * n_processes() + rank()) -> None:
                positions, mask = piece.positions.tolist(), piece.mask

                def visit(name: str, output: Tensor) -> None:
                    found = self._features(model, name, output, mask).cpu().numpy()
                    name = _INPUT if name == self.input_layer else name
                    # Copies: a view would keep the whole batch.
                    kept[name].update({p: row.copy() for p, row in zip(positions, found, strict=True)})

                if self.input_layer is None:
                    visit(_INPUT, reference_inputs(piece.inputs))
                where = f"batch {number} of the {batches.name} data"
                options: dict[str, Any] = {"calls": self.calls, "token_axes": self._token_axes, "where": where}
                with torch.no_grad():
                    run_layers(model, piece.inputs, names, visit, **options)

            for _ in self._halving.run(batch.take(np.array(stay)), keep):
                pass
        chosen = reservoir.chosen
        for axes in gather("the axes of channels", self._channel_axes):  # a process may have had no batch
            self._channel_axes |= axes
        for name in kept:  # layer by layer, since they may be large
            found = gather(f"features of {name!r}", kept[name])
            kept[name] = {position: row for rows in found for position, row in rows.items()}
        sample = ClassSample(
            classes=tuple(chosen),
            features={name: [np.stack([rows[p] for p in chosen[c]]) for c in chosen] for name, rows in kept.items()},
        )
        check_class_counts(sample.classes, sample.sizes.astype(np.float64), batches.name)
        if len(sample.classes) < 2:
            raise InvalidDataError(
                f"{type(self).__name__} measures how well classes can be told apart, and the {batches.name} data has "
                f"only {sample.classes[0]!r}. Give samples of at least two classes."
            )
        return sample

    def _features(self, model: nn.Module, name: str, output: Tensor, mask: Tensor | None) -> Tensor:
        """Return what is measured of an output, of shape (n_samples, n_features)."""
        output = output if output.dtype == torch.float64 else output.float()
        axis = self._token_axes.get(name)
        if axis is not None and mask is not None:
            features = mean_over_tokens(output, axis, mask)
        else:
            if self.pool and output.ndim > 2 and name not in self._channel_axes:
                is_input = name == _INPUT
                self._channel_axes[name] = None if is_input else channel_axis(model, name, tuple(output.shape))
            axis = self._channel_axes.get(name)
            features = output.flatten(start_dim=1) if axis is None else pooled(output, axis)
        n_features = features.shape[1]
        if n_features <= self.max_features:
            return features
        # The same ones at every call, of known and of unknown data.
        rng = np.random.default_rng([self._seed, *name.encode()])
        drawn = np.sort(rng.choice(n_features, self.max_features, replace=False))
        return features[:, torch.from_numpy(drawn).to(features.device)]

    def _features_text(self) -> str:
        """Say what the features are."""
        flattened = [name for name in self.layers_.names if self._channel_axes.get(name, 0) is None]
        how = "averaged over places" if self.pool else "flattened"
        but = f" (flattened: {', '.join(flattened)})" if flattened else ""
        return f"features {how}{but}, at most {self.max_features:,} of a layer"


def joined(features: Features, draw: Draw) -> tuple[Floats, NDArray[np.int64]]:
    """Return the features of a draw in one array, and the places of their classes in the draw."""
    values = np.concatenate([features[c][rows] for c, rows in draw]).astype(np.float64)
    return values, np.repeat(np.arange(len(draw)), [len(rows) for _, rows in draw])


def _mirrored(values: Floats, *, floor: float, in_nats: bool) -> Floats:
    """Centre what the halves give at the whole sample's value, in nats, and add the same on the other side of it.

    The other half of the samples, measured as well, would lie as far on the other side but for terms of second order.
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        logs = values if in_nats else np.log(values + floor)
        away = logs[1:] - logs[1:].mean(axis=0)
        around = np.concatenate([logs[:1] + away, logs[:1] - away])
    return np.concatenate([values[:1], around if in_nats else np.exp(around) - floor])
