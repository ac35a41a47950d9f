"""`TangentProbe`: a forecast of fine-tuning, from gradients of the network as it is."""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from types import MappingProxyType
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from retrainscope.answers import Answers
from retrainscope.base import LayerEstimator
from retrainscope.batches import Batch, Batches, Label, ordered_classes
from retrainscope.checks import check_number
from retrainscope.comparing import check_class_counts
from retrainscope.drawing import draw_samples
from retrainscope.forecast import Forecast
from retrainscope.gradient_features import gradient_features
from retrainscope.heads import check_classes, head_inputs, own_places
from retrainscope.kernels import Body, check_finite, draw_directions, head_kernel, scaled
from retrainscope.lending import start_random
from retrainscope.memory import memory_needed
from retrainscope.normalisation import renewed_statistics, running_norms
from retrainscope.policies import policy_sets
from retrainscope.predicted import Predicted, bootstrap
from retrainscope.processes import agree, from_first, gather, in_turns
from retrainscope.progress import progress_bar
from retrainscope.ridge import kernel_ridge
from retrainscope.scores import LayerScores
from retrainscope.shares import together

__all__ = ["TangentProbe"]

Floats = NDArray[np.float64]


class TangentProbe(LayerEstimator):
    """Score layers by how much their retraining is expected to help, without training anything.

    Fine-tuning from a trained start is nearly linear in the weights. So the gradients of a network's features with
    respect to the weights of a layer span what retraining that layer can add to what a new head can do with the
    features as they are. A ridge regression on these gradients (as kernels, one a layer, which are summed for a set of
    layers) predicts every sample's class from all other samples; its error forecasts that of the network after
    retraining, for any set of layers, from one pass of gradients.

    need = log(error if the head alone is retrained) - log(error if the layer is retrained too), in nats.

    Of the known data only the classes and the model's accuracy are used, to tell whether it can be used as it is: the
    forecast is about the unknown data alone, which needs labels of at least two classes.

    The gradients are those of projections of the head's input on random orthogonal directions, not those of a head's
    outputs: a head that is fitted to the samples would leak their labels. The kernel of a layer is divided by the root
    of the mean square of its gradients, as an optimiser that adapts its steps (Adam) does, and all layers
    together by a constant, so that neither the scale of features nor the number of directions counts.

    Like such an optimiser the forecast depends on how weights are scaled: rescaling two layers by a factor and its
    inverse keeps the function and moves their needs.

    Retraining a layer with batch normalisation also renews its running statistics, which no gradient shows. For every
    set of layers they are therefore re-estimated on the unknown data, and the head's input is taken from there.

    What it cannot see: what takes training far from where it starts, so that the gradients change (features that must
    be learnt anew with much data, large learning rates, long training); it is about small budgets. And near copies
    among the samples, such as frames of one video: they foretell each other, and the forecast comes out too good,
    unless `groups` tells which belong together. (Samples of equal inputs are taken for one.)

    Parameters
    ----------
    model : nn.Module
        The trained network. It is only borrowed.
    layers : iterable of str, optional
        What to measure; see `find_layers`.
    head : str, optional
        The module that produces the output; it must take one tensor with one row a sample.
    input_layer : str, optional
        See `find_layers`; not used here but for the layers found.
    calls : {"first", "last", "sum"}, optional
        What counts of a layer that runs several times; see `find_layers`.
    samples_per_class : int
        The most samples of a class, drawn at random; and at most 600 in all. Of more than 60 classes so many are drawn
        at random, so that there can be ten samples of each.
    n_directions : int
        Random directions. The time grows with their number.
    max_features : int
        Of a gradient. A layer with more parameters has its gradients projected at random to that many numbers, which
        keeps their products on average; smaller ones are exact. Memory is 4 bytes for each sample, layer, direction
        and feature, and that of a training step on 32 samples.
    batch_size : int
        Samples a forward pass, for data that is not batched.
    device : device, optional
        Where to measure; None: where the model lies.
    random_state : int, RandomState or None
        For the samples, directions and signs drawn and for the intervals.
    progress : bool or None
        None shows a bar on a terminal only.

    Attributes
    ----------
    layers_ : Layers
        The layers measured.
    forecast_ : Forecast
        After `score_layers` or `forecast`: the expected error of every policy.

    References
    ----------
    Choosing models by linearised fine-tuning: A. Deshpande et al. (2021), arXiv 2102.00084. Cheap kernels:
    M. Mohamadi, W. Bae and D. Sutherland (2022), arXiv 2206.12543.
    Random signs: M. Charikar, K. Chen and M. Farach-Colton (2002), Finding frequent items in data streams.

    Examples
    --------
    >>> import torch
    >>> import retrainscope as rs
    >>> _ = torch.manual_seed(0)
    >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
    >>> y = torch.arange(60) % 2
    >>> X = torch.randn(60, 4) + 2 * y[:, None]
    >>> probe = rs.TangentProbe(model, random_state=0).fit((X, y))
    >>> probe.forecast((-X, y)).policies
    ('none', 'head', 'all')
    """

    _takes_shares: ClassVar[bool] = True
    _noted: Mapping[str, Answers] = MappingProxyType({})  # by others, by the name of the data
    _known_kinds: ClassVar[dict[str, Any]] = {
        "_n_outputs": int,
        "_n_known": int,
        "_known_classes": tuple[Label, ...],
        "_known_accuracy": float,
        "_known_counts": Floats,
    }
    _unknown_kinds: ClassVar[dict[str, Any]] = {"forecast_": Forecast}

    def __init__(
        self,
        model: nn.Module,
        *,
        layers: Iterable[str | type[nn.Module]] | None = None,
        head: str | None = None,
        input_layer: str | None = None,
        calls: str | None = None,
        samples_per_class: int = 50,
        n_directions: int = 16,
        max_features: int = 512,
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
        self.n_directions = n_directions
        self.max_features = max_features
        self.batch_size = batch_size
        self.device = device
        self.random_state = random_state
        self.progress = progress

    def score_layers(self, unknown: Any, *, groups: Sequence[Label] | NDArray[Any] | None = None) -> LayerScores:
        """Measure the unknown data: compare the forecast for each layer with that for the head alone.

        Parameters
        ----------
        unknown : Tensor, array, (X, y), Dataset, DataLoader, or a re-iterable of batches
            Labelled, of the same shape as the known data.
        groups : sequence of n_samples labels, optional
            What each sample is a part of (a video, a patient, a photograph), in the order of the data: a sample is then
            predicted by those of other groups alone. None: every sample is on its own, but for those of equal
            inputs, which are one.

        Returns
        -------
        LayerScores

        Raises
        ------
        sklearn.exceptions.NotFittedError
            Before `fit`.
        InvalidDataError
            Before any work, where the data or the groups do not fit.
        """
        with self._opened(unknown) as (model, batches, rng):
            return self._same_scores(self._kept_scores(lambda: self._score(model, batches, rng, groups)))

    def forecast(
        self,
        unknown: Any,
        *,
        policies: Iterable[Iterable[str]] | None = None,
        groups: Sequence[Label] | NDArray[Any] | None = None,
    ) -> Forecast:
        """Forecast what retraining by every policy gives.

        Parameters
        ----------
        unknown, groups
            As in `score_layers`.
        policies : iterable of iterables of str, optional
            Sets of layers to retrain with the head. None: the head alone, each layer, everything from a layer up.

        Returns
        -------
        Forecast

        Raises
        ------
        sklearn.exceptions.NotFittedError
            Before `fit`.
        InvalidDataError, LayerNotFoundError
            Before any work, where data or policies do not fit.
        """
        with self._opened(unknown) as (model, batches, rng):
            sets = policy_sets(self.layers_.names, policies)
            agree({"policies": repr(sets)})
            self._measure_unknown(model, batches, sets, rng, groups)
        return self.forecast_

    def _check_labels(self, labels: Sequence[Label] | None, name: str) -> None:
        """Refuse unknown data without labels; the known data needs none."""
        if name == "unknown" and labels is None:
            check_classes((None,), name)

    def _measure_known(self, model: nn.Module, batches: Batches) -> None:
        for name in ("samples_per_class", "n_directions", "max_features"):
            check_number(name, getattr(self, name), whole=True, least=2 if name == "samples_per_class" else None)
        known = self._answers(model, batches, of_model=True)
        self._n_known, self._n_outputs = len(known.labels), max(gather("the outputs", known.n_outputs))
        self._known_classes = () if None in known.labels else ordered_classes(known.labels)
        places = own_places(self._n_outputs, self._known_classes, self._known_classes)
        answered = zip(known.guesses, known.own, strict=True)
        mine = [] if not places else [guess == places[label] for guess, label in answered]
        right = [hit for hits in gather("the known accuracy", mine) for hit in hits]
        self._known_accuracy = float(np.mean(right)) if right else np.nan
        counts = Counter(known.labels)
        self._known_counts = np.array([counts[label] for label in self._known_classes], dtype=np.float64)

    @property
    def _known_chance(self) -> float:
        """The accuracy of always naming the largest known class; NaN without labels."""
        return float(self._known_counts.max() / self._known_counts.sum()) if self._known_classes else np.nan

    def _score(
        self,
        model: nn.Module,
        batches: Batches,
        rng: np.random.Generator,
        groups: Sequence[Label] | NDArray[Any] | None = None,
    ) -> LayerScores:
        predicted = self._measure_unknown(model, batches, policy_sets(self.layers_.names, None), rng, groups)
        known = self._known_counts if self._known_classes else np.array([float(self._n_known)])
        return predicted.scores(self.layers_, self._known_classes, known, type(self).__name__)

    def _measure_unknown(
        self,
        model: nn.Module,
        batches: Batches,
        sets: tuple[tuple[str, ...], ...],
        rng: np.random.Generator,
        groups: Sequence[Label] | NDArray[Any] | None,
    ) -> Predicted:
        """Predict every sample by the others with each set of layers; keep the forecast."""
        answers = self._answers(model, batches, of_model=False)
        drawn = draw_samples(answers, batches, groups, per_class=self.samples_per_class, seed=self._seed)
        labels, classes = drawn.labels, ordered_classes(drawn.labels)
        check_classes(classes, "unknown")
        counts = np.array([labels.count(label) for label in classes], dtype=np.float64)
        check_class_counts(classes, counts, "unknown")
        places = {label: place for place, label in enumerate(classes)}
        targets = np.array([places[label] for label in labels])
        features, outputs, kernels = self._kernels(model, drawn.samples)
        brought = scaled(kernels, self.layers_.n_parameters, np.trace(head_kernel(features)))
        bases = self._head_kernels(model, drawn.samples, features, sets)
        left_out = kernel_ridge(brought, bases, targets, sets, groups=drawn.groups)
        weights = bootstrap(targets, drawn.groups, rng)
        predicted = Predicted(left_out, sets, classes, targets, drawn.groups, weights)
        told: dict[str, Any] = {"known_accuracy": self._known_accuracy, "n_copies": drawn.n_copies}
        as_is, own = None, own_places(self._n_outputs, self._known_classes, drawn.every_class)
        if own is not None:
            as_is = outputs.argmax(axis=1) == np.array([own[label] for label in labels])
            if len(classes) < len(drawn.every_class):  # among those that are told apart here, as with all policies
                among_all, as_is = as_is, outputs[:, [own[label] for label in classes]].argmax(axis=1) == targets
                told["drawing_gain"] = float(as_is.mean() - among_all.mean())
        self.forecast_ = from_first("the forecast", predicted.forecast(self.layers_, as_is, **told))
        return predicted

    def _answers(self, model: nn.Module, batches: Batches, *, of_model: bool) -> Answers:
        """Return what a pass over data tells, if possible from one that was made already."""
        noted = self._noted.get(batches.name)
        if noted is not None and all(gather("what was noted", noted.are_of(batches))):
            if of_model:  # what would be refused on the way
                self._ends(model, batches.few())
            return noted
        answers = Answers(of_model=of_model)
        answers.begin(batches)
        for batch, told in together(batches):
            answers.note_labels(told)
            if batch is not None and of_model:
                for piece, (_, outputs) in self._halving.run(batch, partial(self._ends, model)):
                    answers.note_outputs(piece, outputs)
        return answers

    def _kernels(self, model: nn.Module, batches: Batches) -> tuple[Floats, Floats, dict[str, Floats]]:
        """Return the head's inputs, the outputs, and for each layer the products of the samples' gradients."""
        features, outputs = from_first("the features", self._features(model, batches))
        body = Body(model, self.layers_.head)
        owned = {name: [f"model.{p}" for p in self.layers_.parameters[name]] for name in self.layers_.names}
        directions = draw_directions(features.shape[1], self.n_directions, self._seed)
        with progress_bar(what="gradients", progress=self.progress, total=len(directions) * len(features)) as bar:
            found = gradient_features(
                body,
                batches,
                directions.to(batches.device),
                owned,
                max_features=self.max_features,
                seed=self._seed,
                tick=bar.update,
                halving=self._halving,
                parts=self._parts.under("unknown"),
            )
        kernels = {name: (rows @ rows.T).cpu().double().numpy() for name, rows in found.items()}
        for name, kernel in kernels.items():
            check_finite(kernel, f"The gradients of the layer {name!r} have")
        return features, outputs, kernels

    def _features(self, model: nn.Module, batches: Batches) -> tuple[Floats, Floats]:
        """Return the head's inputs and the outputs, one row a sample."""
        inputs, outputs = [], []
        for batch in batches:
            for _, (before, after) in self._halving.run(batch, partial(self._ends, model)):
                inputs.append(before.cpu().double().numpy())  # on the CPU first: not every device has doubles
                outputs.append(after.cpu().double().numpy())
        features = np.concatenate(inputs)
        check_finite(features, "What goes into the head has")
        return features, np.concatenate(outputs)

    def _ends(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return the head's inputs and the outputs."""
        with torch.no_grad():
            return head_inputs(model, self.layers_.head, batch.inputs)

    def _head_kernels(
        self, model: nn.Module, batches: Batches, features: Floats, sets: Iterable[tuple[str, ...]]
    ) -> Iterator[Floats]:
        """Yield the head's kernel for each set, from its inputs as they are once the set's statistics are renewed."""
        frozen = head_kernel(features)
        shuffled = _evened(batches.subset(np.array(batches.chosen), order_seed=self._seed), len(features))
        parts = self._parts.under("unknown")

        def kernel(numbered: tuple[int, tuple[str, ...]]) -> Floats | None:
            norms = running_norms(model, (buffer for name in numbered[1] for buffer in self.layers_.buffers[name]))
            if not norms:
                return None
            start_random(self._seed)
            with (
                memory_needed("in renewing batch statistics", batches.batch_size),
                renewed_statistics(model, norms, shuffled),
            ):
                renewed = head_kernel(self._features(model, batches)[0])
            renewed *= np.trace(frozen) / np.trace(renewed)
            return renewed

        # What is kept is all told before, as processes do not tell each other at work.
        numbered = [*enumerate(sets)]
        kept = {number: parts.get(f"head-{number}") for number, _ in numbered}
        left = [one for one in numbered if kept[one[0]] is None]
        found = in_turns("the head's kernels", left, kernel)
        for number, _ in numbered:
            if kept[number] is not None:
                yield kept[number].numpy()
                continue
            renewed = next(found)
            if renewed is not None and parts.due():
                parts.put(f"head-{number}", torch.from_numpy(renewed))
            yield frozen if renewed is None else renewed


def _evened(batches: Batches, n_samples: int) -> Batches:
    """Make batches of equal size where the last would be a small one, whose statistics would count as any other's."""
    left = n_samples % batches.batch_size
    if n_samples < batches.batch_size or left == 0 or 2 * left >= batches.batch_size:
        return batches
    return replace(batches, batch_size=-(-n_samples // -(-n_samples // batches.batch_size)))
