"""In which precision the network computes, and that all else computes in full: the caller's `torch.autocast`."""

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from contextvars import ContextVar
from types import MappingProxyType

import torch
from torch import Tensor

__all__ = ["asked_precision", "doubled", "full_precision", "network_precision", "outside_network", "wide"]

_KINDS = ("cpu", "cuda", "mps", "xpu")

# What the caller's own contexts ask for, by the kind of device; filled where all but the network leaves them.
_ASKED: ContextVar[Mapping[str, torch.dtype]] = ContextVar("asked precision", default=MappingProxyType({}))


@contextmanager
def full_precision(*, network: bool = False) -> Iterator[None]:
    """Compute in full precision, whatever autocast the caller is in; the network alone follows it, in its calls.

    Parameters
    ----------
    network : bool
        Whether the network computes in full precision too.
    """
    asked = {} if network else {**_ASKED.get(), **_enabled()}
    token = _ASKED.set(asked)
    try:
        with outside_network():
            yield
    finally:
        _ASKED.reset(token)


def network_precision(device: torch.device) -> AbstractContextManager[object]:
    """Let the network compute as the caller's autocast would have it.

    No cast weights are kept: a network whose weights have changed since, by training say, would go on with the old
    ones until the caller's context ends.
    """
    dtype = _ASKED.get().get(device.type)
    if dtype is None or torch.is_autocast_enabled(device.type):  # the second: a setting of our own
        return nullcontext()
    return torch.autocast(device.type, dtype, cache_enabled=False)


def asked_precision(device: torch.device) -> torch.dtype | None:
    """Return the type that the caller's autocast has for networks on a device; None where there is none."""
    return {**_ASKED.get(), **_enabled()}.get(device.type)


def wide(tensor: Tensor) -> Tensor:
    """Return numbers of half precision in single precision."""
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


def doubled(tensor: Tensor) -> Tensor:
    """Return numbers in double precision, or in single where the device has no other."""
    return tensor.float() if tensor.device.type == "mps" else tensor.double()


def _enabled() -> dict[str, torch.dtype]:
    return {kind: torch.get_autocast_dtype(kind) for kind in _KINDS if torch.is_autocast_enabled(kind)}


@contextmanager
def outside_network() -> Iterator[None]:
    """Compute in full precision for a while inside of a network's call, as in a hook."""
    with ExitStack() as opened:
        for kind in _enabled():
            opened.enter_context(torch.autocast(kind, enabled=False))
        yield
