"""Descent on the input of a network: all samples of a batch at once, each for itself."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.optim.adam import adam

from retrainscope.checks import check_choice, check_number
from retrainscope.exceptions import InvalidDataError, UnsupportedModelError
from retrainscope.precision import doubled

__all__ = ["Descent", "Loss", "NoGradientError", "Path", "descend"]

_CHECK_EVERY = 10  # steps between looks at who has finished: each look waits for the device
_MEMORY = 10  # steps that L-BFGS remembers
_SUFFICIENT, _SHORTER, _GIVE_UP = 1e-4, 0.4, 12  # L-BFGS: Armijo's constant, the factor, and how often


@dataclass(frozen=True)
class Descent:
    """How an input is sought whose activations are given.

    Minimised over x, within the range of the input, is::

        ||f(x) - f(x0)||^2 / ||f(x0)||^2 + tv_weight * TV(z) + norm_weight * mean |z|^norm_exponent

    (Mahendran and Vedaldi 2015), where z is x in standard deviations from the mean, and TV(z) the mean over
    pixels of (squared differences to the neighbours, summed over directions)^(tv_exponent / 2).

    Attributes
    ----------
    optimizer : {"lbfgs", "adam"}
        With L-BFGS each sample has its own history and step length, and a step that does not help is tried again,
        shorter. It gets further than Adam in as many passes; beside the passes themselves, which are what
        costs in all but small networks, a step takes a little longer.
    max_iter : int
        Passes forward and backward.
    learning_rate : float
        Adam's step, and the length of the first one of L-BFGS, in standard deviations of the input.
    n_init : int
        Random starts; for each sample the one with the lowest loss is kept.
    tol : float
    n_iter_no_change : int, optional
        A sample is done when its loss has not fallen by the fraction `tol` for so many steps. None: never
        before `max_iter`.
    tv_weight, tv_exponent : float
        Weight and exponent (at least 1) of the total variation; images (n, channels, height, width) and volumes only.
    norm_weight, norm_exponent : float
        Weight and exponent (at least 1) of the norm.
    jitter : int
        Each step the images are shifted by up to so many pixels, round the edge; for Adam.
    autocast : {"bfloat16"}, optional
        The type that the forward pass computes with where torch's autocast thinks it safe; the search comes less far
        with it. None: the model's own, also inside of the caller's ``torch.autocast``.

    Raises
    ------
    InvalidDataError
        If a value is out of range.

    Examples
    --------
    >>> import retrainscope as rs
    >>> rs.Descent(tv_weight=0.1, max_iter=300).has_priors
    True
    >>> rs.Descent(jitter=1)
    Traceback (most recent call last):
    retrainscope.exceptions.InvalidDataError: jitter makes every step's loss another one, ...
    """

    optimizer: str = "lbfgs"
    max_iter: int = 100
    learning_rate: float = 0.1
    n_init: int = 1
    tol: float = 0.01
    n_iter_no_change: int | None = None
    tv_weight: float = 0.0
    tv_exponent: float = 2.0
    norm_weight: float = 0.0
    norm_exponent: float = 6.0
    jitter: int = 0
    autocast: str | None = None

    def __post_init__(self) -> None:
        check_choice("optimizer", self.optimizer, ("adam", "lbfgs"))
        for name in ("max_iter", "n_init"):
            check_number(name, getattr(self, name), whole=True)
        check_number("learning_rate", self.learning_rate, whole=False)
        check_number("tol", self.tol, whole=False, zero=True, below=1)
        for name in ("tv_weight", "norm_weight"):
            check_number(name, getattr(self, name), whole=False, zero=True)
        for name in ("tv_exponent", "norm_exponent"):
            check_number(name, getattr(self, name), whole=False, least=1)
        check_number("jitter", self.jitter, whole=True, zero=True)
        if self.n_iter_no_change is not None:
            check_number("n_iter_no_change", self.n_iter_no_change, whole=True)
        if self.autocast is not None:
            check_choice("autocast", self.autocast, ("bfloat16",))
        if self.jitter and self.optimizer == "lbfgs":
            raise InvalidDataError("jitter makes every step's loss another one, which L-BFGS cannot use. Choose Adam.")

    @property
    def has_priors(self) -> bool:
        """Whether more than the activations has a say."""
        return self.tv_weight > 0 or self.norm_weight > 0


@dataclass(frozen=True, eq=False)
class Path:
    """Where the descent ended, and how it got there.

    Attributes
    ----------
    inputs : Tensor of shape (n_samples, ...)
        Of all inputs on the way those with the lowest loss.
    loss : Tensor of shape (n_samples,)
        Theirs; infinite if the loss was not finite at the start already.
    losses : Tensor of shape (n_samples, max_iter)
        Before each step; where a sample is done, its last.
    n_iter : Tensor of shape (n_samples,)
        Steps taken.
    diverged : Tensor of bool of shape (n_samples,)
        Whether the descent was stopped because the loss was not finite.
    """

    inputs: Tensor
    loss: Tensor
    losses: Tensor
    n_iter: Tensor
    diverged: Tensor


class Loss(Protocol):
    """What is minimised, for the samples that are not done."""

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the losses of shape (n,) and their gradients of x's shape."""

    def only(self, x: Tensor) -> Tensor:
        """Return the losses alone."""

    def keep(self, rows: Tensor) -> None:
        """Forget all samples but these."""

    def stuck(self) -> None:
        """Raise NoGradientError if the samples, none of which can move from its start, never could."""


class NoGradientError(UnsupportedModelError):
    """No gradient flows from the features to the input."""


def descend(
    loss: Loss,
    start: Tensor,
    *,
    low: float,
    high: float,
    step: float,
    descent: Descent,
    report: Callable[[int, Tensor], None] = lambda *_: None,
) -> Path:
    """Minimise a loss over inputs within [low, high].

    Parameters
    ----------
    loss : Loss
    start : Tensor of shape (n_samples, ...)
    low, high : float
    step : float
        Length of a step, in the input's units.
    descent : Descent
        Its optimizer, number of steps and rule to stop.
    report : callable (n_steps, losses) -> None
        Told how far it is, now and then.

    Returns
    -------
    Path

    Raises
    ------
    NoGradientError
        If the first gradient is missing, or if it is zero, as it is everywhere else.
    """
    n, device = len(start), start.device
    stepper: _Adam | _Lbfgs = (_Adam if descent.optimizer == "adam" else _Lbfgs)(start, low, high, step)
    path = Path(
        inputs=start.clone(),
        loss=start.new_full((n,), torch.inf),
        losses=start.new_zeros(n, descent.max_iter),
        n_iter=torch.full((n,), descent.max_iter, device=device),
        diverged=torch.zeros(n, dtype=torch.bool, device=device),
    )
    rows = torch.arange(n, device=device)  # the samples that are not done
    best, best_loss = start.clone(), path.loss.clone()
    mark, unchanged = path.loss.clone(), torch.zeros(n, device=device)
    curve: list[Tensor] = []  # the losses of these samples since one was last put down

    def look(losses: Tensor) -> None:
        better = losses < best_loss  # never for NaN
        torch.where(_like(better, best), stepper.x, best, out=best)
        torch.where(better, losses, best_loss, out=best_loss)

    def put_down(which: Tensor, end: int) -> None:
        """Write down what has become of samples that are done after so many steps."""
        path.inputs[rows[which]], path.loss[rows[which]] = best[which], best_loss[which]
        path.diverged[rows[which]] = stepper.failed()[which]
        path.n_iter[rows[which]] = end
        path.losses[rows[which], end:] = stepper.loss[which, None]

    def write_curve(end: int) -> None:
        path.losses[rows, end - len(curve) : end] = torch.stack(curve, dim=1)
        curve.clear()

    for iteration in range(descent.max_iter):
        losses, gradient = loss(stepper.x)
        if iteration == 0 and (losses > 0).any() and not gradient.any():
            loss.stuck()
        look(losses)
        stepper.step(losses, gradient)
        curve.append(stepper.loss)
        if descent.n_iter_no_change is not None:
            lower = losses < mark * (1 - descent.tol)
            torch.where(lower, losses, mark, out=mark)
            unchanged = torch.where(lower, 0, unchanged + 1)
        if (iteration + 1) % _CHECK_EVERY:
            continue
        report(_CHECK_EVERY, losses)
        done = stepper.failed()
        if descent.n_iter_no_change is not None:
            done |= unchanged >= descent.n_iter_no_change
        if done.any():
            put_down(done, iteration + 1)
            write_curve(iteration + 1)
            left = torch.nonzero(~done).flatten()
            rows, best, best_loss = rows[left], best[left], best_loss[left]
            mark, unchanged = mark[left], unchanged[left]
            loss.keep(left)
            stepper.keep(left)
            if not len(rows):
                return path
    look(loss.only(stepper.x))
    put_down(torch.ones_like(rows, dtype=torch.bool), descent.max_iter)
    if curve:
        write_curve(descent.max_iter)
    return path


class _Adam:
    """Adam, whose step does not depend on the other samples; x is where to evaluate next."""

    def __init__(self, start: Tensor, low: float, high: float, step: float) -> None:
        self.x, self.loss, self.low, self.high, self._step = start.clone(), start.new_zeros(len(start)), low, high, step
        self._mean, self._square, self._steps = (
            torch.zeros_like(start),
            torch.zeros_like(start),
            torch.zeros((), device=start.device),
        )

    def failed(self) -> Tensor:
        return ~torch.isfinite(self.loss)

    def step(self, losses: Tensor, gradient: Tensor) -> None:
        self.loss = losses
        adam(
            [self.x], [gradient], [self._mean], [self._square], [], [self._steps],
            amsgrad=False, beta1=0.9, beta2=0.999, lr=self._step, weight_decay=0, eps=1e-8, maximize=False, fused=True,
        )  # fmt: skip
        self.x.clamp_(self.low, self.high)

    def keep(self, rows: Tensor) -> None:
        self.x, self.loss, self._mean, self._square = (
            tensor[rows] for tensor in (self.x, self.loss, self._mean, self._square)
        )


class _Lbfgs:
    """L-BFGS for every sample by itself: one evaluation a step, history and step length of its own.

    A sample that was not improved enough goes back and tries a shorter step, while the others go on. Elements at
    the edge of the range that would leave it stay where they are. `loss` is that of the point last taken.
    """

    def __init__(self, start: Tensor, low: float, high: float, step: float) -> None:
        self.x, self.low, self.high, self._first = start.clone(), low, high, step
        self._shape = start.shape[1:]
        n, size = len(start), start[0].numel()
        # Steps, and below them the changes of the gradient that came of them, with the products of all with all.
        self._history = start.new_zeros(n, 2 * _MEMORY, size)
        self._products = start.new_zeros(n, 2 * _MEMORY, 2 * _MEMORY)
        self._filled = torch.zeros(n, _MEMORY, dtype=torch.bool, device=start.device)
        self._newest = torch.zeros(n, dtype=torch.long, device=start.device)
        self._base, self.loss = start.flatten(1).clone(), start.new_full((n,), torch.inf)
        self._gradient, self._direction = torch.zeros_like(self._base), torch.zeros_like(self._base)
        self._length, self._tries = torch.ones_like(self.loss), torch.zeros_like(self.loss)

    def failed(self) -> Tensor:
        return ~torch.isfinite(self.loss)  # a step into nowhere is taken back; only a start there is hopeless

    def step(self, losses: Tensor, gradient: Tensor) -> None:
        x, gradient = self.x.flatten(1), gradient.flatten(1)
        started = torch.isfinite(self.loss)
        moved = x - self._base
        enough = losses <= self.loss + _SUFFICIENT * _dot(self._gradient, moved)
        taken = (enough | ~started) & torch.isfinite(losses) & torch.isfinite(_dot(gradient, gradient))
        self._remember(taken & started, moved, gradient)
        at = taken[:, None]
        self._base, self._gradient = torch.where(at, x, self._base), torch.where(at, gradient, self._gradient)
        self.loss = torch.where(taken, losses, self.loss)
        self._tries = torch.where(taken, 0, self._tries + 1)
        # Start again from steepest descent; where that is what was tried, go on with shorter steps.
        lost = (self._tries >= _GIVE_UP) & self._filled.any(dim=1)
        self._filled[lost] = False
        self._tries[lost] = 0
        self._turn(taken | lost)
        self.x = (self._base + self._length[:, None] * self._direction).clamp_(self.low, self.high)
        self.x = self.x.reshape(-1, *self._shape)

    def keep(self, rows: Tensor) -> None:
        state = ("x", "_history", "_products", "_filled", "_newest", "_base", "loss", "_gradient", "_direction")
        for name in (*state, "_length", "_tries"):
            setattr(self, name, getattr(self, name)[rows])

    def _remember(self, which: Tensor, s: Tensor, gradient: Tensor) -> None:
        y = gradient - self._gradient
        curvature = _dot(s, y)
        which = torch.nonzero(which & (curvature > 1e-10 * _dot(y, y))).flatten()
        self._newest[which] = place = (self._newest[which] + 1) % _MEMORY
        new = torch.stack([s, y], dim=1)
        for row, at in enumerate((place, place + _MEMORY)):
            self._history[which, at] = new[which, row]
        products = self._history @ new.mT  # of all, as to pick some would copy their history
        for row, at in enumerate((place, place + _MEMORY)):
            self._products[which, at] = self._products[which, :, at] = products[which, :, row]
        self._filled[which, place] = True

    def _turn(self, which: Tensor) -> None:
        """Give these samples a new direction and a whole step, the others a shorter one."""
        outward = (self._base <= self.low) & (self._gradient > 0) | (self._base >= self.high) & (self._gradient < 0)
        free = torch.where(outward, 0, self._gradient)
        direction = -self._times_inverse_hessian(free)
        direction = torch.where(outward, 0, direction)
        slope = _dot(direction, free)
        plain = ~self._filled.any(dim=1) | (slope >= 0) | ~torch.isfinite(slope)
        squares = _dot(free, free).clamp(min=torch.finfo(free.dtype).tiny)
        # Where nothing is known of the curvature: Polyak's step, as the lowest loss is about zero. What the loss does
        # not depend on, as padding, does not count.
        size = (self._gradient != 0).sum(dim=1)
        length = torch.minimum(self.loss / squares, self._first * (size / squares).sqrt())
        direction = torch.where(plain[:, None], -free * length[:, None], direction)
        self._direction = torch.where(which[:, None], direction, self._direction)
        self._length = torch.where(which, 1, self._length * _SHORTER)

    def _times_inverse_hessian(self, vector: Tensor) -> Tensor:
        """Multiply by the approximate inverse Hessian: the compact form of Byrd, Nocedal and Schnabel (1994), eq. 3.1.

        It reads the history twice, where the two loops read it four times.
        """
        ages = torch.arange(_MEMORY, device=vector.device)
        places = (self._newest[:, None] + 1 + ages) % _MEMORY  # the oldest first
        filled = self._filled.gather(1, places)
        order = torch.cat([places, places + _MEMORY], dim=1)
        # In double precision, as the products of old and new steps are of very different size.
        products = self._products.gather(1, order[:, :, None].expand_as(self._products))
        products = doubled(products.gather(2, order[:, None].expand_as(products)))
        along = doubled((self._history @ vector[..., None])[..., 0].gather(1, order))
        there = torch.cat([filled, filled], dim=1)
        products, along = products * (there[:, :, None] & there[:, None]), along * there
        steps, changes = along[:, :_MEMORY, None], along[:, _MEMORY:, None]  # S'g and Y'g
        curved, squares = products[:, :_MEMORY, _MEMORY:], products[:, _MEMORY:, _MEMORY:]  # S'Y and Y'Y
        diagonal = curved.diagonal(dim1=1, dim2=2)
        upper = curved.triu() + torch.diag_embed(doubled(~filled))  # an empty place takes no part
        last = torch.where(filled[:, -1], diagonal[:, -1] / squares[:, -1, -1], 1.0)
        scale = last.nan_to_num(nan=1.0, posinf=1.0)[:, None, None]
        alpha = torch.linalg.solve_triangular(upper, steps, upper=True)
        inner = diagonal[..., None] * alpha + scale * (squares @ alpha - changes)
        beta = torch.linalg.solve_triangular(upper.mT, inner, upper=False)
        weights = torch.cat([beta, -scale * alpha], dim=1)[..., 0].to(vector.dtype)
        back = torch.zeros_like(weights).scatter_(1, order, weights)
        return (back[:, None] @ self._history)[:, 0] + scale[:, :, 0].to(vector.dtype) * vector


def _dot(a: Tensor, b: Tensor) -> Tensor:
    products: Tensor = torch.linalg.vecdot(a, b)
    return products


def _like(flags: Tensor, x: Tensor) -> Tensor:
    """Give flags of shape (n,) as many dimensions as x has."""
    return flags.reshape(-1, *[1] * (x.ndim - 1))
