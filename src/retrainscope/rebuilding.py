"""Rebuild inputs from their features by descent: `invert`."""

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from torch import Tensor

from retrainscope.descent import Descent, NoGradientError, Path, descend
from retrainscope.exceptions import InvalidDataError
from retrainscope.features import Features
from retrainscope.precision import doubled, wide
from retrainscope.reference import check_inputs_vary
from retrainscope.tables import Shown, Table

__all__ = ["Extent", "InputSpace", "Inversion", "extent_of", "invert"]

Extent = tuple[int, int, float, float, float, float]

_EDGE = 1e-8  # keeps the slope of the total variation finite where neighbours are equal


@dataclass(frozen=True, eq=False, repr=False)
class Inversion(Shown):
    """What an inversion rebuilt.

    Attributes
    ----------
    inputs : Tensor of shape (n_samples, ...)
        The rebuilt inputs: of all that the descent passed, those with the lowest loss. NaN where there is padding.
    input_error : Tensor of shape (n_samples,)
        Squared error against the true input, summed over its elements, in the input's units squared; with padding,
        the mean over the real tokens of what is summed over a token's elements.
    feature_error : Tensor of shape (n_samples,)
        Squared error of the activations divided by their squared norm.
    losses : Tensor of shape (n_samples, max_iter)
        The feature error, and the priors if there are any, before each step.
    n_iter : Tensor of shape (n_samples,)
        Steps taken.
    diverged : Tensor of bool of shape (n_samples,)
        Whether the sample was stopped because its loss was not finite; what it had reached is kept.

    Examples
    --------
    >>> import torch
    >>> import retrainscope as rs
    >>> _ = torch.manual_seed(0)
    >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 2))
    >>> found = rs.invert_layers(model, torch.rand(5, 4), ["0"], random_state=0)["0"]
    >>> found.inputs.shape, found.input_error.shape
    (torch.Size([5, 4]), torch.Size([5]))
    """

    inputs: Tensor
    input_error: Tensor
    feature_error: Tensor
    losses: Tensor
    n_iter: Tensor
    diverged: Tensor

    def as_table(self) -> Table:
        """Return the lowest, the median and the highest error and number of steps."""
        measured = {"input error": self.input_error, "feature error": self.feature_error, "steps": self.n_iter}
        rows = [
            [name, *(f"{float(value):.4g}" for value in np.quantile(values.double().numpy(), (0, 0.5, 1)))]
            for name, values in measured.items()
        ]
        title = f"{len(self.inputs)} inputs of shape {tuple(self.inputs.shape[1:])}"
        n_diverged = int(self.diverged.sum())
        note = f"{n_diverged} of them diverged." if n_diverged else ""
        return Table(title, ["of a sample", "lowest", "median", "highest"], rows, note=note)


@dataclass(frozen=True)
class InputSpace:
    """Where inputs are sought: their range, and what the random starts are drawn from.

    Attributes
    ----------
    low, high : float
    mean, std : float
    variance : float
        Summed over the elements of an input.

    Examples
    --------
    >>> import torch
    >>> import retrainscope as rs
    >>> rs.InputSpace.of([torch.tensor([[0.0, 1.0], [1.0, 0.0]])])
    InputSpace(low=0.0, high=1.0, mean=0.5, std=0.5, variance=0.5)
    """

    low: float
    high: float
    mean: float
    std: float
    variance: float

    @classmethod
    def of(cls, inputs: Iterable[Tensor]) -> "InputSpace":
        """Measure the space that inputs of shape (n, ...) take."""
        return cls.of_extents(map(extent_of, inputs))

    @classmethod
    def of_extents(cls, extents: "Iterable[Extent]") -> "InputSpace":
        """Put together what was measured of parts of the inputs."""
        n, n_samples, total, squares, low, high = 0, 0, 0.0, 0.0, np.inf, -np.inf
        for part in extents:
            n, n_samples, total, squares = n + part[0], n_samples + part[1], total + part[2], squares + part[3]
            low, high = min(low, part[4]), max(high, part[5])
        variance = squares / n - (total / n) ** 2
        check_inputs_vary(low < high and variance > 0)
        return cls(low, high, total / n, variance**0.5, variance * n / n_samples)

    def start(self, shape: Sequence[int], positions: Iterable[int], seed: int, restart: int) -> Tensor:
        """Draw a start for each sample: it depends on the sample's place alone, not on the rest of its batch."""
        noise = [
            np.random.default_rng([seed, int(position), restart]).standard_normal(tuple(shape), np.float32)
            for position in positions
        ]
        return (self.mean + self.std * torch.from_numpy(np.stack(noise))).clamp(self.low, self.high)


def extent_of(inputs: Tensor) -> Extent:
    """Return the numbers of values and samples, the sums of values and squares, the lowest and the highest value."""
    values = doubled(inputs)
    ends = float(values.min()), float(values.max())
    return values.numel(), len(values), float(values.sum()), float(values.square().sum()), *ends


def invert(
    features_of: Features,
    inputs: Tensor,
    starts: Iterable[Tensor],
    *,
    space: InputSpace,
    descent: Descent,
    seed: int = 0,
    real: Tensor | None = None,
    report: Callable[[int, Tensor], None] = lambda *_: None,
) -> Inversion:
    """Rebuild inputs from their features; see `Descent` for what is minimised.

    Parameters
    ----------
    features_of : callable (values, rows) -> features
        Maps inputs of shape (n, ...) to features of shape (n, ...), differentiably; `rows` tells which samples they
        are for.
    inputs : Tensor of shape (n_samples, ...)
        The true inputs x0.
    starts : iterable of Tensor of that shape
        Where the descent starts, each time.
    space : InputSpace
    descent : Descent
    seed : int
        For the jitter.
    real : Tensor of bool, optional
        What of the inputs is no padding; it has their axes, of length 1 but for samples and tokens. The input error
        is then a token's, and padding is NaN in what is rebuilt.
    report : callable (n_steps, losses) -> None
        Told how far it is, now and then.

    Returns
    -------
    Inversion

    Raises
    ------
    NoGradientError
        If no gradient flows from the features to the input.
    """
    if (descent.tv_weight or descent.jitter) and inputs.ndim < 4:
        raise InvalidDataError(
            "Total variation and jitter are for images of shape (n_samples, channels, height, width) and volumes. Got "
            f"{tuple(inputs.shape)}. Set tv_weight and jitter to 0."
        )
    step, best = descent.learning_rate * space.std, None
    for start in starts:
        loss = _FeatureLoss(features_of, inputs, space, descent, seed)
        start = start.to(wide(inputs).dtype)
        path = descend(loss, start, low=space.low, high=space.high, step=step, descent=descent, report=report)
        best = path if best is None else _better(best, path)
    assert best is not None
    every = torch.arange(len(inputs), device=inputs.device)
    with torch.no_grad():
        target = wide(features_of(inputs, every).detach().flatten(1))
        difference = wide(features_of(best.inputs.to(inputs.dtype), every).detach().flatten(1)) - target
    rebuilt, squares = best.inputs, doubled(best.inputs - inputs).square()
    input_error = squares.flatten(1).sum(dim=1)
    if real is not None:
        rebuilt = rebuilt.masked_fill(~real, torch.nan)
        input_error = squares.masked_fill(~real, 0).flatten(1).sum(dim=1) / real.flatten(1).sum(dim=1)
    return Inversion(
        inputs=rebuilt.cpu(),
        input_error=input_error.cpu(),
        feature_error=(_square(difference) / _scale(target)).cpu(),
        losses=best.losses.cpu(),
        n_iter=best.n_iter.cpu(),
        diverged=best.diverged.cpu(),
    )


class _FeatureLoss:
    """The feature error relative to the features, and the priors: a `Loss`."""

    def __init__(self, features_of: Features, inputs: Tensor, space: InputSpace, descent: Descent, seed: int) -> None:
        self._features_of, self._inputs, self._space, self._descent = features_of, inputs, space, descent
        self._jitter = torch.Generator().manual_seed(seed)
        self._rows = torch.arange(len(inputs), device=inputs.device)
        with torch.no_grad(), self._precision(inputs):
            # Detached, as a model may switch gradients on by itself.
            self._target = wide(features_of(inputs, self._rows).detach().flatten(1))
        self._scale, self._difference = _scale(self._target), torch.empty_like(self._target)

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = x.detach().requires_grad_(True)
        with torch.enable_grad(), self._precision(x):
            features = self._features_of(self._shifted(x).to(self._inputs.dtype), self._rows)
        if not features.requires_grad:
            raise NoGradientError("The features do not depend on the input in a way that has a gradient.")
        # The gradient of the error by hand, in memory that is used again: each sample's is its own, whatever else is
        # in the batch.
        torch.sub(features.detach().flatten(1), self._target, out=self._difference)
        errors = (_square(self._difference) / self._scale).to(x.dtype)
        slope = self._difference.mul_((2 / self._scale)[:, None]).to(features.dtype).reshape(features.shape)
        (gradient,) = torch.autograd.grad(features, x, slope, allow_unused=True)
        if gradient is None:
            raise NoGradientError("No gradient flows from the features to the input.")
        if self._descent.has_priors:
            with torch.enable_grad():
                priors = self._priors(x)
                (more,) = torch.autograd.grad(priors.sum(), x)
            errors, gradient = errors + priors.detach(), gradient + more
        return errors, gradient

    def only(self, x: Tensor) -> Tensor:
        with torch.no_grad(), self._precision(x):
            features = wide(self._features_of(x.to(self._inputs.dtype), self._rows).detach().flatten(1))
            errors = (_square(features - self._target) / self._scale).to(x.dtype)
            return errors + self._priors(x) if self._descent.has_priors else errors

    def keep(self, rows: Tensor) -> None:
        self._rows, self._target, self._scale = self._rows[rows], self._target[rows], self._scale[rows]
        self._difference = torch.empty_like(self._target)

    def stuck(self) -> None:
        x = self._inputs.detach().requires_grad_(True)
        with torch.enable_grad():
            features = self._features_of(x, torch.arange(len(x), device=x.device))
        weights = torch.randn(features.shape, generator=self._jitter).to(features)
        if not torch.autograd.grad(features, x, weights)[0].any():
            raise NoGradientError("The gradient from the features to the input is zero, at the true inputs as well.")

    def _precision(self, x: Tensor) -> AbstractContextManager[Any]:
        if self._descent.autocast is None:
            return nullcontext()
        return torch.autocast(x.device.type, torch.bfloat16, cache_enabled=False)

    def _shifted(self, x: Tensor) -> Tensor:
        if not self._descent.jitter:
            return x
        most, directions = self._descent.jitter, range(2, x.ndim)
        shifts = torch.randint(-most, most + 1, (len(directions),), generator=self._jitter)
        return torch.roll(x, shifts.tolist(), dims=tuple(directions))

    def _priors(self, x: Tensor) -> Tensor:
        descent, z = self._descent, (x - self._space.mean) / self._space.std
        priors = x.new_zeros(len(x))
        if descent.norm_weight:
            priors = priors + descent.norm_weight * z.abs().pow(descent.norm_exponent).flatten(1).mean(dim=1)
        if descent.tv_weight:
            squares = torch.zeros_like(z)
            for direction in range(2, z.ndim):
                edge = z.narrow(direction, -1, 1)
                squares = squares + z.diff(dim=direction, append=edge).square()
            variation = (squares + _EDGE).pow(descent.tv_exponent / 2) - _EDGE ** (descent.tv_exponent / 2)
            priors = priors + descent.tv_weight * variation.flatten(1).mean(dim=1)
        return priors


def _better(first: Path, second: Path) -> Path:
    """Take for each sample the start that did not diverge, and of two such the one with the lower loss."""
    better = torch.where(first.diverged == second.diverged, second.loss < first.loss, first.diverged)

    def chosen(a: Tensor, b: Tensor) -> Tensor:
        return torch.where(better.reshape(-1, *[1] * (a.ndim - 1)), b, a)

    return Path(
        **{field.name: chosen(getattr(first, field.name), getattr(second, field.name)) for field in fields(Path)}
    )


def _square(values: Tensor) -> Tensor:
    norms: Tensor = torch.linalg.vector_norm(values, dim=1)
    return norms.square()


def _scale(target: Tensor) -> Tensor:
    """Return the squared norms; 1 where a layer is silent for a sample."""
    squares = _square(target)
    return torch.where(squares > torch.finfo(squares.dtype).tiny, squares, 1.0)
