"""`GradientInverter`: score layers by what descent on the input can rebuild from their activations."""

import warnings
from collections import Counter
from collections.abc import Iterable
from dataclasses import fields
from itertools import chain
from typing import Any, ClassVar, overload

import numpy as np
import torch
from sklearn.exceptions import ConvergenceWarning
from torch import Tensor, nn

from retrainscope.base import LayerEstimator
from retrainscope.batches import Batch, Batches, Label
from retrainscope.checks import check_choice, check_number
from retrainscope.comparing import check_class_counts, score_errors
from retrainscope.control import untrained_copy
from retrainscope.descent import Descent
from retrainscope.features import real_inputs, true_inputs
from retrainscope.moments import ClassMoments, GroupCounter, moments_of
from retrainscope.processes import rank
from retrainscope.rebuilding import Extent, InputSpace, Inversion, extent_of
from retrainscope.reconstruction import invert_batches, invert_each
from retrainscope.scores import LayerScores
from retrainscope.shares import all_of, in_order, together
from retrainscope.tracing import run_layers

__all__ = ["GradientInverter"]


class GradientInverter(LayerEstimator):
    """Score layers by how badly their activations tell the input, found by descent on the input.

    From a random start the input is changed until it causes the activations of a given sample. Measured is the
    squared error between the two inputs; its reference is the same error for the control, a network of the
    same architecture that was never trained: random weights invert too, sometimes better, so only the
    difference speaks. Each sample costs `max_iter` passes forward and backward for each layer, twice.

    Where the data tells what is padding (``attention_mask``, ``key_padding_mask`` or ``lengths``), padding is neither
    sought nor compared, and the error of a sample is the mean over its real tokens.

    Use it to see what a layer keeps of its input, and for the upper layers of a network. In the lower ones its
    need did not tell unknown classes from known ones where that was measured (eight layers, MNIST); in the upper
    ones it did, though less surely than `ActivationSpread`, which costs one pass (docs/inversion.md).

    Parameters
    ----------
    model : nn.Module
        The trained network. It is only borrowed.
    layers, head, input_layer, calls
        What to measure; see `find_layers`. With `input_layer`, its output is what is rebuilt.
    error : {"input", "feature"}
        The measure: the squared error of the input, or that of the activations relative to their squared norm.
    optimizer, max_iter, learning_rate, n_init, tol, n_iter_no_change
        How to search; see `Descent`.
    tv_weight, tv_exponent, norm_weight, norm_exponent, jitter, autocast
        Priors and more; see `Descent`.
    samples_per_class : int
        How many samples of each class are inverted, the first ones; without labels, ten times as many.
    batch_size : int
        Samples inverted at once. It does not change the result.
    device : device, optional
        Where to measure; None: where the model lies.
    random_state : int, RandomState or None
        For the starts, the control's weights and the resampling.
    progress : bool or None
        None shows a bar on a terminal only.

    Attributes
    ----------
    layers_ : Layers
        The layers measured.
    input_space_ : InputSpace
        Range, mean and standard deviation of the known inputs.
    known_errors_ : ClassMoments
        Errors of the known samples: of each layer with the model, then of each layer with the control.

    Warns
    -----
    sklearn.exceptions.ConvergenceWarning
        If the loss of a sample was not finite on the way: it was stopped, and what it had reached is measured.

    References
    ----------
    Experiment 2 of R. D. Sharma, "Better techniques for transfer learning"; A. Mahendran and A. Vedaldi,
    "Understanding deep image representations by inverting them" (2015).

    Examples
    --------
    >>> import torch
    >>> import retrainscope as rs
    >>> _ = torch.manual_seed(0)
    >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
    >>> X, y = torch.randn(20, 4), torch.arange(20) % 2
    >>> inverter = rs.GradientInverter(model, max_iter=20, random_state=0).fit((X, y))
    >>> inverter.reconstruct(X[:3], "0").inputs.shape
    torch.Size([3, 4])
    """

    _takes_shares: ClassVar[bool] = True
    _follows_autocast: ClassVar[bool] = False
    _known_kinds: ClassVar[dict[str, Any]] = {
        "input_space_": InputSpace,
        "known_errors_": ClassMoments,
        "_descent": Descent,
    }

    def __init__(
        self,
        model: nn.Module,
        *,
        layers: Iterable[str | type[nn.Module]] | None = None,
        head: str | None = None,
        input_layer: str | None = None,
        calls: str | None = None,
        error: str = "input",
        optimizer: str = "lbfgs",
        max_iter: int = 100,
        learning_rate: float = 0.1,
        n_init: int = 1,
        tol: float = 0.01,
        n_iter_no_change: int | None = None,
        tv_weight: float = 0.0,
        tv_exponent: float = 2.0,
        norm_weight: float = 0.0,
        norm_exponent: float = 6.0,
        jitter: int = 0,
        autocast: str | None = None,
        samples_per_class: int = 20,
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
        self.error = error
        self.optimizer = optimizer
        self.max_iter = max_iter
        self.learning_rate = learning_rate
        self.n_init = n_init
        self.tol = tol
        self.n_iter_no_change = n_iter_no_change
        self.tv_weight = tv_weight
        self.tv_exponent = tv_exponent
        self.norm_weight = norm_weight
        self.norm_exponent = norm_exponent
        self.jitter = jitter
        self.autocast = autocast
        self.samples_per_class = samples_per_class
        self.batch_size = batch_size
        self.device = device
        self.random_state = random_state
        self.progress = progress

    @overload
    def reconstruct(self, X: Any, layer: str, *, control: bool = False) -> Inversion: ...

    @overload
    def reconstruct(self, X: Any, layer: Iterable[str], *, control: bool = False) -> dict[str, Inversion]: ...

    def reconstruct(
        self, X: Any, layer: str | Iterable[str], *, control: bool = False
    ) -> Inversion | dict[str, Inversion]:
        """Rebuild inputs from the activations of a layer, or of several.

        Parameters
        ----------
        X : Tensor, array, (X, y), Dataset, DataLoader, or a re-iterable of batches
        layer : str or iterable of str
            Of ``layers_.names``.
        control : bool
            Whether to use the untrained control instead of the model.

        Returns
        -------
        Inversion, or dict of str to Inversion for several layers
            In the order of X.
        """
        names = [layer] if isinstance(layer, str) else list(layer)
        with self._lent(X, *names) as (model, batches):
            network = self._control(model) if control else model
            found = invert_batches(network, batches, names, **self._options("inverting"))
        return found[layer] if isinstance(layer, str) else found

    def _measure_known(self, model: nn.Module, batches: Batches) -> None:
        check_choice("error", self.error, ("input", "feature"))
        check_number("samples_per_class", self.samples_per_class, whole=True)
        self._descent = Descent(**{field.name: getattr(self, field.name) for field in fields(Descent)})
        extents = [None if batch is None else self._extents(model, batch) for batch, _ in together(batches)]
        self.input_space_ = InputSpace.of_extents(chain.from_iterable(in_order("the inputs' range", extents)))
        self.known_errors_ = self._errors(model, batches)

    def _extents(self, model: nn.Module, batch: Batch) -> list[Extent]:
        """Measure what is to be rebuilt, also of samples that are not inverted; their layers are finite."""

        def measured(piece: Batch) -> Extent:
            options: dict[str, Any] = {"calls": self.calls, "token_axes": self._token_axes}
            with torch.no_grad():
                run_layers(model, piece.inputs, self.layers_.names, lambda *_: None, **options)
            true = true_inputs(model, piece.inputs, self.input_layer, self.calls, self._token_axes)
            return extent_of(real_inputs(true, piece, self._input_axis))

        return [extent for _, extent in self._halving.run(batch, measured)]

    @property
    def _input_axis(self) -> int | None:
        return self._token_axes.get(self.input_layer or "")

    def _score(self, model: nn.Module, batches: Batches, rng: np.random.Generator) -> LayerScores:
        known, unknown = self.known_errors_, self._errors(model, batches)
        of_input = self.error == "input"
        unit = "input units squared, summed" + (", a token" if self._input_axis else "")
        return score_errors(
            known,
            unknown,
            layers=self.layers_.names,
            estimator=type(self).__name__,
            measure=f"squared error of the {'input' if of_input else 'activations'} after {self.max_iter} steps",
            unit=unit if of_input else "relative to their squared norm",
            variance=self.input_space_.variance if of_input else 1.0,
            rng=rng,
        )

    def _errors(self, model: nn.Module, batches: Batches) -> ClassMoments:
        """Invert the first samples of each class at every layer, with the model and with the control."""
        chosen = self._first_of_each_class(batches)
        labels: list[Label] = [label for batch in chosen for label in batch.labels or (None,) * len(batch)]
        counts = Counter(labels)
        check_class_counts(tuple(counts), np.array([*counts.values()], dtype=np.float64), batches.name)
        errors = []
        for network, whose in ((model, "model"), (self._control(model), "control")):
            for layer, found in self._measured(network, chosen, batches.name, whose).items():
                n_diverged = sum(diverged for _, diverged in found)
                _warn_of_diverged(
                    n_diverged, len(labels), f"layer {layer!r} of the {whose} and the {batches.name} data"
                )
                errors.append(torch.cat([error for error, _ in found]))
        return moments_of(torch.stack(errors, dim=1), tuple(labels), GroupCounter().deal(tuple(labels))).ordered()

    def _measured(
        self, network: nn.Module, batches: list[Batch], name: str, whose: str
    ) -> dict[str, list[tuple[Tensor, int]]]:
        """Return for each layer the errors of each batch, and how many of its samples diverged."""
        parts = self._parts.under(name)
        found: dict[str, list[tuple[Tensor, int]]] = parts.get(whose) or {layer: [] for layer in self.layers_.names}

        def take(inversion: Inversion) -> tuple[Tensor, int]:
            error = inversion.input_error if self.error == "input" else inversion.feature_error.double()
            return error, int(inversion.diverged.sum())

        inversions = invert_each(
            network,
            batches,
            self.layers_.names,
            **self._options(f"inverting {name}, {whose}"),
            take=take,
            done=lambda number, layer: number < len(found[layer]),
            shared=True,
        )
        for _, layer, errors in inversions:
            found[layer].append(errors)
            if parts.due():
                parts.put(whose, found)
        return found

    def _first_of_each_class(self, batches: Batches) -> list[Batch]:
        """Return the samples to invert, in the batches that they come in; the same in all processes."""
        taken, mine = Counter[Label](), list[Batch | None]()
        for batch, told in together(batches):
            rows = [self._first(one.labels, taken) for one in told][rank()]
            mine.append(batch.take(np.array(rows)) if batch is not None and rows else None)
        return all_of(batches, mine)

    def _first(self, labels: tuple[Label, ...], taken: Counter[Label]) -> list[int]:
        """Return the rows of samples whose class is not yet there often enough."""
        rows = []
        for row, label in enumerate(labels):
            if taken[label] < self.samples_per_class * (10 if label is None else 1):
                taken[label] += 1
                rows.append(row)
        return rows

    def _control(self, model: nn.Module) -> nn.Module:
        return untrained_copy(model, seed=self._seed, keep=self.input_layer)

    def _options(self, what: str) -> dict[str, Any]:
        return {
            "space": self.input_space_,
            "descent": self._descent,
            "seed": self._seed,
            "input_layer": self.input_layer,
            "calls": self.calls,
            "token_axes": self._token_axes,
            "progress": self.progress,
            "what": what,
            "halving": self._halving,
        }


def _warn_of_diverged(n: int, n_samples: int, where: str) -> None:
    if n:
        warnings.warn(
            f"{n} of {n_samples} inversions at {where} diverged: their loss was not finite. They were "
            "stopped, and what they had reached is measured. Give a smaller learning_rate.",
            ConvergenceWarning,
            stacklevel=2,
        )
