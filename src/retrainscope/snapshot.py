"""What a model is, kept while it is lent, and put back bit for bit: `put_back`."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from retrainscope.exceptions import UnsupportedModelError
from retrainscope.sharding import is_sharded

__all__ = ["put_back"]


@contextmanager
def put_back(model: nn.Module) -> Iterator[None]:
    """Put back what a model is, on every path: its modules' attributes, its buffers, and its parameters.

    Of parameters ``requires_grad``, the gradient and the memory that they lie in are put back, and the content where a
    forward pass is known to change it (``max_norm`` of an embedding). Content is not copied else, as it may be large.

    Raises
    ------
    UnsupportedModelError
        On leaving, if a parameter was written to in place.
    """
    modules = dict(model.named_modules())
    parameters = dict(model.named_parameters())
    renormed = {id(module.weight) for module in modules.values() if getattr(module, "max_norm", None) is not None}
    whole = not is_sharded(model)  # pieces are put together in place
    versions = {n: _version(p) for n, p in parameters.items() if whole and id(p) not in renormed}
    with ExitStack() as given_back:  # of which each is done whatever comes of the others
        for buffer in dict.fromkeys(model.buffers()):
            given_back.callback(_put_back_content, buffer, buffer.clone(), _version(buffer))
        for parameter in parameters.values():
            if id(parameter) in renormed:
                given_back.callback(_put_back_content, parameter, parameter.detach().clone(), _version(parameter))
            given_back.callback(_put_back_parameter, parameter, parameter.data, parameter.requires_grad, parameter.grad)
        for module in modules.values():
            tables = [(table, dict(table)) for table in (module._parameters, module._buffers, module._modules)]
            given_back.callback(_put_back_attributes, module, dict(vars(module)), tables)
        yield
        written = [name for name, version in versions.items() if _version(parameters[name]) != version]
        if written:
            raise UnsupportedModelError(
                f"The model writes to its parameter {written[0]!r} in place when it runs, also in evaluation mode, so "
                "that measuring would change it. Let its forward pass compute with a changed copy of it instead."
            )


def _put_back_attributes(module: nn.Module, attributes: dict[str, Any], tables: list[tuple[Any, Any]]) -> None:
    """Put back whatever is held by a module, the names of its parameters, buffers and modules included."""
    vars(module).clear()
    vars(module).update(attributes)
    for table, content in tables:
        table.clear()
        table.update(content)


def _put_back_content(tensor: Tensor, content: Tensor, version: int) -> None:
    """Write to a tensor only where it has changed: a graph of the user's may still hold it."""
    if version == _version(tensor) and _equal(tensor, content):
        return
    with torch.inference_mode(tensor.is_inference()), torch.no_grad():
        if tensor.shape != content.shape:
            tensor.resize_(content.shape)
        tensor.copy_(content)


def _put_back_parameter(parameter: Tensor, data: Tensor, requires_grad: bool, gradient: Tensor | None) -> None:
    if type(data) is Tensor and (parameter.data_ptr() != data.data_ptr() or parameter.shape != data.shape):
        parameter.data = data
    if parameter.requires_grad != requires_grad:
        with torch.inference_mode(parameter.is_inference()):  # such a parameter takes it in its own mode alone
            parameter.requires_grad_(requires_grad)
    parameter.grad = gradient


def _equal(tensor: Tensor, content: Tensor) -> bool:
    # Sparse tensors cannot be compared; what is written to them is counted.
    return tensor.layout != torch.strided or torch.equal(tensor, content)


def _version(tensor: Tensor) -> int:
    """Tell how often a tensor was written to in place; tensors of inference mode do not count that."""
    return 0 if tensor.is_inference() else tensor._version
