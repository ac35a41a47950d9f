"""`LayerEstimator`: the contract of everything that scores layers."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, ClassVar, Self

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.base import BaseEstimator
from sklearn.utils import check_random_state
from sklearn.utils.validation import check_is_fitted
from torch import Tensor, nn

from retrainscope.batches import Batch, Batches, Inputs, Label, Shapes, as_batches, input_shapes, items_of, shapes_text
from retrainscope.checks import check_device
from retrainscope.exceptions import InvalidDataError, LayerNotFoundError, UnsupportedModelError
from retrainscope.layers import Layers, layers_of
from retrainscope.lending import borrow, model_place
from retrainscope.memory import Halving
from retrainscope.moments import ClassMoments, class_means, half_samples
from retrainscope.padding import n_tokens_of, tells_padding
from retrainscope.parts import NOTHING_KEPT, Parts
from retrainscope.processes import agree, check_alone, digests_of_model, from_first, in_step, n_processes
from retrainscope.saving import from_plain, to_plain
from retrainscope.scores import LayerScores, Measured, score
from retrainscope.shares import check_same_data
from retrainscope.tracing import check_calls

__all__ = [
    "N_RESAMPLES",
    "LayerEstimator",
    "autograd_on",
    "baseline_classes",
    "check_class_counts",
    "check_inputs_vary",
    "check_same_shape",
    "floating_inputs",
    "input_axes",
    "reference_inputs",
    "score_errors",
    "seed_of",
]

N_RESAMPLES = 400
_NEGLIGIBLE = 0.01


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
    _shares_work: ClassVar[bool] = False  # whether several processes can work on it together
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
        self.check_processes()
        with in_step():
            check_calls(self.calls)
            seed = self._drawn_seed()
            batches = self._batches(known, "known", seed)
            with autograd_on(), borrow(self.model, device=self.device, seed=seed) as model:
                self._check_same(batches)
                self._fit(model, batches, seed)
        return self

    def _fit(self, model: nn.Module, batches: Batches, seed: int) -> None:
        """Find the layers and measure the known data, unless that is kept."""
        first = batches.first()
        token_axes = input_axes(first.inputs) if self.input_layer is None else {}
        layers = layers_of(
            model, first, layers=self.layers, head=self.head, input_layer=self.input_layer, calls=self.calls
        )
        _check_measurable(layers, self.input_layer)
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

    def check_processes(self) -> None:
        """Refuse several processes, where they cannot share the work."""
        if not self._shares_work:
            check_alone(type(self).__name__)

    @contextmanager
    def _opened(self, unknown: Any) -> Iterator[tuple[nn.Module, Batches, np.random.Generator]]:
        """Lend the model to measure unknown data, and a generator for the resampling."""
        self.check_processes()
        with in_step():
            check_is_fitted(self, "layers_")
            batches = self._batches(unknown, "unknown", self._seed)
            with autograd_on(), borrow(self.model, device=self.device, seed=self._seed) as model:
                self._check_same(batches)
                check_same_shape(self._input_shapes, batches.first())
                yield model, batches, np.random.default_rng(self._seed)

    @contextmanager
    def _lent(self, X: Any, *layers: str) -> Iterator[tuple[nn.Module, Batches]]:
        """Lend the model to look at more samples of measured layers."""
        check_is_fitted(self, "layers_")
        for layer in layers:
            if layer not in self.layers_.names:
                raise LayerNotFoundError.for_name(layer, self.layers_.names, what="measured layer")
        batches = self._batches(X, "given", self._seed)
        with autograd_on(), borrow(self.model, device=self.device, seed=self._seed) as model:
            check_same_shape(self._input_shapes, batches.first(), name="given")
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

    def _drawn_seed(self) -> int:
        """Return the seed of a fit, the same in all processes."""
        seed = seed_of(self.random_state)
        if self.random_state is None:
            return from_first("the seed", seed)
        agree({"random_state": str(seed)})
        return seed

    def _check_same(self, batches: Batches) -> None:
        """Refuse another model, setting or data set in another process."""
        if n_processes() > 1:
            own = ("device", "random_state", "progress")  # what may be another, or is compared elsewhere
            settings = {k: v for k, v in self.get_params(deep=False).items() if k not in own}
            plain = {k: repr(v) for k, v in settings.items() if v is None or isinstance(v, str | int | float)}
            agree({"the estimator": type(self).__name__, **plain, **digests_of_model(self.model)})
            check_same_data(batches)

    def _batches(self, data: Any, name: str, seed: int) -> Batches:
        _, dtype = model_place(self.model)
        return as_batches(
            data, name=name, batch_size=self.batch_size, device=self._place(), dtype=dtype, seed=seed % 2**32
        )

    def _place(self) -> torch.device:
        """Return where to measure."""
        return model_place(self.model)[0] if self.device is None else check_device(self.device)


@contextmanager
def autograd_on() -> Iterator[None]:
    """Let gradients be had, in full precision, whatever context the caller is in; this ends `torch.no_grad` as well."""
    with ExitStack() as opened:
        opened.enter_context(torch.inference_mode(False))
        for kind in ("cpu", "cuda", "mps"):
            if kind == "cpu" or torch.is_autocast_enabled(kind):
                opened.enter_context(torch.autocast(kind, enabled=False))
        yield


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


def reference_inputs(inputs: Inputs) -> Tensor:
    """Return the floating inputs as one tensor of shape (n_samples, ...), or ask for an input layer."""
    floating = list(floating_inputs(inputs).values())
    if not floating:
        kinds = ", ".join(sorted({str(tensor.dtype) for _, tensor in items_of(inputs)}))
        raise InvalidDataError(
            f"The inputs must be floating-point numbers. Got {kinds} instead. Convert images with .float(); for "
            "token ids name the embedding with input_layer=."
        )
    if len(floating) == 1:
        return floating[0]
    return torch.cat([tensor.flatten(start_dim=1) for tensor in floating], dim=1)


def floating_inputs(inputs: Inputs) -> dict[str, Tensor]:
    """Return the inputs of floating-point numbers by key, without those that tell what is padding."""
    return {key: tensor for key, tensor in items_of(inputs) if tensor.is_floating_point() and not tells_padding(key)}


def input_axes(inputs: Inputs) -> dict[str, int]:
    """Return the axis of the reference inputs that the tokens are along, under the key ``""``; none if there is none.

    Raises
    ------
    InvalidDataError
        If padding would count: the inputs have one number a token, or are several that do not fit together.
    """
    reference, n_tokens = reference_inputs(inputs), n_tokens_of(inputs)
    shapes = {key: tensor.shape[1:] for key, tensor in floating_inputs(inputs).items()}
    padded = [key for key, shape in shapes.items() if n_tokens is not None and shape[:1] == (n_tokens,)]
    if not padded:
        return {}
    if len(shapes) > 1 or reference.ndim < 3:
        raise InvalidDataError(
            f"In the input {', '.join(padded)} padding cannot be told from tokens: one input of shape (n_samples, "
            "n_tokens, n_features) can be compared. Name a module whose output stands for the input with "
            "input_layer=, or, if nothing is padded, leave the mask out."
        )
    return {"": 1}


def check_inputs_vary(varies: bool) -> None:
    """Refuse known inputs that have one value all over."""
    if not varies:
        raise InvalidDataError("The known inputs are all equal, so there is nothing to rebuild.")


def check_same_shape(expected: Shapes, other: Batch, *, name: str = "unknown") -> None:
    """Refuse data of another shape than the known."""
    got = input_shapes(other.inputs)
    if got != expected:
        raise InvalidDataError(
            f"The known and {name} samples must have the same shape. Got {shapes_text(expected)} and "
            f"{shapes_text(got)}."
        )


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


def seed_of(random_state: int | np.random.RandomState | None) -> int:
    """Draw a seed; without a random state from fresh entropy, as numpy's global state is not ours to move."""
    if random_state is None:
        return int(np.random.default_rng().integers(2**31))
    return int(check_random_state(random_state).randint(2**31))
