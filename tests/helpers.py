"""What the tests share: networks known by hand, and the state of a model before and after."""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

HOOK_TABLES = (
    "_forward_hooks",
    "_forward_pre_hooks",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_pre_hooks_with_kwargs",
    "_forward_hooks_always_called",
)

# Earlier ones do not run on the processor, or cannot end a pass half-way.
needs_pieces = pytest.mark.skipif(
    torch.torch_version.TorchVersion(torch.__version__) < "2.13", reason="models in pieces need torch 2.13 or newer"
)


@dataclass(frozen=True)
class TensorState:
    """A tensor: the object itself, and what it held."""

    tensor: Tensor | None
    content: bytes | None

    @classmethod
    def of(cls, tensor: Tensor | None) -> "TensorState":
        return cls(tensor, None if tensor is None else content_of(tensor))


@dataclass(frozen=True)
class ModelState:
    """All that a borrower of a model must give back, and the global random states."""

    parameters: dict[str, TensorState]
    requires_grad: dict[str, bool]
    gradients: dict[str, TensorState]
    buffers: dict[str, TensorState]
    training: dict[str, bool]
    hooks: dict[str, dict[str, int]]
    random_states: dict[str, Any]


def content_of(tensor: Tensor) -> bytes:
    """Return the bytes of a tensor, so that NaN equals NaN and -0 differs from 0."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def random_states() -> dict[str, Any]:
    """Return the states of the global random generators, comparable with ``==``."""
    kind, keys, *rest = np.random.get_state()  # noqa: NPY002 -- the global state is what is looked at
    return {
        "python": random.getstate(),
        "numpy": (kind, keys.tobytes(), *rest),
        "torch": content_of(torch.get_rng_state()),
    }


def model_state(model: nn.Module) -> ModelState:
    """Take a snapshot of a model and of the global random states."""
    modules = dict(model.named_modules())
    parameters = dict(model.named_parameters())
    buffers = {
        f"{prefix}.{name}".removeprefix("."): buffer
        for prefix, module in modules.items()
        for name, buffer in module._buffers.items()
    }
    return ModelState(
        parameters={name: TensorState.of(parameter) for name, parameter in parameters.items()},
        requires_grad={name: parameter.requires_grad for name, parameter in parameters.items()},
        gradients={name: TensorState.of(parameter.grad) for name, parameter in parameters.items()},
        buffers={name: TensorState.of(buffer) for name, buffer in buffers.items()},
        training={name: module.training for name, module in modules.items()},
        hooks={name: {table: len(getattr(module, table)) for table in HOOK_TABLES} for name, module in modules.items()},
        random_states=random_states(),
    )


def assert_same_state(before: ModelState, after: ModelState) -> None:
    """Fail, naming what differs, unless two snapshots are equal bit for bit and of the same tensors."""
    for part in ("parameters", "gradients", "buffers"):
        old, new = getattr(before, part), getattr(after, part)
        assert list(old) == list(new), f"{part}: {list(old)} became {list(new)}"
        for name in old:
            assert old[name].tensor is new[name].tensor, f"{part}: {name} is another tensor"
            assert old[name].content == new[name].content, f"{part}: the content of {name} has changed"
    for part in ("requires_grad", "training", "hooks"):
        assert getattr(before, part) == getattr(after, part), f"{part} has changed"
    for name, state in before.random_states.items():
        assert after.random_states[name] == state, f"the random state of {name} has changed"


@contextmanager
def unchanged(model: nn.Module) -> Iterator[None]:
    """Fail if the block leaves the model or the global random states other than it found them."""
    before = model_state(model)
    try:
        yield
    finally:
        assert_same_state(before, model_state(model))


def hook_count(model: nn.Module) -> int:
    """Return the number of hooks of a model and of all of its modules."""
    return sum(len(getattr(module, table)) for module in model.modules() for table in HOOK_TABLES)


def small_mlp(*, inplace: bool = False) -> nn.Sequential:
    """Return a network of two layers ("0", "2") and a head ("4") for inputs of shape (n, 3)."""
    return nn.Sequential(
        nn.Linear(3, 8), nn.ReLU(inplace=inplace), nn.Linear(8, 6), nn.ReLU(inplace=inplace), nn.Linear(6, 2)
    )


def halving_network() -> nn.Sequential:
    """Return layers whose output is known by hand: "0" gives x - 1, "1" cuts in place at 0, "2" halves."""
    first, last = nn.Linear(2, 2), nn.Linear(2, 2)
    with torch.no_grad():
        first.weight.copy_(torch.eye(2))
        first.bias.fill_(-1.0)
        last.weight.copy_(torch.eye(2) / 2)
        last.bias.zero_()
    return nn.Sequential(first, nn.ReLU(inplace=True), last)


class Counted(nn.Module):
    """Passes its input on and counts its calls."""

    def __init__(self) -> None:
        super().__init__()
        self._kept: tuple[list[int]] = ([],)  # what a module holds itself is given back

    @property
    def calls(self) -> int:
        """How often it was called."""
        return len(self._kept[0])

    def forward(self, x: Tensor) -> Tensor:
        self._kept[0].append(len(x))
        return x


class Apply(nn.Module):
    """A module from a function."""

    def __init__(self, function: Any) -> None:
        super().__init__()
        self.function = function

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(*args, **kwargs)


class Read(Dataset[Any]):
    """Samples that count how often each of them is read."""

    def __init__(self, X: Tensor, y: Any) -> None:
        self.X, self.y, self.times = X, y, torch.zeros(len(y), dtype=torch.long)

    def __len__(self) -> int:
        return len(self.y)

    def __getitem__(self, row: int) -> tuple[Tensor, int]:
        self.times[row] += 1
        return self.X[row], int(self.y[row])
