"""What decides a result beside model and data: settings, written down for people, checkpoints and other processes."""

from collections.abc import Mapping, Set
from typing import Any

import numpy as np
from torch import Tensor

from retrainscope.base import LayerEstimator
from retrainscope.checkpoints import name_of

__all__ = ["listed", "settings_text", "told", "told_apart"]


def settings_text(estimator: LayerEstimator) -> str:
    """Return an estimator as it would be written in code, without the model."""
    settings = _settings(estimator)
    return f"{type(estimator).__name__}({', '.join(f'{k}={_text(v)}' for k, v in settings.items())})"


def _text(setting: Any) -> str:
    return name_of(setting) if callable(setting) else repr(setting)  # which of a function has its address


def told_apart(estimator: LayerEstimator) -> tuple[str, Any]:
    """Return what decides an estimator's result beside model and data, the same in every process."""
    settings, asked = _settings(estimator), estimator._autocast
    return type(estimator).__qualname__, told(settings if asked is None else settings | {"torch.autocast": str(asked)})


def told(value: Any) -> Any:
    """Return what can be written down of a setting: of functions the names."""
    if isinstance(value, Mapping):
        return sorted((str(key), told(each)) for key, each in value.items())
    if isinstance(value, Set):  # in an order that every process has
        return sorted(repr(told(each)) for each in value)
    if isinstance(value, np.ndarray | np.generic | Tensor):
        return value.tolist()
    if isinstance(value, list | tuple):
        return [told(each) for each in value]
    return name_of(value) if callable(value) else value


def listed(values: Any) -> Any:
    """Return an array or another sequence as a list."""
    return values.tolist() if isinstance(values, np.ndarray | Tensor) else list(values) if values is not None else None


def _settings(estimator: LayerEstimator) -> dict[str, Any]:
    return {k: v for k, v in estimator.get_params(deep=False).items() if k not in ("model", "progress")}
