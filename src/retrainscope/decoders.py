"""Decoders: from a layer's activation back to the input, built from the two shapes."""

from collections.abc import Callable
from math import ceil

import torch
from torch import Tensor, nn

__all__ = ["Standardise", "build_decoder", "is_per_token"]

_LEAST_CHANNELS, _MOST_CHANNELS = 16, 48  # of hidden maps, at the input's width and when much narrower
_HIDDEN = 256  # units of the hidden vectors

_CONV: dict[int, Callable[..., nn.Module]] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
_UP: dict[int, Callable[..., nn.Module]] = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}


def build_decoder(activation_shape: tuple[int, ...], input_shape: tuple[int, ...]) -> nn.Module:
    """Build a decoder from an activation to the input that does about the same work at every layer.

    Maps are widened by transposed convolutions; vectors go through a linear
    layer to a map a quarter as wide as the input; token sequences of the input's length are decoded token by
    token; a vector input is rebuilt by two linear layers.

    Parameters
    ----------
    activation_shape : tuple of int
        Of one sample: (channels, ...) for a map, (n,) for a vector, (tokens, n) for a sequence.
    input_shape : tuple of int
        Of one sample.

    Returns
    -------
    nn.Module
        From (n_samples, *activation_shape) to (n_samples, *input_shape).
    """
    if is_per_token(activation_shape, input_shape):
        return _dense(activation_shape[-1], input_shape[-1])
    if len(input_shape) not in (2, 3, 4):
        n_inputs = _product(input_shape)
        return nn.Sequential(nn.Flatten(), _dense(_product(activation_shape), n_inputs), nn.Unflatten(1, input_shape))
    if len(activation_shape) == len(input_shape):
        return _upconvolutions(activation_shape, input_shape)
    seed_map = (_width(2), *(ceil(side / 4) for side in input_shape[1:]))
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(_product(activation_shape), _product(seed_map)),
        nn.ReLU(),
        nn.Unflatten(1, seed_map),
        _upconvolutions(seed_map, input_shape),
    )


def is_per_token(activation_shape: tuple[int, ...], input_shape: tuple[int, ...]) -> bool:
    """Tell whether a sequence is decoded token by token, so that its length does not matter."""
    return len(input_shape) == 2 and len(activation_shape) == 2 and activation_shape[0] == input_shape[0]


class Standardise(nn.Module):
    """Bring values to mean 0 and variance 1, as measured before, channel by channel or all alike.

    So a decoder sees the same whatever the scale of the layer, which a function-preserving rescaling of
    the weights can change at will.

    Parameters
    ----------
    shape : tuple of int
        Of one sample. Channels are its first axis, and the last one of a sequence (two axes).
    by_channel : bool
        False measures one mean and one variance over everything.
    """

    def __init__(self, shape: tuple[int, ...], *, by_channel: bool = True) -> None:
        super().__init__()
        self._shape = [1] * (1 + len(shape))
        axis = 2 if len(shape) == 2 else 1
        if by_channel and shape:
            self._shape[axis] = shape[axis - 1]
        self._over = [a for a, n in enumerate(self._shape) if n == 1]
        self._count, self._total, self._squares = 0, torch.zeros(()).double(), torch.zeros(()).double()
        self.mean: Tensor
        self.std: Tensor
        self.register_buffer("mean", torch.zeros(self._shape))
        self.register_buffer("std", torch.ones(self._shape))

    def update(self, values: Tensor) -> None:
        """Take a batch of shape (n_samples, ...) into the statistics."""
        wide = values.detach().cpu().double()
        self._count += wide.numel() // self.mean.numel()
        self._total = self._total + wide.sum(dim=self._over, keepdim=True)
        self._squares = self._squares + wide.square().sum(dim=self._over, keepdim=True)

    def finish(self) -> None:
        """Set mean and standard deviation from what was taken in."""
        mean = self._total / self._count
        variance = (self._squares / self._count - mean.square()).clamp_min(0)
        # A channel that hardly varies must not be blown up to noise; the floor follows the layer's scale.
        floor = 1e-4 * variance.mean()
        self.mean.copy_(mean)
        self.std.copy_((variance + floor).sqrt().clamp_min(torch.finfo(torch.float32).tiny))

    def forward(self, values: Tensor) -> Tensor:
        """Standardise values of shape (n_samples, ...)."""
        return (values.float() - self.mean) / self.std

    def undo(self, values: Tensor) -> Tensor:
        """Give standardised values their mean and scale again."""
        return values * self.std + self.mean


def _upconvolutions(start: tuple[int, ...], goal: tuple[int, ...]) -> nn.Sequential:
    """Widen a map to the goal's sides, doubling them with each transposed convolution."""
    n_axes = len(goal) - 1
    levels = [tuple(goal[1:])]  # the goal's sides, halved again and again, down to the first that hold the start
    while max(levels[-1]) > 1 and all(ceil(g / 2) >= s for g, s in zip(levels[-1], start[1:], strict=True)):
        levels.append(tuple(ceil(side / 2) for side in levels[-1]))
    width = _width(len(levels) - 1)
    steps: list[nn.Module] = [
        nn.Upsample(size=levels[-1]) if levels[-1] != tuple(start[1:]) else nn.Identity(),
        _CONV[n_axes](start[0], width, kernel_size=3, padding=1),
        nn.ReLU(),
        _CONV[n_axes](width, width, kernel_size=3, padding=1),
        nn.ReLU(),
    ]
    for level in range(len(levels) - 1, 0, -1):
        # Kernel 4 doubles a side; kernel 3 doubles it less one, for odd sides.
        kernel = tuple(4 if side % 2 == 0 else 3 for side in levels[level - 1])
        n_out = _width(level - 1) if level > 1 else goal[0]
        steps += [_UP[n_axes](width, n_out, kernel_size=kernel, stride=2, padding=1), nn.ReLU()]
        width = n_out
    if len(levels) == 1:
        steps += [_CONV[n_axes](width, goal[0], kernel_size=3, padding=1), nn.ReLU()]
    return nn.Sequential(*steps[:-1])


def _width(level: int) -> int:
    """Channels of a hidden map that is halved so often against the goal."""
    return int(min(_MOST_CHANNELS, _LEAST_CHANNELS * 2**level))


def _dense(n_in: int, n_out: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(n_in, _HIDDEN), nn.ReLU(), nn.Linear(_HIDDEN, n_out))


def _product(shape: tuple[int, ...]) -> int:
    size = 1
    for side in shape:
        size *= side
    return size
