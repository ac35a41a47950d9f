"""`LayerEstimator`: the contract of everything that scores layers."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar, Self

import numpy as np
import torch
from sklearn.base import BaseEstimator
from sklearn.utils.validation import check_is_fitted
from torch import nn

from retrainscope.batches import Batch, Batches, Label, as_batches, input_shapes
from retrainscope.checks import check_device
from retrainscope.exceptions import InvalidDataError, LayerNotFoundError, UnsupportedModelError
from retrainscope.layers import Layers, layers_of
from retrainscope.lending import autograd_on, borrow, gradients_in_evaluation, model_place
from retrainscope.memory import Halving
from retrainscope.parts import NOTHING_KEPT, Parts
from retrainscope.precision import asked_precision
from retrainscope.processes import agree, from_first, in_step, n_processes
from retrainscope.reference import check_same_shape, input_axes
from retrainscope.saving import from_plain, to_plain
from retrainscope.scores import LayerScores
from retrainscope.sharding import is_sharded
from retrainscope.shares import check_same, everywhere, same_seed
from retrainscope.tracing import call_model, check_calls

__all__ = ["LayerEstimator"]


class LayerEstimator(ABC, BaseEstimator):  # type: ignore[misc]
    """Base class of the estimators: what they share, and what each must bring.

    An estimator is made for one model. ``fit(known)`` measures the known data, and learns from it what it
    has to; ``score_layers(unknown)`` measures the unknown data and returns the needs. A subclass brings
    `_measure_known` and `_score`. The model is only borrowed: after any call, also one that fails, it is bit
    for bit what it was.

    Attributes
    ----------
    layers_ : Layers
        The layers measured, the head, and what each owns.
    """

    model: nn.Module
    layers: Iterable[str | type[nn.Module]] | None
    head: str | None
    input_layer: str | None
    calls: str | None
    batch_size: int
    device: str | torch.device | None
    random_state: int | np.random.RandomState | None
    progress: bool | None

    # What `_measure_known` and `_score` leave on the estimator, by the types that bring it back from a checkpoint.
    # Where nothing is said of the known data, it is measured again; a subclass that leaves more has to say so.
    _known_kinds: ClassVar[dict[str, Any]] = {}
    _unknown_kinds: ClassVar[dict[str, Any]] = {}
    # Whether a process may have a share of the data alone, as a DistributedSampler deals it; else each gets all of it.
    _takes_shares: ClassVar[bool] = False
    # Whether models of `fully_shard` can be measured: all processes then run the model equally often, and never back.
    _takes_pieces: ClassVar[bool] = False
    # Whether it can do nothing with data that has no labels.
    _needs_labels: ClassVar[bool] = False
    # Whether the model computes as the caller's autocast would have it; all else is in full precision anyway.
    _follows_autocast: ClassVar[bool] = True
    _parts: Parts = NOTHING_KEPT  # of a run with a checkpoint, for as long as that lasts

    def __sklearn_clone__(self) -> Self:
        # A clone is for the same model; scikit-learn's own would copy the network.
        return type(self)(**self.get_params(deep=False))

    def fit(self, known: Any) -> Self:
        """Measure the known data and learn from it.

        Parameters
        ----------
        known : Tensor, array, (X, y), Dataset, DataLoader, or a re-iterable of batches
            Data that the model knows, best of all data it was not trained on: on its training data
            a network looks better than it is.

        Returns
        -------
        self

        Raises
        ------
        InvalidDataError, LayerNotFoundError, UnsupportedModelError
            Before any work, where data or layers do not fit.
        """
        with in_step():
            check_calls(self.calls)
            seed = same_seed(self.random_state)
            batches = self._batches(known, "known", seed)
            with autograd_on(follow_autocast=self._follows_autocast), self._borrowed(seed) as model:
                self._fit(model, self._agreed(batches), seed)
        return self

    def _fit(self, model: nn.Module, batches: Batches, seed: int) -> None:
        """Find the layers and measure the known data, unless that is kept."""
        first = batches.few()
        token_axes = input_axes(first.inputs) if self.input_layer is None else {}
        layers = self._find_layers(model, first)
        agree({"the layers": ", ".join(layers.names), "the head": layers.head})
        self._token_axes = {**layers.token_axes, **token_axes}
        self._seed, self._input_shapes, self.layers_ = seed, input_shapes(first.inputs), layers
        self._halving = Halving()
        try:
            kept = self._parts.get("known")
            if kept is None:
                self._measure_known(model, batches)
                if self._known_kinds and self._parts is not NOTHING_KEPT:
                    self._parts.put("known", self._fitted())
            else:
                self._restore(kept)
            if self._known_kinds:
                self._parts.under("known").clear()
        except BaseException:
            del self.layers_  # an estimator is fitted or not, never half
            raise

    def _find_layers(self, model: nn.Module, first: Batch) -> Layers:
        """Find the layers to measure of a borrowed model."""
        layers = layers_of(
            model, first, layers=self.layers, head=self.head, input_layer=self.input_layer, calls=self.calls
        )
        _check_measurable(layers, self.input_layer)
        return layers

    def score_layers(self, unknown: Any) -> LayerScores:
        """Measure the unknown data and compare it with the known.

        Parameters
        ----------
        unknown : Tensor, array, (X, y), Dataset, DataLoader, or a re-iterable of batches
            Of the same shape as the known data. Its labels are used only if both have labels.

        Returns
        -------
        LayerScores

        Raises
        ------
        sklearn.exceptions.NotFittedError
            Before `fit`.
        InvalidDataError
            Before any work, where the data does not fit.
        """
        with self._opened(unknown) as (model, batches, rng):
            return self._same_scores(self._kept_scores(lambda: self._score(model, batches, rng)))

    @contextmanager
    def _opened(self, unknown: Any) -> Iterator[tuple[nn.Module, Batches, np.random.Generator]]:
        """Lend the model to measure unknown data, and a generator for the resampling."""
        with in_step():
            check_is_fitted(self, "layers_")
            batches = self._batches(unknown, "unknown", self._seed)
            with autograd_on(follow_autocast=self._follows_autocast), self._borrowed(self._seed) as model:
                batches = self._agreed(batches)
                check_same_shape(self._input_shapes, batches.few())
                yield model, batches, np.random.default_rng(self._seed)

    @contextmanager
    def _lent(self, X: Any, *layers: str) -> Iterator[tuple[nn.Module, Batches]]:
        """Lend the model to look at more samples of measured layers."""
        check_is_fitted(self, "layers_")
        for layer in layers:
            if layer not in self.layers_.names:
                raise LayerNotFoundError.for_name(layer, self.layers_.names, what="measured layer")
        batches = self._batches(X, "given", self._seed)
        with autograd_on(follow_autocast=self._follows_autocast), self._borrowed(self._seed) as model:
            check_same_shape(self._input_shapes, batches.few(), name="given")
            yield model, batches

    @abstractmethod
    def _measure_known(self, model: nn.Module, batches: Batches) -> None:
        """Set the fitted attributes from the known data."""

    @abstractmethod
    def _score(self, model: nn.Module, batches: Batches, rng: np.random.Generator) -> LayerScores:
        """Measure the unknown data and compare it with the known; rng is for the resampling."""

    def _fitted(self) -> dict[str, Any]:
        """Return what `_measure_known` has left, as `Parts` keep it."""
        return {name: to_plain(getattr(self, name), tensors=True) for name in self._known_kinds}

    def _restore(self, fitted: dict[str, Any]) -> None:
        """Set what `_measure_known` would leave."""
        for name, kind in self._known_kinds.items():
            setattr(self, name, from_plain(kind, fitted[name]))

    def _kept_scores(self, score: Callable[[], LayerScores]) -> LayerScores:
        """Return the scores, and set what scoring leaves: from the checkpoint if they are there, or to be kept."""
        if self._parts is NOTHING_KEPT:
            return score()
        kept = self._parts.get("unknown")
        if kept is None:
            scores = score()
            left = {name: to_plain(getattr(self, name), tensors=True) for name in self._unknown_kinds}
            self._parts.put("unknown", {"scores": to_plain(scores, tensors=True), "left": left})
        else:
            scores = from_plain(LayerScores, kept["scores"])
            for name, kind in self._unknown_kinds.items():
                setattr(self, name, from_plain(kind, kept["left"][name]))
        self._parts.under("unknown").clear()
        return scores

    def _same_scores(self, scores: LayerScores) -> LayerScores:
        """Return the scores of process 0, and set what scoring leaves there: machines may round in other ways."""
        if n_processes() > 1:
            left = {name: getattr(self, name) for name in self._unknown_kinds}
            scores, left = from_first("the scores", (scores, left))
            for name, value in left.items():
                setattr(self, name, value)
        return scores

    def _agreed(self, batches: Batches) -> Batches:
        """Return the data to work on; another model, setting or data set in another process is refused."""
        own = ("model", "device", "random_state", "progress")  # what may be another, or is compared elsewhere
        settings = {k: v for k, v in self.get_params(deep=False).items() if k not in own}
        named = {"the estimator": type(self).__name__, "torch.autocast": str(self._autocast)}
        check_same(named | settings, self.model, batches)
        return batches if self._takes_shares else everywhere(batches)

    def _check_labels(self, labels: Sequence[Label] | None, name: str) -> None:
        """Refuse data without labels where they are needed."""
        if self._needs_labels and (labels is None or None in labels):
            raise InvalidDataError(
                f"{type(self).__name__} needs labels, and the {name} data has none. Give (X, y), or take a criterion "
                "that does without, such as ActivationSpread."
            )

    @contextmanager
    def _borrowed(self, seed: int) -> Iterator[nn.Module]:
        lent = borrow(self.model, device=self.device, seed=seed, in_pieces=self._takes_pieces)
        with lent as model, gradients_in_evaluation(model):
            yield model

    def _keep_pace(self, model: nn.Module, batches: Batches, batch: Batch | None) -> None:
        """Run a model in pieces where only other processes have something to look at, as they cannot without this one.

        On the batch at hand, or where the pass is over here on the first one.
        """
        if is_sharded(model):
            with torch.no_grad():
                call_model(model, (batches.few() if batch is None else batch).inputs)

    def _batches(self, data: Any, name: str, seed: int) -> Batches:
        _, dtype = model_place(self.model)
        return as_batches(
            data, name=name, batch_size=self.batch_size, device=self._place(), dtype=dtype, seed=seed % 2**32
        )

    def _place(self) -> torch.device:
        """Return where to measure."""
        return model_place(self.model)[0] if self.device is None else check_device(self.device)

    @property
    def _autocast(self) -> torch.dtype | None:
        """The type that the caller's autocast has for the model."""
        return asked_precision(self._place()) if self._follows_autocast else None


def _check_measurable(layers: Layers, input_layer: str | None) -> None:
    if input_layer in layers.names:
        raise UnsupportedModelError(
            f"The layer {input_layer!r} is the input layer, which the others are compared with. Leave it out of "
            "layers=."
        )
    for name, shape in layers.shapes.items():
        if not shape:
            raise UnsupportedModelError(
                f"The layer {name!r} returns one number a sample, of shape (n_samples,). Name the layer before it, "
                "or let it return (n_samples, 1)."
            )
