"""Checks of single parameters, before any work."""

import cmath
import numbers
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from retrainscope.exceptions import InvalidDataError

__all__ = ["all_finite", "check_choice", "check_device", "check_number", "reason_of"]


def check_number(
    name: str, value: Any, *, whole: bool, below: float = np.inf, zero: bool = False, least: float | None = None
) -> None:
    """Refuse a parameter that is no positive number (with `zero`: a negative one), or out of its limits."""
    kind = numbers.Integral if whole else numbers.Real
    if isinstance(value, kind) and not isinstance(value, bool):
        number = float(value)
        if (number > 0 or (zero and number == 0)) and number < below and (least is None or number >= least):
            return
    what = f"{'zero or ' if zero else ''}a positive {'integer' if whole else 'number'}"
    limit = f" below {below:g}" if np.isfinite(below) else "" if least is None else f", at least {least:g}"
    raise InvalidDataError(f"The {name!r} parameter must be {what}{limit}. Got {value!r} instead.")


def check_device(device: Any) -> torch.device:
    """Return the device, or refuse one that this machine does not have."""
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError, TypeError, NotImplementedError) as error:
        raise InvalidDataError(
            f"The 'device' parameter must be a device that this machine has, such as 'cpu'. Got {device!r} "
            f"({reason_of(error)})."
        ) from error


def all_finite(tensor: Tensor) -> bool:
    """Tell whether no value is NaN or infinite."""
    # One sum is cheap; only when it is not finite (it may just have overflowed) is each value looked at.
    return cmath.isfinite(tensor.sum().item()) or bool(torch.isfinite(tensor).all())


def reason_of(error: BaseException) -> str:
    """Return the first line of an error's message, or its class where there is none."""
    return next(iter(str(error).splitlines()), "") or type(error).__name__


def check_choice(name: str, value: Any, choices: Sequence[str]) -> None:
    """Refuse a parameter that is none of the words allowed."""
    if value not in choices:
        words = " or ".join(repr(choice) for choice in choices)
        raise InvalidDataError(f"The {name!r} parameter must be {words}. Got {value!r} instead.")
