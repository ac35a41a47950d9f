"""`GradientInverter`: rebuild the input from a layer's activations by descent on the input."""

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from retrainscope.base import (
    LayerEstimator,
    check_class_counts,
    check_inputs_vary,
    check_number,
    reference_inputs,
    score_errors,
)
from retrainscope.batches import Batch, Batches, Inputs, Label
from retrainscope.control import untrained_copy
from retrainscope.exceptions import InvalidDataError, UnsupportedModelError
from retrainscope.moments import ClassMoments, GroupCounter, moments_of
from retrainscope.progress import progress_bar
from retrainscope.scores import LayerScores
from retrainscope.tracing import replace_output, run_layers

__all__ = ["GradientInverter", "Inversion", "invert"]


@dataclass(frozen=True, eq=False)
class Inversion:
    """What an inversion rebuilt.

    Attributes
    ----------
    inputs : Tensor of shape (n_samples, ...)
        The rebuilt inputs.
    input_error : Tensor of shape (n_samples,)
        Squared error against the true input, summed over its elements, in the input's units squared.
    feature_error : Tensor of shape (n_samples,)
        Squared error of the activations divided by their squared norm.
    losses : Tensor of shape (max_iter,)
        Mean feature error before each step.
    """

    inputs: Tensor
    input_error: Tensor
    feature_error: Tensor
    losses: Tensor


def invert(
    features_of: Callable[[Tensor], Tensor],
    inputs: Tensor,
    start: Tensor,
    *,
    low: float,
    high: float,
    step: float,
    max_iter: int,
) -> Inversion:
    """Rebuild inputs from their features with Adam, all at once and each for itself.

    Minimised over x is ||f(x) - f(x0)||^2 / ||f(x0)||^2 (Mahendran and Vedaldi 2015, without priors), x kept
    in [low, high].

    Parameters
    ----------
    features_of : callable
        Maps inputs (n_samples, ...) to features (n_samples, ...), differentiably.
    inputs : Tensor of shape (n_samples, ...)
        The true inputs x0.
    start : Tensor of the same shape
        Where the descent starts.
    low, high : float
        The range of the input.
    step : float
        Adam's step, in the input's units.
    max_iter : int

    Returns
    -------
    Inversion

    Raises
    ------
    UnsupportedModelError
        If no gradient flows from the features to the input.
    """
    with torch.no_grad():
        target = features_of(inputs).detach().flatten(1)
    scale = target.square().sum(dim=1)
    scale = torch.where(scale > torch.finfo(target.dtype).tiny, scale, 1.0)  # a layer may be silent for a sample
    rebuilt = start.clone().requires_grad_(True)
    optimizer = torch.optim.Adam([rebuilt], lr=step)
    losses = []
    with torch.enable_grad():
        for _ in range(max_iter):
            errors = (features_of(rebuilt).flatten(1) - target).square().sum(dim=1) / scale
            # The sum, not the mean: each sample's gradient is its own, whatever else is in the batch.
            total = errors.sum()
            gradient = torch.autograd.grad(total, rebuilt, allow_unused=True)[0] if total.requires_grad else None
            if gradient is None:
                raise UnsupportedModelError(
                    "No gradient flows from the layer to the input: something on the way detaches or rounds. "
                    "Leave the layer out, or use another estimator."
                )
            rebuilt.grad = gradient
            optimizer.step()
            with torch.no_grad():
                rebuilt.clamp_(low, high)
            losses.append(errors.detach().mean())
    final = rebuilt.detach()
    with torch.no_grad():
        feature_error = (features_of(final).flatten(1) - target).square().sum(dim=1) / scale
    return Inversion(
        inputs=final.cpu(),
        input_error=(final - inputs).double().square().flatten(1).sum(dim=1).cpu(),
        feature_error=feature_error.cpu(),
        losses=torch.stack(losses).cpu() if losses else torch.empty(0),
    )


class GradientInverter(LayerEstimator):
    """Score layers by how badly their activations tell the input, found by descent on the input.

    From a random start the input is changed until it causes the activations of a given sample. Measured is the
    squared error between the two inputs; its reference is the same error for the control, a network of the
    same architecture that was never trained: random weights invert too, sometimes better, so only the
    difference speaks. Each sample costs `max_iter` passes forward and backward for each layer, twice.

    Parameters
    ----------
    model : nn.Module
        The trained network. It is only borrowed.
    layers, head, input_layer
        What to measure; see `find_layers`. With `input_layer`, its output is what is rebuilt.
    max_iter : int
        Steps of descent.
    learning_rate : float
        Adam's step, in standard deviations of the known input.
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
    known_errors_ : ClassMoments
        Errors of the known samples: of each layer with the model, then of each layer with the control.

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

    def __init__(
        self,
        model: nn.Module,
        *,
        layers: Iterable[str] | None = None,
        head: str | None = None,
        input_layer: str | None = None,
        max_iter: int = 200,
        learning_rate: float = 0.1,
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
        self.max_iter = max_iter
        self.learning_rate = learning_rate
        self.samples_per_class = samples_per_class
        self.batch_size = batch_size
        self.device = device
        self.random_state = random_state
        self.progress = progress

    def reconstruct(self, X: Any, layer: str, *, control: bool = False) -> Inversion:
        """Rebuild inputs from the activations of a layer.

        Parameters
        ----------
        X : Tensor, array, (X, y), Dataset, DataLoader, or a re-iterable of batches
        layer : str
            One of ``layers_.names``.
        control : bool
            Whether to use the untrained control instead of the model.

        Returns
        -------
        Inversion
            In the order of X.
        """
        with self._lent(X, layer) as (model, batches):
            network = self._control(model) if control else model
            bar = progress_bar(batches, what=f"inverting {layer}", progress=self.progress, total=batches.n_batches)
            parts = [self._invert(network, batch, layer) for batch in bar]
        sizes = torch.tensor([len(part.inputs) for part in parts], dtype=torch.float32)
        return Inversion(
            inputs=torch.cat([part.inputs for part in parts]),
            input_error=torch.cat([part.input_error for part in parts]),
            feature_error=torch.cat([part.feature_error for part in parts]),
            losses=(torch.stack([part.losses for part in parts]) * (sizes / sizes.sum())[:, None]).sum(dim=0),
        )

    def _measure_known(self, model: nn.Module, batches: Batches) -> None:
        check_number("max_iter", self.max_iter, whole=True)
        check_number("samples_per_class", self.samples_per_class, whole=True)
        check_number("learning_rate", self.learning_rate, whole=False)
        self._input_statistics(model, batches)
        self.known_errors_ = self._errors(model, batches)

    def _score(self, model: nn.Module, batches: Batches, rng: np.random.Generator) -> LayerScores:
        known, unknown = self.known_errors_, self._errors(model, batches)
        return score_errors(
            known,
            unknown,
            layers=self.layers_.names,
            estimator=type(self).__name__,
            measure=f"squared error of the input after {self.max_iter} steps",
            input_variance=self._input_variance,
            rng=rng,
        )

    def _input_statistics(self, model: nn.Module, batches: Batches) -> None:
        n, n_samples, total, squares, low, high = 0, 0, 0.0, 0.0, np.inf, -np.inf
        for batch in batches:
            values = self._true_inputs(model, batch.inputs).double()
            n, n_samples = n + values.numel(), n_samples + len(values)
            total += float(values.sum())
            squares += float(values.square().sum())
            low, high = min(low, float(values.min())), max(high, float(values.max()))
        variance = squares / n - (total / n) ** 2
        check_inputs_vary(low < high and variance > 0)
        self._mean, self._std, self._low, self._high = total / n, variance**0.5, low, high
        self._input_variance = variance * n / n_samples

    def _errors(self, model: nn.Module, batches: Batches) -> ClassMoments:
        """Invert the first samples of each class at every layer, with the model and with the control."""
        control = self._control(model)
        chosen = list(self._first_of_each_class(batches))
        counts = Counter(label for batch in chosen for label in batch.labels or (None,) * len(batch))
        check_class_counts(tuple(counts), np.array([*counts.values()], dtype=np.float64), batches.name)
        counter, moments = GroupCounter(), None
        jobs = len(chosen) * len(self.layers_.names) * 2
        with progress_bar(what=f"inverting {batches.name}", progress=self.progress, total=jobs) as bar:
            for batch in chosen:
                errors = []
                for network in (model, control):
                    for layer in self.layers_.names:
                        errors.append(self._invert(network, batch, layer).input_error)
                        bar.update()
                labels: tuple[Label, ...] = batch.labels or (None,) * len(batch)
                new = moments_of(torch.stack(errors, dim=1), labels, counter.deal(labels))
                moments = new if moments is None else moments.merge(new)
        assert moments is not None
        return moments.ordered()

    def _first_of_each_class(self, batches: Batches) -> Iterable[Batch]:
        taken: dict[Label, int] = {}
        for batch in batches:
            labels = batch.labels or (None,) * len(batch)
            rows = []
            for row, label in enumerate(labels):
                most = self.samples_per_class * (10 if label is None else 1)
                if taken.get(label, 0) < most:
                    taken[label] = taken.get(label, 0) + 1
                    rows.append(row)
            if rows:
                yield batch.take(np.array(rows))

    def _control(self, model: nn.Module) -> nn.Module:
        return untrained_copy(model, seed=self._seed, keep=self.input_layer)

    def _invert(self, network: nn.Module, batch: Batch, layer: str) -> Inversion:
        true = self._true_inputs(network, batch.inputs)
        # A sample's start depends on its place alone: not on the batch, the layer or the network.
        noise = [
            np.random.default_rng([self._seed, int(position)]).standard_normal(true.shape[1:], np.float32)
            for position in batch.positions
        ]
        start = self._mean + self._std * torch.from_numpy(np.stack(noise))
        return invert(
            self._features(network, batch.inputs, layer),
            true,
            start.clamp(self._low, self._high).to(true.device, true.dtype),
            low=self._low,
            high=self._high,
            step=self.learning_rate * self._std,
            max_iter=self.max_iter,
        )

    def _true_inputs(self, network: nn.Module, inputs: Inputs) -> Tensor:
        """Return what is to be rebuilt: the input, or the output of the input layer."""
        if self.input_layer is None:
            return reference_inputs(inputs)
        found: list[Tensor] = []
        with torch.no_grad():
            run_layers(network, inputs, [self.input_layer], lambda _, output: found.append(output.clone()))
        return found[0]

    def _features(self, network: nn.Module, inputs: Inputs, layer: str) -> Callable[[Tensor], Tensor]:
        def features_of(values: Tensor) -> Tensor:
            found: list[Tensor] = []

            def keep(_: str, output: Tensor) -> None:
                found.append(output.clone())

            if self.input_layer is not None:
                with replace_output(network, self.input_layer, values):
                    run_layers(network, inputs, [layer], keep)
            elif isinstance(inputs, Tensor):
                run_layers(network, values, [layer], keep)
            else:
                run_layers(network, {**inputs, _floating_key(inputs): values}, [layer], keep)
            return found[0]

        return features_of


def _floating_key(inputs: dict[str, Tensor]) -> str:
    keys = [key for key, tensor in inputs.items() if tensor.is_floating_point()]
    if len(keys) != 1:
        raise InvalidDataError(
            f"GradientInverter rebuilds one floating-point input. Got {', '.join(keys)}; name one module's output "
            "with input_layer= instead."
        )
    return keys[0]
