"""Descent: optimizers that treat each sample by itself, and when they stop."""

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from torch import Tensor

from retrainscope.descent import Descent, NoGradientError, Path, descend
from retrainscope.exceptions import InvalidDataError

BOTH = pytest.mark.parametrize("optimizer", ["adam", "lbfgs"])


@dataclass
class Formula:
    """The loss by a formula of (x, parameters of its samples), as `descend` wants it; it keeps what it saw."""

    formula: Callable[..., Tensor]
    parameters: tuple[Tensor, ...] = ()
    seen: list[Tensor] = field(default_factory=list)

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor]:
        self.seen.append(x.clone())
        x = x.detach().requires_grad_(True)
        losses = self.formula(x, *self.parameters)
        (gradient,) = torch.autograd.grad(losses.sum(), x)
        return losses.detach(), gradient

    def only(self, x: Tensor) -> Tensor:
        return self.formula(x, *self.parameters)

    def keep(self, rows: Tensor) -> None:
        self.parameters = tuple(parameter[rows] for parameter in self.parameters)

    def stuck(self) -> None:
        raise NoGradientError("stuck")


def squared(x: Tensor, center: Tensor, scale: Tensor | float = 1.0) -> Tensor:
    """Return the squared distance to the center, the axes scaled."""
    return (scale * (x - center).square()).flatten(1).sum(dim=1)


def quadratic(x: Tensor, matrix: Tensor, vector: Tensor) -> Tensor:
    """Return ||A x - b||^2 with an A and a b for each sample."""
    return (torch.einsum("nij,nj->ni", matrix, x) - vector).square().sum(dim=1)


def search(
    formula: Callable[..., Tensor],
    start: Tensor,
    *parameters: Tensor,
    low: float = -100.0,
    high: float = 100.0,
    step: float = 0.1,
    **options: object,
) -> Path:
    """Descend from a start, with Adam unless told otherwise."""
    options = {"optimizer": "adam", **options}
    return descend(Formula(formula, parameters), start, low=low, high=high, step=step, descent=Descent(**options))


# ---- L-BFGS


def test_lbfgs_finds_the_minimum_that_scipy_finds():
    """On convex quadratics in a box each sample ends where scipy's L-BFGS-B ends."""
    generator = np.random.default_rng(0)
    matrices, vectors = generator.normal(size=(6, 8, 5)), 2 * generator.normal(size=(6, 8))
    starts = generator.uniform(-0.5, 0.5, size=(6, 5))
    tensors = (torch.from_numpy(array) for array in (starts, matrices, vectors))
    path = search(quadratic, *tensors, low=-0.5, high=0.5, optimizer="lbfgs", max_iter=300)
    at_the_edge = 0
    for place, (matrix, vector, start) in enumerate(zip(matrices, vectors, starts, strict=True)):
        expected = minimize(
            lambda x, A=matrix, b=vector: (((A @ x - b) ** 2).sum(), 2 * A.T @ (A @ x - b)),
            start, jac=True, method="L-BFGS-B", bounds=[(-0.5, 0.5)] * 5, options={"ftol": 1e-15, "gtol": 1e-10},
        )  # fmt: skip
        np.testing.assert_allclose(path.loss[place], expected.fun, rtol=1e-6)
        np.testing.assert_allclose(path.inputs[place], expected.x, atol=1e-4)
        at_the_edge += int((np.abs(expected.x) == 0.5).sum())
    assert at_the_edge >= 5  # or the box would not have been felt
    assert path.inputs.min() >= -0.5
    assert path.inputs.max() <= 0.5


def test_lbfgs_never_leaves_the_range():
    """No point that L-BFGS looks at lies outside the range, and one at the edge stays if it would leave."""
    loss = Formula(squared, (torch.tensor([[5.0, -5.0, 0.3]]),))
    start = torch.tensor([[2.0, -1.0, 0.0]])
    path = descend(loss, start, low=-1.0, high=2.0, step=0.1, descent=Descent("lbfgs", max_iter=20))
    seen = torch.cat(loss.seen)
    np.testing.assert_array_equal(seen[:, :2], [[2.0, -1.0]] * 20)
    np.testing.assert_allclose(path.inputs, [[2.0, -1.0, 0.3]], atol=1e-5)


def test_lbfgs_takes_back_a_step_into_nowhere():
    """Where the loss is NaN beyond a line, a step over it is made shorter, and the minimum near it is reached."""

    def walled(x: Tensor, center: Tensor) -> Tensor:
        return torch.where((x > 1.0).any(dim=1), torch.nan, 100 + squared(x, center))

    loss = Formula(walled, (torch.tensor([[0.9, -0.5], [0.0, 0.0]]),))
    path = descend(
        loss, torch.full((2, 2), -6.0), low=-10.0, high=10.0, step=50.0, descent=Descent("lbfgs", max_iter=60)
    )
    assert any((x > 1.0).any() for x in loss.seen)
    np.testing.assert_allclose(path.inputs, [[0.9, -0.5], [0.0, 0.0]], atol=1e-3)
    assert not path.diverged.any()
    assert torch.isfinite(path.losses).all()


def test_lbfgs_losses_never_rise():
    """The losses of L-BFGS are those of the points taken, so they never rise, though it tries worse ones."""

    def rosenbrock(x: Tensor) -> Tensor:
        return (1 - x[:, 0]).square() + 100 * (x[:, 1] - x[:, 0].square()).square()

    loss = Formula(rosenbrock)
    start = torch.tensor([[-1.2, 1.0], [0.0, 0.0]]).double()
    path = descend(loss, start, low=-5.0, high=5.0, step=1.0, descent=Descent("lbfgs", max_iter=150))
    tried = torch.stack([rosenbrock(x) for x in loss.seen], dim=1)
    assert (tried.diff(dim=1) > 0).any()
    assert (path.losses.diff(dim=1) <= 0).all()
    np.testing.assert_allclose(path.inputs, [[1.0, 1.0]] * 2, atol=1e-4)


def test_lbfgs_starts_again_where_no_step_helps():
    """Where the direction leads nowhere, the history is dropped, and a start at the minimum is not left."""
    path = search(squared, torch.tensor([[0.5, 0.5], [3.0, 1.0]]), torch.full((2, 2), 0.5), optimizer="lbfgs")
    np.testing.assert_array_equal(path.inputs[0], [0.5, 0.5])
    np.testing.assert_allclose(path.inputs[1], [0.5, 0.5], atol=1e-4)
    kinked = search(lambda x: x.abs().sum(dim=1), torch.tensor([[0.7, -0.31]]), optimizer="lbfgs", step=0.5)
    assert kinked.loss < 0.01


def test_lbfgs_is_better_than_adam_on_an_ill_conditioned_map():
    """On a linear map of condition 100, L-BFGS gets further than Adam in as many passes."""
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.linalg.qr(torch.randn(8, 8, generator=generator))[0] for _ in range(2))
    matrix = (left * torch.logspace(-2, 0, 8)) @ right
    true = torch.randn(5, 8, generator=generator)
    parameters = (matrix.expand(5, 8, 8), true @ matrix.T)
    adam, lbfgs = (
        search(quadratic, torch.zeros(5, 8), *parameters, optimizer=name, max_iter=100).loss
        for name in ("adam", "lbfgs")
    )
    assert (lbfgs < adam / 10).all()


# ---- Adam


def test_adam_is_that_of_torch():
    """Each sample takes the steps that torch.optim.Adam takes for it alone, cut to the range after each."""
    generator = torch.Generator().manual_seed(0)
    matrix, vector, start = (torch.randn(shape, generator=generator).double() for shape in ((3, 6, 4), (3, 6), (3, 4)))
    start.clamp_(-0.8, 0.8)
    loss = Formula(quadratic, (matrix, vector))
    descend(loss, start, low=-0.8, high=0.8, step=0.07, descent=Descent("adam", max_iter=25))
    for row in range(3):
        x = start[row].clone().requires_grad_(True)
        optimizer = torch.optim.Adam([x], lr=0.07)
        for seen in loss.seen:
            np.testing.assert_allclose(seen[row], x.detach(), rtol=1e-9, atol=1e-12)
            optimizer.zero_grad()
            (matrix[row] @ x - vector[row]).square().sum().backward()
            optimizer.step()
            with torch.no_grad():
                x.clamp_(-0.8, 0.8)
    assert (torch.cat(loss.seen).abs() == 0.8).any()


# ---- Both


@BOTH
def test_samples_do_not_touch_each_other(optimizer):
    """A sample takes the same way alone and beside others whose losses are a thousand times larger."""
    generator = torch.Generator().manual_seed(0)
    matrix, vector, start = (torch.randn(shape, generator=generator).double() for shape in ((4, 6, 5), (4, 6), (4, 5)))
    matrix[2] *= 1000
    together = search(quadratic, start, matrix, vector, optimizer=optimizer, max_iter=40)
    for row in range(4):
        only = slice(row, row + 1)
        alone = search(quadratic, start[only], matrix[only], vector[only], optimizer=optimizer, max_iter=40)
        np.testing.assert_allclose(together.inputs[only], alone.inputs, rtol=1e-6)
        np.testing.assert_allclose(together.losses[only], alone.losses, rtol=1e-6)
        np.testing.assert_allclose(together.loss[only], alone.loss, rtol=1e-6)


@BOTH
def test_the_shape_of_the_input_does_not_matter(optimizer):
    """Images are changed as the same numbers in a row are."""
    start, center = torch.randn(3, 2, 2, 3), torch.randn(3, 2, 2, 3)
    images = search(squared, start, center, optimizer=optimizer, max_iter=12)
    rows = search(squared, start.flatten(1), center.flatten(1), optimizer=optimizer, max_iter=12)
    assert images.inputs.shape == start.shape
    np.testing.assert_allclose(images.inputs.flatten(1), rows.inputs, rtol=1e-5, atol=1e-6)


@BOTH
@pytest.mark.parametrize("max_iter", [1, 7, 10, 25])
def test_what_is_told_of_the_way(optimizer, max_iter):
    """The start's loss comes first, the loss kept is of the inputs kept, and all is of the same type."""
    start, center = torch.randn(3, 4).double(), torch.randn(3, 4).double()
    path = search(squared, start, center, optimizer=optimizer, max_iter=max_iter)
    assert path.losses.shape == (3, max_iter)
    np.testing.assert_allclose(path.losses[:, 0], squared(start, center))
    np.testing.assert_allclose(path.loss, squared(path.inputs, center))
    assert (path.loss < path.losses[:, 0]).all()
    assert path.n_iter.tolist() == [max_iter] * 3
    assert path.diverged.tolist() == [False] * 3
    assert path.inputs.dtype == path.loss.dtype == path.losses.dtype == torch.float64


@BOTH
def test_the_start_is_left_as_it_is(optimizer):
    """The tensor of the start is not written to."""
    start = torch.ones(2, 3)
    search(squared, start, torch.zeros(2, 3), optimizer=optimizer, max_iter=11)
    assert torch.equal(start, torch.ones(2, 3))


@pytest.mark.parametrize("max_iter", [9, 10, 35])
def test_reports(max_iter):
    """Every ten steps it is told how many were taken, with the losses."""
    reports: list[tuple[int, Tensor]] = []
    loss = Formula(squared, (torch.zeros(2, 3),))
    descend(
        loss, torch.ones(2, 3), low=-5, high=5, step=0.1, descent=Descent("adam", max_iter=max_iter),
        report=lambda n_steps, losses: reports.append((n_steps, losses.clone())),
    )  # fmt: skip
    assert [n_steps for n_steps, _ in reports] == [10] * (max_iter // 10)
    for place, (_, losses) in enumerate(reports, start=1):
        np.testing.assert_allclose(losses, loss.seen[10 * place - 1].square().sum(dim=1))


def test_of_all_points_the_best_is_kept():
    """Where each step overshoots and the loss rises, the earlier input is kept."""
    start = torch.tensor([[0.1, 0.1], [8.0, 8.0]])
    path = search(squared, start, torch.zeros(2, 2), step=3.0, max_iter=3)
    assert path.losses[0, 1] > path.losses[0, 0]
    np.testing.assert_array_equal(path.inputs[0], start[0])
    np.testing.assert_allclose(path.loss[0], 0.02)
    assert (path.inputs[1] < 8).all()


def test_the_last_step_counts():
    """The point after the last step is looked at as well: one step of Adam has the length of the step."""
    path = search(squared, torch.ones(1, 2), torch.zeros(1, 2), step=0.25, max_iter=1)
    np.testing.assert_allclose(path.inputs, [[0.75, 0.75]], rtol=1e-6)
    np.testing.assert_allclose(path.loss, 2 * 0.75**2, rtol=1e-6)


# ---- Stopping


@BOTH
def test_samples_that_are_done_stop(optimizer):
    """A sample that falls no more stops at a look every ten steps; the others go on as without it."""
    start = torch.tensor([[1.0, 1.0], [8.0, 2.0], [0.0, 0.0]]).double()
    center = torch.tensor([[1.0, 1.0], [-6.0, 1.0], [50.0, -50.0]]).double()

    def quartic(x: Tensor, center: Tensor) -> Tensor:  # on which L-BFGS is slow
        return (x - center).pow(4).sum(dim=1)

    options = {"optimizer": optimizer, "max_iter": 60, "n_iter_no_change": 5, "tol": 1e-3, "step": 0.05}
    loss = Formula(quartic, (center,))
    path = descend(
        loss, start, low=-60.0, high=60.0, step=0.05, descent=Descent(optimizer, 60, n_iter_no_change=5, tol=1e-3)
    )
    assert path.n_iter[0] == 10
    assert (path.n_iter % 10 == 0).all()
    assert not path.diverged.any()
    np.testing.assert_array_equal(path.inputs[0], [1.0, 1.0])
    np.testing.assert_array_equal(path.losses[0], np.zeros(60))
    assert [len(x) for x in loss.seen[:11]] == [3] * 10 + [2]
    others = search(quartic, start[1:], center[1:], low=-60.0, high=60.0, **options)
    for name in ("inputs", "loss", "losses", "n_iter"):
        np.testing.assert_allclose(getattr(path, name)[1:], getattr(others, name), rtol=1e-9, atol=1e-12)


def test_the_losses_of_a_sample_that_is_done_are_carried_forward():
    """After its last step the row of a sample holds its last loss, and before it what it is without the rule."""
    start, center = torch.tensor([[0.2, 0.1], [9.0, 9.0]]), torch.zeros(2, 2)
    plain = search(squared, start, center, max_iter=50)
    path = search(squared, start, center, max_iter=50, n_iter_no_change=3, tol=0.05)
    n = int(path.n_iter[0])
    assert n < 50
    np.testing.assert_array_equal(path.losses[0, :n], plain.losses[0, :n])
    np.testing.assert_array_equal(path.losses[0, n:], [float(plain.losses[0, n - 1])] * (50 - n))
    np.testing.assert_array_equal(path.losses[1, : path.n_iter[1]], plain.losses[1, : path.n_iter[1]])
    assert path.loss[0] == plain.losses[0, :n].min()


@BOTH
def test_all_samples_done_end_the_search(optimizer):
    """When nobody is left, nothing more is evaluated."""
    loss = Formula(squared, (torch.zeros(2, 3),))
    descent = Descent(optimizer, max_iter=10**4, n_iter_no_change=2)
    path = descend(loss, torch.full((2, 3), 1e-30), low=-1, high=1, step=1e-12, descent=descent)
    assert len(loss.seen) == 10
    assert path.n_iter.tolist() == [10, 10]
    assert path.losses.shape == (2, 10**4)


@pytest.mark.parametrize("max_iter", [10, 20])
def test_done_at_the_very_last_look(max_iter):
    """Samples that are done when the steps are spent are told like the others."""
    start, center = torch.tensor([[1.0, 1.0], [50.0, 2.0]]), torch.ones(2, 2)
    path = search(squared, start, center, max_iter=max_iter, n_iter_no_change=max_iter - 1, tol=1e-3)
    assert path.n_iter.tolist() == [max_iter] * 2
    np.testing.assert_array_equal(path.losses[0], np.zeros(max_iter))
    np.testing.assert_allclose(path.loss[1], squared(path.inputs, center)[1])


@pytest.mark.parametrize(("tol", "n_iter"), [(0.1, 100), (0.2, 10)])
def test_a_fall_by_less_than_tol_is_none(tol, n_iter):
    """A loss that falls by five per cent a step falls by a tenth within three steps, and by a fifth not."""
    loss = Formula(lambda x: 0.95 ** len(loss.seen) + (x - x.detach()).sum(dim=1))
    descent = Descent("adam", max_iter=100, n_iter_no_change=3, tol=tol)
    assert descend(loss, torch.zeros(1, 1), low=-9, high=9, step=0.1, descent=descent).n_iter.tolist() == [n_iter]


# ---- Losses that are not finite


def cursed(x: Tensor, center: Tensor, edge: Tensor) -> Tensor:
    """Return the squared distance to the center, and NaN for a sample that has an element above its edge."""
    return torch.where((x > edge).any(dim=1), torch.nan, 1.0) * squared(x, center)


@pytest.mark.parametrize("max_iter", [10, 15, 40])
def test_a_sample_that_diverges_is_stopped_and_told(max_iter):
    """Adam's sample whose loss becomes NaN keeps its best point, and the others do not notice."""
    start = torch.tensor([[0.0, 0.0], [3.0, -2.0], [4.0, 0.0]]).double()
    center, edge = torch.full((3, 2), 5.0).double(), torch.tensor([[0.45], [99.0], [99.0]]).double()
    path = search(cursed, start, center, edge, max_iter=max_iter)
    assert path.diverged.tolist() == [True, False, False]
    np.testing.assert_allclose(path.inputs[0], [0.4, 0.4], rtol=5e-3)
    np.testing.assert_allclose(path.loss[0], squared(path.inputs, center)[0])
    assert torch.isfinite(path.losses[0, :5]).all()
    assert torch.isnan(path.losses[0, 5:]).all()
    assert path.n_iter.tolist() == [10 if max_iter > 15 else int(path.n_iter[0]), max_iter, max_iter]
    others = search(squared, start[1:], center[1:], max_iter=max_iter)
    np.testing.assert_allclose(path.inputs[1:], others.inputs, rtol=1e-9)
    np.testing.assert_allclose(path.losses[1:], others.losses, rtol=1e-9)


@BOTH
def test_a_start_without_a_loss_is_kept_and_told(optimizer):
    """A sample whose start has no finite loss stays there, with an infinite loss."""
    start = torch.tensor([[1.0, 1.0], [1.0, 2.0]])
    edge = torch.tensor([[0.5], [99.0]])
    path = search(cursed, start, torch.zeros(2, 2), edge, optimizer=optimizer, max_iter=30)
    assert path.diverged.tolist() == [True, False]
    assert path.loss[0] == torch.inf
    np.testing.assert_array_equal(path.inputs[0], start[0])
    assert path.n_iter.tolist() == [10, 30]
    assert path.loss[1] < 0.1


# ---- No gradient


@pytest.mark.parametrize("first", [0.0, 3.0])
def test_a_gradient_of_zero(first):
    """The loss is told of a first gradient that is zero for every sample, also if one is right by chance."""
    start = torch.tensor([[first], [0.0]])
    with pytest.raises(NoGradientError, match="stuck"):
        search(lambda x: (x.round() - 3).square().sum(dim=1), start)


@BOTH
def test_a_gradient_of_zero_where_there_is_nothing_to_do(optimizer):
    """Samples that start at the minimum have no gradient, and stay."""
    path = search(squared, torch.ones(2, 3), torch.ones(2, 3), optimizer=optimizer, max_iter=12)
    np.testing.assert_array_equal(path.inputs, torch.ones(2, 3))
    np.testing.assert_array_equal(path.loss, [0.0, 0.0])


@BOTH
def test_a_gradient_of_zero_for_one_sample(optimizer):
    """A sample whose first gradient is zero does not keep the others from theirs."""
    start = torch.tensor([[-1.0], [1.0]])
    path = search(lambda x: (torch.relu(x) - 2).square().sum(dim=1), start, optimizer=optimizer, max_iter=60)
    assert path.inputs[0] == -1
    np.testing.assert_allclose(path.inputs[1], [2.0], atol=0.05)


# ---- Parameters


@pytest.mark.parametrize("name", ["max_iter", "n_init", "n_iter_no_change"])
@pytest.mark.parametrize("value", [0, -1, 2.5, True, "many"])
def test_counts_must_be_positive_integers(name, value):
    """Steps, starts and patience are counted."""
    with pytest.raises(InvalidDataError, match=rf"The '{name}' parameter must be a positive integer\. Got {value!r}"):
        Descent(**{name: value})


@pytest.mark.parametrize("value", [0, -1.0, float("nan"), float("inf"), None])
def test_the_step_must_be_positive(value):
    """The step is a positive number."""
    message = rf"The 'learning_rate' parameter must be a positive number\. Got {value!r}"
    with pytest.raises(InvalidDataError, match=message):
        Descent(learning_rate=value)


@pytest.mark.parametrize("name", ["tv_exponent", "norm_exponent"])
@pytest.mark.parametrize("value", [0, 0.9, -1.0, float("nan"), float("inf"), None])
def test_exponents_must_be_at_least_1(name, value):
    """Below 1 the slope of a prior is infinite where it is zero."""
    assert getattr(Descent(**{name: 1}), name) == 1
    message = rf"The '{name}' parameter must be a positive number, at least 1\. Got {value!r}"
    with pytest.raises(InvalidDataError, match=message):
        Descent(**{name: value})


@pytest.mark.parametrize("value", [1, 1.5, -1e-9, float("nan"), "none"])
def test_the_tolerance_is_a_fraction(value):
    """The loss cannot fall by more than all of it."""
    assert Descent(tol=0).tol == 0
    with pytest.raises(InvalidDataError, match=r"'tol' parameter must be zero or a positive number below 1\. Got"):
        Descent(tol=value)


@pytest.mark.parametrize("name", ["tv_weight", "norm_weight"])
@pytest.mark.parametrize("value", [-1e-9, float("nan"), "none"])
def test_weights_must_not_be_negative(name, value):
    """Weights may be zero, not less."""
    assert getattr(Descent(**{name: 0}), name) == 0
    message = rf"The '{name}' parameter must be zero or a positive number\. Got {value!r}"
    with pytest.raises(InvalidDataError, match=message):
        Descent(**{name: value})


@pytest.mark.parametrize("value", [-1, 1.5])
def test_jitter_must_be_whole(value):
    """Jitter is counted in pixels."""
    with pytest.raises(InvalidDataError, match=rf"'jitter' parameter must be zero or a positive integer\. Got {value}"):
        Descent(jitter=value)


def test_jitter_is_for_adam():
    """L-BFGS cannot use losses that change from step to step."""
    with pytest.raises(InvalidDataError, match=r"jitter makes every step's loss another one.*Choose Adam\."):
        Descent(optimizer="lbfgs", jitter=1)


def test_words():
    """An optimizer or a type that is not known is refused with those that are."""
    with pytest.raises(InvalidDataError, match=r"The 'optimizer' parameter must be 'adam' or 'lbfgs'\. Got 'sgd'"):
        Descent(optimizer="sgd")
    with pytest.raises(InvalidDataError, match=r"The 'autocast' parameter must be 'bfloat16'\. Got 'float16' instead"):
        Descent(autocast="float16")


def test_whether_there_are_priors():
    """Exponents alone are no prior; a weight is one."""
    assert not Descent(tv_exponent=1.0, norm_exponent=2.0).has_priors
    assert Descent(tv_weight=1e-3).has_priors
    assert Descent(norm_weight=1e-3).has_priors


def test_lbfgs_goes_on_with_shorter_steps():
    """Where steepest descent finds nothing within a dozen trials, the thirteenth is shorter still, not the first."""
    loss = Formula(lambda x: torch.where(x > 1e-6, 10 + x, 1 - x).sum(dim=1), ())
    descend(loss, torch.zeros(1, 1), low=-1.0, high=1.0, step=1.0, descent=Descent("lbfgs", max_iter=40))
    assert len({float(x) for x in loss.seen}) > 16
    path = search(lambda x: torch.where(x > 1e-6, 10 + x, 1 - x).sum(dim=1), torch.zeros(1, 1), optimizer="lbfgs")
    assert path.loss < 1


def test_lbfgs_does_not_take_a_point_without_a_gradient():
    """A point with a finite loss and a gradient that is not is taken back like one with no finite loss."""

    class Broken(Formula):
        def __call__(self, x: Tensor) -> tuple[Tensor, Tensor]:
            losses, gradient = super().__call__(x)
            return losses, torch.where(x > 2, torch.nan, gradient)

    loss = Broken(squared, (torch.full((1, 1), 1.9),))
    path = descend(loss, torch.zeros(1, 1), low=-9.0, high=9.0, step=5.0, descent=Descent("lbfgs", max_iter=40))
    np.testing.assert_allclose(path.inputs, [[1.9]], atol=1e-3)
