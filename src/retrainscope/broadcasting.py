"""Parameters that a network adds to its samples, or repeats for them, made visible one sample at a time."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

__all__ = ["Broadcasts"]

_OPERATIONS = {
    f"{before}{name}{after}"
    for name in ("add", "sub", "mul", "div", "truediv")
    for before, after in (("", ""), ("", "_"), ("__", "__"), ("__r", "__"), ("__i", "__"))
}
_EXPANSIONS = {"expand", "expand_as", "broadcast_to"}


class Broadcasts(TorchFunctionMode):
    """While active, gives some parameters an axis of samples wherever they are broadcast along one.

    A position embedding that is added to tokens, a class token that is expanded, a scale that is multiplied: the result
    is what it was, and the expanded parameter is passed on, whose gradient has a row for each sample.

    Parameters
    ----------
    parameters : mapping of Tensor to callable (expanded)
        What to tell of every use.
    """

    def __init__(self, parameters: Mapping[Tensor, Callable[[Tensor], Any]]) -> None:
        super().__init__()
        self.parameters = parameters

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        name, kwargs = getattr(func, "__name__", ""), kwargs or {}
        if name in _OPERATIONS and len(args) == 2 and all(isinstance(operand, Tensor) for operand in args):
            args = (self._expanded(args[0], args[1]), self._expanded(args[1], args[0]))
        result = func(*args, **kwargs)
        if name in _EXPANSIONS and self._is_one(args[0]) and _gains_samples(args[0], result):
            self.parameters[args[0]](result)
        return result

    def _is_one(self, operand: Any) -> bool:
        return isinstance(operand, torch.nn.Parameter) and operand in self.parameters

    def _expanded(self, operand: Tensor, other: Tensor) -> Tensor:
        """Return an operand as it is broadcast to the other, if it is one of the parameters."""
        if not self._is_one(operand):
            return operand
        expanded: Tensor = torch.broadcast_tensors(operand, other)[0]  # type: ignore[no-untyped-call]
        if not _gains_samples(operand, expanded):
            return operand
        self.parameters[operand](expanded)
        return expanded


def _gains_samples(parameter: Tensor, expanded: Tensor) -> bool:
    """Tell whether a parameter is the same along the first axis of what it is expanded to."""
    return expanded.ndim > parameter.ndim or (parameter.ndim > 0 and parameter.shape[0] == 1)
