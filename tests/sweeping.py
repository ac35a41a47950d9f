"""Sweeps that are quick, models that tell what is done to them, and optimizers that tell what they were made for."""

import copy
import functools
import random
from dataclasses import fields

import numpy as np
import torch
from helpers import content_of
from networks import classifier, samples
from torch import Tensor, nn

import retrainscope as rs

QUICK = {"steps": 4, "n_seeds": 1, "learning_rates": (1e-2,), "random_state": 0, "progress": False}
TOO_SMALL, TOO_LARGE = 1e-30, 1e30  # learning rates: no weight changes; the product of two layers is not finite


def swept(model: nn.Module | None = None, known: object = None, unknown: object = None, **options: object):
    """Sweep quickly; by default over three novel classes."""
    return rs.sweep_layers(
        classifier() if model is None else model,
        samples() if known is None else known,
        samples(classes=("a", "b", "c"), seed=1) if unknown is None else unknown,
        **(QUICK | options),
    )


def assert_same(first: rs.LayerSweep, second: rs.LayerSweep, *, ignoring: tuple[str, ...] = ("seconds",)) -> None:
    """Fail unless all but the time taken is equal bit for bit."""
    for field in fields(rs.LayerSweep):
        if field.name not in ignoring:
            one, other = getattr(first, field.name), getattr(second, field.name)
            if isinstance(one, np.ndarray | float):
                np.testing.assert_array_equal(one, other, err_msg=field.name)
            else:
                assert one == other, field.name


class Made:
    """An optimizer that was made: for what, and what became of it."""

    def __init__(self, parameters: list[nn.Parameter], rate: float) -> None:
        self.parameters, self.rate = parameters, rate
        self.before = [content_of(parameter) for parameter in parameters]
        self.rates: list[float] = []

    @property
    def after(self) -> list[bytes]:
        """What the parameters are now."""
        return [content_of(parameter) for parameter in self.parameters]


class Recorder:
    """Makes optimizers, and keeps what each was made for; at one of them it raises an error."""

    def __init__(self, kind: object = torch.optim.Adam, *, at: int = 0, error: BaseException | None = None) -> None:
        self.kind, self.at, self.error = kind, at, error
        self.made: list[Made] = []

    def __call__(self, parameters: list[nn.Parameter], rate: float) -> torch.optim.Optimizer:
        if self.error is not None and len(self.made) + 1 == self.at:
            raise self.error
        made, optimizer = Made(parameters, rate), self.kind(parameters, rate)
        self.made.append(made)
        optimizer.register_step_post_hook(lambda opt, *_: made.rates.append(opt.param_groups[0]["lr"]))
        return optimizer


class Watch(nn.Module):
    """Notes which samples come by, by the number in their last column, and in which mode; and hides that column."""

    def __init__(self, seen: list[tuple[bool, list[int]]]) -> None:
        super().__init__()
        self.kept = (seen,)  # what a module holds itself is given back

    def __deepcopy__(self, memo: dict[int, object]) -> "Watch":
        return Watch(*self.kept).train(self.training)

    def forward(self, x: Tensor) -> Tensor:
        self.kept[0].append((self.training, x[:, 3].int().tolist()))
        return x * torch.tensor([1.0, 1.0, 1.0, 0.0])


class Kept(nn.Sequential):
    """A sequence that keeps each copy that is made of it."""

    copies: tuple[list[nn.Module]]  # what a module holds itself is given back

    def __deepcopy__(self, memo: dict[int, object]) -> "Kept":
        twin = memo[id(self)] = self.__new__(type(self))
        twin.__dict__.update(
            {name: value if name == "copies" else copy.deepcopy(value, memo) for name, value in self.__dict__.items()}
        )
        self.copies[0].append(twin)
        return twin


class Noisy(nn.Module):
    """In training, adds noise of every kind of generator."""

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            x = x + random.random() + np.random.rand() + torch.rand(1)  # noqa: NPY002 -- as the user's code may
        return x


def numbered(n: int = 60, *, classes: tuple[object, ...] = ("a", "b", "c"), seed: int = 1, first: int = 0):
    """Return samples whose last column is their number."""
    X, labels = samples(n, classes=classes, seed=seed)
    X[:, 3] = torch.arange(first, first + n)
    return X, labels


def watched(seen: list[tuple[bool, list[int]]]) -> nn.Sequential:
    """Return a classifier, with layers "1" and "3", that tells what samples it sees."""
    return nn.Sequential(Watch(seen), *classifier())


def normed() -> list[nn.Module]:
    """Return layers "0" and "4", each with batch normalisation and dropout after it, and the head "8"."""
    torch.manual_seed(0)
    return [
        *(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(inplace=True), nn.Dropout(0.2)),
        *(nn.Linear(8, 6), nn.BatchNorm1d(6, affine=False), nn.ReLU(), nn.Dropout(0.2)),
        nn.Linear(6, 3),
    ]


def worn() -> nn.Sequential:
    """Return a model whose state is easily lost: mixed modes, batch statistics, gradients, frozen parts."""
    model = nn.Sequential(*normed())
    model[3].eval()
    model[0].weight.grad = torch.ones(8, 4)
    model[4].requires_grad_(False)
    return model


def apart(*, seed: int = 0, labels: tuple[object, ...] = (0, 1, 2)) -> tuple[Tensor, list[object]]:
    """Return three classes that do not overlap."""
    X, places = samples(classes=(0, 1, 2), seed=seed)
    X[:, 0] += 6 * torch.tensor(places)
    return X, [labels[place] for place in places]


@functools.cache
def trained() -> nn.Module:
    """Return a classifier that tells the three classes apart."""
    model, (X, labels) = classifier(), apart()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    for _ in range(150):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(X), torch.tensor(labels)).backward()
        optimizer.step()
    for parameter in model.parameters():
        parameter.grad = None
    assert accuracy(model, (X, labels)) == 1
    return model


@torch.no_grad()
def accuracy(model: nn.Module, data: tuple[Tensor, list[object]]) -> float:
    """Return the share of samples whose label is the place of the highest output."""
    X, labels = data
    return float((model(X).argmax(dim=1) == torch.tensor(labels)).float().mean())


def runs_of(seen: list[tuple[bool, list[int]]]) -> list[tuple[list[list[int]], list[list[int]]]]:
    """Return for each run of training its batches, and the batches that were looked at after it."""
    runs: list[tuple[list[list[int]], list[list[int]]]] = []
    for training, ids in seen:
        if training and (not runs or runs[-1][1]):
            runs.append(([], []))
        if runs:
            runs[-1][0 if training else 1].append(ids)
    return runs


def parts_of(
    seen: list[tuple[bool, list[int]]], run: int = 0, *, sizes: tuple[int, int] = (9, 18)
) -> tuple[set[int], set[int], set[int]]:
    """Return the samples trained on, validated on and tested on, the latter as many as that; for one learning rate."""
    batches, after = runs_of(seen)[run]
    held_out = [sample for ids in after for sample in ids][: sum(sizes)]
    return {sample for ids in batches for sample in ids}, {*held_out[: sizes[0]]}, {*held_out[sizes[0] :]}


def noisy() -> nn.Sequential:
    """Return a network with batch statistics, dropout, and noise from all generators."""
    return nn.Sequential(*normed()[:4], Noisy(), *normed()[4:])
